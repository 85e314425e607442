"""What the table of the growth benchmark does not have yet."""

import ast
import re

from docs.tools.sources import ROOT, tree_of


def tasks() -> dict[str, str]:
    """Return the tasks of the benchmark: letter and title."""
    calls = (node for node in ast.walk(tree_of(ROOT / "benchmarks" / "growth_tasks.py")) if isinstance(node, ast.Call))
    named = [{word.arg: word.value for word in call.keywords} for call in calls if _called(call) == "Task"]
    return {ast.literal_eval(told["name"]): ast.literal_eval(told["title"]) for told in named}


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def missing(table: str) -> str:
    """Return in one sentence which tasks a table lacks; nothing if it has all.

    Args:
        table: Markdown, with a task's letter in the first column.
    """
    absent = {
        letter: title for letter, title in tasks().items() if not re.search(rf"^\| {letter} \|", table, re.MULTILINE)
    }
    if not absent:
        return ""
    listed = ", ".join(f"{letter} ({title})" for letter, title in absent.items())
    return f"**The table is not complete.** Not measured, or not committed, yet: {listed}."
