"""Growth beside what a Trainer and a module can be set to: precision, accumulation, clipping, optimizers, averages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import esper
from esper.kasmina.bank import SeedBank
from esper.leyline.errors import ConfigError
from esper.tolaria.optimizers import SEED_KEY
from tests.helpers import QUICK, Plain, digits, planting, states, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Configured(Plain):
    """The plain module, with an optimizer that a test chooses."""

    def __init__(self, optimizer: Any, loss_scale: float = 1.0) -> None:
        super().__init__()
        self.make_optimizer, self.loss_scale = optimizer, loss_scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss_scale * F.cross_entropy(self.net(x.to(self.net[0].weight.dtype)).float(), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x.to(self.net[0].weight.dtype)).float(), y))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Watch(Callback):
    """Compares the host's moments right before and right after the boundary at which a child joins."""

    def __init__(self, tamiyo: esper.Tamiyo) -> None:
        self.joined_after = -1
        self.kept: list[bool] = []
        self.boundary = tamiyo._at_boundary
        tamiyo._at_boundary = self.around  # type: ignore[method-assign]

    def around(self, trainer: Trainer, *, final: bool) -> None:
        before, groups = moments(trainer), len(trainer.optimizers[0].param_groups)
        self.boundary(trainer, final=final)
        if len(trainer.optimizers[0].param_groups) > groups:
            self.joined_after = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            after = moments(trainer)
            self.kept += [torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def moments(trainer: Trainer) -> list[Tensor]:
    """Every tensor that the optimizer remembers of the host."""
    optimizer = trainer.optimizers[0]
    host = [p for g in optimizer.param_groups if SEED_KEY not in g for p in g["params"]]
    values = (value for p in host for _, value in sorted(optimizer.state[p].items()))
    return [value.detach().clone() for value in values if isinstance(value, Tensor)]


def fit(folder: Path, module: Plain, *extra: Callback, **given: Any) -> tuple[esper.Tamiyo, Watch, Trainer]:
    """Train with one scheduled planting that the gate always passes."""
    tamiyo = esper.Tamiyo("schedule", kasmina=QUICK, settings=planting(at=8), targets=["net.*"])
    watch = Watch(tamiyo)
    run = trainer(folder, tamiyo, callbacks=[tamiyo, *extra, watch], enable_checkpointing=False, **given)
    run.fit(module, datamodule=digits())
    return tamiyo, watch, run


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=3e-3)


OPTIMIZERS = {
    "adamw": adamw,
    "fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}
MATRIX: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16-mixed": ("adamw", {"precision": "bf16-mixed"}),
    "bf16-true": ("adamw", {"precision": "bf16-true"}),
    # 10 batches per epoch: with 4 per step a boundary falls into the middle of a window.
    "accumulate": ("adamw", {"accumulate_grad_batches": 4, "val_check_interval": 5, "epochs": 30}),
    "clip by norm": ("adamw", {"gradient_clip_val": 0.1}),
    "clip by value": ("adamw", {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "fused": ("fused", {}),
    "foreach": ("foreach", {}),
    "momentum": ("momentum", {}),
    "all at once": ("foreach", {"precision": "bf16-mixed", "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_growth_goes_on_under(tmp_path: Path, name: str) -> None:
    optimizer, given = MATRIX[name]
    module = Configured(OPTIMIZERS[optimizer])
    tamiyo, watch, run = fit(tmp_path, module, **given)
    assert states(tamiyo) == ["FOSSILIZED"]
    assert watch.kept and all(watch.kept)
    (graft,) = tamiyo.bank.grafted().values()
    assert graft.fault is None
    for parameter in graft.child.parameters():
        state = run.optimizers[0].state[parameter]
        remembered = [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]
        assert remembered and all(bool(torch.isfinite(value).all()) for value in remembered)
        assert any(bool(value.any()) for value in remembered)


@pytest.mark.slow
def test_a_child_joins_in_the_middle_of_an_accumulation_window(tmp_path: Path) -> None:
    given = {"accumulate_grad_batches": 4, "val_check_interval": 5, "epochs": 12}
    tamiyo, watch, _ = fit(tmp_path, Configured(adamw), **given)
    assert watch.joined_after % 4 != 0
    assert watch.kept and all(watch.kept)
    assert all(graft.fault is None for graft in tamiyo.bank.grafted().values())


@pytest.mark.slow
def test_growth_with_float16_and_a_scaler_that_skips_steps(tmp_path: Path) -> None:
    # Lightning turns `precision="16-mixed"` into bf16 on a CPU; its plug-in with a scaler of one's own does not.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=5)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    module = Configured(adamw)
    skipped: list[float] = []

    class Scales(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            skipped.append(scaler.get_scale())

    tamiyo, watch, run = fit(tmp_path, module, Scales(), plugins=[plugin])
    assert sum(later < earlier for earlier, later in zip(skipped, skipped[1:], strict=False)) > 2
    assert states(tamiyo) == ["FOSSILIZED"]
    assert watch.kept and all(watch.kept)
    (graft,) = tamiyo.bank.grafted().values()
    assert graft.fault is None
    assert all(bool(torch.isfinite(value).all()) for value in moments(run))
    assert all(bool(run.optimizers[0].state[p]["exp_avg"].any()) for p in graft.child.parameters())


# --- averaged weights ----------------------------------------------------------------------------------------------


class Reference(Callback):
    """Averages by name what Lightning's callbacks average by place; a child joins with the weights it has then."""

    def __init__(self, mix: Any, by_epoch_from: int | None = None) -> None:
        self.mix, self.by_epoch_from = mix, by_epoch_from
        self.mean: dict[str, Tensor] = {}
        self.count = 0
        self.validations = 0

    def update(self, module: Plain) -> None:
        for name, parameter in module.named_parameters():
            value = parameter.detach()
            self.mean[name] = value.clone() if self.count == 0 else self.mix(self.mean[name], value, self.count)
        self.count += 1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.by_epoch_from is not None and trainer.current_epoch >= self.by_epoch_from:
            self.update(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if self.by_epoch_from is None:
            self.update(pl_module)
        self.exact_alphas(pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.exact_alphas(pl_module)
        if self.by_epoch_from is None:
            self.compare(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        present = dict(pl_module.named_parameters())
        self.mean = {name: self.mean.get(name, p.detach().clone()) for name, p in present.items()}

    def compare(self, module: Plain) -> None:
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.detach(), self.mean[name], rtol=1e-5, atol=1e-6, msg=name)
        self.validations += 1

    def exact_alphas(self, module: Plain) -> None:
        bank = module.esper
        assert isinstance(bank, SeedBank)
        assert all(float(graft.alpha) == pytest.approx(graft.strength) for graft in bank.grafted().values())


def ema(mean: Tensor, value: Tensor, count: int) -> Tensor:
    return 0.9 * mean + 0.1 * value


def plain_mean(mean: Tensor, value: Tensor, count: int) -> Tensor:
    return mean + (value - mean) / (count + 1)


AVERAGES = {
    "ema": lambda: (EMAWeightAveraging(decay=0.9), Reference(ema)),
    "ema without buffers": lambda: (EMAWeightAveraging(decay=0.9, use_buffers=False), Reference(ema)),
    "mean": lambda: (WeightAveraging(), Reference(plain_mean)),
    "swa": lambda: (StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=3), Reference(plain_mean, 2)),
    "swa from the start": lambda: (
        StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1),
        Reference(plain_mean, 0),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.parametrize("name", AVERAGES)
def test_averaged_weights_follow_growth(tmp_path: Path, name: str) -> None:
    averaging, reference = AVERAGES[name]()
    module = Configured(adamw)
    tamiyo, watch, _ = fit(tmp_path, module, averaging, reference)
    assert states(tamiyo) == ["FOSSILIZED"]
    assert watch.kept and all(watch.kept)
    assert any("esper" in n for n in reference.mean)
    reference.compare(module)
    assert reference.validations > (1 if "swa" not in name else 0)


@pytest.mark.slow
def test_a_culled_child_leaves_the_average(tmp_path: Path) -> None:
    module, averaging, reference = Configured(adamw), EMAWeightAveraging(decay=0.9), Reference(ema)
    settings = planting(at=8) | {"price_per_kparam": 100.0}
    tamiyo = esper.Tamiyo("schedule", kasmina=QUICK, settings=settings, targets=["net.*"])
    run = trainer(tmp_path, tamiyo, callbacks=[tamiyo, averaging, reference], enable_checkpointing=False)
    run.fit(module, datamodule=digits())
    assert len(tamiyo.controller.reports) == 1 and not tamiyo.bank.grafted()
    reference.compare(module)
    assert averaging._average_model is not None
    assert averaging._average_model.module.state_dict().keys() == module.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ema", "swa"])
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_a_run_with_averaged_weights_resumes_exactly(tmp_path: Path, name: str) -> None:
    def run(folder: Path, ckpt: Path | None = None) -> Plain:
        module, (averaging, _) = Configured(adamw), AVERAGES[name]()
        tamiyo = esper.Tamiyo("schedule", kasmina=QUICK, settings=planting(at=8), targets=["net.*"])
        made = trainer(folder, tamiyo)
        made.callbacks.insert(1, averaging)
        made.fit(module, datamodule=digits(), ckpt_path=ckpt)
        return module

    whole = run(tmp_path / "whole")
    for epoch in (1, 5):
        part = run(tmp_path / f"part{epoch}", tmp_path / "whole" / "checkpoints" / f"epoch={epoch}.ckpt")
        for (key, a), (_, b) in zip(whole.state_dict().items(), part.state_dict().items(), strict=True):
            assert torch.equal(a, b), key


def test_averaging_that_cannot_follow_is_refused(tmp_path: Path) -> None:
    def start(*callbacks: Callback, module: Plain | None = None) -> None:
        made = trainer(tmp_path, None, callbacks=list(callbacks), enable_checkpointing=False, epochs=1)
        made.fit(module or Plain(), datamodule=digits())

    for averaging in (EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=1e-3)):
        with pytest.raises(ConfigError, match="put Tamiyo first"):
            start(averaging, esper.Tamiyo())
    with pytest.raises(ConfigError, match="give one number, such as swa_lrs=0.001"):
        start(esper.Tamiyo(), StochasticWeightAveraging(swa_lrs=[1e-3]))
    own = Plain()
    own.average = AveragedModel(own.net)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="'average'"):
        start(esper.Tamiyo(), module=own)
