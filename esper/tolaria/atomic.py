"""Checkpoint files that are either whole or not there: a kill while one is written leaves the old one."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Trainer

from esper.files import replacing
from esper.leyline.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs to disk, and renames; reads with `weights_only=True` unless told otherwise.

    Addresses (`s3://...`) and folders are left to Lightning's own way.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/a.ckpt"
        ...     AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, path)
        ...     AtomicCheckpointIO().load_checkpoint(path)
        {'state_dict': {}}
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint so that the name appears only with the whole content."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            CheckpointError: it holds objects that only running code could restore, or is a sharded host's folder.
        """
        if Path(path).is_dir():
            raise CheckpointError(
                f"{path} was written by several processes that shard the host (FSDP2); resume with "
                "strategy=ModelParallelStrategy(...), or from a checkpoint that is one file."
            )
        safe = True if weights_only is None else weights_only
        try:
            return super().load_checkpoint(path, map_location, safe)
        except pickle.UnpicklingError as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{path} holds more than plain data and tensors ({reason}). Esper's own entries are plain; a "
                "module's hyperparameters or another callback's state may not be. If you trust the file, pass "
                "weights_only=False to the trainer."
            ) from error


def use_atomic_files(trainer: Trainer) -> None:
    """Let a trainer write its checkpoints atomically, if it writes them in Lightning's plain way."""
    # A strategy whose property fails writes folders of its own; one that was given an IO keeps it.
    plain: CheckpointIO | None = getattr(trainer.strategy, "checkpoint_io", None)
    if type(plain) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
