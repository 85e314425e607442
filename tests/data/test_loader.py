"""The training loader resumes after the last batch that was delivered, with and without workers."""

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from esper.data import SeededLoader, SeededSampler
from esper.leyline.errors import ConfigError


def loader(**settings: Any) -> SeededLoader:
    """A loader of the numbers 0 to 10, two at a time."""
    options = {"batch_size": 2, "sampler": SeededSampler(11, seed=7), "generator": torch.Generator()}
    return SeededLoader(TensorDataset(torch.arange(11)), **{**options, **settings})


def numbers(batches: Any) -> list[int]:
    """All numbers of some batches."""
    return [int(number) for (batch,) in batches for number in batch]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_after_the_batches_delivered(workers: int) -> None:
    options = {"num_workers": workers, "multiprocessing_context": "spawn"} if workers else {}
    first, second = loader(**options), loader()
    iterator = iter(first)
    used = numbers(next(iterator) for _ in range(3))
    assert first.state_dict() == {"seed": 7, "epoch": 0, "position": 6}
    second.load_state_dict(first.state_dict())
    assert used + numbers(second) == SeededSampler(11, seed=7).order(0)
    assert numbers(second) == SeededSampler(11, seed=7).order(1)


def test_epoch_set_after_the_iterator_was_made_still_counts() -> None:
    # Lightning makes the iterator of a resumed run before it tells the sampler which epoch it is.
    resumed = loader()
    iterator = iter(resumed)
    resumed.sampler.set_epoch(4)  # type: ignore[attr-defined]
    assert numbers(iterator) == SeededSampler(11, seed=7).order(4)


def test_incomplete_last_batch_may_be_dropped() -> None:
    dropping = loader(drop_last=True)
    assert len(numbers(dropping)) == 10
    assert dropping.state_dict() == {"seed": 7, "epoch": 1, "position": 0}


def test_other_samplers_are_refused() -> None:
    with pytest.raises(ConfigError, match="SequentialSampler.*SeededSampler"):
        SeededLoader(TensorDataset(torch.arange(3))).state_dict()


def test_reading_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    numbers(loader())
    assert torch.equal(before, torch.get_rng_state())
