"""Remember how an Esper model was constructed, so that a saved folder can rebuild it without the user's code."""

from importlib import import_module
from typing import Any

from torch import nn

from esper.leyline.errors import CheckpointError
from esper.models.remembered import RememberedModule

_ALLOWED = "esper.models."


def describe_factory(host: nn.Module) -> dict[str, Any] | None:
    """Return class and constructor arguments of an Esper model, or None for any other module."""
    cls = type(host)
    if not isinstance(host, RememberedModule) or not cls.__module__.startswith(_ALLOWED):
        return None
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "arguments": host.arguments}


_GIVE = "give a fresh module of it: esper.load_model(FOLDER, host=MyModel())."


def make_host(description: dict[str, Any] | None) -> nn.Module:
    """Construct a described model.

    Raises:
        CheckpointError: the folder describes no Esper model, or one that cannot be built; nothing outside
            `esper.models` is ever imported.
    """
    if description is None:
        raise CheckpointError(f"the folder does not say how its host is built; {_GIVE}")
    try:
        path, arguments = str(description["class"]), dict(description["arguments"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the folder's description of its host is damaged: {error!r}; {_GIVE}") from error
    cls = _model_class(path)
    try:
        return cls(**arguments)
    except Exception as error:  # a constructor may raise anything at all
        raise CheckpointError(f"{path} cannot be built as it was saved: {error!r}; {_GIVE}") from error


def _model_class(path: str) -> type[nn.Module]:
    module, _, name = path.rpartition(".")
    if not f"{module}.".startswith(_ALLOWED):
        raise CheckpointError(f"{path} is not an Esper model and is not imported; {_GIVE}")
    try:
        cls = getattr(import_module(module), name, None)
    except ImportError:
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and issubclass(cls, RememberedModule)):
        raise CheckpointError(f"this release has no model {path}; {_GIVE}")
    return cls
