"""Run a module's own steps for a measurement, and leave everything as it was found."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.bank import SeedBank
from esper.tolaria.checkpoint import random_state, restore_random_state

_INTERNAL = frozenset(vars(nn.Module())) - {"_buffers"}
_LARGEST = 2**20
"""Elements of the largest tensor that is copied: what a step adds up is small, what is large are data or weights."""


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients; leave modes, random state and the module's own notes as they were.

    Notes are what a step may write outside the parameters: attributes, buffers, the contents of lists, dicts, sets
    and deques, and so the states of torchmetrics.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.seen = []
        >>> with undisturbed(layer):
        ...     layer.seen.append(1)
        >>> layer.seen, layer.training
        ([], True)
    """
    modes, state = {m: m.training for m in module.modules()}, random_state()
    module.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), _notes_kept(module):
            yield
    finally:
        restore_random_state(state)
        for m, training in modes.items():
            m.training = training


@contextmanager
def _notes_kept(module: nn.Module) -> Iterator[None]:
    snapshot = _Snapshot()
    for m in _users_modules(module):
        snapshot.take(vars(m), skip=_INTERNAL)
    try:
        yield
    finally:
        snapshot.put_back()


def _users_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield all modules but the seeds: those must learn which sites run in evaluation."""
    banks = [m for m in module.modules() if isinstance(m, SeedBank)]
    seeds = {m for bank in banks for m in bank.modules()}
    return (m for m in module.modules() if m not in seeds)


class _Snapshot:
    """Contents of containers, to be put back into the same objects.

    Tensors are not copied back: a copy takes their place meanwhile. A tensor made in inference mode could not be
    written to, and a tensor that is left alone needs no repair.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._seen: set[int] = set()
        # Holding the originals keeps their ids from being used again.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, mapping: dict[Any, Any], skip: frozenset[str] = frozenset()) -> None:
        """Note a dict's items, and what they hold."""
        before = {key: value for key, value in mapping.items() if key not in skip}

        def undo() -> None:
            for key in [key for key in mapping if key not in skip and key not in before]:
                del mapping[key]
            mapping.update(before)

        self._undo.append(undo)
        for key, value in before.items():
            if isinstance(value, Tensor):
                mapping[key] = self._copy(value)
            else:
                self._enter(value)

    def _enter(self, value: Any) -> None:
        if not isinstance(value, dict | list | set | deque | tuple) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, dict):
            self.take(value)
            return
        if not isinstance(value, tuple):
            self._undo.append(_refill(value))
        for item in value:
            self._enter(item)

    def _copy(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter) or tensor.numel() > _LARGEST:
            return tensor
        return self._copies.setdefault(id(tensor), (tensor, tensor.detach().clone()))[1]

    def put_back(self) -> None:
        """Undo what happened since."""
        for undo in self._undo:
            undo()


def _refill(container: list[Any] | set[Any] | deque[Any]) -> Callable[[], None]:
    before = list(container)

    def undo() -> None:
        container.clear()
        if isinstance(container, set):
            container.update(before)
        else:
            container.extend(before)

    return undo
