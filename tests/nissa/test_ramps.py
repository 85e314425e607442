import pytest

from esper.nissa.ramps import LIMIT, Ramp, Ramps


def test_a_ramp_keeps_what_changed() -> None:
    ramps = Ramps()
    for step, alpha in enumerate((0.0, 0.5, 1.0, 1.0, 1.0), start=7):
        ramps.note(step, {"a": alpha})
    ramps.note(12, {})
    ramps.note(13, {})
    assert ramps.of["a"].points == [(7, 0.0), (8, 0.5), (9, 1.0), (12, 0.0)]


def test_steps_that_come_again_replace_what_came_after() -> None:
    ramps = Ramps()
    for step in range(10):
        ramps.note(step, {"a": step / 10, "b": 1.0} if step > 4 else {"a": step / 10})
    ramps.note(3, {"a": 0.9})
    assert ramps.of["a"].points == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.9)]
    assert "b" not in ramps.of


@pytest.mark.parametrize("length", [LIMIT, LIMIT + 1, 10 * LIMIT, 25 * LIMIT + 3])
def test_a_long_ramp_is_bounded_and_keeps_its_ends(length: int) -> None:
    ramp = Ramp()
    for step in range(length + 1):
        ramp.add(step, step / length)
    ramp.add(length + 5000, 0.0)
    assert len(ramp.points) <= LIMIT
    assert ramp.points[0] == (0, 0.0) and ramp.points[-2:] == [(length, 1.0), (length + 5000, 0.0)]
    assert all(alpha == step / length for step, alpha in ramp.points[:-1])
    gaps = [b[0] - a[0] for a, b in zip(ramp.points, ramp.points[1:-1], strict=False)]
    assert max(gaps) <= ramp.stride


def test_many_lives_of_one_seed_are_bounded() -> None:
    ramp = Ramp()
    for step in range(5 * LIMIT):
        ramp.add(100 * step, float(step % 2))
    assert len(ramp.points) <= LIMIT


@pytest.mark.parametrize("cut", [3, LIMIT + 7, 3 * LIMIT])
def test_a_saved_ramp_goes_on_as_if_nothing_had_happened(cut: int) -> None:
    whole, parts = Ramps(), Ramps()
    for step in range(4 * LIMIT):
        if step == cut:
            parts = Ramps.from_plain(parts.to_plain())
        for ramps in (whole, parts):
            ramps.note(step, {"a": step / 4e3, "b": min(1.0, step / 50)})
    assert parts == whole and parts is not whole


def test_until_forgets_the_future() -> None:
    ramps = Ramps()
    for step in range(10):
        ramps.note(step, {"a": step / 10, "b": 0.5} if step > 6 else {"a": step / 10})
    assert ramps.until(5).of.keys() == {"a"} and ramps.until(5).of["a"].points[-1] == (5, 0.5)
