"""Inputs by recipe, and kernels to give them to."""

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from esper.blueprints import BlueprintIR, SiteShape, build, parse_ir
from esper.blueprints.build import Child
from esper.kasmina.compiled import CompiledChild, CompiledPair
from esper.kasmina.library_store import example
from esper.leyline.artifacts import KernelManifest, KernelSpec
from esper.leyline.errors import BlueprintError
from esper.urabrask.findings import Recipe

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""Precisions by name."""

_SPOILT: Final = {"nan": math.nan, "inf": math.inf, "extreme": 1e30}
_SEED: Final = 0


def make(recipe: Recipe) -> Tensor:
    """Return the input of a recipe.

    Example:
        >>> make(Recipe(shape=(2, 3), kind="nan", spoiled=1)).isnan().any(1).tolist()
        [False, True]
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    x = torch.randn(recipe.shape, generator=generator) * recipe.scale
    if recipe.kind == "zeros":
        x.zero_()
    elif recipe.kind in _SPOILT:
        x[recipe.spoiled] = _SPOILT[recipe.kind]
        if recipe.kind != "nan":
            x[recipe.spoiled].view(-1)[::2].neg_()
    return x.to(DTYPES[recipe.dtype])


class Subject(NamedTuple):
    """One kernel in three forms with equal parameters, away from their values at birth.

    Args:
        manifest: what the kernel is.
        ir: its blueprint.
        child: the kernel, as training would call it.
        eager: the module that it must agree with.
        exact: the same in double precision.
    """

    manifest: KernelManifest
    ir: BlueprintIR
    child: Child
    eager: Child
    exact: Child

    def shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape of a batch that the kernel was compiled for."""
        return (batch, *example(self.eager.site, self.ir).shape[1:])

    def recipe(self, batch: int, seed: int = 0) -> Recipe:
        """Return a batch of random numbers in the kernel's precision."""
        return Recipe(shape=self.shape(batch), dtype=self.manifest.spec.dtype, seed=seed)


def load(folder: Path, manifest: KernelManifest) -> Subject:
    """Load an artifact; its native code is in this process from here on.

    Raises:
        BlueprintError: the blueprint is malformed or does not fit.
        KernelError: a file cannot be loaded, or was compiled for another child.
    """
    ir = blueprint_of(manifest.spec)
    eager = _grown(ir, manifest.spec)
    child = deepcopy(eager)
    if manifest.pipeline != "fast":
        child = CompiledChild.around(child, CompiledPair(folder, manifest))
    return Subject(manifest, ir, child, eager, deepcopy(eager).double())


def blueprint_of(spec: KernelSpec) -> BlueprintIR:
    """Return the blueprint of a spec.

    Raises:
        BlueprintError: its text is not JSON, or not a blueprint.
    """
    try:
        return parse_ir(json.loads(spec.ir))
    except (ValueError, RecursionError) as error:
        raise BlueprintError(f"the kernel's blueprint cannot be read: {error}; compile it again.") from error


def step(child: Child, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Return the result of a forward and every gradient of its backward, by name."""
    x = x.detach().requires_grad_()
    result = child(x)
    wanted = {"input": x, **{name: p for name, p in child.named_parameters() if p.requires_grad}}
    found = gradients(result, list(wanted.values()), gradient)
    return {"result": result.detach(), **{f"gradient of {name}": g for name, g in zip(wanted, found, strict=True)}}


def gradients(result: Tensor, inputs: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the gradient of every input; zeros where there is none."""
    if not result.requires_grad:
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    return torch.autograd.grad(result, inputs, gradient, materialize_grads=True)


def _grown(ir: BlueprintIR, spec: KernelSpec) -> Child:
    """Return a child whose parameters have all moved; at birth, many results and gradients are zero."""
    site = SiteShape(spec.layout, spec.d_in, spec.d_out, spec.tokens, spec.kind)
    child, generator = build(ir, site, spec.dims, seed=_SEED), torch.Generator().manual_seed(_SEED + 1)
    with torch.no_grad():
        for parameter in child.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.3 / math.sqrt(fan_in))
    return child.to(DTYPES[spec.dtype])
