"""Windows of a text: what next-byte and next-token prediction have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor
from torch.utils.data import Dataset

from esper.data.base import EsperDataModule, Parts, require_positive
from esper.data.samplers import StepSampler
from esper.leyline.errors import DataError


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of `context + 1` bytes or tokens, as inputs and the targets that follow them.

    Args:
        data: the text, integers `[N]`.
        starts: offset of each window.
        context: bytes or tokens that the model reads, T.

    Shapes:
        item: `(x [T] int64, y [T] int64)` with `y[t] = x[t + 1]`.

    Example:
        >>> import torch
        >>> Windows(torch.arange(9), range(3), 2)[1]
        (tensor([1, 2]), tensor([2, 3]))
    """

    def __init__(self, data: Tensor, starts: Sequence[int], context: int) -> None:
        """Keep the text as it is; windows are cut when asked for."""
        self.data, self.starts, self.context = data, starts, context

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one window's inputs and targets."""
        start = self.starts[index]
        window = self.data[start : start + self.context + 1].long()
        return window[:-1], window[1:]


class WindowedText(EsperDataModule, ABC):
    """Text in three parts: training windows at random offsets by (seed, step), the others evenly spread and separate.

    Args:
        context: bytes or tokens that the model reads, T.
        batch_size: windows in a training batch, B.
        steps_per_epoch: batches that make one epoch.
        seed: chooses the training windows.
        decision_windows: windows in the decision part.
        report_windows: windows in the report part.
        num_workers: loader processes.

    Raises:
        ConfigError: a number is out of range.
    """

    unit: ClassVar[str]
    """What the text is counted in, for messages."""

    def __init__(
        self,
        *,
        context: int,
        batch_size: int,
        steps_per_epoch: int,
        seed: int,
        decision_windows: int,
        report_windows: int,
        num_workers: int,
    ) -> None:
        """Check the numbers; text is read at the first use."""
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        require_positive(
            context=context,
            steps_per_epoch=steps_per_epoch,
            decision_windows=decision_windows,
            report_windows=report_windows,
        )
        self.context, self.steps_per_epoch = context, steps_per_epoch
        self.decision_windows, self.report_windows = decision_windows, report_windows

    @abstractmethod
    def read(self) -> Iterable[Tensor]:
        """Yield the training, the decision and the report text, each `[N]`."""

    def build(self) -> Parts:
        """Read the text and place the windows."""
        train, decision, report = self.read()
        room = len(train) - self.context
        if room < 1:
            raise DataError(
                f"The train part has {len(train)} {self.unit}; context {self.context} needs at least one more."
            )
        return Parts(
            train=Windows(train, range(room), self.context),
            decision=self._fixed("decision", decision, self.decision_windows),
            report=self._fixed("report", report, self.report_windows),
        )

    def train_sampler(self) -> StepSampler:
        """Return random offsets by (seed, step)."""
        return StepSampler(
            len(self.parts.train), batch_size=self.batch_size, steps=self.steps_per_epoch, seed=self.seed
        )

    def _fixed(self, name: str, text: Tensor, windows: int) -> Windows:
        stride = len(text) // windows
        if stride <= self.context:
            raise DataError(
                f"The {name} part has {len(text)} {self.unit}, too few for {windows} separate windows of "
                f"{self.context + 1} {self.unit}; give more text, or lower {name}_windows or context."
            )
        return Windows(text, range(0, stride * windows, stride), self.context)
