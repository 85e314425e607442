"""What may decide and what reports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.data import Digits
from esper.models import MLP
from esper.run import run
from esper.tolaria.evidence import losses_of
from esper.tolaria.parts import decision_batches, report_batches
from esper.tolaria.report import report_losses
from tests.helpers import QUICK, Plain, planting, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Esper. no test loader")


class Halves(LightningDataModule):
    """Digits-like data without a test loader; a validation batch is all 0 or all 1, in turns."""

    def loader(self) -> DataLoader[Any]:
        y = torch.arange(64) // 8 % 2
        return DataLoader(TensorDataset(y[:, None].float().expand(64, 64).contiguous(), y), batch_size=8)

    train_dataloader = val_dataloader = loader


class WithReport(Halves):
    """The same data with a test loader."""

    test_dataloader = Halves.loader


class Returns(Plain):
    """Its loss on a sample is the sample's label; it has no test_step."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))
        return batch[1].float().mean()


def fitted(tmp_path: Path, module: Plain, data: LightningDataModule, **given: Any) -> tuple[Any, esper.Tamiyo]:
    callback = esper.Tamiyo("schedule", kasmina=QUICK, settings=planting(at=10**6), targets=["net.*"])
    fit = trainer(tmp_path, callback, **({"epochs": 2, "log_every_n_steps": 1} | given))
    fit.fit(module, datamodule=data)
    return fit, callback


def test_even_batches_decide_and_odd_ones_report(tmp_path: Path) -> None:
    module = Returns()
    fit, callback = fitted(tmp_path, module, Halves())
    assert {entry["decision_loss"] for entry in callback.history} == {0.0}
    assert report_losses(fit, module) == [1.0] * 32
    assert losses_of(fit, module, decision_batches(fit, module)).tolist() == [0.0] * 32


def test_with_a_test_loader_all_of_validation_decides(tmp_path: Path) -> None:
    module = Returns()
    fit, _ = fitted(tmp_path, module, WithReport())
    assert len(list(decision_batches(fit, module))) == 8
    assert list(report_batches(fit, module)) == [] == report_losses(fit, module)


def test_limits_of_validation_hold(tmp_path: Path) -> None:
    module = Returns()
    fit, _ = fitted(tmp_path, module, Halves(), limit_val_batches=2)
    assert len(list(decision_batches(fit, module))) == len(list(report_batches(fit, module))) == 1


@pytest.mark.parametrize(("data", "told"), [(Halves, False), (WithReport, True)])
def test_a_policy_hears_of_validation_only_where_all_of_it_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any, told: bool
) -> None:
    heard: list[dict[str, float]] = []
    observe = esper.TamiyoController.observe

    def listen(self: Any, *args: Any, **given: Any) -> Any:
        heard.append(given.get("metrics") or {})
        return observe(self, *args, **given)

    monkeypatch.setattr(esper.TamiyoController, "observe", listen)
    fitted(tmp_path, Returns(), data())
    assert any("val_loss" in metrics for metrics in heard) is told


def config(tmp_path: Path, data: type) -> dict[str, Any]:
    flags = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return {
        "output_dir": str(tmp_path),
        "model": {"class_path": f"{Returns.__module__}.{Returns.__name__}"},
        "data": {"class_path": f"{data.__module__}.{data.__name__}"},
        "tamiyo": {"policy": "off", "targets": ["net.*"]},
        "trainer": flags | {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1},
    }


@pytest.mark.parametrize(("data", "loss", "samples"), [(Halves, 1.0, 32), (WithReport, 0.5, 0)])
def test_a_run_reports_without_test_loader_or_test_step(tmp_path: Path, data: type, loss: float, samples: int) -> None:
    found = run(config(tmp_path, data)).grown
    assert found.report_loss == loss
    assert len(found.report_samples or ()) == samples


def test_the_trainer_reports_without_a_test_loader(tmp_path: Path) -> None:
    class NoTest(LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.digits = Digits(batch_size=64, train=128)
            self.digits.prepare_data()
            self.digits.setup("fit")
            self.train_dataloader, self.val_dataloader = self.digits.train_dataloader, self.digits.val_dataloader

    model = esper.wrap(MLP(widths=(64, 16, 10)), QUICK)
    settings = {"max_epochs": 1, "output_dir": str(tmp_path), "accelerator": "cpu"}
    controller = esper.TamiyoController(model, {"policy": "off"})
    _, history = esper.TolariaTrainer(model, controller, settings, data=NoTest()).train()
    assert 1.5 < history[-1]["report_loss"] < 4.0


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_off_without_validation_refuses_no_site(tmp_path: Path) -> None:
    callback = esper.Tamiyo("off", kasmina=QUICK, targets=["net.*"])
    x, y = torch.rand(16, 64), torch.arange(16) % 10
    fit = trainer(tmp_path, callback, epochs=1, log_every_n_steps=1, limit_val_batches=0)
    fit.fit(Plain(), DataLoader(TensorDataset(x, y), batch_size=8))
    assert callback.bank.refused == {}


def test_a_site_that_sleeps_in_evaluation_is_refused(tmp_path: Path) -> None:
    class Sleeps(Returns):
        def __init__(self) -> None:
            super().__init__()
            self.extra = torch.nn.Linear(10, 10)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.extra(self.net(batch[0])), batch[1])

    callback = esper.Tamiyo("off", kasmina=QUICK, targets=["extra"])
    trainer(tmp_path, callback, epochs=1, log_every_n_steps=1).fit(Sleeps(), datamodule=Halves())
    assert callback.bank.refused == {"extra": "it does not run in evaluation"}
