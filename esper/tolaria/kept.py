"""Keep values and put them back bit for bit, into the same tensors: whoever holds one goes on holding the right one."""

from collections import deque
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esper.kasmina.bank import SeedBank
from esper.kasmina.graft import Graft
from esper.kasmina.record import SeedRecord

KeepOn = Literal["cpu", "same"]
_CONTAINERS = (dict, list, tuple, set, deque)


class Kept(NamedTuple):
    """A tensor and the copy of its content."""

    tensor: Tensor
    copy: Tensor

    def put_back(self) -> Tensor:
        """Write the content back and return the tensor; where its memory overlaps itself, a new one."""
        copy = self.copy.to(self.tensor.device)
        if same_bits(self.tensor, copy):
            return self.tensor
        if self.tensor.layout is torch.strided and 0 in self.tensor.stride() and self.tensor.numel() > 1:
            return copy.clone()
        with torch.no_grad():
            return self.tensor.copy_(copy)


class Copier:
    """Copies the content of tensors; a tensor that has not changed since an earlier copy shares that one's memory.

    Args:
        keep_on: `cpu`, or the tensor's `same` device.
        earlier: the copier of the last snapshot.
    """

    def __init__(self, keep_on: KeepOn, earlier: "Copier | None" = None) -> None:
        """Know what was copied before."""
        self.keep_on = keep_on
        self.kept: dict[int, Kept] = {}
        self._earlier = earlier.kept if earlier is not None else {}

    def tensor(self, tensor: Tensor) -> Kept:
        """Keep one tensor; the same tensor twice is kept once."""
        if id(tensor) not in self.kept:
            before = self._earlier.get(id(tensor))
            copy = self._copy(tensor.detach())
            if before is not None and before.tensor is tensor and same_bits(before.copy, copy):
                copy = before.copy
            self.kept[id(tensor)] = Kept(tensor, copy)
        return self.kept[id(tensor)]

    def _copy(self, tensor: Tensor) -> Tensor:
        # A tensor of several devices, as FSDP's, is copied as it is.
        plain = type(tensor) in (Tensor, nn.Parameter)
        return tensor.to("cpu", copy=True) if plain and self.keep_on == "cpu" else tensor.clone()

    def copies(self) -> Iterator[Tensor]:
        """Yield the copies, each once."""
        return (kept.copy for kept in self.kept.values())

    def value(self, value: Any, memo: dict[int, Any] | None = None) -> Any:
        """Keep a value: tensors and containers are copied, anything else is held as it is."""
        memo = {} if memo is None else memo
        if isinstance(value, Tensor):
            return self.tensor(value)
        if not isinstance(value, _CONTAINERS):
            return value
        if id(value) not in memo:
            memo[id(value)] = (value, _map(value, lambda item: self.value(item, memo)))
        return memo[id(value)][1]


def give_back(kept: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return what `Copier.value` was given: tensors are the same objects, containers are new ones."""
    memo = {} if memo is None else memo
    if isinstance(kept, Kept):
        return kept.put_back()
    if not isinstance(kept, _CONTAINERS):
        return kept
    if id(kept) not in memo:
        memo[id(kept)] = _map(kept, lambda item: give_back(item, memo))
    return memo[id(kept)]


def _map(container: Any, turn: Any) -> Any:
    if isinstance(container, dict):
        made = {key: turn(item) for key, item in container.items()}
        return made if hasattr(container, "default_factory") else type(container)(made)
    if isinstance(container, deque):
        return deque((turn(item) for item in container), container.maxlen)
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        return type(container)(*(turn(item) for item in container))
    return type(container)(turn(item) for item in container)


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit; tells 0 from -0 and finds a NaN equal to itself.

    Example:
        >>> zero, none = torch.tensor(0.0), torch.tensor(float("nan"))
        >>> same_bits(zero, -zero), same_bits(none, none.clone())
        (False, True)
    """
    if one.shape != two.shape or one.dtype != two.dtype or one.device != two.device:
        return False
    if one.layout is not torch.strided or two.layout is not torch.strided or type(two) is not Tensor:
        return False
    flat = [t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (one, two)]
    return torch.equal(*flat)


class KeptModules:
    """Parameters and buffers of a module tree, those outside its state dict too.

    Args:
        root: the tree.
        copier: copies the tensors.
    """

    def __init__(self, root: nn.Module, copier: Copier) -> None:
        """Copy."""
        self._modules = [_KeptModule(module, copier) for module in root.modules()]

    def put_back(self) -> None:
        """Restore every module that was there; gradients are dropped."""
        for module in self._modules:
            module.put_back()


class _KeptModule:
    def __init__(self, module: nn.Module, copier: Copier) -> None:
        self.module = module
        given = {name: p for name, p in module._parameters.items() if p is not None and not is_lazy(p)}
        self.parameters = {name: (copier.tensor(p), p.requires_grad) for name, p in given.items()}
        self.buffers = {name: copier.value(buffer) for name, buffer in module._buffers.items()}

    def put_back(self) -> None:
        for name, (kept, trains) in self.parameters.items():
            parameter = kept.tensor
            assert isinstance(parameter, nn.Parameter)
            if (content := kept.put_back()) is not parameter:
                parameter.data = content
            parameter.requires_grad_(trains)
            parameter.grad = None
            self.module._parameters[name] = parameter
        for name, buffer in self.buffers.items():
            self.module._buffers[name] = give_back(buffer)


class KeptBank:
    """What a bank knows of its seeds, and its children themselves; their tensors are kept by `KeptModules`.

    Args:
        bank: the seeds.
    """

    def __init__(self, bank: SeedBank) -> None:
        """Copy the records and the state arrays, and hold on to the children."""
        self.bank = bank
        self.records = {seed: record.to_plain() for seed, record in bank.records.items()}
        self.rows, self.births = dict(bank.rows), bank.births
        self.columns = {name: column.clone() for name, column in bank.arrays.columns.items()}
        self.crc = bank.arrays.crc
        owners = {id(bank.graft(seed)): seed for seed in bank.records}
        grafts = (graft for layer in bank.all_layers() for graft in layer.all_grafts())
        self.grafts = [(owners[id(graft)], graft, _notes(graft)) for graft in grafts]

    def put_back(self) -> None:
        """Make records, arrays and children what they were; a child that was removed returns as the same object."""
        bank = self.bank
        for seed in [seed for seed in bank.records if bank.graft(seed) is not None]:
            bank.uproot(seed)
        bank.records.clear()
        bank.records.update((seed, SeedRecord.from_plain(deepcopy(plain))) for seed, plain in self.records.items())
        bank.rows, bank.births = dict(self.rows), self.births
        bank.arrays.columns = {name: column.clone() for name, column in self.columns.items()}
        bank.arrays.crc = self.crc
        for seed, graft, notes in self.grafts:
            vars(graft).update(notes)
            bank.replant(seed, graft, bank.records[seed])


def _notes(graft: Graft) -> dict[str, Any]:
    """Return the attributes of a graft that are neither tensors nor modules; a pending loss belongs to its batch."""
    plain = {name: value for name, value in vars(graft).items() if name[0] != "_" and name != "training"}
    return plain | {"pending": None}


def banks_in(roots: Iterable[nn.Module]) -> list[SeedBank]:
    """Return the seed banks of some module trees."""
    return [module for root in roots for module in root.modules() if isinstance(module, SeedBank)]
