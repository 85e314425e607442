"""Several processes, one mind: what the ranks of a run agree on before, at and after a boundary.

Rank 0 decides. What it decides on is the same everywhere, because numbers are added up over the ranks first, and what
it decided is broadcast as bytes, because a process could still come to another view. With one process nothing is sent.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from lightning.pytorch import Trainer
from torch import nn

from esper.kasmina.bank import SeedBank
from esper.kasmina.kernels import Kernel, KernelRequest, KernelStore
from esper.kasmina.layer import KasminaLayer, SiteFacts
from esper.kasmina.steps import SeedStepper, drain_health
from esper.kasmina.wrapper import GerminationRequest, MorphableModel
from esper.leyline.codec import decode, encode
from esper.leyline.commands import KasminaControlCommand
from esper.leyline.errors import BlueprintError, KernelError
from esper.leyline.events import DecisionMade
from esper.leyline.ids import SeedId
from esper.leyline.packets import SystemStatePacket
from esper.leyline.states import SeedState
from esper.tamiyo.contracts import Decision
from esper.tamiyo.controller import TamiyoController
from esper.tamiyo.tally import Tally
from esper.tolaria.distributed import Ranks
from esper.tolaria.exchange import ChildGradients, SharedFaults, fingerprint, require_agreement


@final
class Council:
    """Makes the ranks of one fit decide as one.

    Args:
        ranks: the processes of the run.
        bank: seeds of the model.
    """

    def __init__(self, ranks: Ranks, bank: SeedBank) -> None:
        """Share faults and gradients from here on."""
        self.ranks, self.bank = ranks, bank
        self.faults = SharedFaults(bank, ranks)
        self.gradients = ChildGradients(bank, ranks, self.faults)

    @classmethod
    def of(cls, trainer: Trainer, controller: TamiyoController, stepper: SeedStepper) -> "Council":
        """Let the ranks of a fit that starts decide as one; collective."""
        council = cls(Ranks.of(trainer), controller.bank)
        stepper.average, controller.agree = council.gradients.average, council.decision
        controller.run_id = council.ranks.from_zero(controller.run_id)
        if not council.ranks.alone:
            controller.use_store(AgreedStore(controller.store, council.ranks))
        return council

    def convene(self, controller: TamiyoController, tally: Tally) -> None:
        """Open a boundary: share faults, losses and health, and what was asked for by hand on rank 0."""
        if not self.ranks.alone:
            self.faults()
            self._share_losses(tally)
            self._share_health()
            controller.paused = self._share_requests(controller.morphable, controller.paused)
            self._share_rollback(controller)

    def loss(self, loss: float) -> float:
        """Return the loss that a ramp may follow: the mean over the ranks while one is under way."""
        ramping = any(record.state == SeedState.GRAFTING.value for record in self.bank.records.values())
        return self.ranks.mean(loss) if ramping else loss

    def decision(self, decision: Decision) -> Decision:
        """Return rank 0's decision."""
        return decision if self.ranks.alone else _unpack(self.ranks.from_zero(_pack(decision)))

    def packet(self, packet: SystemStatePacket) -> SystemStatePacket:
        """Return rank 0's packet."""
        return packet if self.ranks.alone else decode(SystemStatePacket, self.ranks.from_zero(encode(packet)))

    def _share_requests(self, morphable: MorphableModel, paused: bool) -> bool:
        asked = [[str(r.seed), r.blueprint, r.strategy] for r in morphable.requests]
        given = self.ranks.from_zero([asked, [str(seed) for seed in morphable.cancellations], paused])
        morphable.requests = [GerminationRequest(SeedId.parse(s), name, how) for s, name, how in given[0]]
        morphable.cancellations = [SeedId.parse(seed) for seed in given[1]]
        return bool(given[2])

    def _share_rollback(self, controller: TamiyoController) -> None:
        """Let a rollback that was asked for on any rank since the last batch be asked for on all."""
        reasons = self.ranks.gather(controller.take_rollback_request())
        for reason in [reason for reason in reasons if reason is not None][:1]:
            controller.request_rollback(reason)

    def _share_losses(self, tally: Tally) -> None:
        tally.sum, count = self.ranks.total([tally.sum, tally.count])
        tally.count = int(count)

    def metrics(self, logged: Mapping[str, float]) -> dict[str, float]:
        """Return the mean over the ranks of every metric that all of them have logged."""
        if self.ranks.alone:
            return dict(logged)
        found = self.ranks.gather(dict(logged))
        shared = [name for name in found[0] if all(name in metrics for metrics in found)]
        return {name: sum(metrics[name] for metrics in found) / len(found) for name in shared}

    def probes(self) -> None:
        """Agree on what the first batches told about the sites: what one rank's data reached is reached."""
        layers = [layer for layer in self.bank.all_layers() if layer.probing]
        if self.ranks.alone or not layers:
            return
        told = self.ranks.gather([_findings(layer) for layer in layers])
        for layer, findings in zip(layers, zip(*told, strict=True), strict=True):
            _settle(layer, list(findings))

    def _share_health(self) -> None:
        """Give every layer the mean of what the ranks have sampled there."""
        layers = list(self.bank.all_layers())
        if not layers:
            return
        own = drain_health(layers)
        flat = torch.cat([mean.flatten() for mean in own])
        sampled = ~flat.isnan()
        numbers = torch.tensor(self.ranks.total([*flat.nan_to_num(0.0).tolist(), *sampled.tolist()]))
        sums, counts = numbers.tensor_split(2)
        means = torch.split(sums / counts, [part.numel() for part in own])
        for layer, mean in zip(layers, means, strict=True):
            layer.take_health(mean.view_as(layer.health))

    def compare(self, module: nn.Module, where: str) -> None:
        """Check that all ranks hold the same topology, seeds and weights.

        Raises:
            DistributedError: they do not; the message names the ranks.
        """
        if not self.ranks.alone:
            require_agreement(self.ranks.gather(fingerprint(module, self.bank)), where)


@final
class AgreedStore(KernelStore):
    """Offers a kernel only once every rank has it, and to none if one cannot have it.

    Args:
        store: this rank's own.
        ranks: the processes of the run.
    """

    def __init__(self, store: KernelStore, ranks: Ranks) -> None:
        """Remember both."""
        self.store, self.ranks = store, ranks
        self.shared = store.portable()

    def prefetch(self, request: KernelRequest) -> None:
        """Start to make the kernel ready on this rank."""
        self.shared.prefetch(request)

    def poll(self, request: KernelRequest) -> Kernel | None:
        """Return the kernel when all ranks have it; collective."""
        kernel, failure = None, ""
        try:
            kernel = self.shared.poll(request)
        except (KernelError, BlueprintError) as error:
            failure = str(error)
        answers = self.ranks.gather([kernel is not None, failure])
        failures = [why for _, why in answers if why]
        if failures:
            raise KernelError(failures[0])
        return kernel if all(ready for ready, _ in answers) else None

    def evict(self, kernel_id: str) -> None:
        """Never offer this kernel again."""
        self.shared.evict(kernel_id)

    def close(self) -> None:
        """Release what this rank's store holds."""
        self.store.close()


def unwrapped(store: KernelStore) -> KernelStore:
    """Return this rank's own store."""
    return store.store if isinstance(store, AgreedStore) else store


def _pack(decision: Decision) -> list[bytes]:
    told = DecisionMade(
        run_id="", epoch=0, step=0, policy="", explanation=decision.explanation, candidates=decision.candidates
    )
    return [encode(told), *map(encode, decision.commands)]


def _unpack(data: list[bytes]) -> Decision:
    told = decode(DecisionMade, data[0])
    commands = tuple(decode(KasminaControlCommand, command) for command in data[1:])
    return Decision(commands, told.explanation, told.candidates)


def _findings(layer: KasminaLayer) -> list[Any]:
    facts = list(layer.facts) if layer.facts is not None else None
    return [facts, layer.refusal, layer.fired[True], layer.fired[False], layer.gradient_seen]


def _settle(layer: KasminaLayer, findings: list[list[Any]]) -> None:
    """Take the facts and the refusal of the lowest rank that has any."""
    facts, refusals, trained, evaluated, gradients = zip(*findings, strict=True)
    known = next((found for found in facts if found is not None), None)
    layer.facts = SiteFacts(*known) if known is not None else None
    layer.refusal = next((reason for reason in refusals if reason is not None), None)
    layer.fired = {True: any(trained), False: any(evaluated)}
    layer.gradient_seen = any(gradients)
