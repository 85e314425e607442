"""The page in a browser, where there is one: nothing overflows, everything can be read, nothing is asked for."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from esper.nissa.page.page import write_page
from tests.nissa.pages import contrast, run_folder
from tests.nissa.stories import boundary, life, story

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)

PROBE = """<script>
const solid = c => c !== 'rgba(0, 0, 0, 0)' && c !== 'transparent';
const ground = e => { while (e && !solid(getComputedStyle(e).backgroundColor)) e = e.parentElement;
                      return e ? getComputedStyle(e).backgroundColor : 'rgb(255, 255, 255)'; };
const shown = e => e.checkVisibility();
const scale = e => e instanceof SVGElement ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1;
const texts = [...document.querySelectorAll('body *')].filter(e => shown(e) && !e.closest('script') &&
  !(e instanceof SVGElement && e.tagName !== 'text') && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
const told = {
  width: document.documentElement.scrollWidth, room: document.documentElement.clientWidth,
  pairs: [...new Set(texts.map(e => { const s = getComputedStyle(e);
    return JSON.stringify([e instanceof SVGElement ? s.fill : s.color, ground(e)]); }))].map(JSON.parse),
  smallest: Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize) * scale(e))),
  cut: [...document.querySelectorAll('svg')].filter(shown).flatMap(s => { const box = s.getBoundingClientRect();
    return [...s.querySelectorAll('text')].filter(t => t.getBoundingClientRect().right > box.right + 2 ||
      t.getBoundingClientRect().left < box.left - 2).map(t => t.textContent); }),
  drawings: [...document.querySelectorAll('figure svg')].filter(shown).length,
  figures: document.querySelectorAll('figure').length,
};
addEventListener('load', () => {
  told.loaded = performance.getEntriesByType('resource').length;
  parent.document.body.dataset.told = JSON.stringify(told);
});
</script>"""


def chromium(folder: Path, *arguments: str) -> str:
    profile = f"--user-data-dir={folder / 'profile'}"
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *OPTIONS, profile, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    chronicle = story(lives=5)
    long = f"base_model.{'transformer.layers.' * 5}3.self_attention.output_projection#0.0"
    for message in life(long, "BP-DEPTHWISE-CONVOLUTION-GATED"):
        chronicle.hear(message)
    chronicle.hear(boundary(100, 2.0, 1000))
    for step in range(20, 100):
        chronicle.ramps.note(step, {f"blocks.{n}.ffn#0.0": min(1.0, step / 50) for n in range(5)} | {long: 0.5})
    runs = [run_folder(folder / "a", chronicle, "a run " * 20), run_folder(folder / "b", story(lives=0), "another")]
    return write_page(runs, folder / "page.html")


def colour(text: str) -> str:
    """Return the colour that a browser tells, as `#rrggbb`."""
    return "#" + "".join(f"{int(n):02x}" for n in re.findall(r"\d+", text)[:3])


def probed(page: Path, folder: Path, width: int, *arguments: str) -> dict[str, Any]:
    # A window has a least width, a frame has none.
    inside = html.escape(page.read_text().replace("</body>", f"{PROBE}</body>"))
    around = (
        f'<body style="margin: 0"><iframe style="border: 0" width="{width}" height="2000" srcdoc="{inside}"></iframe>'
    )
    (folder / "around.html").write_text(around)
    dom = chromium(folder, "--window-size=1300,2000", "--dump-dom", *arguments, (folder / "around.html").as_uri())
    found = re.search(r'data-told="(.*?)"', dom)
    assert found is not None
    told: dict[str, Any] = json.loads(html.unescape(found[1]))
    return told


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    told = probed(page, tmp_path, width, f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    assert told["room"] == width and told["width"] <= width
    assert told["drawings"] == told["figures"] > 5, "one drawing of each figure is shown"
    grounds = {colour(ground) for _, ground in told["pairs"]}
    assert ("#ffffff" in grounds) is not dark
    for ink, ground in told["pairs"]:
        assert contrast(colour(ink), colour(ground)) >= 4.5, (ink, ground)
    assert told["smallest"] >= 9.0
    assert told["cut"] == []
    assert told["loaded"] == 0


def test_it_prints(page: Path, tmp_path: Path) -> None:
    chromium(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", page.as_uri())
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
