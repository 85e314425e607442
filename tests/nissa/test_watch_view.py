"""What a live view shows: the right numbers, in any width, with or without colours, and nothing that moves a cursor."""

from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from esper.leyline.events import DecisionMade, Fault, GraftFaulted
from esper.leyline.states import SeedState
from esper.nissa.chronicle import Chronicle
from esper.nissa.watch.follow import Sight
from esper.nissa.watch.lattice import LETTERS
from esper.nissa.watch.live import Live
from esper.nissa.watch.view import picture
from tests.nissa.stories import CULLED, KEPT, TO_THE_GATE, boundary, life, story

EVIL = "\x1b[2J\x1b]0;title\x07[bold]evil[/bold]\r\n\u202e"


def shown(sight: Sight, width: int = 80, height: int = 40, *, colour: bool = False) -> str:
    stream = StringIO()
    console = Console(file=stream, width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(picture(sight, width, height))
    return stream.getvalue()


def running(**told: object) -> Live:
    return Live.model_validate({"run_id": "r", "title": "digits", "step": 100} | told)


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


def test_the_head_tells_where_the_run_stands() -> None:
    live = running(total_steps=400, steps_per_s=50.0, train_loss=1.25)
    text = shown(Sight("out", story(lives=3), live, "digits"))
    assert text.startswith("digits  running  heuristic  run r\n")
    assert "step 100 of 400" in text and "25 %" in text and "50 steps/s, 6 s left" in text
    assert "training 1.250, decision 2.010" in text
    assert "1,000 host + 500 kept + 0 on trial" in text


def test_seeds_are_told_by_letters_and_by_colours() -> None:
    text = shown(Sight("out", story(lives=3), running(), "digits"))
    kept, lost = row(text, "blocks.0.ffn"), row(text, "blocks.1.ffn")
    # 100 steps over 30 columns: born at 20, ramp to 30, judged at 40, kept at 50.
    timeline = kept.split()[2]
    assert [timeline.count(letter) for letter in "·GSf◆"] == [6, 3, 3, 3, 15] and "kept .1000" in kept
    assert "culled -.0010" in lost and lost.split()[2].count("✕") == 1 and lost.split()[2].endswith("·")
    assert "G grafting  S stabilization  f fine-tuning  ◆ kept  ✕ culled" in text
    coloured = shown(Sight("out", story(lives=3), running(), "digits"), colour=True)
    assert "\x1b[38;2;230;159;0mG" in coloured and "38;2;0;158;115m◆" in coloured


def test_every_stage_has_a_letter_and_gone_ones_share_theirs() -> None:
    assert set(LETTERS) == set(SeedState) - {SeedState.DORMANT}
    assert len(set(LETTERS.values())) == len(LETTERS) - 2


@pytest.mark.parametrize(
    ("live", "alpha"),
    [
        (running(step=35, alphas={"net.0#0.0": 0.35}), "0.35"),
        (running(step=35), "1.00"),
        (running(step=20), "0.00"),
        (running(step=40, state="ended"), None),
    ],
)
def test_running_ramps_are_told(live: Live, alpha: str | None) -> None:
    chronicle = Chronicle(run_id="r")
    for message in life(path=TO_THE_GATE[:4]):
        chronicle.hear(message)
    text = shown(Sight("out", chronicle, live, over=live.state == "ended"))
    assert ("alpha" in text) == (alpha is not None)
    assert alpha is None or alpha in text.partition("alpha")[2]


def test_what_went_wrong_is_told() -> None:
    chronicle = story(lives=1)
    fault = GraftFaulted(run_id="r", epoch=0, step=100, seed_id="x#0.0", fault=Fault.NOT_FINITE, detail="NaN in it")
    chronicle.hear(fault)
    text = shown(Sight("out", chronicle, running(), damaged=2))
    assert "step 100  child failed: not finite  x#0.0  NaN in it" in text
    assert "2 lines cannot be read" in text


@pytest.mark.parametrize(
    ("sight", "words"),
    [
        (Sight("out/demo"), "not begun"),
        (Sight("out/demo"), "out/demo holds nothing of a run yet; waiting for it to begin."),
        (Sight("tcp://a:1", problem="tcp://a:1 gives no answer"), "not connected"),
        (Sight("out", story(), running(), problem="gone; trying again"), "connection lost"),
        (Sight("out", story(), running(), silence_s=190.0), "running, silent for 3 min"),
        (Sight("out", story(), running(state="stopped", detail="by request"), over=True), "stopped by request"),
        (Sight("out", story(), running(state="ended"), over=True), "ended"),
        (Sight("out", story()), "told at boundaries only"),
        (Sight("out", Chronicle(run_id="r"), running(step=0)), "training –, decision –"),
    ],
)
def test_states_of_a_run(sight: Sight, words: str) -> None:
    assert words in shown(sight)


def crowd(lives: int) -> Chronicle:
    chronicle = story(lives=0)
    for number in range(lives):
        path = (CULLED, KEPT, TO_THE_GATE)[number % 3]
        seed = f"base_model.{'transformer.layers.' * (number % 4)}{number}.ffn#0.{number}"
        for message in life(seed, "BP-DEPTHWISE-CONVOLUTION-GATED", path, gain=-1e-4):
            chronicle.messages.append(message)
    said = DecisionMade(run_id="r", epoch=0, step=99, policy="heuristic", explanation="because " * 60)
    chronicle.messages += [said, said, said, said]
    return chronicle


@settings(deadline=None, max_examples=25)
@given(st.integers(40, 200), st.integers(24, 80), st.integers(0, 60), st.booleans())
def test_it_fits_any_terminal(width: int, height: int, lives: int, lost: bool) -> None:
    live = running(
        total_steps=10**9, steps_per_s=12345.6, step=10**8, alphas={"net.0#0.0": 0.5}, title="a long name " * 20
    )
    problem = "tcp://somewhere.example.org:7070 gives no answer; trying again." if lost else ""
    text = shown(Sight("out", crowd(lives), live, live.title, damaged=1, problem=problem), width, height)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert len(text.splitlines()) <= max(height, 24)


def test_the_seeds_that_matter_most_are_shown() -> None:
    text = shown(Sight("out", crowd(60), running()), 100, 39)
    told = [line for line in text.splitlines() if "ffn#0." in line and "·" in line]
    assert 10 <= len(told) <= 20 and all("evaluating" in line for line in told)
    assert f"and {60 - len(told)} more seeds" in text and "decisions" in text


def test_nothing_from_a_run_reaches_the_terminal_as_a_command() -> None:
    chronicle = Chronicle(run_id=EVIL, policy=EVIL, host_params=10)
    messages = [*life(f"{EVIL}#0.0", EVIL, TO_THE_GATE[:4]), boundary(30)]
    said = DecisionMade(run_id="r", epoch=0, step=60, policy="p", explanation=EVIL)
    fault = GraftFaulted(run_id="r", epoch=0, step=100, seed_id=EVIL, fault=Fault.RAISED, detail=EVIL)
    for message in [*messages, said, fault]:
        chronicle.hear(message)
    live = running(run_id=EVIL, title=EVIL, state="stopped", detail=EVIL, alphas={f"{EVIL}#0.0": 0.5})
    for sight in (
        Sight(EVIL, chronicle, live, EVIL, over=True),
        Sight(EVIL, problem=EVIL),
        Sight(EVIL, chronicle, running(), EVIL),
    ):
        text = shown(sight, 200)
        assert "\x1b" not in text and "\x07" not in text and "\r" not in text and "\u202e" not in text
        assert "[bold]evil[/bold]" in text


def test_a_loss_that_is_no_number_does_not_stop_the_view(tmp_path: Path) -> None:
    chronicle = story(lives=0)
    for step, loss in ((110, float("nan")), (120, float("inf")), (130, 1.5)):
        chronicle.hear(boundary(step, loss))
    assert "decision 1.500" in shown(Sight("out", chronicle, running(train_loss=None)))
