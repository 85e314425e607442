"""The gates: move seeds that are ready, and keep a graft only when held-out evidence says so. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from esper.leyline.commands import SPREAD, KasminaControlCommand
from esper.leyline.events import Candidate
from esper.leyline.ids import SeedId
from esper.leyline.reports import Counterfactual
from esper.leyline.states import IN_PROGRESS, Reason, SeedCommand, SeedState
from esper.tamiyo.config import RollbackConfig, TamiyoConfig
from esper.tamiyo.contracts import Decision, Observation, SeedStatus
from esper.tamiyo.price import UNITS, price, size

_S, _C = SeedState, SeedCommand
_NEXT = MappingProxyType(
    {
        _S.GERMINATED: (_C.LOAD, Reason.SLOT_FREE),
        _S.LOADING: (_C.TRAIN, Reason.KERNEL_READY),
        _S.TRAINING: (_C.GRAFT, Reason.STAGE_COMPLETE),
        _S.GRAFTING: (_C.STABILIZE, Reason.RAMP_COMPLETE),
        _S.STABILIZATION: (_C.EVALUATE, Reason.STAGE_COMPLETE),
        _S.CULLED: (_C.RELEASE, Reason.EMBARGO_OVER),
        _S.CANCELLED: (_C.RELEASE, Reason.EMBARGO_OVER),
    }
)


def advance(observation: Observation, config: TamiyoConfig) -> Decision:
    """Return what follows from the seeds' own progress: the next stage, a judgement, or the end."""
    commands: list[KasminaControlCommand] = []
    for seed in observation.seeds:
        step = _step(seed, observation.final)
        if step is not None:
            commands.append(command_for(seed.seed_id, *step))
    judged = judge(observation, config)
    if observation.final and not commands and not judged.commands:
        unjudged = [s for s in observation.seeds if s.state in (_S.EVALUATING, _S.FINE_TUNING)]
        commands = [command_for(s.seed_id, _C.CULL, Reason.RUN_ENDED) for s in unjudged]
    return Decision((*commands, *judged.commands), judged.explanation, judged.candidates)


def _step(seed: SeedStatus, final: bool) -> tuple[SeedCommand, Reason] | None:
    if seed.fault and seed.state in IN_PROGRESS:
        return _out(seed), Reason.RUNTIME_ERROR
    if seed.ready and seed.state in _NEXT and (final or not _waits(seed)):
        verb, reason = _NEXT[seed.state]
        fixed = seed.state is _S.LOADING and not seed.trainable
        return (_C.GRAFT if fixed else verb), reason
    if final and seed.state in _BEFORE_EVALUATION:
        return _out(seed), Reason.RUN_ENDED
    return None


def _waits(seed: SeedStatus) -> bool:
    """Return whether a child is judged at the end of the run: what width buys shows in no trial's few steps."""
    return seed.state is _S.STABILIZATION and seed.group.startswith(SPREAD)


def _out(seed: SeedStatus) -> SeedCommand:
    """Return the verb that ends an adaptation; the table lets STABILIZATION out through EVALUATING only."""
    return {_S.GERMINATED: _C.CANCEL, _S.STABILIZATION: _C.EVALUATE}.get(seed.state, _C.CULL)


def alarm(losses: Sequence[float], before: Sequence[float | None], config: RollbackConfig) -> str:
    """Return why the run must go back, or an empty text.

    With a child in effect, the decision loss is worse than at the first boundary, and above `1 + worsening` times what
    it was before that child: what the run had learned is lost.

    Args:
        losses: decision losses at the boundaries, oldest first.
        before: for each child in effect, the decision loss when it germinated.
        config: how much worse is too much.
    """
    known = [loss for loss in before if loss is not None]
    if config.worsening is None or not config.window or not known or len(losses) < 2:
        return ""
    limit = max(losses[0], max(known) + config.worsening * abs(max(known)))
    if not losses[-1] > limit:
        return ""
    return f"the decision loss is {losses[-1]:.4f} with a child in effect, and was {max(known):.4f} before it"


def to_judge(observation: Observation) -> list[SeedStatus]:
    """Return the seeds whose evidence is due: EVALUATING, and no member of their trial is still on its way."""
    waiting = {s.group for s in observation.seeds if s.group and s.state in _BEFORE_EVALUATION}
    return [
        s
        for s in observation.seeds
        if not s.fault
        and ((s.state is _S.EVALUATING and s.group not in waiting) or (s.state is _S.FINE_TUNING and s.ready))
    ]


_BEFORE_EVALUATION = IN_PROGRESS - {_S.EVALUATING, _S.FINE_TUNING}


def judge(observation: Observation, config: TamiyoConfig) -> Decision:
    """Judge every seed whose evidence is in; a trial keeps one winner at most, what was spread stays or goes as one."""
    evidence = observation.packet.evidence
    due = [seed for seed in to_judge(observation) if seed.seed_id in evidence]
    groups: dict[str, list[SeedStatus]] = defaultdict(list)
    for seed in due:
        groups[seed.group if seed.state is _S.EVALUATING or seed.group.startswith(SPREAD) else ""].append(seed)
    decisions = [_judge_alone(s, evidence[s.seed_id], config) for s in groups.pop("", [])]
    for name, members in groups.items():
        judged = _judge_spread if name.startswith(SPREAD) else _judge_trial
        decisions.append(judged(name, members, evidence, config))
    return merge(decisions)


def _judge_alone(seed: SeedStatus, found: Counterfactual, config: TamiyoConfig) -> Decision:
    needed = price(seed, config)
    passed = found.lower > needed
    verdict = "kept" if passed else "removed"
    why = (
        f"{seed.blueprint} at {seed.seed_id} {verdict}: it lowers the decision loss by {found.mean:.4f} "
        f"(at least {found.lower:.4f}, n={found.n}); {needed:.4f} was needed"
    )
    candidate = Candidate(
        seed_id=seed.seed_id, blueprint_id=seed.blueprint, score=found.lower, chosen=passed, why=verdict
    )
    return Decision((_verdict(seed, passed, Reason.GATE_FAILED),), why, (candidate,))


def _judge_trial(
    group: str, members: list[SeedStatus], evidence: Mapping[str, Counterfactual], config: TamiyoConfig
) -> Decision:
    scores = {s.seed_id: evidence[s.seed_id].lower / size(s, config) for s in members}
    passing = [s for s in members if evidence[s.seed_id].lower > price(s, config)]
    winner = max(passing, key=lambda s: scores[s.seed_id], default=None)
    commands, candidates = [], []
    for seed in members:
        won, found = seed is winner, evidence[seed.seed_id]
        lost = Reason.OUTCOMPETED if winner is not None else Reason.GATE_FAILED
        commands.append(_verdict(seed, won, lost))
        why = f"gain {found.mean:.4f}, at least {found.lower:.4f}, {seed.params:,} parameters"
        candidates.append(
            Candidate(
                seed_id=seed.seed_id, blueprint_id=seed.blueprint, score=scores[seed.seed_id], chosen=won, why=why
            )
        )
    named = "nothing earned its price" if winner is None else f"{winner.blueprint} at {winner.seed_id} wins"
    ranking = sorted(candidates, key=lambda c: -c.score)
    listed = ", ".join(f"{c.blueprint_id} {c.score:.4f}" for c in ranking)
    why = f"trial {group}: {named}; gain per {UNITS[config.rank_by]}: {listed}"
    return Decision(tuple(commands), why, tuple(candidates))


def _judge_spread(
    group: str, members: list[SeedStatus], evidence: Mapping[str, Counterfactual], config: TamiyoConfig
) -> Decision:
    """Keep all or none; the evidence of each is that of all of them."""
    found, needed = evidence[members[0].seed_id], sum(price(s, config) for s in members)
    passed = found.lower > needed
    verdict = "kept" if passed else "removed"
    why = (
        f"{group}, {members[0].blueprint} over {len(members)} blocks, {verdict}: without all of it the decision loss "
        f"rises by {found.mean:.4f} (at least {found.lower:.4f}, n={found.n}); {needed:.4f} was needed"
    )
    candidates = tuple(
        Candidate(seed_id=s.seed_id, blueprint_id=s.blueprint, score=found.lower, chosen=passed, why=verdict)
        for s in members
    )
    return Decision(tuple(_verdict(s, passed, Reason.GATE_FAILED) for s in members), why, candidates)


def _verdict(seed: SeedStatus, passed: bool, lost: Reason) -> KasminaControlCommand:
    if not passed:
        return command_for(seed.seed_id, _C.CULL, lost)
    to_fine_tuning = seed.state is _S.EVALUATING and seed.trainable
    return command_for(seed.seed_id, _C.FINE_TUNE if to_fine_tuning else _C.FOSSILIZE, Reason.GATE_PASSED)


def command_for(seed_id: str, verb: SeedCommand, reason: Reason) -> KasminaControlCommand:
    """Return a command that needs no blueprint."""
    layer = SeedId.parse(seed_id).layer
    return KasminaControlCommand(command=verb, target_layer_id=layer, target_seed_id=seed_id, reason=reason)


def merge(decisions: Iterable[Decision]) -> Decision:
    """Return several decisions as one."""
    parts = list(decisions)
    return Decision(
        tuple(c for d in parts for c in d.commands),
        "; ".join(d.explanation for d in parts if d.explanation),
        tuple(_candidates(parts)),
    )


def _candidates(parts: list[Decision]) -> Iterator[Candidate]:
    for decision in parts:
        yield from decision.candidates
