"""Runs told by hand: events as a real run would send them."""

from collections.abc import Iterator

from esper.leyline.base import Message
from esper.leyline.events import DecisionMade, EpochEvent, SeedTransitioned
from esper.leyline.reports import Cost, Counterfactual, FieldReport, SiteInfo
from esper.leyline.states import TARGET, Reason, SeedCommand, SeedState
from esper.nissa.chronicle import Chronicle

_C = SeedCommand
TO_THE_GATE = ((_C.GERMINATE, 0), (_C.LOAD, 0), (_C.TRAIN, 0), (_C.GRAFT, 0), (_C.STABILIZE, 10), (_C.EVALUATE, 20))
KEPT = (*TO_THE_GATE, (_C.FINE_TUNE, 20), (_C.FOSSILIZE, 30))
CULLED = (*TO_THE_GATE, (_C.CULL, 20))


def boundary(step: int, loss: float | None = 2.0, added: int = 0) -> EpochEvent:
    """The end of a validation."""
    return EpochEvent(
        run_id="r", epoch=0, step=step, train_loss=3.0, validation_loss=loss, metrics={"added_params": float(added)}
    )


def life(
    seed: str = "net.0#0.0",
    blueprint: str = "BP-MLP-GELU",
    path: tuple[tuple[SeedCommand, int], ...] = KEPT,
    *,
    born: int = 20,
    group: str = "",
    gain: float | None = 0.1,
    reason: Reason = Reason.GATE_PASSED,
) -> Iterator[Message]:
    """One adaptation: its transitions, and its report where its life ends."""
    state = SeedState.DORMANT
    for command, after in path:
        yield SeedTransitioned(
            run_id="r",
            epoch=0,
            step=born + after,
            seed_id=seed,
            blueprint_id=blueprint,
            source=state,
            target=TARGET[command],
            command=command,
            reason=reason,
            group=group,
        )
        state = TARGET[command]
    if state in (SeedState.FOSSILIZED, SeedState.CULLED):
        yield report(seed, blueprint, state, reason, gain, group)


def report(
    seed: str, blueprint: str, outcome: SeedState, reason: Reason, gain: float | None, group: str = ""
) -> FieldReport:
    """How a life ended."""
    effect = None if gain is None else Counterfactual(mean=gain, lower=gain - 0.02, upper=gain + 0.02, n=32)
    return FieldReport(
        run_id="r",
        blueprint_id=blueprint,
        seed_id=seed,
        site=SiteInfo(module_path="net.0", module_type="Linear", layout="bd", width=8, input_width=8, depth=0.0),
        outcome=outcome,
        reason=reason,
        cost=Cost(params=500, flops=1000),
        counterfactual=effect,
        group=group,
    )


def story(*, lives: int = 2, steps: int = 100) -> Chronicle:
    """A run with one kept graft, and `lives - 1` that lost against it."""
    chronicle = Chronicle(run_id="r", policy="heuristic", host_params=1000, price_per_kparam=0.01)
    for step in range(1, steps + 1):
        chronicle.curve.add(step, 2.0 + 3.0 / step)
    heard: list[Message] = [DecisionMade(run_id="r", epoch=0, step=20, policy="heuristic", explanation="a trial")]
    for number in range(lives):
        won = {"path": KEPT, "gain": 0.1, "reason": Reason.GATE_PASSED}
        lost = {"path": CULLED, "gain": -0.001, "reason": Reason.OUTCOMPETED}
        heard += life(f"blocks.{number}.ffn#0.0", group="trial-0", **(lost if number else won))  # type: ignore[arg-type]
    heard += [boundary(step, 2.0 + 1.0 / step, 500 if lives and step >= 20 else 0) for step in range(10, steps + 1, 10)]
    events = sorted((m for m in heard if not isinstance(m, FieldReport)), key=lambda m: m.step)  # type: ignore[attr-defined]
    for message in [*events, *(m for m in heard if isinstance(m, FieldReport))]:
        chronicle.hear(message)
    return chronicle
