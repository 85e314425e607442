"""Checkers that ship with Esper: each tells whether something of yours keeps the contract of its kind."""

import copy
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from esper.blueprints import SiteShape
from esper.blueprints.checks import check_blueprint
from esper.kasmina.kernels import Kernel, KernelRequest, KernelStore
from esper.kasmina.sites import Targets
from esper.kasmina.steps import SeedStepper
from esper.kasmina.strategies import GraftingStrategy, GraftObservation
from esper.kasmina.wrapper import MorphableModel, unwrap, wrap
from esper.leyline.errors import BlueprintError, KernelError

__all__ = ["check_blueprint", "check_store", "check_strategy", "check_wrapped_model"]

_STEPS: Final = 3
_RAMP_LIMIT: Final = 10_000
_AT_ONCE_S: Final = 0.5
_PATIENCE_S: Final = 60.0


# --- wrapped models -------------------------------------------------------------------------------------------------


def check_wrapped_model(model_factory: Callable[[], nn.Module], example: Any, targets: Targets = None) -> None:
    """Check that seeds which nobody uses change nothing.

    The dormant wrapped model and the bare one give bit for bit the same outputs, loss, gradients, buffers and random
    state, in training and in evaluation, in float32 and bfloat16, while the sites are probed, while health is sampled
    and after that. The host's state-dict keys stay, copies work, and `unwrap` leaves no hook.

    Args:
        model_factory: returns a fresh model; its weights may come from PyTorch's global random stream.
        example: the forward's argument, a tuple of arguments, or a dict of keyword arguments.
        targets: where seeds sit, as for `esper.wrap`.

    Raises:
        AssertionError: a promise is broken; the message names it.

    Example:
        >>> check_wrapped_model(lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(2, 4))
    """
    for dtype in (torch.float32, torch.bfloat16):
        bare, wrapped = _fresh(model_factory).to(dtype), wrap(_fresh(model_factory).to(dtype), targets=targets)
        inputs = _cast(example, dtype)
        assert any(True for _ in wrapped.bank.all_layers()), "no site carries seeds; give other targets"
        _check_keys(bare, wrapped)
        for phase in (_probe, _sample, _rest):
            phase(wrapped)
            for training in (True, False):
                where = f"{phase.__name__.strip('_')}, {dtype}, {'training' if training else 'evaluation'}"
                _check_same(_run(bare, inputs, training), _run(wrapped, inputs, training), where)
        _check_copies(wrapped, inputs)
        _check_unwrap(bare, wrapped)


def _fresh(model_factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model_factory()


def _probe(model: MorphableModel) -> None:
    """Leave the model as it comes: every layer is being probed."""


def _sample(model: MorphableModel) -> None:
    for layer in model.bank.all_layers():
        layer.finish_probe()
    SeedStepper(model.bank).begin(0)


def _rest(model: MorphableModel) -> None:
    SeedStepper(model.bank).begin(1)


def _cast(example: Any, dtype: torch.dtype) -> Any:
    if isinstance(example, Tensor):
        return example.to(dtype) if example.is_floating_point() else example
    if isinstance(example, Mapping):
        return {name: _cast(value, dtype) for name, value in example.items()}
    return tuple(_cast(value, dtype) for value in example) if isinstance(example, tuple | list) else example


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _run(model: nn.Module, inputs: Any, training: bool) -> dict[str, Tensor]:
    """Return everything that a few steps leave behind, by name."""
    torch.manual_seed(1)
    model.train(training).zero_grad()
    found: dict[str, Tensor] = {}
    for step in range(_STEPS):
        outputs = list(_tensors(_call(model, inputs)))
        loss = torch.stack([t.float().square().mean() for t in outputs if t.is_floating_point()]).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        found |= {f"output {i} of step {step}": t.detach() for i, t in enumerate(outputs)} | {f"loss {step}": loss}
    host = model.host if isinstance(model, MorphableModel) else model
    found |= {f"gradient of {n}": p.grad for n, p in host.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b.clone() for n, b in host.named_buffers()}
    return found | {"random state": torch.get_rng_state()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if is_dataclass(value) and not isinstance(value, Mapping):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    for part in value if isinstance(value, tuple | list) else ():
        yield from _tensors(part)


def _check_same(bare: dict[str, Tensor], wrapped: dict[str, Tensor], where: str) -> None:
    assert bare.keys() == wrapped.keys(), f"{where}: only one model has {sorted(bare.keys() ^ wrapped.keys())}"
    for name, value in bare.items():
        assert _same_bits(value, wrapped[name]), f"{where}: {name} differs from the bare model's"


def _same_bits(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    raw = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, two)]
    return torch.equal(*raw)


def _check_keys(bare: nn.Module, wrapped: MorphableModel) -> None:
    keys = list(bare.state_dict())
    assert list(wrapped.host.state_dict()) == keys, "the host's state-dict keys changed"
    assert list(wrapped.state_dict()) == [f"host.{key}" for key in keys], "a dormant model has keys of its own"


def _check_copies(wrapped: MorphableModel, inputs: Any) -> None:
    expected = _run(wrapped, inputs, False)
    for way, twin in (
        ("deepcopy", copy.deepcopy(wrapped)),
        ("pickle", pickle.loads(pickle.dumps(wrapped))),
    ):
        _check_same(expected, _run(twin, inputs, False), f"after {way}")
        theirs, ours = ({id(p) for p in model.parameters()} for model in (twin, wrapped))
        assert not theirs & ours, f"{way} shares parameters with the original"
        assert not {id(m) for m in twin.modules()} & {id(layer.site) for layer in wrapped.bank.all_layers()}
        assert _hooks(unwrap(twin)) == _hooks(wrapped.host) - len(wrapped.bank.layers), f"{way} cannot be unwrapped"


def _check_unwrap(bare: nn.Module, wrapped: MorphableModel) -> None:
    host = unwrap(wrapped)
    assert host is wrapped.host, "unwrap returned another object than the host"
    assert _hooks(host) == _hooks(bare), "unwrap left a hook behind"


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


# --- grafting strategies --------------------------------------------------------------------------------------------


def check_strategy(factory: Callable[[], GraftingStrategy]) -> None:
    """Check that a grafting strategy keeps its contract.

    Alpha starts at 0, never falls, stays in [0, 1] whatever is observed (also NaN and infinity), reaches 1 when all
    goes well, and goes on the same after its state was stored and taken back at any step.

    Args:
        factory: returns a fresh strategy.

    Raises:
        AssertionError: a promise is broken; the message names it.

    Example:
        >>> from esper.kasmina.strategies import FixedRamp
        >>> check_strategy(lambda: FixedRamp(ramp_steps=5))
    """
    _check_ramp(factory)
    _check_resume(factory)
    for bad in (math.nan, math.inf, -math.inf, 1e30, 0.0):
        strategy, alpha = factory(), 0.0
        for observation in (GraftObservation(bad, bad, bad), GraftObservation(1.0, 0.0, 1.0)) * 20:
            new = strategy.update(observation)
            assert alpha <= new <= 1.0, f"alpha went from {alpha} to {new} after {observation}"
            alpha = new


def _benign(step: int) -> GraftObservation:
    return GraftObservation(loss=1.0 + 1.0 / (1 + step), drift=1e-4 * step, grad_norm=0.1)


def _check_ramp(factory: Callable[[], GraftingStrategy]) -> None:
    strategy = factory()
    assert strategy.alpha == 0.0, f"alpha starts at {strategy.alpha}, not at 0"
    alpha, step = 0.0, 0
    while alpha < 1.0:
        assert step < _RAMP_LIMIT, f"alpha is {alpha} after {step} good steps; it must reach 1"
        new = strategy.update(_benign(step))
        assert alpha <= new <= 1.0, f"alpha went from {alpha} to {new} in good step {step}"
        assert new == strategy.alpha, "update and alpha disagree"
        alpha, step = new, step + 1
    assert strategy.update(_benign(step)) == 1.0, "alpha left 1"


def _check_resume(factory: Callable[[], GraftingStrategy]) -> None:
    strategy, step = factory(), 0
    while strategy.alpha < 1.0 and step < _RAMP_LIMIT:
        state = strategy.state_dict()
        assert all(isinstance(v, int | float) for v in state.values()), f"the state {state} holds more than numbers"
        twin = factory()
        twin.load_state_dict(dict(state))
        assert twin.alpha == strategy.alpha, f"alpha changed when the state of step {step} was taken back"
        assert twin.update(_benign(step)) == strategy.update(_benign(step)), f"a resumed ramp differs at step {step}"
        step += 1


# --- kernel stores --------------------------------------------------------------------------------------------------


def check_store(store_factory: Callable[[], KernelStore], blueprint: str = "BP-MLP-GELU") -> None:
    """Check that a kernel store keeps its contract.

    `prefetch` returns at once, `poll` comes to a kernel or to an error and never hangs, equal requests give equal
    kernel ids also in another store, a kernel's children depend on the seed alone, an evicted kernel is never offered
    again, an error stays, and `close` may be called twice.

    Args:
        store_factory: returns a fresh store.
        blueprint: name of a blueprint that it serves for the layout `btd`.

    Raises:
        AssertionError: a promise is broken; the message names it.

    Example:
        >>> from esper.kasmina.library_store import LibraryKernelStore
        >>> check_store(LibraryKernelStore)
    """
    store, other = store_factory(), store_factory()
    request = KernelRequest(blueprint, SiteShape("btd", 8, 8, 4, "linear"))
    try:
        _prefetch(store, request)
        kernel = _wait(store, request)
        _check_kernel(kernel)
        _prefetch(store, request)
        assert _wait(store, request).kernel_id == kernel.kernel_id, "the same request gave another kernel id"
        assert _wait(other, request).kernel_id == kernel.kernel_id, "another store gave another kernel id"
        _check_refused(store, KernelRequest("BP-NO-SUCH-THING", request.site))
        _check_refused(store, KernelRequest(blueprint, SiteShape("bchw", 8, 8, 16, "conv2d")))
        assert _wait(store, request).kernel_id == kernel.kernel_id, "a failed request spoiled another"
        store.evict(kernel.kernel_id)
        _check_refused(store, request)
    finally:
        for each in (store, store, other, other):
            each.close()


def _prefetch(store: KernelStore, request: KernelRequest) -> None:
    start = time.perf_counter()
    store.prefetch(request)
    store.prefetch(request)
    took = time.perf_counter() - start
    assert took < _AT_ONCE_S, f"prefetch took {took:.2f} s; it must return at once"


def _wait(store: KernelStore, request: KernelRequest) -> Kernel:
    deadline = time.perf_counter() + _PATIENCE_S
    while time.perf_counter() < deadline:
        kernel = store.poll(request)
        if kernel is not None:
            return kernel
        time.sleep(0.001)
    raise AssertionError(f"poll gave neither a kernel nor an error for {request.blueprint} in {_PATIENCE_S} s")


def _check_refused(store: KernelStore, request: KernelRequest) -> None:
    store.prefetch(request)
    for _ in range(3):
        try:
            kernel = _wait(store, request)
        except (KernelError, BlueprintError) as error:
            assert str(error), "a refusal must say why"
            assert request.blueprint in str(error), f"the refusal does not name {request.blueprint}: {error}"
        else:
            raise AssertionError(f"{kernel.kernel_id} was offered for {request}; an error must come, each time")


def _check_kernel(kernel: Kernel) -> None:
    before = torch.get_rng_state()
    one, two, three = (kernel.make(seed, torch.device("cpu")) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state()), "making a child moved the global random state"
    weights = [[*module.state_dict().values()] for module in (one, two, three)]
    assert all(map(torch.equal, weights[0], weights[1])), "equal seeds gave other weights"
    assert not all(map(torch.equal, weights[0], weights[2])), "another seed gave the same weights"
    assert sum(p.numel() for p in one.parameters()) == kernel.params, "the kernel's price in parameters is wrong"
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}, "children share parameters"
