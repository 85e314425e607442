"""The seeds of a run in rows of text: the stages of their lives, and the ramps that are running."""

from rich.text import Text

from esper.leyline.reports import FINAL
from esper.leyline.states import SeedState
from esper.nissa.chronicle import Life
from esper.nissa.palette import STAGES
from esper.nissa.summary import gain_scale, graft_lines, number
from esper.nissa.watch.follow import Sight
from esper.nissa.watch.live import Live
from esper.nissa.watch.text import NARROW, bar, cut, plain

LETTERS = {
    SeedState.GERMINATED: "g",
    SeedState.LOADING: "l",
    SeedState.TRAINING: "t",
    SeedState.GRAFTING: "G",
    SeedState.STABILIZATION: "S",
    SeedState.EVALUATING: "E",
    SeedState.FINE_TUNING: "f",
    SeedState.FOSSILIZED: "◆",
    SeedState.CULLED: "✕",
    SeedState.CANCELLED: "✕",
    SeedState.ROLLED_BACK: "✕",
}
"""What stands for each stage, so that no colour is needed to tell them apart."""

_GONE = FINAL - {SeedState.FOSSILIZED}
_STATE_WIDTH = 21


def lattice(sight: Sight, width: int, rows: int) -> list[Text]:
    """Return one row per seed that was ever active; where there are more, those that are active, then the kept ones.

    Args:
        sight: where the run stands.
        width: columns.
        rows: seeds at most.
    """
    lives: dict[str, list[Life]] = {}
    for life in sight.chronicle.lives():
        lives.setdefault(life.seed_id, []).append(life)
    every = list(lives)
    first = sorted(every, key=lambda seed: (_rank(lives[seed][-1]), -lives[seed][-1].stages[0].start))
    shown = set(first[:rows])
    worth = _worth(sight)
    told = [_row(lives[seed], worth.get(seed, ""), sight.step, width) for seed in every if seed in shown]
    if len(every) > rows:
        told.append(Text(f"and {len(every) - rows} more seeds", style="dim"))
    return told


def _rank(life: Life) -> int:
    return 0 if life.outcome is None else 1 if life.kept else 2


def _worth(sight: Sight) -> dict[str, str]:
    """Return the measured gain of the last life of each seed."""
    lines = graft_lines(sight.chronicle)
    scale = gain_scale(lines)
    return {line.seed_id: "" if line.gain is None else number(line.gain, scale) for line in lines}


def _row(lives: list[Life], worth: str, end: int, width: int) -> Text:
    state = lives[-1].stages[-1].state
    said = "kept" if state is SeedState.FOSSILIZED else state.value.lower().replace("_", "-")
    if worth and width >= NARROW:
        said += f" {worth}"
    right = _STATE_WIDTH if width >= NARROW else 0
    name = (width - right) // 2
    told = Text(_name(lives[-1], name - 1).ljust(name), style="bold" if lives[-1].kept else "")
    told.append_text(_timeline(lives, end, width - name - right))
    if right:
        told.append(f" {said}", style=style(state))
    return cut(told, width)


def _name(life: Life, room: int) -> str:
    """Return what grew and where, cut to fit: the end of a path tells seeds apart."""
    kind, seed = plain(life.blueprint).removeprefix("BP-"), plain(life.seed_id).removesuffix("#0.0")
    kind = kind if len(kind) <= room // 2 else f"{kind[: room // 2 - 1]}…"
    left = room - len(kind) - 1
    return f"{kind} {seed if len(seed) <= left else '…' + seed[len(seed) - left + 1 :]}"


def _timeline(lives: list[Life], end: int, width: int) -> Text:
    """Return the stages over the steps so far, one letter for each stretch of steps."""
    cells: list[SeedState | None] = [None] * width
    per_step = width / max(1, end)
    for life in lives:
        for stage in life.stages:
            start = min(width - 1, int(stage.start * per_step))
            stop = width if stage.end is None else max(start + 1, min(width, round(stage.end * per_step)))
            # A stage of the past is one mark; a kept child stays.
            stop = start + 1 if stage.state in _GONE else stop
            cells[start:stop] = [stage.state] * (stop - start)
    told = Text()
    for state in cells:
        told.append("·" if state is None else LETTERS[state], style="dim" if state is None else style(state))
    return told


def style(state: SeedState) -> str:
    """Return how a stage is written: its colour in all pictures, but for black, which a terminal may not show."""
    colour = STAGES[state]
    return "bold" if colour == "#000000" else colour


def legend(sight: Sight) -> Text:
    """Return what the letters stand for, as far as they can be seen."""
    stages = [stage for life in sight.chronicle.lives() for stage in life.stages]
    seen = {stage.state for stage in stages if stage.end is None or stage.end > stage.start}
    told = Text()
    for state, letter in LETTERS.items():
        if state in seen:
            word = "kept" if state is SeedState.FOSSILIZED else state.value.lower().replace("_", "-")
            told.append(f"{letter} ", style=style(state)).append(f"{word}  ", style="dim")
    return told


def ramps(sight: Sight, width: int, most: int) -> list[Text]:
    """Return one row per child that is being blended in, and the number of those beyond the most."""
    if sight.live is None or sight.over:
        return []
    current = {life.seed_id: life for life in sight.chronicle.lives()}.values()
    grafting = [life for life in current if life.stages[-1].state is SeedState.GRAFTING]
    running = [(life, _alpha(sight.live, life)) for life in grafting]
    told = [_ramp(life, alpha, width) for life, alpha in running[:most]]
    if len(running) > most:
        told.append(Text(f"and {len(running) - most} more ramps", style="dim"))
    return told


def _alpha(live: Live, life: Life) -> float:
    """Return the share that a child had; the run tells those below 1 only, and may not have told yet."""
    return live.alphas.get(life.seed_id, 1.0 if live.step > life.stages[-1].start else 0.0)


def _ramp(life: Life, alpha: float, width: int) -> Text:
    right = 6
    name = (width - (_STATE_WIDTH if width >= NARROW else 0)) // 2
    told = Text(_name(life, name - 1).ljust(name))
    told.append_text(bar(alpha, width - name - right, style(SeedState.GRAFTING)))
    return cut(told.append(f" {alpha:.2f}"), width)
