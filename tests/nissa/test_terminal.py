from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from esper.nissa.summary import RunResult, summarize, verdict
from esper.nissa.terminal import gain_text, present
from tests.nissa.stories import story


def printed(grown: RunResult, twin: RunResult | None = None, width: int = 100) -> str:
    stream = StringIO()
    present(grown, twin, Console(file=stream, width=width))
    return stream.getvalue()


@pytest.fixture
def grown() -> RunResult:
    return summarize(story(lives=3), title="t", output_dir="out/[run]", report_loss=1.9, train_macs=10**9)


def test_every_adaptation_is_told(grown: RunResult) -> None:
    text = printed(grown)
    for words in ("BP-MLP-GELU", "blocks.2.ffn#0.0", "FOSSILIZED", "OUTCOMPETED", ".1000", "(.0800 to .1200)", "500"):
        assert words in text
    assert "out/[run]" in text


def test_a_compiled_kernel_is_told(grown: RunResult) -> None:
    assert "compiled" not in printed(grown)
    lines = (replace(grown.grafts[0], kernel="compiled"), *grown.grafts[1:])
    assert printed(replace(grown, grafts=lines)).count(f"{lines[0].seed_id}, compiled") == 1


def test_the_twin_and_the_verdict_are_told(grown: RunResult) -> None:
    twin = replace(grown, grafts=(), added_params=0, report_loss=2.0)
    text = printed(grown, twin, width=400)
    assert "without" in text and "1.500" not in text
    assert verdict(grown, twin) in text


def test_a_run_without_grafts(grown: RunResult) -> None:
    text = printed(replace(grown, grafts=(), added_params=0, report_loss=None, output_dir=""))
    assert "What was tried" not in text and "Nothing was tried" in text


def test_the_table_fits_eighty_columns(grown: RunResult) -> None:
    text = printed(grown, grown, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_what_the_search_took_is_told(grown: RunResult) -> None:
    assert "1.6 % of the training's work" in printed(replace(grown, search_share=0.0161), width=80)
    assert "search" not in printed(grown)


def test_kernels_that_were_not_ready_are_told_with_what_to_do(grown: RunResult) -> None:
    assert "not ready in time: 13. " in printed(replace(grown, missed_kernels=13), width=200)
    assert "Compiled kernels" not in printed(grown)


def test_the_page_is_named(grown: RunResult) -> None:
    out = Console(file=StringIO(), width=120)
    present(grown, None, out, Path("runs/demo/report.html"))
    assert isinstance(out.file, StringIO)
    assert out.file.getvalue().rstrip().endswith("All of it on one page: runs/demo/report.html")


def test_a_graft_that_was_never_measured(grown: RunResult) -> None:
    assert gain_text(replace(grown.grafts[0], gain=None)) == "not measured"
