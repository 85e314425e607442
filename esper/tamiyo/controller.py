"""The controller: policy and gates over a wrapped model, without Lightning."""

from collections.abc import Callable, Sequence
from typing import Any

from esper.blueprints import load_library
from esper.kasmina.kernels import KernelRequest, KernelStore
from esper.kasmina.library_store import LibraryKernelStore
from esper.kasmina.wrapper import MorphableModel
from esper.kasmina.writer import Moment, SeedWriter
from esper.leyline.base import Message
from esper.leyline.codec import from_json, to_json
from esper.leyline.commands import AdaptationSignal, KasminaControlCommand
from esper.leyline.events import DecisionMade, Fault, GraftFaulted, SeedTransitioned
from esper.leyline.ids import SeedId, new_id
from esper.leyline.packets import SystemStatePacket
from esper.leyline.reports import FINAL, Cost, Counterfactual, FieldReport
from esper.leyline.states import IN_PROGRESS, Reason, SeedState
from esper.tamiyo import by_hand, gate, observe
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.contracts import Decision, Observation
from esper.tamiyo.experience import Experience
from esper.tamiyo.menu import Menu, Offer
from esper.tamiyo.policies import make_policy
from esper.tamiyo.price import price
from esper.tamiyo.work import Work

EvidenceSource = Callable[[Sequence[str]], dict[str, Counterfactual]]
"""Measures seeds by id, on the decision part, with each on and off."""

_MAX_ROUNDS = 12


class TamiyoController:
    """Decides at boundaries what grows and what stays.

    One step runs rounds of observe, decide and apply until nothing more is to be done, so that a seed whose stages
    take no time passes several of them at one boundary; each transition is its own event.

    Args:
        morphable: the wrapped model.
        config: `TamiyoConfig`, a dict of its keys, or None.
        store: where kernels come from; None builds them from the shipped library on a background thread.
        evidence: measures seeds on the decision part; without it nothing is ever judged.
        total_steps: length of the run in training steps, for settings that are fractions of it.

    Example:
        >>> import torch
        >>> from esper.kasmina.wrapper import wrap
        >>> from esper.kasmina.writer import Moment
        >>> controller = TamiyoController(wrap(torch.nn.Sequential(torch.nn.Linear(2, 2))), {"policy": "off"})
        >>> signal, commands = controller.step(controller.observe(Moment("run", 0, 10)))
        >>> signal.optimizer_rebuild_required, commands
        (False, [])
        >>> controller.close()
    """

    def __init__(
        self,
        morphable: MorphableModel,
        config: TamiyoConfig | dict[str, Any] | None = None,
        *,
        store: KernelStore | None = None,
        evidence: EvidenceSource | None = None,
        total_steps: int = 1000,
    ) -> None:
        """Build the menu, the policy and the writer."""
        self.morphable, self.bank = morphable, morphable.bank
        self.config = TamiyoConfig.of(config)
        self.menu = Menu(load_library(), self.config.menu)
        self.policy = make_policy(self.config, self.menu)
        self.store = store if store is not None else LibraryKernelStore()
        self.writer = SeedWriter(self.bank, self.store, self._emit)
        self.evidence, self.total_steps = evidence, total_steps
        self.agree: Callable[[Decision], Decision] = lambda decision: decision
        self.host_params = morphable.host_parameters()
        self.run_id = new_id()
        self.work = Work()
        self.experience = Experience.read(self.config.experience) if self.config.experience else Experience()
        self.paused = False
        self.calm_until = 0
        self.reports: list[FieldReport] = []
        self.losses: list[float] = []
        self.explanations: list[str] = []
        self.listeners: list[Callable[[Message], None]] = []
        self._packet: SystemStatePacket | None = None
        self._rollback_request: str | None = None

    def use_store(self, store: KernelStore) -> None:
        """Take kernels from another store from now on."""
        self.store = self.writer.store = store

    def pause(self) -> None:
        """Begin nothing new; what is under way goes on."""
        self.paused = True

    def resume(self) -> None:
        """Allow germination again."""
        self.paused = False

    def request_rollback(self, reason: str) -> None:
        """Ask that the run go back to its last good snapshot; a fit does so at the end of the batch.

        Args:
            reason: one sentence for people.
        """
        self._rollback_request = reason

    def take_rollback_request(self) -> str | None:
        """Return the reason of a rollback that was asked for, once; None if none was."""
        reason, self._rollback_request = self._rollback_request, None
        return reason

    def step(
        self, packet: SystemStatePacket, *, final: bool = False
    ) -> tuple[AdaptationSignal, list[KasminaControlCommand]]:
        """Decide and apply everything that is due at a boundary.

        Args:
            packet: state of the system; its numbers come from the training and decision parts only.
            final: whether the run ends here: what can be judged is judged, the rest is removed.

        Returns:
            What Tolaria must do, and the commands that were applied; none when it must go back.

        Raises:
            StateCorruption: the seeds' state changed outside the life cycle.
        """
        self.bank.arrays.verify()
        if packet.validation_loss is not None:
            self.losses.append(packet.validation_loss)
        reason = None if final else self.take_rollback_request() or self._alarm()
        if reason:
            return AdaptationSignal(emergency_rollback_required=True, reason=reason), []
        self._packet, applied = packet, []
        moment = Moment(packet.run_id, packet.current_epoch, packet.global_step)
        self._report_faults(moment)
        self.writer.mirror(moment)
        before = set(self.bank.grafted())
        for _ in range(_MAX_ROUNDS):
            commands = self._round(moment, final)
            applied += commands
            if not commands:
                break
        self._foresee(final)
        changed = set(self.bank.grafted()) != before
        return AdaptationSignal(optimizer_rebuild_required=changed), applied

    def _alarm(self) -> str:
        """Return why the run must go back, as far as the decision losses tell; empty if it need not."""
        living = self.bank.grafted()
        working = [s for s, graft in living.items() if graft.strength > 0 and self.bank.state(s) in IN_PROGRESS]
        before = [self.bank.records[seed].pre_metric for seed in working]
        return gate.alarm(self.losses, before, self.config.rollback)

    def observe(self, moment: Moment, **numbers: Any) -> SystemStatePacket:
        """Return the packet of a boundary; `numbers` are those of `esper.tamiyo.observe.packet`."""
        return observe.packet(self.bank, self.writer, moment, last_decisions=self.explanations[-5:], **numbers)

    def _round(self, moment: Moment, final: bool) -> list[KasminaControlCommand]:
        decision = by_hand.cancel(self.morphable)
        if not decision.explanation:
            observation = self._observe(final)
            decision = gate.advance(observation, self.config)
            if not decision.commands:
                decision = self._germination(observation)
        decision = self.agree(decision)
        if decision.explanation or decision.commands:
            self._explain(decision, moment)
        events = self.writer.apply(decision.commands, moment)
        return [c for c in decision.commands if any(e.seed_id == c.target_seed_id for e in events)]

    def _germination(self, observation: Observation) -> Decision:
        asked = by_hand.germination(self.morphable, observation, self.config, self.menu)
        if asked.explanation:
            return asked
        if observation.paused or observation.final or observation.busy:
            return Decision()
        return self.policy.propose(observation)

    def _observe(self, final: bool) -> Observation:
        assert self._packet is not None
        observation = Observation(
            packet=self._packet,
            seeds=observe.statuses(self.bank, self.writer, final=final),
            sites=observe.sites(self.bank),
            reports=tuple(self.reports),
            total_steps=self.total_steps,
            host_params=self.host_params,
            losses=tuple(self.losses),
            work=self.work,
            experience=self.experience,
            paused=self.paused or self._packet.global_step < self.calm_until,
            final=final,
        )
        wanted = [s.seed_id for s in gate.to_judge(observation) if s.seed_id not in self._packet.evidence]
        if not wanted or self.evidence is None:
            return observation
        found = self._packet.evidence | self.evidence(wanted)
        for name in wanted:
            self._remember(name, found.get(name))
        self._packet = self._packet.model_copy(update={"evidence": found})
        return observation._replace(packet=self._packet)

    def _remember(self, name: str, found: Counterfactual | None) -> None:
        if found is not None:
            record = self.bank.records[SeedId.parse(name)]
            record.evidence = [found.mean, found.lower, found.upper, float(found.n)]

    def _foresee(self, final: bool) -> None:
        if final or self.paused or self._packet is None:
            return
        for offer in self.policy.foresee(self._observe(final)):
            self.store.prefetch(_request(offer))

    def prepare(self, moment: Moment) -> None:
        """Start the kernels that the policy will need first; call it once the sites are known."""
        self._packet = SystemStatePacket(run_id=moment.run_id, current_epoch=moment.epoch, global_step=moment.step)
        self._foresee(final=False)

    def refetch(self) -> None:
        """Ask again for the kernels of seeds: a resumed run starts with an empty store."""
        for seed, graft in self.bank.grafted().items():
            graft.child = self.store.reclaim(self.bank.records[seed].kernel_id, graft.child)
        for seed, record in self.bank.records.items():
            if record.state in (SeedState.GERMINATED.value, SeedState.LOADING.value):
                self.store.prefetch(self.writer.request(seed))

    def _report_faults(self, moment: Moment) -> None:
        for seed, graft in self.bank.grafted().items():
            if graft.fault is not None and not graft.fault_reported:
                graft.fault_reported = True
                record = self.bank.records[seed]
                self.tell(
                    GraftFaulted(
                        run_id=moment.run_id,
                        epoch=moment.epoch,
                        step=moment.step,
                        seed_id=str(seed),
                        kernel_artifact_id=record.kernel_id,
                        blueprint_id=record.blueprint,
                        fault=Fault(graft.fault_kind),
                        detail=graft.fault,
                    )
                )

    def _explain(self, decision: Decision, moment: Moment) -> None:
        said = decision.explanation in self.explanations[-1:] and not decision.commands
        if decision.explanation and not said:
            self.explanations.append(decision.explanation)
            ids = tuple(c.command_id for c in decision.commands)
            self.tell(
                DecisionMade(
                    run_id=moment.run_id,
                    epoch=moment.epoch,
                    step=moment.step,
                    policy=self.config.policy,
                    commands=ids,
                    explanation=decision.explanation,
                    candidates=decision.candidates,
                )
            )

    def _emit(self, event: SeedTransitioned) -> None:
        record = self.bank.records[SeedId.parse(event.seed_id)]
        if event.target is SeedState.GERMINATED and self._packet is not None:
            record.pre_metric = self._packet.validation_loss
        self.tell(event)
        if event.target in FINAL:
            report = self._field_report(event)
            self.reports.append(report)
            self.tell(report)
            self.store.report(report)

    def _field_report(self, event: SeedTransitioned) -> FieldReport:
        record = self.bank.records[SeedId.parse(event.seed_id)]
        found = record.evidence
        return FieldReport(
            run_id=event.run_id,
            blueprint_id=record.blueprint,
            kernel_artifact_id=record.kernel_id,
            seed_id=event.seed_id,
            site=observe.site_info(self.bank, SeedId.parse(event.seed_id).layer),
            pre_metric=record.pre_metric,
            post_metric=self._packet.validation_loss if self._packet else None,
            counterfactual=Counterfactual(mean=found[0], lower=found[1], upper=found[2], n=int(found[3]))
            if found
            else None,
            outcome=event.target,
            reason=event.reason,
            cost=Cost(params=record.params, flops=2 * record.macs, latency_ms=record.latency_ms or None),
            eval_metrics={"price": price(record, self.config)},
            stage_epochs={SeedState(s): n for s, n in record.stage_epochs.items()},
            stage_steps={SeedState(s): n for s, n in record.stage_steps.items()},
            grafting_strategy=record.strategy,
            dims=record.dims,
            group=record.group,
            site_kind=record.site.get("kind", ""),
        )

    def summary(self) -> str:
        """Return in one sentence what growth came to so far."""
        kept = [r for r in self.reports if r.outcome is SeedState.FOSSILIZED]
        if not kept:
            return f"kept none of {len(self.reports)} adaptations tried; the model is as it was."
        names = ", ".join(f"{r.blueprint_id} at {r.seed_id}" for r in kept)
        added = f"{self.bank.added_parameters():,} parameters"
        return f"kept {len(kept)} of {len(self.reports)} adaptations tried ({names}), {added} more."

    def tell(self, message: Message) -> None:
        """Pass a message to every listener."""
        for listener in self.listeners:
            listener(message)

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's own state as plain data."""
        return {
            "run_id": self.run_id,
            "paused": self.paused,
            "calm_until": self.calm_until,
            "losses": list(self.losses),
            "explanations": list(self.explanations),
            "reports": [to_json(report) for report in self.reports],
            "experience": self.experience.plain(),
            "store": self.store.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.run_id, self.paused, self.calm_until = state["run_id"], state["paused"], state.get("calm_until", 0)
        self.losses, self.explanations = list(state["losses"]), list(state["explanations"])
        self.reports = [from_json(FieldReport, text) for text in state["reports"]]
        self.experience = Experience.from_plain(state.get("experience", ()))
        self.store.restore(state.get("store", {}))

    def memory(self) -> dict[str, Any]:
        """Return what a rollback takes back: all that was learned from the run."""
        return {
            "losses": list(self.losses),
            "explanations": list(self.explanations),
            "reports": list(self.reports),
            "packet": self._packet,
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """Take back what `memory` returned; reports of what emergencies ended are never forgotten."""
        kept = [r for r in self.reports if r.reason is Reason.EMERGENCY and r not in memory["reports"]]
        self.losses, self.explanations = list(memory["losses"]), list(memory["explanations"])
        self.reports, self._packet = [*memory["reports"], *kept], memory["packet"]

    def close(self) -> None:
        """Stop the kernel store."""
        self.store.close()


def _request(offer: Offer) -> KernelRequest:
    dims = tuple(sorted(offer.dims.items()))
    return KernelRequest(offer.blueprint, offer.site.shape, offer.reads, dims)
