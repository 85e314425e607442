"""The base of every data module: three disjoint parts, resumable order, no use of the global random state."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from esper.data.loader import SeededLoader
from esper.data.ranks import RankSampler
from esper.data.samplers import ResumableSampler, SeededSampler
from esper.leyline.errors import ConfigError, DataError

# A part is only ever read without gradients, which leaves room for a larger batch than training has.
EVALUATION_BATCHES = 4


class SizedDataset(Protocol):
    """Anything with a length and items, which is all that a loader needs."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return one example."""


class Parts(NamedTuple):
    """The three disjoint parts of the data.

    Args:
        train: what the weights learn from.
        decision: what gates and rewards read.
        report: what the reported numbers come from; nothing that decides may read it.
    """

    train: SizedDataset
    decision: SizedDataset
    report: SizedDataset


class EsperDataModule(LightningDataModule, ABC):
    """Data in three disjoint parts: training, decision (validation loader) and report (test loader).

    Gates decide on `val_dataloader()` (`decision_part`); reported numbers come from `test_dataloader()`
    (`report_part`), which nothing that decides may read. The parts do not depend on `seed`, which only
    chooses the order of training; the order is a pure function of (seed, epoch).

    Args:
        batch_size: examples in one training batch; evaluation uses four times as many.
        seed: chooses the order of the training examples.
        num_workers: loader processes; 0 reads in the training process.

    Raises:
        ConfigError: a number is out of range.
        DataError: a part is empty.
    """

    decision_part: ClassVar[str] = "val_dataloader"
    report_part: ClassVar[str] = "test_dataloader"

    def __init__(self, *, batch_size: int, seed: int, num_workers: int) -> None:
        """Check the numbers; data are read at the first use."""
        super().__init__()
        require_positive(batch_size=batch_size)
        if num_workers < 0:
            raise ConfigError(f"num_workers must be 0 or more, not {num_workers}.")
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self._parts: Parts | None = None

    @abstractmethod
    def build(self) -> Parts:
        """Read or make the three parts."""

    @property
    def parts(self) -> Parts:
        """The three parts, read at the first use and then kept."""
        if self._parts is None:
            self._parts = self._checked(self.build())
        return self._parts

    def setup(self, stage: str | None = None) -> None:
        """Read the data, so that an error about them comes before training starts."""
        _ = self.parts

    def train_dataloader(self) -> SeededLoader:
        """Return a resumable loader of the training part; each call gives an independent one.

        On several processes each reads its own share of one common order.
        """
        sampler = self._own_share(self.train_sampler())
        return SeededLoader(
            self.parts.train,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.batch_size,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the decision part, always in the same order."""
        return self._evaluation_loader(self.parts.decision)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the report part, always in the same order."""
        return self._evaluation_loader(self.parts.report)

    def train_sampler(self) -> ResumableSampler:
        """Return the order of training; by default a permutation per epoch."""
        return SeededSampler(len(self.parts.train), seed=self.seed)

    def _own_share(self, sampler: ResumableSampler) -> ResumableSampler:
        place = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return RankSampler(sampler, rank=place["rank"], size=place["num_replicas"]) if place else sampler

    def _evaluation_loader(self, part: SizedDataset) -> DataLoader[Any]:
        return DataLoader(
            part,  # type: ignore[arg-type]
            batch_size=EVALUATION_BATCHES * self.batch_size,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _checked(self, parts: Parts) -> Parts:
        for name, part in parts._asdict().items():
            if len(part) == 0:
                raise DataError(f"The {name} part of {type(self).__name__} is empty; every part needs an example.")
        return parts


def require_positive(**numbers: int) -> None:
    """Refuse any of the named numbers that is not at least 1.

    Raises:
        ConfigError: names the setting and the value.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, not {number}.")


def split_tensors(x: torch.Tensor, y: torch.Tensor, sizes: Sequence[int]) -> Parts:
    """Cut examples that are already in random order into three contiguous parts.

    Args:
        x: inputs, `[N, ...]`.
        y: labels, `[N]`.
        sizes: examples in the training, decision and report parts.

    Raises:
        DataError: the parts need more examples than there are.
    """
    if sum(sizes) > len(x):
        raise DataError(
            f"train + decision + report = {' + '.join(map(str, sizes))} = {sum(sizes)} examples were asked for, "
            f"but there are only {len(x)}; make a part smaller."
        )
    edges = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    return Parts(*(TensorDataset(x[a:b], y[a:b]) for a, b in zip(edges, edges[1:], strict=False)))
