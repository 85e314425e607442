"""The byte models: sizes, causality, growth places, and the errors of wrong sizes."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from esper.leyline.errors import ConfigError, DataError
from esper.models import ByteLM, MoEByteLM, parameter_count
from esper.models.transformer import ByteTransformer

SMALL = {"d_model": 16, "layers": 2, "heads": 2, "context": 12, "vocab": 20}
both = pytest.mark.parametrize("make", [ByteLM, MoEByteLM])


def tokens(length: int = 12) -> torch.Tensor:
    """Three fixed sequences."""
    return torch.randint(20, (3, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: ByteLM(), 98_416),
        (lambda: ByteLM(ffn=58), 114_670),
        (lambda: ByteLM(d_model=128, ffn=384), 578_560),
        (lambda: MoEByteLM(), 92_040),
        (lambda: MoEByteLM(expert_width=24), 100_232),
    ],
)
def test_parameter_counts_of_the_tasks(model: Callable[[], nn.Module], expected: int) -> None:
    assert parameter_count(model()) == expected


@both
def test_shapes_for_every_length(make: type[ByteTransformer]) -> None:
    model = make(**SMALL)
    assert all(model(tokens(length)).shape == (3, length, 20) for length in (1, 5, 12))


@both
def test_no_position_sees_the_future(make: type[ByteTransformer]) -> None:
    torch.manual_seed(0)
    model = make(**SMALL)
    before = tokens()
    after = before.clone()
    after[:, 6] = (after[:, 6] + 1) % 20
    a, b = model(before), model(after)
    assert torch.allclose(a[:, :6], b[:, :6], atol=1e-6)
    assert all(not torch.allclose(a[:, t], b[:, t], atol=1e-6) for t in range(6, 12))


@both
def test_initial_scales(make: type[ByteTransformer]) -> None:
    model = make()
    assert float(model.positions.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.04, rel=0.1)


@both
def test_growth_places_are_on_the_residual_stream(make: type[ByteTransformer]) -> None:
    model = make(**SMALL)
    fired: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("attn", "ffn")) and "norm" not in name:
            module.register_forward_hook(lambda _m, _i, out, name=name: fired.append(f"{name} {tuple(out.shape)}"))
    model(tokens())
    places = [f"blocks.{n}.{place}" for n in range(2) for place in ("attn", "after_attn", "ffn", "after_ffn")]
    assert fired == [f"{place} (3, 12, 16)" for place in places]


@both
def test_adding_to_the_stream_changes_what_follows(make: type[ByteTransformer]) -> None:
    model = make(**SMALL)
    before = model(tokens())
    model.get_submodule("blocks.0.after_attn").register_forward_hook(lambda _m, _i, out: out + 1.0 * out.tanh())
    assert not torch.allclose(before, model(tokens()))


@both
def test_every_parameter_gets_a_gradient(make: type[ByteTransformer]) -> None:
    torch.manual_seed(0)
    model = make(**SMALL)
    model(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@both
def test_survives_copy_and_pickle_after_a_forward(make: type[ByteTransformer]) -> None:
    model = make(**SMALL)
    expected = model(tokens())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens()), expected)


@both
def test_input_longer_than_the_context(make: type[ByteTransformer]) -> None:
    with pytest.raises(DataError, match="13 positions.*context is 12"):
        make(**SMALL)(tokens(13))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"heads": 3}, "heads=3 must divide d_model=16"),
        ({"heads": 0}, "heads=0"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"vocab": 0}, "vocab"),
    ],
)
@both
def test_wrong_sizes(make: type[ByteTransformer], setting: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**{**SMALL, **setting})
