"""A compiled kernel in a child: the eager child's results wherever it was compiled for, the eager child elsewhere."""

import copy
import hashlib
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import build, load_library
from esper.blueprints.build import Child
from esper.kasmina.compiled import CompiledChild, CompiledPair
from esper.leyline.artifacts import KernelManifest
from esper.leyline.errors import KernelError
from tests.kernels import SITE, compiled

NAMES = ("BP-MLP-GELU", "BP-CONV-CAUSAL")
pytestmark = pytest.mark.slow


@pytest.fixture(params=NAMES)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, KernelManifest]:
    return compiled(tmp_path_factory, request.param)


def twins(kernel: tuple[Path, KernelManifest]) -> tuple[Child, CompiledChild]:
    """An eager child whose every weight matters, and a compiled one with the same weights."""
    folder, manifest = kernel
    eager = build(load_library()[manifest.name].ir, SITE, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return eager, CompiledChild.around(copy.deepcopy(eager), CompiledPair(folder, manifest))


def batch(samples: int, *, tokens: int = SITE.tokens) -> Tensor:
    return torch.randn(samples, tokens, SITE.d_in, generator=torch.Generator().manual_seed(samples))


def results(child: nn.Module, x: Tensor) -> list[Tensor]:
    """The result, and the gradients of input and parameters."""
    x = x.detach().clone().requires_grad_()
    child.zero_grad()
    result = child(x)
    (result.float() ** 2).sum().backward()
    assert x.grad is not None
    return [result.detach(), x.grad, *(p.grad.clone() for p in child.parameters() if p.grad is not None)]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the forwards that go through a compiled pair."""
    seen: list[int] = []
    original = CompiledPair.forward
    monkeypatch.setattr(CompiledPair, "forward", lambda self, inputs: seen.append(1) or original(self, inputs))
    return seen


@pytest.mark.parametrize("samples", [1, 2, 3, 33])
def test_results_and_gradients_are_the_eager_ones(
    kernel: tuple[Path, KernelManifest], samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, child = twins(kernel)
    seen = calls(monkeypatch)
    for found, expected in zip(results(child, batch(samples)), results(eager, batch(samples)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert seen, "the compiled function did not run"
    with torch.no_grad():
        torch.testing.assert_close(child.eval()(batch(samples)), eager.eval()(batch(samples)), rtol=1e-4, atol=1e-5)


def test_names_and_parameters_are_the_eager_ones(kernel: tuple[Path, KernelManifest]) -> None:
    eager, child = twins(kernel)
    assert list(child.state_dict()) == list(eager.state_dict())
    before = build(load_library()[kernel[1].name].ir, SITE, seed=2)
    around = CompiledChild.around(before, child.pair)
    assert [id(p) for p in around.parameters()] == [id(p) for p in before.parameters()]


@pytest.mark.parametrize(
    "case", ["tokens", "bfloat16", "float64", "autocast", "vmap", "empty", "converted", "compiling"]
)
def test_what_it_was_not_compiled_for_is_done_eagerly(
    kernel: tuple[Path, KernelManifest], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, child = twins(kernel)
    seen = calls(monkeypatch)
    x = batch(2)
    if case == "tokens":
        x = batch(2, tokens=SITE.tokens + 3)
    elif case in ("bfloat16", "float64"):
        eager, child, x = eager.to(getattr(torch, case)), child.to(getattr(torch, case)), x.to(getattr(torch, case))
    elif case == "converted":
        child.double().float()
        child.half()
        eager.half()
        x = x.half()
    elif case == "empty":
        x = x[:0]
    if case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(child(x), eager(x))
    elif case == "vmap":
        found, expected = (torch.vmap(lambda one, c=c: c(one[None])[0])(x) for c in (child, eager))
        torch.testing.assert_close(found, expected)
    elif case == "compiling":
        program = torch.export.export(child.eval(), (x,))
        torch.testing.assert_close(program.module()(x), eager(x))
    else:
        assert torch.equal(child(x), eager(x))
    assert not seen


def test_a_view_that_is_not_contiguous_is_read_right(kernel: tuple[Path, KernelManifest]) -> None:
    eager, child = twins(kernel)
    x = batch(4).transpose(1, 2).contiguous().transpose(1, 2)
    assert not x.is_contiguous()
    for found, expected in zip(results(child, x), results(eager, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_get_no_gradient(kernel: tuple[Path, KernelManifest]) -> None:
    _, child = twins(kernel)
    first = next(child.parameters()).requires_grad_(False)
    child(batch(2)).sum().backward()
    assert first.grad is None
    assert all(p.grad is not None for p in list(child.parameters())[1:])


def test_a_gradient_can_be_differentiated(kernel: tuple[Path, KernelManifest]) -> None:
    found = []
    for child in twins(kernel):
        x = batch(2).requires_grad_()
        (slope,) = torch.autograd.grad(child(x).pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.pow(2).sum(), list(child.parameters()), allow_unused=True))
    for expected, compiled_ones in zip(*found, strict=True):
        assert (expected is None) is (compiled_ones is None)
        if expected is not None:
            torch.testing.assert_close(compiled_ones, expected, rtol=1e-3, atol=1e-4)


def test_copies_and_pickles_are_eager(kernel: tuple[Path, KernelManifest]) -> None:
    _, child = twins(kernel)
    for other in (copy.deepcopy(child), pickle.loads(pickle.dumps(child))):
        assert type(other) is Child
        assert all(map(torch.equal, other.state_dict().values(), child.state_dict().values()))


def test_other_parameters_than_compiled_for_are_refused(kernel: tuple[Path, KernelManifest]) -> None:
    folder, manifest = kernel
    other = build(load_library()["BP-PROJ-LORA"].ir, SITE, seed=0)
    with pytest.raises(KernelError, match="other parameters"):
        CompiledChild.around(other, CompiledPair(folder, manifest))


@pytest.mark.parametrize("wiring", [("i99",), ("o9",), ("t1",), ("x0",), ("i",), ("i-1",)])
def test_a_wiring_that_leads_nowhere_is_refused(kernel: tuple[Path, KernelManifest], wiring: tuple[str, ...]) -> None:
    folder, manifest = kernel
    with pytest.raises(KernelError, match="not wired"):
        CompiledPair(folder, manifest.model_copy(update={"backward_wiring": wiring}))


def test_files_that_are_no_libraries_are_refused(kernel: tuple[Path, KernelManifest], tmp_path: Path) -> None:
    garbage = b"not a library"
    for name in ("fw.so", "bw.so"):
        (tmp_path / name).write_bytes(garbage)
    with pytest.raises(KernelError, match="changed since it was verified"):
        CompiledPair(tmp_path, kernel[1])
    files = {name: hashlib.sha256(garbage).hexdigest() for name in ("fw.so", "bw.so")}
    with pytest.raises(KernelError, match="cannot be loaded"):
        CompiledPair(tmp_path, kernel[1].model_copy(update={"files": files}))
    with pytest.raises(KernelError, match="cannot be read"):
        CompiledPair(tmp_path / "nowhere", kernel[1])


def test_damage_to_its_files_does_not_reach_a_loaded_kernel(
    kernel: tuple[Path, KernelManifest], tmp_path: Path
) -> None:
    folder, manifest = kernel
    shutil.copytree(folder, tmp_path / "own")
    eager, child = twins((tmp_path / "own", manifest))
    for name in ("fw.so", "bw.so"):
        os.truncate(tmp_path / "own" / name, 0)
    for found, expected in zip(results(child, batch(2)), results(eager, batch(2)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
