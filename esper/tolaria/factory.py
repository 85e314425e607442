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


def make_host(description: dict[str, Any] | None) -> nn.Module:
    """Construct a described model.

    Raises:
        CheckpointError: the folder describes no Esper model; nothing outside `esper.models` is ever imported.
    """
    if description is None:
        raise CheckpointError("the folder does not say how its host is built; pass `host=` a fresh module of it.")
    module, _, name = str(description["class"]).rpartition(".")
    if not f"{module}.".startswith(_ALLOWED):
        raise CheckpointError(f"{description['class']} is not an Esper model and is not imported; pass `host=`.")
    host = getattr(import_module(module), name)(**description["arguments"])
    assert isinstance(host, nn.Module)
    return host
