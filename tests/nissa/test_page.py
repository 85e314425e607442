import json
import math
import re
import time
from importlib.resources import files
from pathlib import Path

import matplotlib
import pytest
import yaml
from matplotlib import rcParams

from esper.cli import main
from esper.leyline.errors import ConfigError, DataError, OutputError
from esper.leyline.events import Candidate, DecisionMade, Fault, GraftFaulted, RollbackTrigger, RolledBack
from esper.leyline.states import SeedState
from esper.nissa.chronicle import Chronicle
from esper.nissa.page.forge import forge_facts
from esper.nissa.page.page import write_page
from esper.nissa.summary import summarize, verdict
from esper.nissa.watch.live import Live
from tests.nissa.pages import Reader, contrast, run_folder, variables
from tests.nissa.stories import TO_THE_GATE, boundary, life, story
from tests.urza import samples
from tests.urza.samples import compiled, opened, validated

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$\\frac$"


def told(lives: int = 3) -> Chronicle:
    """A run with ramps, a weighed decision, a fault and a rollback."""
    chronicle = story(lives=lives)
    weighed = Candidate(seed_id="blocks.0.ffn#0.0", blueprint_id="BP-MLP-GELU", score=0.08, chosen=True, why="wins")
    chronicle.hear(DecisionMade(run_id="r", epoch=0, step=100, policy="heuristic", explanation="end", candidates=()))
    at = next(place for place, m in enumerate(chronicle.messages) if getattr(m, "target", "") == SeedState.FINE_TUNING)
    kept = DecisionMade(run_id="r", epoch=0, step=40, policy="heuristic", explanation="it won", candidates=(weighed,))
    chronicle.messages.insert(at, kept)
    for step in range(20, 100):
        alphas = {f"blocks.{n}.ffn#0.0": min(1.0, (step - 20) / 10) for n in range(lives) if n == 0 or step < 40}
        chronicle.ramps.note(step, alphas)
    fault = GraftFaulted(run_id="r", epoch=0, step=100, seed_id="x#0.0", fault=Fault.NOT_FINITE, detail="NaN in it")
    back = RolledBack(
        run_id="r", epoch=0, step=100, trigger=RollbackTrigger.LOSS_SPIKE, restored_epoch=0, restored_step=90
    )
    chronicle.hear(fault)
    chronicle.hear(back)
    return chronicle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "run", told())


def read(path: Path) -> Reader:
    reader = Reader(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_the_page_tells_the_run(folder: Path) -> None:
    page = write_page([folder])
    assert page == folder / "report.html"
    reader = read(page)
    paragraph = reader.text("p")
    assert "digits has trained for 100 steps under the policy heuristic." in paragraph
    assert "3 adaptations were tried in 3 layers (1 kept; 2 culled, outcompeted)." in paragraph
    assert "BP-MLP-GELU at blocks.0.ffn#0.0 (500 parameters, gain .100, at least .080)" in paragraph
    assert "from 1,000 to 1,500 parameters (+50.0 %)" in paragraph
    assert "The run went back 1 time, and 1 fault of a child occurred." in paragraph
    keys = ["losses", "lattice", "ramps", "parameters", "gains"]
    assert [figure["id"] for figure in reader.of("figure")] == [f"run1-{key}" for key in keys]
    cells = [text for tag, text in reader.texts if tag == "td"]
    assert {"it won", "NaN in it", "child failed: not finite", "went back to step 90: loss spike"} <= {
        *cells,
        *paragraph.split("\n"),
    }
    assert reader.text("title").startswith("digits")


def test_a_decision_shows_its_evidence_and_what_followed(folder: Path) -> None:
    text = write_page([folder]).read_text()
    card = next(part for part in text.split("<li><h4>") if "it won" in part)
    cells = re.findall(r"<td>(.*?)</td>", card)
    # Seed, blueprint, chosen, score; then the measurement of the field report: gain, bound, price, samples.
    assert cells[:8] == ["blocks.0.ffn#0.0", "BP-MLP-GELU", "yes", ".080", ".100", ".080", ".0050", "32"]
    assert "BP-MLP-GELU at blocks.0.ffn#0.0: fine tuning (gate passed)" in card


def test_ramps_show_the_alphas_that_were_noted(folder: Path) -> None:
    text = write_page([folder]).read_text()
    figure = text.partition('<figure id="run1-ramps">')[2].partition("</figure>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in figure.split("<tr>")]
    kept = [(row[2], row[3]) for row in rows if row and row[0] == "blocks.0.ffn#0.0"]
    lost = [(row[2], row[3]) for row in rows if row and row[0] == "blocks.1.ffn#0.0"]
    assert kept == [("20", "0.000"), ("30", "1.000")]
    assert lost == [("20", "0.000"), ("30", "1.000"), ("40", "0.000")]


def test_it_is_accessible(folder: Path, tmp_path: Path) -> None:
    other = run_folder(tmp_path / "other", story(lives=1), "other")
    reader = read(write_page([folder, other]))
    assert len(reader.ids) == len(set(reader.ids))
    known = set(reader.ids)
    for tag, attributes in reader.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, next(iter(known))) in known, (tag, attributes)
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in known
        for reference in re.findall(r"url\(#(.*?)\)", " ".join(attributes.values())):
            assert reference in known
    assert reader.of("html")[0]["lang"] == "en" and "width=device-width" in str(reader.of("meta"))
    drawings = reader.of("svg")
    assert len(drawings) >= 20 and all(d["role"] == "img" and d["aria-labelledby"] for d in drawings)
    assert all(text.strip() for tag, text in reader.texts if tag in ("title", "desc"))
    levels = [int(tag[1]) for tag, _ in reader.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(th.get("scope") == "col" for th in reader.of("th"))
    assert len(reader.of("th")) == len([text for tag, text in reader.texts if tag == "th"]), "no heading is empty"
    scrolling = [a for _, a in reader.elements if a.get("class") == "scroll"]
    assert scrolling and all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)
    assert len(reader.of("figcaption")) == len(reader.of("figure")) <= len(reader.of("details"))


def test_text_contrasts_with_its_ground_in_both_themes() -> None:
    sheet = files("esper.nissa.page").joinpath("page.css").read_text()
    for theme, colours in variables(sheet).items():
        for ground in ("--paper", "--soft"):
            for ink in ("--ink", "--faint", "--link", "--good"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (theme, ink, ground)
        for line in ("--train", "--decision"):
            assert contrast(colours[line], colours["--paper"]) >= 3.0, (theme, line)
    assert contrast("#ffffff", "#000000") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5


def test_nothing_is_loaded_from_anywhere(folder: Path) -> None:
    text = write_page([folder]).read_text()
    reader = Reader(text)
    assert not [tag for tag, _ in reader.elements if tag in ("script", "link", "img", "iframe", "object", "embed")]
    for tag, attributes in reader.elements:
        assert "src" not in attributes and "srcset" not in attributes
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert "://" not in value, (tag, name, value)
        if "href" in attributes or "xlink:href" in attributes:
            assert attributes.get("href", "").startswith("#")
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_names_from_a_run_are_never_markup(tmp_path: Path) -> None:
    chronicle = Chronicle(run_id=EVIL, policy=EVIL, host_params=1000)
    messages = [*life(f"{EVIL}#0.0", EVIL), DecisionMade(run_id="r", epoch=0, step=60, policy="p", explanation=EVIL)]
    for message in [*messages, boundary(70, added=500)]:
        chronicle.hear(message.model_copy(update={"run_id": EVIL}))
    chronicle.ramps.note(20, {f"{EVIL}#0.0": 0.5})
    fossil = {"seed_id": f"{EVIL}#0.0", "blueprint": EVIL, "params": 5, "kernel_id": EVIL, "fault": EVIL}
    folder = run_folder(tmp_path / "run", chronicle, EVIL, lineage={"fossils": [fossil]})
    reader = read(write_page([folder, folder]))
    assert not reader.of("script") and not reader.of("img")
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    assert EVIL in reader.text("p") and EVIL in reader.text("td") and EVIL in reader.text("h2")


@pytest.mark.parametrize("lives", [0, 1, 70])
def test_runs_of_any_size(tmp_path: Path, lives: int) -> None:
    page = write_page([run_folder(tmp_path / "run", story(lives=lives, steps=5000))])
    text = page.read_text()
    assert ("No seed was ever active." in text) == (lives == 0)
    assert ("10 more seeds are left out" in text) == (lives == 70)
    assert read(page) and page.stat().st_size < 1_500_000


def test_a_run_under_way_is_told(tmp_path: Path) -> None:
    chronicle = Chronicle(run_id="r")
    for message in [*life(path=TO_THE_GATE), boundary(45, added=500)]:
        chronicle.hear(message)
    folder = run_folder(tmp_path / "run", chronicle)
    (folder / "growth.json").unlink()
    text = write_page([folder]).read_text()
    assert "1 adaptation was tried in net.0 (1 under way)." in text
    assert "The run noted no alphas" in text and "not recorded" in text


def test_a_twin_stands_beside_its_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", story())
    run_folder(folder / "twin", story(lives=0))
    for name, loss in ((folder, 0.25), (folder / "twin", 0.5)):
        log = name / "csv" / "version_0"
        log.mkdir(parents=True)
        (log / "metrics.csv").write_text(f"report_loss,step\n,1\n9.0,2\n{loss},3\n,4\n")
    text = write_page([folder]).read_text()
    table = text.partition("With and without growth</h3>")[2].partition("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert [row[:3] for row in rows] == [["digits", "1,500", ".250"], ["digits, without growth", "1,000", ".500"]]
    assert "is .250 against .500 without growth" in text


def test_a_twin_on_the_same_samples_gives_a_verdict_with_its_interval(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", story(lives=2))
    run_folder(folder / "twin", story(lives=0))
    grown, without = [1.9, 1.8, 2.0, 1.9, 1.9], [2.0, 1.9, 2.1, 2.0, 2.0]
    results = [
        summarize(chronicle, title="", output_dir=str(place), report_loss=sum(losses) / 5, report_samples=tuple(losses))
        for chronicle, place, losses in ((story(lives=2), folder, grown), (story(lives=0), folder / "twin", without))
    ]
    text = write_page([folder]).read_text()
    said = verdict(*results)
    assert "paired gain .100, 95 % interval .100 to .100" in said and f"<strong>{said}</strong>" in text
    (folder / "twin" / "report.json").write_text('{"loss": 2.0, "samples": null}')
    assert "a single number, without an interval" in write_page([folder]).read_text()
    (folder / "twin" / "report.json").write_text('{"loss": ')
    assert "No verdict: the report part was not measured in both runs." in write_page([folder]).read_text()


def test_a_report_loss_that_is_no_number_is_kept_as_none(tmp_path: Path) -> None:
    summarize(story(), title="", output_dir=str(tmp_path), report_loss=math.nan, report_samples=(1.0, math.nan))
    assert json.loads((tmp_path / "report.json").read_text()) == {"loss": None, "samples": None}


def test_a_damaged_log_has_no_report_loss(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", story())
    (folder / "csv").mkdir()
    (folder / "csv" / "metrics.csv").write_text("report_loss\nhalf a li")
    assert "The loss on the report part" not in write_page([folder]).read_text()


def test_several_runs_are_compared(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name, story(lives=n), name) for n, name in enumerate(("a", "b", "c"))]
    page = write_page(folders, tmp_path / "all.html")
    reader = read(page)
    assert page == tmp_path / "all.html" and not (folders[0] / "report.html").exists()
    assert [i for i in reader.ids if re.fullmatch(r"run\d+", i)] == ["run1", "run2", "run3"]
    table = page.read_text().partition('id="together"')[2].partition("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert [row[0] for row in rows] == ["a", "b", "c"] and [row[1] for row in rows] == ["1,000", "1,500", "1,500"]
    assert {row[3] for row in rows} == {"2.010"} and {row[4] for row in rows} == {"100"}
    assert "comparison" in [figure["id"] for figure in reader.of("figure")]


def test_runs_of_one_title_are_told_apart(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name, story(lives=n), "demo") for n, name in enumerate(("a", "b"))]
    headings = read(write_page([*folders, folders[0]])).text("h2").split("\n")
    assert headings == ["Side by side", "demo (a) #1", "demo (b)", "demo (a) #3"]


def test_kernels_show_tier_latency_and_the_prior_of_their_risk(tmp_path: Path) -> None:
    chronicle = story(lives=2)
    ids = {"blocks.0.ffn#0.0": "aa-bd.8.8.h3-eager-bb", "blocks.1.ffn#0.0": "cc-bd.8.8.h3-inductor-dd"}
    for place, message in enumerate(chronicle.messages):
        kernel = {"kernel_artifact_id": ids.get(getattr(message, "seed_id", ""), "")}
        if hasattr(message, "kernel_artifact_id"):
            chronicle.messages[place] = message.model_copy(update=kernel)
        if hasattr(message, "cost"):
            cost = message.cost.model_copy(update={"latency_ms": 0.25})
            chronicle.messages[place] = message.model_copy(update=kernel | {"cost": cost})
    text = write_page([run_folder(tmp_path / "run", chronicle)]).read_text()
    table = text.partition("Kernels</h3>")[2].partition("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert [row[2:4] for row in rows] == [["eager", ".250 (estimated)"], ["compiled", ".250 (measured)"]]
    assert [row[0] for row in rows] == list(ids.values()) and {row[4] for row in rows} == {"500"}
    assert {row[5] for row in rows} == {"0.10"} and {row[6] for row in rows} == {"not recorded"}
    assert "its folder names none that can be read here" in text
    happened = text.partition("System events</h3>")[2].partition("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in happened.split("<tr>")[2:]]
    assert rows == [["20", "compiled kernel taken", "blocks.1.ffn#0.0", ids["blocks.1.ffn#0.0"]]]


def with_kernel(chronicle: Chronicle, kernel: str) -> Chronicle:
    """Return the run with one kernel under all its children."""
    for place, message in enumerate(chronicle.messages):
        if hasattr(message, "kernel_artifact_id"):
            chronicle.messages[place] = message.model_copy(update={"kernel_artifact_id": kernel})
    return chronicle


@pytest.mark.parametrize("relative", [True, False])
def test_what_the_forge_knows_is_told(tmp_path: Path, relative: bool) -> None:
    forge = tmp_path / "forge"
    with opened(forge) as urza:
        validated(urza, "before")
        began = time.time()
        validated(urza, "taken")
        urza.put(compiled("bad"))
        urza.judge(samples.verdict("bad", passed=False), "SANITY_FAILED: <b>differs</b> from eager")
        ended = time.time()
        validated(urza, "after")
    folder = run_folder(tmp_path / "outputs" / "run", with_kernel(story(lives=1), "taken"))
    root = "forge" if relative else str(forge)
    (folder / "config.yaml").write_text(yaml.safe_dump({"forge": {"root": root}}))
    (folder / "live.json").write_text(Live(run_id="r", state="ended", began=began, time=ended).model_dump_json())
    text = write_page([folder]).read_text()
    kernels = text.partition("Kernels</h3>")[2].partition("</table>")[0]
    assert "<td>0.10 (confidence 0.90)</td>" in kernels
    meanwhile = text.partition("The forge meanwhile</h3>")[2].partition("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in meanwhile.split("<tr>")[2:]]
    assert [(row[1], row[2]) for row in rows] == [("validated", "BP-A · taken"), ("rejected", "BP-A · bad")]
    assert rows[1][3] == "SANITY_FAILED: &lt;b&gt;differs&lt;/b&gt; from eager" and int(rows[0][0]) >= 0


@pytest.mark.parametrize("config", ["", "[1", "forge: {}", "forge: {root: 5}", "forge: {root: nowhere}"])
def test_a_forge_that_cannot_be_read_is_none(tmp_path: Path, config: str) -> None:
    assert forge_facts(tmp_path) is None
    (tmp_path / "config.yaml").write_text(config)
    assert forge_facts(tmp_path) is None


def test_a_run_that_does_not_tell_when_it_ran_has_no_events_of_the_forge(tmp_path: Path) -> None:
    with opened(tmp_path / "forge") as urza:
        validated(urza, "k")
    (tmp_path / "config.yaml").write_text("forge: {root: forge}")
    found = forge_facts(tmp_path)
    assert found is not None and found.events is None and set(found.risks) == {"k"}
    (tmp_path / "config.yaml").write_text("forge: {root: forge, enabled: false}")
    assert forge_facts(tmp_path) is None, "the run had none"
    (tmp_path / "config.yaml").write_text("forge: {root: forge}")
    (tmp_path / "forge" / "store" / "records" / "cache.db").write_bytes(b"damaged")
    assert forge_facts(tmp_path) is None


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"missing is no folder.*give the folder that a run wrote"):
        write_page([tmp_path / "missing"])
    with pytest.raises(ConfigError, match=r"empty holds no events.jsonl"):
        write_page([tmp_path / "empty"])
    (tmp_path / "empty" / "events.jsonl").write_text("")
    with pytest.raises(DataError, match=r"holds no event of a run yet; wait"):
        write_page([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="no run was given"):
        write_page([])
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "missing")])
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


def test_a_target_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write .*choose another file with --out"):
        write_page([folder], tmp_path / "file" / "page.html")
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(OutputError, match="cannot write .*taken.html"):
        write_page([folder], tmp_path / "taken.html")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_command_prints_where_the_page_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--out", str(folder / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "page.html")
    assert (folder / "page.html").read_text().startswith("<!doctype html>")


def test_damaged_files_beside_the_events_are_left_out(folder: Path) -> None:
    (folder / "lineage.json").write_text("[1")
    (folder / "growth.json").write_text(json.dumps([1]))
    assert "BP-MLP-GELU" in write_page([folder]).read_text()


def test_the_same_run_gives_the_same_page(folder: Path) -> None:
    before, backend = dict(rcParams), matplotlib.get_backend()
    assert write_page([folder]).read_bytes() == write_page([folder]).read_bytes()
    assert dict(rcParams) == before and matplotlib.get_backend() == backend
