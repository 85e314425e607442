"""The paired counterfactual, and that taking it changes nothing."""

import math
import random
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

import esper
from esper.leyline.errors import DataError
from esper.tolaria.evidence import batch_size, losses_of, paired, split, step_loss
from esper.tolaria.parts import FromLoader
from esper.tolaria.snapshot import undisturbed
from tests.helpers import QUICK, Plain, digits, grow, planting, trainer

FLOATS = st.floats(-100, 100)


@given(st.lists(FLOATS, min_size=2, max_size=40), FLOATS)
def test_a_constant_gain_is_its_own_interval(losses: list[float], gain: float) -> None:
    with_child = torch.tensor(losses, dtype=torch.float64)
    found = paired(with_child + gain, with_child, 0.95)
    assert found.mean == pytest.approx(gain, abs=1e-9)
    assert found.lower == pytest.approx(gain, abs=1e-6) == found.upper


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=2, max_size=40))
def test_swapping_on_and_off_mirrors_the_interval(pairs: list[tuple[float, float]]) -> None:
    off, on = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    one, other = paired(off, on, 0.95), paired(on, off, 0.95)
    assert one.mean == pytest.approx(-other.mean, abs=1e-9)
    assert one.lower == pytest.approx(-other.upper, abs=1e-9)
    assert one.lower <= one.mean <= one.upper


def test_the_interval_covers_the_true_gain_about_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    hits = sum(paired(torch.randn(32) + 0.3, torch.zeros(32), 0.95).lower <= 0.3 for _ in range(1000))
    assert 0.93 <= hits / 1000 <= 0.97


def test_one_sample_or_a_non_finite_loss_proves_nothing() -> None:
    assert paired(torch.tensor([2.0]), torch.tensor([1.0]), 0.95).lower == -math.inf
    assert paired(torch.tensor([2.0, math.nan]), torch.tensor([1.0, 1.0]), 0.95).lower == -math.inf


def test_batches_are_cut_into_single_samples_whatever_their_structure() -> None:
    batch = {"x": torch.arange(6).view(3, 2), "y": (torch.arange(3),)}
    pieces = split(batch)
    assert [piece["y"][0].item() for piece in pieces] == [0, 1, 2]
    assert batch_size(pieces[0]) == 1
    assert split([torch.zeros(2), torch.zeros(3)]) != []
    assert len(split([torch.zeros(2), torch.zeros(3)])) == 1


class Logs(LightningModule):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = torch.tensor(3.0)
        if self.how == "logs":
            self.log("val_loss", loss)
        return {"returns": loss, "dict": {"val_loss": loss}}.get(self.how)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.log_dict({"accuracy": 1.0})
        return torch.tensor(4.0) if self.how == "trains" else None


@pytest.mark.parametrize(("how", "loss"), [("returns", 3.0), ("dict", 3.0), ("logs", 3.0), ("trains", 4.0)])
def test_the_loss_is_found_where_the_module_puts_it(how: str, loss: float) -> None:
    assert step_loss(Logs(how), None) == loss


def test_a_module_without_a_loss_is_refused() -> None:
    with pytest.raises(DataError, match="no loss came back"):
        step_loss(Logs("silent"), None)


def test_taking_evidence_disturbs_neither_modes_nor_random_state(tmp_path: Path) -> None:
    module, callback = grow(tmp_path)
    module.train()
    module.net[1].eval()
    modes = [m.training for m in module.modules()]
    state, evidence = torch.get_rng_state(), callback._boundary.evidence
    assert evidence is not None
    seed = next(view.seed_id for view in callback.morphable.seeds if view.blueprint)
    found = evidence([seed])[seed]
    assert found.n == 64
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in module.modules()]


def test_the_decision_never_reads_the_report_part(tmp_path: Path) -> None:
    read: list[str] = []

    class Watched(type(digits())):  # type: ignore[misc]
        def test_dataloader(self) -> Any:
            read.append("report")
            return super().test_dataloader()

    callback = esper.Tamiyo("schedule", kasmina=QUICK, settings=planting(), targets=["net.*"])
    trainer(tmp_path, callback).fit(Plain(), datamodule=Watched(batch_size=64, train=640))
    assert callback.controller is not None
    assert callback.controller.reports
    assert read == []


def test_without_a_report_part_odd_validation_batches_never_decide(tmp_path: Path) -> None:
    torch.manual_seed(1)
    x, y = torch.rand(64, 64), torch.randint(0, 10, (64,))
    seen: list[Tensor] = []

    class Watched(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.state.stage != "validate" and len(batch[0]) == 1:
                seen.append(batch[0])
            super().validation_step(batch, batch_idx)

    callback = esper.Tamiyo("schedule", kasmina=QUICK, settings=planting(at=2), targets=["net.*"])
    train, held = DataLoader(TensorDataset(x, y), batch_size=8), DataLoader(TensorDataset(x, y), batch_size=8)
    with pytest.warns(UserWarning, match="even validation batches decide"):
        trainer(tmp_path, callback, epochs=6, log_every_n_steps=1).fit(Watched(), train, held)
    allowed = {tuple(row.tolist()) for index in range(0, 8, 2) for row in x[8 * index : 8 * index + 8]}
    assert seen
    assert all(tuple(row.reshape(-1).tolist()) in allowed for row in seen)


class Keeps(Plain):
    """Keeps notes in every place a user may choose, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.losses, self.by_name = 0, [], {"val": [], "sum": torch.zeros(1)}
        self.seen, self.last, self.counts = set(), deque(maxlen=3), defaultdict(int)
        self.register_buffer("total", torch.zeros(1))
        self.accuracy = MulticlassAccuracy(10)
        self.several = MetricCollection([MulticlassAccuracy(10, average="micro"), MulticlassAUROC(10)])
        self.epochs: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + random.random() + float(np.random.rand()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y) + random.random() + float(np.random.rand()) + float(torch.rand(()))
        self.steps += 1
        self.losses.append(float(loss))
        self.by_name["val"].append(float(loss))
        self.by_name["sum"] += loss
        self.total += loss
        self.seen.add(self.steps)
        self.last.append(self.steps)
        self.counts[batch_size(batch)] += 1
        self.late = float(loss)
        self.accuracy.update(logits.softmax(-1), y)
        self.several.update(logits.softmax(-1), y)
        self.log("own_accuracy", self.accuracy)
        self.log_dict(self.several)
        self.log("val_loss", loss)

    def on_validation_epoch_end(self) -> None:
        self.epochs.append({"loss": sum(self.losses) / len(self.losses), "n": float(self.steps)})

    def notes(self) -> dict[str, Any]:
        plain = (self.steps, self.losses, self.by_name["val"], self.seen, list(self.last), dict(self.counts))
        tensors = (self.by_name["sum"].item(), self.total.item())
        return {"plain": plain, "tensors": tensors, "late": self.late, "train": self.train_losses, "mean": self.epochs}


class Augmented(TensorDataset):
    """Data whose reading draws from numpy and python."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + random.random() + float(np.random.rand()), y


def keep_notes(tmp_path: Path, policy: str) -> tuple[Keeps, dict[str, Any], float]:
    """Train with a policy that never plants; return module, metrics of the last validation and samples measured."""
    x, y = torch.rand(96, 64, generator=torch.Generator().manual_seed(1)), torch.arange(96) % 10
    settings = planting(at=10**6) | {"decision_samples": 16}
    callback = esper.Tamiyo(policy, kasmina=QUICK, settings=settings, targets=["net.*"], output_dir=str(tmp_path))
    module = Keeps()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    fit = trainer(tmp_path, callback, epochs=3, log_every_n_steps=1)
    fit.fit(
        module, DataLoader(Augmented(x, y), batch_size=16, shuffle=True), DataLoader(Augmented(x, y), batch_size=16)
    )
    metrics = {name: float(value) for name, value in fit.callback_metrics.items()}
    return module, metrics, callback.history[-1]["decision_samples"]


@pytest.mark.filterwarnings("ignore:Esper. no test loader")
@pytest.mark.filterwarnings("ignore:No positive samples", "ignore:No negative samples")
def test_a_run_is_the_same_whether_or_not_evidence_is_taken(tmp_path: Path) -> None:
    with_evidence, metrics, measured = keep_notes(tmp_path / "a", "schedule")
    without, plain_metrics, none = keep_notes(tmp_path / "b", "off")
    assert measured > 0 == none
    assert "own_accuracy" in metrics and "MulticlassAUROC" in metrics
    assert metrics == plain_metrics
    assert with_evidence.notes() == without.notes()


def test_containers_keep_their_identity_and_metrics_their_state() -> None:
    module = Keeps()
    module.accuracy.update(torch.eye(10), torch.arange(10))
    notes, state = module.by_name["val"], module.accuracy.tp
    with pytest.raises(RuntimeError), undisturbed(module):
        notes.append(1.0)
        module.accuracy.update(torch.eye(10), torch.zeros(10, dtype=torch.long))
        module.extra = 1
        raise RuntimeError
    assert module.by_name["val"] is notes == []
    assert module.accuracy.tp is state
    assert float(module.accuracy.compute()) == pytest.approx(1)
    assert not hasattr(module, "extra")


class Indexed(Plain):
    """Tells its loaders apart."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Tensor:  # type: ignore[override]
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val_loss", loss)
        return 100.0 * dataloader_idx + 0 * loss


@pytest.mark.filterwarnings("ignore:Esper. no test loader")
def test_several_validation_loaders_keep_their_index(tmp_path: Path) -> None:
    x, y = torch.rand(16, 64), torch.arange(16) % 10
    callback = esper.Tamiyo("schedule", kasmina=QUICK, settings=planting(at=10**6), targets=["net.*"])
    fit, loader = trainer(tmp_path, callback, epochs=1, log_every_n_steps=1), DataLoader(TensorDataset(x, y), 4)
    module = Indexed()
    fit.fit(module, loader, [loader, loader])
    evidence = callback._boundary.evidence
    assert evidence is not None
    assert evidence.losses().tolist() == [0.0] * 8 + [100.0] * 8
    assert losses_of(fit, module, [FromLoader([x[:2], y[:2]], 1)]).tolist() == [100.0, 100.0]


def test_steps_may_leave_out_the_index_of_the_batch() -> None:
    class Short(LightningModule):
        def validation_step(self, batch: Any) -> Tensor:
            return torch.tensor(2.0)

    assert step_loss(Short(), None) == 2.0


def test_modules_keep_their_type() -> None:
    assert isinstance(Logs("logs"), nn.Module)
