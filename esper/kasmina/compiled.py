"""Compiled kernels in the training process: a forward and a backward function, and the child that runs through them.

A compiled function checks nothing by itself, so the child does: whatever it was not compiled for runs through the eager
module, which is always there and has the same parameters.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from esper.blueprints.build import Child
from esper.kasmina.library_store import example
from esper.leyline.artifacts import KernelManifest
from esper.leyline.errors import KernelError

FORWARD: Final = "fw.so"
"""Name of the file with the forward function."""

BACKWARD: Final = "bw.so"
"""Name of the file with the backward function."""


class _Runner(Protocol):
    def run(self, inputs: list[Tensor]) -> list[Tensor]: ...


class CompiledPair:
    """A loaded kernel: what `KernelManifest` describes, as two functions. It has no parameters of its own.

    Args:
        folder: verified folder of the artifact; it must stay, and must be the only one that ever has this path, because
            a library that was once loaded from a path is loaded again from memory.
        manifest: what the folder holds.

    Raises:
        KernelError: the manifest is not that of a compiled kernel, or a file cannot be loaded.
    """

    def __init__(self, folder: Path, manifest: KernelManifest) -> None:
        """Load both functions."""
        if manifest.pipeline == "fast" or manifest.spec.target != "cpu":
            raise KernelError(
                f"{manifest.kernel_id} is a {manifest.pipeline} kernel for {manifest.spec.target}; only compiled "
                "kernels for the CPU can be loaded here."
            )
        self.manifest = manifest
        self.dtype = torch.bfloat16 if manifest.spec.dtype == "bfloat16" else torch.float32
        self.inputs = len(manifest.parameters) + 1
        self._wiring = [_wire(text, self.inputs, manifest.forward_outputs) for text in manifest.backward_wiring]
        self._forward, self._backward = _load(folder, manifest)
        self.nbytes = sum((folder / name).stat().st_size for name in (FORWARD, BACKWARD))

    @property
    def needs_result(self) -> bool:
        """Whether the backward takes the result of the forward."""
        return ("o", 0) in self._wiring

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the result and what the backward will need of this forward."""
        return self._forward.run([tensor.detach() for tensor in inputs])

    def backward(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor | None], gradient: Tensor) -> list[Tensor]:
        """Return the gradient of every input of the forward."""
        sources: dict[str, Sequence[Tensor | None]] = {"i": inputs, "o": outputs, "t": (gradient,)}
        given = [sources[kind][place] for kind, place in self._wiring]
        assert all(tensor is not None for tensor in given)
        return self._backward.run([tensor.detach() for tensor in given if tensor is not None])


class _Apply(torch.autograd.Function):
    """The pair as one differentiable function of parameters and input."""

    @staticmethod
    def forward(ctx: Any, pair: CompiledPair, child: Child, *inputs: Tensor) -> Tensor:
        result, *kept = pair.forward(inputs)
        ctx.pair, ctx.child = pair, child
        ctx.save_for_backward(*inputs, *([result] if pair.needs_result else []), *kept)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pair, saved = ctx.pair, ctx.saved_tensors
        inputs, kept = saved[: pair.inputs], saved[pair.inputs :]
        if torch.is_grad_enabled():  # Somebody wants to differentiate the gradient: only the eager graph can be.
            return None, None, *_eager_gradients(ctx.child, pair.manifest.parameters, inputs, gradients[0])
        outputs = kept if pair.needs_result else (None, *kept)
        found = pair.backward(inputs, outputs, gradients[0].contiguous())
        needed = ctx.needs_input_grad[2:]
        return None, None, *(grad if wanted else None for grad, wanted in zip(found, needed, strict=True))


class CompiledChild(Child):
    """A child whose forward goes through a compiled pair wherever that is what the pair was compiled for.

    Its parameters, names and state dict are those of the eager child. A copy, a pickle and an export of it are eager.

    Args:
        pair: the compiled kernel.
    """

    pair: CompiledPair
    _shape: tuple[int, ...]

    @classmethod
    def around(cls, child: Child, pair: CompiledPair) -> "CompiledChild":
        """Return a child with the very parameters of `child`, which must not be used any more.

        Raises:
            KernelError: the pair was compiled for other parameters.
        """
        if tuple(name for name, _ in child.named_parameters()) != pair.manifest.parameters:
            raise KernelError(f"{pair.manifest.kernel_id} was compiled for other parameters than {child.ir.name} has.")
        compiled = cls.__new__(cls)
        compiled.__dict__.update(child.__dict__)
        compiled.pair = pair
        compiled._shape = tuple(example(child.site, child.ir).shape[1:])
        return compiled

    def forward(self, x: Tensor) -> Tensor:
        """Return what the eager child returns, to rounding."""
        parameters = tuple(self.parameters())
        if not self._fits(x, parameters):
            return self.eager(x)
        inputs = (*parameters, x.contiguous())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            result: Tensor = _Apply.apply(self.pair, self, *inputs)  # type: ignore[no-untyped-call]
            return result
        return self.pair.forward(inputs)[0]

    def eager(self, x: Tensor) -> Tensor:
        """Return what the eager child returns."""
        return super().forward(x)

    def _fits(self, x: Tensor, parameters: Sequence[Tensor]) -> bool:
        return (
            x.shape[1:] == self._shape
            and x.shape[0] > 0
            and x.device.type == "cpu"
            and all(t.dtype is self.pair.dtype and type(t) in _PLAIN for t in (x, *parameters))
            and all(parameter.is_contiguous() for parameter in parameters)
            and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.compiler.is_exporting())
            and torch._C._functorch.peek_interpreter_stack() is None
        )

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle as the eager child."""
        state = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        return Child.__new__, (Child,), state


_PLAIN: Final = (Tensor, nn.Parameter)
_OWN: Final = ("pair", "_shape")


def _wire(text: str, inputs: int, outputs: int) -> tuple[str, int]:
    kind, place = text[:1], text[1:]
    count = {"i": inputs, "o": outputs, "t": 1}.get(kind, 0)
    if not (place.isascii() and place.isdigit() and int(place) < count):
        raise KernelError(
            f"backward input {text!r} is not wired; allowed: i0 to i{inputs - 1}, o0 to o{outputs - 1}, t0."
        )
    return kind, int(place)


def _load(folder: Path, manifest: KernelManifest) -> tuple[_Runner, _Runner]:
    """Load a copy of its own: whoever cuts or changes a mapped file ends the process, or changes what it computes."""
    try:
        with tempfile.TemporaryDirectory(prefix="esper-kernel-") as copy:
            for name in {FORWARD, BACKWARD, *manifest.files}:
                if name.endswith(".so"):
                    _copy(folder / name, Path(copy) / name, manifest.files.get(name))
            return _open(Path(copy) / FORWARD), _open(Path(copy) / BACKWARD)
    except OSError as error:
        raise KernelError(f"{manifest.kernel_id} cannot be read or copied: {error}") from error


def _copy(file: Path, copy: Path, digest: str | None) -> None:
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise KernelError(f"{file.name} has changed since it was verified.")
    copy.write_bytes(data)


def _open(file: Path) -> _Runner:
    try:
        runner: _Runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(file), 1)
    except RuntimeError as error:
        raise KernelError(f"{file.name} cannot be loaded: {str(error).splitlines()[0]}") from error
    return runner


def _eager_gradients(
    child: Child, names: Sequence[str], inputs: Sequence[Tensor], gradient: Tensor
) -> list[Tensor | None]:
    with torch.enable_grad():
        parameters = dict(zip(names, inputs[:-1], strict=True))
        result = torch.func.functional_call(_plain(child), parameters, inputs[-1])
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, gradient, create_graph=True, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


def _plain(child: Child) -> Child:
    """Return an eager child that shares everything with a compiled one."""
    plain = Child.__new__(Child)
    plain.__dict__.update({name: value for name, value in child.__dict__.items() if name not in _OWN})
    return plain
