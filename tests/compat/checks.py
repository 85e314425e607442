"""What is asked of every model wrapped by hand. Each check raises, or returns what the table says."""

import copy
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.kasmina.wrapper import MorphableModel
from esper.leyline.errors import ConfigError
from esper.testing import _same_bits, _tensors, check_wrapped_model
from tests.compat.case import Batch, Case, call, fresh
from tests.compat.growth import PER_TOKEN, evaluate, plant_everywhere, strengthen, train, wake, weights, wrapped

_NEW_TOKENS = 5


def dormant(case: Case) -> str:
    """Seeds that nobody uses change no bit: the shipped checker, the task's own loss, and evaluation without grad."""
    batch = case.batch(0)
    with fused_path(False):
        check_wrapped_model(case.build, batch.inputs, case.targets)
        bare, model = fresh(case), esper.wrap(fresh(case), targets=case.targets)
        for _ in ("while the sites are probed", "afterwards"):
            assert_same(evaluate(bare, batch.inputs), evaluate(model, batch.inputs))
            assert_same(_step(bare, case, batch), _step(model, case, batch))
            for layer in model.bank.all_layers():
                layer.finish_probe()
    if not case.fused:
        return "yes"
    for one, two in zip(*(_tensors(evaluate(m, batch.inputs)) for m in (bare, model)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    return "yes; within 1e-6 of PyTorch's fused evaluation, which hooks turn off"


@contextmanager
def fused_path(enabled: bool) -> Iterator[None]:
    """Allow or forbid PyTorch's fused evaluation of encoder layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _step(model: nn.Module, case: Case, batch: Batch) -> list[Tensor]:
    """Return loss and gradients of one training step."""
    torch.manual_seed(1)
    model.train().zero_grad()
    loss = case.loss(call(model, batch.inputs), batch)
    loss.backward()
    host = model.host if isinstance(model, MorphableModel) else model
    return [loss, *(p.grad for p in host.parameters() if p.grad is not None)]


def assert_same(one: object, two: object) -> None:
    """Every tensor inside both has the same bits."""
    ones, twos = list(_tensors(one)), list(_tensors(two))
    assert len(ones) == len(twos) > 0
    assert all(map(_same_bits, ones, twos))


def seeds(model: MorphableModel) -> int:
    """Return how many sites take seeds."""
    return sum(layer.refusal is None for layer in model.bank.all_layers())


def refused(model: MorphableModel) -> str:
    """Return how many sites were refused and why, with the first of each; the shapes of a single site are left out."""
    sites: dict[str, list[str]] = {}
    for path, why in model.bank.refused.items():
        sites.setdefault(re.sub(r"\([\d, ]+\)", "(..)", why), []).append(path)
    ordered = sorted(sites.items(), key=lambda item: (-len(item[1]), item[0]))
    return "; ".join(f"{len(paths)} (`{paths[0]}`): {why}" for why, paths in ordered) or "–"


def grows(case: Case, model: MorphableModel) -> str:
    """A child at every site learns: finite gradients that are not zero, weights that move."""
    planted = plant_everywhere(model)
    before = weights(model)
    train(model, case)
    for seed, graft in model.bank.grafted().items():
        assert graft.fault is None, f"{seed}: {graft.fault}"
        assert 0 < graft.grad_norm() < float("inf"), f"{seed} has gradient {graft.grad_norm()}"
        moved = [not torch.equal(old, new) for old, new in zip(before[seed], graft.child.parameters(), strict=True)]
        assert any(moved), f"the child at {seed} did not move"
    assert len(planted) == len(before) == len(list(model.bank.grafted()))
    kinds = {record.blueprint for record in model.bank.records.values()}
    return (
        f"{len(planted)} of {len(planted)}, {len(kinds)} {'kind' if len(kinds) == 1 else 'kinds'}" if planted else "–"
    )


def at_alpha_zero(case: Case, model: MorphableModel) -> None:
    """Children at alpha 0 change no bit of output, loss or gradient; at alpha 1 they do."""
    if not model.bank.grafted():
        return
    bare, batch = fresh(case), case.batch(5)
    bare.load_state_dict(model.host.state_dict())
    strengthen(model, 0.0)
    buffers = {name: buffer.clone() for name, buffer in bare.named_buffers()}
    with fused_path(False):
        assert_same(evaluate(bare, batch.inputs), evaluate(model, batch.inputs))
        assert_same(_step(bare, case, batch), _step(model, case, batch))
    for host in (bare, model.host):
        for name, buffer in host.named_buffers():
            buffer.copy_(buffers[name])
    strengthen(model, 1.0)
    wake(model)
    grown, plain = (list(_tensors(evaluate(m, batch.inputs))) for m in (model, bare))
    assert not all(map(torch.equal, grown, plain)), "the children do nothing"


def state_dict(case: Case, model: MorphableModel) -> str:
    """The host's keys stay after growth, and a fresh model takes the grown state back."""
    assert list(model.host.state_dict()) == list(fresh(case).state_dict())
    twin = esper.wrap(fresh(case), targets=case.targets)
    twin.load_state_dict(model.state_dict())
    _same_function(case, model, twin)
    return "same keys, reloads"


def copies(case: Case, model: MorphableModel) -> str:
    """Copies of a grown model compute the same, and their children are their own."""
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _same_function(case, model, twin)
        before = weights(model)
        train(twin, case, steps=1)
        after = weights(model)
        assert all(map(torch.equal, sum(before.values(), []), sum(after.values(), [])))
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    return "yes"


def _same_function(case: Case, one: nn.Module, two: nn.Module) -> None:
    inputs = case.batch(6).inputs
    assert_same(evaluate(one, inputs), evaluate(two, inputs))


def generates(case: Case, model: MorphableModel) -> str:
    """`generate` is that of the bare model while dormant; grown, it writes what the model computes without a cache."""
    if not case.generates:
        return "–"
    assert torch.equal(_write(fresh(case), case), _write(esper.wrap(fresh(case), targets=case.targets).host, case))
    plain = wrapped(case)
    plant_everywhere(plain, PER_TOKEN)
    wake(plain)
    assert plain.host.generation_config.use_cache
    assert torch.equal(_write(plain.host, case), _write(plain.host, case, use_cache=False))
    assert not torch.equal(_write(plain.host, case), _write(fresh(case), case)), "the children do nothing"
    assert not model.host.generation_config.use_cache
    assert torch.equal(_write(model.host, case), _write(model.host, case, use_cache=False))
    with pytest.raises(ConfigError, match="mixes tokens"):
        _write(model.host, case, use_cache=True)
    return "yes; without cache where children mix tokens"


def _write(host: nn.Module, case: Case, **given: bool) -> Tensor:
    tokens = case.batch(0).inputs["input_ids"]
    with torch.no_grad():
        new = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False}
        return host.eval().generate(tokens, attention_mask=torch.ones_like(tokens), **new, **given)
