"""A fit that goes wrong goes back to its last good snapshot, bit for bit, and on from there."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

import esper
from benchmarks import faults
from esper.leyline.base import Message
from esper.leyline.events import RollbackTrigger, RolledBack, SeedTransitioned
from esper.leyline.states import Reason
from tests.tolaria.steady import QUIET, STEADY, Run, Script, Steady, ask, batches, poison

pytestmark = [
    pytest.mark.filterwarnings("ignore:Esper. no test loader"),
    pytest.mark.filterwarnings("ignore:.training_step. returned .None."),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
# --- exact restoration -------------------------------------------------------------------------------------------

CASES = [
    faults.Case("loss is NaN", "GRAFTING", "cosine", "ema", 3),
    faults.Case("weight is infinite", "TRAINING", "cosine", "reconstruction", 2),
    faults.Case("moment is NaN", "STABILIZATION", "onecycle", "scaler", 3),
    faults.Case("weights times 1000", "FINE_TUNING", "plateau", "plain", 2),
    faults.Case("state arrays overwritten", "LOADING", "onecycle", "plain", 3),
    faults.Case("state arrays overwritten", "GRAFTING", "lambda", "accumulate", 2),
    faults.Case("Tamiyo's signal", "EVALUATING", "cosine", "plain", 3),
    faults.Case("asked for by hand", "FOSSILIZED", "plateau", "accumulate", 4),
    faults.Case("loss is NaN, three times in a row", "FINE_TUNING", "lambda", "scaler", 3),
    faults.Case("weight is infinite", "none", "plateau", "plain", 4),
    faults.Case("one step at 1000 times the learning rate", "none", "lambda", "plain", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_injected_fault_is_undone_bit_for_bit(case: faults.Case, tmp_path: Path) -> None:
    assert faults.run(case, tmp_path).wrong == ()


def test_the_campaign_covers_every_fault_in_every_stage() -> None:
    cases = faults.cases(100)
    assert len(set(cases)) == 100
    pairs = {(case.fault, case.stage) for case in cases}
    assert len(pairs) == len(faults.FAULTS) * len(faults.STAGES)


# --- the run after it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["lambda", "cosine", "onecycle", "sequential"])
def test_a_run_that_went_back_repeats_the_run_that_never_diverged(tmp_path: Path, scheduler: str) -> None:
    # The child is FOSSILIZED by step 24; nothing is under way when the fault comes.
    whole = Run(tmp_path / "a", scheduler=scheduler)
    back = Run(tmp_path / "b", {30: poison}, scheduler=scheduler)
    (event,) = back.rollbacks
    assert (event.restored_step, event.step, event.locked_seeds) == (28, 31, ())
    assert math.isnan(back.module.losses[30])
    assert back.module.losses[31:] == whole.module.losses[28:37]
    assert back.bank_seeds() and back.states == whole.states == ["FOSSILIZED"]


def test_a_snapshot_from_before_the_child_gives_the_run_that_never_grew(tmp_path: Path) -> None:
    # The second fault comes back at once, and the snapshot before the newest one knows of no child.
    bare = Run(tmp_path / "a", at=1000)
    back = Run(tmp_path / "b", dict.fromkeys((13, 14, 15), poison), at=8, rollback={"conservative": 1000})
    assert [event.restored_step for event in back.rollbacks] == [12, 8, 4]
    assert [event.locked_seeds for event in back.rollbacks] == [("net.3#0.0",), (), ()]
    assert back.module.losses[16:] == bare.module.losses[4:28]
    assert back.states == ["ROLLED_BACK"]
    assert len(back.trainer.optimizers[0].param_groups) == 1


def test_a_removed_child_comes_back_as_the_same_object_with_its_group(tmp_path: Path) -> None:
    kept: dict[str, Any] = {}

    def note(script: Script) -> None:
        (kept["graft"],) = script.tamiyo.bank.grafted().values()
        kept["group"] = script.trainer.optimizers[0].param_groups[1]
        kept["host"] = list(script.module.net.parameters())

    def look(message: Message) -> None:
        if isinstance(message, RolledBack) and message.restored_step == 12:
            script = run_script[0]
            assert list(script.tamiyo.bank.grafted().values()) == [kept["graft"]]
            assert script.trainer.optimizers[0].param_groups[1] is kept["group"]
            assert all(a is b for a, b in zip(kept["host"], script.module.net.parameters(), strict=True))
            looked.append(message)

    run_script: list[Script] = []
    looked: list[Message] = []

    def listen(script: Script) -> None:
        run_script.append(script)
        script.tamiyo.controller.listeners.append(look)

    # Culled at step 16, as the gate asks for an impossible gain.
    acts = {0: listen, 13: note, 18: ask, 19: ask}
    run = Run(tmp_path, acts, settings={"min_effect": 100.0}, rollback={"conservative": 1000})
    assert looked and [event.restored_step for event in run.rollbacks] == [16, 12]
    assert run.rollbacks[1].locked_seeds == ("net.3#0.0",)


def test_snapshots_change_nothing(tmp_path: Path) -> None:
    runs = [Run(tmp_path / str(window), rollback={"window": window}) for window in (0, 5)]
    assert runs[0].module.losses == runs[1].module.losses
    assert runs[0].states == runs[1].states


# --- what becomes of the seeds -----------------------------------------------------------------------------------


def test_the_guilty_seed_is_locked_reported_and_never_used_again(tmp_path: Path) -> None:
    run = Run(tmp_path, {13: poison, 35: ask}, rollback={"conservative": 0})
    assert run.rollbacks[0].locked_seeds == ("net.3#0.0",)
    (report,) = [r for r in run.tamiyo.controller.reports if r.outcome.value == "ROLLED_BACK"]
    assert (report.reason, report.group) == (Reason.EMERGENCY, "schedule-0")
    on_disk = [json.loads(line) for line in (tmp_path / "fieldreports.jsonl").read_text().splitlines()]
    assert [entry["outcome"] for entry in on_disk] == ["ROLLED_BACK"]
    moves = [e for e in run.events if isinstance(e, SeedTransitioned) and e.target.value == "ROLLED_BACK"]
    assert [e.source.value for e in moves] == ["STABILIZATION"]
    assert run.events.index(run.rollbacks[0]) < run.events.index(moves[0])
    assert run.states == ["ROLLED_BACK"] and not run.bank_seeds()
    assert str(run.tamiyo.bank.free_slot("net.3")) == "net.3#0.1"


def test_the_whole_trial_of_the_guilty_seed_ends(tmp_path: Path) -> None:
    settings = {"start": 8, "period": 1000, "below_standout": "nothing", "overhead": None}
    run_events: list[Message] = []
    module, script = Steady(), Script({14: poison})
    tamiyo = esper.Tamiyo(
        "heuristic",
        targets=["net.3"],
        settings=settings
        | {"menu": ("BP-MLP-GELU", "BP-PROJ-LORA", "BP-WIDEN"), "budget": 3000, "proxy": 300}
        | STEADY,
        kasmina={"ramp_steps": 8, "stabilization_steps": 8},
        bus=run_events.append,
    )
    Trainer(callbacks=[tamiyo, script], max_steps=24, max_epochs=-1, default_root_dir=tmp_path, **QUIET).fit(
        module, batches(), batches(1)
    )
    (event,) = [e for e in run_events if isinstance(e, RolledBack)]
    outcomes = sorted((r.outcome.value, r.reason.value) for r in tamiyo.controller.reports)
    assert len(outcomes) > 1
    assert outcomes == sorted([("ROLLED_BACK", "EMERGENCY"), *[("CULLED", "EMERGENCY")] * (len(outcomes) - 1)])
    assert len(event.locked_seeds) == 1 and not tamiyo.bank.grafted()


def test_after_a_rollback_nothing_germinates_for_a_while(tmp_path: Path) -> None:
    def germinations(conservative: int) -> list[int]:
        run = Run(tmp_path / str(conservative), {6: ask}, rollback={"conservative": conservative})
        events = [e for e in run.events if isinstance(e, SeedTransitioned)]
        return [e.step for e in events if e.target.value == "GERMINATED"]

    assert germinations(0) == [8]
    assert germinations(15) == [24]


def test_every_trigger_is_among_the_injected_faults() -> None:
    assert set(faults.FAULTS.values()) == set(RollbackTrigger)
