"""Whether everything is as it must be after a round of `chaos.py`."""

import json
import math
import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.chaos_strikes import Struck
from esper.leyline.artifacts import CompilationRequest, CompiledKernel
from esper.leyline.codec import decode
from esper.leyline.errors import EsperError
from esper.urabrask.findings import Findings

TOLERANCE: Final = 1e-5
"""Largest difference of a loss from that of the run without a forge, where the graft was compiled; else there is none.
"""

UNFINISHED: Final = "the next writer moves aside what a killed one left"
"""End of what the doctor says of a ledger whose writer was killed in a change, until somebody writes again."""

POOLS: Final = ("tezzeret", "urabrask")


@dataclass
class Outcome:
    """What a round came to; a list that is not empty is a failure.

    Args:
        kind: what was done to the forge.
        number: which round of this kind.
        what: what was done, exactly.
        run: the run did not end as it should, or differs from the run without a forge; or the forge did not end well.
        wrong: VALIDATED kernels that are not what was validated.
        lost: requests without an answer, jobs marked done without a result.
        left: processes that outlived the round.
        doctor: what `esper doctor --store` says too much or too little.
        kernel: what the run's graft was made of, `compiled` or `eager`.
        answers: the last word on everything that was asked for, by kernel.
        cpu_s: processor time of the round's processes as far as it was seen, in seconds.
        seconds: length of the round.
    """

    kind: str
    number: int
    what: str = ""
    run: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    doctor: list[str] = field(default_factory=list)
    kernel: str = ""
    answers: dict[str, str] = field(default_factory=dict)
    cpu_s: float = 0.0
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        """Everything that is not as it must be."""
        return [*self.run, *self.wrong, *self.lost, *self.left, *self.doctor]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def compare(outcome: Outcome, found: dict[str, Any], alone: dict[str, Any]) -> None:
    """Compare a run with the one that had no forge: to the bit, unless its graft was compiled.

    Args:
        outcome: gets what differs.
        found: the run's `result.json`.
        alone: that of the run without a forge.
    """
    outcome.kernel = "compiled" if any("-standard-" in kernel for kernel in found["kernels"]) else "eager"
    losses, expected = ([float.fromhex(loss) for loss in run["losses"]] for run in (found, alone))
    if not (found["grafts"] and all(map(math.isfinite, losses))):
        outcome.run.append(f"grafts {found['grafts']}, last losses {losses[-3:]}")
    if found["grafts"] != alone["grafts"]:
        outcome.run.append(f"grafts {found['grafts']}, without a forge {alone['grafts']}")
    if len(losses) != len(expected):
        outcome.run.append(f"{len(losses)} steps, without a forge {len(expected)}")
    apart = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(losses, expected, strict=False))
    if apart > (TOLERANCE if outcome.kernel == "compiled" else 0.0):
        outcome.run.append(f"losses differ by {apart:.1e} from those without a forge ({outcome.kernel})")


def jobs(root: Path, pool: str) -> list[tuple[str, str, bytes, int]]:
    """Return key, state, result and whether it was taken of every job in a pool's journal."""
    with closing(sqlite3.connect(root / "jobs" / pool / "jobs.sqlite", timeout=30.0)) as base:
        return base.execute("SELECT key, state, result, taken FROM jobs").fetchall()


def open_jobs(root: Path) -> list[str]:
    """Return the jobs whose results nobody has taken yet."""
    return [f"{key} is {state}" for pool in POOLS for key, state, _, taken in jobs(root, pool) if not taken]


class Audit:
    """Compares what journals, store and doctor say with what was done.

    Args:
        outcome: gets what is wrong.
        struck: what was done.
        asked: what the round asked for, by kernel.
        before: the files of the kernels that were VALIDATED before, by kernel, with their hashes.
    """

    def __init__(
        self, outcome: Outcome, struck: Struck, asked: dict[str, CompilationRequest], before: dict[str, Any]
    ) -> None:
        """Take what is known."""
        self._outcome, self._struck, self._asked, self._before = outcome, struck, asked, before
        self._given_up: frozenset[str] = frozenset()

    def check(self, told: dict[str, Any], root: Path) -> None:
        """Look at everything.

        Args:
            told: what `chaos_job.inspect` has written.
            root: the forge's folder.
        """
        self._given_up = self._struck.subjects & set(told["given_up"])
        self._check_doctor(told["status"], told["said"][:-1])
        for name, kernel in told["kernels"].items():
            if kernel["status"] == "VALIDATED":
                self._check_validated(name, kernel)
        statuses = {name: kernel["status"] for name, kernel in told["kernels"].items()}
        for pool in POOLS:
            for key, state, result, _ in jobs(root, pool):
                if state == "DONE":
                    self._check_job(pool, key, result, statuses)

    def _check_doctor(self, status: int, findings: list[str]) -> None:
        killed = self._outcome.kind == "bus"
        known = [line for line in findings if killed and line.endswith(UNFINISHED)]
        strange = [
            line for line in findings if line not in known and line.partition(": ")[0] not in self._struck.subjects
        ]
        self._outcome.doctor += [f"the doctor says without reason: {line}" for line in strange]
        if self._struck.subjects and not findings and not self._given_up:
            self._outcome.doctor.append(f"the doctor does not see that somebody has {self._struck.what}")
        if status != bool(findings):
            self._outcome.doctor.append(f"the doctor's exit status is {status} with {len(findings)} findings")

    def _check_validated(self, name: str, kernel: dict[str, Any]) -> None:
        """Check that a kernel which says VALIDATED is the one that was, or is refused for damage that was done."""
        wrong = self._outcome.wrong
        if kernel["refused"]:
            if name not in self._struck.subjects:
                wrong.append(f"{name} is VALIDATED and refused: {kernel['refused']}")
            return
        before, asked = self._before.get(name), self._asked.get(name)
        if before is None and asked is None:
            wrong.append(f"{name} is VALIDATED, and nobody has asked for it")
        # One that the store saw damaged was made anew.
        if before is not None and kernel["files"] != before and name not in self._given_up:
            wrong.append(f"{name} is VALIDATED with other files than before")
        if asked is not None and json.loads(kernel["spec"]) != json.loads(asked.spec.model_dump_json()):
            wrong.append(f"{name} is VALIDATED, and is not what was asked for")

    def _check_job(self, pool: str, key: str, result: bytes, statuses: dict[str, str]) -> None:
        """Check that a job which is marked as done has a result, and that the store knows what came of it."""
        name = key.partition("@")[0].partition("~")[0]
        try:
            if pool == "tezzeret":
                found = json.loads(decode(CompiledKernel, result).manifest)["kernel_id"]
            else:
                found = Findings.model_validate_json(result).kernel_id
        except (EsperError, ValueError) as error:
            self._outcome.lost.append(f"job {key} is DONE without a result: {error}")
            return
        status = statuses.get(name, "")
        if found != name or (status not in ("VALIDATED", "REJECTED") and name not in self._struck.subjects):
            self._outcome.lost.append(f"job {key} is DONE, and its kernel is {status or 'not in the store'}")
