"""Hosts, a synchronous kernel store, and a rig that walks seeds through their lives."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints import build, cost, load_library, why_not
from esper.kasmina.kernels import Kernel, KernelRequest, KernelStore
from esper.kasmina.library_store import kernel_id
from esper.kasmina.steps import SeedStepper
from esper.kasmina.telemetry import COLUMN, FORWARD_METRICS
from esper.kasmina.wrapper import MorphableModel, wrap
from esper.kasmina.writer import Moment, SeedWriter
from esper.leyline.commands import KasminaControlCommand
from esper.leyline.errors import KernelError
from esper.leyline.events import SeedTransitioned
from esper.leyline.ids import SeedId
from esper.leyline.states import Reason, SeedCommand, SeedState

collect_ignore = ["gpu_code.py"]  # imports Triton, which is no part of the environment

LIBRARY = load_library()
C, S = SeedCommand, SeedState

PATHS = {
    S.DORMANT: (),
    S.GERMINATED: (C.GERMINATE,),
    S.LOADING: (C.GERMINATE, C.LOAD),
    S.TRAINING: (C.GERMINATE, C.LOAD, C.TRAIN),
    S.GRAFTING: (C.GERMINATE, C.LOAD, C.TRAIN, C.GRAFT),
    S.STABILIZATION: (C.GERMINATE, C.LOAD, C.TRAIN, C.GRAFT, C.STABILIZE),
    S.EVALUATING: (C.GERMINATE, C.LOAD, C.TRAIN, C.GRAFT, C.STABILIZE, C.EVALUATE),
    S.FINE_TUNING: (C.GERMINATE, C.LOAD, C.TRAIN, C.GRAFT, C.STABILIZE, C.EVALUATE, C.FINE_TUNE),
    S.FOSSILIZED: (C.GERMINATE, C.LOAD, C.TRAIN, C.GRAFT, C.STABILIZE, C.EVALUATE, C.FINE_TUNE, C.FOSSILIZE),
    S.CULLED: (C.GERMINATE, C.LOAD, C.CULL),
    S.CANCELLED: (C.GERMINATE, C.CANCEL),
    S.ROLLED_BACK: (C.GERMINATE, C.LOAD, C.ROLL_BACK),
}
"""Commands that lead a dormant seed to each state."""


class InstantStore(KernelStore):
    """Serves kernels at the first poll, in the caller's thread.

    Args:
        swap: child factories by blueprint, in place of the library's own build.
        failing: blueprints that cannot be had.
    """

    def __init__(
        self, swap: dict[str, Callable[[int], nn.Module]] | None = None, failing: frozenset[str] = frozenset()
    ) -> None:
        self.swap, self.failing = swap or {}, failing
        self.banned: set[str] = set()
        self.patience = 0

    def prefetch(self, request: KernelRequest) -> None:
        pass

    def poll(self, request: KernelRequest) -> Kernel | None:
        if self.patience > 0:
            self.patience -= 1
            return None
        if request.blueprint not in LIBRARY or request.blueprint in self.failing:
            raise KernelError(f"{request.blueprint} cannot be had")
        ir, dims = LIBRARY[request.blueprint].ir, dict(request.dims)
        ir = ir if request.reads == "declared" else ir.reading(request.reads)
        reason = why_not(ir, request.site)
        name = kernel_id(ir, request.site, dims)
        if reason is not None or name in self.banned:
            raise KernelError(f"{request.blueprint} cannot be had: {reason or 'it failed'}")
        made = self.swap.get(request.blueprint)
        price = cost(ir, request.site, dims)

        def make(seed: int, device: torch.device) -> nn.Module:
            return made(seed).to(device) if made else build(ir, request.site, dims, seed=seed, device=device)

        return Kernel(name, ir, price.params, price.macs, 4 * price.params, make)

    def evict(self, kernel_id: str) -> None:
        self.banned.add(kernel_id)

    def close(self) -> None:
        pass


class Rig:
    """A wrapped host whose sites know their shape, its writer and stepper, and every event so far."""

    def __init__(
        self,
        host: nn.Module,
        x: Any,
        *,
        config: dict[str, Any] | None = None,
        targets: Any = None,
        store: KernelStore | None = None,
    ) -> None:
        self.model: MorphableModel = wrap(host, config, targets=targets)
        self.bank, self.x = self.model.bank, x
        self.events: list[SeedTransitioned] = []
        self.store = store if store is not None else InstantStore()
        self.writer = SeedWriter(self.bank, self.store, self.events.append)
        self.stepper = SeedStepper(self.bank)
        self.steps = itertools.count()
        self.probe()

    def probe(self) -> None:
        self.forward_backward()
        with torch.no_grad():
            self.model.eval()(self.x)
        self.model.train().zero_grad()
        for layer in self.bank.all_layers():
            layer.finish_probe()

    def forward_backward(self) -> Tensor:
        out = self.model(self.x)
        out = out[0] if isinstance(out, tuple) else out
        loss = out.float().square().mean()
        loss.backward()
        return out.detach()

    def moment(self, step: int = 0) -> Moment:
        return Moment("run", 0, step)

    def command(self, verb: SeedCommand, seed: str, blueprint: str = "", **given: Any) -> KasminaControlCommand:
        blueprint = blueprint or ("BP-MLP-GELU" if verb is C.GERMINATE else "")
        layer = SeedId.parse(seed).layer
        return KasminaControlCommand(
            command=verb, target_layer_id=layer, target_seed_id=seed, blueprint_id=blueprint, **given
        )

    def do(self, verb: SeedCommand, seed: str, **given: Any) -> list[SeedTransitioned]:
        return self.writer.apply([self.command(verb, seed, **given)], self.moment())

    def grow(self, seed: str, to: SeedState = S.GRAFTING, *, alpha: float | None = None, **given: Any) -> Any:
        """Bring a dormant seed to a state; returns its graft."""
        for verb in PATHS[to]:
            self.do(verb, seed, **(given if verb is C.GERMINATE else {}))
        graft = self.bank.graft(SeedId.parse(seed))
        if alpha is not None:
            graft.set_alpha(alpha)
            self.bank.layer(SeedId.parse(seed).layer).refresh()
        return graft

    def cull(self, seed: str, reason: Reason = Reason.GATE_FAILED) -> None:
        self.do(C.CULL, seed, reason=reason)

    def state(self, seed: str) -> SeedState:
        return self.bank.state(SeedId.parse(seed))

    def train(self, steps: int, lr: float = 0.01) -> None:
        """Train every parameter that is there on a regression, as a trainer would."""
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        for _ in range(steps):
            self.stepper.begin(next(self.steps))
            loss = F.mse_loss(self.model(self.x), torch.ones(()).expand(len(self.x), 5))
            optimizer.zero_grad()
            loss.backward()
            self.stepper.observe_gradients()
            optimizer.step()
            self.stepper.end(float(loss.detach()))


def wake(graft: Any, scale: float = 0.3) -> Any:
    """Give a zero-initialised child weights that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in graft.child.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return graft


def counts(layer: Any) -> tuple[int, ...]:
    """How often a layer's activation, its gradient and its newborns' ratio were sampled since the last boundary."""
    forward = {int(layer.samples[COLUMN[name]]) for name in FORWARD_METRICS}
    assert len(forward) == 1
    return (*forward, *(int(layer.samples[COLUMN[name]]) for name in ("gradient_norm", "newborn_incumbent_ratio")))


def mlp(seed: int = 0) -> nn.Sequential:
    """3-8-8-5; sites `0`, `2` and `4`."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))


def batch() -> Tensor:
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(5))


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(bits(one), bits(two))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare_with_bare(rig, bare, x):
    """Run both once; the outputs and every host gradient must have the same bits."""
    rig.model.zero_grad()
    bare.zero_grad()
    out = rig.forward_backward()
    expected = bare(x)
    expected.float().square().mean().backward()
    assert same_bits(out, expected)
    theirs, ours = gradients(bare), gradients(rig.model.host)
    assert theirs.keys() == ours.keys()
    assert all(same_bits(theirs[n], ours[n]) for n in theirs)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rig() -> Rig:
    return Rig(mlp(), batch())


class Output(NamedTuple):
    """A forward's result with names."""

    value: Tensor
    extra: Tensor
