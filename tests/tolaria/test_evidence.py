"""The paired counterfactual, and that taking it changes nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.leyline.errors import DataError
from esper.tolaria.evidence import batch_size, paired, split, step_loss
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
    state, evidence = torch.get_rng_state(), callback._evidence
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


def test_modules_keep_their_type() -> None:
    assert isinstance(Logs("logs"), nn.Module)
