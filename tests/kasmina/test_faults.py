"""What the host sees when a kernel misbehaves: nothing."""

import warnings

import pytest
import torch
from torch import nn

from esper.leyline.events import Fault
from esper.leyline.ids import SeedId
from esper.leyline.states import Reason
from tests.kasmina.conftest import C, InstantStore, Rig, S, batch, compare_with_bare, mlp, same_bits, wake


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
    rig = Rig(mlp(), batch(), store=store, config={"training_objective": "reconstruction"})
    graft = rig.grow("2#0.0", S.TRAINING)
    rig.forward_backward()
    rig.stepper.end(1.0)
    assert "no way back" in graft.fault
    compare_with_bare(rig, mlp(), batch())


def test_faults_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test_a_fault_is_bypassed_in_the_same_forward("complex numbers", S.GRAFTING)
