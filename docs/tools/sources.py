"""What classes and functions say of their arguments, read from source files without importing them."""

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from inspect import cleandoc
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
_PLACES: Final = (ROOT, Path(sysconfig.get_path("purelib")))
_ENTRY: Final = re.compile(r"    \*{0,2}(\w+)(?: \([^)]*\))?:\s*(.*)")
_ROLE: Final = re.compile(r":[\w:]+:`~?(?:[^`]*[. ])?<?([^`>]+)>?`")
_DEFAULT: Final = re.compile(r"\s*Default: ``[^`]*``\.?")

Definition = ast.ClassDef | ast.FunctionDef


class Unknown(LookupError):
    """A name that no source file defines."""


@cache
def tree_of(file: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def file_of(module: str) -> Path | None:
    """Return the file of a module, or None."""
    path = Path(*module.split("."))
    found = (place / tail for place in _PLACES for tail in (path.with_suffix(".py"), path / "__init__.py"))
    return next((file for file in found if file.is_file()), None)


@cache
def definition(path: str) -> tuple[str, Definition]:
    """Return the module that defines a class or function, and its syntax tree; what is imported is followed.

    Args:
        path: dotted, e.g. `esper.data.Digits`.

    Raises:
        Unknown: nothing defines it.
    """
    module, _, name = path.rpartition(".")
    file = file_of(module)
    for node in ast.walk(tree_of(file)) if file is not None else ():
        if isinstance(node, Definition) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return definition(f"{node.module}.{original}")
    raise Unknown(path)


def summary_of(path: str) -> str:
    """Return the first sentence of a docstring, in one line."""
    text = ast.get_docstring(definition(path)[1]) or ""
    return " ".join(text.partition("\n\n")[0].split())


@cache
def arguments_of(path: str) -> dict[str, str]:
    """Return what a class or function says of each argument, with what its bases say of theirs.

    Args:
        path: dotted name.
    """
    module, node = definition(path)
    told: dict[str, str] = {}
    for base in _bases(module, node):
        told |= arguments_of(base)
    for text in _docstrings(node):
        told |= section(text, "Args")
    return told


def _bases(module: str, node: Definition) -> Iterator[str]:
    names = [base.id for base in node.bases if isinstance(base, ast.Name)] if isinstance(node, ast.ClassDef) else []
    for name in names:
        try:
            home, found = definition(f"{module}.{name}")
        except Unknown:
            continue
        if isinstance(found, ast.ClassDef) and home.startswith("esper."):
            yield f"{home}.{name}"


def _docstrings(node: Definition) -> Iterator[str]:
    yield ast.get_docstring(node) or ""
    for inner in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            yield ast.get_docstring(inner) or ""


def section(docstring: str, title: str) -> dict[str, str]:
    r"""Return the entries of a section of a docstring, each in one line of Markdown.

    Example:
        >>> section("It.\n\nArgs:\n    a: one\n        thing.\n    b (int): two.\n\nNone.", "Args")
        {'a': 'one thing.', 'b': 'two.'}
    """
    found: dict[str, str] = {}
    lines = iter(cleandoc(docstring).splitlines())
    for line in lines:
        if line == f"{title}:":
            break
    name, open_ = "", False
    for line in lines:
        if line and not line.startswith(" "):
            break
        if entry := _ENTRY.fullmatch(line):
            name, found[entry[1]], open_ = entry[1], entry[2], True
        elif not line.strip():
            open_ = False
        elif name and open_:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return {name: plain(text) for name, text in found.items()}


def plain(text: str) -> str:
    """Return text of a docstring as Markdown: roles of Sphinx become code, defaults go, the table beside has them."""
    text = _DEFAULT.sub("", _ROLE.sub(r"`\1`", text)).replace("``", "`")
    return text.strip()
