"""Which experiment is benched, and that it is prepared alike for every arm."""

from pathlib import Path

import pytest
import yaml

from esper.bench.experiment import OUTPUT, from_conf, from_file, tasks
from esper.bench.growth_command import experiments
from esper.config import moved
from esper.leyline.errors import ConfigError
from tests.bench.samples import digits

ROOT = Path(__file__).parents[2]
NAMES = sorted(file.stem for file in (ROOT / "conf/bench").glob("*.yaml"))


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", NAMES)
def test_the_wide_net_is_as_large_as_growth_may_make_the_host(name: str) -> None:
    from esper.blueprints import load_library
    from esper.models.flops import parameter_count

    experiment = from_conf([f"+experiment={name}"])
    host, wide = experiment.config(0), experiment.wide(0)
    assert wide is not None and wide["data"] == host["data"] and wide["tamiyo"] == host["tamiyo"]
    sizes = [parameter_count(network(config)) for config in (host, wide)]
    budget = host["tamiyo"]["settings"]["budget"]
    assert 0.95 * budget < sizes[1] - sizes[0] <= budget
    load_library()[experiment.comparison.schedule]


def test_a_row_runs_alone_and_a_seed_is_everywhere() -> None:
    config = from_conf(["+experiment=quickstart", "trainer.max_steps=7"]).config(3)
    assert (config["seed_everything"], config["data"]["init_args"]["seed"]) == (3, 3)
    assert config["tamiyo"]["settings"]["seed"] == 3 and config["trainer"]["max_steps"] == 7
    assert (config["compare"], config["threads"], config["forge"]) == (False, 1, {"enabled": False})
    assert config["output_dir"] == config["nissa"]["output_dir"] == config["tamiyo"]["output_dir"] == OUTPUT
    assert config["trainer"]["callbacks"] is None and config["trainer"]["logger"] is False


def test_a_configuration_of_fit_is_the_same_wherever_its_run_was(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(moved(digits(), "outputs/digits", str(tmp_path / name))))
    first, second = (from_file(tmp_path / f"{name}.yaml", ["trainer.max_steps=9"]) for name in ("a", "b"))
    assert first.name == "tiny" and first.config(4) == second.config(4) and first.wide(4) is None
    assert first.config(4)["data"]["init_args"]["seed"] == 4 and first.config(4)["trainer"]["max_steps"] == 9


def test_letters_name_tasks() -> None:
    assert tasks() == {"A": "spirals", "B": "quickstart", "C": "bytelm", "D": "moe_distill"} | {
        "V1": "digits_cnn",
        "V2": "shapes",
    }
    assert [e.name for e in experiments(None, ["C", "V2", "trainer.max_steps=3"])] == ["bytelm", "shapes"]
    assert [e.name for e in experiments(None, [])] == ["spirals", "quickstart", "bytelm", "moe_distill"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["Z"], r"no task 'Z'; the tasks here are A \(spirals\)"),
        (["A", "+experiment=quickstart"], "not both"),
    ],
)
def test_what_is_no_experiment_is_told(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        list(experiments(None, given))


def test_without_conf_a_file_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no conf/train.yaml here.*--config"):
        list(experiments(None, ["+experiment=quickstart"]))
    with pytest.raises(ConfigError, match="name what to bench"):
        list(experiments(None, []))
    (tmp_path / "half.yaml").write_text("model: {}")
    with pytest.raises(ConfigError, match="no model and trainer"):
        list(experiments(tmp_path / "half.yaml", []))


def network(config: dict[str, object]) -> object:
    from importlib import import_module

    model = config["model"]
    assert isinstance(model, dict)
    spec = model["init_args"]["network"]
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**spec["init_args"])
