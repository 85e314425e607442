"""What the processes of one run say to each other. Every method is collective: all ranks call it, in the same order.

Plain values travel as msgpack over a group that takes CPU tensors; gradients travel over the trainer's own group. With
one process nothing is sent and every method returns what it was given.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, final

import msgpack  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from esper.leyline.errors import DistributedError, EsperError

_CPU_BACKENDS: tuple[str, ...] = ("gloo", "mpi")
_T = TypeVar("_T")
_made: list[tuple[Any, Any]] = []
"""The default group of this process, and the group for CPU tensors beside it."""


@final
class Ranks:
    """The processes of one run, seen from one of them.

    Args:
        rank: this process, from 0.
        size: how many there are.
        control: the group that takes CPU tensors; None takes the default group.

    Example:
        >>> alone = Ranks()
        >>> alone.gather({"loss": 0.5}), alone.any(True), alone.from_zero([1, 2]), alone.mean(2.0)
        ([{'loss': 0.5}], True, [1, 2], 2.0)
    """

    def __init__(self, rank: int = 0, size: int = 1, control: Any = None) -> None:
        """Remember the place of this process."""
        self.rank, self.size, self._control = rank, size, control

    @classmethod
    def of(cls, trainer: Trainer) -> "Ranks":
        """Return the ranks of a trainer whose strategy has set up its processes; collective."""
        if trainer.world_size == 1 or not dist.is_available() or not dist.is_initialized():
            return cls()
        # The control group waits no longer than the strategy was told to wait.
        control = _control_group(getattr(trainer.strategy, "_timeout", None))
        return cls(dist.get_rank(), dist.get_world_size(), control)

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.size == 1

    def gather(self, value: Any) -> list[Any]:
        """Return the plain values of all ranks, in the order of the ranks.

        Args:
            value: numbers, text, bytes, None, and lists and dicts of them; a tuple arrives as a list.

        Raises:
            DistributedError: a rank is gone, or did not answer within the group's timeout.
        """
        return [value] if self.alone else [msgpack.unpackb(d) for d in self._gather(msgpack.packb(value))]

    def from_zero(self, value: Any) -> Any:
        """Return the plain value that rank 0 gave; what the others gave is not looked at."""
        if self.alone:
            return value
        data: bytes = msgpack.packb(value) if self.rank == 0 else b""
        with _named("while rank 0's decision was awaited"):
            size = torch.tensor([len(data)])
            dist.broadcast(size, 0, group=self._control)
            block = _as_tensor(data, int(size))
            dist.broadcast(block, 0, group=self._control)
        return msgpack.unpackb(block.numpy().tobytes())

    def on_zero(self, act: Callable[[], _T]) -> _T | None:
        """Do something on rank 0 only, and return what came of it there, None elsewhere.

        Raises:
            EsperError: it failed; all ranks raise, so that none waits for the others.
        """
        made, error = None, None
        if self.rank == 0:
            try:
                made = act()
            except EsperError as found:
                error = found
        told = self.from_zero(str(error) if error is not None else "")
        if error is not None:
            raise error
        if told:
            raise DistributedError(f"rank 0 has failed: {told}")
        return made

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return bool(self.maximum([int(flag)])[0])

    def maximum(self, numbers: Iterable[int]) -> list[int]:
        """Return the largest of each number over the ranks."""
        return self._reduced(torch.tensor(list(numbers), dtype=torch.int64), dist.ReduceOp.MAX)

    def total(self, numbers: Iterable[float]) -> list[float]:
        """Return the sum of each number over the ranks, in double precision."""
        return self._reduced(torch.tensor(list(numbers), dtype=torch.float64), dist.ReduceOp.SUM)

    def mean(self, number: float) -> float:
        """Return the mean over the ranks."""
        return number if self.alone else float(self.total([number])[0] / self.size)

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor, on the trainer's device, by its sum over the ranks."""
        if not self.alone and tensor.numel():
            with _named("while gradients were averaged"):
                dist.all_reduce(tensor)

    def _reduced(self, numbers: Tensor, operation: Any) -> list[Any]:
        if not self.alone and numbers.numel():
            with _named("while numbers were added up"):
                dist.all_reduce(numbers, operation, group=self._control)
        found: list[Any] = numbers.tolist()
        return found

    def _gather(self, data: bytes) -> list[bytes]:
        with _named("while the ranks' states were gathered"):
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self._control)
            lengths = [int(size) for size in sizes]
            blocks = [torch.zeros(max(lengths), dtype=torch.uint8) for _ in lengths]
            dist.all_gather(blocks, _as_tensor(data, max(lengths)), group=self._control)
        return [block[:length].numpy().tobytes() for block, length in zip(blocks, lengths, strict=True)]


def _as_tensor(data: bytes, length: int) -> Tensor:
    block = torch.zeros(length, dtype=torch.uint8)
    if data:
        block[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return block


def _control_group(timeout: Any) -> Any:
    """Return a group for CPU tensors: the default group where it takes them, else one that is made once."""
    default = dist.group.WORLD
    if dist.get_backend(default) in _CPU_BACKENDS:
        return default
    if not any(beside is default for beside, _ in _made):
        _made[:] = [(default, dist.new_group(backend="gloo", timeout=timeout))]
    return _made[0][1]


@contextmanager
def _named(doing: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # The backends raise nothing narrower when a peer is gone or silent.
        reason = str(error).partition("\n")[0]
        raise DistributedError(
            f"a process of this run is gone or silent {doing} ({reason}); see the other processes' errors, "
            "then resume from the last checkpoint."
        ) from error
