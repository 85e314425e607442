"""What the ranks exchange about their children: gradients, faults, and a fingerprint of everything that must agree.

Children live outside of the reducer that wraps the host. Their gradients are averaged here, once per optimizer step,
so that growth needs no new wrapper and a child that fails on one rank never leaves the others waiting.
"""

import json
import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from esper.kasmina.bank import SeedBank
from esper.kasmina.graft import Graft
from esper.leyline.errors import DistributedError
from esper.leyline.events import Fault
from esper.tolaria.distributed import Ranks

_LOCAL = frozenset({"draws"})
"""Entries of the topology that may differ: a site that a rank's data did not reach draws no mask there."""

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SharedFaults:
    """Makes a fault of one rank the fault of all, in the words of the lowest rank that saw it.

    Args:
        bank: seeds of the model.
        ranks: the processes of the run.
    """

    def __init__(self, bank: SeedBank, ranks: Ranks) -> None:
        """Know of no fault yet."""
        self.bank, self.ranks = bank, ranks
        self._settled: set[int] = set()

    def __call__(self) -> None:
        """Agree on all faults; collective."""
        if not self.ranks.alone:
            self.settle(self.ranks.total(self.flags()))

    def forget(self) -> None:
        """Know of no fault any more, because the run went back; all ranks do so at once."""
        self._settled.clear()

    def flags(self) -> list[int]:
        """Return 1 for each child that is at fault here, in the order of birth."""
        return [int(graft.fault is not None) for graft in self.bank.grafted().values()]

    def settle(self, counts: Sequence[float]) -> None:
        """Take over what is new; collective.

        Args:
            counts: on how many ranks each child is at fault, in the order of birth.
        """
        grafts = self.bank.grafted()
        faulty = {seed: graft for (seed, graft), count in zip(grafts.items(), counts, strict=True) if count > 0}
        births = {self.bank.records[seed].birth for seed in faulty}
        known, self._settled = self._settled, births
        if births <= known and all(count in (0, self.ranks.size) for count in counts):
            return
        told = self.ranks.gather({str(s): [g.fault_kind, g.fault] for s, g in faulty.items() if g.fault is not None})
        for seed, graft in faulty.items():
            kind, why = next(words[str(seed)] for words in told if str(seed) in words)
            graft.fail(Fault(kind), why)
            self.bank.layer(seed.layer).refresh()


class ChildGradients:
    """Averages the children's gradients over the ranks, together with their faults, in one message.

    The message is one flat vector: a fault flag per child, a presence flag per parameter, all gradients, and the
    running means that some children keep, which each rank takes from its own data. A gradient that is missing on some
    rank counts as zero there; one that is missing on all stays missing, so that the optimizer leaves its parameter
    alone as it would in a single process.

    Args:
        bank: seeds of the model.
        ranks: the processes of the run.
        faults: shares the faults.
    """

    def __init__(self, bank: SeedBank, ranks: Ranks, faults: SharedFaults) -> None:
        """Remember the three."""
        self.bank, self.ranks, self.faults = bank, ranks, faults

    def __call__(self) -> None:
        """Average, after the last backward pass of an optimizer step; collective."""
        grafts = self.bank.grafted()
        if self.ranks.alone or not grafts:
            return
        for graft in grafts.values():
            graft.screen_gradients()
        found = self.average(list(grafts.values()), self.faults.flags())
        self.faults.settle(found)
        for graft in grafts.values():
            if graft.fault is not None:
                graft.child.zero_grad()

    def average(self, grafts: Sequence[Graft], flags: Sequence[int] = ()) -> list[float]:
        """Average the gradients and running states of some children in place; return the flags' sums over the ranks."""
        parameters = [p for graft in grafts for p in graft.child.parameters() if p.requires_grad]
        if self.ranks.alone or not grafts:
            return list(flags)
        states = [b for graft in grafts for b in graft.child.buffers() if b.is_floating_point()]
        flat = _flatten(parameters, flags, states, grafts[0].alpha.device)
        self.ranks.add_up(flat)
        counts = flat[: len(flags) + len(parameters)].tolist()
        at = len(counts)
        for parameter, present in zip(parameters, counts[len(flags) :], strict=True):
            mean = flat[at : at + parameter.numel()] / self.ranks.size
            parameter.grad = mean.view_as(parameter).to(parameter.dtype) if present else None
            at += parameter.numel()
        for state in states:
            state.copy_((flat[at : at + state.numel()] / self.ranks.size).view_as(state))
            at += state.numel()
        return [float(count) for count in counts[: len(flags)]]


def _flatten(
    parameters: Sequence[nn.Parameter], flags: Sequence[int], states: Sequence[Tensor], device: torch.device
) -> Tensor:
    wide = torch.float64 if any(p.dtype is torch.float64 for p in parameters) else torch.float32
    present = [int(p.grad is not None) for p in parameters]
    heads = torch.tensor([*flags, *present], dtype=wide, device=device)
    grads = (p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters)
    return torch.cat([heads, *(tensor.detach().reshape(-1).to(wide) for tensor in (*grads, *states))])


def fingerprint(module: nn.Module, bank: SeedBank) -> dict[str, int]:
    """Return checksums of everything that must be the same on all ranks.

    The buffers of the host are left out: the wrapper makes them equal before each forward pass. So are the shards of
    a sharded host, which differ on purpose.

    Args:
        module: host and children.
        bank: the seeds.
    """
    entries = [{k: v for k, v in entry.items() if k not in _LOCAL} for entry in bank.topology()]
    buffers = (buffer for graft in bank.grafted().values() for buffer in graft.buffers())
    tensors = [t for t in (*module.parameters(), *buffers) if not isinstance(t, DTensor)]
    return {
        "topology": zlib.crc32(json.dumps(entries, sort_keys=True).encode()),
        "seed states": bank.arrays.checksum(),
        "weights": bit_sum(tensors),
    }


def bit_sum(tensors: Iterable[Tensor]) -> int:
    """Return a checksum of the bits of tensors, computed where they are; only one number per tensor is moved.

    Example:
        >>> bit_sum([torch.zeros(2)]) == bit_sum([torch.tensor([0.0, 1e-45])])
        False
    """
    sums = [_bits(t.detach()).sum(dtype=torch.int64).cpu() for t in tensors if t.numel()]
    return zlib.crc32(torch.stack(sums).numpy().tobytes()) if sums else 0


def _bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.contiguous().reshape(-1).view(_WHOLE[real.element_size()])


def require_agreement(prints: Sequence[dict[str, int]], where: str) -> None:
    """Check that the fingerprints of all ranks are the same.

    Args:
        prints: one per rank.
        where: when this is, for the message.

    Raises:
        DistributedError: they differ; the message names the ranks and what differs.

    Example:
        >>> require_agreement([{"weights": 1}, {"weights": 1}], "at step 3")
    """
    wrong = {rank: _differing(prints[0], found) for rank, found in enumerate(prints) if found != prints[0]}
    if wrong:
        told = "; ".join(f"rank {rank} in its {', '.join(names)}" for rank, names in wrong.items())
        raise DistributedError(
            f"the ranks no longer agree {where}: against rank 0, {told} (of {len(prints)} ranks). Training is stopped; "
            "resume from the last checkpoint, and look for code that runs on some ranks only."
        )


def _differing(one: dict[str, int], other: dict[str, int]) -> list[str]:
    return [name for name in one if one[name] != other.get(name)]
