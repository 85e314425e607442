import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper.kasmina.graft import Graft
from esper.leyline.events import Fault
from esper.leyline.ids import SeedId
from esper.models import ByteLM
from tests.kasmina.conftest import InstantStore, Rig, S, batch, compare_with_bare, mlp, same_bits, wake

SERIAL = ("BP-MLP-GELU", "BP-MLP-SWIGLU", "BP-NORM-RMS", "BP-PROJ-IA3", "BP-EXPERT-MLP")
PARALLEL = ("BP-WIDEN", "BP-PROJ-LORA")


def inplace():
    """The host changes the site's output in place."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)
    )


# --- shadow training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factory", [mlp, inplace])
@pytest.mark.parametrize("blueprint", [*SERIAL, *PARALLEL])
def test_a_shadow_changes_nothing_and_learns(blueprint, factory, dtype):
    x = batch().to(dtype)
    rig = Rig(factory().to(dtype), x)
    graft = wake(rig.grow("2#0.0", S.TRAINING, blueprint=blueprint))
    assert graft.objective == "shadow"
    compare_with_bare(rig, factory().to(dtype), x)
    assert graft.fault is None
    assert graft.grad_norm() > 0


@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_shadows_in_every_chunk_change_nothing(chunks):
    rig = Rig(mlp(), batch(), config={"seeds_per_layer": chunks}, targets=["0", "2"])
    kinds = ("BP-NORM-RMS", "BP-PROJ-LORA" if chunks == 8 else "BP-MLP-GELU")
    seeds = [(site, c, s) for site in (0, 2) for c in range(chunks) for s in (0, 1)]
    grafts = [wake(rig.grow(f"{site}#{c}.{s}", S.TRAINING, blueprint=kinds[s])) for site, c, s in seeds]
    compare_with_bare(rig, mlp(), batch())
    # Behind a dead unit of the host a one-wide chunk has no gradient.
    assert sum(graft.grad_norm() > 0 for graft in grafts) > len(grafts) / 2


def test_a_shadow_in_a_language_model():
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))

    def make():
        torch.manual_seed(0)
        return ByteLM(d_model=8, layers=2, heads=2, context=16)

    rig = Rig(make(), tokens, targets=["*.after_attn", "*.ffn"])
    conv = wake(rig.grow("blocks.0.after_attn#0.0", S.TRAINING, blueprint="BP-CONV-CAUSAL"))
    widen = wake(rig.grow("blocks.1.ffn#0.0", S.TRAINING, blueprint="BP-WIDEN"))
    compare_with_bare(rig, make(), tokens)
    assert min(conv.grad_norm(), widen.grad_norm()) > 0


class Minus(nn.Module):
    """Returns `-x`, with a weight to train."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x):
        return self.scale * x


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_shadow_keeps_negative_zeros(chunks):
    x = torch.zeros(2, 4)
    rig = Rig(nn.Sequential(Minus(), nn.Linear(4, 3)), x, targets=["0"], config={"seeds_per_layer": chunks})
    seen = []
    rig.model.host[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    wake(rig.grow("0#0.0", S.TRAINING))
    rig.forward_backward()
    assert same_bits(seen[-1], -x)


def test_the_norm_bound_tames_the_shadow():
    rig = Rig(mlp(), batch(), config={"shadow_norm_bound": 0.5})
    graft = wake(rig.grow("2#0.0", S.TRAINING), scale=50.0)
    y = torch.randn(6, 8, requires_grad=True)
    residual = torch.zeros_like(y)

    def note(_module, _args, out):
        residual.copy_(out.detach())

    graft.child.register_forward_hook(note)
    added = graft.contribution(None, y, -1).scaled()
    assert torch.equal(added, torch.zeros_like(added))
    added.backward(residual)
    assert float((residual.norm(dim=-1) / y.norm(dim=-1)).detach().max()) > 0.5
    # The gradient passes through the bounded residual, so it is scaled down by the same factor.
    last = [p for p in graft.child.parameters()][-1]
    scale = (0.5 * y.norm(dim=-1) / residual.norm(dim=-1)).clamp(max=1.0)
    assert torch.allclose(last.grad, (residual * scale[:, None]).sum(0).detach(), rtol=1e-4)


def test_a_shadow_costs_nothing_in_evaluation(rig):
    graft = rig.grow("2#0.0", S.TRAINING)
    calls = []
    graft.child.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert same_bits(rig.model(rig.x), mlp()(rig.x))
    assert calls == []


# --- reconstruction ----------------------------------------------------------------------------------------------


RECONSTRUCTION = {"training_objective": "reconstruction", "reconstruction_lr": 1e-2}


@pytest.mark.parametrize("factory", [mlp, inplace])
@pytest.mark.parametrize("blueprint", ["BP-MLP-GELU", "BP-MLP-SWIGLU"])
def test_reconstruction_leaves_the_host_alone_and_lowers_its_own_loss(factory, blueprint):
    rig = Rig(factory(), batch(), config=RECONSTRUCTION)
    graft = rig.grow("2#0.0", S.TRAINING, blueprint=blueprint)
    losses = []
    for _ in range(60):
        before = torch.get_rng_state()
        compare_with_bare(rig, factory(), batch())
        assert torch.equal(before, torch.get_rng_state())
        losses.append(float(graft.pending.detach()))
        assert graft.grad_norm() == 0.0
        rig.stepper.end(1.0)
        assert graft.pending is None
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_each_step_hides_other_features():
    rig = Rig(mlp(), batch(), config=RECONSTRUCTION)
    graft = rig.grow("2#0.0", S.TRAINING)
    seen = []
    graft.child.register_forward_pre_hook(lambda _, args: seen.append(args[0] == 0))
    for _ in range(3):
        rig.forward_backward()
    assert not torch.equal(seen[0], seen[1])
    assert 0.1 < float(torch.cat(seen).float().mean()) < 0.3


def test_a_graft_with_a_pending_loss_can_be_copied():
    rig = Rig(mlp(), batch(), config=RECONSTRUCTION)
    graft = rig.grow("2#0.0", S.TRAINING)
    rig.forward_backward()
    assert graft.pending is not None
    for twin in (copy.deepcopy(rig.model), pickle.loads(pickle.dumps(rig.model))):
        assert twin.bank.graft(SeedId("2")).pending is None
    assert graft.pending is not None


# --- the blend ---------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Returns `gain * x`."""

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return self.gain * x


@settings(max_examples=40, deadline=None)
@given(
    gains=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4),
    alphas=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
    replaces=st.lists(st.booleans(), min_size=4, max_size=4),
    inputs=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_slots_add_up(gains, alphas, replaces, inputs):
    """The output is `y + sum a_i r_i`, whatever the mixture of serial, parallel and replacing children."""
    rig = Rig(nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4, generator=torch.Generator().manual_seed(2)))
    layer = rig.bank.layer("0")
    y = rig.model(rig.x).detach()
    expected = y.double()
    for i, gain in enumerate(gains):
        reads = "input" if inputs[i] else "output"
        graft = Graft(Residual(gain), reads=reads, replaces=replaces[i])
        graft.objective = "graft"
        graft.set_alpha(alphas[i])
        layer.grafts[f"c0s{i}"] = graft
        value = gain * (rig.x if inputs[i] else y).double()
        expected = expected + alphas[i] * (value - y.double() if replaces[i] else value)
    layer.refresh()
    assert torch.allclose(rig.model(rig.x).double(), expected, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_an_identity_initial_child_starts_as_identity(rig, alpha):
    graft = rig.grow("2#0.0", S.GRAFTING, blueprint="BP-PROJ-IA3", alpha=alpha)
    assert graft.replaces
    assert same_bits(rig.forward_backward(), mlp()(batch()))
    with torch.no_grad():
        next(graft.child.parameters()).mul_(3.0)
    host = mlp()
    host[2].register_forward_hook(lambda _, __, y: y + alpha * (3.0 * y - y))
    assert torch.allclose(rig.forward_backward(), host(batch()), atol=1e-6)


@pytest.mark.parametrize("blueprint", [*SERIAL, *PARALLEL])
def test_a_newborn_at_full_alpha_changes_nothing(rig, blueprint):
    rig.grow("2#0.0", S.GRAFTING, blueprint=blueprint, alpha=1.0)
    assert torch.equal(rig.forward_backward(), mlp()(batch()))


def test_a_child_that_is_off_cannot_leak(rig):
    graft = rig.grow("2#0.0", S.GRAFTING)
    with torch.no_grad():
        for parameter in graft.child.parameters():
            parameter.fill_(float("nan"))
    assert graft.strength == 0.0
    compare_with_bare(rig, mlp(), batch())
    assert graft.fault is None


def test_alpha_is_a_saved_number_of_no_dimension(rig):
    graft = rig.grow("2#0.0", S.GRAFTING, alpha=0.25)
    name = next(key for key in rig.model.state_dict() if key.endswith(".alpha"))
    alpha = rig.model.state_dict()[name]
    assert (alpha.shape, float(alpha), graft.strength) == ((), 0.25, 0.25)
    assert not alpha.requires_grad
    assert not isinstance(graft.alpha, nn.Parameter)


def test_the_blend_works_under_autocast_and_in_bfloat16():
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        rig = Rig(mlp().to(dtype), batch().to(dtype))
        graft = wake(rig.grow("2#0.0", S.GRAFTING, alpha=1.0))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = rig.forward_backward()
        assert out.dtype is torch.bfloat16
        assert graft.fault is None
        assert graft.grad_norm() > 0


def test_drift_is_relative_to_the_remembered_weights():
    site = nn.Linear(3, 3)
    graft = Graft(nn.Identity(), reads="output", replaces=True)
    assert graft.drift(site) == 0.0
    graft.remember_host(site)
    assert graft.drift(site) == 0.0
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.mul_(1.1)
    assert graft.drift(site) == pytest.approx(0.1, rel=1e-4)
    graft.remember_host(nn.ReLU())
    assert graft.drift(nn.ReLU()) == 0.0


# --- gradients that are not finite ---------------------------------------------------------------------------------


class Spoil(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, float("nan"))


class Spoiled(nn.Module):
    """A child whose backward pass goes wrong before or behind its only weight."""

    def __init__(self, where):
        super().__init__()
        self.where, self.gain = where, nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.gain * Spoil.apply(x) if self.where == "input" else Spoil.apply(self.gain * x)


def spoiled(where, stage=S.GRAFTING):
    store = InstantStore({"BP-NORM-RMS": lambda seed: Spoiled(where)})
    rig = Rig(mlp(), batch(), store=store)
    return rig, rig.grow("2#0.0", stage, blueprint="BP-NORM-RMS", alpha=0.5)


@pytest.mark.parametrize("where", ["input", "output"])
def test_a_gradient_that_is_not_finite_never_reaches_the_host(where):
    rig, graft = spoiled(where)
    rig.forward_backward()
    rig.stepper.observe_gradients()
    assert graft.fault_kind == Fault.NOT_FINITE.value
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in rig.model.host[0].parameters())
    assert graft.child.gain.grad is None
    compare_with_bare(rig, mlp(), batch())
    assert rig.bank.layer("2").live == ()


def test_a_shadow_whose_gradient_is_not_finite_keeps_its_weights():
    rig, graft = spoiled("output", S.TRAINING)
    compare_with_bare(rig, mlp(), batch())
    rig.stepper.observe_gradients()
    assert graft.fault_kind == Fault.NOT_FINITE.value
    assert graft.child.gain.grad is None


def test_a_child_is_not_blamed_for_the_gradient_it_was_given(rig):
    graft = wake(rig.grow("2#0.0", S.GRAFTING, alpha=0.5))
    (rig.model(batch()).sum() * float("nan")).backward()
    rig.stepper.observe_gradients()
    assert graft.fault is None
    assert graft.sound is None


def test_an_overflow_under_a_loss_scaler_is_nobodys_fault():
    rig, graft = spoiled("output")
    with torch.autocast("cpu", dtype=torch.float16):
        rig.forward_backward()
    rig.stepper.observe_gradients()
    assert graft.fault is None
