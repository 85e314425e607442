"""Which checkpoint to go on from: the newest one that is whole."""

from collections.abc import Collection, Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from esper.leyline.errors import CheckpointError
from esper.tolaria.checkpoint import require_readable
from esper.tolaria.folders import CHECKSUMS, is_checkpoint_folder, is_sealed, written_at

AUTO = "auto"
"""Value of `resume` that takes the newest good checkpoint of the run's own folder, or none if there is none."""


def newest(folder: str | Path, *, without: Collection[str] = ()) -> Path | None:
    """Return the checkpoint below a folder that was written last and can be resumed from; None if there is none.

    A checkpoint that is damaged, or that no training can go on from, is passed over with a warning that says why; so is
    the folder of a sharded host that cannot prove itself whole, since it was not written by Esper.

    Args:
        folder: where to look, in all folders below it too.
        without: names of folders to leave out.

    Example:
        >>> newest("no/such/folder") is None
        True
    """
    for path in _by_age(Path(folder), set(without)):
        try:
            _require_good(path)
        except CheckpointError as error:
            rank_zero_warn(f"Esper: passed over a checkpoint: {error}")
        else:
            return path
    return None


def chosen(resume: str | Path | None, folder: str | Path, *, without: Collection[str] = ()) -> str | None:
    """Return the checkpoint that a setting asks for.

    Args:
        resume: `auto`, a folder of checkpoints, a checkpoint (a file, or a sharded host's folder), or None.
        folder: the run's own folder, where `auto` looks.
        without: names of folders that `auto` leaves out.

    Raises:
        CheckpointError: a folder was given, and there is no good checkpoint in it.
    """
    if resume is None:
        return None
    if resume == AUTO:
        found = newest(folder, without=without)
        where = f"resuming from {found}" if found else f"no checkpoint in {folder} yet; the run starts afresh"
        rank_zero_info(f"Esper: {where}.")
        return str(found) if found else None
    if not Path(resume).is_dir() or is_checkpoint_folder(Path(resume)):
        return str(resume)
    found = newest(resume, without=without)
    if found is None:
        raise CheckpointError(f"there is no checkpoint in {resume} that a run can go on from; give another folder.")
    rank_zero_info(f"Esper: resuming from {found}.")
    return str(found)


def _require_good(path: Path) -> None:
    if path.is_dir() and not is_sealed(path):
        raise CheckpointError(f"{path} has no {CHECKSUMS}, so nobody knows whether it is whole; name it to use it.")
    require_readable(path, weights_only=True, resuming=True)


def _by_age(folder: Path, without: set[str]) -> Iterator[Path]:
    """Yield the checkpoints, files and folders, the newest first; links are left to what they point to."""
    found = []
    for path in folder.rglob("*.ckpt"):
        if path.is_symlink() or without & set(path.relative_to(folder).parts):
            continue
        if path.is_file() or is_checkpoint_folder(path):
            found.append((written_at(path), str(path)))
    yield from (Path(name) for _, name in sorted(found, reverse=True))
