"""Snapshots of a running fit, and the way back to one, bit for bit.

Everything is put back into the objects that are there: parameters, moments, groups and schedulers keep their identity,
so that compiled hosts, averaging callbacks and whoever else holds them stay right. Lightning's loops are not rewound:
epoch and step go on counting, and so do the data.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from copy import deepcopy
from types import FunctionType
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiplicativeLR

from esper.tolaria.checkpoint import random_state, restore_random_state
from esper.tolaria.kept import Copier, KeepOn, KeptBank, KeptModules, banks_in, give_back
from esper.tolaria.optimizers import flatten

_GIB = 2**30


class FitSnapshot:
    """The state of a fit between two batches: modules, seeds, optimizer, schedulers, precision, random streams.

    Args:
        trainer: the trainer that fits.
        epoch: epoch of the snapshot, from 0.
        step: optimizer steps done by then.
        memory: plain data of the caller, which it puts back itself; copied.
        keep_on: where copies live: `cpu`, or the `same` device as the original.
        earlier: the last snapshot; what has not changed since is not copied again.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        epoch: int,
        step: int,
        memory: dict[str, Any],
        keep_on: KeepOn = "cpu",
        earlier: "FitSnapshot | None" = None,
    ) -> None:
        """Copy everything."""
        self.trainer, self.epoch, self.step, self.uses = trainer, epoch, step, 0
        self.copier: Copier = Copier(keep_on, None if earlier is None else earlier.copier)
        roots = [trainer.lightning_module, *averaged(trainer)]
        # In a model wrapped by hand the bank is part of the module already.
        self._banks = [KeptBank(bank) for bank in banks_in(roots)]
        self._modules = [KeptModules(root, self.copier) for root in roots]
        self._optimizer = KeptOptimizer(trainer.optimizers[0], self.copier)
        schedulers = flatten(config.scheduler for config in trainer.lr_scheduler_configs)
        self._schedulers = KeptSchedulers(schedulers, self.copier)
        self._precision = deepcopy(trainer.precision_plugin.state_dict())
        self._stopping = [(c, deepcopy(c.state_dict())) for c in _callbacks(trainer) if isinstance(c, EarlyStopping)]
        self._memory = self.copier.value(memory)
        self._random = random_state()

    @torch.inference_mode(False)
    def restore(self) -> dict[str, Any]:
        """Put everything back and return the caller's memory.

        Gradients, also those that were being accumulated, are dropped.
        """
        for bank in self._banks:
            bank.put_back()
        for modules in self._modules:
            modules.put_back()
        for kept in self._banks:
            for layer in kept.bank.all_layers():
                layer.refresh()
        self._optimizer.put_back()
        self._schedulers.put_back()
        if self._precision:
            self.trainer.precision_plugin.load_state_dict(deepcopy(self._precision))
        for callback, state in self._stopping:
            callback.load_state_dict(deepcopy(state))
        restore_random_state(self._random)
        memory: dict[str, Any] = give_back(self._memory)
        return memory


def _callbacks(trainer: Trainer) -> list[Callback]:
    # Lightning sets this attribute outside its class, where type checkers do not see it.
    return list(getattr(trainer, "callbacks", []))


def averaged(trainer: Trainer) -> list[nn.Module]:
    """Return the averaged models that callbacks such as `EMAWeightAveraging` keep."""
    found = (getattr(callback, "_average_model", None) for callback in _callbacks(trainer))
    return [model for model in found if isinstance(model, nn.Module)]


def is_sound(trainer: Trainer) -> bool:
    """Return whether every parameter and every number that the optimizer remembers is finite."""
    optimizer = trainer.optimizers[0]
    state = (value for entries in optimizer.state.values() for value in entries.values() if isinstance(value, Tensor))
    tensors = [*(p.detach() for group in optimizer.param_groups for p in group["params"]), *state]
    floating = [t for t in tensors if t.is_floating_point()]
    return all(bool(torch.isfinite(t).all()) for t in floating)


class KeptOptimizer:
    """Groups and state of an optimizer.

    Args:
        optimizer: the one that trains the host and its children.
        copier: copies the tensors.
    """

    def __init__(self, optimizer: Optimizer, copier: Copier) -> None:
        """Copy the state; the groups' dicts and parameters are held as they are."""
        self.optimizer = optimizer
        groups = optimizer.param_groups
        self.groups = [(group, list(group["params"]), copier.value(_options(group))) for group in groups]
        self.state = [(key, copier.value(dict(value))) for key, value in optimizer.state.items()]

    def put_back(self) -> None:
        """Restore the same groups, in the same order, and exactly this state."""
        for group, parameters, options in self.groups:
            group.clear()
            group.update({"params": list(parameters)} | give_back(options))
        self.optimizer.param_groups[:] = [group for group, _, _ in self.groups]
        self.optimizer.state.clear()
        self.optimizer.state.update((key, give_back(value)) for key, value in self.state)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


class KeptSchedulers:
    """The attributes of learning-rate schedulers, and of the objects that compute their factors.

    Args:
        schedulers: all of them, nested ones too.
        copier: copies the tensors.
    """

    def __init__(self, schedulers: Iterable[LRScheduler], copier: Copier) -> None:
        """Copy; lists that several schedulers share stay shared."""
        memo: dict[int, Any] = {}
        owners: list[Any] = []
        for scheduler in schedulers:
            owners += [scheduler, *_factors(scheduler)]
        self.attributes = [(owner, copier.value(dict(vars(owner)), memo)) for owner in owners]
        self._held = memo

    def put_back(self) -> None:
        """Restore every attribute; one that came later is removed."""
        memo: dict[int, Any] = {}
        for owner, attributes in self.attributes:
            vars(owner).clear()
            vars(owner).update(give_back(attributes, memo))


def _factors(scheduler: LRScheduler) -> Sequence[Any]:
    if not isinstance(scheduler, LambdaLR | MultiplicativeLR):
        return []
    return [f for f in scheduler.lr_lambdas if not isinstance(f, FunctionType) and hasattr(f, "__dict__")]


class SnapshotWindow:
    """The last good snapshots. One that did not help gives way to the one before it.

    Args:
        size: most snapshots.
        memory_gb: most memory of their copies together, in GiB; the newest is kept whatever its size.
    """

    def __init__(self, size: int, memory_gb: float) -> None:
        """Start empty."""
        self.size, self.memory_gb = size, memory_gb
        self._snapshots: deque[FitSnapshot] = deque(maxlen=size)
        self._last: int | None = None

    def __len__(self) -> int:
        """Return the number of snapshots."""
        return len(self._snapshots)

    @property
    def newest(self) -> FitSnapshot | None:
        """The newest snapshot."""
        return self._snapshots[-1] if self._snapshots else None

    @property
    def nbytes(self) -> int:
        """Memory of all copies, each counted once, in bytes."""
        copies = {id(copy): copy for snapshot in self._snapshots for copy in snapshot.copier.copies()}
        return sum(copy.numel() * copy.element_size() for copy in copies.values())

    def add(self, snapshot: FitSnapshot) -> None:
        """Add the newest and drop the oldest that are too many."""
        self._snapshots.append(snapshot)
        while len(self._snapshots) > 1 and self.nbytes > self.memory_gb * _GIB:
            self._snapshots.popleft()

    def relapses(self, step: int, relapse_steps: int) -> bool:
        """Return whether the last return was so few steps ago that the run has yet to prove itself."""
        return self._last is not None and step - self._last < relapse_steps

    def take(self, step: int, relapse_steps: int) -> FitSnapshot | None:
        """Return the snapshot to go back to now, or None when all are used up.

        Args:
            step: optimizer steps done.
            relapse_steps: a fault that comes back within so many steps of the last return has survived it, and the
                snapshot gives way; it also does after as many returns as the window is long.
        """
        newest = self.newest
        if newest is not None and newest.uses and (self.relapses(step, relapse_steps) or newest.uses >= self.size):
            self._snapshots.pop()
            newest = self.newest
        if newest is not None:
            newest.uses, self._last = newest.uses + 1, step
        return newest
