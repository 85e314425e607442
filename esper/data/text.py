"""Byte-level text: the running Python's own standard library, or a file or folder of your own."""

import logging
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from esper.data.windows import WindowedText
from esper.leyline.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

# Installed packages and caches differ between machines; the others hold tables, test data or the decision part.
INSTALLED = {"site-packages", "dist-packages", "__pycache__"}
EXCLUDED = frozenset({*INSTALLED, "test", "tests", "encodings", "pydoc_data", "idlelib", "lib2to3"})
DECISION_FOLDERS = ("idlelib", "lib2to3")
SHUFFLE_SEED = 1234
REPORT_SHARE = 12
# Shares of a user's own text, in tenths: training first, then decision, then report.
OWN_TENTHS = (8, 9)


class ByteText(WindowedText):
    """Windows of bytes for next-byte prediction.

    Standard library: all `.py` files without tests, tables, IDLE and lib2to3, shuffled by
    `random.Random(1234)`; the first twelfth of the files is the report part, the rest trains, and
    IDLE with lib2to3 is the decision part. Own text: the first eight tenths train, the ninth decides,
    the last reports. Training windows are drawn at random offsets by (seed, step), so two runs see the
    same batches whatever `steps_per_epoch` is; the other windows are fixed, evenly spread and do not overlap.

    Args:
        context: bytes that the model reads, T.
        batch_size: windows in a training batch, B.
        steps_per_epoch: batches that make one epoch.
        seed: chooses the training windows.
        corpus: `stdlib`; ignored when `path` is given.
        path: a text file or a folder of text files to use instead.
        decision_windows: windows in the decision part.
        report_windows: windows in the report part.
        num_workers: loader processes.

    Shapes:
        batch: `(x [B, T] int64, y [B, T] int64)`, values 0 to 255.

    Raises:
        ConfigError: unknown corpus, or a number out of range.
        DataError: the path does not exist, or a part is too short for its windows.

    Example:
        >>> x, y = next(iter(ByteText(context=16, batch_size=2).train_dataloader()))
        >>> x.shape, bool((x[:, 1:] == y[:, :-1]).all())
        (torch.Size([2, 16]), True)
    """

    unit: ClassVar[str] = "bytes"

    def __init__(
        self,
        *,
        context: int = 128,
        batch_size: int = 8,
        steps_per_epoch: int = 100,
        seed: int = 0,
        corpus: str = "stdlib",
        path: str | None = None,
        decision_windows: int = 32,
        report_windows: int = 192,
        num_workers: int = 0,
    ) -> None:
        """Check the settings; text is read at the first use."""
        super().__init__(
            context=context,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            decision_windows=decision_windows,
            report_windows=report_windows,
            num_workers=num_workers,
        )
        if path is None and corpus != "stdlib":
            raise ConfigError(f"Unknown corpus {corpus!r}; allowed: 'stdlib'. For your own text set path instead.")
        self.corpus, self.path = corpus, path

    def read(self) -> Iterator[Tensor]:
        """Yield the bytes of the three parts."""
        yield from map(_as_tensor, standard_library() if self.path is None else own_text(Path(self.path)))


def standard_library(root: Path | None = None) -> tuple[bytes, bytes, bytes]:
    """Return the training, decision and report text of a Python's standard library.

    Args:
        root: the library's folder; default is that of the running Python.

    Raises:
        DataError: the folder holds fewer Python files than the parts need.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = _python_files(root, EXCLUDED)
    if len(files) < REPORT_SHARE:
        raise DataError(f"{root} holds {len(files)} Python files; a split needs {REPORT_SHARE} or more. Set path.")
    random.Random(SHUFFLE_SEED).shuffle(files)
    share = len(files) // REPORT_SHARE
    report, rest = files[:share], files[share:]
    decision = [file for folder in DECISION_FOLDERS for file in _python_files(root / folder, frozenset())]
    if not decision:
        _log.warning(
            "%s has neither %s: the decision part is %d other files, taken out of the training part.",
            root,
            " nor ".join(DECISION_FOLDERS),
            share,
        )
        decision, rest = rest[:share], rest[share:]
    return _join(rest), _join(decision), _join(report)


def own_text(path: Path) -> tuple[bytes, bytes, bytes]:
    """Return the training, decision and report text of a file, or of a folder's files in the order of their names.

    Hidden files, and files with a zero byte near their start, are left out of a folder.

    Raises:
        DataError: nothing is there, or nothing in it is text.
    """
    if not path.exists():
        raise DataError(f"No text at {path}: give a file or a folder that exists.")
    contents = (file.read_bytes() for file in ([path] if path.is_file() else _visible(path)))
    text = b"".join(content for content in contents if path.is_file() or _is_text(content))
    if not text:
        raise DataError(f"{path} holds no text.")
    first, second = (len(text) * tenths // 10 for tenths in OWN_TENTHS)
    return text[:first], text[first:second], text[second:]


def _python_files(root: Path, excluded: frozenset[str]) -> list[Path]:
    """All `.py` files below `root`, sorted; excluded folders are not entered, which is what makes this fast."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in excluded]
        found.extend(Path(folder, name) for name in names if name.endswith(".py"))
    return sorted(found)


def _visible(folder: Path) -> list[Path]:
    hidden = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in hidden if not any(p.startswith(".") for p in file.relative_to(folder).parts))


def _is_text(content: bytes) -> bool:
    return b"\0" not in content[:8192]


def _join(files: Iterable[Path]) -> bytes:
    return b"".join(file.read_bytes() for file in files)


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
