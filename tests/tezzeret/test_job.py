"""Orders to workers, and the ones that a worker hands back."""

from pathlib import Path

import pytest

from esper.leyline.artifacts import CompilationRequest
from esper.leyline.codec import encode, from_json
from esper.leyline.errors import ContractError, WrongFingerprint
from esper.leyline.kernels import Blueprint
from esper.tezzeret import job
from esper.tezzeret.compile import main
from esper.tezzeret.toolchain import fingerprint
from esper.workers.contracts import Job
from esper.workers.execute import execute
from esper.workers.limits import Ending, SandboxOutcome
from tests.tezzeret.samples import spec

ASKED = CompilationRequest(spec=spec(), pipeline="fast")
ELSEWHERE = job.Order(request=ASKED, fingerprint="f" * 64)


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(job.SHELF, str(tmp_path / "shelf"))


@pytest.mark.parametrize("wanted", ["", fingerprint()])
def test_an_order_for_this_machine_or_for_any_is_carried_out(wanted: str, tmp_path: Path) -> None:
    command = job.prepare(encode(job.Order(request=ASKED, fingerprint=wanted)), tmp_path)
    assert main(command[3:]) == 0
    assert {"manifest.json", "record.json", "ir.json"} <= {file.name for file in tmp_path.iterdir()}


def test_an_order_for_another_machine_is_handed_back_and_nothing_is_compiled(tmp_path: Path) -> None:
    command = job.prepare(encode(ELSEWHERE), tmp_path)
    before = set(tmp_path.iterdir())
    assert main(command[3:]) == 1
    assert set(tmp_path.iterdir()) - before == {tmp_path / job.UNFIT}
    with pytest.raises(WrongFingerprint, match="ffffffffffff is asked for; this machine makes some for"):
        job.collect(tmp_path, SandboxOutcome(exit_code=1, ending=Ending.EXITED, detail="it ended with status 1"))


@pytest.mark.slow
def test_a_worker_on_another_machine_says_that_it_is_unfit(tmp_path: Path) -> None:
    answer = execute(job, Job(id="one", key="k", kind="compile", payload=encode(ELSEWHERE)), tmp_path / "one")
    assert answer.unfit and not answer.final and answer.result is None
    assert answer.reason.startswith("a kernel for the binary interface ffffffffffff")


def test_a_bare_request_is_for_whoever_takes_it(tmp_path: Path) -> None:
    command = job.prepare(encode(ASKED), tmp_path)
    assert "--fingerprint" not in command
    assert from_json(CompilationRequest, (tmp_path / "request.json").read_bytes()) == ASKED


def test_a_payload_that_is_no_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="allowed: Order, CompilationRequest"):
        job.prepare(encode(Blueprint(id="b", name="BP-A", ir="{}")), tmp_path)
