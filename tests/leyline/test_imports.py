"""Leyline is the bottom: it needs neither torch nor any other part of Esper."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import esper.leyline

PACKAGE = Path(esper.leyline.__file__).parent
ALLOWED = {"msgpack", "numpy", "pydantic", "pydantic_core"}
PROBE = "import sys, esper.leyline; print(*sys.modules)"


def test_a_fresh_process_loads_nothing_else() -> None:
    """Importing Leyline loads no torch, no lightning and no other subsystem."""
    command = [sys.executable, "-W", "error", "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parents[1])
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "lightning", "hydra", "rich"}
    foreign = {name for name in loaded if name.startswith("esper.") and not name.startswith("esper.leyline")}
    assert not foreign


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_files_import_only_what_is_allowed(path: Path) -> None:
    """Not even a function's own import reaches outside."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            root = name.partition(".")[0]
            assert root in sys.stdlib_module_names | ALLOWED or name.startswith("esper.leyline"), name


def test_public_names_exist_once() -> None:
    """`__all__` lists what the package has, without repeats."""
    names = esper.leyline.__all__
    assert len(names) == len(set(names))
    assert all(hasattr(esper.leyline, name) for name in names)
