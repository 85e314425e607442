"""The job module: what is written, what is run, what is made of how it ended; and a worker needs no torch for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from esper.kasmina.fingerprint import fingerprint
from esper.leyline.artifacts import CompiledKernel, KernelManifest
from esper.leyline.codec import encode, to_json
from esper.leyline.errors import JobError, KernelError, UnsafePath, WrongFingerprint
from esper.urabrask import job
from esper.urabrask.findings import Findings, Recipe
from esper.urabrask.gauntlet import run
from esper.urabrask.trail import NAME, Trail, last_place
from esper.urza.canonical import parse
from esper.workers.limits import Ending, SandboxOutcome
from tests.urabrask.findings import findings
from tests.urabrask.kernels import eager_kernel, spec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    job.prepare(encode(eager_kernel(spec(), "k")), tmp_path)
    return tmp_path


def outcome(ending: Ending, code: int | None = None, cpu_s: float = 50.0) -> SandboxOutcome:
    return SandboxOutcome(exit_code=code, ending=ending, detail="as it is", cpu_seconds=cpu_s, wall_seconds=100.0)


OWN_FAULT = [
    outcome(Ending.SIGNALLED, -11),
    outcome(Ending.SIGNALLED, -6),
    outcome(Ending.CPU_LIMIT),
    outcome(Ending.WALL_LIMIT),
    outcome(Ending.MEMORY_LIMIT),
    outcome(Ending.PROCESS_LIMIT),
    outcome(Ending.FILES_LIMIT),
]
NOT_ITS_FAULT = [
    outcome(Ending.SIGNALLED, -9),
    outcome(Ending.SIGNALLED, -4),
    outcome(Ending.WALL_LIMIT, cpu_s=5.0),
    outcome(Ending.EXITED, 1),
    outcome(Ending.LOST),
    outcome(Ending.CANCELLED),
]


def test_the_artifact_is_written_and_the_command_tries_it(folder: Path) -> None:
    assert {path.name for path in (folder / job.ARTIFACT).iterdir()} == {"manifest.json", "ir.json"}
    command = job.prepare(encode(eager_kernel(spec(), "k")), (other := folder / "other").mkdir() or other)
    assert command == [sys.executable, "-m", "esper.urabrask.gauntlet", str(other)]


def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafePath):
        job.prepare(encode(CompiledKernel(manifest="{}", files={"../x": b""})), tmp_path)
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize("ended", OWN_FAULT, ids=lambda o: f"{o.ending}{o.exit_code}")
def test_a_kernel_that_ends_its_process_has_failed_where_it_was(ended: SandboxOutcome, folder: Path) -> None:
    trail = Trail(folder)
    trail.enter("determinism")
    trail.give(Recipe(shape=(3, 16, 32), seed=7, call=999))
    trail.close()
    found = Findings.model_validate_json(job.collect(folder, ended))
    (failure,) = found.failures
    assert found.kernel_id == "k" and failure.check == "determinism" and "as it is" in failure.detail
    assert failure.recipe is not None and failure.recipe.call == 999


@pytest.mark.parametrize("ended", NOT_ITS_FAULT, ids=lambda o: f"{o.ending}{o.exit_code}")
def test_what_somebody_else_did_is_tried_again(ended: SandboxOutcome, folder: Path) -> None:
    with pytest.raises(KernelError):
        job.collect(folder, ended)


def test_findings_are_handed_on(folder: Path) -> None:
    (folder / job.FINDINGS).write_text(findings().model_dump_json())
    assert Findings.model_validate_json(job.collect(folder, outcome(Ending.EXITED, 0))) == findings()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"kernel_id": 1}', "\x00"])
def test_findings_that_cannot_be_read_fail_for_good(text: str, folder: Path) -> None:
    (folder / job.FINDINGS).write_text(text)
    with pytest.raises(JobError):
        job.collect(folder, outcome(Ending.EXITED, 0))


def test_findings_that_are_a_link_are_not_followed(folder: Path) -> None:
    (folder / "elsewhere").write_text(findings().model_dump_json())
    (folder / job.FINDINGS).symlink_to(folder / "elsewhere")
    with pytest.raises(JobError):
        job.collect(folder, outcome(Ending.EXITED, 0))


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"check": "x", "recipe": {"shape": "no"}}'])
def test_a_trail_that_cannot_be_read_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    assert last_place(tmp_path).recipe is None


def test_large_kernels_may_take_longer() -> None:
    small, large, huge = (job.limits(encode(eager_kernel(spec(d=d, tokens=d)))) for d in (64, 512, 4096))
    assert small.cpu_s < large.cpu_s < huge.cpu_s and small.wall_s > 2 * small.cpu_s
    assert huge.cpu_s < 3600 * 2 and not small.network


def test_a_worker_needs_no_torch() -> None:
    code = "import sys, esper.urabrask.job, esper.urabrask.service; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_kernel_for_another_machine_is_handed_back_and_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    """Its library is no library: loading it would have been a failure of the kernel's."""
    kernel = eager_kernel(spec(), "k", "standard", fw=b"not loaded", bw=b"not loaded")
    manifest = parse(KernelManifest, kernel.manifest).model_copy(update={"fingerprint": "f" * 64})
    job.prepare(encode(kernel.model_copy(update={"manifest": to_json(manifest)})), tmp_path)
    with pytest.raises(WrongFingerprint, match="ffffffffffff; this machine has"):
        run(tmp_path)
    assert not (tmp_path / job.FINDINGS).exists() and not (tmp_path / NAME).exists()
    with pytest.raises(WrongFingerprint, match="k was compiled for the binary interface ffffffffffff"):
        job.collect(tmp_path, outcome(Ending.EXITED, 1))
    with pytest.raises(KernelError):
        job.collect(tmp_path, outcome(Ending.SIGNALLED, -9))


@pytest.mark.parametrize("own", [True, False])
def test_a_kernel_for_this_machine_or_for_any_is_tried(own: bool, tmp_path: Path) -> None:
    kernel = eager_kernel(spec(), "k", "standard", fw=b"no library", bw=b"no library")
    manifest = parse(KernelManifest, kernel.manifest).model_copy(update={"fingerprint": fingerprint() if own else ""})
    job.prepare(encode(kernel.model_copy(update={"manifest": to_json(manifest)})), tmp_path)
    assert [failure.check for failure in run(tmp_path).failures] == ["load"]
