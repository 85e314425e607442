"""Links of Markdown that was written for the repository, made to hold in the site."""

import posixpath
import re
from functools import cache
from typing import Final

from docs.tools.sources import ROOT

RESULTS: Final = "benchmarks/results"
MIRRORED: Final = (f"{RESULTS}/*.md", "experiments/**/README.md", "notebooks/README.md", "notebooks/*.ipynb")
"""Files outside docs/ that the site shows under the same path."""

_LINK: Final = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")


@cache
def mirrored(pattern: str) -> list[str]:
    """Return the files of the repository that match a glob, by their path in it."""
    return sorted(file.relative_to(ROOT).as_posix() for file in ROOT.glob(pattern))


def relinked(markdown: str, origin: str, uri: str) -> str:
    """Return Markdown whose links, written for a file of the repository, hold for a page of the site.

    Args:
        markdown: the text.
        origin: path in the repository of the file that it was written for.
        uri: path of the page, below the root of the site's sources.
    """

    def lead(found: re.Match[str]) -> str:
        words, (target, mark, anchor) = found[1], found[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        there = page_of(path)
        if there is None:
            # Part of the repository, not of the site.
            return words[1:-1] if (ROOT / path).exists() else found[0]
        return f"{words}({posixpath.relpath(there, posixpath.dirname(uri) or '.')}{mark}{anchor})"

    return _LINK.sub(lead, markdown)


def page_of(path: str) -> str | None:
    """Return the page of the site that shows a file or folder of the repository, or None."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    if path == RESULTS:
        return f"{RESULTS}/index.md"
    if any(path in mirrored(pattern) for pattern in MIRRORED):
        return path
    generated = ("configuration.md", "commands.md", "errors.md", "index.md")
    return path if path in generated or path.startswith("api/") else None
