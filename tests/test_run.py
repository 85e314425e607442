"""One run from one configuration, the twin, sweeps, and what a user is told when something is wrong."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel

import esper
from esper.leyline.errors import ConfigError, OutputError
from esper.run import CONFIG_FILE, EsperCLI, run, twin_of

ROOT = Path(__file__).parents[1]


def digits(folder: Path, **trainer: Any) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "threads": 1,
        "output_dir": str(folder),
        "model": {
            "class_path": "esper.tolaria.module.TolariaModule",
            "init_args": {
                "network": {"class_path": "esper.models.MLP", "init_args": {"widths": [64, 16, 4, 16, 10]}},
                "task": {"class_path": "esper.tolaria.tasks.Classification"},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
            },
        },
        "data": {"class_path": "esper.data.Digits"},
        "tamiyo": {
            "targets": ["layers.2"],
            "kasmina": {"ramp_steps": 5, "stabilization_steps": 10},
            "settings": {"start": 18, "budget": 600, "proxy": 120, "menu": ["BP-MLP-GELU", "BP-WIDEN"]},
        },
        "nissa": {"title": "tiny"},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 120,
            "logger": {"class_path": "esper.nissa.loggers.csv_logger", "init_args": {"save_dir": str(folder)}},
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **trainer,
        },
    }


def test_run_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    outcome = run(digits(folder) | {"compare": True})
    grown, twin = outcome.grown, outcome.twin
    assert twin is not None
    assert grown.grafts and not twin.grafts
    assert twin.added_params == 0 and twin.steps == grown.steps == 120
    assert grown.report_samples and twin.report_samples and len(grown.report_samples) == 299
    printed = capsys.readouterr().out
    assert "What it came to" in printed and "without" in printed
    for place in (folder, folder / "twin"):
        left = {file.name for file in place.iterdir()}
        assert {"config.yaml", "events.jsonl", "growth.png", "growth.json", "lineage.json", "model", "csv"} <= left
    assert (folder / "report.html").is_file() and "report.html" in "".join(printed.split())
    assert not (folder / "twin" / "twin").exists()


def test_the_file_a_run_leaves_repeats_it(tmp_path: Path) -> None:
    first = run(digits(tmp_path / "a", max_steps=40))
    saved = yaml.safe_load((tmp_path / "a" / CONFIG_FILE).read_text())
    assert run(saved | {"output_dir": str(tmp_path / "a")}).grown.report_samples == first.grown.report_samples


def test_without_growth_the_twin_is_the_run(tmp_path: Path) -> None:
    config = digits(tmp_path, max_steps=30)
    config["tamiyo"]["policy"] = "off"
    outcome = run(config | {"compare": True})
    assert outcome.twin is not None
    assert outcome.grown.report_samples == outcome.twin.report_samples


def test_twin_moves_what_lies_under_the_run_and_nothing_else() -> None:
    config = {"output_dir": "out/a", "compare": True, "tamiyo": {"policy": "random", "output_dir": "out/a"}}
    twin = twin_of(config | {"data": {"root": "out/ab", "list": ["out/a/x", 3, None]}})
    assert twin["output_dir"] == twin["tamiyo"]["output_dir"] == "out/a/twin"
    assert twin["data"] == {"root": "out/ab", "list": ["out/a/twin/x", 3, None]}
    assert twin["tamiyo"]["policy"] == "off" and twin["compare"] is False


def test_a_users_own_module_runs_without_a_data_module(tmp_path: Path) -> None:
    config = digits(tmp_path, max_steps=4, limit_val_batches=2, limit_test_batches=2)
    del config["data"], config["tamiyo"]["targets"]
    config["model"] = {"class_path": f"{BoringModel.__module__}.{BoringModel.__name__}"}
    config["trainer"]["logger"] = False
    assert run(config).grown.steps == 4


def test_unknown_key_names_the_near_miss(tmp_path: Path) -> None:
    config = digits(tmp_path)
    config["trainer"]["max_step"] = 3
    with pytest.raises(ConfigError, match=r"unknown key 'trainer.max_step'; did you mean 'max_steps'\?"):
        run(config)


def test_unwritable_folder_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another output folder"):
        run(digits(tmp_path / "file" / "run"))


def test_wandb_online_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    logger = {"class_path": "esper.nissa.loggers.wandb_logger", "init_args": {"online": True}}
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        run(digits(tmp_path, logger=logger))


@pytest.mark.slow
def test_the_bar_shows_seeds_unless_another_is_given(tmp_path: Path) -> None:
    config = digits(tmp_path, fast_dev_run=1, enable_progress_bar=True)
    made = EsperCLI({"subcommand": "fit", "fit": config}, tell=False)
    assert type(made.trainer.progress_bar_callback).__name__ == "GrowthProgress"
    config["trainer"]["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}]
    made = EsperCLI({"subcommand": "fit", "fit": config}, tell=False)
    assert type(made.trainer.progress_bar_callback).__name__ == "TQDMProgressBar"


def train(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *args]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_one_failing_sweep_point_fails_alone(tmp_path: Path) -> None:
    fast = ["trainer.fast_dev_run=1", "hydra.sweep.dir=sweep", "hydra.launcher.n_jobs=1"]
    done = train(tmp_path, "-m", "+experiment=quickstart", *fast, "tamiyo.settings.proxy=-1,120", "compare=false")
    assert done.returncode == 2, done.stderr
    assert "FAILED" in done.stdout + done.stderr and "proxy=-1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "sweep/0/lineage.json").exists()
    assert (tmp_path / "sweep/1/lineage.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.max_step=3", "unknown key 'trainer.max_step'; did you mean 'max_steps'?"),
        ("tamyo=off", "did you mean 'tamiyo'?"),
        ("+experiment=quickstar", "Did you mean 'quickstart'?"),
    ],
)
def test_hydra_names_the_near_miss(override: str, expected: str, tmp_path: Path) -> None:
    done = train(tmp_path, override)
    assert done.returncode == 2
    assert expected in done.stderr and "Traceback" not in done.stderr


def test_what_a_run_saved_loads_without_its_training_code(tmp_path: Path) -> None:
    run(digits(tmp_path))
    loaded = esper.load_model(tmp_path / "model")
    assert type(loaded.host).__name__ == "MLP"
    assert loaded(torch.zeros(2, 64)).shape == (2, 10)
