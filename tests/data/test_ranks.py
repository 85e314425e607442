"""Shares of a resumable order: disjoint, equally long, resumable."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.data import RankSampler, SeededLoader, SeededSampler
from esper.leyline.errors import ConfigError, DataError


@given(total=st.integers(5, 40), size=st.integers(1, 5), epoch=st.integers(0, 3))
def test_shares_are_disjoint_and_equal(total: int, size: int, epoch: int) -> None:
    shares = [RankSampler(SeededSampler(total, seed=2), rank=rank, size=size).order(epoch) for rank in range(size)]
    assert {len(share) for share in shares} == {total // size}
    indices = [index for share in shares for index in share]
    assert len(set(indices)) == len(indices) == total // size * size


def test_a_share_resumes_in_the_middle_of_an_epoch() -> None:
    def loader() -> SeededLoader:
        sampler = RankSampler(SeededSampler(20, seed=1), rank=1, size=2)
        return SeededLoader(range(20), batch_size=3, sampler=sampler)  # type: ignore[arg-type]

    whole = [batch.tolist() for batch in loader()]
    first = loader()
    batches = iter(first)
    seen = [next(batches).tolist(), next(batches).tolist()]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert seen + [batch.tolist() for batch in second] == whole


def test_shares_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank=2"):
        RankSampler(SeededSampler(4), rank=2, size=2)
    with pytest.raises(DataError, match="3 examples"):
        RankSampler(SeededSampler(3), rank=0, size=4)
