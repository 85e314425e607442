"""From a kernel's spec to two graphs, one for the forward and one for the backward, for a batch of any size."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Final, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from esper.blueprints.build import Child
from esper.leyline.artifacts import KernelSpec
from esper.leyline.errors import KernelError
from esper.tezzeret.specs import input_shape, planned

USUAL_BATCH: Final = 8
"""Batch for which the compiler tunes; every other gives the same results."""

_TRIED_BATCHES: Final = (1, 2, 3, 5, 7, 8, 64, 1000, 65536)

_HARMLESS: Final = ("in _compute_stride", "in meta_copy_")
"""Where torch asks whether a size is one only to skip its stride, or to see whether what is written to overlaps itself;
what it finds in the general case holds for one too."""


class Traced(NamedTuple):
    """A kernel as two graphs.

    Args:
        forward: takes the parameters in order, then the input; returns the result, then what the backward keeps.
        backward: takes what `wiring` says and returns one gradient per input of the forward.
        parameters: names of the child's parameters.
        wiring: as `KernelManifest.backward_wiring`.
        mode: the world of fake tensors in which the graphs must be compiled.
    """

    forward: GraphModule
    backward: GraphModule
    parameters: tuple[str, ...]
    wiring: tuple[str, ...]
    mode: FakeTensorMode

    @property
    def forward_outputs(self) -> int:
        """Number of outputs of the forward."""
        return len(_outputs(self.forward.graph))


def trace(spec: KernelSpec) -> Traced:
    """Trace a child's forward and backward together and cut them apart, keeping what is dear to compute again.

    Raises:
        BlueprintError: the blueprint is malformed or does not fit.
        KernelError: it keeps a state, torch cannot trace it, or a parameter gets no gradient.
    """
    ir, site, plan = planned(spec)
    child = Child(ir, site, plan)
    if state := [name for name, _ in child.named_buffers()]:
        raise KernelError(
            f"{ir.name} keeps {state[0]!r} beside its weights, as no compiled kernel can; it runs eagerly."
        )
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    example = torch.empty(input_shape(ir, site, USUAL_BATCH), dtype=dtype_of(spec), device=spec.target)
    with any_batch():
        inputs = [*_fake_parameters(child, mode, example), _any_batch(mode, example)]
        forward, backward = _cut(_joint(child, inputs, mode), inputs)
    check_any_batch(mode)
    return Traced(forward, backward, *_wire(forward, backward, child), mode)


def dtype_of(spec: KernelSpec) -> torch.dtype:
    """Return the precision of a spec."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[spec.dtype]


@contextmanager
def any_batch() -> Iterator[None]:
    """Keep torch from assuming anything of the batch: that it is two or more, or which convolution would serve it.

    Whichever algorithm of convolution serves a batch, on a CPU it returns the layout of what it is given, and all that
    kernels give it is contiguous.
    """
    native, settings = cast(Any, torch._C), cast(Any, symbolic_config)
    any_one = native._ConvBackend.Mkldnn
    with (
        settings.patch(backed_size_oblivious=True),
        mock.patch.object(native, "_select_conv_backend", lambda *_args, **_options: any_one),
        mock.patch.object(native, "_conv_determine_backend_memory_format", lambda *_args: torch.contiguous_format),
    ):
        yield


def check_any_batch(mode: FakeTensorMode) -> None:
    """Check that nothing assumed while tracing or compiling excludes a batch size.

    Raises:
        KernelError: something does; the message says which batch and why.
    """
    assert mode.shape_env is not None
    for guard in mode.shape_env.guards:
        if any(place in str(guard.sloc) for place in _HARMLESS):
            continue
        for batch in _TRIED_BATCHES:
            if not bool(guard.expr.subs(dict.fromkeys(guard.expr.free_symbols, batch))):
                raise KernelError(f"compiled for batches with {guard.expr} only, which excludes a batch of {batch}.")
    if mode.shape_env.replacements:
        raise KernelError(f"compiled for one batch size only: {mode.shape_env.replacements}.")


def _fake_parameters(child: nn.Module, mode: FakeTensorMode, like: Tensor) -> list[Tensor]:
    with mode:
        empty = (torch.empty(p.shape, dtype=like.dtype, device=like.device) for p in child.parameters())
        return [tensor.requires_grad_() for tensor in empty]


def _any_batch(mode: FakeTensorMode, example: Tensor) -> Tensor:
    """Return a fake tensor like the example, the size of its first axis a symbol."""
    sizes = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (example.ndim - 1)]
    fake = mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    return fake.requires_grad_()


def _joint(child: nn.Module, inputs: Sequence[Tensor], mode: FakeTensorMode) -> GraphModule:
    names = [name for name, _ in child.named_parameters()]

    def forward(*values: Tensor) -> tuple[Tensor]:
        result = torch.func.functional_call(child, dict(zip(names, values[:-1], strict=True)), (values[-1],))
        # The tracer refuses a result that is a view, and the layout of the gradient follows that of the result, which
        # must be one that everybody knows. The compiler drops the copy where it changes nothing.
        return (result.clone(memory_format=torch.contiguous_format),)

    with mode:
        joint: Any = aot_export_joint_simple(
            forward, tuple(inputs), trace_joint=True, decompositions=select_decomp_table()
        )
        # Removes what cancels out, so that nothing is kept for the backward that is a parameter turned around twice.
        return cast(GraphModule, joint_graph_passes(joint))


def _cut(joint: GraphModule, inputs: Sequence[Tensor]) -> tuple[GraphModule, GraphModule]:
    """Cut the joint graph so that the forward hands on tensors of its own only.

    A size can be read from the gradient, and a view be made again. A view of an input, handed on, would hide from
    autograd that somebody changed the input in between.
    """
    forward, backward = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=1)
    made = {node.name: node for node in forward.graph.nodes}
    for node in backward.graph.find_nodes(op="placeholder"):
        if node.name in made and _is_cheap(made[node.name]):
            _make_again(made[node.name], node, backward.graph)
    used = {node.name for node in backward.graph.find_nodes(op="placeholder")}
    result, *kept = _outputs(forward.graph)
    forward.graph.output_node().args = ((result, *(n for n in kept if n.name in used and n.op != "placeholder")),)
    for module in (forward, backward):
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return forward, backward


def _is_cheap(node: Node) -> bool:
    """Tell whether a value is made from inputs of the forward by views and arithmetic of sizes alone."""
    if node.op == "placeholder" or _is_batch(node):
        return True
    tensor = isinstance(node.meta.get("val"), Tensor)
    return (not tensor or getattr(node.target, "is_view", False)) and all(map(_is_cheap, node.all_input_nodes))


def _is_batch(node: Node) -> bool:
    """Tell whether a node reads the size of the batch, which every tensor has, and the gradient too."""
    value = node.meta.get("val")
    return node.target is torch.ops.aten.sym_size.int and isinstance(value, torch.SymInt) and value.node.expr.is_Symbol


def _make_again(node: Node, place: Node, graph: Graph) -> None:
    """Replace an input of the backward by the steps that make it, unless it is an input of the forward itself."""
    if node.op != "placeholder":
        with graph.inserting_before(_first_step(graph)):
            again = _copied(node, graph)
        place.replace_all_uses_with(again)
        graph.erase_node(place)


def _copied(node: Node, graph: Graph) -> Node:
    inputs = {other.name: other for other in graph.find_nodes(op="placeholder")}
    if node.op == "placeholder":
        return inputs[node.name] if node.name in inputs else _added(node, graph)
    if not _is_batch(node):
        return graph.node_copy(node, lambda source: _copied(source, graph))
    # The gradient is there anyway.
    gradient = next(other for name, other in inputs.items() if name.startswith("tangents"))
    size = graph.call_function(torch.ops.aten.sym_size.int, (gradient, 0))
    size.meta = dict(node.meta)
    return size


def _added(node: Node, graph: Graph) -> Node:
    with graph.inserting_before(_first_step(graph)):
        added = graph.placeholder(node.name)
    added.meta = dict(node.meta)
    return added


def _first_step(graph: Graph) -> Node:
    first: Node = next(node for node in graph.nodes if node.op != "placeholder")
    return first


def _wire(forward: GraphModule, backward: GraphModule, child: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the parameters' names and the wiring of the backward.

    Raises:
        KernelError: a parameter or the input gets no gradient, or result and gradient are not contiguous.
    """
    names = tuple(name for name, _ in child.named_parameters())
    for name, gradient in zip((*names, "input"), _outputs(backward.graph), strict=True):
        if gradient is None:
            raise KernelError(f"{name!r} gets no gradient; every parameter and the input must lead to the result.")
    gradients = [node for node in backward.graph.find_nodes(op="placeholder") if node.name.startswith("tangents")]
    for node in (*gradients, _outputs(forward.graph)[0]):
        if not _is_contiguous(node.meta["val"]):
            raise KernelError(f"{node.name} has strides {node.meta['val'].stride()}; it must be contiguous.")
    sources = {node.name: f"o{i}" for i, node in enumerate(_outputs(forward.graph))}
    sources |= {node.name: f"i{i}" for i, node in enumerate(forward.graph.find_nodes(op="placeholder"))}
    return names, tuple(sources.get(node.name, "t0") for node in backward.graph.find_nodes(op="placeholder"))


def _is_contiguous(tensor: Tensor) -> bool:
    """Tell whether a tensor is contiguous for every batch, which torch's own test answers only after a look at it."""
    sizes = [*tensor.shape[1:], 1]
    return list(tensor.stride()) == [prod(sizes[axis:]) for axis in range(tensor.ndim)]


def _outputs(graph: Graph) -> list[Any]:
    outputs: Any = graph.output_node().args[0]
    return list(outputs)
