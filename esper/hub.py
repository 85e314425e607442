"""Hugging Face models and tokenizers by name or local folder; the library `transformers` is optional and loaded late.

A name is looked up in the local cache first, so that a run repeats without a network and never changes under its feet.
Only weights in the safetensors format are read, and code that comes with a model is never run.
"""

import json
import logging
import re
from collections.abc import Callable
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from esper.leyline.errors import ConfigError

_log = logging.getLogger(__name__)

REACH_TIMEOUT_S = 5.0
_REPOSITORY = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_ASIDE = ["*/*", "consolidated*"]
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "tekken.json")


def library(name: str = "transformers") -> Any:
    """Return the optional library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this needs the package {name}, which cannot be imported ({error}): pip install 'esper-morphogenetic[hf]'."
        ) from error


def folder_of(name: str | None, *, setting: str, weights: bool = False) -> Path:
    """Return the local folder of a model: the one named, one in the cache, or one downloaded just now.

    Args:
        name: a folder, or a name on the Hub such as `org/model`.
        setting: what the user sets to give the name, for messages.
        weights: whether weights are needed as well as configuration and tokenizer.

    Raises:
        ConfigError: nothing is named, nothing is there, or it is not in the cache and the network does not answer.
    """
    if not name:
        raise ConfigError(f"{setting} is not set; give the name of a model or a folder with its files.")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _REPOSITORY.fullmatch(name):
        raise ConfigError(f"{setting}={name}: there is no such folder; give one with config.json, or a model name.")
    wanted = {"allow_patterns": [*_SMALL, *(_WEIGHTS if weights else [])], "ignore_patterns": _ASIDE}
    cached = _cached(name, wanted)
    if cached is not None and (not weights or has_weights(cached)):
        return cached
    return _downloaded(name, setting, wanted)


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds complete weights in the safetensors format."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return all((folder / shard).is_file() for shard in shards)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer's vocabulary."""
    return any(any(folder.glob(pattern)) for pattern in _VOCABULARIES)


def _cached(name: str, wanted: dict[str, list[str]]) -> Path | None:
    hub = library("huggingface_hub")
    try:
        found = Path(hub.snapshot_download(name, local_files_only=True, **wanted))
    except (OSError, ValueError):
        return None
    return found if (found / "config.json").is_file() else None


def _downloaded(name: str, setting: str, wanted: dict[str, list[str]]) -> Path:
    hub = library("huggingface_hub")
    help_ = (
        f"put its files (config.json, tokenizer, *.safetensors) into a folder and set {setting}=FOLDER, "
        "or point HF_HOME at a cache that has them"
    )
    if hub.constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{setting}={name} is not in the local cache and HF_HUB_OFFLINE is set; {help_}.")
    if (reason := _unreachable(hub.constants.ENDPOINT)) is not None:
        raise ConfigError(
            f"{setting}={name} is neither a folder nor in the local cache, and {hub.constants.ENDPOINT} cannot be "
            f"reached ({reason}); {help_}."
        )
    _log.info("Downloading %s.", name)
    try:
        return Path(hub.snapshot_download(name, **wanted))
    except Exception as error:  # network, disk, permissions: the library has an error of its own for each
        raise ConfigError(f"{setting}={name} cannot be downloaded ({first_line(error)}); {help_}.") from error


def _unreachable(address: str) -> str | None:
    """Return why an address does not answer, None if it does: the library itself would retry for minutes."""
    try:
        with urlopen(Request(address, method="HEAD"), timeout=REACH_TIMEOUT_S):  # noqa: S310 - the library's own address
            return None
    except HTTPError:
        return None
    except (OSError, ValueError, HTTPException) as error:
        return first_line(error)


def read_config(folder: Path, *, setting: str) -> Any:
    """Return the configuration of a causal language model.

    Raises:
        ConfigError: it is missing, or not that of a causal language model.
    """
    tf = library()
    config = _read(lambda: tf.AutoConfig.from_pretrained(folder, **_local()), f"{setting}={folder}", "configuration")
    if type(config) not in tf.AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"{setting}={folder}: {type(config).__name__} is no causal language model; choose one.")
    return config


def read_tokenizer(name: str | None, *, setting: str) -> Any:
    """Return a tokenizer by name or folder.

    Raises:
        ConfigError: the folder holds none, or it cannot be read.
    """
    folder = folder_of(name, setting=setting)
    if not has_tokenizer(folder):
        raise ConfigError(
            f"{setting}={name} has no tokenizer (tokenizer.json or the like); put the files there, or name a folder "
            "that has them."
        )
    make = library().AutoTokenizer.from_pretrained
    return _read(lambda: make(folder, **_local()), f"{setting}={name}", "tokenizer")


def read_model(folder: Path, *, setting: str, dtype: Any) -> Any:
    """Return a causal language model with its weights.

    Raises:
        ConfigError: weights are missing, or they cannot be read.
    """
    if not has_weights(folder):
        raise ConfigError(f"{setting}={folder} has no complete weights (*.safetensors); put them there.")
    make = library().AutoModelForCausalLM.from_pretrained
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **_local()}
    model, found = _read(lambda: make(folder, **options), f"{setting}={folder}", "model")
    missing = sorted([*found["missing_keys"], *(str(key[0]) for key in found.get("mismatched_keys", ()))])
    if missing:
        raise ConfigError(
            f"{setting}={folder} lacks {len(missing)} weights, e.g. {missing[0]!r}: they would stay random. Use "
            "weights of this very architecture."
        )
    return model


def make_model(config: Any, *, dtype: Any) -> Any:
    """Return a causal language model with random weights, drawn from torch's random state."""
    return library().AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def _local() -> dict[str, bool]:
    return {"local_files_only": True, "trust_remote_code": False}


def _read(read: Callable[[], Any], given: str, what: str) -> Any:
    try:
        return read()
    except Exception as error:  # a damaged file may raise anything at all
        raise ConfigError(f"{given}: the {what} cannot be read ({first_line(error)}).") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
