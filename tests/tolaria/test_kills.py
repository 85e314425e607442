"""Signals and kills: an interrupted run ends in order, and however it ended, its resume is the uninterrupted run."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from benchmarks.kills import Tally, _start, _wait, campaign, differences, table
from tests.helpers import digits
from tests.tolaria.runs import Dropping, Run, assert_same, resumed

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell that runs the tests in the background lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupted(Dropping):
    """Gets a signal in the middle of its eighth step."""

    number = signal.SIGTERM
    times = 1

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.total_batch_idx == 7:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def interrupted(folder: Path, number: signal.Signals, *, times: int = 1, **given: Any) -> Run:
    module = Interrupted()
    module.number, module.times = number, times
    keep = ModelCheckpoint(folder / "kept", every_n_train_steps=3)
    return Run(folder, module=module, callbacks=[keep], max_epochs=2, **given)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_signal_ends_the_run_behind_the_batch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals, status: int, accumulate: int
) -> None:
    given: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    whole = Run(tmp_path / "whole", max_epochs=2, **given).fit()
    cut = interrupted(tmp_path / "cut", number, **given)
    with pytest.raises(SystemExit) as ended:
        cut.fit()
    assert ended.value.code == status
    saved = tmp_path / "cut" / "kept" / "interrupted.ckpt"
    told = capfd.readouterr().err
    assert f"{number.name}: the run ends after step {cut.trainer.global_step}" in told and str(saved) in told
    assert torch.load(saved, weights_only=True)["esper"]["run"]["pause"] == "ITERATION"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    part = resumed(cut, saved, tmp_path / "part", max_epochs=2, **given)
    assert_same(whole, part, batches=8)


class InValidation(Dropping):
    """Gets a signal in the middle of its second validation, whose loader draws from the global generator."""

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.global_step == 10:
            os.kill(os.getpid(), signal.SIGTERM)


def loaders() -> tuple[Any, Any]:
    data = digits(train=320)
    data.setup()
    return data.train_dataloader(), DataLoader(data.parts.decision, batch_size=64)


@pytest.mark.filterwarnings("ignore:Esper. no test loader")
def test_a_validation_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", data=loaders(), max_epochs=4).fit()
    keep = ModelCheckpoint(tmp_path / "cut" / "kept", every_n_train_steps=300)
    cut = Run(tmp_path / "cut", data=loaders(), max_epochs=4, module=InValidation(), callbacks=[keep])
    with pytest.raises(SystemExit):
        cut.fit()
    saved = tmp_path / "cut" / "kept" / "interrupted.ckpt"
    assert torch.load(saved, weights_only=True)["esper"]["run"]["pause"] == "STEP"
    part = resumed(cut, saved, tmp_path / "part", data=loaders(), max_epochs=4)
    assert_same(whole, part, batches=10)


def test_a_second_interrupt_stops_at_once_and_saves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    cut = interrupted(tmp_path, signal.SIGINT, times=2)
    try:
        with pytest.raises(SystemExit):
            cut.fit()
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on.
    assert "Again Ctrl-C stops at once" in capfd.readouterr().err
    assert not (tmp_path / "kept" / "interrupted.ckpt").exists()
    assert cut.trainer.global_step == 7


def test_a_handler_of_the_users_own_stays(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        interrupted(tmp_path, signal.SIGINT).fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]


# --- real processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_processes_come_to_the_same_end(tmp_path: Path) -> None:
    tally = campaign("mlp", 4, tmp_path, seed=5, steps=60)
    assert not tally.failures
    assert sum(tally.kills.values()) == 4


@pytest.mark.slow
def test_two_fresh_processes_agree_in_every_bit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _wait(_start("strict", tmp_path / name, 40))
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_a_difference_is_a_failure_in_the_table() -> None:
    tally = Tally("mlp", failures=["run 1: weights"])
    tally.kills["SIGKILL"] = 2
    text = table([tally], 60)
    assert "| mlp | 2 | 2 | 0 | 0 | 0 | 0 | 1 | 0 |" in text and "- run 1: weights" in text
