"""Which experiment is benched: composed from `./conf` as train.py does, or the configuration of `esper fit`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from esper.bench.arms import Config
from esper.config import Settings, moved, read_yaml
from esper.leyline.errors import ConfigError

OUTPUT: Final = "__output__"
"""Stands for the folder of a run until it is known, so that a row does not depend on where it was made."""

_CONF: Final = Path("conf")
_PLUS: Final = "+experiment="


class Comparison(Settings):
    """What `conf/bench/NAME.yaml` says of an experiment.

    Args:
        task: letter of the task in the benchmark of growth; empty for none.
        wide: Hydra overrides that make the static net of the size that growth may reach.
        schedule: kind that the arm `schedule` plants; empty takes a general one.
    """

    task: str = ""
    wide: tuple[str, ...] = ()
    schedule: str = ""


@dataclass(frozen=True)
class Experiment:
    """An experiment that can be run with any seed.

    Args:
        name: of its folder.
        compose: returns its configuration for a seed, with further Hydra overrides.
        comparison: what it is compared with.
    """

    name: str
    compose: Callable[[int, Sequence[str]], Config]
    comparison: Comparison = Comparison()

    def config(self, seed: int) -> Config:
        """Return the configuration of one run with a seed."""
        return prepared(self.compose(seed, ()))

    def wide(self, seed: int) -> Config | None:
        """Return the same with the static wide net; None where nobody has said what that is."""
        return prepared(self.compose(seed, self.comparison.wide)) if self.comparison.wide else None


def prepared(config: Config) -> Config:
    """Return a configuration as every row runs it: alone, on one thread, on eager kernels, without files it can spare.

    A forge would make a row depend on what was compiled before it.
    """
    there: Config = moved(config, str(config.get("output_dir", OUTPUT)), OUTPUT)
    trainer = there.get("trainer") or {}
    given = trainer.get("callbacks") or []
    callbacks = [c for c in (given if isinstance(given, list) else [given]) if not _saves(c)]
    alone = {"compare": False, "resume": None, "threads": 1, "output_dir": OUTPUT, "forge": {"enabled": False}}
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    spared = {key: value for key, value in there.items() if key != "ckpt_path"}
    return spared | alone | {"trainer": trainer | silent | {"callbacks": callbacks or None}}


def _saves(callback: Any) -> bool:
    return isinstance(callback, dict) and str(callback.get("class_path", "")).endswith("ModelCheckpoint")


# --- from ./conf ----------------------------------------------------------------------------------------------------


def from_conf(overrides: Sequence[str]) -> Experiment:
    """Return the experiment that Hydra overrides compose from `./conf`, as `python train.py` would.

    Raises:
        ConfigError: there is no `./conf/train.yaml`.
    """
    if not (_CONF / "train.yaml").is_file():
        raise ConfigError(
            "there is no conf/train.yaml here; go to the folder that has it, or give --config with a configuration "
            "of `esper fit`, such as the config.yaml that a run leaves in its folder."
        )
    named = next((o.removeprefix(_PLUS) for o in overrides if o.startswith(_PLUS)), None)

    def compose(seed: int, further: Sequence[str]) -> Config:
        return _composed([*overrides, *further, f"seed_everything={seed}", f"output_dir={OUTPUT}"])

    name = named or str((compose(0, ()).get("nissa") or {}).get("title") or "run")
    return Experiment(_as_folder(name), compose, comparison_of(name))


def _composed(overrides: Sequence[str]) -> Config:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(_CONF.resolve()), version_base="1.3"):
        plain = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def comparison_of(name: str) -> Comparison:
    """Return what `conf/bench/NAME.yaml` says; nothing where there is no such file.

    Raises:
        ConfigError: it is malformed.
    """
    file = _CONF / "bench" / f"{name}.yaml"
    return Comparison.of(read_yaml(file)) if file.is_file() else Comparison()


def tasks() -> dict[str, str]:
    """Return the experiment of each letter, in the order of the letters."""
    letters = ((comparison_of(file.stem).task, file.stem) for file in (_CONF / "bench").glob("*.yaml"))
    return dict(sorted((letter, name) for letter, name in letters if letter))


def _as_folder(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"


# --- from a file ----------------------------------------------------------------------------------------------------


def from_file(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment of a configuration of `esper fit`; overrides are `key=value` with dots.

    Raises:
        ConfigError: the file cannot be read, or is no configuration.
    """
    content = read_yaml(path)
    if not {"model", "trainer"} <= content.keys():
        raise ConfigError(f"{path} has no model and trainer; give a configuration of `esper fit`.")

    def compose(seed: int, further: Sequence[str]) -> Config:
        return with_seed(_overridden(content, [*overrides, *further]), seed)

    title = (content.get("nissa") or {}).get("title")
    return Experiment(_as_folder(str(title or Path(path).stem)), compose)


def _overridden(content: Config, overrides: Sequence[str]) -> Config:
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(content, OmegaConf.from_dotlist(list(overrides)))
    plain = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def with_seed(config: Config, seed: int) -> Config:
    """Return a configuration with a seed in every place that has one.

    Example:
        >>> with_seed({"seed_everything": 9, "data": {"init_args": {"seed": 9}}, "tamiyo": {"settings": {}}}, 1)
        {'seed_everything': 1, 'data': {'init_args': {'seed': 1}}, 'tamiyo': {'settings': {'seed': 1}}}
    """
    there = config | {"seed_everything": seed}
    data, tamiyo = config.get("data"), config.get("tamiyo") or {}
    if isinstance(data, dict) and "seed" in (data.get("init_args") or {}):
        there |= {"data": data | {"init_args": data["init_args"] | {"seed": seed}}}
    return there | {"tamiyo": tamiyo | {"settings": (tamiyo.get("settings") or {}) | {"seed": seed}}}
