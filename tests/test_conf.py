"""Every file under conf/ composes, lists exactly what its constructor takes, and runs."""

from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import esper
from esper.forge.client import Forge
from esper.kasmina.config import PRESETS, KasminaConfig
from esper.nissa.callback import GrowthReport
from esper.run import EsperCLI, run
from esper.tamiyo.config import TamiyoConfig
from tests.hf_models import llama, mixtral, saved, text, tokenizer

CONF = Path(__file__).parents[1] / "conf"
GROUPS = {group: sorted(f.stem for f in (CONF / group).glob("*.yaml")) for group in ("model", "data", "tamiyo")}
GROUPS |= {
    group: sorted(f.stem for f in (CONF / group).glob("*.yaml")) for group in ("kasmina", "forge", "trainer", "logger")
}
EXPERIMENTS = sorted(f.stem for f in (CONF / "experiment").glob("*.yaml"))
SPECS = sorted(f for group in ("model", "data", "logger") for f in (CONF / group).glob("*.yaml") if f.stem != "none")

TINY_TEXT = [
    "data.init_args.context=16",
    "data.init_args.batch_size=2",
    "data.init_args.decision_windows=2",
    "data.init_args.report_windows=2",
    "model.init_args.network.init_args.d_model=8",
    "model.init_args.network.init_args.context=16",
]
TEACHER = "model.init_args.task.init_args.teacher.init_args"
TINY = {
    "bytelm": TINY_TEXT,
    "moe_distill": [
        *TINY_TEXT,
        f"{TEACHER}.steps=2",
        f"{TEACHER}.network.init_args.d_model=8",
        f"{TEACHER}.network.init_args.ffn=8",
        f"{TEACHER}.network.init_args.context=16",
    ],
}


def pretrained(folder: Path) -> list[str]:
    """A teacher, a student and a text, in the files that the experiment reads."""
    tokens = tokenizer()
    for role, model in (("teacher", llama(len(tokens), 16)), ("student", mixtral(len(tokens), 16))):
        saved(folder / role, model, tokens)
    (folder / "own.txt").write_text(text(200_000), encoding="utf-8")
    names = [f"model.{role}={folder / role}" for role in ("teacher", "student")]
    return [*names, f"data.path={folder / 'own.txt'}", "data.init_args.report_windows=8"]


def composed(*overrides: str, folder: Path) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"output_dir={folder}", *overrides])
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return plain


def keys_of(target: Any) -> set[str]:
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {name for name, p in signature(target).parameters.items() if p.kind in kinds}


def specs_in(value: Any) -> list[dict[str, Any]]:
    """Return every class_path with its init_args, at any depth."""
    if isinstance(value, list):
        return [spec for item in value for spec in specs_in(item)]
    if not isinstance(value, dict):
        return []
    inner = [spec for item in value.values() for spec in specs_in(item)]
    return [value, *inner] if "class_path" in value else inner


def check_spec(spec: dict[str, Any]) -> None:
    module, _, name = spec["class_path"].rpartition(".")
    assert module.partition(".")[0] in ("esper", "torch", "lightning")
    given, allowed = set(spec.get("init_args", {})), keys_of(getattr(import_module(module), name))
    assert given == allowed if module.startswith("esper") else given <= allowed, name


@pytest.mark.parametrize("file", SPECS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_one_file_is_one_constructor(file: Path) -> None:
    specs = specs_in(yaml.safe_load(file.read_text(encoding="utf-8")))
    assert specs
    for spec in specs:
        check_spec(spec)


@pytest.mark.parametrize("name", GROUPS["tamiyo"])
def test_tamiyo_lists_every_setting_once(name: str) -> None:
    config = yaml.safe_load((CONF / "tamiyo" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert set(config) == keys_of(esper.Tamiyo)
    # The policy is the callback's own argument; a second one under `settings` could contradict it.
    assert set(config["settings"]) == set(TamiyoConfig.model_fields) - {"policy"}
    assert config["policy"] == name


@pytest.mark.parametrize("name", GROUPS["kasmina"])
def test_kasmina_spells_its_preset_out(name: str) -> None:
    config = yaml.safe_load((CONF / "kasmina" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert set(config) == set(KasminaConfig.model_fields)
    assert KasminaConfig.of(config) == KasminaConfig.of({"preset": name})
    assert name in PRESETS


@pytest.mark.parametrize("name", GROUPS["trainer"])
def test_trainer_lists_every_argument(name: str) -> None:
    from lightning.pytorch import Trainer

    assert set(yaml.safe_load((CONF / "trainer" / f"{name}.yaml").read_text(encoding="utf-8"))) == keys_of(Trainer)


@pytest.mark.parametrize("name", GROUPS["forge"])
def test_forge_lists_every_argument(name: str) -> None:
    assert set(yaml.safe_load((CONF / "forge" / f"{name}.yaml").read_text(encoding="utf-8"))) == keys_of(Forge)


def test_nissa_lists_every_argument() -> None:
    assert set(yaml.safe_load((CONF / "nissa/report.yaml").read_text(encoding="utf-8"))) == keys_of(GrowthReport)


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, names in GROUPS.items() for n in names])
def test_every_option_composes_to_a_known_section(group: str, name: str, tmp_path: Path) -> None:
    config = composed(f"{group}={name}", folder=tmp_path)
    assert set(config) == {
        *("seed_everything", "threads", "compare", "resume", "ckpt_path", "output_dir"),
        *("model", "data", "tamiyo", "nissa", "forge", "trainer"),
    }


def test_experiments_can_be_added_with_a_plus(tmp_path: Path) -> None:
    text = (CONF / "train.yaml").read_text(encoding="utf-8")
    assert not any("experiment" in item for item in yaml.safe_load(text)["defaults"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_lab_book(name: str, tmp_path: Path) -> None:
    assert f"+experiment={name}" in (CONF.parent / "experiments" / name / "README.md").read_text(encoding="utf-8")
    assert composed(f"+experiment={name}", folder=tmp_path)["nissa"]["title"] == name


def test_what_the_messages_of_moe_distill_hf_advise_can_be_given(tmp_path: Path) -> None:
    given = ["model.start=config", "data.tokenizer=teacher", "model.teacher=teacher", "model.student=student"]
    config = composed("+experiment=moe_distill_hf", *given, folder=tmp_path)
    assert config["model"]["init_args"]["start"] == "config"
    assert config["data"]["init_args"]["tokenizer"] == "teacher"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_one_batch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fast = ["trainer.fast_dev_run=1", "compare=false", "trainer.enable_progress_bar=false"]
    tiny = TINY.get(name, []) + (pretrained(tmp_path) if name == "moe_distill_hf" else [])
    config = composed(f"+experiment={name}", *fast, *tiny, folder=tmp_path / "run")
    outcome = run(config)
    assert outcome.grown.title == name
    assert outcome.grown.report_loss is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["csv", "tensorboard", "none"])
def test_every_offline_logger_is_built(name: str, tmp_path: Path) -> None:
    config = composed(f"logger={name}", "trainer.max_steps=1", "trainer.limit_val_batches=1", folder=tmp_path)
    built = EsperCLI(
        {"subcommand": "fit", "fit": config | {"tamiyo": config["tamiyo"] | {"policy": "off"}}}, tell=False
    )
    assert len(built.trainer.loggers) == (name != "none")


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS["tamiyo"])
@pytest.mark.parametrize("kasmina", GROUPS["kasmina"])
def test_every_policy_runs_with_every_preset(name: str, kasmina: str, tmp_path: Path) -> None:
    quick = ["trainer.max_steps=100", "trainer.enable_progress_bar=false", "logger=none"]
    outcome = run(composed(f"tamiyo={name}", f"kasmina={kasmina}", *quick, folder=tmp_path))
    assert outcome.grown.steps == 100
