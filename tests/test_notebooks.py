"""The notebooks run from top to bottom, and are kept without outputs."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def cells(file: Path, kind: str) -> list[Any]:
    return [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == kind]


def test_there_is_a_tutorial() -> None:
    assert "grow_your_own_model.ipynb" in [file.name for file in NOTEBOOKS]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_no_output_is_kept_and_every_cell_is_short(file: Path) -> None:
    nbformat.validate(nbformat.read(file, as_version=4))
    assert file.name in README
    for cell in cells(file, "code"):
        assert not cell.outputs and cell.execution_count is None
        assert len(cell.source.splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_in_a_fresh_kernel(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = executed(file, tmp_path, monkeypatch)
    outputs = [output for cell in cells(done, "code") for output in cell.outputs]
    printed = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
    assert "1,358 host + " in printed and "What was tried" in printed
    assert "largest difference" in printed
    assert printed.count("95 % interval") == 2
    check_outcome(printed, tmp_path / "outputs" / "notebook")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


def check_outcome(printed: str, run: Path) -> None:
    """Check that growth was tried and judged, and that the notebook shows what came of it, kept or not."""
    reports = [json.loads(line) for line in (run / "fieldreports.jsonl").read_text(encoding="utf-8").splitlines()]
    outcomes = [report["outcome"] for report in reports]
    kept = [report["blueprint_id"] for report in reports if report["outcome"] == "FOSSILIZED"]
    assert outcomes and set(outcomes) <= {"FOSSILIZED", "CULLED"}
    table = printed[printed.index("What was tried") :]
    assert table.count("FOSSILIZED") == len(kept) and table.count("CULLED") == len(outcomes) - len(kept)
    assert all(blueprint in table for blueprint in kept)
    assert ("1,358 host + 0 grown" in printed) is not bool(kept)


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
