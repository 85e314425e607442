"""The pages of the API reference: one for each part of the package, every module with what is public in it."""

import ast
from pathlib import Path
from typing import Final

from docs.tools.commands import public
from docs.tools.sources import ROOT, summary_of, tree_of

PACKAGE: Final = ROOT / "esper"
_TOP: Final = "esper"


def api_pages() -> dict[str, str]:
    """Return every page of the API reference by its place in the site."""
    parts = {folder.name: _page(folder) for folder in sorted(PACKAGE.iterdir()) if (folder / "__init__.py").is_file()}
    return {"api/index.md": _front(), **{f"api/{name}.md": text for name, text in parts.items()}}


def modules(folder: Path) -> list[str]:
    """Return the modules of a folder that define something public, by dotted name."""
    files = sorted(file for file in folder.rglob("*.py") if _public(tree_of(file)))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


def _public(tree: ast.Module) -> bool:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return any(isinstance(node, kinds) and not node.name.startswith("_") for node in tree.body)


def said(file: Path) -> str:
    """Return the first sentence of a module."""
    return " ".join((ast.get_docstring(tree_of(file)) or "").partition("\n\n")[0].split())


def _page(folder: Path) -> str:
    parts = [f"# {_TOP}.{folder.name}", said(folder / "__init__.py")]
    return "\n\n".join([*parts, *(f"::: {module}" for module in modules(folder))]) + "\n"


def _front() -> str:
    names = [f"| [`esper.{name}`][{home}] | {_cell(summary_of(home))} |" for name, home in public()]
    folders = [folder for folder in sorted(PACKAGE.iterdir()) if (folder / "__init__.py").is_file()]
    parts = [f"| [`esper.{f.name}`]({f.name}.md) | {_cell(said(f / '__init__.py'))} |" for f in folders]
    files = [file for file in sorted(PACKAGE.glob("*.py")) if file.stem != "__init__" and _public(tree_of(file))]
    return (
        "\n\n".join(
            [
                "# API reference",
                "What most programs need is in `esper` itself:",
                "\n".join(["| name | what it is |", "|---|---|", *names]),
                "## The parts",
                "\n".join(["| part | who it is and what it does |", "|---|---|", *parts]),
                *(f"::: {_TOP}.{file.stem}" for file in files),
            ]
        )
        + "\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
