import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper.kasmina.graft import Graft
from esper.leyline.events import Fault
from esper.leyline.ids import SeedId
from esper.leyline.states import Reason
from esper.models import ByteLM
from tests.kasmina.conftest import C, InstantStore, Rig, S, batch, mlp, same_bits, wake

SERIAL = ("BP-MLP-GELU", "BP-MLP-SWIGLU", "BP-NORM-RMS", "BP-PROJ-IA3", "BP-EXPERT-MLP")
PARALLEL = ("BP-WIDEN", "BP-PROJ-LORA")


def inplace():
    """The host changes the site's output in place."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)
    )


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
    added = graft.contribution(None, y, -1)
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


# --- faults ------------------------------------------------------------------------------------------------------


class Bad(nn.Module):
    """Behaves until the n-th forward, then misbehaves in one way."""

    def __init__(self, how, after=0):
        super().__init__()
        self.how, self.after, self.calls = how, after, 0
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.calls += 1
        good = 0.1 * self.gain * x
        return good if self.calls <= self.after else self.how(good)


def _raise(_):
    raise RuntimeError("boom")


def _poison(value):
    def misbehave(good):
        bad = good.clone()
        bad.view(-1)[3] = value
        return bad

    return misbehave


WAYS = {
    "raises": (_raise, Fault.RAISED),
    "raises an assertion": (lambda good: (_ for _ in ()).throw(AssertionError("no")), Fault.RAISED),
    "one NaN": (_poison(float("nan")), Fault.NOT_FINITE),
    "one inf": (_poison(float("inf")), Fault.NOT_FINITE),
    "overflows": (lambda good: good.double() * 1e300, Fault.NOT_FINITE),
    "too few features": (lambda good: good[..., :-1], Fault.WRONG_SHAPE),
    "one sample too many": (lambda good: torch.cat([good, good[:1]]), Fault.WRONG_SHAPE),
    "a scalar that would broadcast": (lambda good: good.sum(), Fault.WRONG_SHAPE),
    "None": (lambda good: None, Fault.WRONG_SHAPE),
    "a tuple": (lambda good: (good,), Fault.WRONG_SHAPE),
    "integers": (lambda good: good.long(), Fault.WRONG_SHAPE),
    "complex numbers": (lambda good: good.to(torch.complex64), Fault.WRONG_SHAPE),
    "another device": (lambda good: good.to("meta"), Fault.WRONG_SHAPE),
}


def faulty_rig(way, *, after=0, seeds_per_layer=1):
    store = InstantStore({"BP-NORM-RMS": lambda seed: Bad(WAYS[way][0], after)})
    return Rig(mlp(), batch(), store=store, config={"seeds_per_layer": seeds_per_layer})


@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING, S.STABILIZATION, S.FOSSILIZED])
@pytest.mark.parametrize("way", WAYS)
def test_a_fault_is_bypassed_in_the_same_forward(way, stage):
    rig = faulty_rig(way)
    graft = rig.grow("2#0.0", stage, blueprint="BP-NORM-RMS", alpha=0.5)
    compare_with_bare(rig, mlp(), batch())
    assert graft.fault
    assert graft.fault_kind == WAYS[way][1].value
    assert not graft.live


@pytest.mark.parametrize("way", ["raises", "one NaN", "too few features"])
def test_a_fault_in_a_later_step_goes_on_as_the_bare_host(way):
    rig = faulty_rig(way, after=3)
    graft = rig.grow("2#0.0", S.GRAFTING, blueprint="BP-NORM-RMS", alpha=1.0)
    bare = mlp()
    for step in range(6):
        assert same_bits(rig.forward_backward(), bare(batch())) == (step >= 3)
        assert (graft.fault is not None) == (step >= 3)


def test_other_grafts_at_the_site_go_on():
    alone, rig = Rig(mlp(), batch()), faulty_rig("one NaN")
    wake(alone.grow("2#0.0", S.GRAFTING, alpha=0.7))
    rig.grow("2#0.0", S.GRAFTING, alpha=0.5, blueprint="BP-NORM-RMS")
    good = wake(rig.grow("2#0.1", S.GRAFTING, alpha=0.7))
    assert same_bits(rig.forward_backward(), alone.forward_backward())
    assert good.fault is None
    assert good.grad_norm() > 0


def test_a_faulty_chunk_leaves_the_other_chunks_alone():
    alone, rig = Rig(mlp(), batch(), config={"seeds_per_layer": 4}), faulty_rig("raises", seeds_per_layer=4)
    wake(alone.grow("2#1.0", S.GRAFTING, alpha=0.7))
    rig.grow("2#0.0", S.GRAFTING, alpha=0.5, blueprint="BP-NORM-RMS")
    wake(rig.grow("2#1.0", S.GRAFTING, alpha=0.7))
    assert same_bits(rig.forward_backward(), alone.forward_backward())


def test_a_faulty_kernel_is_evicted_when_it_is_culled():
    rig = faulty_rig("raises")
    rig.grow("2#0.0", S.GRAFTING, blueprint="BP-NORM-RMS", alpha=0.5)
    rig.forward_backward()
    assert rig.store.banned == set()
    rig.cull("2#0.0", Reason.RUNTIME_ERROR)
    assert rig.store.banned == {rig.events[-1].kernel_artifact_id}
    assert rig.bank.records[SeedId("2")].embargo == rig.bank.config.embargo_steps
    rig.do(C.GERMINATE, "2#0.1", blueprint="BP-NORM-RMS")
    rig.do(C.LOAD, "2#0.1")
    rig.do(C.TRAIN, "2#0.1")
    assert rig.state("2#0.1") is S.CULLED


def test_a_healthy_kernel_stays_in_the_store(rig):
    rig.grow("2#0.0")
    rig.cull("2#0.0")
    assert rig.store.banned == set()


def test_a_child_is_not_blamed_for_a_host_that_went_wrong(rig):
    graft = wake(rig.grow("2#0.0", S.GRAFTING, alpha=0.5))
    broken = batch()
    broken[0, 0] = float("nan")
    out = rig.model(broken)
    assert graft.fault is None
    assert same_bits(out, mlp()(broken))
    assert not same_bits(rig.model(batch()), mlp()(batch()))


def test_reading_an_input_that_is_not_there():
    host = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    rig = Rig(host, torch.tensor([[1, 2], [3, 4]]), targets=["0"])
    rig.grow("0#0.0", S.TRAINING, blueprint="BP-MLP-GELU")
    graft = rig.bank.graft(SeedId("0"))
    graft.reads = "input"
    rig.forward_backward()
    assert graft.fault_kind == Fault.RAISED.value


def test_a_kernel_that_fails_in_its_own_backward_pass():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no way back")

    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return Broken.apply(self.gain * x)

    store = InstantStore({"BP-MLP-GELU": lambda seed: Child()})
    rig = Rig(mlp(), batch(), store=store, config=RECONSTRUCTION)
    graft = rig.grow("2#0.0", S.TRAINING)
    rig.forward_backward()
    rig.stepper.end(1.0)
    assert "no way back" in graft.fault
    compare_with_bare(rig, mlp(), batch())


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


def test_faults_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test_a_fault_is_bypassed_in_the_same_forward("complex numbers", S.GRAFTING)
