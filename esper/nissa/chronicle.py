"""Everything that a run told about its growth, in order; pure data, no trainer."""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeVar

from esper.leyline.base import Message
from esper.leyline.codec import REGISTRY, from_json, to_json
from esper.leyline.events import DecisionMade, EpochEvent, RunEvent, SeedTransitioned
from esper.leyline.reports import FINAL, FieldReport
from esper.leyline.states import SeedCommand, SeedState
from esper.nissa.curve import LossCurve
from esper.nissa.ramps import Ramps

ADDED_PARAMS = "added_params"
"""Metric of an `EpochEvent`: parameters that growth had added by then."""

_M = TypeVar("_M", bound=Message)


class Stage(NamedTuple):
    """One stage of a life; `end` is None while it lasts. Both are in training steps."""

    state: SeedState
    start: int
    end: int | None = None


class Life(NamedTuple):
    """One adaptation, from its germination to its end.

    Args:
        seed_id: `layer#chunk.slot`.
        blueprint: what grew.
        group: trial that it belonged to, or empty.
        stages: where it was when; the last one is its final state once the life has ended.
        report: how it ended; None while it goes on.
    """

    seed_id: str
    blueprint: str
    group: str
    stages: tuple[Stage, ...]
    report: FieldReport | None = None

    @property
    def outcome(self) -> SeedState | None:
        """The final state, or None while the life goes on."""
        return self.stages[-1].state if self.stages[-1].state in FINAL else None

    @property
    def kept(self) -> bool:
        """Whether it became part of the network."""
        return self.outcome is SeedState.FOSSILIZED


@dataclass
class Chronicle:
    """What was heard of one run.

    Args:
        run_id: the run.
        policy: name of its policy.
        host_params: parameters before growth.
        price_per_kparam: gain that every thousand added parameters had to pay for, in the unit of the loss.
        curve: training loss.
        ramps: alpha of every child.
        messages: events and field reports, in order.

    Example:
        >>> chronicle = Chronicle(run_id="r")
        >>> chronicle.hear(EpochEvent(run_id="r", epoch=0, step=10, validation_loss=2.0, metrics={"added_params": 5}))
        >>> chronicle.decision_losses, chronicle.added_params
        ([(10, 2.0)], 5)
    """

    run_id: str = ""
    policy: str = ""
    host_params: int = 0
    price_per_kparam: float = 0.0
    curve: LossCurve = field(default_factory=LossCurve)
    ramps: Ramps = field(default_factory=Ramps)
    messages: list[Message] = field(default_factory=list)
    _states: dict[str, SeedState] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Remember where each seed stands."""
        self._states = {event.seed_id: event.target for event in self.of(SeedTransitioned)}

    def hear(self, message: Message) -> None:
        """Take in one message.

        A message from the past means that the run was resumed from before it: what came after is forgotten. A
        transition that does not follow takes that seed's last ones back.
        """
        if isinstance(message, RunEvent) and message.step < self.last_step:
            step = message.step
            self.messages = [m for m in self.messages if not (isinstance(m, RunEvent) and m.step >= step)]
            self.__post_init__()
        if isinstance(message, SeedTransitioned):
            if self._states.get(message.seed_id, message.source) is not message.source:
                self._take_back(message)
            self._states[message.seed_id] = message.target
        self.messages.append(message)

    def _take_back(self, event: SeedTransitioned) -> None:
        """Forget the last transitions of a seed until the new one follows."""
        for place in range(len(self.messages) - 1, -1, -1):
            told = self.messages[place]
            if isinstance(told, SeedTransitioned) and told.seed_id == event.seed_id:
                if told.target is event.source:
                    return
                del self.messages[place]

    def of(self, kind: type[_M]) -> list[_M]:
        """Return the messages of one kind, in order."""
        return [m for m in self.messages if isinstance(m, kind)]

    @property
    def search_share(self) -> float | None:
        """Work of the search (children on trial, and judging them) as a share of all other; None if not counted."""
        told = next((e.metrics for e in reversed(self.of(EpochEvent)) if "macs" in e.metrics), None)
        return told["search_macs"] / max(1.0, told["macs"] - told["search_macs"]) if told is not None else None

    @property
    def last_step(self) -> int:
        """Step of the last event."""
        return next((m.step for m in reversed(self.messages) if isinstance(m, RunEvent)), 0)

    @property
    def steps(self) -> int:
        """Training steps that are known to be done."""
        return max([self.last_step, *(step for step, _ in self.curve.points[-1:])])

    @property
    def decision_losses(self) -> list[tuple[int, float]]:
        """Loss on the decision part at each boundary where it was measured."""
        return _curve((e.step, e.validation_loss) for e in self.of(EpochEvent))

    @property
    def train_losses(self) -> list[tuple[int, float]]:
        """Training loss; one point a boundary where the single steps are not known."""
        return self.curve.points or _curve((e.step, e.train_loss) for e in self.of(EpochEvent))

    @property
    def added_params_over_time(self) -> list[tuple[int, int]]:
        """Parameters that growth had added, after each boundary."""
        return [
            (step, int(n)) for step, n in _curve((e.step, e.metrics.get(ADDED_PARAMS)) for e in self.of(EpochEvent))
        ]

    @property
    def kept_params_over_time(self) -> list[tuple[int, int]]:
        """Parameters of what had been kept, after each adaptation that was."""
        ends = sorted((x.stages[-1].start, x.report.cost.params) for x in self.lives() if x.kept and x.report)
        return [(step, sum(n for _, n in ends[: i + 1])) for i, (step, _) in enumerate(ends)]

    @property
    def added_params(self) -> int:
        """Parameters that growth had added by the last boundary."""
        return next((n for _, n in reversed(self.added_params_over_time)), 0)

    @property
    def explanations(self) -> list[tuple[int, str]]:
        """What the policy said, and when."""
        return [(d.step, d.explanation) for d in self.of(DecisionMade) if d.explanation]

    def lives(self) -> list[Life]:
        """Return every adaptation, in order of germination."""
        reports: dict[tuple[str, SeedState], deque[FieldReport]] = defaultdict(deque)
        for report in self.of(FieldReport):
            reports[report.seed_id, report.outcome].append(report)
        found = []
        for path in self._paths():
            waiting = reports[path[0].seed_id, path[-1].target]
            found.append(_life(path, waiting.popleft() if waiting else None))
        return found

    def _paths(self) -> list[list[SeedTransitioned]]:
        """Cut the transitions into lives."""
        paths: list[list[SeedTransitioned]] = []
        current: dict[str, list[SeedTransitioned]] = {}
        for event in self.of(SeedTransitioned):
            if event.command is SeedCommand.GERMINATE:
                paths.append([])
                current[event.seed_id] = paths[-1]
            if event.command is not SeedCommand.RELEASE and event.seed_id in current:
                current[event.seed_id].append(event)
        return paths

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {
            "run_id": self.run_id,
            "policy": self.policy,
            "host_params": self.host_params,
            "price_per_kparam": self.price_per_kparam,
            "curve": self.curve.to_plain(),
            "ramps": self.ramps.to_plain(),
            "messages": [to_json(message) for message in self.messages],
        }

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Self:
        """Take back what `to_plain` returned."""
        read = {"curve": LossCurve.from_plain(data["curve"]), "ramps": Ramps.from_plain(data.get("ramps", {}))}
        return cls(**data | read | {"messages": [from_json(REGISTRY, text) for text in data["messages"]]})


def _curve(points: Any) -> list[tuple[int, float]]:
    """Keep one point a step, the last one told, and drop what was not measured."""
    return list({step: value for step, value in points if value is not None}.items())


def _life(path: list[SeedTransitioned], report: FieldReport | None) -> Life:
    ends = [event.step for event in path[1:]] + [None]
    stages = tuple(Stage(event.target, event.step, end) for event, end in zip(path, ends, strict=True))
    first = path[0]
    return Life(first.seed_id, first.blueprint_id, first.group, stages, report)
