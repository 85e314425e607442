"""The library and its files."""

from pathlib import Path

import pytest

from esper.blueprints.library import BUILT_IN, MAX_BYTES, load_library, read_blueprint
from esper.blueprints.site import SiteShape
from esper.leyline.errors import BlueprintError

TEN = "ATTN-STD CONV-CAUSAL CONV-RES EXPERT-MLP MLP-GELU MLP-SWIGLU NORM-RMS PROJ-IA3 PROJ-LORA WIDEN"
GELU = (BUILT_IN / "bp-mlp-gelu.yaml").read_text()


def test_the_first_ten_are_there():
    library = load_library()
    assert library.names() == tuple(f"BP-{name}" for name in TEN.split())
    assert len(library) == 10
    assert [blueprint.ir.name for blueprint in library] == list(library.names())
    assert "BP-WIDEN" in library
    assert "BP-NARROW" not in library


def test_files_are_named_after_their_blueprints():
    for path in BUILT_IN.glob("*.yaml"):
        assert read_blueprint(path).ir.name.lower() == path.stem


@pytest.mark.parametrize("typo", ["BP-MLP-GULE", "bp-mlp-gelu", "MLP-GELU"])
def test_an_unknown_name_lists_near_misses(typo):
    with pytest.raises(BlueprintError, match=f"no blueprint '{typo}'; did you mean .*BP-MLP-GELU"):
        load_library()[typo]


def test_a_name_like_no_other_lists_all():
    with pytest.raises(BlueprintError, match="no blueprint 'zzz'; known: BP-ATTN-STD, "):
        load_library()["zzz"]


def test_another_folder_adds_blueprints(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(GELU.replace("BP-MLP-GELU", "BP-MINE"))
    library = load_library([tmp_path])
    assert len(library) == 11
    assert library["BP-MINE"].ir.id != library["BP-MLP-GELU"].ir.id


def test_a_name_given_twice_is_an_error(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(GELU)
    with pytest.raises(BlueprintError, match="two blueprints are called 'BP-MLP-GELU'"):
        load_library([tmp_path])


def test_a_missing_folder_is_an_error(tmp_path: Path):
    with pytest.raises(BlueprintError, match="nowhere is not a folder"):
        load_library([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "exactly 'ir' and 'manifest'"),
        ("ir: {}", "exactly 'ir' and 'manifest'"),
        (": [", "while parsing"),
        ("ir: &a {}\nmanifest: *a", "aliases are not allowed"),
        (GELU.replace("reads: output", "reads: output\n  reads: input"), "key 'reads' is given twice"),
        (
            GELU.replace("ir:", "ir: !!python/object/apply:os.system [ls]\nother:", 1),
            "could not determine a constructor",
        ),
        (GELU.replace("fn: gelu", "fn: gelo"), "'gelu': fn"),
        (GELU.replace("risk_score: 0.1", "risk_score: 2"), "manifest: risk_score"),
        (GELU.replace("risk_score: 0.1", "risk_score: .nan"), "manifest: risk_score"),
        (GELU.replace("family: mlp", "familly: mlp"), "manifest: .*familly"),
        (GELU.replace("mergeable: false", "mergeable: true"), "disagree about mergeable"),
        ("#" * (MAX_BYTES + 1), "larger than 65536 bytes"),
        ("[" * 2000, "mine.yaml"),
    ],
)
def test_a_malformed_file_is_named_with_its_fault(tmp_path: Path, text, complaint):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(BlueprintError, match=complaint) as caught:
        load_library([tmp_path])
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(BlueprintError, match="mine.yaml"):
        load_library([tmp_path])


def test_the_cost_vector_follows_the_shape():
    gelu = load_library()["BP-MLP-GELU"]
    params, flops, latency_ms = gelu.cost_vector(SiteShape("btd", 64, 64, 128), {"h": 16})
    assert (params, flops) == (2128, 524_288)
    assert gelu.cost_vector(SiteShape("btd", 64, 64, 256), {"h": 16}) == (params, 2 * flops, 2 * latency_ms)
