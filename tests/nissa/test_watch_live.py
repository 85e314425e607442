"""What a run says of itself while it runs."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from esper.nissa.callback import GrowthReport
from esper.nissa.curve import LossCurve
from esper.nissa.watch import live
from esper.nissa.watch.live import FILE, Live, Pulse, read_live
from esper.tamiyo.callback import Tamiyo
from tests.helpers import QUICK, Plain, digits, planting, trainer


def told(folder: Path) -> Live:
    found = read_live((folder / FILE).read_bytes())
    assert found is not None
    return found


class Clock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    return clock


def test_it_is_written_twice_a_second(tmp_path: Path, clock: Clock) -> None:
    pulse, losses = Pulse(tmp_path, Live(run_id="r", title="t")), LossCurve()
    assert told(tmp_path).began == 1000.0 and told(tmp_path).step == 0
    seen = set()
    for step in range(1, 41):
        losses.add(step, 40.0 - step)
        clock.now += 0.1
        pulse.beat(step, 2, {"a": 0.25, "kept": 1.0}, losses)
        seen.add(told(tmp_path).step)
    last = told(tmp_path)
    assert len(seen) == 8 and last.epoch == 2 and last.title == "t"
    assert last.steps_per_s == pytest.approx(10.0) and last.alphas == {"a": 0.25}
    assert last.train_loss == pytest.approx(sum(40.0 - s for s in range(last.step - 19, last.step + 1)) / 20)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_last_word_stays(tmp_path: Path, clock: Clock) -> None:
    pulse, losses = Pulse(tmp_path, Live(run_id="r")), LossCurve(points=[(1, math.nan)])
    pulse.beat(1, 0, {}, losses)
    pulse.end("stopped", 3, losses, "ValueError: no")
    pulse.end("ended", 4, losses)
    last = told(tmp_path)
    assert (last.state, last.detail, last.step, last.train_loss) == ("stopped", "ValueError: no", 3, None)


def test_a_run_goes_on_where_it_cannot_be_written(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pulse = Pulse(tmp_path / "gone", Live(run_id="r"))
        for step in range(1, 9):
            clock.now += 1.0
            pulse.beat(step, 0, {}, LossCurve())
    assert [record.message for record in caplog.records if "nobody can watch the run live" in record.message]
    assert len(caplog.records) <= 2


class Failing(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(self.train_losses) == 5:
            raise ValueError("broken on purpose\nin two lines")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_real_run_says_how_it_is_and_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    said: list[Live] = []
    write = Pulse._write
    monkeypatch.setattr(Pulse, "_write", lambda self, what: (write(self, what), said.append(told(tmp_path)))[0])
    callbacks = [
        Tamiyo("schedule", kasmina=QUICK, settings=planting(), targets=["net.*"], output_dir=str(tmp_path)),
        GrowthReport(title="digits"),
    ]
    fit = trainer(tmp_path, None, epochs=3, callbacks=callbacks, enable_checkpointing=False)
    if fails:
        with pytest.raises(ValueError, match="on purpose"):
            fit.fit(Failing(), datamodule=digits())
        assert (said[-1].state, said[-1].detail) == ("stopped", "ValueError: broken on purpose")
        assert said[-1].step == 5
        return
    fit.fit(Plain(), datamodule=digits())
    assert (said[0].state, said[0].step, said[0].total_steps, said[0].host_params > 0) == ("running", 0, 30, True)
    assert {s.step for s in said} == set(range(31)) and said[-1].state == "ended"
    (child,) = {seed for s in said for seed in s.alphas}
    ramp = {s.step: s.alphas.get(child) for s in said if s.step in range(10, 15)}
    assert ramp == {10: 0.0, 11: 0.25, 12: 0.5, 13: 0.75, 14: None}
