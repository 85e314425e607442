"""The configuration file of a run started from Python."""

from pathlib import Path

from pydantic import Field

from esper.config import Settings, read_yaml
from esper.kasmina.config import KasminaConfig
from esper.leyline.errors import ConfigError
from esper.tamiyo.config import TamiyoConfig
from esper.tolaria.config import TolariaConfig


class EsperConfig(Settings):
    """One section per subsystem; every key has a default.

    Args:
        kasmina: where seeds sit and how they live.
        tamiyo: how growth is decided.
        tolaria: how the model is trained.
    """

    kasmina: KasminaConfig = Field(default_factory=KasminaConfig)
    tamiyo: TamiyoConfig = Field(default_factory=TamiyoConfig)
    tolaria: TolariaConfig = Field(default_factory=TolariaConfig)


def load_config(path: str | Path) -> EsperConfig:
    """Read a YAML file with the sections `kasmina`, `tamiyo` and `tolaria`.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the message names the near miss), or a value is not
            allowed.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "run.yaml"
        >>> _ = file.write_text("tamiyo: {polcy: off}")
        >>> load_config(file)
        Traceback (most recent call last):
        ...
        esper.leyline.errors.ConfigError: ...unknown key 'tamiyo.polcy'; did you mean 'policy'?
    """
    try:
        return EsperConfig.of(read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
