"""What a compiled kernel says of itself, and what others have vouched for."""

from enum import StrEnum, unique
from typing import Literal

from pydantic import Field

from esper.leyline.base import Message
from esper.leyline.kernels import ArtifactStatus
from esper.leyline.reports import Layout

Pipeline = Literal["fast", "standard", "aggressive"]
"""Eager from the blueprint; a compiled pair for forward and backward; the same, autotuned."""


@unique
class Role(StrEnum):
    """Who signs: each role has a key of its own."""

    TEZZERET = "tezzeret"
    URABRASK = "urabrask"
    KARN = "karn"


class KernelSpec(Message):
    """Which kernel: a blueprint at the exact shape of a site, in one precision, for one kind of device.

    Args:
        ir: canonical JSON of the blueprint, its placement chosen.
        layout: axes of the site's tensors.
        d_in: features of the site's input.
        d_out: features of its output.
        tokens: positions per sample; compiled kernels take any batch, and these positions only.
        kind: family of the site's module.
        dims: chosen sizes of the blueprint's free dimensions.
        dtype: precision of parameters and activations, `float32` or `bfloat16`.
        target: device type, e.g. `cpu`.
    """

    ir: str
    layout: Layout
    d_in: int = Field(ge=1)
    d_out: int = Field(ge=1)
    tokens: int = Field(ge=1)
    kind: str
    dims: dict[str, int] = Field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"
    target: str = "cpu"


class KernelManifest(Message):
    """What a kernel artifact is: the file `manifest.json` of its folder, in canonical JSON.

    Parameters are inputs of the compiled functions, so one artifact serves every child of its blueprint and shape.
    The forward takes `parameters` in order, then the child's input; its first output is the result, the others are
    kept for the backward. The backward takes what `backward_wiring` says and returns one gradient per forward input.

    Args:
        kernel_id: `<ir hash>-<target>-<pipeline>-<toolchain hash>`.
        name: name of the blueprint.
        version: its version.
        blueprint_id: SHA-256 of its IR.
        spec: what was compiled.
        pipeline: how it was compiled.
        toolchain: versions of compiler and libraries, in one line.
        fingerprint: SHA-256 of the binary interface that compiled files need; empty for the fast tier.
        parameters: names of the child's parameters, in the order in which the compiled functions take them.
        forward_outputs: number of outputs of the forward.
        backward_wiring: one entry per backward input: `i3` forward input 3, `o1` forward output 1, `t0` the gradient.
        files: SHA-256 of every other file of the folder, by name.
        serial: grows with every artifact that the same store makes.
        created: seconds since the Unix epoch.
    """

    kernel_id: str
    name: str
    version: str = "1.0.0"
    blueprint_id: str
    spec: KernelSpec
    pipeline: Pipeline
    toolchain: str = ""
    fingerprint: str = ""
    parameters: tuple[str, ...] = ()
    forward_outputs: int = Field(default=0, ge=0)
    backward_wiring: tuple[str, ...] = ()
    files: dict[str, str] = Field(default_factory=dict)
    serial: int = Field(default=0, ge=0)
    created: float = Field(default=0.0, ge=0.0)


class Attestation(Message):
    """A signed statement: this artifact has this status, says this role.

    Args:
        kernel_artifact_id: the kernel.
        artifact_hash: SHA-256 of its canonical manifest.
        status: what the role says it is.
        role: who says so; only Urabrask may say VALIDATED.
        serial: a later statement about the same kernel has a greater one.
        signature: Ed25519 over the canonical JSON of the other fields; empty while unsigned.
    """

    kernel_artifact_id: str
    artifact_hash: str
    status: ArtifactStatus
    role: Role
    serial: int = Field(ge=0)
    signature: bytes = b""


class CompilationRequest(Message):
    """Somebody would use a kernel.

    Args:
        spec: the kernel.
        pipeline: how to compile it; None lets Tezzeret choose.
        interest: how much it is wanted, 0 to 1.
        requester: who asks.
    """

    spec: KernelSpec
    pipeline: Pipeline | None = None
    interest: float = Field(default=0.5, ge=0.0, le=1.0)
    requester: str = ""


class CompiledKernel(Message):
    """An artifact on its way from the worker that made it, not yet signed by anybody.

    Args:
        manifest: canonical JSON of the `KernelManifest`.
        files: content by file name.
        record: how it was compiled, canonical JSON of the `CompilationRecord`.
    """

    manifest: str
    files: dict[str, bytes] = Field(default_factory=dict)
    record: str = ""


class KernelFaulted(Message):
    """A kernel failed in a run, after it was validated; it is not offered again.

    Args:
        kernel_artifact_id: the kernel.
        run_id: the run.
        detail: what it did, in the error's own words.
    """

    kernel_artifact_id: str
    run_id: str = ""
    detail: str = ""


class BlueprintRequest(Message):
    """Which blueprints would serve?

    Args:
        layout: axes of the site; None for any.
        tier: dearest kernel tier that is accepted.
        max_params: budget of parameters; None for no bound.
        d_in: features of the site's input; None for any.
        d_out: features of its output; None for any.
        kind: family of the site's module; empty for any.
    """

    layout: Layout | None = None
    tier: Pipeline = "aggressive"
    max_params: int | None = Field(default=None, ge=0)
    d_in: int | None = Field(default=None, ge=1)
    d_out: int | None = Field(default=None, ge=1)
    kind: str = ""


class BlueprintAnswer(Message):
    """The blueprints that would serve, best prior first.

    Args:
        names: names of the blueprints.
        conservative: whether only blueprints that are safe actions were considered, because Karn could not be asked.
        why: one sentence.
    """

    names: tuple[str, ...] = ()
    conservative: bool = False
    why: str = ""
