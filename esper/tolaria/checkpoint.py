"""What a checkpoint holds beside weights and optimizer: plain data, readable with `weights_only=True`."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor

from esper.kasmina.bank import SeedBank
from esper.leyline.errors import CheckpointError
from esper.tolaria.folders import META, require_whole
from esper.tolaria.pause import TORN, Pause, pause_of
from esper.tolaria.random_state import random_state, restore_random_state

__all__ = [
    "FORMAT",
    "describe",
    "digests",
    "migrate",
    "random_state",
    "require_format",
    "require_readable",
    "restore_random_state",
    "verify",
]

FORMAT = 2
"""Version of the `esper` entry of a checkpoint.

1: topology and digests.
2: also `run`, what lies between two boundaries, so that a run goes on exactly from any step.
"""

_BY_NAME = ("last", "best", "hpc")
"""Values of `ckpt_path` that Lightning itself turns into a file."""

_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, BadZipFile)


def describe(bank: SeedBank, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint carries under `esper`: the readable topology, and a digest of every tensor.

    Args:
        bank: seeds of the model.
        state: the checkpoint's state dict, host and children.
    """
    return {"format": FORMAT, "topology": bank.topology(), "sha256": digests(state)}


def digests(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each tensor: its name, type, shape and bytes.

    Example:
        >>> digests({"w": torch.zeros(2)})
        {'w': '22c348e1...'}
    """
    return {name: _digest(name, value) for name, value in state.items() if _is_dense(value)}


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _digest(name: str, value: Tensor) -> str:
    sha = hashlib.sha256(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
    flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    # Numpy knows no bfloat16, but every type has bytes.
    sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def verify(checkpoint: Mapping[str, Any], *, resuming: bool) -> None:
    """Check that a checkpoint holds what was written; one that was made without growth has nothing to check.

    A tensor that is not there is left to `strict_loading`: a module may leave frozen weights out of its checkpoints.

    Args:
        checkpoint: what Lightning read.
        resuming: whether training goes on from it.

    Raises:
        CheckpointError: a tensor has changed, the entry `esper` is damaged, or the optimizer's state is missing.
    """
    if resuming and not checkpoint.get("optimizer_states"):
        raise CheckpointError(
            "the checkpoint holds weights only, and training cannot go on from it; resume from one that was saved "
            "with save_weights_only=False."
        )
    entry = checkpoint.get("esper")
    if entry is None:
        return
    require_format(entry)
    expected = entry.get("sha256", {})
    # A callback that averages weights saves the average as the state dict, and moves the present weights aside.
    for name, found in digests(checkpoint.get("current_model_state", checkpoint["state_dict"])).items():
        if expected.get(name, found) != found:
            raise CheckpointError(f"the checkpoint is damaged: {name!r} is not what was saved; use another checkpoint.")


def require_format(entry: object) -> None:
    """Check that this release can read a checkpoint's `esper` entry.

    Raises:
        CheckpointError: it is damaged, or was written by a newer release.
    """
    version = entry.get("format") if isinstance(entry, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError("the checkpoint's entry `esper` has another format than expected; it is damaged.")
    if version > FORMAT:
        raise CheckpointError(
            f"the checkpoint's entry `esper` has another format, {version}; this release reads 1 to {FORMAT}. "
            "A newer release wrote it: update esper-morphogenetic, or use an older checkpoint."
        )


def migrate(checkpoint: dict[str, Any]) -> None:
    """Bring the `esper` entry of an older checkpoint to the present format, in place.

    Format 1 does not say where in its run it was written; Lightning's counters tell it closely enough. What it lacks
    (health since the last boundary, logged averages) starts anew, so a run resumed from it in the middle of a span
    between two boundaries may read other health there; its losses and weights are those of the uninterrupted run.

    Raises:
        CheckpointError: a newer release wrote it, or it is damaged.
    """
    entry = checkpoint.get("esper")
    if entry is None:
        return
    require_format(entry)
    if entry["format"] == 1:
        entry["run"] = {"pause": pause_of(checkpoint["loops"]["fit_loop"]).value}
    entry["format"] = FORMAT


def require_readable(path: str | Path | None, *, weights_only: bool | None = None, resuming: bool = False) -> None:
    """Check a checkpoint, file or folder, before anything is built on it.

    None, addresses, and names that Lightning looks up (`last`, `best`, `hpc`) pass unseen.

    Args:
        path: the file, or a sharded host's folder, as given to Lightning as `ckpt_path`.
        weights_only: passed on to `torch.load`.
        resuming: whether training is to go on from it.

    Raises:
        CheckpointError: it is missing, cut short, damaged, or no checkpoint of Lightning.
    """
    if path is None or str(path) in _BY_NAME or "://" in str(path) or str(path).startswith("registry"):
        return
    folder = Path(path).is_dir()
    if folder:
        require_whole(Path(path))
    elif not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}; give the path of a .ckpt file.")
    try:
        checkpoint = _peek(Path(path) / META if folder else Path(path), weights_only)
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason}); use another checkpoint.") from error
    # In a folder the tensors have files of their own.
    needed = {"pytorch-lightning_version"} if folder else {"state_dict", "pytorch-lightning_version"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise CheckpointError(f"{path} is no checkpoint of Lightning; give a .ckpt file that a trainer wrote.")
    _require_useful(checkpoint, str(path), resuming)


def _require_useful(checkpoint: Mapping[str, Any], path: str, resuming: bool) -> None:
    if not resuming:
        return
    # Lightning saves schedules wherever it saves optimizers, also in the part of a folder that is no tensor.
    if not checkpoint.get("optimizer_states") and (Path(path).is_file() or "lr_schedulers" not in checkpoint):
        raise CheckpointError(f"{path} holds weights only; resume from one saved with save_weights_only=False.")
    entry = checkpoint.get("esper")
    if entry is not None:
        try:
            require_format(entry)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if entry.get("run", {}).get("pause") == Pause.TORN:
            raise CheckpointError(f"{path} {TORN}")


def _peek(path: Path, weights_only: bool | None) -> object:
    """Read the structure, and the tensors only so far as their checksums need it."""
    zipped = is_zipfile(path)
    if zipped:
        with ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                raise BadZipFile(f"{broken} has a wrong checksum")
    found: object = torch.load(path, map_location="cpu", mmap=zipped, weights_only=weights_only)
    return found
