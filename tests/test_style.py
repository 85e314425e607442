"""The style rules that no linter counts: short files, short functions, a docstring on everything public."""

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "esper").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), ROOT / "train.py"])
Function = ast.FunctionDef | ast.AsyncFunctionDef


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(file: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree_of(file)) if isinstance(node, Function))


def length(function: Function) -> int:
    """Lines of code: a docstring says what a function does, it does not make it long."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def undocumented(node: ast.Module | ast.ClassDef, path: str) -> Iterator[str]:
    """Yield the public definitions without a docstring, in a module or class and below it."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
            if ast.get_docstring(child) is None and not is_overload(child):
                yield f"{path}:{child.lineno} {child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, path)


def is_overload(node: ast.ClassDef | Function) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_file_and_functions_are_short(file: Path) -> None:
    assert lines_of(file) <= 400
    long = {function.name: length(function) for function in functions(file) if length(function) > 40}
    assert not long


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_public_things_have_docstrings(file: Path) -> None:
    assert ast.get_docstring(tree_of(file)), "the module says nothing about itself"
    assert not list(undocumented(tree_of(file), file.name))


def test_medians() -> None:
    assert median(map(lines_of, FILES)) <= 150
    assert median(length(function) for file in FILES for function in functions(file)) <= 10


def test_train_is_a_table_of_contents() -> None:
    assert lines_of(ROOT / "train.py") < 60


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {file.parent for file in FILES} - {ROOT}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
