"""Evidence from the decision part: what does the loss become when a child is taken away?"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from esper.kasmina.bank import SeedBank
from esper.leyline.commands import SPREAD
from esper.leyline.errors import DataError
from esper.leyline.ids import SeedId
from esper.leyline.reports import Counterfactual
from esper.models.flops import macs_of
from esper.tolaria.distributed import Ranks
from esper.tolaria.exchange import SharedFaults
from esper.tolaria.parts import FromLoader
from esper.tolaria.sharded import is_sharded
from esper.tolaria.snapshot import undisturbed

_log = logging.getLogger(__name__)


def paired(without: Tensor, with_child: Tensor, confidence: float) -> Counterfactual:
    """Return mean and interval of the paired gain `without - with_child`.

    `mean ± z * sd / sqrt(n)`, with z the one-sided normal quantile of `confidence`.

    Args:
        without: [n] losses with the child off.
        with_child: [n] losses of the same samples with the child on.
        confidence: one-sided confidence of each bound.

    Example:
        >>> paired(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]), 0.95).mean
        1.0
    """
    gain = (without - with_child).double()
    n = gain.numel()
    if not bool(torch.isfinite(gain).all()):
        return Counterfactual(mean=float("nan"), lower=float("-inf"), upper=float("inf"), n=n)
    mean = float(gain.mean())
    if n < 2:
        return Counterfactual(mean=mean, lower=float("-inf"), upper=float("inf"), n=n)
    half = NormalDist().inv_cdf(confidence) * float(gain.std()) / n**0.5
    return Counterfactual(mean=mean, lower=mean - half, upper=mean + half, n=n)


class Evidence:
    """Measures losses on fixed samples of one data part, with chosen children on and off.

    The samples are read once. Random state and the module's own notes are restored afterwards, so that taking evidence
    never changes the training run.

    Args:
        trainer: gives device and precision.
        module: the model being trained. If it has `decision_losses(batch) -> [B]`, that is used; otherwise each sample
            goes through `validation_step`, or `training_step` where that yields no loss.
        bank: seeds of the model.
        batches: batches of the part, plain or with the index of their loader.
        samples: most samples.
        confidence: one-sided confidence of the interval.
        shared: the ranks, each of which measures its share; None for a single process.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        bank: SeedBank,
        batches: Callable[[], Iterator[Any]],
        *,
        samples: int,
        confidence: float,
        shared: SharedFaults | None = None,
    ) -> None:
        """Read nothing yet."""
        self._shared = shared if shared is not None else SharedFaults(bank, Ranks())
        self._share = -(-samples // self._shared.ranks.size)
        self.trainer, self.module, self.bank = trainer, module, bank
        self._batches, self.samples, self.confidence = batches, samples, confidence
        self._units: list[FromLoader] | None = None
        self.forward_samples = 0

    def __call__(self, seed_ids: Sequence[str]) -> dict[str, Counterfactual]:
        """Return each seed's leave-one-out effect: everything else stays on; what was spread is taken away as one."""
        with_all = self.losses()
        found: dict[str, Counterfactual] = {}
        for names in self._together(seed_ids):
            with ExitStack() as away:
                for name in names:
                    away.enter_context(_muted(self.bank, SeedId.parse(name)))
                found |= dict.fromkeys(names, paired(self.losses(), with_all, self.confidence))
        return found

    def _together(self, seed_ids: Sequence[str]) -> list[list[str]]:
        groups: dict[str, list[str]] = {}
        for name in seed_ids:
            group = self.bank.records[SeedId.parse(name)].group
            groups.setdefault(group if group.startswith(SPREAD) else name, []).append(name)
        return list(groups.values())

    def loss(self) -> float:
        """Return the mean loss with everything on."""
        return float(self.losses().mean())

    def macs(self) -> float:
        """Return the multiply-accumulates of the host for one sample, by one pass; 0 where they cannot be counted."""
        if is_sharded(self.trainer.strategy):
            return 0.0
        whole = 0.0
        with undisturbed(self.module):
            for unit in self._read()[:1]:
                samples = batch_size(unit.batch) if _tells_samples(self.module) else 1
                try:
                    whole = macs_of(partial(unit_losses, self.trainer, self.module, unit)) / samples
                except Exception as error:  # The counter does not know every kind of tensor; the run needs no count.
                    _log.info("the work of the host is not counted, and nothing limits the search: %s", error)
        self._shared()
        living = sum(self.bank.records[seed].macs for seed, graft in self.bank.grafted().items() if graft.strength > 0)
        return max(0.0, whole - living)

    def losses(self) -> Tensor:
        """Return the loss of each sample, [n] float64 on the CPU; those of all ranks, in the order of the ranks."""
        units = self._read()
        with undisturbed(self.module):
            parts = [unit_losses(self.trainer, self.module, unit) for unit in units]
        own = torch.cat(parts)[: self._share].tolist() if parts else []
        found = [loss for losses in self._shared.ranks.gather(own) for loss in losses]
        result = torch.tensor(found, dtype=torch.float64)[: self.samples]
        self._shared()
        if not len(result):
            raise DataError("the decision part is empty; give the trainer a validation loader with samples.")
        self.forward_samples += len(result)
        return result

    def _read(self) -> list[FromLoader]:
        if self._units is None:
            with undisturbed(self.module):
                self._units = list(self._cut())
        return self._units

    def _cut(self) -> Iterator[FromLoader]:
        seen = 0
        for batch in self._batches():
            for unit in units_of(self.module, batch):
                yield unit
                seen += batch_size(unit.batch) if _tells_samples(self.module) else 1
                if seen >= self._share:
                    return


def losses_of(trainer: Trainer, module: LightningModule, batches: Iterable[Any]) -> Tensor:
    """Return the loss of every sample of some batches, [n] float64 on the CPU, read one batch at a time."""
    with undisturbed(module):
        units = (unit for batch in batches for unit in units_of(module, batch))
        parts = [unit_losses(trainer, module, unit) for unit in units]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def units_of(module: LightningModule, batch: Any) -> list[FromLoader]:
    """Return a batch in the pieces that are measured: whole where the module tells each sample's loss, else cut."""
    given = batch if isinstance(batch, FromLoader) else FromLoader(batch, 0)
    pieces = [given.batch] if _tells_samples(module) else split(given.batch)
    return [FromLoader(piece, given.dataloader_idx) for piece in pieces]


def unit_losses(trainer: Trainer, module: LightningModule, unit: FromLoader) -> Tensor:
    """Return the losses of a unit, [n] float64 on the CPU, in the trainer's precision and on its device."""
    plugin = trainer.precision_plugin
    batch = trainer.strategy.batch_to_device(plugin.convert_input(unit.batch), dataloader_idx=unit.dataloader_idx)
    with plugin.val_step_context():
        own = getattr(module, "decision_losses", None)
        losses: Tensor = own(batch) if own is not None else step_loss(module, batch, unit.dataloader_idx)
    return losses.detach().float().cpu().reshape(-1).double()


def _tells_samples(module: LightningModule) -> bool:
    return hasattr(module, "decision_losses")


def batch_size(batch: Any) -> int:
    """Return the length of a batch's first tensor, 1 if it has none."""
    leaves, _ = tree_flatten(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)


def split(batch: Any) -> list[Any]:
    """Return a batch as batches of one sample; a batch that cannot be cut stays whole."""
    leaves, spec = tree_flatten(batch)
    sizes = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1 or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        return [batch]
    return [tree_unflatten([leaf[i : i + 1] for leaf in leaves], spec) for i in range(sizes.pop())]


def step_loss(module: LightningModule, batch: Any, dataloader_idx: int = 0) -> Tensor:
    """Return the loss of a batch by the module's own steps, with its logging silenced.

    Args:
        module: the model.
        batch: what its steps take.
        dataloader_idx: which of several validation loaders the batch comes from.

    Raises:
        DataError: neither `validation_step` nor `training_step` yields a loss.
    """
    with _silenced(module) as logged:
        found = None
        if _has_validation(module):
            found = _as_loss(_step(module.validation_step, batch, dataloader_idx))
        if found is None:
            found = next((v for k, v in logged.items() if "loss" in k), None)
        if found is None:
            found = _as_loss(_step(module.training_step, batch, dataloader_idx))
    if found is None:
        raise DataError("no loss came back from validation_step or training_step; return it, or log it as '..loss..'.")
    return torch.as_tensor(found, dtype=torch.float32).mean()


def _step(step: Callable[..., Any], batch: Any, dataloader_idx: int) -> Any:
    """Call a step with the arguments that it takes, as Lightning's loops do."""
    args = [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        args.append(0)
    if is_param_in_hook_signature(step, "dataloader_idx", min_args=3):
        args.append(dataloader_idx)
    return step(*args)


def _has_validation(module: LightningModule) -> bool:
    return type(module).validation_step is not LightningModule.validation_step


def _as_loss(result: Any) -> Tensor | None:
    if isinstance(result, dict):
        result = next((v for k, v in result.items() if "loss" in str(k)), None)
    return result if isinstance(result, Tensor) else None


@contextmanager
def _silenced(module: LightningModule) -> Iterator[dict[str, Any]]:
    """Catch what a step logs: outside its loop Lightning would refuse it."""
    logged: dict[str, Any] = {}

    def log(name: str, value: Any, *_: Any, **__: Any) -> None:
        logged[name] = value

    def log_dict(values: dict[str, Any], *_: Any, **__: Any) -> None:
        logged.update(values)

    own: dict[str, Any] = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    vars(module).update({"log": log, "log_dict": log_dict})
    try:
        yield logged
    finally:
        for name in ("log", "log_dict"):
            del vars(module)[name]
        vars(module).update(own)


@contextmanager
def _muted(bank: SeedBank, seed: SeedId) -> Iterator[None]:
    graft, layer = bank.graft(seed), bank.layer(seed.layer)
    assert graft is not None
    graft.muted = True
    layer.refresh()
    try:
        yield
    finally:
        graft.muted = False
        layer.refresh()
