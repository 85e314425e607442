"""The two graphs of a kernel, run by torch as they are: nothing is compiled here."""

import os

import pytest
import torch
from torch import Tensor

from esper.blueprints import STANDARD, load_library
from esper.leyline.artifacts import KernelSpec
from esper.leyline.errors import KernelError
from esper.tezzeret.trace import Traced, check_any_batch, trace
from tests.tezzeret.samples import features, grown, label, library, spec

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")]
BATCHES = (1, 2, 3, 17)
STATEFUL = ("BP-ALL-REDUCE-SHARD", "BP-LOAD-BAL-EMA", "BP-MON-ACT-STATS")
NEW = tuple(b.ir.name for b in load_library() if b.ir.name not in (*STANDARD, *STATEFUL, "BP-FLASH-ATTN-V2"))
SOME = (
    "BP-ATTN-LINEAR",
    "BP-ATTN-LOCAL",
    "BP-CLAMP-GRAD-NORM",
    "BP-CONV-NEXT",
    "BP-EXPERT-MLP-1D",
    "BP-KV-CACHE-8BIT",
    "BP-RNN-MINGRU",
    "BP-ROUTER-MOE-AUXLOSS",
)
"""One for each operation that a tracer might trip over."""
FURTHER = NEW if os.environ.get("ESPER_SOAK") else SOME


def gradients(traced: Traced, inputs: list[Tensor], gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run forward and backward as `KernelManifest` says they are called."""
    outputs = traced.forward(*inputs)
    assert len(outputs) == traced.forward_outputs
    places = {"i": inputs, "o": outputs, "t": [gradient]}
    return outputs[0], list(traced.backward(*(places[wire[0]][int(wire[1:])] for wire in traced.wiring)))


def compare(one: KernelSpec) -> None:
    traced = trace(one)
    taken = traced.backward.graph.find_nodes(op="placeholder")
    assert all(isinstance(node.meta["val"], Tensor) for node in taken), "a compiled function takes tensors only"
    for batch in BATCHES:
        child, x = grown(one, batch), features(one, batch).requires_grad_()
        assert traced.parameters == tuple(name for name, _ in child.named_parameters())
        expected = child(x)
        gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        wanted = torch.autograd.grad(expected, [*child.parameters(), x], gradient)
        with torch.no_grad():
            result, found = gradients(traced, [*child.parameters(), x], gradient)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if one.dtype == "float32" else {"rtol": 5e-2, "atol": 5e-2}
        torch.testing.assert_close([result, *found], [expected.detach(), *wanted], **tolerance)


@pytest.mark.parametrize("one", [*library()], ids=label)
def test_forward_and_backward_equal_autograd_for_any_batch(one: KernelSpec) -> None:
    compare(one)


@pytest.mark.parametrize("name", FURTHER)
def test_further_operations_equal_autograd_too(name: str) -> None:
    ir = load_library()[name].ir
    compare(spec(name, ir.layouts[0], kind=(ir.site_kinds or ("block",))[0]))


@pytest.mark.parametrize("name", ["BP-LOAD-BAL-EMA", "BP-MON-ACT-STATS"])
def test_a_state_beside_the_weights_cannot_be_compiled(name: str) -> None:
    with pytest.raises(KernelError, match=f"{name} keeps .* as no compiled kernel can; it runs eagerly"):
        trace(spec(name))


@pytest.mark.parametrize("name", ["BP-MLP-GELU", "BP-ATTN-STD"])
def test_in_bfloat16_too(name: str) -> None:
    compare(spec(name, dtype="bfloat16"))


def test_the_forward_hands_on_no_view_of_its_inputs() -> None:
    for one in (spec("BP-MLP-SWIGLU"), spec("BP-PROJ-LORA"), spec("BP-ATTN-STD")):
        traced = trace(one)
        inputs = [*grown(one).parameters(), features(one, 2)]
        owned = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        with torch.no_grad():
            outputs = traced.forward(*inputs)
        assert not owned & {tensor.untyped_storage().data_ptr() for tensor in outputs}


def test_a_batch_that_was_assumed_is_an_error() -> None:
    traced = trace(spec("BP-PROJ-IA3", "bd"))
    size = traced.forward.graph.find_nodes(op="placeholder")[-1].meta["val"].shape[0]
    assert bool(size > 4)
    with pytest.raises(KernelError, match="excludes a batch of 1"):
        check_any_batch(traced.mode)
