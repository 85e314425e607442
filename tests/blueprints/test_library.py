"""The library and its files."""

from pathlib import Path

import pytest

from esper.blueprints.library import BUILT_IN, MAX_BYTES, STANDARD, load_library, read_blueprint
from esper.blueprints.plan import make_plan
from esper.blueprints.site import SiteShape
from esper.leyline.errors import BlueprintError

TEN = "ATTN-STD CONV-CAUSAL CONV-RES EXPERT-MLP MLP-GELU MLP-SWIGLU NORM-RMS PROJ-IA3 PROJ-LORA WIDEN"
GELU = (BUILT_IN / "bp-mlp-gelu.yaml").read_text()


NAMED = """
    ATTN-STD ATTN-SPLIT-QK MLP-GELU-2048 MLP-SWIGLU-4096 LN-RMS ROUTER-TOP2 EXPERT-MLP-1D EXPERT-MLP-SWIGLU
    CAP-FUSE-HFFN ROUTER-MOE-AUXLOSS PROJ-LORA-64 PROJ-IA3 KV-CACHE-8BIT ALL-REDUCE-SHARD LOAD-BAL-EMA MON-ACT-STATS
    CLAMP-GRAD-NORM FLASH-ATTN-V2 KV-GROUPED-ROPE
"""
"""Names that the library promises beside the standard ten."""


def test_the_standard_ten_are_there():
    library = load_library()
    assert tuple(f"BP-{name}" for name in TEN.split()) == STANDARD
    assert set(STANDARD) < set(library.names())
    assert [blueprint.ir.name for blueprint in library] == sorted(library.names())
    assert "BP-WIDEN" in library
    assert "BP-NARROW" not in library


def test_fifty_are_there_and_no_two_are_the_same_but_for_names():
    library = load_library()
    assert len(library) >= 50
    assert {f"BP-{name}" for name in NAMED.split()} < set(library.names())
    assert len({shape_of(blueprint.ir) for blueprint in library}) == len(library)


def shape_of(ir):
    """What a blueprint computes, without names and sizes: operations, wiring, and what is no number of features."""
    places = {node.id: str(place) for place, node in enumerate(ir.nodes)} | {"input": "input"}
    sizes = {"out", "groups", "hidden", "window"}
    return tuple(
        (
            node.op,
            *(places[source] for source in node.inputs),
            *sorted((k, str(v)) for k, v in node.attrs.items() if k not in sizes),
        )
        for node in ir.nodes
    )


@pytest.mark.parametrize(
    ("name", "size", "wide", "most"),
    [
        ("BP-MLP-GELU-2048", "h", 512, 2048),
        ("BP-MLP-SWIGLU-4096", "h", 1536, 4096),
        ("BP-PROJ-LORA-64", "r", 64, 64),
    ],
)
def test_a_number_in_a_name_is_the_usual_size_where_there_is_room(name, size, wide, most):
    ir = load_library()[name].ir
    sizes = [make_plan(ir, SiteShape("bd", width, width)).dims[size] for width in (8, wide, 4 * wide)]
    assert sizes[0] < most and sizes[1:] == [most, most]


def test_what_is_safe_and_what_is_not():
    tiers = {blueprint.ir.name: blueprint.manifest.safety_tier for blueprint in load_library()}
    assert {name for name, tier in tiers.items() if tier == 3} == {
        "BP-ALL-REDUCE-SHARD",
        "BP-CLAMP-GRAD-NORM",
        "BP-FLASH-ATTN-V2",
    }
    assert tiers["BP-CANON"] == 1 and tiers["BP-ROUTER-TOP2"] == 2


def test_files_are_named_after_their_blueprints():
    for path in BUILT_IN.glob("*.yaml"):
        assert read_blueprint(path).ir.name.lower() == path.stem


@pytest.mark.parametrize("typo", ["BP-MLP-GULE", "bp-mlp-gelu", "MLP-GELU"])
def test_an_unknown_name_lists_near_misses(typo):
    with pytest.raises(BlueprintError, match=f"no blueprint '{typo}'; did you mean .*BP-MLP-GELU"):
        load_library()[typo]


def test_a_name_like_no_other_lists_all():
    with pytest.raises(BlueprintError, match="no blueprint 'zzz'; known: BP-ALL-REDUCE-SHARD, "):
        load_library()["zzz"]


def test_another_folder_adds_blueprints(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(GELU.replace("BP-MLP-GELU", "BP-MINE"))
    library = load_library([tmp_path])
    assert len(library) == len(load_library()) + 1
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
        (GELU.replace("risk_score: 0.1", "risk_score: 0.2"), "a safe action has a risk_score of at most 0.1"),
        (
            GELU.replace("  mergeable: false", "  mergeable: false\n  requires_capability: [process_group]"),
            "requires_capability must name what its operations need: nothing",
        ),
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


def test_the_estimate_follows_the_shape():
    gelu = load_library()["BP-MLP-GELU"]
    small = gelu.estimate(SiteShape("btd", 64, 64, 128), {"h": 16})
    assert (small.params, small.macs) == (2128, 262_144)
    longer = gelu.estimate(SiteShape("btd", 64, 64, 256), {"h": 16})
    assert (longer.params, longer.macs, longer.latency_ms) == (2128, 2 * small.macs, 2 * small.latency_ms)
    assert small.memory_mb < longer.memory_mb < 2 * small.memory_mb  # the parameters are there once
    at_reference = gelu.estimate(SiteShape("btd", 64, 64, 128))
    assert at_reference.latency_ms == gelu.manifest.expected_latency_ms > small.latency_ms
