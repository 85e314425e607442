"""What the seeds do between boundaries: sample health, move alpha, count steps."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW

from esper.kasmina.bank import SeedBank
from esper.kasmina.graft import Graft
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.readings import ONCE, digest, summed_up
from esper.kasmina.strategies import GraftingStrategy, GraftObservation, make_strategy
from esper.kasmina.telemetry import COLUMN
from esper.kasmina.trends import remember, slopes
from esper.leyline.events import Fault
from esper.leyline.ids import SeedId
from esper.leyline.states import SeedState


class SeedStepper:
    """Follows the training steps of one run for a bank.

    Args:
        bank: seeds of the model.
    """

    def __init__(self, bank: SeedBank) -> None:
        """Start without strategies: they are made, or restored from the records, when first needed."""
        self.bank = bank
        self._sampling: bool | None = None
        self._strategies: dict[SeedId, GraftingStrategy] = {}
        self._pretrainers: dict[SeedId, AdamW] = {}
        self.average: Callable[[Sequence[Graft]], object] = lambda grafts: None
        self._saved: dict[str, Any] = {}

    def begin(self, step: int) -> None:
        """Open or close the sampling of health for this step."""
        every = self.bank.config.telemetry_every
        sampling = every > 0 and step % every == 0
        if self._sampling:
            digest(layer.readings for layer in self.bank.all_layers())
        if sampling is self._sampling:
            return
        self._sampling = sampling
        for layer in self.bank.all_layers():
            layer.sampling = sampling

    def observe_gradients(self) -> None:
        """After a backward pass: stop non-finite gradients of a graft; on a sampled step, note its gradient ratio."""
        for seed, graft in self.bank.grafted().items():
            layer = self.bank.layer(seed.layer)
            graft.screen_gradients()
            if layer.sampling and (incumbent := _rms_gradient(layer.site)) > 0:
                layer.add_health("newborn_incumbent_ratio", _rms_gradient(graft.child) / incumbent)

    def end(self, loss: float) -> None:
        """Finish a training step: own updates of reconstruction, ramps, stage clocks."""
        learning: dict[SeedId, Graft] = {}
        for seed, record in self.bank.records.items():
            record.tick()
            state, graft = SeedState(record.state), self.bank.graft(seed)
            if state is SeedState.TRAINING and graft is not None and graft.objective == "reconstruction":
                learning[seed] = graft
            elif state is SeedState.GRAFTING:
                self._ramp(seed, loss)
        self._pretrain(learning)

    def forget(self, seed: SeedId) -> None:
        """Drop what is kept for a seed whose child is gone."""
        self._strategies.pop(seed, None)
        self._pretrainers.pop(seed, None)
        self._saved.pop(str(seed), None)

    def _ramp(self, seed: SeedId, loss: float) -> None:
        graft, record, layer = self.bank.graft(seed), self.bank.records[seed], self.bank.layer(seed.layer)
        if graft is None:
            return
        strategy = self._strategy(seed)
        drift = graft.drift(layer.site) if strategy.needs_drift else 0.0
        norm = graft.grad_norm() if strategy.needs_grad_norm else 0.0
        graft.set_alpha(strategy.update(GraftObservation(loss, drift, norm)))
        record.strategy_state = strategy.state_dict()
        layer.refresh()

    def _strategy(self, seed: SeedId) -> GraftingStrategy:
        if seed not in self._strategies:
            record = self.bank.records[seed]
            strategy = make_strategy(record.strategy, self.bank.config.ramp_steps)
            strategy.load_state_dict(record.strategy_state)
            self._strategies[seed] = strategy
        return self._strategies[seed]

    def _pretrain(self, learning: dict[SeedId, Graft]) -> None:
        for seed, graft in learning.items():
            self._learn(seed, graft)
        self.average(list(learning.values()))
        for seed, graft in learning.items():
            # Without a gradient there was no loss, or the child failed, on every rank.
            if any(p.grad is not None for p in graft.child.parameters()):
                self._pretrainer(seed, graft).step()
            graft.child.zero_grad()

    def _learn(self, seed: SeedId, graft: Graft) -> None:
        graft.child.zero_grad()
        loss, graft.pending = graft.pending, None
        if loss is None:
            return
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever the kernel raises, the host must go on
            graft.fail(Fault.RAISED, f"{type(error).__name__} in its own backward pass: {error}")
            graft.child.zero_grad()
            self.bank.layer(seed.layer).refresh()

    def _pretrainer(self, seed: SeedId, graft: Graft) -> AdamW:
        if seed not in self._pretrainers:
            optimizer = AdamW(graft.child.parameters(), lr=self.bank.config.reconstruction_lr)
            if str(seed) in self._saved:
                optimizer.load_state_dict(self._saved.pop(str(seed)))
            self._pretrainers[seed] = optimizer
        return self._pretrainers[seed]

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizers of reconstruction training; everything else is in the seeds' records."""
        running = {str(seed): optimizer.state_dict() for seed, optimizer in self._pretrainers.items()}
        return self._saved | running

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; each optimizer is restored when its seed next trains."""
        self._saved = dict(state)

    def restart(self, state: dict[str, Any]) -> None:
        """Take back an earlier state in the middle of a run: what is alive is made anew, from it and the records."""
        self._strategies.clear()
        self._pretrainers.clear()
        self.load_state_dict(state)


def boundary_health(layers: Sequence[KasminaLayer]) -> list[NDArray[np.float32]]:
    """Return each layer's health at a boundary, [R, metrics and trends]; NaN where not sampled.

    It is drained, and the trends remember it: call this once per boundary.
    """
    means = [mean.numpy() for mean in drain_health(layers)]
    for layer, mean in zip(layers, means, strict=True):
        layer.history = remember(layer.history, mean)
    found, ends = slopes([layer.history for layer in layers]), np.cumsum([len(mean) for mean in means])
    return [np.concatenate([m, found[end - len(m) : end]], axis=1) for m, end in zip(means, ends, strict=True)]


def drain_health(layers: Sequence[KasminaLayer]) -> list[Tensor]:
    """Return each layer's mean health since the last call, [R, metrics] on the CPU; NaN where not sampled."""
    digest(layer.readings for layer in layers)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for place, layer in enumerate(layers):
        groups[(layer.health.device, *layer.readings.alike)].append(place)
    means: dict[int, Tensor] = {}
    for places in groups.values():
        means |= zip(places, _mean_health([layers[place] for place in places]), strict=True)
    return [means[place] for place in range(len(layers))]


def _mean_health(alike: Sequence[KasminaLayer]) -> Iterable[Tensor]:
    """Drain layers that have read alike: few operations, and one transfer from the device, for all of them."""
    sums_LRM = torch.stack([layer.health for layer in alike])
    for metric, values_LR in summed_up([layer.readings for layer in alike]).items():
        sums_LRM[..., COLUMN[metric]] += values_LR
        if metric in ONCE:
            for layer in alike:
                layer.samples[COLUMN[metric]] += 1
    counts_L1M = torch.from_numpy(np.stack([layer.samples for layer in alike])).float()[:, None]
    for layer in alike:
        layer.clear_health()
    return (sums_LRM.cpu() / counts_L1M).unbind()


def _rms_gradient(module: nn.Module) -> float:
    grads = [p.grad.detach() for p in module.parameters() if p.grad is not None]
    count = sum(g.numel() for g in grads)
    return float(sum(g.square().sum() for g in grads) / count) ** 0.5 if count else 0.0
