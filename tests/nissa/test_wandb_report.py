"""`esper report --wandb`: what it refuses, and what it sends to a service that this machine plays."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esper.leyline.errors import ConfigError
from esper.nissa.page.runs import read_run
from esper.nissa.page.story import paragraph
from esper.nissa.summary import verdict
from esper.nissa.wandb.place import Place
from esper.nissa.wandb.report import adaptations, lineage, send_report
from tests.nissa.pages import run_folder
from tests.nissa.stories import story
from tests.nissa.wandb_service import Service, service


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run and its twin, both logged offline."""
    made = run_folder(tmp_path / "run", story(), report={"loss": 2.0, "samples": None})
    twin = run_folder(made / "twin", story(lives=0), report={"loss": 2.1, "samples": None})
    Place("", "esper", "grown001", offline=True, files="wandb/offline-run-1-grown001").write(made)
    Place("", "esper", "twin0001", offline=True, files="wandb/offline-run-2-twin0001").write(twin)
    return made


def esper(answers: Service, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the command against a service of this machine; W&B keeps state in the process that uses it."""
    environment = os.environ | {"WANDB_BASE_URL": answers.url, "WANDB_API_KEY": "0" * 40, "WANDB_HTTP_TIMEOUT": "60"}
    environment |= {"WANDB_ERROR_REPORTING": "false", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    command = [sys.executable, "-c", "import sys; from esper.cli import main; sys.exit(main())", "report", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def texts(block: dict[str, Any]) -> str:
    """Everything that is written in a block."""
    return block.get("text", "") + block.get("content", "") + "".join(map(texts, block.get("children", [])))


def test_without_a_key_it_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(folder / "none"))
    with pytest.raises(ConfigError, match="set WANDB_API_KEY or run `wandb login`"):
        send_report([folder])


def test_a_run_that_wandb_never_saw(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no wandb.json.*train with logger=wandb"):
        send_report([run_folder(tmp_path / "run", story())])


def test_markdown_of_a_run(folder: Path) -> None:
    run = read_run(folder)
    head, rule, won, lost = adaptations(run).splitlines()
    assert {line.count("|") for line in (head, rule, won, lost)} == {9}
    assert won.startswith("| blocks.0.ffn#0.0 | BP-MLP-GELU | fossilized (gate passed) | .100 | .080 to .120 |")
    assert "| culled (outcompeted) | -.0010 |" in lost
    assert "BP-MLP-GELU at `blocks.0.ffn#0.0`: 500 parameters" in lineage(run)
    nothing = run._replace(chronicle=story(lives=0), lineage={})
    assert adaptations(nothing) == "Nothing was tried." and "nothing was kept" in lineage(nothing)


@pytest.mark.slow
def test_the_report_that_is_sent(folder: Path) -> None:
    with service("grown001", "twin0001") as answers:
        done = esper(answers, str(folder), "--wandb", "--project", "elsewhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(f"{answers.url}/ada/elsewhere/reports/digits--")
    (sent,) = answers.of("upsertView")
    assert (sent["entityName"], sent["projectName"], sent["displayName"]) == ("ada", "elsewhere", "digits")
    run, blocks = read_run(folder), json.loads(sent["spec"])["blocks"]
    written = [texts(block) for block in blocks]
    for part in (paragraph(run), verdict(*run.results()), adaptations(run), lineage(run)):
        assert part in written
    (grid,) = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    (runs,) = grid["runSets"]
    assert runs["filters"]["filters"][0]["key"]["name"] == "name"
    assert runs["filters"]["filters"][0]["value"] == ["grown001", "twin0001"]
    metrics = [panel["config"]["metrics"] for panel in grid["panelBankSectionConfig"]["panels"]]
    assert metrics == [["esper/decision_loss"], ["esper/added_params"], ["train_loss"], ["growth/report_loss"]]


@pytest.mark.slow
def test_a_run_that_was_never_sent(folder: Path) -> None:
    with service("grown001") as answers:
        done = esper(answers, str(folder), "--wandb", "--entity", "team")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "W&B has no run team/esper/twin0001" in done.stderr
    assert f"wandb sync {folder / 'twin/wandb/offline-run-2-twin0001'}" in done.stderr
    assert not answers.of("upsertView")
