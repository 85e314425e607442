"""What happened in a run, in one paragraph."""

from collections import Counter
from collections.abc import Iterator

from esper.leyline.events import GraftFaulted, RolledBack
from esper.nissa.page.runs import Run
from esper.nissa.summary import GraftLine, graft_lines, number


def paragraph(run: Run) -> str:
    """Return what happened, in sentences that hold only what was recorded."""
    return " ".join(_sentences(run))


def _sentences(run: Run) -> Iterator[str]:
    chronicle = run.chronicle
    policy = f" under the policy {chronicle.policy}" if chronicle.policy else ""
    yield f"{run.title} has trained for {chronicle.steps:,} steps{policy}."
    lines = graft_lines(chronicle)
    yield from _growth(lines)
    if chronicle.host_params:
        yield _size(chronicle.host_params, chronicle.added_params)
    yield from _losses(run)
    if chronicle.search_share:
        yield f"The search took {100 * chronicle.search_share:.1f} % of the training's other work."
    yield _trouble(len(chronicle.of(RolledBack)), len(chronicle.of(GraftFaulted)))


def _growth(lines: tuple[GraftLine, ...]) -> Iterator[str]:
    if not lines:
        yield "Nothing was tried."
        return
    places = {line.seed_id.partition("#")[0] for line in lines}
    where = f"in {next(iter(places))}" if len(places) == 1 else f"in {len(places)} layers"
    yield f"{_count(len(lines), 'adaptation')} {'was' if len(lines) == 1 else 'were'} tried {where} ({_ends(lines)})."
    kept = [line for line in lines if line.kept]
    if kept:
        told = "; ".join(_worth(line) for line in kept[:3])
        more = f"; and {len(kept) - 3} more" if len(kept) > 3 else ""
        yield f"Kept: {told}{more}."


def _ends(lines: tuple[GraftLine, ...]) -> str:
    ends = Counter(_end(line) for line in lines)
    return "; ".join(f"{n} {end}" for end, n in sorted(ends.items(), key=lambda item: (item[0] != "kept", -item[1])))


def _end(line: GraftLine) -> str:
    if line.kept:
        return "kept"
    if line.ended is None:
        return "under way"
    return f"{line.outcome.lower().replace('_', ' ')}, {line.reason.lower().replace('_', ' ') or 'no reason recorded'}"


def _worth(line: GraftLine) -> str:
    place = f"{line.blueprint} at {line.seed_id} ({_count(line.params, 'parameter')}"
    if line.gain is None or line.lower is None:
        return f"{place}, not measured)"
    return f"{place}, gain {number(line.gain)}, at least {number(line.lower)})"


def _size(host: int, added: int) -> str:
    if not added:
        return f"The network has the {host:,} parameters that it began with."
    return f"The network went from {host:,} to {host + added:,} parameters (+{100 * added / host:.1f} %)."


def _losses(run: Run) -> Iterator[str]:
    losses = run.chronicle.decision_losses
    other = run.twin.decision_losses if run.twin is not None else []
    if losses:
        against = f"; without growth it ended at {number(other[-1][1])}" if other else ""
        yield f"The loss on the decision part went from {number(losses[0][1])} to {number(losses[-1][1])}{against}."
    if run.report_loss is not None:
        twin = run.twin_report_loss
        against = "" if twin is None else f" against {number(twin)} without growth"
        yield f"The loss on the report part, which no decision reads, is {number(run.report_loss)}{against}."


def _trouble(rollbacks: int, faults: int) -> str:
    if not rollbacks and not faults:
        return "No child failed, and the run never had to go back."
    return f"The run went back {_count(rollbacks, 'time')}, and {_count(faults, 'fault')} of a child occurred."


def _count(number_of: int, noun: str) -> str:
    return f"{number_of:,} {noun}{'' if number_of == 1 else 's'}"
