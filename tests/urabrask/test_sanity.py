"""Each check finds the fault that it is for, and finds none in a child that has none."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esper.blueprints import load_library
from esper.blueprints.build import Child
from esper.karn.service import reference, stated
from esper.leyline.artifacts import KernelManifest
from esper.leyline.events import Rejection
from esper.urabrask import endurance
from esper.urabrask.findings import Recipe
from esper.urabrask.inputs import Subject, load, make, step
from esper.urabrask.sanity import CHECKS, sanity
from esper.urabrask.trail import Trail
from esper.urabrask.trial import Trial
from tests.urabrask.kernels import spec

AWKWARD = [
    *("BP-ATTN-SPLIT-QK", "BP-CAP-FUSE-HFFN", "BP-CONV-NEXT", "BP-MOE-SOFT", "BP-RNN-MINGRU", "BP-SSM-DIAG"),
    *("BP-LOAD-BAL-EMA", "BP-ROUTER-MOE-AUXLOSS", "BP-ROUTER-TOP2"),
    "BP-KV-CACHE-8BIT",
]
"""They compute in single precision, choose between experts, keep a state, or round."""

Act = Callable[["Doctored", Tensor], Tensor]


class Doctored(Child):
    """An eager child with something wrong."""

    act: Act
    calls: int

    @classmethod
    def around(cls, child: Child, act: Act) -> "Doctored":
        made = cls.__new__(cls)
        made.__dict__.update(child.__dict__)
        made.act, made.calls = act, 0
        return made

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return type(self).right(self, x) if torch.jit.is_tracing() else self.act(self, x)

    def right(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is off."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 1.001


class Into(torch.autograd.Function):
    """The identity, into memory that is used again and again."""

    @staticmethod
    def forward(ctx: object, x: Tensor, memory: Tensor) -> Tensor:
        return memory.copy_(x.detach())

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def subject(name: str = "BP-MLP-GELU", **fields: object) -> Subject:
    of = spec(name, d=8, tokens=4, **fields)
    manifest = KernelManifest(kernel_id="k", name=name, blueprint_id="b", spec=of, pipeline="fast")
    return load(Path(), manifest)


@contextmanager
def trial(of: Subject, folder: Path) -> Iterator[Trial]:
    trail = Trail(folder)
    try:
        yield Trial(of, trail)
    finally:
        trail.close()


def doctored(act: Act) -> Subject:
    whole = subject()
    return whole._replace(child=Doctored.around(deepcopy(whole.eager), act))


def wrong_gradient(child: Doctored, x: Tensor) -> Tensor:
    return Scaled.apply(child.right(x))


def wrong_odd_batch(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x) * (1.001 if len(x) == 5 else 1.0)


def wrong_shape(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x).flatten(1)


def wrong_precision(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x).double()


def wrong_eval(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x) * (1.0 if child.training else 0.9)


def no_input_gradient(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x.detach()) + 0.0 * x.sum()


def wrong_in_threads(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x) * (1.001 if torch.get_num_threads() == 3 else 1.0)


def ignores_frozen(child: Doctored, x: Tensor) -> Tensor:
    frozen = any(not p.requires_grad for p in child.parameters())
    return child.right(x) * (1.01 if frozen else 1.0)


def mixes_samples(child: Doctored, x: Tensor) -> Tensor:
    result = child.right(x)
    return result + 0.0 * result.detach().sum()


def hides_nan(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x).nan_to_num(0.0)


def large_only(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x) if x.abs().max() < 1e3 else child.right(x.clamp(-1e3, 1e3))


def no_zeros(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x) + (0.0 if x.any() else 1.0)


def writes_input(child: Doctored, x: Tensor) -> Tensor:
    with torch.no_grad():
        x.view(-1)[0] += 1e-6
    return child.right(x)


def writes_beside(child: Doctored, x: Tensor) -> Tensor:
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    with torch.no_grad():
        if x.storage_offset():
            storage[x.storage_offset() + x.numel()] = 0.0
    return child.right(x)


def writes_parameter(child: Doctored, x: Tensor) -> Tensor:
    with torch.no_grad():
        next(child.parameters()).view(-1)[0] += 1e-6
    return child.right(x)


def garbage_in_half(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x.float()) * 3 if x.dtype is torch.bfloat16 else child.right(x)


def takes_any_width(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x[..., :8])


def ignores_strides(child: Doctored, x: Tensor) -> Tensor:
    if x.is_contiguous():
        return child.right(x)
    return child.right(x.as_strided(x.shape, torch.empty(x.shape).stride()))


def ignores_autocast(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x) * (2.0 if torch.is_autocast_enabled("cpu") else 1.0)


def old_parameters(child: Doctored, x: Tensor) -> Tensor:
    if not hasattr(child, "kept"):
        child.kept = {name: p for name, p in child.named_parameters()}
    plain = Child.__new__(Child)
    plain.__dict__.update({k: v for k, v in child.__dict__.items() if k not in ("act", "calls", "kept")})
    return torch.func.functional_call(plain, child.kept, (x,))


def one_buffer(child: Doctored, x: Tensor) -> Tensor:
    result = child.right(x)
    if not hasattr(child, "memory") or child.memory.shape != result.shape:
        child.memory = torch.empty_like(result)
    return Into.apply(result, child.memory)


def random(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x) + 1e-7 * next(_NOISE)


_NOISE = itertools.count()


def late_nan(child: Doctored, x: Tensor) -> Tensor:
    return child.right(x) * (float("nan") if child.calls == 1000 else 1.0)


def raises(child: Doctored, x: Tensor) -> Tensor:
    raise RuntimeError("out of luck")


FAULTS = [
    (wrong_gradient, "gradients", Rejection.GRADIENT_MISMATCH, "differs"),
    (wrong_gradient, "gradients from above", Rejection.GRADIENT_MISMATCH, "strides"),
    (wrong_gradient, "finite differences", Rejection.GRADIENT_MISMATCH, "quotient"),
    (wrong_gradient, "second gradients", Rejection.GRADIENT_MISMATCH, "second gradient"),
    (no_input_gradient, "gradients", Rejection.GRADIENT_MISMATCH, "gradient of input"),
    (no_input_gradient, "finite differences", Rejection.GRADIENT_MISMATCH, "quotient"),
    (wrong_odd_batch, "batches", Rejection.SANITY_FAILED, "result differs"),
    (wrong_shape, "batches", Rejection.SANITY_FAILED, ""),
    (wrong_precision, "batches", Rejection.SANITY_FAILED, "float64"),
    (wrong_eval, "train and eval", Rejection.SANITY_FAILED, "result"),
    (wrong_in_threads, "threads", Rejection.SANITY_FAILED, "3 threads"),
    (ignores_frozen, "frozen parameters", Rejection.SANITY_FAILED, "result"),
    (mixes_samples, "bad samples", Rejection.SANITY_FAILED, "spoils others"),
    (hides_nan, "bad samples", Rejection.SANITY_FAILED, "finite result"),
    (no_zeros, "gradients", Rejection.SANITY_FAILED, "result"),
    (writes_input, "batches", Rejection.SANITY_FAILED, "writes to its input"),
    (writes_beside, "batches", Rejection.SANITY_FAILED, "around it"),
    (writes_parameter, "batches", Rejection.SANITY_FAILED, "writes to its parameters"),
    (garbage_in_half, "guards", Rejection.SANITY_FAILED, "bfloat16"),
    (takes_any_width, "guards", Rejection.SANITY_FAILED, "another width"),
    (ignores_strides, "guards", Rejection.SANITY_FAILED, "result"),
    (ignores_autocast, "guards", Rejection.SANITY_FAILED, "autocast"),
    (old_parameters, "moved parameters", Rejection.SANITY_FAILED, "result"),
    (one_buffer, "unrelated results", Rejection.SANITY_FAILED, "called again"),
    (random, "determinism", Rejection.SANITY_FAILED, "other bits"),
    (late_nan, "determinism", Rejection.SANITY_FAILED, "not finite"),
    (raises, "batches", Rejection.SANITY_FAILED, "out of luck"),
]


@pytest.mark.parametrize(("act", "check", "rejection", "words"), FAULTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_fault_is_found(act: Act, check: str, rejection: Rejection, words: str, tmp_path: Path) -> None:
    with trial(doctored(act), tmp_path) as given:
        try:
            complaint = CHECKS[check](given)
        except RuntimeError as error:
            assert words in str(error)
            return
        assert complaint is not None
        assert words in complaint.detail and complaint.rejection is rejection
        assert given.trail.recipe is not None


def test_memory_that_is_kept_is_found(tmp_path: Path) -> None:
    hoard: list[Tensor] = []

    def keeps(child: Doctored, x: Tensor) -> Tensor:
        hoard.append(torch.ones(2**14))
        return child.right(x)

    freed = [torch.ones(2**14) for _ in range(2000)]
    _lid = torch.ones(1)  # above what is freed now, which therefore stays in the process, with room for the leak
    del freed

    with trial(doctored(keeps), tmp_path) as given:
        complaint = CHECKS["memory"](given)
    assert complaint is not None and "MiB" in complaint.detail


@pytest.mark.parametrize("name", ["BP-MLP-GELU", "BP-ATTN-STD", "BP-CONV-RES", "BP-NORM-RMS"])
def test_a_good_child_passes(name: str, tmp_path: Path, short: None) -> None:
    trail = Trail(tmp_path)
    found = sanity(subject(name), trail)
    trail.close()
    assert not found.failures
    assert found.checks == (*CHECKS, "blueprint")
    assert 0.0 <= found.margin < 1.0


@pytest.mark.parametrize("name", AWKWARD)
def test_difference_quotients_find_no_fault_where_there_is_none(name: str, tmp_path: Path) -> None:
    whole = reference(stated(load_library()[name].ir).ir)
    manifest = KernelManifest(kernel_id="k", name=name, blueprint_id="b", spec=whole, pipeline="fast")
    with trial(load(Path(), manifest), tmp_path) as given:
        assert CHECKS["finite differences"](given) is None


def test_a_bfloat16_child_passes(tmp_path: Path) -> None:
    with trial(subject(dtype="bfloat16"), tmp_path) as given:
        for check in ("batches", "gradients", "finite differences", "guards", "bad samples", "second gradients"):
            assert CHECKS[check](given) is None


def test_the_endurance_is_over_a_thousand_calls() -> None:
    assert endurance.CALLS > 1000


def test_every_failure_has_its_input(tmp_path: Path, short: None) -> None:
    trail = Trail(tmp_path)
    found = sanity(doctored(wrong_gradient)._replace(manifest=subject().manifest), trail)
    trail.close()
    first = next(failure for failure in found.failures if failure.check == "gradients")
    assert first.recipe is not None
    whole = doctored(wrong_gradient)
    x = make(first.recipe)
    gradient = torch.ones_like(whole.eager(x))
    one, other = step(whole.child, x, gradient), step(whole.eager, x, gradient)
    assert not torch.allclose(one["gradient of input"], other["gradient of input"], rtol=1e-4)


def test_a_recipe_makes_the_same_numbers_twice() -> None:
    recipe = Recipe(shape=(3, 4, 8), seed=5, scale=2.0, kind="inf", spoiled=1)
    assert torch.equal(make(recipe), make(recipe))
    assert make(recipe)[1].isinf().all() and make(recipe)[[0, 2]].isfinite().all()
