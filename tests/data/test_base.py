"""What every data module promises: disjoint parts, the same order for the same seed, a clean global random state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from esper.data import ByteText, Digits, EsperDataModule, Parts, Spirals
from esper.data.base import split_tensors
from esper.leyline.errors import ConfigError, DataError

MODULES: dict[str, Callable[..., EsperDataModule]] = {
    "text": lambda **settings: ByteText(context=64, steps_per_epoch=5, **settings),
    "digits": Digits,
    "spirals": lambda **settings: Spirals(train=100, decision=50, report=70, **settings),
}

every_module = pytest.mark.parametrize("name", MODULES)


def examples(loader: Any) -> set[bytes]:
    """Every input that a loader delivers, as bytes."""
    return {x.numpy().tobytes() for batch, _ in loader for x in batch}


@every_module
def test_parts_share_no_example(name: str) -> None:
    module = MODULES[name](batch_size=32)
    train, decision, report = (
        examples(getattr(module, loader)())
        for loader in ("train_dataloader", EsperDataModule.decision_part, EsperDataModule.report_part)
    )
    assert decision and report
    assert not (train & decision or train & report or decision & report)


@every_module
def test_same_seed_same_batches_other_seed_other_batches(name: str) -> None:
    def first(seed: int) -> Tensor:
        return next(iter(MODULES[name](batch_size=8, seed=seed).train_dataloader()))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@every_module
def test_evaluation_parts_do_not_depend_on_the_seed(name: str) -> None:
    first, second = (MODULES[name](batch_size=8, seed=seed) for seed in (1, 2))
    for a, b in (
        (first.val_dataloader(), second.val_dataloader()),
        (first.test_dataloader(), second.test_dataloader()),
    ):
        assert all(torch.equal(x, z) for (x, _), (z, _) in zip(a, b, strict=True))


@every_module
def test_reading_leaves_the_global_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    module = MODULES[name](batch_size=8)
    module.setup("fit")
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        list(loader)
    assert torch.equal(before, torch.get_rng_state())


@every_module
def test_each_training_loader_is_independent(name: str) -> None:
    module = MODULES[name](batch_size=8)
    used = module.train_dataloader()
    next(iter(used))
    assert module.train_dataloader().state_dict()["position"] == 0
    assert used.state_dict()["position"] == 8


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"num_workers": -1}])
@every_module
def test_numbers_out_of_range_are_refused(name: str, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        MODULES[name](**{"batch_size": 8, **settings})


def test_an_empty_part_is_named() -> None:
    class NoDecision(EsperDataModule):
        def build(self) -> Parts:
            return split_tensors(torch.zeros(5, 1), torch.zeros(5), (3, 0, 2))

    with pytest.raises(DataError, match="decision part of NoDecision is empty"):
        NoDecision(batch_size=1, seed=0, num_workers=0).setup()


def test_too_large_parts_are_refused() -> None:
    with pytest.raises(DataError, match="2 \\+ 3 \\+ 4 = 9 examples.*only 5"):
        split_tensors(torch.zeros(5, 1), torch.zeros(5), (2, 3, 4))


class Recorder(LightningModule):
    """Learns nothing worth knowing, and remembers the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(2, 2), list[Tensor]()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.seen.append(batch[0].clone())
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, epochs: int, *, resume: str | None = None, every: int = 3) -> Recorder:
    """Train on 9 batches an epoch; keep a checkpoint of every third step."""
    checkpoint = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=every)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[checkpoint], **quiet)
    recorder = Recorder()
    trainer.fit(recorder, datamodule=Spirals(train=36, decision=2, report=2, batch_size=4, seed=3), ckpt_path=resume)
    return recorder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [3, 9, 12])
def test_a_run_resumed_by_lightning_sees_the_same_batches(tmp_path: Path, step: int) -> None:
    whole = train(tmp_path / "a", 3)
    resumed = train(tmp_path / "b", 3, resume=str(tmp_path / "a" / f"step={step}.ckpt"))
    assert len(whole.seen) == 27
    assert len(resumed.seen) == 27 - step
    assert all(torch.equal(a, b) for a, b in zip(whole.seen[step:], resumed.seen, strict=True))
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
