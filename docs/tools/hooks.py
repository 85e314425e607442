"""What MkDocs does for this site beyond Markdown: generated pages, pages from elsewhere in the repository, links."""

import posixpath
import re
from collections.abc import Iterator
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.tools import commands, configuration
from docs.tools.api import api_pages
from docs.tools.growth import missing
from docs.tools.links import MIRRORED, RESULTS, mirrored, relinked
from docs.tools.sources import ROOT

_INCLUDE: Final = re.compile(r"<!-- include: (\S+) -->")
_END_OF_FIRST_PART: Final = "Without Lightning code:"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put into the navigation what is generated where mkdocs.yml names its folder, and what it left out at `*.md`."""
    said = str(config.nav)
    made = {
        "*.md": [page.name for page in sorted((ROOT / "docs").glob("*.md")) if f"'{page.name}'" not in said],
        "api": sorted(api_pages()),
        "experiments": ["experiments/README.md", *mirrored("experiments/*/README.md")],
        RESULTS: _results(),
    }
    config.nav = [_filled(entry, made) for entry in config.nav or []]
    return config


def _filled(entry: Any, made: dict[str, list[str]]) -> Any:
    if isinstance(entry, dict):
        return {title: _filled(inner, made) for title, inner in entry.items()}
    if isinstance(entry, list):
        return [filled for inner in entry for filled in _spread(_filled(inner, made))]
    return made.get(entry, entry)


def _spread(entry: Any) -> list[Any]:
    return entry if isinstance(entry, list) else [entry]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of the source, and those that are elsewhere in the repository."""
    for uri, text in _generated():
        files.append(File.generated(config, uri, content=text))
    for uri in (uri for pattern in MIRRORED for uri in mirrored(pattern)):
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / uri)))
    return files


def _generated() -> Iterator[tuple[str, str]]:
    yield "index.md", _front_page()
    yield "configuration.md", configuration.page()
    yield "commands.md", commands.page()
    yield "errors.md", commands.errors_page()
    yield f"{RESULTS}/index.md", _list_of_results()
    yield from api_pages().items()


def _results() -> list[str]:
    return [f"{RESULTS}/index.md", *mirrored(f"{RESULTS}/*.md")]


def _front_page() -> str:
    """Return the first part of the README, and where to go from there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(_END_OF_FIRST_PART)[0]
    onward = (ROOT / "docs" / "tools" / "onward.md").read_text(encoding="utf-8")
    return relinked(text, "README.md", "index.md") + onward


def _list_of_results() -> str:
    titles = [(uri, (ROOT / uri).read_text(encoding="utf-8").partition("\n")[0]) for uri in mirrored(f"{RESULTS}/*.md")]
    rows = [f"- [{title.removeprefix('# ')}]({posixpath.basename(uri)})" for uri, title in titles]
    words = (
        "Everything that this site claims in numbers was measured; each page names the command that measures it anew."
    )
    return "\n\n".join(["# What was measured", words, "\n".join(rows)]) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Include what a page asks for, and let links that leave docs/ lead to the pages of the site."""
    uri = page.file.src_uri
    text = _INCLUDE.sub(lambda found: _included(found[1], uri), markdown)
    text = re.sub(r"^```(\w+) notest$", r"```\1", text, flags=re.MULTILINE)
    origin = uri if (ROOT / uri).is_file() else f"docs/{uri}"
    return relinked(text, origin, uri)


def _included(origin: str, uri: str) -> str:
    """Return a file of the repository as a part of a page: without its title, its headings one level lower."""
    text = (ROOT / origin).read_text(encoding="utf-8").partition("\n")[2].strip()
    lower = re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE)
    return "\n\n".join(part for part in (relinked(lower, origin, uri), missing(text)) if part)
