"""The command line, as a user types it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import esper
from esper.blueprints import load_library
from esper.cli import TRAINER_COMMANDS, main
from esper.console import config_error, message_of, plain_errors
from esper.run import EsperCLI

QUICK: dict[str, Any] = {
    "threads": 1,
    "model": {
        "class_path": "TolariaModule",
        "init_args": {
            "network": {"class_path": "esper.models.MLP", "init_args": {"widths": [64, 8, 10]}},
            "task": {"class_path": "esper.tolaria.tasks.Classification"},
        },
    },
    "data": {"class_path": "Digits"},
    "tamiyo": {"kasmina": {"preset": "strict"}},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 20,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(QUICK | {"output_dir": str(tmp_path / "run")}))
    return path


def failure(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_blueprints_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blueprints"]) == 0
    table = capsys.readouterr().out
    assert all(blueprint.ir.name in table for blueprint in load_library())
    assert main(["blueprints", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["id"] for record in records] == [blueprint.ir.id for blueprint in load_library()]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*TRAINER_COMMANDS, "blueprints"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == esper.__version__
    assert set(TRAINER_COMMANDS) == set(EsperCLI.subcommands())


def test_unknown_command_names_the_near_miss(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'fit'?" in failure(capsys, "fitt")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--trainer.max_step", "3"], "unknown key 'trainer.max_step'; did you mean 'max_steps'?"),
        (["--tamiyo.polcy", "off"], "did you mean 'policy'?"),
        (["--outputdir", "x"], "did you mean 'output_dir'?"),
        (["--model.init_args.floors", "1"], "did you mean 'floor'?"),
        (["--tamiyo.kasmina.ramp_step", "3"], "did you mean 'ramp_steps'?"),
        (["--tamiyo.settings.bugdet", "3"], "did you mean 'budget'?"),
        (["--trainer.max_steps", "many"], "trainer.max_steps"),
        (["--data", "esper.data.Digitss"], "Digitss"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--output_dir", "/dev/null/run"], "cannot write to /dev/null/run"),
    ],
)
def test_what_is_not_accepted(args: list[str], expected: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in failure(capsys, "fit", "--config", str(file), *args)


def test_a_bare_off_in_yaml_gets_a_hint(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(file.read_text() + "\ncompare: false\n")
    file.write_text(file.read_text().replace("tamiyo:", "tamiyo:\n  policy: off"))
    assert 'quote it, "off"' in failure(capsys, "fit", "--config", str(file))


def test_fit_then_test_from_what_the_run_left(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(file), "--tamiyo.policy", "off"]) == 0
    assert "What it came to" in capsys.readouterr().out
    left = file.parent / "run" / "config.yaml"
    saved = yaml.safe_load(left.read_text())
    assert saved["tamiyo"]["policy"] == "off"
    assert saved["tamiyo"]["kasmina"] == {"preset": "strict"}
    assert main(["test", "--config", str(left)]) == 0
    assert "report_loss" in capsys.readouterr().out


def test_a_class_of_the_users_own_lies_beside_the_configuration(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "from esper.tolaria.module import TolariaModule\n\n\nclass OfMyOwn(TolariaModule):\n    pass\n"
    (file.parent / "written_by_a_user.py").write_text(own)
    file.write_text(file.read_text().replace("class_path: TolariaModule", "class_path: written_by_a_user.OfMyOwn"))
    monkeypatch.chdir(file.parent)
    before = list(sys.path)
    try:
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(file), "--print_config"])
    finally:
        sys.modules.pop("written_by_a_user", None)
    assert stop.value.code == 0
    assert "class_path: written_by_a_user.OfMyOwn" in capsys.readouterr().out
    assert sys.path == before


def test_a_preset_is_not_overruled_by_defaults(file: Path) -> None:
    made = EsperCLI(["fit", "--config", str(file)], tell=False)
    assert made.config_init["fit"].tamiyo.kasmina.training_steps == 100


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError), plain_errors():
        raise KeyError("ours")
    monkeypatch.setenv("ESPER_TRACEBACK", "1")
    with pytest.raises(esper.EsperError), plain_errors():
        raise config_error("Expected a <class 'int'>. Got value: x", [])


def test_a_path_that_cannot_be_read_is_named() -> None:
    assert message_of(PermissionError(13, "Permission denied", "/a/b")) == (
        "/a/b: Permission denied; choose a path that can be read and written."
    )
    assert message_of(RuntimeError("ours")) is None
