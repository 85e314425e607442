"""What may be compiled and what may not, and that each refusal is about something real."""

from pathlib import Path

import pytest
import torch

from esper.blueprints import build, load_library
from esper.karn.service import reference, stated
from esper.leyline.artifacts import KernelSpec
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError
from esper.tezzeret.birth import check_birth
from esper.tezzeret.specs import blueprint_of, planned, site_of
from esper.tezzeret.validator import Bounds, check_file, check_ir
from tests.tezzeret.samples import STUCK, graph, label, library, spec

EXPLODES = graph("a linear input out=8 init=zero", "n rms_norm a")


@pytest.mark.parametrize("one", [*library()], ids=label)
def test_the_whole_library_passes(one: KernelSpec) -> None:
    for dtype in ("float32", "bfloat16"):
        assert check_ir(one.model_copy(update={"dtype": dtype})).plan.steps


def test_so_do_all_further_blueprints() -> None:
    for blueprint in load_library():
        if not blueprint.ir.requires:
            assert check_ir(reference(stated(blueprint.ir).ir)).plan.steps


@pytest.mark.parametrize("rule", STUCK)
def test_a_refused_graph_really_leaves_weights_without_any_gradient(rule: str) -> None:
    with pytest.raises(BlueprintError, match=rf"node '[a-z]': rule {rule}"):
        check_ir(STUCK[rule])
    assert "weight" in " ".join(_never_moved(STUCK[rule]))


def test_a_graph_that_starts_only_its_last_layer_at_zero_moves_all_of_its_weights() -> None:
    fine = graph("a linear input out=4", "g act a fn=relu", "b linear g out=8 init=zero")
    check_ir(fine)
    assert not _never_moved(fine)


def test_the_norm_of_a_zero_jumps_to_full_size_in_one_tiny_step() -> None:
    with pytest.raises(BlueprintError, match="node 'n': rule norm-of-zero"):
        check_ir(EXPLODES)
    child = build(blueprint_of(EXPLODES), site_of(EXPLODES), seed=0)
    with torch.no_grad():
        child.get_parameter("a.bias").add_(1e-3)
    assert child(torch.randn(4, 8)).abs().mean() > 0.5


@pytest.mark.parametrize(
    ("nodes", "fields"),
    [
        (("a linear input out=8",), {}),
        (("a linear input out=8 init=zero",), {"initial": "identity"}),
        (("g gain input init=zero",), {"initial": "identity"}),
    ],
)
def test_a_child_must_do_nothing_at_birth(nodes: tuple[str, ...], fields: dict[str, str]) -> None:
    refused = graph(*nodes, **fields)
    with pytest.raises(BlueprintError, match=r"node '[ag]': rule birth"):
        check_ir(refused)
    x = torch.randn(3, 8)
    result = build(blueprint_of(refused), site_of(refused), seed=0)(x)
    assert not torch.equal(result, x if fields else torch.zeros(3, 8))


def test_what_an_untrainable_child_never_learns_is_no_fault() -> None:
    check_birth(*_planned(graph("a linear input out=8 init=zero", "r act a fn=relu", trainable=False)))


@pytest.mark.parametrize(
    ("bounds", "rule"),
    [
        (Bounds(params=100), "node 'up': rule params"),
        (Bounds(macs=1000), "node 'up': rule macs"),
        (Bounds(activations=50), "node 'up': rule activations"),
        (Bounds(text=10), "rule size"),
    ],
)
def test_a_child_beyond_its_bounds_is_refused(bounds: Bounds, rule: str) -> None:
    with pytest.raises(BlueprintError, match=rule):
        check_ir(spec(), bounds)


def test_attention_scores_count_as_memory() -> None:
    many = spec("BP-ATTN-STD", tokens=1 << 15)
    with pytest.raises(BlueprintError, match="node 'attend': rule activations"):
        check_ir(many)


@pytest.mark.parametrize("text", ["", "[" * 40_000, '{"a"', "null", "[]", '{"name":"BP-X"}'])
def test_text_that_is_no_blueprint_is_refused(text: str) -> None:
    with pytest.raises(BlueprintError):
        check_ir(spec(ir=text))


def test_a_site_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BlueprintDoesNotFit):
        check_ir(spec(layout="bchw"))


def test_a_file_is_checked_at_typical_sites(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "esper/blueprints/library/bp-mlp-gelu.yaml"
    assert check_file(source).ir.name == "BP-MLP-GELU"
    spoiled = tmp_path / "spoiled.yaml"
    spoiled.write_text(source.read_text().replace("fn: gelu", "fn: relu").replace("out: h}", "out: h, init: zero}"))
    with pytest.raises(BlueprintError, match="node 'gelu': rule dead-relu"):
        check_file(spoiled)
    spoiled.write_text(source.read_text().replace("2*d_out", "999999").replace("default", "min: 999999, default"))
    with pytest.raises(BlueprintError):
        check_file(spoiled)


def _planned(one: KernelSpec):  # type: ignore[no-untyped-def]
    ir, _, plan = planned(one)
    return ir, plan


def _never_moved(one: KernelSpec) -> list[str]:
    """Train a little; return the parameters that are where they started."""
    child, generator = build(blueprint_of(one), site_of(one), seed=0), torch.Generator().manual_seed(0)
    before = {name: parameter.clone() for name, parameter in child.named_parameters()}
    optimizer = torch.optim.SGD(child.parameters(), lr=0.05)
    for _ in range(20):
        x = torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward((child(x) - x).square().mean())
        optimizer.step()
    return [name for name, parameter in child.named_parameters() if torch.equal(parameter, before[name])]
