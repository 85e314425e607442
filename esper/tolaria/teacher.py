"""A teacher that is trained once and reused."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, final

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from esper.leyline.errors import ConfigError, OutputError
from esper.models.remembered import RememberedModule
from esper.tolaria.module import TolariaModule
from esper.tolaria.tasks import LanguageModeling, TeacherSource


@final
class CachedTeacher(TeacherSource):
    """Trains a language model on the same data, with AdamW, and keeps the weights under a hash of everything used.

    Args:
        network: what the teacher is; it is built afresh from its constructor's arguments.
        steps: training steps.
        lr: peak learning rate.
        warmup_steps: linear warm-up, in steps.
        decay: fraction of the run over which the rate decays.
        cache_dir: folder of trained teachers.
        seed: seed of its initial weights; the order of the data is the data module's.
    """

    def __init__(
        self,
        *,
        network: RememberedModule,
        steps: int = 1500,
        lr: float = 3e-3,
        warmup_steps: int = 60,
        decay: float = 0.3,
        cache_dir: str = ".cache/teachers",
        seed: int = 0,
    ) -> None:
        """Remember the recipe."""
        self.network, self.steps, self.lr, self.seed = network, steps, lr, seed
        self.warmup_steps, self.decay, self.cache_dir = warmup_steps, decay, Path(cache_dir)

    def teacher(self, data: LightningDataModule | None) -> nn.Module:
        """Return the trained teacher, from the cache when it is there.

        Raises:
            ConfigError: there is no data module to train on.
            OutputError: the cache folder cannot be written.
        """
        if data is None:
            raise ConfigError("a teacher is trained on a data module; give the trainer `datamodule=`.")
        with _whole(data), _rank_zero_first():
            return self._cached_or_trained(data)

    def _cached_or_trained(self, data: LightningDataModule) -> nn.Module:
        path = self.cache_dir / f"{self.key(data)}.safetensors"
        teacher = self._fresh()
        if path.exists():
            try:
                teacher.load_state_dict(load_file(path))
                return teacher
            except (SafetensorError, RuntimeError, OSError) as error:
                rank_zero_info(f"Esper: the cached teacher {path} cannot be read ({error}); training it again.")
        self._train(teacher, data)
        self._keep(teacher, path)
        return teacher

    def key(self, data: LightningDataModule) -> str:
        """Return the hash under which this teacher is kept: its recipe, and what the first batch of its data holds."""
        kind = type(self.network)
        recipe = [f"{kind.__module__}.{kind.__qualname__}", self.network.arguments, self.steps, self.lr]
        content = json.dumps([*recipe, self.warmup_steps, self.decay, self.seed, _digest(data)], default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def _fresh(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return type(self.network)(**self.network.arguments)

    def _train(self, teacher: nn.Module, data: LightningDataModule) -> None:
        rank_zero_info(f"Esper: training the teacher, {self.steps} steps; it is kept in {self.cache_dir}.")
        with torch.random.fork_rng():
            trainer = Trainer(
                max_steps=self.steps,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                limit_val_batches=0,
                gradient_clip_val=1.0,
                devices=1,
            )
            trainer.fit(self._module(teacher), datamodule=data)
        data.trainer = None
        teacher.cpu()

    def _module(self, teacher: nn.Module) -> TolariaModule:
        return TolariaModule(
            network=teacher,
            task=LanguageModeling(),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.98)),
            warmup_steps=self.warmup_steps,
            decay=self.decay,
            total_steps=self.steps,
        )

    def _keep(self, teacher: nn.Module, path: Path) -> None:
        """Write beside the target and rename, so that a killed run leaves no half-written teacher."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
                save_file(teacher.state_dict(), part.name)
            os.replace(part.name, path)  # noqa: PTH105 - atomic on POSIX
        except OSError as error:
            raise OutputError(f"cannot keep the teacher in {path.parent}: {error}; set cache_dir.") from error


@contextmanager
def _whole(data: LightningDataModule) -> Iterator[None]:
    """Let the data module forget its trainer for a while: with several processes it would give out shares."""
    outer, data.trainer = data.trainer, None
    try:
        yield
    finally:
        data.trainer = outer


@contextmanager
def _rank_zero_first() -> Iterator[None]:
    """Let rank 0 train while the others wait, and the others then find what it kept."""
    together = dist.is_available() and dist.is_initialized()
    if together and dist.get_rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if together and dist.get_rank() == 0:
            dist.barrier()


def _digest(data: LightningDataModule) -> str:
    """Return a hash of the first training batch, so that other data mean another teacher."""
    batch: Any = next(iter(data.train_dataloader()))
    tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()
