"""Settings: frozen records that refuse unknown keys and name the near miss."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from esper.leyline.errors import ConfigError


class Settings(BaseModel):
    """Base of every settings record: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, given: "Self | dict[str, Any] | None") -> Self:
        """Return settings from a record, a plain dict or None (all defaults).

        Raises:
            ConfigError: a key is unknown or a value is not allowed.
        """
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, dict):
            raise ConfigError(f"{cls.__name__} takes a mapping or a {cls.__name__}, not {type(given).__name__}.")
        try:
            return cls.model_validate(given or {})
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from error


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Return one line per problem: what was given, what is allowed, the near miss."""
    return "; ".join(_explain_one(dict(problem), root) for problem in error.errors(include_url=False))


def _explain_one(problem: dict[str, Any], root: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    where = ".".join(path) or root.__name__
    if problem["type"] == "extra_forbidden":
        return unknown_key(where, path[-1], _keys_at(root, path[:-1]))
    if problem["type"] == "missing":
        return f"{where} is required; add it"
    return f"{where}={problem['input']!r}: {problem['msg']}"


def unknown_key(where: str, key: str, allowed: list[str]) -> str:
    """Return the message for a key that is not in `allowed`, naming the near miss."""
    near = get_close_matches(key, allowed, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(sorted(allowed)) or 'none'}"
    return f"unknown key {where!r}; {hint}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        nested = field.annotation if field else None
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            return []
        model = nested
    return list(model.model_fields)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds no mapping.
    """
    file = Path(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}; give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}; a mapping of sections is needed.")
    return content or {}


def moved(value: Any, old: str, new: str) -> Any:
    """Return a configuration with every path under one folder put under another.

    Example:
        >>> moved({"dir": "runs/a", "files": ["runs/a/x", "runs/ab"]}, "runs/a", "b")
        {'dir': 'b', 'files': ['b/x', 'runs/ab']}
    """
    if isinstance(value, dict):
        return {key: moved(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, old, new) for item in value]
    inside = isinstance(value, str) and (value == old or value.startswith(f"{old}/"))
    return new + value[len(old) :] if inside else value
