"""A private folder for one compilation: whatever the compiler writes lies in it, and goes with it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

from torch._inductor import codecache

from esper.tezzeret.toolchain import toolchain_hash


@contextmanager
def workshop(parent: Path, shelf: Path | None = None) -> Iterator[Path]:
    """Make every temporary file of torch's compiler in a new folder below `parent`, removed at the end.

    The compiler's precompiled headers cost a third of a compilation. They are the same for every kernel of a
    toolchain, so the first compilation that succeeds puts its own on the shelf, in one move, and later ones start
    from them. A compilation that is killed can leave nothing half-written there.

    Args:
        parent: where to make the folder; the one who made `parent` removes it after a kill.
        shelf: folder that outlives compilations, on the same file system; None starts from nothing each time.

    Yields:
        The folder.
    """
    with tempfile.TemporaryDirectory(prefix="workshop-", dir=parent) as name:
        folder = Path(name)
        kept = None if shelf is None else shelf / toolchain_hash()
        _fetch(kept, folder / "cache")
        with _compiler_writes_to(folder):
            yield folder
        if kept is not None and not kept.exists():
            _keep(folder / "cache", kept)


@contextmanager
def _compiler_writes_to(folder: Path) -> Iterator[None]:
    headers, temporary = folder / "cache" / "headers", folder / "tmp"
    temporary.mkdir()
    places = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TMPDIR": str(temporary)}
    # The compiler fixes the headers' place when it is imported, outside the folder that the environment names.
    with (
        mock.patch.dict(os.environ, places),
        mock.patch.object(tempfile, "tempdir", str(temporary)),
        mock.patch.object(codecache, "_HEADER_DIR", str(headers)),
        mock.patch.object(codecache, "_HEADER_LOCK_DIR", str(headers / "locks")),
    ):
        codecache._precompile_header.cache_clear()
        try:
            yield
        finally:
            codecache._precompile_header.cache_clear()


def _fetch(kept: Path | None, cache: Path) -> None:
    if kept is not None and kept.is_dir():
        shutil.copytree(kept, cache, copy_function=_link)
    else:
        cache.mkdir()


def _link(source: str, target: str) -> None:
    """Give a file a second name; its 150 MB are not copied, and the compiler never writes to an old file."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _keep(cache: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    # Another compilation may have been faster; a folder that is there cannot be replaced.
    with suppress(OSError):
        cache.rename(kept)
