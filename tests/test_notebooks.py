"""The notebooks run from top to bottom, and are kept without outputs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def cells(file: Path, kind: str) -> list[Any]:
    return [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == kind]


class Shown(NamedTuple):
    """What a notebook has shown: its text, its pictures, its drawings, and the folder that it wrote to."""

    printed: str
    pictures: int
    drawings: list[str]
    folder: Path

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_no_output_is_kept_and_every_cell_is_short(file: Path) -> None:
    nbformat.validate(nbformat.read(file, as_version=4))
    assert file.name in README
    for cell in cells(file, "code"):
        assert not cell.outputs and cell.execution_count is None
        assert len(cell.source.splitlines()) <= 40


def test_every_notebook_has_assertions_of_its_own() -> None:
    assert set(CHECKS) == {file.stem for file in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_in_a_fresh_kernel(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = executed(file, tmp_path, monkeypatch)
    outputs = [output for cell in cells(done, "code") for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs]
    printed = "\n".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
    drawings = [html for html in (each.get("text/html", "") for each in data) if "<svg" in html]
    check, folder = CHECKS[file.stem]
    check(Shown(printed, sum("image/png" in each for each in data), drawings, tmp_path / "outputs" / folder))


def check_tutorial(shown: Shown) -> None:
    """Growth was tried and judged, and the notebook shows what came of it, kept or not."""
    printed, reports = shown.printed, shown.lines("fieldreports.jsonl")
    assert "1,358 host + " in printed and "What was tried" in printed
    assert "largest difference" in printed
    assert printed.count("95 % interval") == 2
    assert shown.pictures == 1
    outcomes = [report["outcome"] for report in reports]
    kept = [report["blueprint_id"] for report in reports if report["outcome"] == "FOSSILIZED"]
    assert outcomes and set(outcomes) <= {"FOSSILIZED", "CULLED"}
    table = printed[printed.index("What was tried") :]
    assert table.count("FOSSILIZED") == len(kept) and table.count("CULLED") == len(outcomes) - len(kept)
    assert all(blueprint in table for blueprint in kept)
    assert ("1,358 host + 0 grown" in printed) is not bool(kept)


def check_watching(shown: Shown) -> None:
    """What was printed while it grew is what the journal has, and the drawings show every seed with its alpha."""
    told = re.findall(r"^step +(\d+)  (\S+) +(\w+) -> (\w+)  \((\w+)\)$", shown.printed, flags=re.MULTILINE)
    events = [line for line in shown.lines("events.jsonl") if line["type"] == "SeedTransitioned"]
    said = [(e["step"], e["blueprint_id"], e["source"], e["target"], e["reason"]) for e in events]
    assert [(int(step), *rest) for step, *rest in told] == said
    seeds = {event["seed_id"] for event in events}
    first = {event["blueprint_id"] for event in events if event["group"] == "trial-0"}
    assert first == {"BP-MLP-GELU", "BP-PROJ-LORA", "BP-WIDEN"}
    lattice, ramps, losses = shown.drawings
    assert all(seed in lattice and seed in ramps for seed in seeds) and "decision part" in losses
    assert shown.pictures == 1
    kept = {event["seed_id"] for event in events if event["target"] == "FOSSILIZED"}
    ends = re.findall(
        r"^(\S+): alpha went from 0.00 to 1.00 and is (\d.\d\d) at the end", shown.printed, flags=re.MULTILINE
    )
    assert dict(ends) == {seed: "1.00" if seed in kept else "0.00" for seed in seeds}


def check_blueprint_of_ones_own(shown: Shown) -> None:
    """Errors are named, the dry run fits everywhere, and the blueprint was judged beside those of the library."""
    printed, reports = shown.printed, shown.lines("run/fieldreports.jsonl")
    assert "unknown op 'liner'; did you mean 'linear'?" in printed
    assert "BP-MY-SILU@1.0.0 keeps its promises" in printed
    assert "birth: at birth it changes the host's output by" in printed
    assert "BP-MY-SILU@1.0.0 fits 5 of 5 places." in printed
    trial = {report["blueprint_id"]: report for report in reports if report["group"] == "trial-0"}
    assert set(trial) == {"BP-MY-SILU", "BP-MLP-GELU", "BP-PROJ-LORA"}
    assert all(report["counterfactual"]["n"] == 500 for report in trial.values())
    kept = {report["blueprint_id"] for report in reports if report["outcome"] == "FOSSILIZED"}
    assert len(list((shown.folder / "model" / "blueprints").iterdir())) == len(kept)
    assert "the saved network computes the same, bit for bit" in printed


def check_evidence(shown: Shown) -> None:
    """The gate and the interval by hand are those of the run, and lineage, summary and page say the same."""
    printed, reports = shown.printed, shown.lines("fieldreports.jsonl")
    rows = re.findall(r"^(BP-\S+) .*  (yes|no) +(\w+), (\w+)$", printed, flags=re.MULTILINE)
    above = [r["counterfactual"]["lower"] > r["eval_metrics"]["price"] for r in reports]
    names = [
        (r["blueprint_id"], "yes" if a else "no", r["outcome"], r["reason"])
        for r, a in zip(reports, above, strict=True)
    ]
    assert rows == names and len(rows) >= 4
    by_hand, by_us = re.findall(r"^by (?:hand|Esper): +(\S+, \S+ to [+-]\.?\d\S*\d)", printed, flags=re.MULTILINE)
    assert by_hand == by_us
    growth, lineage = (
        json.loads((shown.folder / f"{n}.json").read_text(encoding="utf-8")) for n in ("growth", "lineage")
    )
    kept = [r["seed_id"] for r in reports if r["outcome"] == "FOSSILIZED"]
    assert sorted(fossil["seed_id"] for fossil in lineage["fossils"]) == sorted(kept)
    assert growth["params"]["added"] == sum(fossil["params"] for fossil in lineage["fossils"])
    assert all(said["text"] in printed for said in growth["explanations"])
    page = (shown.folder / "report.html").read_text(encoding="utf-8")
    assert (
        all(report["blueprint_id"] in page for report in reports) and (shown.folder / "twin" / "growth.json").exists()
    )


CHECKS: dict[str, tuple[Callable[[Shown], None], str]] = {
    "grow_your_own_model": (check_tutorial, "notebook"),
    "read_the_evidence": (check_evidence, "evidence"),
    "watch_a_network_grow": (check_watching, "watch"),
    "write_a_blueprint": (check_blueprint_of_ones_own, "blueprint"),
}
"""What must hold of each notebook, and the folder below outputs/ that it writes to."""


def executed(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a notebook with the folder as its own; return a copy of the file with its outputs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(notebook, kernel_name="python3", timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    nbformat.write(notebook, folder / file.name)
    return folder / file.name
