"""What a checkpoint holds beside weights and optimizer: plain data, readable with `weights_only=True`."""

import hashlib
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

from esper.kasmina.bank import SeedBank
from esper.leyline.errors import CheckpointError

FORMAT = 1
"""Version of the `esper` entry of a checkpoint."""

_BY_NAME = ("last", "best", "hpc")
"""Values of `ckpt_path` that Lightning itself turns into a file."""

_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, BadZipFile)


def random_state() -> dict[str, Any]:
    """Return the state of every random generator as tensors and plain numbers."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert not isinstance(name, dict)
    version, words, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss)]
        + [float(gauss)],
        "python": [version, list(words), following],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every random generator back to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, following = state["python"]
    random.setstate((version, tuple(words), following))


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
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint's entry `esper` has another format than {FORMAT}; it is damaged or newer."
        )
    expected = entry.get("sha256", {})
    for name, found in digests(checkpoint["state_dict"]).items():
        if expected.get(name, found) != found:
            raise CheckpointError(f"the checkpoint is damaged: {name!r} is not what was saved; use another checkpoint.")


def require_readable(path: str | Path | None, *, weights_only: bool | None = None, resuming: bool = False) -> None:
    """Check a checkpoint file before anything is built on it.

    None, addresses, and names that Lightning looks up (`last`, `best`, `hpc`) pass unseen.

    Args:
        path: the file, as given to Lightning as `ckpt_path`.
        weights_only: passed on to `torch.load`.
        resuming: whether training is to go on from it.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, or no checkpoint of Lightning.
    """
    if path is None or str(path) in _BY_NAME or "://" in str(path) or str(path).startswith("registry"):
        return
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}; give the path of a .ckpt file.")
    try:
        checkpoint = _peek(Path(path), weights_only)
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason}); use another checkpoint.") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        raise CheckpointError(f"{path} is no checkpoint of Lightning; give a .ckpt file that a trainer wrote.")
    if resuming and not checkpoint.get("optimizer_states"):
        raise CheckpointError(f"{path} holds weights only; resume from one saved with save_weights_only=False.")


def _peek(path: Path, weights_only: bool | None) -> object:
    """Read the structure, and the tensors only so far as their checksums need it."""
    zipped = is_zipfile(path)
    if zipped:
        with ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                raise BadZipFile(f"{broken} has a wrong checksum")
    found: object = torch.load(path, map_location="cpu", mmap=zipped, weights_only=weights_only)
    return found
