import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn

from esper.kasmina.bank import SeedBank, graft_name, layer_name, parse_topology
from esper.kasmina.config import KasminaConfig
from esper.kasmina.wrapper import wrap
from esper.leyline.errors import CheckpointError, EsperError, NoSuchSeed
from esper.leyline.events import Fault
from esper.leyline.ids import SeedId
from esper.models import ByteLM
from tests.kasmina.conftest import C, Rig, S, batch, mlp, same_bits, wake

TOPOLOGY = "bank.topology"


def grown(preset="measured", chunks=1):
    """A model with a child in each stage of life, all of them doing something."""
    rig = Rig(mlp(), batch(), config={"preset": preset, "seeds_per_layer": chunks})
    wake(rig.grow("0#0.0", S.TRAINING, init_seed=3))
    wake(rig.grow("2#0.0", S.GRAFTING, blueprint="BP-WIDEN", alpha=0.5, dims={"h": 3}))
    wake(rig.grow("2#0.1", S.FOSSILIZED, blueprint="BP-PROJ-IA3", alpha=1.0))
    wake(rig.grow("4#0.0", S.STABILIZATION, blueprint="BP-PROJ-LORA", alpha=1.0))
    drifting = {"blueprint": "BP-MLP-SWIGLU", "grafting_strategy": "drift_controlled"}
    wake(rig.grow(f"2#{chunks - 1}.2", S.GRAFTING, alpha=0.25, **drifting))
    rig.grow("4#0.1", S.CULLED)
    rig.grow("4#0.2", S.LOADING)
    rig.forward_backward()
    return rig


def states(rig_or_model):
    model = getattr(rig_or_model, "model", rig_or_model)
    return {v.seed_id: (v.state, v.blueprint, v.alpha, v.params) for v in model.seeds if v.state is not S.DORMANT}


@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize(("preset", "chunks"), [("measured", 1), ("strict", 1), ("measured", 2)])
def test_a_grown_state_dict_rebuilds_the_model(preset, chunks, probed):
    rig = grown(preset, chunks)
    config = {"preset": preset, "seeds_per_layer": chunks}
    fresh = Rig(mlp(1), batch(), config=config).model if probed else wrap(mlp(1), config)
    assert fresh.load_state_dict(rig.model.state_dict()) == nn.modules.module._IncompatibleKeys([], [])
    assert states(fresh) == states(rig)
    assert fresh.bank.topology() == rig.bank.topology()
    assert same_bits(fresh(batch()), rig.model(batch()))
    frozen = [{n for n, p in m.named_parameters() if not p.requires_grad} for m in (rig.model, fresh)]
    assert frozen[0] == frozen[1]
    fresh.bank.arrays.verify()
    assert list(fresh.state_dict()) == list(rig.model.state_dict())


def test_a_state_dict_survives_a_file_of_plain_tensors(rig):
    wake(rig.grow("2#0.0", S.GRAFTING, alpha=0.5))
    file = io.BytesIO()
    torch.save(rig.model.state_dict(), file)
    file.seek(0)
    fresh = wrap(mlp(1))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert same_bits(fresh(batch()), rig.model(batch()))


def test_loading_into_a_model_that_grew_otherwise():
    source, target = grown(), Rig(mlp(1), batch())
    target.grow("0#0.4", S.FOSSILIZED)
    target.grow("2#0.0", S.GRAFTING, blueprint="BP-NORM-RMS", alpha=1.0)
    target.model.load_state_dict(source.model.state_dict())
    assert states(target) == states(source)
    assert same_bits(target.model(batch()), source.model(batch()))
    assert SeedId("0", 0, 4) not in target.bank.rows


def test_a_dormant_state_dict_empties_a_grown_model():
    rig, dormant = grown(), wrap(mlp(1))
    rig.model.load_state_dict(dormant.state_dict())
    assert states(rig) == {}
    assert rig.bank.records == rig.bank.grafted() == {}
    assert rig.model.state_dict().keys() == dormant.state_dict().keys()
    assert same_bits(rig.model(batch()), mlp(1)(batch()))
    assert not any(column.any() for column in rig.bank.arrays.columns.values())
    rig.bank.arrays.verify()


def test_training_goes_on_the_same_after_loading():
    """Two models, one of them loaded half way, take the same steps to the same bits."""
    for preset in ("measured", "strict"):
        rig = Rig(mlp(), batch(), config={"preset": preset, "ramp_steps": 9})
        rig.grow("2#0.0", S.GRAFTING, grafting_strategy="performance_linked")
        rig.train(4)
        twin = Rig(mlp(1), batch(), config={"preset": preset, "ramp_steps": 9})
        twin.model.load_state_dict(rig.model.state_dict())
        for each in (rig, twin):
            each.train(4)
        ours, theirs = rig.model.state_dict(), twin.model.state_dict()
        assert all(same_bits(ours[name], theirs[name]) for name in ours)


def _broken(change):
    rig = grown()
    state = rig.model.state_dict()
    topology = json.loads(state[TOPOLOGY].numpy().tobytes())
    topology = change(topology)
    text = topology if isinstance(topology, bytes) else json.dumps(topology).encode()
    return state | {TOPOLOGY: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def _set(entry, **values):
    def change(topology):
        topology[entry] |= values
        return topology

    return change


def _without(name):
    return lambda topology: [{k: v for k, v in entry.items() if k != name} for entry in topology]


def test_a_fault_outlives_save_and_load():
    rig = grown()
    seed = next(iter(rig.bank.grafted()))
    broken = rig.bank.graft(seed)
    broken.fail(Fault.NOT_FINITE, "it returned NaN")
    broken.fault_reported = True
    rig.bank.layer(seed.layer).refresh()
    fresh = wrap(mlp(1))
    fresh.load_state_dict(rig.model.state_dict())
    loaded = fresh.bank.graft(seed)
    assert (loaded.fault, loaded.fault_kind, loaded.fault_reported) == ("it returned NaN", "NOT_FINITE", True)
    assert loaded not in fresh.bank.layer(seed.layer).live
    assert same_bits(fresh(batch()), rig.model(batch()))
    assert "bypassed: it returned NaN" in fresh.growth_report()


def test_a_topology_from_before_faults_were_kept_still_loads():
    def strip(topology):
        return [{k: v for k, v in entry.items() if not k.startswith("fault")} for entry in topology]

    fresh = wrap(mlp(1))
    fresh.load_state_dict(_broken(strip))
    assert fresh.bank.topology() == grown().bank.topology()
    assert "bypassed" not in fresh.growth_report()


BROKEN = {
    "no JSON": lambda _: b"\xff\x00",
    "cut short": lambda topology: json.dumps(topology).encode()[:-9],
    "no list": lambda topology: {"seeds": topology},
    "no records": lambda _: [1, 2],
    "an unknown field": _set(1, color="red"),
    "a missing field": _without("blueprint"),
    "a missing extra": _without("alpha"),
    "an unknown state": _set(1, state="HAPPY"),
    "an unknown site": _set(1, seed_id="9#0.0"),
    "an unknown chunk": _set(1, seed_id="2#7.0"),
    "no seed id": _set(1, seed_id="two"),
    "a broken blueprint": _set(3, ir={"name": "BP-EVIL"}),
    "a shape that does not fit": _set(3, site={"layout": "bchw", "d_in": 0, "d_out": 0, "tokens": 1, "kind": "block"}),
    "facts of the wrong length": _set(1, facts=[1, 2]),
    "an unknown fault": _set(1, fault="it is odd", fault_kind="ODD"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_topology_is_refused_and_changes_nothing(damage):
    state, target = _broken(BROKEN[damage]), grown()
    before, out = target.bank.topology(), target.model(batch())
    with pytest.raises(CheckpointError, match="topology"):
        target.model.load_state_dict(state)
    assert target.bank.topology() == before
    assert same_bits(target.model(batch()), out)
    target.bank.arrays.verify()


@pytest.mark.parametrize("saved", ["text", 3, torch.zeros(4), torch.zeros(2, dtype=torch.bfloat16)])
def test_a_topology_of_another_type_is_refused(saved):
    with pytest.raises(CheckpointError):
        parse_topology(saved)
    with pytest.raises(CheckpointError):
        wrap(mlp()).load_state_dict(mlp_state() | {TOPOLOGY: saved})


def mlp_state():
    return wrap(mlp()).state_dict()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_grown_model_are_equal_and_independent(way):
    rig = grown()
    twin = way(rig.model)
    assert same_bits(twin(batch()), rig.model(batch()))
    assert states(twin) == states(rig)
    before = rig.model(batch()).detach()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    twin.bank.uproot(SeedId("2"))
    assert same_bits(rig.model(batch()), before)
    assert not torch.allclose(twin(batch()), before)
    for layer in twin.bank.all_layers():
        assert layer.site is twin.host.get_submodule(layer.path)
    twin.bank.detach()
    assert not any(m._forward_hooks for m in twin.host.modules())
    assert any(m._forward_hooks for m in rig.model.host.modules())


def test_births_keep_their_order(rig):
    for seed in ("4#0.0", "0#0.1", "2#0.0"):
        rig.grow(seed)
    assert [str(seed) for seed in rig.bank.grafted()] == ["4#0.0", "0#0.1", "2#0.0"]
    fresh = wrap(mlp())
    fresh.load_state_dict(rig.model.state_dict())
    assert list(fresh.bank.grafted()) == list(rig.bank.grafted())
    assert fresh.bank.births == rig.bank.births == 3


def test_free_slots(rig):
    assert rig.bank.free_slot("2") == SeedId("2")
    rig.grow("2#0.0")
    rig.grow("2#0.1", S.CULLED)
    assert rig.bank.free_slot("2") == SeedId("2", 0, 2)
    assert rig.bank.free_slot("2", taken=frozenset({SeedId("2", 0, 2)})) == SeedId("2", 0, 3)
    rig.do(C.RELEASE, "2#0.1")
    assert rig.bank.free_slot("2") == SeedId("2", 0, 1)


def test_names_that_lead_nowhere_say_why():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    bank = SeedBank(tied, KasminaConfig(), None)
    with pytest.raises(NoSuchSeed, match="tied"):
        bank.state(SeedId("0"))
    with pytest.raises(NoSuchSeed, match="sites are 0, 2, 4"):
        wrap(mlp()).bank.layer("7")
    with pytest.raises(EsperError):
        wrap(mlp()).bank.state(SeedId("2", 5))


def test_keys_name_the_site_and_the_seed(rig):
    assert (layer_name("blocks.0.attn"), graft_name(SeedId("x", 1, 2))) == ("/blocks/0/attn", "c1s2")
    rig.grow("2#0.0")
    assert "bank.layers./2.grafts.c0s0.alpha" in rig.model.state_dict()


def test_a_bank_inside_a_bigger_module():
    """A state dict finds its topology under any prefix."""

    def make(seed):
        rig = Rig(mlp(seed), batch())
        return rig, nn.ModuleDict({"net": rig.model, "other": nn.Linear(2, 2)})

    rig, outer = make(0)
    wake(rig.grow("2#0.0", S.FOSSILIZED, alpha=1.0))
    fresh, target = make(1)
    target.load_state_dict(outer.state_dict())
    assert same_bits(fresh.model(batch()), rig.model(batch()))


def test_a_grown_language_model_comes_back():
    tokens = torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(0))

    def make(seed):
        torch.manual_seed(seed)
        return Rig(ByteLM(d_model=8, layers=2, heads=2, context=16), tokens, targets=["*.after_attn", "*.ffn"])

    rig, fresh = make(0), make(1)
    wake(rig.grow("blocks.0.after_attn#0.0", S.FOSSILIZED, blueprint="BP-CONV-CAUSAL", alpha=1.0))
    wake(rig.grow("blocks.1.ffn#0.0", S.GRAFTING, blueprint="BP-WIDEN", alpha=0.5))
    fresh.model.load_state_dict(rig.model.state_dict())
    assert same_bits(fresh.model(tokens), rig.model(tokens))


def test_a_dormant_bank_is_small():
    torch.manual_seed(0)
    model = wrap(ByteLM())
    held = sum(b.numel() * b.element_size() for b in model.bank.buffers()) + sum(
        c.numel() * c.element_size() for c in model.bank.arrays.columns.values()
    )
    assert held < 0.05 * sum(p.numel() * p.element_size() for p in model.host.parameters())
