import pytest
import torch
from torch import nn

from esper.kasmina.sites import find_sites, fused_sites, site_kind, tied_sites
from esper.kasmina.wrapper import wrap
from esper.leyline.errors import SiteError
from esper.models import MLP, ByteLM, MoEByteLM


class Conv1D(nn.Module):
    """Named as the linear layer of the transformers library."""


class Linear(nn.Module):
    """Named as the linear layer of PyTorch Geometric, which is none of PyTorch's."""


class RMSNorm(nn.Module):
    pass


class SelfAttention(nn.Module):
    pass


@pytest.mark.parametrize(
    ("path", "module", "kind"),
    [
        ("x", nn.Linear(2, 2), "linear"),
        ("mlp", nn.Linear(2, 2), "linear"),
        ("x", Conv1D(), "linear"),
        ("x", Linear(), "linear"),
        ("x", nn.Conv1d(2, 2, 1), "block"),
        ("x", nn.Conv2d(2, 2, 1), "conv2d"),
        ("x", nn.Identity(), "stream"),
        ("x", nn.LayerNorm(2), "norm"),
        ("x", nn.BatchNorm2d(2), "norm"),
        ("x", RMSNorm(), "norm"),
        ("x", nn.MultiheadAttention(2, 1), "attention"),
        ("x", SelfAttention(), "attention"),
        ("h.0.attn", nn.Module(), "attention"),
        ("h.0.mlp", nn.Sequential(), "mlp"),
        ("x", MLP(widths=(2, 2)), "mlp"),
        ("h.0", nn.Module(), "block"),
        ("mlp.0.act", nn.GELU(), "block"),
    ],
)
def test_families(path, module, kind):
    assert site_kind(path, module) == kind


def lm():
    return ByteLM(d_model=8, layers=2, heads=2, context=8)


def test_the_default_takes_attention_mlp_linear_convolution_and_norm():
    found = set(find_sites(lm()))
    wanted = {p for p, m in lm().named_modules() if isinstance(m, nn.Linear | nn.LayerNorm)}
    wanted |= {f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn", "ffn")}
    assert found == wanted
    vision = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    assert list(find_sites(vision)) == ["0", "1", "4"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("blocks.0.ffn", ["blocks.0.ffn"]),
        ("*.ffn", ["blocks.0.ffn", "blocks.1.ffn"]),
        (["blocks.1.ffn", "blocks.0.ffn", "*.0.ffn"], ["blocks.0.ffn", "blocks.1.ffn"]),
        (nn.GELU, ["blocks.0.ffn.act", "blocks.1.ffn.act"]),
        ([nn.GELU, "blocks.0.attn"], ["blocks.0.attn", "blocks.0.ffn.act", "blocks.1.ffn.act"]),
        (lambda path, module: path.endswith(".attn"), ["blocks.0.attn", "blocks.1.attn"]),
        ("blocks.?.attn", ["blocks.0.attn", "blocks.1.attn"]),
    ],
)
def test_targets(targets, expected):
    assert list(find_sites(lm(), targets)) == expected


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ("blocks.0.fnn", r"'blocks\.0\.fnn' matches no module; module paths look like 'blocks\.0\.ffn'"),
        (["*.ffn", "block.*"], r"'block\.\*' matches no module"),
        (nn.Conv2d, r"Conv2d.* matches no module"),
        (lambda path, module: False, "the predicate matches no module"),
    ],
)
def test_a_target_that_matches_nothing_names_near_misses(targets, match):
    with pytest.raises(SiteError, match=match):
        wrap(lm(), targets=targets)


def test_a_model_without_modules():
    with pytest.raises(SiteError, match=r"\(none\)"):
        find_sites(nn.Linear(2, 2), "*")
    assert find_sites(nn.Linear(2, 2)) == {}


def test_ties():
    host = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3), "d": nn.Linear(3, 3)})
    host["b"].bias = host["a"].bias
    host["twice"] = host["c"]
    assert tied_sites(host, ["a", "b", "c", "d"]) == {
        "a": "its weights are tied to another module",
        "b": "its weights are tied to another module",
        "c": "the module is used under several names",
    }
    bank = wrap(host).bank
    assert bank.refused.keys() == {"a", "b", "c"}
    assert [layer.path for layer in bank.all_layers()] == ["d"]


def test_the_growth_report_names_what_was_refused():
    host = nn.ModuleDict({"a": nn.Linear(3, 3), "d": nn.Linear(3, 3)})
    host["twice"] = host["a"]
    assert "a: no seeds, the module is used under several names" in wrap(host).growth_report()


def test_nothing_is_refused_in_our_own_models():
    torch.manual_seed(0)
    for host in (lm(), MoEByteLM(d_model=8, layers=1, heads=2, context=8), MLP()):
        assert tied_sites(host, find_sites(host)) == {}


@pytest.mark.parametrize(("batch_first", "refused"), [(False, True), (True, False)])
def test_time_major_sites_are_refused_because_a_child_would_mix_samples(batch_first: bool, refused: bool) -> None:
    host = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.0)
    model = wrap(host, targets=["linear1"])
    model(torch.randn(3, 4, 8)).sum().backward()
    reason = model.bank.layer("linear1").finish_probe()
    assert ("time-major" in (reason or "")) == refused


def test_the_encoder_layers_that_hooks_slow_down(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    host = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "head": nn.Linear(8, 8)})
    assert fused_sites(host, ["head"]) == []
    assert fused_sites(host, ["encoder"]) == []
    assert fused_sites(host, ["head", "encoder.layers.1.linear1"]) == ["encoder.layers.1"]
    assert fused_sites(layer, ["linear1"]) == [""]
    wrap(host, targets=["head"])
    assert not caplog.records
    wrap(host.encoder, targets=["layers.0"])
    assert "fused evaluation of layers.0 off" in caplog.text
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert fused_sites(host, ["encoder.layers.1.linear1"]) == []
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
