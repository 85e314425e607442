"""Orders are pure functions of (seed, epoch), can be resumed anywhere, and leave the global random state alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.data.samplers import ResumableSampler, SeededSampler, StepSampler, generator_for
from esper.leyline.errors import ConfigError

sizes = st.integers(1, 60)
seeds = st.integers(0, 2**40)
epochs = st.integers(0, 1000)


def samplers(size: int, seed: int) -> list[ResumableSampler]:
    """One sampler of each kind."""
    return [SeededSampler(size, seed=seed), StepSampler(size, batch_size=3, steps=4, seed=seed)]


@given(sizes, seeds, epochs)
def test_seeded_order_is_a_permutation_and_pure(size: int, seed: int, epoch: int) -> None:
    order = SeededSampler(size, seed=seed).order(epoch)
    assert sorted(order) == list(range(size))
    assert order == SeededSampler(size, seed=seed).order(epoch)


@given(sizes, seeds, epochs)
def test_step_order_stays_in_range(size: int, seed: int, epoch: int) -> None:
    order = StepSampler(size, batch_size=2, steps=5, seed=seed).order(epoch)
    assert len(order) == 10
    assert all(0 <= index < size for index in order)


@given(sizes, seeds, epochs, st.data())
def test_resume_in_the_middle_gives_the_rest(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    for sampler, copy in zip(samplers(size, seed), samplers(size, seed), strict=True):
        stop = data.draw(st.integers(1, len(sampler)))
        sampler.set_epoch(epoch)
        iterator = iter(sampler)
        used = [next(iterator) for _ in range(stop)]
        copy.load_state_dict(sampler.state_dict())
        copy.set_epoch(epoch)
        assert used + list(copy) == sampler.order(epoch)
        assert list(copy) == sampler.order(epoch + 1)


def test_orders_differ_between_seeds_and_epochs() -> None:
    orders = {tuple(SeededSampler(50, seed=seed).order(epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_finishing_moves_on_and_starting_anew_does_not() -> None:
    sampler = SeededSampler(8)
    assert [next(iter(sampler)) for _ in range(3)] == [sampler.order(0)[0]] * 3
    assert [list(sampler) for _ in range(3)] == [sampler.order(epoch) for epoch in range(3)]


def test_set_epoch_to_another_epoch_drops_the_position() -> None:
    sampler = SeededSampler(8)
    sampler.load_state_dict({"seed": 0, "epoch": 2, "position": 5})
    sampler.set_epoch(3)
    assert list(sampler) == sampler.order(3)


def test_state_at_the_very_end_leaves_nothing_of_that_epoch() -> None:
    sampler = SeededSampler(4)
    sampler.load_state_dict({"seed": 0, "epoch": 0, "position": 4})
    assert list(sampler) == []
    assert list(sampler) == sampler.order(1)


def test_steps_do_not_depend_on_the_length_of_an_epoch() -> None:
    short = StepSampler(10_000, batch_size=4, steps=3, seed=5)
    long = StepSampler(10_000, batch_size=4, steps=9, seed=5)
    assert [index for epoch in range(3) for index in short.order(epoch)] == long.order(0)


@pytest.mark.parametrize("state", [{"seed": 1, "epoch": 0, "position": 0}, {"seed": 0, "epoch": 0, "position": 99}])
def test_foreign_state_is_refused(state: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="seed|position"):
        SeededSampler(8).load_state_dict(state)


def test_global_random_state_is_not_used() -> None:
    before = torch.get_rng_state()
    for sampler in samplers(20, 3):
        list(sampler)
    assert torch.equal(before, torch.get_rng_state())


def test_generator_depends_on_every_key_and_their_order() -> None:
    keys = [(0,), (0, 0), (0, 1), (1, 0), (1, 1), (-1, 0)]
    draws = {int(torch.randint(2**62, (), generator=generator_for(*key))) for key in keys}
    assert len(draws) == len(keys)
