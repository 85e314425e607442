"""Seeds in a host under `torch.compile`: nothing of the host is compiled again, whatever grows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import esper
from esper.leyline.ids import SeedId
from tests.helpers import QUICK, Plain, digits, planting, states, trainer
from tests.kasmina.conftest import Rig, S, batch, same_bits, wake

# The compiler looks at `.grad` of everything that enters a frame.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
REGIONS = ["whole", "whole, before wrapping", "blocks"]
TARGETS: dict[str, list[str] | None] = {"default": None, "inner": ["blocks.*.down"], "blocks": ["blocks.?"]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.outer = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = block(x)
        return self.outer(x)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_in(region: str, net: Net, backend: str) -> None:
    for module in net.blocks if region == "blocks" else (net,):
        module.compile(backend=backend)


def compiled_rig(region: str, targets: list[str] | None, backend: str = "aot_eager", depth: int = 3) -> Rig:
    """A probed rig whose host is compiled and warm, in training and evaluation."""
    net = Net(depth)
    if "before" in region:
        compile_in(region, net, backend)
    rig = Rig(net, batch(), targets=targets)
    if "before" not in region:
        compile_in(region, net, backend)
    for _ in range(2):
        rig.forward_backward()
        with torch.no_grad():
            rig.model.eval()(rig.x)
        rig.model.train()
    return rig


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def frozen() -> Any:
    """Compiling anything again raises."""
    return torch._dynamo.config.patch(error_on_recompile=True)


def site_of(rig: Rig, block: int) -> str:
    return next(layer.path for layer in rig.bank.all_layers() if f"blocks.{block}" in layer.path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("region", "targets"),
    [(REGIONS[0], "default"), (REGIONS[1], "inner"), (REGIONS[2], "default"), (REGIONS[2], "blocks")],
)
def test_a_graft_compiles_nothing_of_the_host_again(region: str, targets: str) -> None:
    rig = compiled_rig(region, TARGETS[targets])
    compiled = graphs()
    assert compiled > 0
    with frozen():
        seed = f"{site_of(rig, 1)}#0.0"
        graft = wake(rig.grow(seed, alpha=0.5))
        rig.train(25)  # on sampled steps, too
        assert rig.bank.layer(SeedId.parse(seed).layer).samples.any()
        with torch.no_grad():
            rig.model.eval()(rig.x)
        rig.model.train()
        rig.cull(seed)
        rig.train(2)
    assert graphs() == compiled
    assert graft.fault is None and graft.grad_norm() > 0


@pytest.mark.slow
@pytest.mark.parametrize("region", REGIONS)
def test_a_compiled_host_computes_what_the_eager_one_does(region: str) -> None:
    eager, compiled = Rig(Net(), batch()), compiled_rig(region, None)
    for rig in (eager, compiled):
        rig.model.zero_grad()
        wake(rig.grow("blocks.0.down#0.0", alpha=0.5))
        wake(rig.grow("blocks.2.up#0.0", S.TRAINING))
    assert same_bits(eager.forward_backward(), compiled.forward_backward())
    ours = dict(compiled.model.named_parameters())
    for name, parameter in eager.model.named_parameters():
        other = ours[name].grad
        assert (parameter.grad is None) == (other is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_many_topologies_stay_below_every_limit_of_the_compiler() -> None:
    rig = compiled_rig("blocks", None, depth=4)
    compiled = graphs()
    with frozen():
        for change in range(24):
            seed = f"blocks.{change % 4}.{('down', 'up', 'norm')[change % 3]}#0.{change // 12}"
            graft = wake(rig.grow(seed, alpha=0.5))
            rig.forward_backward()
            assert graft.grad_norm() > 0
            if change % 2:
                rig.cull(seed)
                rig.forward_backward()
    assert graphs() == compiled


class Broken(nn.Module):
    """A child that goes wrong in a way that a test chooses."""

    def __init__(self, wrong: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.wrong = nn.Parameter(torch.ones(())), wrong

    def forward(self, x: Tensor) -> Tensor:
        return self.wrong(self.weight * x)


def _raise(x: Tensor) -> Tensor:
    raise RuntimeError("worn out")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [lambda x: x / 0, lambda x: x[:, :2], _raise], ids=["nan", "shape", "raises"])
def test_a_fault_is_contained_in_a_compiled_host(wrong: Callable[[Tensor], Tensor]) -> None:
    bare = Net()(batch())
    rig = compiled_rig("blocks", ["blocks.*.down"])
    graft = rig.grow("blocks.1.down#0.0", alpha=0.5)
    graft.child = Broken(wrong)
    with frozen():
        out = rig.forward_backward()
    assert graft.fault is not None
    torch.testing.assert_close(out, bare, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # The backend imports what torch has deprecated.
def test_a_graft_compiles_nothing_again_with_inductor() -> None:
    rig = compiled_rig("blocks", ["blocks.*.down"], "inductor", depth=2)
    compiled = graphs()
    with frozen():
        graft = wake(rig.grow("blocks.1.down#0.0", alpha=0.5))
        rig.train(3)
    assert graphs() == compiled
    assert graft.fault is None and graft.grad_norm() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("way", ["module", "network"])
def test_a_compiled_module_grows_in_a_trainer(tmp_path: Path, way: str) -> None:
    module = Plain()
    tamiyo = esper.Tamiyo("schedule", kasmina=QUICK, settings=planting(at=8), targets=["net.*"])
    if way == "network":
        module.net.compile(backend="aot_eager")
    given = torch.compile(module, backend="aot_eager") if way == "module" else module
    trainer(tmp_path, tamiyo, enable_checkpointing=False, callbacks=[tamiyo]).fit(given, datamodule=digits())
    assert graphs() > 0
    assert states(tamiyo) == ["FOSSILIZED"]
    assert all(graft.fault is None for graft in tamiyo.bank.grafted().values())
