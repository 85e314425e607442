"""Which snapshots a rollback has to choose from, what it does when none is left, and what else comes back with them."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import nn

import esper
from esper.leyline.base import Message
from esper.leyline.errors import RollbackError, StateCorruption
from esper.leyline.events import RolledBack
from esper.tolaria.kept import same_bits
from esper.tolaria.rollback import SnapshotWindow
from tests.tolaria.steady import QUIET, Run, Script, Steady, ask, batches, poison

pytestmark = [
    pytest.mark.filterwarnings("ignore:Esper. no test loader"),
    pytest.mark.filterwarnings("ignore:.training_step. returned .None."),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

# --- the window --------------------------------------------------------------------------------------------------


def test_a_fault_that_comes_back_goes_further_back_and_then_says_so(tmp_path: Path) -> None:
    with pytest.raises(RollbackError, match="no good snapshot is left.*NON_FINITE_LOSS"):
        Run(tmp_path, dict.fromkeys(range(14, 40), poison), at=1000, rollback={"window": 3})
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["restored_step"] for e in events if e["type"] == "RolledBack"] == [12, 8, 4]


def test_a_fault_long_after_the_last_one_uses_the_same_snapshot_again(tmp_path: Path) -> None:
    run = Run(tmp_path, {13: poison, 14: poison}, at=1000, rollback={"relapse_steps": 1})
    assert [event.restored_step for event in run.rollbacks] == [12, 12]


def test_without_a_window_a_run_goes_on_as_ever_and_a_request_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", {13: poison}, at=1000, rollback={"window": 0}, steps=20)
    assert run.rollbacks == [] and math.isnan(run.module.losses[-1])
    with pytest.raises(RollbackError, match="rollback is off"):
        Run(tmp_path / "b", {13: ask}, at=1000, rollback={"window": 0})


def corrupt(script: Script) -> None:
    script.tamiyo.bank.arrays.columns["lifecycle"][0] = 7


def test_corruption_without_a_good_snapshot_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(StateCorruption):
        Run(tmp_path / "a", {13: corrupt}, rollback={"window": 0})

    def spoil(script: Script) -> None:
        corrupt(script)
        script.tamiyo._emergency.window = SnapshotWindow(5, 1.0)

    with pytest.raises(StateCorruption, match="no good snapshot"):
        Run(tmp_path / "b", {13: spoil})


def test_a_fit_that_is_not_well_leaves_no_snapshot(tmp_path: Path) -> None:
    def spoil(script: Script) -> None:
        # Nothing reads this parameter, so no loss tells of it.
        script.trainer.optimizers[0].param_groups[0]["params"].append(nn.Parameter(torch.tensor([math.inf])))

    run = Run(tmp_path, {9: spoil, 30: ask}, at=1000)
    assert [event.restored_step for event in run.rollbacks] == [8]


def test_the_window_keeps_the_last_and_what_did_not_change_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def look(script: Script) -> None:
        window = script.tamiyo._emergency.window
        seen.append((len(window), window.nbytes))

    Run(tmp_path / "a", {1: look, 5: look, 38: look}, at=1000)
    frozen = 4 * (64 * 64 + 64)
    (one, first), (two, both), (five, all_five) = seen
    assert (one, two, five) == (1, 2, 5)
    assert both - first < first  # the frozen layer is copied once
    assert all_five < 5 * (both - first) + frozen + first
    small = 2e-5  # GiB, about 21 kB: less than two snapshots
    seen.clear()
    Run(tmp_path / "b", {38: look}, at=1000, rollback={"memory_gb": small})
    assert seen[0][0] == 1


def test_a_run_that_went_back_resumes_from_a_later_checkpoint(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_top_k=-1, filename="{step}")
    whole = Run(tmp_path / "a", {13: poison}, extra=[keep], enable_checkpointing=True)
    checkpoint = tmp_path / "checkpoints" / "step=24.ckpt"
    rest = Run(tmp_path / "b", enable_checkpointing=True, ckpt_path=checkpoint)
    assert rest.module.losses == whole.module.losses[24:]
    assert rest.states == whole.states == ["ROLLED_BACK"]
    assert rest.tamiyo.controller.calm_until == whole.tamiyo.controller.calm_until > 14


# --- what others hold --------------------------------------------------------------------------------------------


def test_early_stopping_and_averaged_weights_go_back_too(tmp_path: Path) -> None:
    average, stopping = EMAWeightAveraging(decay=0.9), EarlyStopping("val_loss", patience=100)
    kept: dict[str, Any] = {}

    def note(script: Script) -> None:
        kept["average"] = copy.deepcopy(average._average_model.state_dict())
        kept["stopping"] = copy.deepcopy(stopping.state_dict())

    def spoil(script: Script) -> None:
        for p in average._average_model.parameters():
            p.data.fill_(math.nan)
        stopping.wait_count = 50
        ask(script)

    def look(message: Message) -> None:
        if isinstance(message, RolledBack):
            found = average._average_model.state_dict()
            assert all(same_bits(value, found[name]) for name, value in kept["average"].items())
            assert stopping.state_dict() == kept["stopping"]
            kept["looked"] = True

    def listen(script: Script) -> None:
        script.tamiyo.controller.listeners.append(look)

    run = Run(tmp_path, {0: listen, 12: note, 14: spoil}, at=1000, extra=[average, stopping])
    assert kept["looked"]
    assert all(bool(torch.isfinite(p).all()) for p in run.module.parameters())


def test_a_skipped_step_and_outputs_without_a_loss_are_no_fault(tmp_path: Path) -> None:
    class Skipping(Steady):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    tamiyo = esper.Tamiyo("off", targets=["net.3"])
    heard: list[Message] = []
    tamiyo.bus = heard.append
    quiet = Trainer(callbacks=[tamiyo], max_epochs=3, default_root_dir=tmp_path, **QUIET)
    quiet.fit(Skipping(), batches(), batches(1))
    assert not [event for event in heard if isinstance(event, RolledBack)]
