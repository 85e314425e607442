"""The picture that a live view shows: where a run stands, in text of any width from 40 columns on."""

import math
from collections.abc import Iterator

from rich.console import Group
from rich.text import Text

from esper.nissa.page.events import system_events
from esper.nissa.summary import number
from esper.nissa.watch.follow import Sight
from esper.nissa.watch.lattice import lattice, legend, ramps
from esper.nissa.watch.text import NARROW, bar, cut, duration, plain, spark

ROWS = 40
"""Rows of a picture where no terminal bounds them."""

_LOW = 30
"""Rows below which less is told."""

_LEAST_SEEDS = 3
_QUIET_S = 20.0
"""Silence after which a run that should go on is said to be silent, in seconds."""


def picture(sight: Sight, width: int, height: int = ROWS) -> Group:
    """Return what is to be shown.

    Args:
        sight: where the run stands.
        width: columns.
        height: rows; the seeds take what the rest leaves.
    """
    head = list(_head(sight, width))
    if not sight.begun:
        return Group(*head)
    few = height < _LOW
    rest = [
        *_part("alpha", ramps(sight, width, 3 if few else 6), width),
        *_part("decisions", _decisions(sight, width, 1 if few else 3), width),
        *_part("events", _events(sight, width, 2 if few else 4), width),
    ]
    room = height - sum(_rows(text, width) for text in (*head, *rest, legend(sight))) - 4
    seeds = lattice(sight, width, max(_LEAST_SEEDS, room))
    return Group(*head, *_part("seeds", [*seeds, legend(sight)] if seeds else [], width), *rest)


def _rows(text: Text, width: int) -> int:
    """Return how many rows a text takes at most; words that do not fit leave the end of a row empty."""
    return 1 if text.no_wrap or text.cell_len <= width else math.ceil(text.cell_len / width) + 1


def _part(name: str, rows: list[Text], width: int) -> list[Text]:
    """Return rows under their heading; nothing without any."""
    heading = Text(f"{name} ".ljust(min(width, 100), "─"), style="dim", no_wrap=True)
    return [Text(), heading, *rows] if rows else []


def _head(sight: Sight, width: int) -> Iterator[Text]:
    yield _title(sight, width)
    if sight.problem:
        yield Text(plain(sight.problem), style="red")
    if not sight.begun:
        yield Text(f"{plain(sight.name)} holds nothing of a run yet; waiting for it to begin.")
        return
    yield _steps(sight, width)
    yield _losses(sight, width)
    yield _parameters(sight, width)
    if sight.damaged:
        yield Text(f"{sight.damaged} lines cannot be read and are left out.", style="yellow")


# --- head -----------------------------------------------------------------------------------------------------------


def _title(sight: Sight, width: int) -> Text:
    state, name = _state(sight), plain(sight.title or sight.name)
    room = max(8, width - len(state) - 2)
    told = Text(name if len(name) <= room else f"…{name[1 - room :]}", style="bold")
    told.append("  ").append_text(state)
    run, policy = sight.chronicle.run_id, sight.chronicle.policy
    more = "  ".join(filter(None, (plain(policy), f"run {plain(run)[:12]}" if run else "")))
    if len(told) + len(more) + 2 <= width:
        told.append(f"  {more}", style="dim")
    return cut(told, width)


def _state(sight: Sight) -> Text:
    live = sight.live
    if sight.problem:
        return Text("connection lost" if sight.begun else "not connected", style="bold red")
    if live is not None and live.state == "stopped":
        return Text(f"stopped {plain(live.detail)}" if live.detail else "stopped", style="bold red")
    if sight.over:
        return Text("ended", style="bold green")
    if not sight.begun:
        return Text("not begun", style="yellow")
    if live is None:
        return Text("told at boundaries only", style="yellow")
    if sight.silence_s > _QUIET_S:
        return Text(f"running, silent for {duration(sight.silence_s)}", style="yellow")
    return Text("running", style="bold green")


def _steps(sight: Sight, width: int) -> Text:
    live, step = sight.live, sight.step
    total = live.total_steps if live is not None else None
    told = Text(f"step {step:,}")
    if total:
        share = min(1.0, step / total)
        told.append(f" of {total:,} ")
        told.append_text(bar(share, max(6, min(30, width - len(told) - 26)), "green")).append(f" {100 * share:.0f} %")
    speed = live.steps_per_s if live is not None and not sight.over else None
    if speed:
        told.append(f"  {speed:.{0 if speed >= 10 else 2}f} steps/s")
        if total and total > step:
            told.append(f", {duration((total - step) / speed)} left")
    return cut(told, width)


def _losses(sight: Sight, width: int) -> Text:
    decision = [loss for _, loss in sight.chronicle.decision_losses if math.isfinite(loss)]
    train = sight.live.train_loss if sight.live is not None else None
    if train is None and sight.chronicle.train_losses:
        train = sight.chronicle.train_losses[-1][1]
    told = Text("loss: training " if width >= NARROW else "training ")
    told.append("–" if train is None else number(train), style="bold")
    told.append(", decision ").append(number(decision[-1]) if decision else "–", style="bold")
    room = min(24, width - len(told) - 2)
    if len(decision) > 1 and room >= 4:
        told.append("  ").append(spark(decision, room), style="cyan")
    return cut(told, width)


def _parameters(sight: Sight, width: int) -> Text:
    chronicle = sight.chronicle
    kept = next((n for _, n in reversed(chronicle.kept_params_over_time)), 0)
    trial = max(0, chronicle.added_params - kept)
    host = f"{chronicle.host_params:,} host" if chronicle.host_params else "host unknown"
    told = Text(f"parameters: {host}" if width >= NARROW else host)
    told.append(f" + {kept:,} kept", style="green" if kept else "")
    told.append(f" + {trial:,} on trial", style="yellow" if trial else "")
    return cut(told, width)


# --- what was said and what happened --------------------------------------------------------------------------------


def _decisions(sight: Sight, width: int, most: int) -> list[Text]:
    found: list[Text] = []
    for step, words in sight.chronicle.explanations[-most:]:
        told = Text(f"step {step:,}  ", style="dim").append(plain(words), style="not dim")
        told.truncate(2 * width, overflow="ellipsis")
        found.append(told)
    return found


def _events(sight: Sight, width: int, most: int) -> list[Text]:
    found = []
    for step, what, where, detail in system_events(sight.chronicle)[-most:]:
        told = Text(f"step {step}  ", style="dim").append(plain(what), style="not dim yellow")
        found.append(told.append(plain(f"  {where}  {detail}"), style="not dim"))
    return [cut(text, width) for text in found]
