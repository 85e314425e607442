"""The reference of commands and that of errors, read from the source."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from docs.tools.sources import ROOT, definition, file_of, tree_of

_CLI: Final = "esper.cli"
_ERRORS: Final = "esper.leyline.errors"
_SAID: Final = ("action", "choices", "default", "help", "metavar")
_TRAINED: Final = ("fit", "validate", "test", "predict")


class Command(NamedTuple):
    """One command of the command line.

    Args:
        name: as it is typed.
        words: what it does.
        options: each argument as it is typed, and what it means.
    """

    name: str
    words: str
    options: list[tuple[str, str]]


def usage() -> str:
    """Return what `esper --help` prints."""
    return str(_constant(tree_of(_file(_CLI)), "HELP"))


@cache
def commands() -> list[Command]:
    """Return every command that has a parser of its own, by name."""
    found = []
    for file in sorted((ROOT / "esper").rglob("*.py")):
        tree = tree_of(file)
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        found += [command for function in functions for command in _commands_in(function, tree)]
    return sorted(found)


def _commands_in(function: ast.FunctionDef, tree: ast.Module) -> Iterator[Command]:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    for call in calls:
        told = {word.arg: word.value for word in call.keywords if word.arg}
        if _called(call) == "ArgumentParser" and "prog" in told:
            name = str(_value(told["prog"], tree))
            if name.startswith("esper "):
                options = [_option(c, tree) for c in calls if _called(c) == "add_argument"]
                yield Command(name, str(_value(told["description"], tree)), options)


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _option(call: ast.Call, tree: ast.Module) -> tuple[str, str]:
    told = {word.arg: _value(word.value, tree) for word in call.keywords if word.arg in _SAID}
    name = str(_value(call.args[0], tree))
    choices, metavar = told.get("choices"), told.get("metavar")
    shown = "|".join(map(str, choices)) if isinstance(choices, tuple) else metavar
    if name.startswith("-") and told.get("action") != "store_true":
        name = f"{name} {shown or name.lstrip('-').upper()}"
    elif not name.startswith("-") and shown:
        name = str(shown)
    words = str(told.get("help") or "").replace("%(default)s", str(told.get("default")))
    return name, words


def _value(node: ast.expr, tree: ast.Module) -> object:
    """Return a constant, that of a name, or the source of anything else."""
    if isinstance(node, ast.Name):
        return _constant(tree, node.id)
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.FormattedValue) else part for part in node.values]
        return "".join(str(_value(part, tree)) for part in parts)
    return _plain(node)


def _plain(node: ast.expr) -> object:
    """Return a constant, or the source of anything else; of a path, which folder."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Path":
        return _plain(node.args[0])
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _constant(tree: ast.Module, name: str) -> object:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return _plain(node.value)  # type: ignore[attr-defined]
        imported = isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]
        if imported and str(node.module).startswith("esper."):  # type: ignore[attr-defined]
            return _constant(tree_of(_file(str(node.module))), name)  # type: ignore[attr-defined]
    return name


def _file(module: str) -> Path:
    file = file_of(module)
    assert file is not None, module
    return file


def page() -> str:
    """Return the reference of commands."""
    parts = [
        "# Commands",
        "What `esper --help` prints:",
        f"```text\n{usage().rstrip()}\n```",
        f"{', '.join(f'`{name}`' for name in _TRAINED)} take the keys of the [configuration](configuration.md), in a "
        "file (`--config run.yaml`) or one by one (`--tamiyo.settings.budget 0.1`). The others have options of their "
        "own. The exit status is 0, or 2 after an error that you can mend: it is told in one line, without a "
        "traceback; `ESPER_TRACEBACK=1` shows where it came from.",
    ]
    for command in commands():
        parts += [f"## {command.name}", command.words]
        if command.options:
            rows = [f"| `{_cell(name)}` | {_cell(words)} |" for name, words in command.options]
            parts.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- errors ---------------------------------------------------------------------------------------------------------


def errors() -> list[tuple[str, list[str], str]]:
    """Return name, bases and meaning of every error."""
    tree = tree_of(_file(_ERRORS))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [
        (node.name, [base.id for base in node.bases if isinstance(base, ast.Name)], ast.get_docstring(node) or "")
        for node in classes
    ]


def errors_page() -> str:
    """Return the reference of errors."""
    told = ast.get_docstring(tree_of(_file(_ERRORS))) or ""
    rows = [f"| `{name}` | {', '.join(f'`{base}`' for base in bases)} | {words} |" for name, bases, words in errors()]
    return (
        "\n\n".join(
            [
                "# Errors",
                told.replace("```\n", "```text\n", 1),
                "Every one can be caught as `esper.EsperError`; those with a second parent can be caught as that too. "
                "What the most likely ones say, and what to do: [FAQ](faq.md).",
                "\n".join(["| error | also | when |", "|---|---|---|", *rows]),
            ]
        )
        + "\n"
    )


def public() -> list[tuple[str, str]]:
    """Return the names of the package itself, and where each is defined."""
    tree = tree_of(ROOT / "esper" / "__init__.py")
    homes = _constant(tree, "_HOME")
    assert isinstance(homes, dict)
    return [(name, f"{definition(f'{homes[name]}.{name}')[0]}.{name}") for name in sorted(homes)]
