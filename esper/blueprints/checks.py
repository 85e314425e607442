"""The checker of blueprints: one call tells whether a blueprint keeps every promise of its contract."""

import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from math import isqrt
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from esper.blueprints.build import Child, build
from esper.blueprints.capabilities import lacking
from esper.blueprints.cost import cost
from esper.blueprints.dims import width_read
from esper.blueprints.hashing import canonical_json
from esper.blueprints.ir import BlueprintIR, parse_ir
from esper.blueprints.library import Blueprint
from esper.blueprints.merge import merged_linear
from esper.blueprints.plan import why_not
from esper.blueprints.site import Layout, SiteShape
from esper.leyline.errors import BlueprintDoesNotFit

_TOKENS: Final[dict[Layout, int]] = {"btd": 6, "bd": 1, "bchw": 20}
_WIDTHS: Final = ((8, 8), (12, 8), (5, 16))


def check_blueprint(blueprint: Blueprint, site: SiteShape | None = None) -> None:
    """Check that a blueprint keeps its contract.

    It builds the same weights from the same seed, costs what it claims, does nothing at birth, learns with all its
    parameters, keeps samples apart, can be copied, stored and run again for its gradients, changes its state in
    training alone, and is causal and mergeable where it says so: for every placement that it permits, in single
    precision, in bfloat16 and under autocast. One that needs what this machine lacks must be refused.

    Args:
        blueprint: the blueprint.
        site: a place that it must fit; by default small ones of its layouts are tried, and it must fit one.

    Raises:
        AssertionError: a promise is broken; the message names the blueprint, the site and the promise.

    Example:
        >>> from esper.blueprints.library import load_library
        >>> check_blueprint(load_library()["BP-PROJ-IA3"])
    """
    _check_hash(blueprint.ir)
    cases = list(_cases(blueprint, site))
    if lacking(blueprint.ir):
        _check_refusal(cases[0])
        return
    misfits = {case: reason for case in cases if (reason := why_not(case.ir, case.site)) is not None}
    allowed = 0 if site else len(cases) - 1
    assert len(misfits) <= allowed, f"{blueprint.ir.full_name} does not fit: {'; '.join(misfits.values())}"
    for case in cases:
        if case not in misfits:
            _run_checks(case)


class _Case(NamedTuple):
    """A blueprint in one of its placements at one site, and whether it claims to be causal."""

    ir: BlueprintIR
    site: SiteShape
    causal: bool

    def child(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Child:
        """Return a newborn child."""
        return build(self.ir, self.site, seed=seed, dtype=dtype)

    def grown(self) -> Child:
        """Return a child away from its birth, every parameter moved at random."""
        child, generator = self.child(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in child.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        return child

    def features(self, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return random numbers of the shape that the child reads."""
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(self.shape(batch, width_read(self.ir, self.site)), generator=generator).to(dtype)

    def shape(self, batch: int, width: int) -> tuple[int, ...]:
        """Return a batch's shape in the site's layout."""
        if self.site.layout == "bd":
            return (batch, width)
        tokens = self.site.tokens
        if self.site.layout == "btd":
            return (batch, tokens, width)
        height = max(side for side in range(1, isqrt(tokens) + 1) if tokens % side == 0)
        return (batch, width, height, tokens // height)

    def effect(self, x: Tensor, result: Tensor) -> Tensor:
        """Return what the child adds to the host's output at full strength."""
        return result - x if self.ir.initial == "identity" else result

    def target(self, x: Tensor) -> Tensor:
        """Return an effect that the child should learn: half of what it reads, feature by feature."""
        axis = 1 if self.site.layout == "bchw" else -1
        return 0.5 * x.index_select(axis, torch.arange(self.site.d_out) % x.shape[axis])


def _cases(blueprint: Blueprint, site: SiteShape | None) -> Iterator[_Case]:
    for where in (blueprint.ir.reads, *blueprint.ir.also_reads):
        ir = blueprint.ir.reading(where)
        for place in [site] if site else _sites(ir):
            yield _Case(ir, place, blueprint.manifest.causal)


def _sites(ir: BlueprintIR) -> Iterator[SiteShape]:
    for layout in ir.layouts:
        for d_in, d_out in _WIDTHS:
            yield SiteShape(layout, d_in, d_out, _TOKENS[layout], (ir.site_kinds or ("block",))[0])


def _run_checks(case: _Case) -> None:
    checks: tuple[Callable[[_Case], None], ...] = (
        _check_seed,
        _check_cost,
        _check_birth,
        _check_gradient,
        _check_learning,
        _check_copies,
        _check_state,
        _check_samples_apart,
        _check_causality,
        _check_merge,
    )
    for check in checks:
        try:
            check(case)
        except Exception as error:
            promise = check.__name__.removeprefix("_check_")
            raise AssertionError(f"{case.ir.full_name} at {case.site}, {promise}: {error}") from error


def _check_hash(ir: BlueprintIR) -> None:
    again = parse_ir(json.loads(canonical_json(ir.model_dump(mode="json"))))
    assert again == ir, f"{ir.full_name} changes when it is written as JSON and read back"
    assert again.id == ir.id, f"{ir.full_name} changes its id when it is written as JSON and read back"


def _check_refusal(case: _Case) -> None:
    need = lacking(case.ir)[0]
    try:
        case.child()
    except BlueprintDoesNotFit as error:
        assert need in str(error), f"{case.ir.full_name}: the refusal does not name {need}: {error}"
    else:
        raise AssertionError(f"{case.ir.full_name} is built although {need} is not offered here")


def _check_seed(case: _Case) -> None:
    before = torch.get_rng_state()
    first, second = case.child(), case.child()
    assert torch.equal(before, torch.get_rng_state()), "building touches the global random state"
    _demand_equal_states(first, second, "two builds from one seed differ")


def _check_cost(case: _Case) -> None:
    child, claimed = case.child(), cost(case.ir, case.site)
    params = sum(parameter.numel() for parameter in child.parameters())
    assert params == claimed.params, f"it has {params} parameters and claims {claimed.params}"
    with FlopCounterMode(display=False, custom_mapping=_counted_too()) as counter, sdpa_kernel(SDPBackend.MATH):
        child(case.features(1))
    counted = counter.get_total_flops() // 2
    assert counted == claimed.macs, f"it takes {counted} multiply-accumulates and claims {claimed.macs}"


def _counted_too() -> dict[object, Callable[..., int]]:
    """Return what torch's counter leaves out: the fused attention of processors."""

    def flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flops}


def _check_birth(case: _Case) -> None:
    for batch in (1, 3):
        for dtype in (torch.float32, torch.bfloat16):
            _demand_no_effect(case, case.child(dtype=dtype), case.features(batch, dtype))
            with torch.autocast("cpu", torch.bfloat16):
                _demand_no_effect(case, case.child(), case.features(batch, dtype))


def _demand_no_effect(case: _Case, child: Child, x: Tensor) -> None:
    result = child(x)
    wanted = case.shape(len(x), case.site.d_out)
    assert tuple(result.shape) == wanted, f"it returns {tuple(result.shape)}; the site writes {wanted}"
    assert result.dtype == x.dtype, f"it reads {x.dtype} and returns {result.dtype}"
    largest = case.effect(x, result).abs().max().item()
    assert largest == 0, f"at birth it changes the host's output by {largest}"


def _check_gradient(case: _Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        child, x = case.child(dtype=dtype), case.features(3, dtype).requires_grad_()
        parameters = list(child.parameters())
        loss = (child(x) * case.target(x.detach()) + 0 * x.sum()).sum()
        gradients = torch.autograd.grad(loss, [*parameters, x] if case.ir.trainable else [x], materialize_grads=True)
        assert all(bool(g.isfinite().all()) for g in gradients), f"a {dtype} gradient is not finite"
        moving = any(bool(g.any()) for g in gradients[:-1])
        assert moving == case.ir.trainable, f"trainable is {case.ir.trainable}, but some gradient moves it: {moving}"


def _check_learning(case: _Case) -> None:
    if not case.ir.trainable:
        return
    child, x = case.child(), case.features(16)
    optimizer = torch.optim.Adam(child.parameters(), lr=0.02)
    losses, still = list[float](), dict(child.named_parameters())
    for _ in range(30):
        loss = nn.functional.mse_loss(case.effect(x, child(x)), case.target(x))
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        still = {name: p for name, p in still.items() if p.grad is None or not bool(p.grad.any())}
        optimizer.step()
    assert not still, f"no gradient reaches {min(still)} in 30 steps"
    assert losses[-1] < 0.98 * losses[0], f"30 steps take a toy loss from {losses[0]:.4f} only to {losses[-1]:.4f}"


def _check_copies(case: _Case) -> None:
    child, other = case.grown(), case.child(seed=5)
    other.load_state_dict(child.state_dict(), strict=True)
    x = case.features(2)
    assert torch.equal(other(x), child(x)), "a child that loads the state of another computes something else"
    assert torch.equal(deepcopy(child)(x), child(x)), "a deep copy computes something else"


def _check_state(case: _Case) -> None:
    child, again, x = case.grown(), case.grown(), case.features(4).requires_grad_()
    once = _gradients(child, x, child(x))
    twice = _gradients(again, x, checkpoint(again, x, use_reentrant=False))
    assert all(map(torch.equal, once, twice)), "a pass that runs again for its gradients gives others"
    _demand_equal_states(child, again, "a pass that runs again for its gradients changes the state twice")
    child.eval()(x)
    _demand_equal_states(child, again, "evaluation changes the state")


def _gradients(child: Child, x: Tensor, result: Tensor) -> tuple[Tensor, ...]:
    wanted = [x, *(p for p in child.parameters() if p.requires_grad)]
    return torch.autograd.grad((result + 0 * x.sum()).square().sum(), wanted, materialize_grads=True)


def _check_samples_apart(case: _Case) -> None:
    child, x = case.grown(), case.features(3)
    whole, alone = deepcopy(child)(x)[:1], child(x[:1])
    torch.testing.assert_close(whole, alone, msg="a sample's result depends on the rest of its batch")


def _check_causality(case: _Case) -> None:
    if not case.causal or case.site.layout != "btd":
        return
    child, x = case.grown(), case.features(2)
    expected = deepcopy(child)(x)
    for token in range(1, min(case.site.tokens, 8)):
        changed = x.clone()
        changed[:, token:] += 1.0 + changed[:, token:] ** 2
        leak = (deepcopy(child)(changed) - expected)[:, :token].abs().max().item()
        assert leak < 1e-5, f"changing tokens from {token} on changes earlier results by {leak}"


def _check_merge(case: _Case) -> None:
    if not case.ir.mergeable or case.site.layout == "bchw":
        return
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.site.d_out, case.site.d_in, generator=generator)
    bias = torch.randn(case.site.d_out, generator=generator)
    z, alpha = torch.randn(case.shape(4, case.site.d_in), generator=generator), 0.7
    with torch.no_grad():
        child, y = case.grown(), nn.functional.linear(z, weight, bias)
        read = z if case.ir.reads == "input" else y
        grafted = y + alpha * case.effect(read, child(read))
        merged = nn.functional.linear(z, *merged_linear(child, weight, bias, alpha))
        apart = ((merged - grafted).norm() / grafted.norm()).item()
    assert apart <= 1e-6, f"the merged layer differs from host and child by {apart}, relative"


def _demand_equal_states(first: nn.Module, second: nn.Module, complaint: str) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert list(one) == list(two), complaint
    assert all(torch.equal(one[name], two[name]) for name in one), complaint
