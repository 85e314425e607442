"""Byte-level text: the running Python's own standard library, or a file or folder of your own."""

import logging
import os
import random
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from esper.data.base import EsperDataModule, Parts, require_positive
from esper.data.samplers import StepSampler
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


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of `context + 1` bytes, as inputs and next-byte targets.

    Args:
        data: the text, `uint8 [N]`.
        starts: offset of each window.
        context: bytes that the model reads, T.

    Shapes:
        item: `(x [T] int64, y [T] int64)` with `y[t] = x[t + 1]`.
    """

    def __init__(self, data: Tensor, starts: Sequence[int], context: int) -> None:
        """Keep the text as bytes; windows are cut when asked for."""
        self.data, self.starts, self.context = data, starts, context

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one window's inputs and targets."""
        start = self.starts[index]
        window = self.data[start : start + self.context + 1].long()
        return window[:-1], window[1:]


class ByteText(EsperDataModule):
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
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        require_positive(
            context=context,
            steps_per_epoch=steps_per_epoch,
            decision_windows=decision_windows,
            report_windows=report_windows,
        )
        if path is None and corpus != "stdlib":
            raise ConfigError(f"Unknown corpus {corpus!r}; allowed: 'stdlib'. For your own text set path instead.")
        self.context, self.steps_per_epoch = context, steps_per_epoch
        self.corpus, self.path = corpus, path
        self.decision_windows, self.report_windows = decision_windows, report_windows

    def build(self) -> Parts:
        """Read the text and place the windows."""
        train, decision, report = standard_library() if self.path is None else own_text(Path(self.path))
        room = len(train) - self.context
        if room < 1:
            raise DataError(f"The train part has {len(train)} bytes; context {self.context} needs at least one more.")
        return Parts(
            train=ByteWindows(_as_tensor(train), range(room), self.context),
            decision=self._fixed("decision", decision, self.decision_windows),
            report=self._fixed("report", report, self.report_windows),
        )

    def train_sampler(self) -> StepSampler:
        """Return random offsets by (seed, step)."""
        return StepSampler(
            len(self.parts.train), batch_size=self.batch_size, steps=self.steps_per_epoch, seed=self.seed
        )

    def _fixed(self, name: str, text: bytes, windows: int) -> ByteWindows:
        stride = len(text) // windows
        if stride <= self.context:
            raise DataError(
                f"The {name} part has {len(text)} bytes, too few for {windows} separate windows of "
                f"{self.context + 1} bytes; give more text, or lower {name}_windows or context."
            )
        return ByteWindows(_as_tensor(text), range(0, stride * windows, stride), self.context)


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
