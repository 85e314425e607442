"""Where the activation of a site is inside what its module takes and returns."""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def first_tensor(output: Any) -> Tensor | None:
    """Return the activation that a child may change, or None.

    A tensor is it itself; of a tuple or list it is the first element, if that is a float tensor; of a dict or dataclass
    (such as a `ModelOutput`) it is the first entry that is a float tensor.

    Example:
        >>> import torch
        >>> y = torch.ones(2, 3)
        >>> first_tensor((y, None)) is y, first_tensor({"n": 3, "y": y}) is y, first_tensor((3, y))
        (True, True, None)
    """
    if isinstance(output, tuple | list):
        return _as_float(output[0]) if output else None
    key = _key(output)
    return _as_float(output) if key is None else _as_float(dict(_entries(output))[key])


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first float tensor among the arguments, or None."""
    return next((value for value in (*args, *kwargs.values()) if _as_float(value) is not None), None)


def replace_first(output: Any, value: Tensor) -> Any:
    """Return an output of the same kind in which `value` stands where `first_tensor` found the activation."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple | list):
        rest = (value, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
    twin, key = copy.copy(output), _key(output)
    if isinstance(twin, MutableMapping):
        twin[key] = value
    else:
        # Also into a frozen dataclass: the copy is ours, and nobody has seen it yet.
        object.__setattr__(twin, str(key), value)
    return twin


def _as_float(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _key(output: Any) -> Any:
    return next((key for key, value in _entries(output) if _as_float(value) is not None), None)


def _entries(output: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(output, MutableMapping):
        yield from output.items()
    elif is_dataclass(output) and not isinstance(output, type):
        yield from ((field.name, getattr(output, field.name, None)) for field in fields(output))
