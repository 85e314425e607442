"""Models that remember how they were constructed, so that a saved folder can rebuild them."""

import inspect
from typing import Any, Self

from torch import nn


class RememberedModule(nn.Module):
    """Keeps its constructor's arguments in `arguments`: plain values only, by name, defaults included."""

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments; a copy or an unpickled object is given its own afterwards."""
        module = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(module, *args, **kwargs)
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        module.__dict__["arguments"] = given
        return module
