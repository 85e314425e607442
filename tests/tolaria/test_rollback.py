"""A fit that goes wrong goes back to its last good snapshot, bit for bit, and on from there."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import esper
from benchmarks import faults
from esper.leyline.base import Message
from esper.leyline.errors import RollbackError, StateCorruption
from esper.leyline.events import RollbackTrigger, RolledBack, SeedTransitioned
from esper.leyline.states import Reason
from esper.tolaria.kept import Copier, KeptModules, give_back, same_bits
from esper.tolaria.rollback import SnapshotWindow

pytestmark = [
    pytest.mark.filterwarnings("ignore:Esper. no test loader"),
    pytest.mark.filterwarnings("ignore:.training_step. returned .None."),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
Action = Callable[["Script"], None]
STEADY = {"rollback": {"worsening": None, "spike": None}}


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}


class Steady(LightningModule):
    """Every batch is the same; dropout makes each step depend on the random state."""

    def __init__(self, scheduler: str = "lambda") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8), nn.Linear(8, 3))
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.scheduler, self.losses, self.poison = scheduler, [], False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1]) * (math.nan if self.poison else 1.0)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer, lr = torch.optim.AdamW(trained, lr=1e-2), torch.optim.lr_scheduler
        made = {
            "lambda": lambda: lr.LambdaLR(optimizer, lambda step: 0.97**step),
            "cosine": lambda: lr.CosineAnnealingLR(optimizer, 60),
            "onecycle": lambda: lr.OneCycleLR(optimizer, 2e-2, total_steps=200),
            "sequential": lambda: lr.SequentialLR(
                optimizer, [lr.LinearLR(optimizer, 0.1, total_iters=8), lr.CosineAnnealingLR(optimizer, 60)], [8]
            ),
        }[self.scheduler]()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}


class Script(Callback):
    """Does given things before given batches, counted from 0 over the whole run, behind Tamiyo's back."""

    def __init__(self, acts: dict[int, Action]) -> None:
        self.acts, self.batch = acts, -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.trainer, self.module, self.batch = trainer, pl_module, self.batch + 1
        self.tamiyo = next(c for c in trainer.callbacks if isinstance(c, esper.Tamiyo))
        pl_module.poison = False
        if self.batch in self.acts:
            self.acts[self.batch](self)


def ask(script: Script) -> None:
    script.tamiyo.controller.request_rollback("by the test")


def poison(script: Script) -> None:
    script.module.poison = True


def batches(count: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 8, generator=generator), torch.randint(3, (32,), generator=generator)
    # With a generator of its own, a loader's new epoch draws nothing from the global random stream.
    return DataLoader(TensorDataset(x.repeat(count, 1), y.repeat(count)), batch_size=32, generator=generator)


class Run:
    """One fit of the steady module, with a script; four batches between boundaries."""

    def __init__(
        self,
        folder: Path,
        acts: dict[int, Action] | None = None,
        *,
        scheduler: str = "lambda",
        at: int = 8,
        rollback: dict[str, Any] | None = None,
        kasmina: dict[str, Any] | None = None,
        steps: int = 40,
        extra: list[Callback] | None = None,
        ckpt_path: Path | None = None,
        **given: Any,
    ) -> None:
        entry = {"at": at, "blueprint": "BP-MLP-GELU", "site": "net.3", "params": 400}
        settings = {"schedule": (entry,), "budget": 2000, "price_per_kparam": 0.0, "decision_samples": 32}
        settings |= {"rollback": {"worsening": None, "spike": None} | (rollback or {})} | given.pop("settings", {})
        self.events: list[Message] = []
        self.module, self.script = Steady(scheduler), Script(acts or {})
        self.tamiyo = esper.Tamiyo(
            "schedule",
            targets=["net.3"],
            settings=settings,
            kasmina={"ramp_steps": 3, "stabilization_steps": 4} | (kasmina or {}),
            bus=self.events.append,
        )
        self.trainer = Trainer(
            callbacks=[self.tamiyo, self.script, *(extra or [])],
            max_steps=steps,
            max_epochs=-1,
            default_root_dir=folder,
            **(QUIET | given),
        )
        self.trainer.fit(self.module, batches(), batches(1), ckpt_path=ckpt_path)

    @property
    def rollbacks(self) -> list[RolledBack]:
        return [event for event in self.events if isinstance(event, RolledBack)]

    @property
    def states(self) -> list[str]:
        return [view.state.value for view in self.tamiyo.morphable.seeds if view.state.value != "DORMANT"]

    def bank_seeds(self) -> set[str]:
        return {str(seed) for seed in self.tamiyo.bank.grafted()}


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
    settings = {"start": 8, "period": 1000, "below_standout": "nothing"}
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


# --- pieces ------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_deep_both_ways() -> None:
    optimizer_state = {"step": torch.tensor(3.0), "nested": [torch.ones(2), {"plain": (1, "a")}]}
    kept = Copier("cpu").value(optimizer_state)
    optimizer_state["nested"][0].fill_(9.0)
    first = give_back(kept)
    assert first["nested"][0] is optimizer_state["nested"][0]
    assert torch.equal(first["nested"][0], torch.ones(2))
    first["nested"].append("changed")
    first["nested"][0].zero_()
    again = give_back(kept)
    assert len(again["nested"]) == 2 and torch.equal(again["nested"][0], torch.ones(2))


def test_modules_come_back_with_tied_and_expanded_and_lazy_tensors() -> None:
    module = nn.Module()
    module.one = nn.Linear(2, 2)
    module.two = nn.Linear(2, 2)
    module.two.weight = module.one.weight
    module.register_buffer("wide", torch.zeros(1).expand(4))
    module.register_buffer("absent", None)
    module.lazy = nn.LazyLinear(3)
    before = {name: p.detach().clone() for name, p in module.named_parameters() if name[:4] != "lazy"}
    kept = KeptModules(module, Copier("cpu"))
    with torch.no_grad():
        module.one.weight.fill_(5)
    module.wide = torch.ones(4)
    module.two.weight = nn.Parameter(torch.zeros(2, 2))
    module.one.weight.grad = torch.ones(2, 2)
    kept.put_back()
    assert module.two.weight is module.one.weight and module.one.weight.grad is None
    assert all(torch.equal(before[name], module.get_parameter(name)) for name in before)
    assert torch.equal(module.wide, torch.zeros(4)) and module.absent is None


def test_bits_tell_what_numbers_do_not() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.int8):
        one = torch.ones(2, 3, dtype=dtype)
        assert same_bits(one, one.clone()) and not same_bits(one, one[:1]) and not same_bits(one, 0 * one)
    assert not same_bits(torch.ones(2), torch.ones(2, dtype=torch.float64))


def test_every_trigger_is_among_the_injected_faults() -> None:
    assert set(faults.FAULTS.values()) == set(RollbackTrigger)
