"""Compiled kernels, good ones and doctored ones, through the real sandbox."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from esper.blueprints import STANDARD
from esper.leyline.codec import encode
from esper.leyline.events import Rejection
from esper.urabrask import job
from esper.urabrask.findings import Findings
from esper.urabrask.limits import GAIN
from esper.urabrask.report import verdict
from esper.workers.limits import Limits, SandboxOutcome
from esper.workers.sandbox import run_sandboxed
from tests.kernels import built
from tests.urabrask.kernels import doctored, manifest_of, packed, spec

pytestmark = pytest.mark.slow

SOAK = int(os.environ.get("ESPER_SOAK", "0"))
ALL = STANDARD
TRIED = ALL if SOAK else ("BP-MLP-GELU", "BP-CONV-CAUSAL")
LIMITS = Limits(cpu_s=120.0, wall_s=900.0, memory_mb=2048, background=False)


def tried(artifact: Path, folder: Path, limits: Limits = LIMITS) -> tuple[Findings, SandboxOutcome]:
    """Do what a worker does with an artifact."""
    folder.mkdir(exist_ok=True)
    command = job.prepare(encode(packed(artifact)), folder)
    outcome = run_sandboxed(command, folder, limits)
    return Findings.model_validate_json(job.collect(folder, outcome)), outcome


@pytest.mark.parametrize("name", TRIED)
def test_compiled_kernels_of_the_library_are_right(name: str, shared: Path, tmp_path: Path) -> None:
    artifact = built(shared, spec(name))
    found, _ = tried(artifact, tmp_path / "job")
    assert not found.failures
    measured = found.measured
    assert measured is not None and measured.calls >= 100 and measured.memory_mb > 0.0
    assert measured.drift < 1e-4 and found.margin < 1.0
    judged = verdict(found, manifest_of(artifact).spec)
    worth = measured.step_ratio <= 1.0 - GAIN and 1.0 - measured.step_ratio > measured.ratio_spread
    assert judged.rejection is (None if worth else Rejection.TOO_SLOW)
    assert judged.report.passed_validation is worth
    assert ("noisy" in judged.report.generated_tags) is (measured.spread > 0.05)


@pytest.mark.skipif(not SOAK, reason="ESPER_SOAK asks for it")
@pytest.mark.parametrize("name", ALL)
def test_compiled_kernels_in_bfloat16_are_right(name: str, shared: Path, tmp_path: Path) -> None:
    found, _ = tried(built(shared, spec(name, dtype="bfloat16")), tmp_path / "job")
    assert not found.failures


DOCTORED = [
    ("NAN_LATE", "fw", 1000, "determinism", "not finite any more", Rejection.SANITY_FAILED),
    ("NAN_LATE", "bw", 1000, "determinism", "not finite any more", Rejection.SANITY_FAILED),
    ("WRONG", "bw", 1, "batches", "gradient of", Rejection.GRADIENT_MISMATCH),
    ("RANDOM", "fw", 1, "determinism", "other bits", Rejection.SANITY_FAILED),
    ("LEAK", "bw", 1, "memory", "MiB", Rejection.SANITY_FAILED),
    ("WRITES", "fw", 1, "batches", "writes to its input", Rejection.SANITY_FAILED),
    ("HIDES_NAN", "fw", 1, "bad samples", "finite result", Rejection.SANITY_FAILED),
]


@pytest.mark.parametrize(("bad", "part", "kept", "check", "words", "rejection"), DOCTORED)
def test_a_doctored_kernel_is_rejected(
    bad: str, part: str, kept: int, check: str, words: str, rejection: Rejection, shared: Path, tmp_path: Path
) -> None:
    artifact = doctored(built(shared, spec()), tmp_path / "artifact", bad, part, kept)
    found, outcome = tried(artifact, tmp_path / "job")
    assert outcome.ok
    failure = next(failure for failure in found.failures if failure.check == check)
    assert words in failure.detail and failure.recipe is not None
    judged = verdict(found, manifest_of(artifact).spec)
    assert judged.rejection is rejection and not judged.report.passed_validation
    assert judged.report.risk_score == 1.0 and found.measured is None


ENDED = [
    ("CRASH", 1, "batches", "SIGSEGV"),
    ("CRASH", 700, "determinism", "SIGSEGV"),
    ("LOOP", 1, "batches", "CPU time"),
    ("HOG", 1, "batches", "MiB"),
]


@pytest.mark.parametrize(("bad", "kept", "check", "words"), ENDED)
def test_a_kernel_that_ends_its_process_is_contained(
    bad: str, kept: int, check: str, words: str, shared: Path, tmp_path: Path
) -> None:
    artifact = doctored(built(shared, spec()), tmp_path / "artifact", bad, "fw", kept)
    limits = replace(LIMITS, cpu_s=15.0, resident_mb=700)
    began = time.monotonic()
    found, outcome = tried(artifact, tmp_path / "job", limits)
    assert not outcome.ok and time.monotonic() - began < 150.0
    (failure,) = found.failures
    assert failure.check == check and words in failure.detail
    assert failure.recipe is not None and failure.recipe.shape[1:] == (16, 32)
    assert verdict(found, manifest_of(artifact).spec).rejection is Rejection.SANITY_FAILED


def test_a_slow_kernel_is_rejected_with_the_numbers(shared: Path, tmp_path: Path) -> None:
    artifact = doctored(built(shared, spec()), tmp_path / "artifact", "SLOW")
    found, _ = tried(artifact, tmp_path / "job", LIMITS)
    judged = verdict(found, manifest_of(artifact).spec)
    assert judged.rejection is Rejection.TOO_SLOW and "ratio" in judged.detail


def test_a_file_that_is_no_library_is_rejected(shared: Path, tmp_path: Path) -> None:
    artifact = doctored(built(shared, spec()), tmp_path / "artifact", "SLOW")
    (artifact / "fw.so").write_bytes(b"no library at all")
    found, _ = tried(artifact, tmp_path / "job")
    assert [failure.check for failure in found.failures] == ["load"]
    assert verdict(found, manifest_of(artifact).spec).rejection is Rejection.SANITY_FAILED
