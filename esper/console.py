"""What a user sees when something is wrong: one line that says what to do, and no traceback."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any

from esper.config import unknown_key
from esper.leyline.errors import ConfigError, EsperError

TRACEBACK = "ESPER_TRACEBACK"
"""Set this environment variable to 1 to see where an error came from."""

USAGE_ERROR = 2
"""Exit status after an error of the user's."""

_UNKNOWN = (
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"Option '(?P<key>[\w.]+)' is not accepted"),
    re.compile(r"[Uu]nrecognized arguments: --(?P<group>[\w.]+)\.(?P<key>\w+)"),
    re.compile(r"[Uu]nrecognized arguments: --(?P<key>\w+)"),
    re.compile(r"[Kk]ey '(?P<key>[\w.]+)' is not expected"),
    re.compile(r"does not accept (?:nested key|option) '(?P<key>[\w.]+)'"),
)
_CLASS = re.compile(r"class_path[ =']+(?P<path>\w+(?:\.\w+)+)'")
_NOISE = re.compile(r"^\s*(Given value|Subtypes:|Errors:|Does not validate|- ?Expected a <class 'NoneType'>)")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn an error of the user's into one line on standard error and exit status 2.

    Anything else is a defect and keeps its traceback, as does everything when `ESPER_TRACEBACK=1`.
    """
    try:
        yield
    except Exception as error:
        message = message_of(error)
        if message is None or os.environ.get(TRACEBACK) == "1":
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None


def message_of(error: Exception) -> str | None:
    """Return what to tell the user, or None when the error is not the user's."""
    if isinstance(error, EsperError):
        return str(error)
    family = {f"{cls.__module__}.{cls.__name__}" for cls in type(error).__mro__}
    if "hydra.errors.HydraException" in family or "omegaconf.errors.OmegaConfBaseException" in family:
        return _hydra_message(error)
    if "lightning.fabric.utilities.exceptions.MisconfigurationException" in family:
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; choose a path that can be read and written."
    return None


def _hydra_message(error: Exception) -> str:
    """Return Hydra's message; for a key that does not exist, name the near miss."""
    cause = error.__cause__ if error.__cause__ is not None else error
    key: object = getattr(cause, "key", None)
    parent: Any = getattr(cause, "parent_node", None)
    if key is not None and hasattr(parent, "keys"):
        where = str(getattr(cause, "full_key", None) or key)
        return f"{unknown_key(where, str(key), [str(k) for k in parent])} (to add a new key, write +{where}=...)"
    options = getattr(error, "options", None)
    wanted = str(getattr(error, "missing_cfg_file", None) or "").rpartition("/")[2]
    near = get_close_matches(wanted, options or [], n=1)
    message = str(error).partition("Config search path")[0].strip()
    return message + (f"\nDid you mean {near[0]!r}?" if near else "")


def config_error(message: str, known: list[str]) -> ConfigError:
    """Return the error for what the argument parser did not accept.

    Args:
        message: the parser's own words.
        known: every option of the parser, by its dotted name.
    """
    for pattern in _UNKNOWN:
        if found := pattern.search(message):
            path = ".".join(filter(None, (found.groupdict().get("group"), found["key"])))
            return ConfigError(_unknown_option(path, message, known))
    hint = '; quote it, "off": YAML reads a bare off as false' if "Got value: False" in message else ""
    return ConfigError(_shorter(message) + hint)


def _unknown_option(path: str, message: str, known: list[str]) -> str:
    group, _, key = path.rpartition(".")
    if classes := _CLASS.findall(message):
        return unknown_key(path, key, [name for cls in classes for name in _parameters(cls)])
    prefix = f"{group}." if group else ""
    allowed = {name.removeprefix(prefix).partition(".")[0] for name in known if name.startswith(prefix)}
    return unknown_key(path, key, sorted(allowed)) if allowed else _unknown_option(group, message, known)


def _parameters(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    try:
        return [p for p in signature(getattr(import_module(module), name)).parameters if p != "params"]
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def _shorter(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip() and not _NOISE.match(line)]
    return " ".join(lines)
