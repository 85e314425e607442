from dataclasses import dataclass

import pytest
import torch
from torch import nn

import esper
from esper.kasmina.config import KasminaConfig
from esper.kasmina.wrapper import unwrap, wrap
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError, ConfigError, ContractError, NoSuchSeed, SiteError
from esper.models import MLP, ByteLM, MoEByteLM
from esper.testing import check_wrapped_model
from tests.kasmina.conftest import C, Output, Rig, S, batch, mlp, same_bits, wake


class Recurrent(nn.Module):
    """An LSTM, whose site's output is a tuple, and a head."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        out, (hidden, _) = self.rnn(x)
        return self.head(out), hidden


class Vision(nn.Module):
    """A convolutional network with batch normalisation and in-place activations."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor


class Inner(nn.Module):
    """Returns whatever kind of container it is told to."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.up = kind, nn.Linear(3, 4)

    def forward(self, x):
        h = self.up(x)
        return {
            "dict": lambda: {"logits": h, "hidden": h.relu()},
            "dataclass": lambda: Answer(h, h.relu()),
            "list": lambda: [h, h.relu()],
            "namedtuple": lambda: Output(h, h.relu()),
            "nothing": lambda: None,
        }[self.kind]()


class Containers(nn.Module):
    """Reads the container that an inner module returns."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.head = Inner(kind), nn.Linear(4, 2)

    def forward(self, x):
        found = self.inner(x)
        if found is None:
            found = self.inner.up(x)
        elif isinstance(found, dict):
            found = found["logits"] + found["hidden"]
        elif isinstance(found, Answer):
            found = found.logits + found.hidden
        else:
            found = found[0] + found[1]
        return self.head(found)


class Named(nn.Module):
    """Its sites are called like methods of the container that holds their layers."""

    def __init__(self):
        super().__init__()
        self.pop, self.keys, self.update = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        return self.pop(self.keys(self.update(x)))


def _tokens():
    return torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


def _bytes(model):
    return lambda: model(d_model=8, layers=2, heads=2, context=16)


def _encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
HOSTS = {
    "bytelm": (_bytes(ByteLM), _tokens(), None),
    "bytelm residual stream": (_bytes(ByteLM), _tokens(), ["*.after_attn", "*.after_ffn", "embed*"]),
    "moe": (_bytes(MoEByteLM), _tokens(), None),
    "moe, nested sites": (_bytes(MoEByteLM), _tokens(), lambda path, _: path.startswith("blocks.")),
    "mlp": (lambda: MLP(widths=(3, 8, 4)), X, None),
    "every module of an mlp": (lambda: MLP(widths=(3, 8, 4), activation="gelu"), X, ["*"]),
    "cnn": (Vision, torch.randn(2, 3, 6, 6), None),
    "cnn, nested sites": (Vision, torch.randn(2, 3, 6, 6), ["body", "body.*"]),
    "transformer encoder": (_encoder, torch.randn(2, 5, 8), None),
    "lstm": (Recurrent, torch.randn(2, 5, 3), ["rnn", "head"]),
    **{f"{kind} output": (lambda k=kind: Containers(k), X, ["*"]) for kind in ("dict", "dataclass", "list")},
    "namedtuple output": (lambda: Containers("namedtuple"), X, ["*"]),
    "no output": (lambda: Containers("nothing"), X, ["*"]),
    "names that a ModuleDict has": (lambda: Named(), X, None),
}


@pytest.mark.parametrize("name", HOSTS)
def test_dormant_seeds_change_nothing(name):
    factory, example, targets = HOSTS[name]
    check_wrapped_model(factory, example, targets)


def test_keyword_arguments_pass_through():
    check_wrapped_model(lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0), {"src": torch.randn(3, 2, 8)})


def test_checker_notices_a_wrapper_that_changes_something():
    class Restless(nn.Linear):
        """Gives another result once it is wrapped twice over."""

        calls = 0

        def forward(self, x):
            Restless.calls += 1
            return super().forward(x) + (1e-6 if Restless.calls > 3 else 0.0)

    with pytest.raises(AssertionError, match="differs from the bare"):
        check_wrapped_model(lambda: nn.Sequential(Restless(3, 2)), X)


def test_host_keys_stay_when_something_grows(rig):
    before = list(rig.model.host.state_dict())
    rig.grow("2#0.0", S.FOSSILIZED)
    assert list(rig.model.host.state_dict()) == before
    new = [key for key in rig.model.state_dict() if not key.startswith("host.")]
    assert new
    assert all(key.startswith("bank.") for key in new)


def test_unwrap_gives_back_the_trained_host(rig):
    host = rig.model.host
    wake(rig.grow("0#0.0", S.GRAFTING, alpha=1.0))
    grown = rig.model(rig.x)
    weights = [p.detach().clone() for p in host.parameters()]
    assert unwrap(rig.model) is host
    assert not any(module._forward_hooks for module in host.modules())
    assert all(map(torch.equal, weights, host.parameters()))
    assert not torch.allclose(host(rig.x), grown)
    unwrap(rig.model)


def test_the_views_follow_the_seeds(rig):
    assert [(v.seed_id, v.state) for v in rig.model.seeds] == [(f"{i}#0.0", S.DORMANT) for i in (0, 2, 4)]
    rig.grow("2#0.0", S.GRAFTING, alpha=0.5, group="trial")
    view = next(v for v in rig.model.seeds if v.seed_id == "2#0.0")
    assert (view.state, view.blueprint, view.alpha, view.group) == (S.GRAFTING, "BP-MLP-GELU", 0.5, "trial")
    assert view.params == rig.bank.added_parameters() == sum(p.numel() for p in rig.bank.parameters())
    rig.do(C.GERMINATE, "2#0.1")
    assert [v.seed_id for v in rig.model.seeds][-1] == "2#0.1"
    report = rig.model.growth_report()
    assert "GRAFTING  BP-MLP-GELU  alpha 0.50" in report
    assert f"{view.params:,} grown" in report


def test_requests_by_hand(rig):
    rig.model.request_germination("2#0.0", "BP-MLP-GELU")
    assert rig.model.requests[0].strategy == "fixed_ramp"
    with pytest.raises(SiteError, match="already asked for"):
        rig.model.request_germination("2#0.0", "BP-MLP-GELU")
    rig.model.cancel_germination("2#0.0")
    assert rig.model.requests == []
    rig.grow("2#0.0", S.TRAINING)
    rig.model.cancel_germination("2#0.0")
    assert [str(seed) for seed in rig.model.cancellations] == ["2#0.0"]
    rig.do(C.GRAFT, "2#0.0")
    with pytest.raises(SiteError, match="GRAFTING"):
        rig.model.cancel_germination("2#0.0")


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (NoSuchSeed, "carries no seeds", ("nowhere#0.0", "BP-MLP-GELU")),
        (NoSuchSeed, "names chunk 3", ("2#3.0", "BP-MLP-GELU")),
        (ContractError, "not a seed id", ("2", "BP-MLP-GELU")),
        (BlueprintError, "did you mean BP-MLP-GELU", ("2#0.0", "BP-MLP-GEL")),
        (BlueprintDoesNotFit, "BP-ATTN-STD does not fit", ("2#0.0", "BP-ATTN-STD")),
        (ConfigError, "unknown grafting strategy 'slow'", ("2#0.0", "BP-MLP-GELU", "slow")),
    ],
)
def test_bad_requests_are_refused(rig, error, match, given):
    with pytest.raises(error, match=match):
        rig.model.request_germination(*given)
    assert rig.model.requests == []


@pytest.mark.parametrize("config", [{"kasmina": 3}, {"ramp_step": 3}, {"ramp_steps": 0}, 7])
def test_bad_settings_are_refused(config):
    with pytest.raises(ConfigError):
        wrap(mlp(), config)


def test_settings_come_from_any_form():
    assert wrap(mlp(), esper.EsperConfig(kasmina={"ramp_steps": 7})).bank.config.ramp_steps == 7
    assert wrap(mlp(), KasminaConfig(ramp_steps=7)).bank.config.ramp_steps == 7
    chunked = wrap(mlp(), {"preset": "strict"}, seeds_per_layer=2).bank.config
    assert (chunked.preset, chunked.seeds_per_layer, chunked.freeze_fossils) == ("strict", 2, True)


def test_wrong_things_are_not_wrapped(rig):
    with pytest.raises(SiteError, match="already wrapped"):
        wrap(rig.model)
    with pytest.raises(SiteError, match="already carries seeds"):
        wrap(rig.model.host)
    with pytest.raises(SiteError, match="not str"):
        wrap("model")
    with pytest.raises(SiteError, match="not Sequential"):
        unwrap(mlp())


def test_every_host_still_runs_with_a_grown_site():
    """A child in the middle of each kind of host: the output moves, and gradients reach child and host."""
    for factory, x, site, blueprint in (
        (Vision, torch.randn(2, 3, 6, 6), "body.0", "BP-CONV-RES"),
        (Vision, torch.randn(2, 3, 6, 6), "body.1", "BP-NORM-RMS"),
        (Recurrent, torch.randn(2, 5, 3), "rnn", "BP-MLP-SWIGLU"),
        (lambda: Containers("namedtuple"), X, "inner", "BP-MLP-GELU"),
        (lambda: Containers("list"), X, "inner", "BP-MLP-GELU"),
        (_encoder, torch.randn(2, 5, 8), "self_attn", "BP-ATTN-STD"),
    ):
        torch.manual_seed(0)
        rig = Rig(factory(), x, targets=[site])
        assert rig.bank.layer(site).refusal is None
        rig.model.eval()
        bare = rig.forward_backward()
        rig.model.zero_grad()
        graft = wake(rig.grow(f"{site}#0.0", S.GRAFTING, blueprint=blueprint, alpha=1.0))
        assert not torch.allclose(rig.forward_backward(), bare)
        assert graft.fault is None
        assert graft.grad_norm() > 0
        assert all(p.grad is not None for p in rig.model.host.parameters())


def test_wrapping_again_after_unwrapping():
    host = mlp()
    expected = host(batch())
    unwrap(wrap(host))
    again = wrap(host, targets=["2"])
    assert same_bits(again(batch()), expected)
    assert len(again.bank.handles) == 1
