"""Fingerprints, shares of the data and the messages between ranks, as far as one process can show them."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import esper
from esper.data import RankSampler, SeededLoader, SeededSampler
from esper.leyline.errors import CheckpointError, DistributedError
from esper.tolaria.distributed import Ranks
from esper.tolaria.exchange import bit_sum, fingerprint, require_agreement
from esper.tolaria.rank_state import own_state, reshare
from esper.tolaria.sharded import read_entry
from esper.tolaria.shards import own_samples, unpadded


def share(total: int, rank: int, size: int, batch: int) -> Iterator[list[int]]:
    data = list(range(total))
    sampler = DistributedSampler(data, num_replicas=size, rank=rank, shuffle=False)  # type: ignore[arg-type,var-annotated]
    return (found.tolist() for found in unpadded(DataLoader(data, batch_size=batch, sampler=sampler)))  # type: ignore[arg-type]


@given(total=st.integers(1, 40), size=st.integers(1, 5), batch=st.integers(1, 7))
def test_every_sample_is_measured_on_exactly_one_rank(total: int, size: int, batch: int) -> None:
    found = [index for rank in range(size) for part in share(total, rank, size, batch) for index in part]
    assert sorted(found) == list(range(total))


def test_a_loader_without_padding_comes_as_it_is() -> None:
    assert own_samples(DataLoader([1, 2, 3])) is None  # type: ignore[arg-type]
    assert [len(batch) for batch in unpadded(DataLoader([1, 2, 3], batch_size=2))] == [2, 1]  # type: ignore[arg-type]


@given(st.lists(st.floats(width=32), min_size=1, max_size=8), st.data())
def test_one_changed_bit_changes_the_fingerprint(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    other = tensor.clone()
    place = data.draw(st.integers(0, len(values) - 1))
    other.view(torch.int32)[place] ^= 1 << data.draw(st.integers(0, 30))
    assert bit_sum([tensor]) != bit_sum([other])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.bool, torch.int64]
)
def test_every_type_has_a_fingerprint(dtype: torch.dtype) -> None:
    ones = torch.ones(3, 2, dtype=dtype)
    assert bit_sum([ones]) != bit_sum([torch.zeros_like(ones)])
    assert bit_sum([ones.T]) == bit_sum([ones])


def test_a_fingerprint_covers_topology_and_weights() -> None:
    morphable = esper.wrap(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    before = fingerprint(morphable, morphable.bank)
    with torch.no_grad():
        morphable.host[0].weight[0, 0] += 1e-7  # type: ignore[index,union-attr,operator]
    after = fingerprint(morphable, morphable.bank)
    assert {name for name in before if before[name] != after[name]} == {"weights"}


def test_ranks_that_differ_are_named() -> None:
    same = {"topology": 1, "weights": 2}
    with pytest.raises(
        DistributedError, match=r"rank 1 in its weights; rank 3 in its topology, weights \(of 4 ranks\)"
    ):
        require_agreement([same, {"topology": 1, "weights": 3}, same, {"topology": 0, "weights": 0}], "at step 5")


def test_one_process_sends_nothing() -> None:
    alone, tensor = Ranks(), torch.ones(2)
    alone.add_up(tensor)
    assert tensor.tolist() == [1.0, 1.0]
    assert alone.maximum([3, 1]) == [3, 1] and alone.total([0.5]) == [0.5] and not alone.any(False)


def test_another_number_of_ranks_is_told() -> None:
    two = {"esper": {"ranks": [{"loss": [0.0, 0, 0]}, {"loss": [1.0, 1, 1]}]}}
    assert own_state(two, 1, 2) == {"loss": [1.0, 1, 1]}
    for checkpoint, size in ((two, 1), (two, 4), ({"esper": {"ranks": []}}, 2)):
        with pytest.warns(UserWarning, match="random state and the order of the data differ"):
            assert own_state(checkpoint, 0, size) == {}
    assert own_state({}, 0, 2) == {} and own_state({"esper": {"ranks": []}}, 0, 1) == {}


@given(
    before=st.integers(1, 6),
    after=st.integers(1, 6),
    batch=st.integers(1, 4),
    data=st.data(),
    total=st.integers(30, 99),
)
def test_another_number_of_ranks_shares_what_is_left_of_an_epoch(
    before: int, after: int, batch: int, data: st.DataObject, total: int
) -> None:
    def loader(rank: int, size: int) -> SeededLoader:
        sampler = RankSampler(SeededSampler(total), rank=rank, size=size) if size > 1 else SeededSampler(total)
        return SeededLoader(range(total), batch_size=batch, sampler=sampler, drop_last=True)  # type: ignore[arg-type]

    done = data.draw(st.integers(0, len(loader(0, before))))
    saved: list[SeededLoader] = [loader(rank, before) for rank in range(before)]
    old = [index for one in saved for part in islice(one, done) for index in part.tolist()]
    checkpoint = interrupted(before, done, saved[0].state_dict())
    reshare(checkpoint, after)
    fit = checkpoint["loops"]["fit_loop"]
    ready, resumed = (
        fit["epoch_loop.batch_progress"]["current"]["ready"],
        [loader(rank, after) for rank in range(after)],
    )
    new: list[int] = []
    for one in resumed:
        one.load_state_dict(fit["state_dict"]["combined_loader"][0])
        parts = list(one)
        assert ready <= len(one) and len(parts) >= len(one) - ready
        new += [index for part in parts for index in part.tolist()]
    # Less than a batch of each process comes twice, and only what no whole batch is left for is not seen.
    assert len(set(old) & set(new)) < batch * max(before, after) + before
    assert total - len(set(old) | set(new)) < batch * max(before, after) + after


def interrupted(size: int, done: int, place: dict[str, int]) -> dict[str, Any]:
    """What of a checkpoint tells how far an epoch is."""
    current = dict.fromkeys(("ready", "started", "processed", "completed"), done)
    loops = {"epoch_loop.batch_progress": {"current": current}, "state_dict": {"combined_loader": [place]}}
    ranks = [{} for _ in range(size)] if size > 1 else []
    run = {"pause": "STEP", "gradients": {"w": torch.ones(1)}}
    return {"esper": {"run": run, "ranks": ranks}, "loops": {"fit_loop": loops}}


def test_the_place_in_an_epoch_is_rescaled_for_another_number_of_ranks_only() -> None:
    place = {"seed": 0, "epoch": 1, "position": 96}
    for size, position, ready, pause in (
        (2, 96, 3, "STEP"),
        (1, 192, 6, "STEP"),
        (4, 32, 1, "STEP"),
        (8, 0, 0, "ITERATION"),
    ):
        checkpoint = interrupted(2, 3, dict(place))
        reshare(checkpoint, size)
        fit, run = checkpoint["loops"]["fit_loop"], checkpoint["esper"]["run"]
        assert fit["state_dict"]["combined_loader"] == [place | {"position": position}]
        assert fit["epoch_loop.batch_progress"]["current"]["completed"] == ready
        assert run["pause"] == pause and ("gradients" in run) is (size == 2)
    foreign = interrupted(2, 3, {"worker": 5})
    reshare(foreign, 1)
    assert foreign["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"worker": 5}]
    plain: dict[str, Any] = {"loops": {"fit_loop": {}}}
    reshare(plain, 3)
    assert plain == {"loops": {"fit_loop": {}}}


def test_a_damaged_sharded_checkpoint_is_refused(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    (folder / "meta.pt").write_bytes(b"nothing that torch wrote")
    for path in (folder, folder / "meta.pt", folder / "missing"):
        with pytest.raises(CheckpointError, match="use another checkpoint"):
            read_entry(path)
