"""Each row measures something real: with tiny counts, finite numbers, a target and a limit beside it."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from esper.bench.speed import attach, decision, dormant, graft, kernels
from esper.bench.speed.hosts import Subject, image_model, language_model, seeded
from esper.bench.speed.line import Line

DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
TINY: Callable[[], Subject] = partial(language_model, d_model=16, layers=1, samples=2, length=8)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def check(lines: list[Line], *targets: float | None) -> None:
    assert [line.target for line in lines] == list(targets)
    for line in lines:
        assert line.value is not None and math.isfinite(line.value) and line.unit is not None
        assert line.limit is not None and math.isfinite(line.limit) and line.of


def test_dormant_seeds_are_timed_on_and_off() -> None:
    for subject in (TINY(), image_model(widths=(3, 4, 4, 2), samples=2)):
        line = dormant.overhead_line(subject, 2, repeats=1)
        check([line], 1.0)
        assert line.numbers["sites"] >= 3 and line.numbers["bare_ms"] > 0
        # A tiny step shows that they cost something at all.
        assert line.numbers["ratios"]["sampled"]["value"] > 1.0


def test_seeds_come_off_and_go_back() -> None:
    subject = TINY()
    model = seeded(subject)
    seeds = dormant.Seeds(subject, model)
    layer = next(model.bank.all_layers())
    for on in (False, True):
        seeds.put(on)
        model.bank.arrays.verify()
        assert bool(layer.site._forward_hooks) is on


def test_memory_counts_what_hangs_on_the_seeds() -> None:
    line = dormant.memory_line(TINY())
    check([line], 5.0)
    buffers = line.numbers["tensor_bytes"]
    assert line.value is not None and line.value > 0 and buffers > 0 and line.numbers["python_bytes"] > buffers


def test_a_kernel_is_looked_up_loaded_and_verified() -> None:
    check([kernels.hit_line(100)], 10.0)
    load, way = kernels.eager_lines(5)
    check([load, way], 1.0, 10.0)
    assert load.value is not None and way.value is not None and way.value > way.numbers["verify_median_ms"] > 0
    assert load.numbers["bytes"] > 1000


@DYNAMO
def test_a_graft_is_timed_and_the_compiled_host_is_not_made_anew() -> None:
    lines = graft.lines(TINY, 2)
    check(lines, 1.2, 1.2, 0.0)
    assert lines[2].value == 0 and lines[2].numbers["graphs"] > 0
    assert all(len(line.numbers["first"]) == 2 and min(line.numbers["first"]) > 0 for line in lines[:2])


@DYNAMO
def test_a_host_that_is_made_anew_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = graft._apply

    def and_forget(*args: object) -> None:
        torch.compiler.reset()
        apply(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(graft, "_apply", and_forget)
    assert (graft.lines(TINY, 1)[2].value or 0) > 0


def test_a_turn_with_many_seeds_begins_a_trial() -> None:
    quiet, start = decision.decision_lines(1, seeds=40)
    check([quiet, start], 100.0, 100.0)
    assert start.numbers["commands"] > 0 and "commands" not in quiet.numbers


def test_the_state_of_every_seed_is_timed() -> None:
    lines = decision.telemetry_lines((TINY, partial(decision.many_seeds, 200)), 2)
    check(lines, 10.0, 10.0)
    assert "200 seeds" in lines[1].what and all(line.numbers["columns"] > 5 for line in lines)


def test_attaching_is_compared_with_a_bare_walk_where_there_is_no_peft() -> None:
    given, default = attach.lines(lambda: attach.large(2, 64), 1, peft=False)
    check([given, default], None, None)
    assert given.numbers["sites"] == 8 and default.numbers["sites"] > 8 and "bare walk with 8 hooks" in given.of


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_attaching_is_compared_with_peft_at_the_same_sites() -> None:
    pytest.importorskip("peft")
    given, _ = attach.lines(lambda: attach.large(2, 64), 1, peft=True)
    assert given.limit is not None and given.target == 2 * given.limit and given.numbers["sites"] == 8
    assert "LoRA at 8 sites" in given.of


def test_a_bare_walk_finds_the_projections() -> None:
    model: nn.Module = attach.large(1, 64)
    assert attach.walked(model) == 4 and sum(len(m._forward_hooks) for m in model.modules()) == 4
