"""Kernels that are really compiled, and compilations that are stopped or cannot be."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from esper.kasmina.compiled import CompiledChild, CompiledPair
from esper.leyline.artifacts import CompilationRequest, KernelManifest, KernelSpec
from esper.leyline.codec import decode, encode, to_json
from esper.leyline.kernels import CompilationRecord
from esper.tezzeret import job
from esper.tezzeret.compile import compile_kernel, main
from esper.tezzeret.toolchain import fingerprint, kernel_id, toolchain
from esper.workers.contracts import Job
from esper.workers.execute import Answer, execute
from tests import kernels
from tests.tezzeret.samples import features, grown, label, library, spec

BATCHES = (1, 2, 3, 17, 64)
SOAK = int(os.environ.get("ESPER_SOAK", "0"))


def apart(folder: Path) -> float:
    """Return the largest difference of a compiled kernel from eager, relative: result and gradients, any batch."""
    manifest = KernelManifest.model_validate_json((folder / "manifest.json").read_bytes())
    pair, worst = CompiledPair(folder, manifest), 0.0
    for batch in BATCHES:
        child = grown(manifest.spec, batch)
        compiled, x = CompiledChild.around(child, pair), features(manifest.spec, batch).requires_grad_()
        assert compiled._fits(x, tuple(compiled.parameters())), "the eager module would run instead"
        for mode in (True, False):
            results = [run(x) for run in (compiled.train(mode), compiled.eager)]
            assert results[0].is_contiguous(), "whose gradient is contiguous, too"
            wrt = [x, *compiled.parameters()]
            found, wanted = ([r.detach(), *torch.autograd.grad(r, wrt, _gradient(r))] for r in results)
            for one, other in zip(found, wanted, strict=True):
                assert one.shape == other.shape and one.dtype == other.dtype
                difference = (one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-6)
                worst = max(worst, float(difference))
    return worst


def _gradient(result: torch.Tensor) -> torch.Tensor:
    """A gradient of its own for every number: one that is the same everywhere would hide a wrong layout."""
    return torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)


def test_the_fast_tier_is_the_blueprint_and_a_manifest(tmp_path: Path) -> None:
    made = compile_kernel(spec(), "fast", tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"ir.json", "manifest.json"}
    assert made.manifest.blueprint_id == hashlib.sha256((tmp_path / "ir.json").read_bytes()).hexdigest()
    assert made.manifest.files == {"ir.json": made.manifest.blueprint_id}
    assert made.manifest.fingerprint == "" and made.manifest.kernel_id == kernel_id(spec(), "fast")
    assert KernelManifest.model_validate_json((tmp_path / "manifest.json").read_bytes()) == made.manifest


@pytest.mark.parametrize(
    ("one", "pipeline", "reason"),
    [
        (spec(ir="{}"), "standard", "BlueprintError: blueprint: name: Field required"),
        (spec(layout="bchw"), "fast", "BlueprintDoesNotFit: BP-MLP-GELU serves layouts btd, bd"),
        (spec(target="abacus"), "standard", "KernelError: no kernels for target 'abacus'"),
    ],
)
def test_what_cannot_be_compiled_gives_the_reason_and_no_artifact(
    tmp_path: Path, one: KernelSpec, pipeline: str, reason: str
) -> None:
    request = CompilationRequest.model_validate({"spec": one, "pipeline": pipeline})
    (tmp_path / "request.json").write_text(to_json(request))
    assert main([str(tmp_path)]) == 1
    assert reason in (tmp_path / "error.txt").read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"request.json", "error.txt"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_kernel_for_cuda_needs_a_cuda_device(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(to_json(CompilationRequest(spec=spec(target="cuda"), pipeline="standard")))
    assert main([str(tmp_path)]) == 1
    assert "where a CUDA device is" in (tmp_path / "error.txt").read_text()


@pytest.mark.slow
def test_a_compiled_kernel_equals_eager_for_every_batch(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, manifest = kernels.compiled(tmp_path_factory)
    assert apart(folder) < 1e-5
    assert manifest.fingerprint == fingerprint() and manifest.toolchain == toolchain()
    assert manifest.kernel_id == kernel_id(manifest.spec, "standard")
    record = CompilationRecord.model_validate_json((folder / "record.json").read_bytes())
    assert record.cpu_seconds > 1 and record.peak_memory_mb > 100
    left = {file.name for file in folder.iterdir()}
    assert left == {"request.json", "record.json", "manifest.json", "ir.json", "fw.so", "bw.so"}


@pytest.mark.slow
def test_a_compilation_that_is_killed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(job.SHELF, str(tmp_path / "shelf"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    folder, cancelled, answers = tmp_path / "jobs" / "one", threading.Event(), list[Answer]()
    asked = encode(CompilationRequest(spec=spec(), pipeline="standard"))
    work = Job(id="one", key="k", kind="compile", payload=asked)
    thread = threading.Thread(target=lambda: answers.append(execute(job, work, folder, cancelled)))
    thread.start()
    deadline = time.monotonic() + 120
    while not list(folder.glob("workshop-*/fw/*.cpp")) and time.monotonic() < deadline and thread.is_alive():
        time.sleep(0.05)
    assert thread.is_alive(), answers
    cancelled.set()
    thread.join(30)
    assert answers and answers[0].result is None and not answers[0].final
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_a_compilation_beyond_its_limits_fails_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(job.SHELF, str(tmp_path / "shelf"))
    monkeypatch.setattr(job, "CPU_S", 1.0)
    asked = encode(CompilationRequest(spec=spec(), pipeline="standard"))
    answer = execute(job, Job(id="one", key="k", kind="compile", payload=asked), tmp_path / "one")
    assert answer.final and answer.result is None and "stopped" in answer.reason


@pytest.mark.slow
@pytest.mark.skipif(not SOAK, reason="half an hour of compiling; set ESPER_SOAK=1")
@pytest.mark.parametrize("one", [*library()], ids=label)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kernel_of_the_library_equals_eager(
    one: KernelSpec, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(job.SHELF, str(tmp_path.parent / "shelf"))
    asked = CompilationRequest(spec=one.model_copy(update={"dtype": dtype}), pipeline="standard")
    answer = execute(job, Job(id="one", key="k", kind="compile", payload=encode(asked)), tmp_path / "one")
    assert answer.result is not None, answer.reason
    made = decode(job.CompiledKernel, answer.result)
    (tmp_path / "manifest.json").write_text(made.manifest)
    for name, data in made.files.items():
        (tmp_path / name).write_bytes(data)
    assert apart(tmp_path) < (1e-5 if dtype == "float32" else 2e-2)
