"""Optimizer and scheduler surgery: children join and leave, the host's own state stays bit for bit.

Each child has a parameter group of its own, tagged with its seed id, in the order of birth.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    MultiplicativeLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from esper.kasmina.bank import SeedBank
from esper.leyline.errors import CheckpointError

SEED_KEY = "esper_seed"
AGE_KEY = "esper_age"
_LR_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


def sync_optimizer(
    optimizer: Optimizer, schedulers: Iterable[LRScheduler], bank: SeedBank, *, lr_scale: float = 1.0
) -> bool:
    """Make the optimizer's groups match the bank's children; return whether anything changed.

    Groups of children that are gone are popped with their state; children without a group get one with the options of
    the host's first group. Moments of every other parameter are not touched.

    Args:
        optimizer: the one that trains the host.
        schedulers: its learning-rate schedulers.
        bank: seeds of the model.
        lr_scale: ratio of a child's learning rate to the host's.
    """
    living = {str(seed): graft for seed, graft in bank.grafted().items()}
    flat = list(flatten(schedulers))
    changed = _drop_dead(optimizer, flat, {id(p) for g in living.values() for p in g.child.parameters()})
    known = {group[SEED_KEY] for group in optimizer.param_groups if SEED_KEY in group}
    for name, graft in living.items():
        parameters = list(graft.child.parameters())
        if name not in known and parameters:
            _add(optimizer, flat, name, parameters, lr_scale)
            changed = True
    for group in optimizer.param_groups:
        if SEED_KEY in group:
            shadow = living[group[SEED_KEY]].objective == "shadow"
            decay = bank.config.shadow_weight_decay if shadow else group["esper_weight_decay"]
            if "weight_decay" in group:
                group["weight_decay"] = decay
    return changed


def take_children_out(optimizer: Optimizer, bank: SeedBank) -> None:
    """Remove children from groups that are not theirs: a fresh `configure_optimizers` saw them among the host's."""
    children = {id(p) for graft in bank.grafted().values() for p in graft.child.parameters()}
    for group in optimizer.param_groups:
        if SEED_KEY not in group:
            group["params"] = [p for p in group["params"] if id(p) not in children]


def flatten(schedulers: Iterable[LRScheduler]) -> Iterable[LRScheduler]:
    """Yield schedulers and those nested in sequential and chained ones."""
    for scheduler in schedulers:
        yield scheduler
        if isinstance(scheduler, SequentialLR | ChainedScheduler):
            yield from flatten(scheduler._schedulers)


def _add(
    optimizer: Optimizer, schedulers: Sequence[LRScheduler], name: str, parameters: list[Any], lr_scale: float
) -> None:
    host = optimizer.param_groups[0]
    options = {key: value for key, value in host.items() if key not in ("params", "param_names")}
    options |= {key: options[key] * lr_scale for key in _LR_KEYS if key in options}
    options |= {SEED_KEY: name, AGE_KEY: 0, "esper_weight_decay": host.get("weight_decay", 0.0)}
    optimizer.add_param_group({"params": parameters, **options})
    for scheduler in schedulers:
        for column in _columns(scheduler):
            column.append(_joining(column[0], lr_scale))


def _joining(first: Any, lr_scale: float) -> Any:
    return first * lr_scale if isinstance(first, int | float) else first


def _columns(scheduler: LRScheduler) -> list[list[Any]]:
    """Return the scheduler's lists that hold one entry per parameter group."""
    names = ["base_lrs", "_last_lr"]
    if isinstance(scheduler, LambdaLR | MultiplicativeLR):
        names.append("lr_lambdas")
    if isinstance(scheduler, CyclicLR):
        names += ["max_lrs", "base_momentums", "max_momentums"]
    if isinstance(scheduler, ReduceLROnPlateau):
        names.append("min_lrs")
    columns = (getattr(scheduler, name, None) for name in names)
    return [column for column in columns if isinstance(column, list) and column]


def _drop_dead(optimizer: Optimizer, schedulers: Sequence[LRScheduler], living: set[int]) -> bool:
    changed = False
    for index in reversed(range(len(optimizer.param_groups))):
        group = optimizer.param_groups[index]
        if SEED_KEY not in group or all(id(p) in living for p in group["params"]):
            continue
        changed = True
        for parameter in optimizer.param_groups.pop(index)["params"]:
            optimizer.state.pop(parameter, None)
        for scheduler in schedulers:
            for column in _columns(scheduler):
                if len(column) > index:
                    del column[index]
    return changed


def verify_groups(saved: Sequence[dict[str, Any]], optimizer: Optimizer) -> None:
    """Check that saved groups and present groups are the same children in the same order.

    Loading is positional: swapped groups of equal shapes would load without a word.

    Raises:
        CheckpointError: they differ.
    """
    wanted = [group.get(SEED_KEY) for group in saved]
    present = [group.get(SEED_KEY) for group in optimizer.param_groups]
    if wanted != present:
        raise CheckpointError(
            f"the checkpoint's optimizer has the groups {_named(wanted)}, this model has {_named(present)}; "
            "resume with the same model, targets and optimizer."
        )


def _named(groups: Sequence[str | None]) -> str:
    return ", ".join("host" if group is None else group for group in groups)


class BirthWarmUp:
    """Scales the learning rate of young children inside `optimizer.step`, out of the schedulers' sight.

    `lr * min(1, (age + 1) / steps)`, where age counts the child's optimizer steps.

    Args:
        steps: length of the warm-up; 0 does nothing.
    """

    def __init__(self, steps: int) -> None:
        """Start without an optimizer."""
        self.steps = steps
        self._handles: list[Any] = []
        self._kept: dict[int, float] = {}

    def attach(self, optimizer: Optimizer) -> None:
        """Hook into an optimizer's step."""
        self.detach()
        self._handles = [
            optimizer.register_step_pre_hook(lambda opt, *_: self._before(opt)),
            optimizer.register_step_post_hook(lambda opt, *_: self._after(opt)),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, optimizer: Optimizer) -> None:
        for index, group in enumerate(optimizer.param_groups):
            if SEED_KEY in group and group[AGE_KEY] < self.steps:
                self._kept[index] = group["lr"]
                group["lr"] = group["lr"] * (group[AGE_KEY] + 1) / self.steps

    def _after(self, optimizer: Optimizer) -> None:
        for index, group in enumerate(optimizer.param_groups):
            if index in self._kept:
                group["lr"] = self._kept.pop(index)
            if SEED_KEY in group:
                group[AGE_KEY] += 1
