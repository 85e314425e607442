"""What only watches changes nothing, what guards changes gradients alone, what normalises agrees over ranks."""

import copy

import pytest
import torch
from torch import nn

import esper
from esper.blueprints import SiteShape, build, readings
from esper.blueprints.ops_monitor import GradientGuard
from tests.blueprints.growing import LIBRARY, one_rank
from tests.grafts import grafted, wrapped

SHAPES = {"bd": (16, 8), "btd": (16, 5, 8), "bchw": (16, 8, 3, 4)}


def child(name, layout="bd"):
    return build(LIBRARY[name].ir, SiteShape(layout, 8, 8, {"bd": 1, "btd": 5, "bchw": 12}[layout]), seed=0)


@pytest.mark.parametrize("layout", SHAPES)
def test_readings_are_the_statistics_of_each_feature(layout):
    meter, x = child("BP-MON-ACT-STATS", layout), torch.randn(SHAPES[layout]) * 3 + 1
    x[x.abs() < 0.5] = 0
    assert readings(meter)["tap"]["mean"].isnan().all(), "nothing has been seen"
    for _ in range(3):
        meter(x)
    rows = x.movedim(1 if layout == "bchw" else -1, 0).flatten(1)
    found = readings(nn.ModuleDict({"grown": meter}))["grown.tap"]
    wanted = {
        "mean": rows.mean(1),
        "std": rows.std(1, correction=0),
        "minimum": rows.amin(1),
        "maximum": rows.amax(1),
        "zero_share": (rows == 0).float().mean(1),
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_readings_follow_what_comes_last():
    meter = child("BP-MON-ACT-STATS")
    for mean in [0.0] * 300 + [1.0] * 300:
        meter(torch.full((4, 8), mean))
    assert (readings(meter)["tap"]["mean"] > 0.9).all()


def test_a_tap_changes_no_bit_of_host_and_gradients():
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 8)
    bare = copy.deepcopy(host)
    with torch.no_grad():
        for model in (host, bare):
            model[0].weight[0] = model[0].bias[0] = -0.0  # type: ignore[index]
    model = wrapped(host, x, targets=["0"])
    grafted(model, "0", LIBRARY["BP-MON-ACT-STATS"].ir)
    model.train(), bare.train()
    for network in (model, bare):
        network(x).square().sum().backward()
    assert torch.equal(model(x), bare(x))
    assert torch.equal(torch.signbit(model(x)), torch.signbit(bare(x)))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(host.parameters(), bare.parameters(), strict=True))
    [(path, found)] = readings(model).items()
    assert path.endswith("child.tap")
    torch.testing.assert_close(found["mean"], bare[0](x).mean(0))


def test_no_sample_pulls_much_harder_than_the_others():
    guard, x = GradientGuard(4.0), torch.randn(6, 5, 3).requires_grad_()
    gradient = torch.randn(6, 5, 3)
    gradient[2] *= 100
    (found,) = torch.autograd.grad(guard(x), x, gradient)
    norms, bound = gradient.flatten(1).norm(dim=1), 4 * gradient.flatten(1).norm(dim=1).median()
    assert torch.equal(guard(x), x)
    torch.testing.assert_close(found[2].norm(), bound)
    torch.testing.assert_close(found[2] / bound, gradient[2] / norms[2])
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found[others], gradient[others])
    (scaled,) = torch.autograd.grad(guard(x), x, 1024 * gradient)
    torch.testing.assert_close(scaled, 1024 * found)


@pytest.mark.parametrize("silent", [0, 5, 6])
def test_samples_without_a_gradient_set_no_bound(silent):
    x, gradient = torch.randn(6, 3).requires_grad_(), torch.ones(6, 3)
    gradient[:silent] = 0
    (found,) = torch.autograd.grad(GradientGuard(4.0)(x), x, gradient)
    assert torch.equal(found, gradient)


def test_the_guard_works_through_a_graft():
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), torch.randn(6, 8)
    bare, weights = copy.deepcopy(host), torch.ones(6, 3)
    weights[1] = 1000.0
    model = wrapped(host, x, targets=["0"])
    grafted(model, "0", LIBRARY["BP-CLAMP-GRAD-NORM"].ir)
    model.train()
    assert torch.equal(model(x), bare(x))
    (model(x) * weights).sum().backward()
    (bare(x) * weights.clamp_max(4.0)).sum().backward()
    torch.testing.assert_close(host[0].weight.grad, bare[0].weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", SHAPES)
def test_the_shared_norm_comes_to_standardise(layout):
    with one_rank():
        made = child("BP-ALL-REDUCE-SHARD", layout).norm
        x = torch.randn(SHAPES[layout]) * 5 + 3
        first = made(x)
        torch.testing.assert_close(first, x, rtol=1e-4, atol=1e-4)
        for _ in range(1500):
            made(x)
    rows = made.eval()(x).movedim(1 if layout == "bchw" else -1, 0).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(rows.std(1, correction=0), torch.ones(8), atol=1e-3, rtol=0)


def test_children_that_watch_need_no_optimizer():
    model = wrapped(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8))
    graft = grafted(model, "0", "BP-MON-ACT-STATS")
    assert not list(graft.child.parameters())
    assert graft.grad_norm() == 0.0
    assert isinstance(model, esper.MorphableModel)
