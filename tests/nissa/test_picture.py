import math
import struct
from pathlib import Path

import matplotlib
import pytest
from matplotlib import rcParams

from esper.leyline.errors import OutputError
from esper.leyline.states import Reason, SeedState
from esper.nissa.chronicle import Chronicle
from esper.nissa.lanes import MOST_LANES, choose_lanes
from esper.nissa.palette import STAGES
from esper.nissa.picture import bands, draw, make_figure, smoothed
from tests.nissa.stories import TO_THE_GATE, boundary, life, story


def size_of(file: Path) -> tuple[int, int]:
    head = file.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.mark.parametrize("lives", [0, 1, 6])
@pytest.mark.parametrize("twin", [False, True])
def test_a_picture_is_drawn(tmp_path: Path, lives: int, twin: bool) -> None:
    file = draw(story(lives=lives), tmp_path / "growth.png", twin=story(lives=0) if twin else None, title="t")
    width, height = size_of(file)
    assert width == 1800 and height > 600 and file.stat().st_size > 10_000
    assert [f.name for f in tmp_path.iterdir()] == ["growth.png"]


def test_an_empty_run_is_drawn(tmp_path: Path) -> None:
    assert size_of(draw(Chronicle(), tmp_path / "growth.png"))[0] == 1800


def test_losses_that_are_not_finite_are_drawn(tmp_path: Path) -> None:
    chronicle = story(lives=1)
    for step, loss in enumerate((math.nan, math.inf, 2.0, math.nan), start=101):
        chronicle.curve.add(step, loss)
    draw(chronicle, tmp_path / "growth.png")
    chronicle.curve.points = [(1, math.nan), (2, math.inf)]
    draw(chronicle, tmp_path / "none.png")
    for name in ("growth.png", "none.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_twin_is_dashed() -> None:
    lines = make_figure(story(), twin=story(lives=0)).axes[0].get_lines()
    assert [line.get_label() for line in lines if line.get_linestyle() == "--"] == [
        "decision part, same run without growth"
    ]


def test_lanes_are_named_and_coloured_by_stage() -> None:
    axes = make_figure(story(lives=3)).axes[1]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"BP-MLP-GELU · {i}.ffn" for i in range(3)]
    assert "kept, gain .1000" in [text.get_text() for text in axes.texts]
    bars = {matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in axes.patches}
    assert STAGES[SeedState.GRAFTING] in bars and STAGES[SeedState.FOSSILIZED] in bars


def test_what_is_on_trial_is_told_from_what_was_kept() -> None:
    chronicle = story(lives=2)
    kept = chronicle.kept_params_over_time
    assert kept == [(50, 500)]
    panel = make_figure(chronicle).axes[-1]
    colours = [matplotlib.colors.to_hex(area.get_facecolor()[0]).upper() for area in panel.collections]
    assert colours[1:] == [STAGES[SeedState.GRAFTING], STAGES[SeedState.FOSSILIZED]]


def test_a_life_under_way_reaches_the_end() -> None:
    chronicle = Chronicle(run_id="r", host_params=10)
    for message in [*life(path=TO_THE_GATE), boundary(100, added=500)]:
        chronicle.hear(message)
    axes = make_figure(chronicle).axes[1]
    assert max(bar.get_x() + bar.get_width() for bar in axes.patches) == 100
    assert "under way" in [text.get_text() for text in axes.texts]


def test_many_lives_keep_the_fossils() -> None:
    chronicle = story(lives=MOST_LANES + 6)
    for message in life("last#0.0", born=60, reason=Reason.GATE_PASSED):
        chronicle.hear(message)
    lanes = choose_lanes(chronicle)
    assert len(lanes.lives) == MOST_LANES and lanes.left_out == 7
    assert lanes.lives[-1].seed_id == "last#0.0"
    assert "and 7 more" in make_figure(chronicle).axes[1].get_xlabel()


def test_bands_show_what_was_under_way() -> None:
    found = [(start, stop, state.value) for start, stop, state in bands(story(lives=3))]
    assert found == [(20, 30, "GRAFTING"), (30, 40, "STABILIZATION"), (40, 50, "FINE_TUNING")]


def test_smoothing_keeps_steps_and_gaps() -> None:
    found = smoothed([(1, 1.0), (2, math.nan), (3, 3.0)])
    assert [step for step, _ in found] == [1, 2, 3]
    assert found[0][1] == 1.0 and math.isnan(found[1][1])


def test_drawing_leaves_global_state_alone(tmp_path: Path) -> None:
    before, backend = dict(rcParams), matplotlib.get_backend()
    draw(story(), tmp_path / "growth.png")
    assert dict(rcParams) == before and matplotlib.get_backend() == backend


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        draw(story(), tmp_path / "missing" / "growth.png")
