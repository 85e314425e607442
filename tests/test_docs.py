"""The documentation: it says what the source says, its drawings are those of the code, and the site holds together."""

import ast
import doctest
import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
import yaml

from docs.tools import commands, configuration, growth, links, pictures, sources
from esper.cli import HELP, main
from esper.forge.client import Forge
from esper.kasmina.config import KasminaConfig
from esper.leyline import errors
from esper.leyline.states import TARGET, TRANSITIONS, SeedState
from esper.tamiyo.config import RollbackConfig, TamiyoConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE_TOOLS = ROOT / ".venv" / "site"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ELSEWHERE = [ROOT / path for pattern in links.MIRRORED for path in links.mirrored(pattern)]
WRITTEN = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *ELSEWHERE]
GENERATED = ("configuration.md", "commands.md", "errors.md", "index.md", "api/index.md")


# --- the configuration reference ------------------------------------------------------------------------------------


def keys_in(value: Any) -> set[str]:
    """Return every key of a configuration, at any depth, but those that only say where the others go."""
    if isinstance(value, list):
        return {key for item in value for key in keys_in(item)}
    if not isinstance(value, dict):
        return set()
    inside = {key for item in value.values() for key in keys_in(item)}
    return inside | set(value) - {"class_path", "init_args"}


def section_of(page: str, title: str) -> str:
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("group", configuration.groups())
def test_every_key_of_a_group_has_its_values_and_a_meaning(group: str) -> None:
    files = sorted((configuration.CONF / group).glob("*.yaml"))
    wanted = {key for file in files for key in keys_in(yaml.safe_load(file.read_text(encoding="utf-8")))}
    shown = section_of(configuration.page(), group)
    rows = dict(re.findall(r"^\| `(\w+)` \| .+? \| (.+) \|$", shown, flags=re.MULTILINE))
    assert wanted and set(rows) == wanted
    assert all(len(meaning) > 8 for meaning in rows.values())
    assert all(f"`{file.stem}`" in shown for file in files)


def test_a_value_that_differs_is_told_with_the_file_that_has_it() -> None:
    page = configuration.page()
    assert "| `ramp_steps` | `20` (measured)<br>`100` (strict) | steps from alpha 0 to 1. |" in page
    assert "| `seed_everything` | `0` | seed of the run" in page
    assert "| `hydra.launcher.n_jobs` | `2` |" in page


@pytest.mark.parametrize("record", [KasminaConfig, TamiyoConfig, RollbackConfig, Forge])
def test_what_is_read_from_the_source_is_the_whole_of_what_python_sees(record: type) -> None:
    told = sources.arguments_of(f"{record.__module__}.{record.__name__}")
    assert set(told) == set(getattr(record, "model_fields", None) or told) and told
    said = " ".join((record.__doc__ or "").split()).partition("Args: ")[2]
    assert said.startswith(" ".join(f"{name}: {text}" for name, text in told.items()))


def test_a_key_that_nobody_explains_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "forge").mkdir()
    (tmp_path / "forge" / "mine.yaml").write_text("root: here\nunheard_of: 1\n", encoding="utf-8")
    monkeypatch.setattr(configuration, "CONF", tmp_path)
    with pytest.raises(LookupError, match="unheard_of"):
        configuration.keys_of("forge")


@pytest.mark.parametrize("module", [configuration, sources])
def test_the_examples_of_the_tools_run(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert tried and not failed


# --- commands and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report", "export", "recipe"])
def test_a_command_is_told_with_what_its_own_help_has(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    told = next(command for command in commands.commands() if command.name == f"esper {name}")
    assert told.words in printed and told.options
    for option, words in told.options:
        assert option.split()[0] in printed and words in printed


def test_every_command_of_the_help_is_in_the_reference() -> None:
    assert HELP.rstrip() in commands.page()
    own = set(re.findall(r"^  (\w+) ", HELP, flags=re.MULTILINE)) - {"fit", "validate", "test", "predict"}
    assert own <= {command.name.split()[1] for command in commands.commands()}


def test_every_error_is_in_the_tree_and_in_the_table() -> None:
    page = commands.errors_page()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EsperError)]
    assert len(kinds) > 20
    for kind in kinds:
        assert re.search(rf"^[ │├└─]*{kind.__name__}\b", page, flags=re.MULTILINE), "the tree lacks it"
        assert f"| `{kind.__name__}` |" in page


# --- drawings -------------------------------------------------------------------------------------------------------


def parts(svg: str, attribute: str) -> list[dict[str, str]]:
    return [element.attrib for element in ElementTree.fromstring(svg).iter() if attribute in element.attrib]


def test_the_life_cycle_has_every_state_and_every_arrow_of_the_table() -> None:
    drawn = pictures.lifecycle()
    assert sorted(box["data-box"] for box in parts(drawn, "data-box")) == sorted(SeedState)
    arrows = {(a["data-from"], a["data-label"], a["data-to"]) for a in parts(drawn, "data-from")}
    assert arrows == {(s, c, TARGET[c]) for s, accepted in TRANSITIONS.items() for c in accepted}
    told = section_of((DOCS / "concepts.md").read_text(encoding="utf-8"), "The life cycle")
    assert re.findall(r"^\| ([A-Z_]+) \|", told, flags=re.MULTILINE) == list(SeedState)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_the_drawings_in_docs_are_those_of_the_code(name: str) -> None:
    again = "run `python -m docs.tools.pictures`"
    assert (DOCS / name).read_text(encoding="utf-8") == pictures.PICTURES[name](), again


# --- FAQ ------------------------------------------------------------------------------------------------------------


def literals() -> Iterator[str]:
    """Yield every text in the package, with `…` for what is filled in."""
    for file in sorted((ROOT / "esper").rglob("*.py")):
        for node in ast.walk(sources.tree_of(file)):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_of_the_faq_is_said_by_the_code() -> None:
    asked = re.findall(r"^### `(.+)`$", (DOCS / "faq.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(asked) >= 15 and len(set(asked)) == len(asked)
    said = "\n".join(text.replace("\n", " ") for text in literals())
    for message in asked:
        pieces = [re.escape(piece) for piece in message.split("…")]
        assert max(map(len, pieces)) >= 10
        assert re.search(".*".join(pieces), said), message


# --- links and what is included -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_leads_to_a_file(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text):
        if "://" not in target and not (file.parent == DOCS and target in GENERATED):
            assert (file.parent / target).exists(), target


def test_links_are_rewritten_for_the_site() -> None:
    text = "[a](../benchmarks/results/kills.md#x) [b](../README.md) [c](growth.md) [d](../Makefile) [e](https://e.org/)"
    expected = "[a](benchmarks/results/kills.md#x) [b](index.md) [c](growth.md) d [e](https://e.org/)"
    assert links.relinked(text, "docs/resume.md", "resume.md") == expected
    result = "benchmarks/results/kills.md"
    assert links.relinked("[t](../../docs/telemetry.md)", result, result) == "[t](../../telemetry.md)"
    recipe = "[s](experiments/shapes/README.md)"
    assert links.relinked(recipe, "README.md", "index.md") == recipe


def test_a_table_that_is_not_complete_says_what_it_lacks() -> None:
    from benchmarks.growth_tasks import TASKS

    assert growth.tasks() == {name: task.title for name, task in TASKS.items()}
    rows = [f"| {name} | live | 1.0 |" for name in TASKS]
    assert growth.missing("\n".join(rows)) == ""
    assert TASKS["A"].title in growth.missing("\n".join(rows[1:])) and TASKS["B"].title not in growth.missing(rows[1])


def test_the_blocks_of_the_page_on_attaching_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "attach.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "attach.md", "exec"), {})


# --- the site -------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """What a page refers to, what it loads, and the places in it that can be referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag in ("img", "script", "source", "iframe") and "src" in given:
            self.loads.add(given["src"])
        elif tag == "link" and given.get("rel") != "canonical":
            self.loads.add(given["href"])


@pytest.mark.slow
@pytest.mark.skipif(not SITE_TOOLS.is_dir(), reason="the tools of the site are not installed: make setup")
def test_the_site_builds_strictly_and_holds_together(tmp_path: Path) -> None:
    # One test: a build takes long, and tests that run side by side would each make one.
    site = tmp_path / "site"
    path = os.pathsep.join([str(SITE_TOOLS), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {page.relative_to(site).as_posix(): Seen(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    assert {"index.html", "concepts.html", "configuration.html", "api/tamiyo.html", "faq.html"} <= set(pages)
    check_links(site, pages)
    check_contents(site)
    if CHROMIUM is not None:
        check_widths(site, tmp_path / "profile")


def check_links(site: Path, pages: dict[str, Seen]) -> None:
    """Every link of the site resolves, to the very place in a page, and nothing is loaded from elsewhere."""
    for name, page in pages.items():
        assert not [load for load in page.loads if urlsplit(load).scheme or load.startswith("//")], name
        for reference in page.links | page.loads:
            parsed = urlsplit(reference)
            if parsed.scheme or name == "404.html":
                continue
            target = (site / name).parent / unquote(parsed.path) if parsed.path else site / name
            assert target.exists(), f"{name}: {reference}"
            inside = pages.get(os.path.relpath(target, site))
            if inside is not None and parsed.fragment and not parsed.fragment.startswith("__"):
                assert unquote(parsed.fragment) in inside.ids, f"{name}: {reference}"


def check_contents(site: Path) -> None:
    """What is generated is there, and no Markdown has been left as text."""
    text = {page.stem: page.read_text(encoding="utf-8") for page in site.glob("*.html")}
    assert 'src="lifecycle.svg"' in text["concepts"] and "mermaid" not in text["forge"]
    assert "schedule_conv" in text["what-growth-buys"], "the table of the benchmark is included"
    lacking = growth.missing((ROOT / "benchmarks" / "results" / "growth.md").read_text(encoding="utf-8"))
    assert ("The table is not complete" in text["what-growth-buys"]) is bool(lacking)
    for name, page in text.items():
        shown = re.sub(r"<(pre|code)\b.*?</\1>", "", page, flags=re.DOTALL)
        assert not re.search(r"```|<p>[-|] |^\|", shown, flags=re.MULTILINE), name


PROBE = """<body>%s<script>
const told = {};
addEventListener('load', () => {
  for (const frame of document.querySelectorAll('iframe')) {
    const inside = frame.contentDocument, images = [...inside.images];
    told[frame.getAttribute('src')] = [inside.documentElement.scrollWidth, images.filter(i => !i.naturalWidth).length];
  }
  document.body.dataset.told = JSON.stringify(told);
});
</script>"""
FRAME = '<iframe src="%s" width="390" height="800" style="border: 0"></iframe>'


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_: object) -> None:
        return


def check_widths(site: Path, profile: Path) -> None:
    """On a phone no page is wider than the screen, and every picture is drawn."""
    pages = [f"{p}.html" for p in ("concepts", "configuration", "blueprints", "compatibility", "forge", "api/tamiyo")]
    (site / "probe.html").write_text(PROBE % "".join(FRAME % page for page in pages), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    options += [f"--user-data-dir={profile}", "--dump-dom"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/probe.html"
        command = [str(CHROMIUM), *options, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        server.shutdown()
    found = re.search(r'data-told="(.*?)"', done.stdout)
    assert found is not None
    assert json.loads(html.unescape(found[1])) == {page: [390, 0] for page in pages}
