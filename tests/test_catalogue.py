"""`esper blueprints`: what is there, what it is, how two differ, and where one fits in a model of one's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from esper.blueprints import load_library
from esper.blueprints.estimate import reference
from esper.blueprints.library import BUILT_IN
from esper.cli import main

HOST = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2))
        self.head = nn.Linear(8, 4)
        self.spare = nn.Linear(4, 4)
    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

def build():
    return Net(), torch.randn(2, 3, 8, 8)

def alone():
    return Net()
"""


@pytest.fixture
def host(tmp_path: Path) -> str:
    (tmp_path / "own_parts.py").write_text(HOST)
    return f"{tmp_path}/own_parts.py"


def said(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> Any:
    assert main(["blueprints", *args]) == status
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["blueprints", *args])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_list_can_be_narrowed(capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(said(capsys, "list", "--json"))
    assert [record["name"] for record in whole] == list(load_library().names())
    assert whole == json.loads(said(capsys, "--json"))
    images = json.loads(said(capsys, "list", "--layout", "bchw", "--family", "gate", "--json"))
    assert [record["name"] for record in images] == ["BP-SQUEEZE-EXCITE"]
    by_name = {record["name"]: record for record in whole}
    assert by_name["BP-CANON"]["safety_tier"] == 1 and by_name["BP-CANON"]["lacking"] == []
    assert by_name["BP-ALL-REDUCE-SHARD"]["lacking"] == ["process_group"]
    assert "Needs a run of several ranks" in " ".join(said(capsys, "list", "--family", "norm").split())


def test_one_is_shown_as_its_file_with_its_price(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "show", "BP-CANON")
    assert "128 positions: 256 parameters, 65,536 FLOPs a sample" in text
    assert "op: causal_conv" in text and "arXiv 2512.17351" in text
    record = json.loads(said(capsys, "show", "BP-ALL-REDUCE-SHARD", "--json"))
    assert record["cost"]["params"] == 64 and record["ir"]["name"] == "BP-ALL-REDUCE-SHARD"
    assert "needs a run of several ranks" in said(capsys, "show", "BP-ALL-REDUCE-SHARD")


def test_what_is_shown_is_a_blueprint_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(said(capsys, "show", "BP-GLU"))
    assert said(capsys, "diff", "BP-GLU", str(tmp_path / "again.yaml")) == "They are the same.\n"


def test_two_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "diff", "BP-MLP-GELU", "BP-MLP-RELU2", status=1).splitlines()
    assert "-    attrs: {fn: gelu}" in lines and "+    attrs: {fn: relu2}" in lines
    assert not any("layer_norm" in line for line in lines)


def test_a_dry_run_tells_places_sizes_and_prices(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = json.loads(said(capsys, "dryrun", "BP-CONV-DILATED", f"{host}:build", "--json"))
    found = {record["path"]: record for record in records}
    assert list(found) == ["body.0", "body.2", "head", "spare"]
    first = found["body.0"]
    assert (first["reads"], first["dims"], first["why_not"]) == ("output", {"h": 4}, None)
    assert (first["params"], first["macs"]) == (8 * 9 * 4 + 4 + 4 * 8 + 8, 64 * (8 * 9 * 4 + 4 * 8))
    assert "this site is bd" in found["head"]["why_not"]
    assert found["spare"]["why_not"].startswith("no seeds: its forward never runs")
    page = said(capsys, "dryrun", "BP-CONV-DILATED", f"{host}:build")
    assert "BP-CONV-DILATED@1.0.0 fits 2 of 4 places." in page and "Not at head:" in page


def test_a_dry_run_within_a_budget_and_at_chosen_sites(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("dryrun", "BP-CONV-DILATED", f"{host}:build", "--site", "body.*", "--json", "--max-params")
    [first, second] = [r for r in json.loads(said(capsys, *chosen, "200")) if "dims" in r]
    assert first["dims"] == {"h": 2} and first["params"] <= 200 and second["params"] <= 200
    records = json.loads(said(capsys, *chosen, "5", status=1))
    assert any("needs at least 89 parameters here; the budget is 5" in record["why_not"] for record in records)


def test_who_reads_an_input_needs_its_positions(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = json.loads(said(capsys, "dryrun", "BP-WIDEN-CONV", f"{host}:build", "--site", "body.[02]", "--json"))
    assert [record["why_not"] for record in records] == [
        None,
        "BP-WIDEN-CONV reads the site's input, which has other positions than its output.",
    ]


def test_what_is_lacking_here_fits_nowhere(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = " ".join(said(capsys, "dryrun", "BP-ALL-REDUCE-SHARD", f"{host}:build", status=1).split())
    assert "fits 0 of 4 places" in page and "that is not offered here, so choose another blueprint" in page


def test_a_file_of_ones_own(host: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text((BUILT_IN / "bp-glu.yaml").read_text().replace("BP-GLU", "BP-MINE"))
    records = json.loads(said(capsys, "dryrun", str(mine), f"{host}:build", "--site", "head", "--json"))
    assert records[0]["params"] == 2 * (8 * 4 + 4)


def test_what_is_not_understood_is_said(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean BP-CANON" in error(capsys, "show", "BP-CANNON")
    assert "unknown command 'blueprints lst'; known: list, show, diff, dryrun, submit, ask" in error(capsys, "lst")
    assert "a dry run needs a batch" in error(capsys, "dryrun", "BP-GLU", f"{host}:alone")
    assert "nowhere.yaml" in error(capsys, "diff", "BP-GLU", "nowhere.yaml")


def test_every_blueprint_has_a_place_for_its_price() -> None:
    assert all(reference(blueprint.ir) is not None for blueprint in load_library())
