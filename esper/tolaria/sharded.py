"""Checkpoints of a sharded host (FSDP2): they are read late, straight into the model and the optimizer.

So what has grown must be there before, and be known to the optimizer in the order of its groups. A callback hears of
the checkpoint only afterwards; therefore the strategy's `load_checkpoint` is led through here for the length of a fit.
So is its `save_checkpoint`: a distributed checkpoint is a folder, which all ranks fill, and which must appear under its
name only when it is whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from esper.files import part_of, put_in_place
from esper.kasmina.bank import SeedBank
from esper.leyline.errors import CheckpointError, OutputError
from esper.tolaria.distributed import Ranks
from esper.tolaria.folders import META, checksums_of, require_whole, seal
from esper.tolaria.optimizers import SEED_KEY, verify_groups

_T = TypeVar("_T")

CHILDREN = "children"
"""Name of the children's part of the optimizer in a checkpoint's `esper` entry."""


def is_sharded(strategy: Strategy) -> bool:
    """Return whether a strategy shards the host."""
    return isinstance(strategy, ModelParallelStrategy)


def whole_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a state dict that are not sharded."""
    return {name: value for name, value in state.items() if not isinstance(value, DTensor)}


@final
class ShardedFiles:
    """Takes care of the children where a sharding strategy writes and reads its checkpoints.

    The strategy's own machinery sees the host's part of the optimizer only: it cannot load a group whose parameters
    have no state yet. The children's part, which is the same on all ranks, travels in the `esper` entry.

    Args:
        trainer: the trainer; strategies other than `ModelParallelStrategy` are left alone.
        bank: seeds of the model.
        follow: lets the optimizer's groups follow the bank.
    """

    def __init__(self, trainer: Trainer, bank: SeedBank, follow: Callable[[], None]) -> None:
        """Lead the strategy's writing and reading through this object."""
        self.trainer, self.strategy, self.bank, self.follow = trainer, trainer.strategy, bank, follow
        if is_sharded(self.strategy):
            vars(self.strategy).update({name: getattr(self, name) for name in _LED})

    def release(self) -> None:
        """Give the strategy its own methods back."""
        for name in _LED:
            vars(self.strategy).pop(name, None)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; takes the arguments of `Strategy.save_checkpoint`. A folder appears whole or not at all.

        Raises:
            OutputError: it cannot be written.
            DistributedError: another rank could not, or is gone.
        """
        own = type(self.strategy).save_checkpoint
        distributed = getattr(self.strategy, "_save_distributed_checkpoint", False)
        if not distributed or storage_options is not None or "://" in str(filepath):
            own(self.strategy, checkpoint, filepath, storage_options)
            return
        target, ranks = Path(self.strategy.broadcast(str(filepath))), Ranks.of(self.trainer)
        part = Path(ranks.from_zero(str(_written(lambda: part_of(target), ranks))))
        own(self.strategy, checkpoint, part)
        # Each rank vouches for what it wrote itself; torch names these files after it.
        mine = _written(lambda: checksums_of(part.glob(f"__{ranks.rank}_*")), Ranks())
        known = {name: entry for share in ranks.gather(mine) for name, entry in share.items()}

        def finish() -> None:
            seal(part, known)
            put_in_place(part, target)

        _written(finish, ranks)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the host's part of the optimizer's state; takes the argument of `Strategy.optimizer_state`."""
        with _host_only(optimizer):
            return type(self.strategy).optimizer_state(self.strategy, optimizer)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Rebuild the children, then load; takes the arguments of `Strategy.load_checkpoint`."""
        path = Path(self.strategy.broadcast(str(checkpoint_path)))
        if path.is_dir():
            Ranks.of(self.trainer).on_zero(lambda: require_whole(path))
        entry = read_entry(path) or {"topology": []}
        self.bank.rebuild(entry["topology"])
        with _kept(self.bank):
            found = type(self.strategy).load_checkpoint(self.strategy, path, weights_only)
        self.follow()
        for optimizer in self.strategy.optimizers:
            restore_children(optimizer, entry.get(CHILDREN, []))
        return found


_LED = ("load_checkpoint", "save_checkpoint", "optimizer_state")


def _written(act: Callable[[], _T], ranks: Ranks) -> _T | None:
    """Do something with files on rank 0 of some ranks; an error is ours, so that all of them hear of it."""

    def tried() -> _T:
        try:
            return act()
        except OSError as error:
            raise OutputError(f"the checkpoint cannot be written: {error}; choose a writable folder.") from error

    return ranks.on_zero(tried)


def children_state(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return options and state of the children's groups as plain data and tensors."""
    return [
        {
            "options": {name: value for name, value in group.items() if name != "params"},
            "state": [dict(optimizer.state.get(parameter, {})) for parameter in group["params"]],
        }
        for group in optimizer.param_groups
        if SEED_KEY in group
    ]


def restore_children(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Take back what `children_state` returned.

    Raises:
        CheckpointError: the optimizer has the groups of other children.
    """
    groups = [group for group in optimizer.param_groups if SEED_KEY in group]
    hosts = len(optimizer.param_groups) - len(groups)
    verify_groups([*({} for _ in range(hosts)), *(entry["options"] for entry in saved)], optimizer)
    for group, entry in zip(groups, saved, strict=True):
        group.update(entry["options"])
        for parameter, state in zip(group["params"], entry["state"], strict=True):
            if state:
                optimizer.state[parameter] = {name: _copied(value, parameter) for name, value in state.items()}


def _copied(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    # A step count stays on the CPU, as the optimizer keeps it.
    return value.clone() if value.dim() == 0 else value.to(parameter.device, copy=True)


def read_entry(path: Path) -> dict[str, Any] | None:
    """Return the `esper` entry of a full or distributed checkpoint; None if it was made without growth.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = path / META if path.is_dir() else path
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever is wrong with the file, nothing has changed yet
        raise CheckpointError(f"{file} cannot be read as a checkpoint ({error}); use another checkpoint.") from error
    entry: dict[str, Any] | None = content.get("esper")
    return entry


@contextmanager
def _host_only(optimizer: Optimizer) -> Iterator[None]:
    groups = list(optimizer.param_groups)
    children = [parameter for group in groups if SEED_KEY in group for parameter in group["params"]]
    states = {parameter: optimizer.state.pop(parameter) for parameter in children if parameter in optimizer.state}
    optimizer.param_groups[:] = [group for group in groups if SEED_KEY not in group]
    try:
        yield
    finally:
        optimizer.param_groups[:] = groups
        optimizer.state.update(states)


@contextmanager
def _kept(bank: SeedBank) -> Iterator[None]:
    """Let weights be filled into the children that are there: new ones would be unknown to the optimizer."""
    vars(bank)["rebuild"] = lambda topology: None
    try:
        yield
    finally:
        del vars(bank)["rebuild"]
