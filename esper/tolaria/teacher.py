"""A teacher that is trained once and reused."""

import hashlib
import json
import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, final

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from esper.leyline.errors import ConfigError, OutputError
from esper.tolaria.module import TolariaModule
from esper.tolaria.tasks import LanguageModeling, TeacherSource


@final
class CachedTeacher(TeacherSource):
    """Trains a language model on the same data, with AdamW, and keeps the weights under a hash of everything used.

    Args:
        network: the untrained teacher.
        steps: training steps.
        lr: peak learning rate.
        warmup_steps: linear warm-up, in steps.
        decay: fraction of the run over which the rate decays.
        cache_dir: folder of trained teachers.
        seed: seed of its initial weights and of nothing else.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
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
        """Return the trained teacher, from the cache when it is there."""
        path = self.cache_dir / f"{self._key(data)}.safetensors"
        if path.exists():
            try:
                self.network.load_state_dict(load_file(path))
                return self.network
            except (SafetensorError, RuntimeError, OSError) as error:
                rank_zero_info(f"Esper: the cached teacher {path} cannot be read ({error}); training it again.")
        self._train(data)
        self._keep(path)
        return self.network

    def _key(self, data: LightningDataModule | None) -> str:
        shapes = {name: list(value.shape) for name, value in self.network.state_dict().items()}
        recipe = [self.steps, self.lr, self.warmup_steps, self.decay, self.seed, shapes, str(self.network)]
        content = json.dumps([recipe, _description(data)], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def _train(self, data: LightningDataModule | None) -> None:
        if data is None:
            raise ConfigError("a teacher is trained on a data module; give the trainer `datamodule=`.")
        rank_zero_info(f"Esper: training the teacher, {self.steps} steps; it is kept in {self.cache_dir}.")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for module in self.network.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
            trainer = Trainer(
                max_steps=self.steps,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                limit_val_batches=0,
                gradient_clip_val=1.0,
                accelerator="cpu",
            )
            trainer.fit(self._module(), datamodule=data)

    def _module(self) -> TolariaModule:
        return TolariaModule(
            network=self.network,
            task=LanguageModeling(),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.98)),
            warmup_steps=self.warmup_steps,
            decay=self.decay,
            total_steps=self.steps,
        )

    def _keep(self, path: Path) -> None:
        """Write beside the target and rename, so that a killed run leaves no half-written teacher."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
                save_file(self.network.state_dict(), part.name)
            os.replace(part.name, path)  # noqa: PTH105 - atomic on POSIX
        except OSError as error:
            raise OutputError(f"cannot keep the teacher in {path.parent}: {error}; set cache_dir.") from error


def _description(data: LightningDataModule | None) -> dict[str, Any]:
    """Return the plain settings of a data module, so that other data mean another teacher."""
    plain = (bool, int, float, str, type(None))
    return {k: v for k, v in vars(data).items() if isinstance(v, plain) and not k.startswith("_")} if data else {}
