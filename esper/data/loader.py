"""The training loader: a DataLoader that can be saved and resumed in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from esper.data.samplers import ResumableSampler
from esper.leyline.errors import ConfigError


class SeededLoader(DataLoader[Any]):
    """A DataLoader over a `ResumableSampler`, with the state of what it has really handed out.

    Workers read ahead of training; the position saved here counts the batches delivered, not those read.
    The iteration is lazy: the order is fixed at the first batch, after any `set_epoch` by the trainer.
    Its constructor is that of `DataLoader`, so that a trainer may rebuild it.

    Example:
        >>> from esper.data import SeededSampler
        >>> loader = SeededLoader(range(6), batch_size=2, sampler=SeededSampler(6))
        >>> _ = next(iter(loader))
        >>> loader.state_dict()
        {'seed': 0, 'epoch': 0, 'position': 2}
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches; keep the sampler's epoch and position in step with them."""
        sampler = self._resumable()
        epoch, position = sampler.epoch, sampler._resume_at
        for batch in super().__iter__():
            position = min(position + (self.batch_size or 1), len(sampler))
            sampler.place(epoch, position)
            yield batch
        sampler.place(epoch + 1, 0)

    def state_dict(self) -> dict[str, int]:
        """Return where training stands in the data, as plain numbers."""
        return self._resumable().state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the last batch that the saved run trained on."""
        self._resumable().load_state_dict(state)

    def _resumable(self) -> ResumableSampler:
        if not isinstance(self.sampler, ResumableSampler):
            raise ConfigError(
                f"SeededLoader needs a ResumableSampler, not {type(self.sampler).__name__}: "
                "pass sampler=SeededSampler(len(dataset), seed=...), on several processes inside a RankSampler."
            )
        return self.sampler
