from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper.kasmina.steps import drain_health
from esper.kasmina.telemetry import chunk_span
from esper.kasmina.wrapper import wrap
from esper.leyline.errors import SiteError
from esper.models import MoEByteLM
from tests.kasmina.conftest import (
    C,
    InstantStore,
    Output,
    Rig,
    S,
    batch,
    compare_with_bare,
    counts,
    gradients,
    mlp,
    same_bits,
    wake,
)


def refusal(host, x, *, targets="*", evaluate=True):
    """Attach to every module, run one step (and one evaluation), and return the reasons."""
    model = wrap(host, targets=targets)
    out = model.train()(x)
    while not isinstance(out, torch.Tensor):
        out = out[0]
    if out.requires_grad:
        out.float().square().sum().backward()
    if evaluate:
        with torch.no_grad():
            model.eval()(x)
    found = {layer.path: layer.finish_probe() for layer in model.bank.all_layers()}
    return {path: why for path, why in (found | model.bank.refused).items() if why}


# --- chunks ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 12), data=st.data())
def test_only_the_active_chunk_changes(width, data):
    chunks = data.draw(st.integers(1, width))
    active = data.draw(st.integers(0, chunks - 1))
    torch.manual_seed(width)
    rig = Rig(nn.Sequential(nn.Linear(4, width)), torch.randn(6, 4), config={"seeds_per_layer": chunks})
    before = rig.model(rig.x).detach()
    wake(rig.grow(f"0#{active}.0", S.GRAFTING, blueprint="BP-PROJ-LORA", alpha=0.6))
    after = rig.model(rig.x).detach()
    start, size = chunk_span(width, chunks, active)
    assert same_bits(after[:, :start], before[:, :start])
    assert same_bits(after[:, start + size :], before[:, start + size :])
    assert not torch.equal(after[:, start : start + size], before[:, start : start + size])


@pytest.mark.parametrize("chunks", [1, 4, 10])
def test_chunks_of_a_host_in_three_layouts(chunks):
    conv = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(inplace=True))
    cases = [
        (nn.Sequential(nn.Linear(3, 10)), torch.randn(4, 3), -1, "BP-NORM-RMS"),
        (nn.Sequential(nn.Linear(3, 10)), torch.randn(2, 5, 3), -1, "BP-PROJ-LORA"),
        (conv, torch.randn(2, 3, 6, 6), 1, "BP-NORM-RMS"),
    ]
    for host, x, dim, blueprint in cases:
        rig = Rig(host, x, config={"seeds_per_layer": chunks})
        before = rig.model(rig.x).detach().movedim(dim, -1)
        graft = wake(rig.grow(f"0#{chunks - 1}.0", S.GRAFTING, blueprint=blueprint, alpha=1.0))
        after = rig.forward_backward().movedim(dim, -1)
        start, size = chunk_span(10, chunks, chunks - 1)
        assert (start, size) == {1: (0, 10), 4: (6, 4), 10: (9, 1)}[chunks]
        assert same_bits(after[..., :start], before[..., :start])
        assert not torch.equal(after[..., start:], before[..., start:])
        assert graft.fault is None


def test_chunks_and_slots_add_up():
    """Every chunk with two children is what each chunk alone would be."""
    config = {"seeds_per_layer": 3}
    rig = Rig(nn.Sequential(nn.Linear(4, 8)), torch.randn(5, 4), config=config)
    y = rig.model(rig.x).detach()
    expected = y.clone()
    for chunk in range(3):
        start, size = chunk_span(8, 3, chunk)
        for slot, blueprint in enumerate(("BP-NORM-RMS", "BP-PROJ-LORA")):
            graft = wake(rig.grow(f"0#{chunk}.{slot}", S.GRAFTING, blueprint=blueprint, alpha=0.5))
            source = rig.x if graft.reads == "input" else y[:, start : start + size]
            expected[:, start : start + size] += 0.5 * graft.child(source).detach()
    assert torch.allclose(rig.model(rig.x), expected, atol=1e-6)


@pytest.mark.parametrize("module", [nn.Linear(4, 6), nn.Conv2d(4, 6, 1), nn.LayerNorm(6)])
def test_more_seeds_than_features_are_refused(module):
    host = nn.Sequential(module)
    with pytest.raises(SiteError, match=r"seeds_per_layer=7 is larger than the 6 features of '0'"):
        wrap(host, seeds_per_layer=7)(torch.zeros(2, 6))


# --- what the first batch tells ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "x", "facts"),
    [
        (nn.Linear(3, 5), torch.randn(2, 3), ("bd", 5, 3, 1, True)),
        (nn.Linear(3, 5), torch.randn(2, 7, 3), ("btd", 5, 3, 7, True)),
        (nn.Conv2d(3, 5, 3, stride=2), torch.randn(2, 3, 9, 9), ("bchw", 5, 3, 16, False)),
        (nn.Conv2d(3, 5, 1), torch.randn(2, 3, 4, 4), ("bchw", 5, 3, 16, True)),
        (nn.Embedding(9, 5), torch.randint(0, 9, (2, 7)), ("btd", 5, 0, 7, False)),
        (nn.LSTM(3, 5, batch_first=True), torch.randn(2, 7, 3), ("btd", 5, 3, 7, True)),
        (nn.Flatten(), torch.randn(2, 3, 4).requires_grad_(), ("bd", 12, 0, 1, False)),
    ],
)
def test_facts(host, x, facts):
    rig = Rig(nn.Sequential(host), x, targets=["0"])
    assert tuple(rig.bank.layer("0").facts) == facts


def test_facts_from_a_first_batch_in_inference_mode(rig):
    model = wrap(mlp())
    with torch.inference_mode():
        model.eval()(batch())
    assert model.bank.layer("2").facts == rig.bank.layer("2").facts


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_site_that_never_fires():
    host = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    assert refusal(host, torch.randn(2, 3, 8)) == {
        "self_attn.out_proj": "its forward never runs (its weights may be used directly)"
    }


def test_tied_weights_and_shared_modules():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head, self.free = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(4, 4)
            self.head.weight = self.embed.weight
            self.one = self.two = nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.two(self.one(self.free(self.embed(x)))))

    tied = "its weights are tied to another module"
    found = refusal(Tied(), torch.tensor([[1, 2]]))
    assert found == {"embed": tied, "head": tied, "one": "the module is used under several names"}


def test_an_output_without_gradient():
    class Router(nn.Linear):
        """Like Mixtral's: its first result is for looking at only."""

        def forward(self, x):
            logits = super().forward(x)
            return logits, logits.softmax(-1)

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.up = Router(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            _, gate = self.router(x)
            return self.up(x) * gate

    assert refusal(Routed(), torch.randn(3, 4)) == {"router": "no gradient flows through its output"}


def test_outputs_that_hold_no_float_tensor():
    class Pick(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def forward(self, x):
            whole = x.argmax(-1)
            return {"int": whole, "dict": {"x": whole}, "none": None, "empty": (), "int first": (whole, x)}[self.kind]

    for kind in ("int", "dict", "none", "empty", "int first"):

        class Host(nn.Module):
            def __init__(self, kind=kind):
                super().__init__()
                self.up, self.pick = nn.Linear(3, 4), Pick(kind)

            def forward(self, x):
                y = self.up(x)
                self.pick(y)
                return y

        assert refusal(Host(), torch.randn(2, 3)) == {"pick": "its output holds no float tensor"}, kind


def test_a_site_that_evaluation_bypasses():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.extra = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.extra(self.up(x)) if self.training else self.up(x)

    assert refusal(Lazy(), torch.randn(2, 3)) == {"extra": "it does not run in evaluation"}


def test_shapes_that_fit_no_layout():
    class Odd(nn.Module):
        def forward(self, x):
            return x[..., None, None, None]

    found = refusal(nn.Sequential(nn.Linear(3, 4), Odd()), torch.randn(2, 3))
    assert found.keys() == {"1"}
    assert "shape (2, 4, 1, 1, 1)" in found["1"]
    image = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert refusal(image, torch.randn(2, 3, 3, 4)).keys() == {"0", "1"}


@pytest.mark.parametrize("module", [nn.Conv1d(3, 4, 1), nn.BatchNorm1d(3), nn.InstanceNorm1d(3), nn.GroupNorm(1, 3)])
def test_features_in_the_middle_are_refused(module):
    found = refusal(nn.Sequential(nn.Conv1d(3, 3, 1), module), torch.randn(2, 3, 5))
    assert "features on axis 1" in found["1"]


def test_a_refused_site_says_why(rig):
    layer = rig.bank.layer("2")
    layer.refusal = "I say so"
    with pytest.raises(SiteError, match=r"2#0\.0 cannot germinate: I say so"):
        rig.do(C.GERMINATE, "2#0.0")
    assert rig.state("2#0.0") is S.DORMANT


def test_before_the_first_batch_nothing_germinates():
    rig = Rig(mlp(), batch())
    rig.bank.layer("2").facts = None
    with pytest.raises(SiteError, match="until a batch has passed"):
        rig.do(C.GERMINATE, "2#0.0")


def test_sites_of_a_mixture_of_experts_are_accepted():
    torch.manual_seed(0)
    host = MoEByteLM(d_model=8, layers=1, heads=2, context=8)
    assert refusal(host, torch.randint(0, 256, (2, 6)), targets=None) == {}


def test_a_module_that_is_used_again_on_other_features():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.up, self.down = nn.Tanh(), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.act(self.down(self.act(self.up(self.act(self.up(x)[:, :3])))))

    found = refusal(Reused(), torch.randn(5, 3))
    assert found == {
        "act": "it runs on several kinds of features: 3 in layout bd, then an output of shape (5, 4)",
    }


@pytest.mark.parametrize("module", [nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 4)])
def test_four_axes_without_a_convolution_are_refused(module):
    found = refusal(nn.Sequential(nn.Conv2d(3, 4, 1), module), torch.randn(2, 3, 4, 4))
    assert "from a convolution or a 2-d normalisation" in found["1"]


class LayerNorm2d(nn.LayerNorm):
    """As image models have it: features on axis 1."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("module", [LayerNorm2d(4), nn.ConvTranspose2d(4, 6, 2, stride=2)])
def test_other_modules_of_images_are_accepted(module):
    host = nn.Sequential(nn.Conv2d(3, 4, 1), module)
    assert refusal(host, torch.randn(2, 3, 4, 4)) == {}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
class TestNestedTensors:
    """PyTorch's encoder makes nested tensors of padded batches, in evaluation without gradients."""

    class Padded(nn.Module):
        def __init__(self, nested=True):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)

        def forward(self, x):
            return self.encoder(x, src_key_padding_mask=torch.arange(4) >= torch.tensor([[4], [2]]))

    def test_are_refused_with_advice(self):
        found = refusal(self.Padded(), torch.randn(2, 4, 8), targets=["*.linear1", "*.linear2"])
        assert found.keys() == {"encoder.layers.0.linear1", "encoder.layers.0.linear2"}
        assert all("enable_nested_tensor=False" in why for why in found.values())

    def test_are_not_made_after_that_advice(self):
        assert refusal(self.Padded(nested=False), torch.randn(2, 4, 8), targets=["*.linear?"]) == {}

    def test_that_come_later_bypass_the_child_with_the_reason(self):
        rig = Rig(self.Padded(nested=False), torch.randn(2, 4, 8), targets=["*.linear1"])
        graft = wake(rig.grow("encoder.layers.0.linear1#0.0", S.GRAFTING, alpha=1.0))
        rig.model.host.encoder.use_nested_tensor = True
        with torch.no_grad():
            rig.model.eval()(rig.x)
        assert "enable_nested_tensor=False" in graft.fault
        assert not rig.bank.layer("encoder.layers.0.linear1").live


# --- gradient checkpointing --------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Two blocks, run again in the backward pass or not."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant, self.first = reentrant, nn.Linear(3, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            again = self.training and self.reentrant is not None
            x = x + (checkpoint(block, x, use_reentrant=self.reentrant) if again else block(x))
        return x


def blocks(reentrant, **given):
    return Rig(Blocks(reentrant), batch(), targets=["blocks.*.0"], **given)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("state", "alpha"), [(S.GRAFTING, 0.5), (S.TRAINING, None)])
@pytest.mark.parametrize("preset", ["measured", "strict"])
def test_checkpointing_changes_no_gradient(reentrant, state, alpha, preset):
    rigs = [blocks(mode, config={"preset": preset}) for mode in (None, reentrant)]
    for rig in rigs:
        wake(rig.grow("blocks.0.0#0.0", state, alpha=alpha))
        rig.forward_backward()
    one, two = (gradients(rig.model) for rig in rigs)
    assert one.keys() == two.keys()
    assert all(same_bits(one[name], two[name]) for name in one)
    pending = [next(iter(rig.bank.grafted().values())).pending for rig in rigs]
    assert (pending[0] is None) == (pending[1] is None) == (preset == "measured" or state is S.GRAFTING)
    if pending[1] is not None:
        pending[1].backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_health_once(reentrant):
    rigs = [blocks(mode) for mode in (None, reentrant)]
    for rig in rigs:
        rig.stepper.begin(0)
        rig.forward_backward()
        assert counts(rig.bank.layer("blocks.1.0")) == (1, 1, 0)
    one, two = (drain_health([rig.bank.layer("blocks.1.0")])[0] for rig in rigs)
    assert torch.isfinite(one[:, :-1]).all()
    assert torch.allclose(one, two, equal_nan=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_child_that_fails_under_checkpointing_is_bypassed(reentrant):
    """The second run saves less than the first, which checkpointing would refuse."""

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return torch.tanh(self.inner(x)) * float("nan")

    rig = blocks(reentrant, store=InstantStore(swap={"BP-MLP-GELU": lambda seed: Failing()}))
    graft = rig.grow("blocks.0.0#0.0", S.GRAFTING, alpha=1.0)
    rig.forward_backward()
    assert "non-finite" in graft.fault
    compare_with_bare(rig, Blocks(None), rig.x)


# --- outputs of several parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_child_at_an_output_by_name(kind):
    class Named(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return kind(count=3, value=y, extra=y.detach())

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.named = Named(3, 4)

        def forward(self, x):
            return self.named(x)["value"]

    rig = Rig(Host(), torch.randn(2, 3), targets=["named"])
    before = rig.model(rig.x)
    wake(rig.grow("named#0.0", S.GRAFTING, alpha=1.0))
    after = rig.model.host.named(rig.x)
    assert type(after) is kind
    assert same_bits(after["extra"], before)
    assert not torch.equal(after["value"], before)


def test_only_the_first_part_of_an_output_changes():
    class Two(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return Output(y, y.detach())

    rig = Rig(nn.Sequential(Two(3, 4)), torch.randn(2, 3), targets=["0"])
    before = rig.model(rig.x)
    wake(rig.grow("0#0.0", S.GRAFTING, alpha=1.0))
    after = rig.model(rig.x)
    assert type(after) is Output
    assert same_bits(after.extra, before.extra)
    assert not torch.equal(after.value, before.value)


# --- health ------------------------------------------------------------------------------------------------------


def test_health_is_sampled_in_training_only(rig):
    layer = rig.bank.layer("2")
    rig.stepper.begin(0)
    rig.model.eval()(batch())
    assert not layer.samples.any()
    rig.model.train()
    rig.forward_backward()
    assert counts(layer) == (1, 1, 0)


def test_a_seed_that_nobody_uses_copies_nothing(rig):
    y = torch.randn(2, 8)
    assert rig.bank.layer("2").hook(nn.ReLU(), (y,), {}, y) is None
