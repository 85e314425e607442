"""An extension of griffe for this project's docstrings: records get the constructor of their fields, examples run."""

import re
from collections.abc import Iterator
from typing import Any, Final

import griffe

_EXAMPLE: Final = re.compile(r"^Example:$", re.MULTILINE)
_ENTRY: Final = re.compile(r"^    (\w+):", re.MULTILINE)


class Fields(griffe.Extension):
    """Gives settings and named tuples the parameters that their `Args` describe, and shows examples as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Let an example be shown as code."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub("Examples:", obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Make an `__init__` for each record that documents its fields, once all bases are known."""
        for cls in [cls for cls in _classes(pkg) if _is_record(cls)]:
            cls.set_member("__init__", _constructor(cls, _fields(cls)))


def _classes(module: griffe.Module | griffe.Class) -> Iterator[griffe.Class]:
    for member in list(module.members.values()):
        if isinstance(member, griffe.Class):
            yield member
        if isinstance(member, griffe.Class | griffe.Module):
            yield from _classes(member)


def _is_record(cls: griffe.Class) -> bool:
    """Tell whether every argument that a class documents is a field of its own, and no constructor says otherwise."""
    text = cls.docstring.value if cls.docstring is not None else ""
    told = {found[1] for found in _ENTRY.finditer(text.partition("\nArgs:\n")[2].partition("\n\n")[0])}
    return bool(told) and "__init__" not in cls.members and told <= {field.name for field in _fields(cls)}


def _fields(cls: griffe.Class) -> list[griffe.Attribute]:
    found = [member for name, member in cls.all_members.items() if not name.startswith("_") and member.is_attribute]
    return [member for member in found if member.annotation is not None and "property" not in member.labels]


def _constructor(cls: griffe.Class, fields: list[griffe.Attribute]) -> griffe.Function:
    kind = griffe.ParameterKind.keyword_only
    parameters = [griffe.Parameter(f.name, annotation=f.annotation, kind=kind, default=f.value) for f in fields]
    return griffe.Function(
        "__init__", lineno=cls.lineno, endlineno=cls.endlineno, parameters=griffe.Parameters(*parameters)
    )
