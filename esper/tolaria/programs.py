"""A plain network as one file that needs none of its code: a `torch.export` program or an ONNX model."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_leaves, tree_map

from esper.leyline.errors import CheckpointError, ConfigError, OutputError
from esper.models.mlp import MLP
from esper.models.transformer import ByteTransformer

LINEAGE_FILE = "lineage.json"
"""Name under which a program carries its lineage: `torch.export.load(file, extra_files={LINEAGE_FILE: ""})`."""

_FOLDED, _REWRITTEN = 1e-6, 1e-4
"""Largest permitted difference from the grown outputs, relative to the largest: in float32, and for a compiler's
own arithmetic. Lower precisions are held to their own rounding."""


class Example(NamedTuple):
    """The inputs of one call of a network.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, given: Any, host: nn.Module, *, needed: bool) -> "Example | None":
        """Return the inputs given, or those that the host itself offers.

        Raises:
            ConfigError: they are needed and not known.
        """
        found = given if given is not None else (_offered(host) if needed else None)
        if found is None and needed:
            raise ConfigError(
                "a program is traced from one call: pass example=x, a tuple of arguments or a dict of named ones."
            )
        if found is None:
            return None
        if isinstance(found, dict):
            return cls((), dict(found))
        return cls(tuple(found), {}) if isinstance(found, tuple | list) else cls((found,), {})

    @torch.no_grad()
    def run(self, model: nn.Module | Callable[..., Any]) -> list[Tensor]:
        """Return the tensors that a call in evaluation mode gives, in order; the random state stays as it is."""
        training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
        for module in training:
            module.training = False
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                return [t for t in tree_leaves(model(*self.args, **self.kwargs)) if isinstance(t, Tensor)]
        finally:
            for module in training:
                module.training = True

    def map(self, change: Callable[[Tensor], Tensor]) -> "Example":
        """Return the inputs with every tensor changed."""
        args, kwargs = tree_map(lambda t: change(t) if isinstance(t, Tensor) else t, (self.args, self.kwargs))
        return Example(tuple(args), dict(kwargs))

    def tensors(self) -> list[Tensor]:
        """Return every tensor among the inputs."""
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    def larger(self) -> "Example":
        """Return a batch with one sample more, a repetition of the first."""
        return self.map(lambda t: torch.cat([t, t[:1]]) if t.dim() else t)


def _offered(host: nn.Module) -> Any:
    """Return example inputs in the ways that libraries have to offer them, or None."""
    like = next((p for p in host.parameters() if p.is_floating_point()), torch.zeros(()))
    if isinstance(host, MLP):
        return torch.zeros(2, host.widths[0]).to(like)
    if isinstance(host, ByteTransformer):
        return torch.zeros(2, host.context, dtype=torch.long, device=like.device)
    if getattr(host, "example_input_array", None) is not None:
        return host.example_input_array
    return getattr(host, "dummy_inputs", None)


def check_same(wanted: list[Tensor], found: list[Tensor], what: str, *, folded: bool, rewritten: bool = False) -> None:
    """Check that an export computes what the grown network computed.

    Args:
        wanted: outputs of the grown network.
        found: outputs of the export.
        what: name of the export, for the message.
        folded: whether children were folded; otherwise, on a CPU, every bit must agree.
        rewritten: whether a compiler has rewritten the arithmetic.

    Raises:
        CheckpointError: they differ.
    """
    if len(wanted) != len(found):
        raise CheckpointError(f"{what} returns {len(found)} tensors, the grown network {len(wanted)}.")
    for one, other in zip(wanted, found, strict=True):
        if one.shape != other.shape or not _close(one, other.to(one.device), folded, rewritten):
            raise CheckpointError(
                f"{what} does not compute what the grown network computes, e.g. {tuple(other.shape)} instead of "
                f"{tuple(one.shape)} or other values; the host may use a folded weight in a second place: merge=False."
            )


def _close(one: Tensor, other: Tensor, folded: bool, rewritten: bool) -> bool:
    if not (folded or rewritten) and one.device.type == "cpu":
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    # Elsewhere even one kernel, run twice, may not give the same bits.
    rewritten = rewritten or one.device.type != "cpu"
    if not one.is_floating_point() or one.numel() == 0:
        return torch.equal(one, other.to(one.dtype))
    own = 16 * torch.finfo(one.dtype).eps
    limit = max(_REWRITTEN if rewritten else _FOLDED, own if one.dtype.itemsize < 4 else 0.0)
    scale = float(one.detach().double().abs().nan_to_num(posinf=0.0, neginf=0.0).max())
    return torch.allclose(one.double(), other.double(), rtol=limit, atol=limit * max(scale, 1e-30), equal_nan=True)


def save_program(model: nn.Module, example: Example, path: Path, lineage: dict[str, Any]) -> None:
    """Write a `torch.export` program; `torch.export.load(path).module()` runs it with torch alone.

    Args:
        model: what `export` made.
        example: inputs of one call.
        path: the .pt2 file.
        lineage: what was kept; it travels inside the file.

    Raises:
        ConfigError: torch cannot trace the network.
        OutputError: the file cannot be written.
    """
    program, _ = _traced(model, example)
    with _in_place(path) as file:
        torch.export.save(program, file, extra_files={LINEAGE_FILE: json.dumps(lineage)})


def save_onnx(model: nn.Module, example: Example, path: Path, lineage: dict[str, Any]) -> None:
    """Write an ONNX model, and compare it with the network where onnxruntime is installed.

    Args:
        model: what `export` made.
        example: inputs of one call.
        path: the .onnx file.
        lineage: what was kept; it travels in the model's metadata under `lineage`.

    Raises:
        ConfigError: onnx and onnxscript are not installed, or the network cannot be translated.
        OutputError: the file cannot be written.
    """
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise ConfigError("ONNX needs two more packages: pip install onnx onnxscript.")
    program, known = _traced(model, example)
    with _quietly():
        translated = torch.onnx.export(program, dynamo=True, verbose=False)
    assert translated is not None
    translated.model.metadata_props["lineage"] = json.dumps(lineage)
    if find_spec("onnxruntime") is not None:
        for inputs in known:
            with _returning_plain(model):
                wanted = inputs.run(model)
            check_same(wanted, inputs.run(translated), "the ONNX model", folded=True, rewritten=True)
    with _in_place(path) as file:
        translated.save(file)


def _traced(model: nn.Module, example: Example) -> tuple[ExportedProgram, list[Example]]:
    """Return the program with as many free axes as torch allows, and the inputs on which it was checked."""
    # With a view torch would guard the tensor behind it, which the inputs of later calls do not have.
    example = example.map(lambda t: t.detach().clone())
    # Torch takes an axis of length one for a constant.
    tensors = example.tensors()
    inputs = example.larger() if all(t.dim() and len(t) == 1 for t in tensors) else example
    failed: Exception | None = None
    for free in (_all_axes, _batch_axis, _no_axis):
        try:
            program = _program(model, inputs, free)
        except Exception as error:  # the tracer raises errors of a dozen kinds
            failed = error
            continue
        known = [inputs] if free is _no_axis else [inputs, inputs.larger()]
        if _right(model, program, known):
            return program, known
        if _right(model, program, known[:1]) and free is not _all_axes:
            size = next((len(t) for t in tensors if t.dim()), 0)
            warnings.warn(f"the exported program may take batches of {max(size, 2)} only.", stacklevel=2)
            return program, known[:1]
    raise ConfigError(f"torch cannot trace {type(model).__name__}: {failed}. Export to a folder instead.") from failed


def _program(model: nn.Module, inputs: Example, free: Callable[[Tensor], dict[int, Any]]) -> ExportedProgram:
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in inputs.tensors():
        shapes[tensor] = free(tensor)
    with _quietly(), _returning_plain(model):
        return torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)


def _all_axes(t: Tensor) -> dict[int, Any]:
    return dict.fromkeys(range(t.dim()), Dim.AUTO)


def _batch_axis(t: Tensor) -> dict[int, Any]:
    return {0: Dim.AUTO} if t.dim() else {}


def _no_axis(t: Tensor) -> dict[int, Any]:
    return {}


def _right(model: nn.Module, program: ExportedProgram, known: list[Example]) -> bool:
    runnable = program.module()
    try:
        for inputs in known:
            with _returning_plain(model):
                wanted = inputs.run(model)
            check_same(wanted, inputs.run(runnable.__call__), "the program", folded=True, rewritten=True)
    except Exception:  # a host may refuse a larger batch in any way
        return False
    return True


@contextmanager
def _returning_plain(model: nn.Module) -> Iterator[None]:
    """Let a model return plain dicts without caches: a program with types of a library needs that library to load."""
    handle = model.register_forward_hook(_plain_output)
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        handle.remove()
        if before is not None:
            config.use_cache = before


def _plain_output(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Mapping):
        return dict(output)
    if is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return output


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out what exporters tell about their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _in_place(path: Path) -> Iterator[Path]:
    """Give a file to write to, which then takes the place of `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        try:
            yield folder / path.name
            for file in sorted(folder.iterdir(), key=lambda f: f.name == path.name):
                file.replace(path.parent / file.name)
        finally:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose a writable place.") from error
