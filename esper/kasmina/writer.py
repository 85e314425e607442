"""The one writer of seeds: applies commands at a boundary, in seed order, each with exactly one event."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from esper.kasmina.bank import SeedBank
from esper.kasmina.graft import Graft
from esper.kasmina.kernels import Kernel, KernelRequest, KernelStore
from esper.kasmina.record import SeedRecord
from esper.kasmina.strategies import STRATEGIES, make_strategy
from esper.leyline.commands import KasminaControlCommand
from esper.leyline.errors import BlueprintError, ConfigError, KernelError, SiteError
from esper.leyline.events import SeedTransitioned
from esper.leyline.ids import SeedId
from esper.leyline.states import Reason, SeedCommand, SeedState, next_state

_NO_EMBARGO = frozenset({Reason.OUTCOMPETED, Reason.USER_CANCELLED, Reason.RUN_ENDED, Reason.EMERGENCY})
_C = SeedCommand


class Moment(NamedTuple):
    """Where in a run something happens: the run, the epoch from 0, the optimizer steps done."""

    run_id: str
    epoch: int
    step: int


class SeedWriter:
    """Carries out commands on a bank.

    Args:
        bank: seeds of the model.
        store: where kernels come from.
        emit: called with the event of every transition.
    """

    def __init__(self, bank: SeedBank, store: KernelStore, emit: Callable[[SeedTransitioned], None]) -> None:
        """Remember the three."""
        self.bank, self.store, self.emit = bank, store, emit

    def apply(self, commands: Sequence[KasminaControlCommand], moment: Moment) -> list[SeedTransitioned]:
        """Apply commands in seed order and return their events.

        All are checked before anything changes: one that is not allowed refuses them all. A seed whose kernel is not
        ready, or cannot be had, leaves its further commands undone.

        Raises:
            IllegalTransition: the table forbids a command.
            NoSuchSeed: a command names a seed that does not exist.
            SiteError: a seed cannot germinate.
            ConfigError: a command names an unknown grafting strategy.
        """
        ordered = sorted(commands, key=_seed_order)
        self._check(ordered)
        events, stopped = [], set()
        try:
            for command in (c for c in ordered if c.target_seed_id not in stopped):
                event = self._apply(command, moment)
                if event is None or event.command is not command.command:
                    stopped.add(command.target_seed_id)
                events += [event] if event is not None else []
        finally:
            self.mirror(moment)
        return events

    def _check(self, commands: Sequence[KasminaControlCommand]) -> None:
        states: dict[SeedId, SeedState] = {}
        for command in commands:
            seed = SeedId.parse(command.target_seed_id)
            states[seed] = next_state(states.get(seed, self.bank.state(seed)), command.command)
            if command.command is _C.GERMINATE:
                self._check_germination(seed, command)

    def mirror(self, moment: Moment) -> None:
        """Copy what changed during the steps into the state arrays and seal them."""
        columns = self.bank.arrays.columns
        columns["alpha"].zero_()
        columns["kernel_hash"].zero_()
        for seed, graft in self.bank.grafted().items():
            columns["alpha"][self.bank.rows[seed]] = graft.strength
            columns["kernel_hash"][self.bank.rows[seed]] = short_hash(self.bank.records[seed].kernel_id)
        self.bank.arrays.seal()

    def _apply(self, command: KasminaControlCommand, moment: Moment) -> SeedTransitioned | None:
        seed = SeedId.parse(command.target_seed_id)
        try:
            if not self._act(seed, command):
                return None
        except (KernelError, BlueprintError) as error:
            failed = {"command": _C.CULL, "reason": Reason.KERNEL_LOAD_FAILED}
            return self._commit(seed, command.model_copy(update=failed), moment, str(error))
        return self._commit(seed, command, moment, "")

    def _commit(self, seed: SeedId, command: KasminaControlCommand, moment: Moment, detail: str) -> SeedTransitioned:
        source, record = self.bank.state(seed), self.bank.records[seed]
        target = next_state(source, command.command)
        row = self.bank.open(seed)
        record.enter(target, moment.epoch)
        if target is SeedState.CULLED:
            record.embargo = 0 if command.reason in _NO_EMBARGO else self.bank.config.embargo_steps
        self.bank.arrays.set_state(row, target)
        self.bank.arrays.columns["last_epoch"][row] = moment.epoch
        self.bank.arrays.columns["latency_ms"][row] = record.latency_ms
        event = SeedTransitioned(
            run_id=moment.run_id,
            epoch=moment.epoch,
            step=moment.step,
            seed_id=str(seed),
            kernel_artifact_id=record.kernel_id,
            blueprint_id=record.blueprint,
            source=source,
            target=target,
            command=command.command,
            reason=command.reason,
            detail=detail,
            group=record.group,
        )
        self.emit(event)
        if target is SeedState.DORMANT:
            del self.bank.records[seed]
        return event

    def _act(self, seed: SeedId, command: KasminaControlCommand) -> bool:
        """Do what the command means; False when it must wait."""
        verb = command.command
        if verb is _C.GERMINATE:
            self._germinate(seed, command)
        elif verb is _C.LOAD:
            self.store.prefetch(self.request(seed))
        elif verb in (_C.TRAIN, _C.GRAFT) and self.bank.state(seed) is SeedState.LOADING:
            return self._plant(seed, verb)
        elif verb in (_C.CULL, _C.CANCEL, _C.ROLL_BACK):
            self._remove(seed)
        else:
            self._restage(seed, verb)
        return True

    def _check_germination(self, seed: SeedId, command: KasminaControlCommand) -> None:
        strategy = command.grafting_strategy or self.bank.config.strategy
        if strategy not in STRATEGIES:
            raise ConfigError(f"unknown grafting strategy {strategy!r}; allowed: {', '.join(STRATEGIES)}.")
        if self.bank.site_shape(seed) is None:
            why = self.bank.layer(seed.layer).refusal or "its shape is unknown until a batch has passed through it"
            raise SiteError(f"{seed} cannot germinate: {why}.")

    def _germinate(self, seed: SeedId, command: KasminaControlCommand) -> None:
        self.bank.open(seed)
        self.bank.records[seed] = SeedRecord(
            seed_id=str(seed),
            blueprint=command.blueprint_id,
            ir={},
            reads=command.reads,
            dims=dict(command.dims),
            strategy=command.grafting_strategy or self.bank.config.strategy,
            init_seed=command.init_seed,
            group=command.group,
        )

    def request(self, seed: SeedId) -> KernelRequest:
        """Return the kernel request of a germinated seed."""
        record, site = self.bank.records[seed], self.bank.site_shape(seed)
        assert site is not None
        return KernelRequest(record.blueprint, site, record.reads, tuple(sorted(record.dims.items())))

    def kernel_ready(self, seed: SeedId) -> bool:
        """Return whether the store answers for a LOADING seed; a failure counts, it ends the waiting."""
        try:
            return self.store.poll(self.request(seed)) is not None
        except (KernelError, BlueprintError):
            return True

    def _plant(self, seed: SeedId, verb: SeedCommand) -> bool:
        kernel = self.store.poll(self.request(seed))
        if kernel is None:
            return False
        record = self.bank.records[seed]
        child = _make(kernel, record, self.bank.layer(seed.layer).health)
        record.ir = kernel.ir.model_dump(mode="json")
        record.reads, record.kernel_id = kernel.ir.reads, kernel.kernel_id
        record.params, record.macs = kernel.params, kernel.macs
        record.latency_ms, record.memory_mb = kernel.latency_ms, kernel.memory_mb
        site = self.bank.site_shape(seed)
        assert site is not None
        record.site = site._asdict()
        record.birth = self.bank.births
        self.bank.births += 1
        graft = self.bank.plant(seed, child, record)
        self._restage(seed, verb)
        if verb is _C.TRAIN:
            graft.objective = self.bank.config.training_objective
            self.bank.layer(seed.layer).refresh()
        return True

    def _restage(self, seed: SeedId, verb: SeedCommand) -> None:
        graft, config = self.bank.graft(seed), self.bank.config
        if graft is None:
            return
        frozen = {_C.STABILIZE: config.freeze_stabilization, _C.FOSSILIZE: config.freeze_fossils}
        if verb in (_C.GRAFT, _C.STABILIZE, _C.FINE_TUNE, _C.FOSSILIZE):
            trainable = bool(self.bank.records[seed].ir.get("trainable", True))
            graft.child.requires_grad_(trainable and not frozen.get(verb, False))
        if verb is _C.STABILIZE:
            graft.reference = None
        if verb is _C.GRAFT:
            self._begin_ramp(seed, graft)
        self.bank.layer(seed.layer).refresh()

    def _begin_ramp(self, seed: SeedId, graft: Graft) -> None:
        graft.objective, graft.pending = "graft", None
        strategy = make_strategy(self.bank.records[seed].strategy, self.bank.config.ramp_steps)
        if strategy.needs_drift:
            graft.remember_host(self.bank.layer(seed.layer).site)

    def _remove(self, seed: SeedId) -> None:
        graft, record = self.bank.graft(seed), self.bank.records[seed]
        if graft is None:
            return
        if graft.fault is not None:
            self.store.evict(record.kernel_id)
        self.bank.uproot(seed)


def short_hash(kernel_id: str) -> int:
    """Return a 63-bit hash of a kernel id; 0 for none."""
    return int.from_bytes(hashlib.sha256(kernel_id.encode()).digest()[:8], "big") >> 1 if kernel_id else 0


def _make(kernel: Kernel, record: SeedRecord, like: Tensor) -> nn.Module:
    try:
        return kernel.make(record.init_seed, like.device)
    except KernelError:
        raise
    except Exception as error:
        raise KernelError(f"{kernel.kernel_id} cannot be instantiated: {error}") from error


def _seed_order(command: KasminaControlCommand) -> SeedId:
    return SeedId.parse(command.target_seed_id)
