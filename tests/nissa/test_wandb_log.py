"""What W&B holds of a run after its end: read back from the files that an offline run writes."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esper.nissa.page.runs import read_run
from esper.nissa.summary import verdict
from tests.test_run import digits

PROGRAM = Path(__file__).with_name("wandb_offline.py")
ROOT = PROGRAM.parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wandb") / "run"


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    config = digits(folder) | {"compare": True}
    config["trainer"]["logger"] = {
        "class_path": "esper.nissa.loggers.wandb_logger",
        "init_args": {"save_dir": str(folder), "group": "tiny"},
    }
    source, target = folder.with_name("config.json"), folder.with_name("told.json")
    source.write_text(json.dumps(config))
    own = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache", "WANDB_CONFIG_DIR": "config"}
    environment = os.environ | {name: str(folder.with_name(place)) for name, place in own.items()}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "OMP_NUM_THREADS": "1"}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(source), str(target)],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def table(run: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The rows of a table that was logged once."""
    (path,) = [step[f"growth/{key}/path"] for step in run["history"] if f"growth/{key}/path" in step]
    read = json.loads(run["media"][path])
    return [dict(zip(read["columns"], row, strict=True)) for row in read["data"]]


def test_tables_hold_what_was_tried_and_decided(told: dict[str, Any], folder: Path) -> None:
    growth = json.loads((folder / "growth.json").read_text())
    kept = {
        fossil["seed_id"]: fossil["kernel_id"]
        for fossil in json.loads((folder / "lineage.json").read_text())["fossils"]
    }
    rows = table(told["run"], "tried")
    assert rows and [{key: row[key] for key in row if key != "kernel_id"} for row in rows] == growth["grafts"]
    assert {row["seed_id"]: row["kernel_id"] for row in rows if row["outcome"] == "FOSSILIZED"} == kept
    said = [(row["step"], row["explanation"]) for row in table(told["run"], "decisions")]
    assert said == [(told["step"], told["text"]) for told in growth["explanations"]]
    assert any("BP-" in row["chosen"] for row in table(told["run"], "decisions"))


def test_charts_of_gains_alphas_and_parameters(told: dict[str, Any], folder: Path) -> None:
    growth = json.loads((folder / "growth.json").read_text())
    run = told["run"]
    lines = [(row["lineKey"], row["step"], row["lineVal"]) for row in table(run, "alphas_table")]
    assert lines == [(seed, *point) for seed, ramp in growth["alphas"].items() for point in ramp["points"]]
    added = [[row["step"], row["lineVal"]] for row in table(run, "parameters_table") if row["lineKey"] == "added"]
    assert added == growth["added_params"]
    wide = {row["kind"]: row["loss"] for row in table(run, "gain_by_kind_table")}
    (line,) = [line for line in growth["grafts"] if line["blueprint"] == "BP-WIDEN"]
    assert wide["BP-WIDEN: gain"] == line["gain"] and wide["BP-WIDEN: price"] == line["price"]
    assert run["charts"] == {
        "growth/gain_by_kind": "wandb/bar/v0",
        "growth/alphas": "wandb/lineseries/v0",
        "growth/parameters": "wandb/lineseries/v0",
    }


def test_page_picture_and_numbers_know_the_twin(told: dict[str, Any], folder: Path) -> None:
    run, story = told["run"], read_run(folder)
    last, summary = run["history"][-1], run["summary"]
    assert "without growth" in run["media"][last["growth/page/path"]]
    assert last["growth/picture/sha256"] == hashlib.sha256((folder / "growth.png").read_bytes()).hexdigest()
    assert summary["growth/verdict"] == verdict(*story.results())
    assert summary["growth/report_loss"] == story.report_loss
    assert summary["growth/report_loss_without_growth"] == story.twin_report_loss
    assert summary["growth/params_before"] == 1358
    assert summary["growth/params_added"] == story.chronicle.added_params > 0
    assert summary["growth/search_share"] == story.chronicle.search_share
    gain = story.twin_report_loss - story.report_loss  # type: ignore[operator]
    assert summary["growth/paired_gain"] == pytest.approx(gain)
    assert summary["growth/paired_gain_lower"] < gain < summary["growth/paired_gain_upper"]


def test_the_model_is_an_artifact_with_its_lineage(told: dict[str, Any], folder: Path) -> None:
    (model,) = [artifact for artifact in told["run"]["artifacts"] if artifact["type"] == "model"]
    assert {"lineage.json", "growth.json", "topology.json", "weights.safetensors"} <= set(model["files"])
    known = model["metadata"]
    assert known["kept"] == json.loads((folder / "lineage.json").read_text())["fossils"] != []
    assert known["weights_sha256"] == hashlib.sha256((folder / "model/weights.safetensors").read_bytes()).hexdigest()
    assert known["parents"]["host"]["class"] == "esper.models.mlp.MLP"
    assert known["parents"]["run_without_growth"] == json.loads((folder / "twin/wandb.json").read_text())["id"]


def test_the_twin_is_a_run_of_its_own_in_the_same_group(told: dict[str, Any], folder: Path) -> None:
    run, twin, place = told["run"], told["twin"], told["place"]
    assert (run["name"], twin["name"]) == ("tiny", "tiny, without growth")
    assert run["group"] == twin["group"] == "tiny"
    assert twin["summary"]["growth/policy"] == "off" and "growth/tried/path" not in twin["summary"]
    assert place["offline"] and place["project"] == "esper" and place["told"]
    assert (folder / place["files"] / f"run-{place['id']}.wandb").is_file()


def test_what_wandb_does_not_take_is_one_warning(told: dict[str, Any]) -> None:
    (warning,) = told["gone"]
    assert warning.startswith("Esper: W&B did not take ") and warning.endswith("The run's folder has everything.")
    assert all(part in warning for part in ("growth/tried", "growth/page", "the summary", "the model"))


def test_nothing_is_told_twice(told: dict[str, Any]) -> None:
    assert told["missed"] == [[], []]
    assert len(told["again"]["history"]) == 1
    assert len([artifact for artifact in told["again"]["artifacts"] if artifact["type"] == "model"]) == 1
