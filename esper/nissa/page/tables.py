"""What a page tells in words and tables: decisions, prices, lineage, kernels, events, runs beside each other."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from esper.blueprints import load_library
from esper.leyline.events import Candidate, DecisionMade, EpochEvent, RunEvent, SeedTransitioned
from esper.leyline.states import SeedCommand, SeedState
from esper.nissa.chronicle import Chronicle, Life
from esper.nissa.page.events import system_events, words
from esper.nissa.page.forge import Risk
from esper.nissa.page.runs import Run
from esper.nissa.page.svg import Table
from esper.nissa.summary import GraftLine, graft_lines, number

MOST_FORGE_EVENTS = 60
"""Most events of the forge that a page tells."""


class Decision(NamedTuple):
    """A decision of the policy.

    Args:
        step: when.
        explanation: why, in the policy's words.
        candidates: what it weighed, with the measurement behind it; None if it weighed nothing.
        followed: what became of it at once, in words.
    """

    step: str
    explanation: str
    candidates: Table | None
    followed: tuple[str, ...]


class Fossil(NamedTuple):
    """Something that was kept, in the lineage tree."""

    blueprint: str
    seed_id: str
    facts: tuple[str, ...]


class Branch(NamedTuple):
    """A layer of the host, and what was kept in it."""

    layer: str
    fossils: tuple[Fossil, ...]


# --- decisions ------------------------------------------------------------------------------------------------------


def decisions(chronicle: Chronicle) -> list[Decision]:
    """Return every decision, with what it weighed and what followed."""
    told = list(zip(chronicle.lives(), graft_lines(chronicle), strict=True))
    return [
        Decision(f"{d.step:,}", d.explanation or "No explanation.", _weighed(d, told), tuple(_moves(moves)))
        for d, moves in _with_moves(chronicle)
        if d.explanation or d.candidates or moves
    ]


def _with_moves(chronicle: Chronicle) -> list[tuple[DecisionMade, list[SeedTransitioned]]]:
    """Return each decision with the transitions between it and the next event of another kind."""
    found: list[tuple[DecisionMade, list[SeedTransitioned]]] = []
    following = False
    for event in chronicle.of(RunEvent):
        if isinstance(event, DecisionMade):
            found.append((event, []))
        elif isinstance(event, SeedTransitioned) and following and event.step == found[-1][0].step:
            found[-1][1].append(event)
            continue
        following = isinstance(event, DecisionMade)
    return found


def _moves(moves: Sequence[SeedTransitioned]) -> Iterator[str]:
    """Yield what each seed came to, all its stages in one line; that a place is free again is no news."""
    for seed in dict.fromkeys(move.seed_id for move in moves if move.command is not SeedCommand.RELEASE):
        path = [move for move in moves if move.seed_id == seed and move.command is not SeedCommand.RELEASE]
        stages = " → ".join(words(move.target) for move in path)
        yield f"{path[0].blueprint_id} at {seed}: {stages} ({words(path[0].reason)})"


def _weighed(decision: DecisionMade, told: Sequence[tuple[Life, GraftLine]]) -> Table | None:
    if not decision.candidates:
        return None
    rows = [_candidate(candidate, decision.step, told) for candidate in decision.candidates]
    return Table(("seed", "blueprint", "chosen", "score", "gain", "at least", "needed", "samples", "why"), rows)


def _candidate(candidate: Candidate, step: int, told: Sequence[tuple[Life, GraftLine]]) -> tuple[str, ...]:
    head = candidate.seed_id, candidate.blueprint_id, "yes" if candidate.chosen else "no", number(candidate.score)
    line = _judged(candidate.seed_id, step, told)
    if line is None or line.gain is None or line.lower is None:
        return *head, "–", "–", "–", "–", candidate.why
    return *head, number(line.gain), number(line.lower), number(line.price), f"{line.samples:,}", candidate.why


def _judged(seed: str, step: int, told: Sequence[tuple[Life, GraftLine]]) -> GraftLine | None:
    """Return the life that a seed led at a step, if it had been evaluated by then."""
    for life, line in told:
        judged = next((stage.start for stage in life.stages if stage.state is SeedState.EVALUATING), math.inf)
        # A seed may end and germinate again at one step; what was judged there is the life that ended.
        if life.seed_id == seed and judged <= step <= life.stages[-1].start:
            return line
    return None


# --- prices and kernels ---------------------------------------------------------------------------------------------


def account(run: Run) -> Table:
    """Return what the run paid: parameters, price and work."""
    chronicle = run.chronicle
    host, added, price = chronicle.host_params, chronicle.added_params, chronicle.price_per_kparam
    rows = [
        ("parameters of the host", f"{host:,}" if host else "not recorded"),
        ("parameters that growth added", f"{added:,}" + (f" (+{100 * added / host:.1f} %)" if host else "")),
        ("adaptations tried", f"{len(chronicle.lives()):,}"),
        ("adaptations kept", f"{sum(life.kept for life in chronicle.lives()):,}"),
        ("price of 1,000 parameters, in loss", number(price) if price else "none, or not recorded"),
        ("work of the training", work(chronicle)),
        ("work of the search, as a share of the other work", share(chronicle)),
    ]
    return Table(("account", "amount"), rows)


def work(chronicle: Chronicle) -> str:
    """Return the multiply-accumulates of a run in words."""
    macs = next((e.metrics["macs"] for e in reversed(chronicle.of(EpochEvent)) if "macs" in e.metrics), None)
    return "not counted" if macs is None else f"{macs:.2e} multiply-accumulates"


def share(chronicle: Chronicle) -> str:
    """Return the share of the search in words."""
    return "not counted" if chronicle.search_share is None else f"{100 * chronicle.search_share:.1f} %"


def kernels(run: Run) -> Table:
    """Return every kernel that the run used, with its latency and risk as far as they are known."""
    risks = {blueprint.ir.name: blueprint.manifest.risk_score for blueprint in load_library()}
    users: dict[str, list[Life]] = defaultdict(list)
    ids = kernel_ids(run.chronicle)
    for life, kernel in zip(run.chronicle.lives(), ids, strict=True):
        if kernel:
            users[kernel].append(life)
    measured = run.forge.risks if run.forge is not None else {}
    rows = [_kernel(kernel, lives, risks, measured.get(kernel)) for kernel, lives in users.items()]
    risk = ("risk (prior)", "risk (measured)")
    return Table(("kernel", "blueprint", "tier", "forward of 8 samples, ms", "parameters", *risk, "seeds"), rows)


def _kernel(kernel: str, lives: Sequence[Life], risks: dict[str, float], measured: Risk | None) -> tuple[str, ...]:
    cost = next((life.report.cost for life in lives if life.report is not None), None)
    eager = "-eager-" in kernel
    latency = cost.latency_ms if cost is not None else None
    risk = risks.get(lives[0].blueprint)
    return (
        kernel,
        lives[0].blueprint,
        "eager" if eager else "compiled",
        "unknown" if latency is None else f"{number(latency)} ({'estimated' if eager else 'measured'})",
        f"{cost.params:,}" if cost is not None else "unknown",
        "unknown" if risk is None else f"{risk:.2f}",
        "not recorded" if measured is None else f"{measured.score:.2f} (confidence {measured.confidence:.2f})",
        ", ".join(life.seed_id for life in lives),
    )


def kernel_ids(chronicle: Chronicle) -> list[str]:
    """Return the kernel of each life, in order of germination; empty for none."""
    found: list[str] = []
    place: dict[str, int] = {}
    for event in chronicle.of(SeedTransitioned):
        if event.command is SeedCommand.GERMINATE:
            place[event.seed_id] = len(found)
            found.append("")
        if event.seed_id in place and event.kernel_artifact_id:
            found[place[event.seed_id]] = event.kernel_artifact_id
    return found


# --- lineage --------------------------------------------------------------------------------------------------------


def tree(run: Run) -> list[Branch]:
    """Return what was kept, layer by layer, from `lineage.json`, else from the events."""
    saved = run.lineage.get("fossils")
    layers: dict[str, list[Fossil]] = defaultdict(list)
    fossils = saved if isinstance(saved, list) else list(_from_events(run.chronicle))
    for fossil in fossils:
        seed = str(fossil.get("seed_id", ""))
        layers[seed.partition("#")[0]].append(Fossil(str(fossil.get("blueprint", "")), seed, tuple(_facts(fossil))))
    return [Branch(layer, tuple(kept)) for layer, kept in layers.items()]


def _from_events(chronicle: Chronicle) -> Iterator[dict[str, Any]]:
    for life, line in zip(chronicle.lives(), graft_lines(chronicle), strict=True):
        if life.kept:
            evidence = {"mean": line.gain, "lower": line.lower, "n": line.samples} if line.gain is not None else None
            yield vars(line) | {"counterfactual": evidence}


def _facts(fossil: dict[str, Any]) -> Iterator[str]:
    yield f"{fossil.get('params', 0):,} parameters"
    if fossil.get("dims"):
        yield ", ".join(f"{name} = {size}" for name, size in fossil["dims"].items())
    if fossil.get("group"):
        yield str(fossil["group"])
    found = fossil.get("counterfactual")
    if found:
        yield f"gain {number(found['mean'])}, at least {number(found['lower'])}, on {int(found['n']):,} samples"
    if fossil.get("kernel_id"):
        yield f"kernel {fossil['kernel_id']}"
    if fossil.get("fault"):
        yield f"failed: {fossil['fault']}"


# --- events ---------------------------------------------------------------------------------------------------------


def happened(run: Run) -> Table:
    """Return what went wrong in a run, what was done about it, and which compiled kernels it took."""
    return Table(("step", "what", "where", "detail"), system_events(run.chronicle))


def forge_events(run: Run) -> Table | None:
    """Return what the run's forge decided while it ran, whoever had asked; None where that is not recorded."""
    if run.forge is None or run.forge.events is None:
        return None
    rows = run.forge.events[-MOST_FORGE_EVENTS:]
    note = f"The last {len(rows)} of {len(run.forge.events):,}." if len(rows) < len(run.forge.events) else ""
    return Table(("seconds after the start", "what", "kernel or blueprint", "detail"), rows, note)


# --- several runs ---------------------------------------------------------------------------------------------------


def side_by_side(runs: Sequence[Run]) -> Table:
    """Return one row per run and per twin."""
    rows = []
    for run in runs:
        rows.append(_row(run.title, run.chronicle, run.report_loss))
        if run.twin is not None:
            rows.append(_row(f"{run.title}, without growth", run.twin, run.twin_report_loss))
    return Table(("run", "parameters", "report loss", "decision loss", "steps", "work", "search"), rows)


def _row(title: str, chronicle: Chronicle, report_loss: float | None) -> tuple[str, ...]:
    losses = chronicle.decision_losses
    return (
        title,
        f"{chronicle.host_params + chronicle.added_params:,}" if chronicle.host_params else "not recorded",
        "not recorded" if report_loss is None else number(report_loss),
        number(losses[-1][1]) if losses else "not measured",
        f"{chronicle.steps:,}",
        work(chronicle).removesuffix(" multiply-accumulates"),
        share(chronicle),
    )
