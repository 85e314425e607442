"""A run whose forge is hurt at work ends as if it had none, and the next forge finishes what was begun."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.chaos import KINDS, failures, report, table
from benchmarks.chaos_audit import POOLS, Audit, Outcome, compare
from benchmarks.chaos_round import play, why_no_disk
from benchmarks.chaos_stage import Stage
from benchmarks.chaos_strikes import STRIKES, Struck
from esper.urabrask.findings import Findings
from esper.urabrask.hardware import hardware
from esper.workers.journal import JobJournal
from tests.kernels import compiled

ROUNDS = int(os.environ.get("ESPER_SOAK", "1"))
FIRST = {"worker": 2}
"""Number of the first round of a kind: in this one a kernel becomes VALIDATED, which takes ten seconds of processor."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    yield Stage(tmp_path_factory.mktemp("chaos") / "stage", compiled(tmp_path_factory)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_goes_on_and_nothing_is_lost(kind: str, stage: Stage, tmp_path: Path) -> None:
    if kind == "disk" and (reason := why_no_disk(tmp_path)):
        pytest.skip(reason)
    for number in range(FIRST.get(kind, 0), FIRST.get(kind, 0) + ROUNDS):
        outcome = play(stage, kind, number)
        assert not outcome.failures, (outcome.what, outcome.failures)


def test_every_kind_can_be_asked_for() -> None:
    assert set(KINDS) == set(STRIKES)


# --- what finds fault must find it -------------------------------------------------------------------------------

FINDINGS = Findings(kernel_id="new", pipeline="fast", hardware=hardware()).model_dump_json().encode()
ALONE = {"losses": [(2.0).hex(), (1.0).hex()], "grafts": [["BP-A", "FOSSILIZED", "GATE_PASSED"]], "kernels": [""]}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, ""),
        ({"kernels": ["k-cpu-standard-t"], "losses": [(2.0).hex(), (1.000001).hex()]}, ""),
        ({"kernels": ["k-cpu-standard-t"], "losses": [(2.0).hex(), (1.0001).hex()]}, "losses differ by 1.0e-04"),
        ({"losses": [(2.0).hex(), (1.000001).hex()]}, "losses differ by 1.0e-06"),
        ({"losses": [(2.0).hex()]}, "1 steps, without a forge 2"),
        ({"losses": [(2.0).hex(), "nan"]}, "last losses"),
        ({"grafts": [["BP-A", "CULLED", "RUNTIME_ERROR"]]}, "RUNTIME_ERROR"),
        ({"grafts": []}, "grafts []"),
    ],
)
def test_a_run_is_compared(change: dict[str, list[object]], found: str) -> None:
    compare(outcome := Outcome("worker", 0), ALONE | change, ALONE)
    assert found in "; ".join(outcome.run) if found else not outcome.run


HURT = Struck("cut fw.so of k", frozenset({"k"}))
GOOD = {"status": "VALIDATED", "refused": "", "files": {"fw.so": "hash"}}
REFUSED = {"status": "VALIDATED", "refused": "BadHash: fw.so", "files": {}}


def audited(
    tmp_path: Path,
    struck: Struck,
    kernels: dict[str, object],
    *said: str,
    kind: str = "artifact",
    given_up: tuple[str, ...] = (),
) -> Outcome:
    for pool in POOLS:
        JobJournal(tmp_path / "jobs" / pool / "jobs.sqlite").close()
    told = {"status": int(bool(said)), "said": [*said, "1 kernels: the end"], "kernels": kernels, "given_up": given_up}
    Audit(outcome := Outcome(kind, 0), struck, {}, {"k": {"fw.so": "hash"}}).check(told, tmp_path)
    return outcome


def test_a_sound_store_passes(tmp_path: Path) -> None:
    assert not audited(tmp_path, Struck("killed"), {"k": GOOD}).failures
    assert not audited(tmp_path, HURT, {"k": REFUSED}, "k: BadHash: fw.so").failures


def test_damage_that_was_seen_and_mended_is_none(tmp_path: Path) -> None:
    anew = {**GOOD, "files": {"fw.so": "another hash"}}
    assert not audited(tmp_path, HURT, {"k": anew}, kind="record", given_up=("k",)).failures
    assert audited(tmp_path, HURT, {"k": anew}, kind="record").wrong
    assert audited(tmp_path, Struck("killed"), {"k": anew}, given_up=("k",)).wrong


def test_only_a_writer_that_was_killed_may_leave_an_unfinished_change(tmp_path: Path) -> None:
    said = "ledger: 80 bytes follow its end; the next writer moves aside what a killed one left"
    assert not audited(tmp_path, Struck("killed"), {"k": GOOD}, said, kind="bus").failures
    assert audited(tmp_path, Struck("killed"), {"k": GOOD}, said, kind="worker").doctor


@pytest.mark.parametrize(
    ("struck", "kernel", "said", "found"),
    [
        (Struck("killed"), REFUSED, (), "k is VALIDATED and refused"),
        (Struck("killed"), GOOD | {"files": {"fw.so": "other"}}, (), "with other files"),
        (Struck("killed"), GOOD, ("k: BadHash",), "the doctor says without reason: k: BadHash"),
        (HURT, REFUSED, (), "the doctor does not see that somebody has cut fw.so"),
        (HURT, REFUSED, ("k: BadHash", "ledger: line 3 is damaged"), "without reason: ledger"),
    ],
)
def test_damage_that_was_not_done_is_a_failure(
    struck: Struck, kernel: dict[str, object], said: tuple[str, ...], found: str, tmp_path: Path
) -> None:
    assert found in "; ".join(audited(tmp_path, struck, {"k": kernel}, *said).failures)


def test_a_kernel_that_nobody_asked_for_is_a_failure(tmp_path: Path) -> None:
    assert audited(tmp_path, Struck("killed"), {"other": GOOD}).wrong == [
        "other is VALIDATED, and nobody has asked for it"
    ]


@pytest.mark.parametrize(("result", "found"), [(b"", "DONE without a result"), (FINDINGS, "not in the store")])
def test_a_job_that_is_done_must_have_come_to_something(result: bytes, found: str, tmp_path: Path) -> None:
    with closing(JobJournal(tmp_path / "jobs/urabrask/jobs.sqlite")) as journal:
        journal.done(journal.submit("new@ref", "gauntlet", b""), result)
    assert found in "; ".join(audited(tmp_path, Struck("killed"), {"k": GOOD}).lost)


def test_the_table_counts_rounds_and_names_failures() -> None:
    rows = [Outcome("bus", 0, what="killed", seconds=4.0).as_dict(), Outcome("bus", 1, seconds=8.0).as_dict()]
    assert "| bus | 2 | 2 | 0 | 0 | 0 | 0 | 6 |" in table(rows)
    rows[0]["lost"] = ["k was asked for and has no answer"]
    assert "| bus | 2 | 2 | 0 | 1 | 0 | 0 | 6 |" in table(rows)
    assert failures(rows[0]) == rows[0]["lost"]
    assert "- bus 0, killed: k was asked for and has no answer" in report(rows)
    assert "2 rounds of each kind" in report(rows)
