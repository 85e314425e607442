"""A module of jobs for tests: the payload is JSON, `{"do": NAME, ...}`; the names are the functions of `acts.py`."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper.leyline.errors import JobError, WrongFingerprint
from esper.workers.limits import Limits, SandboxOutcome

ACTS = Path(__file__).with_name("acts.py")
MARK = "ESPER_TEST_MARK"
STRANGE = "ESPER_TEST_STRANGE"
"""Environment variable of a worker on a machine that particular jobs are not for."""


def payload(do: str, **fields: Any) -> bytes:
    """Return the payload of a job that does `do`."""
    return json.dumps({"do": do, **fields}).encode()


def prepare(data: bytes, folder: Path) -> list[str]:
    order = json.loads(data)
    if order["do"] == "unprepared":
        raise OSError("cannot be prepared")
    (folder / "order.json").write_bytes(data)
    return [sys.executable, "-S", str(ACTS), str(folder)]


def collect(folder: Path, outcome: SandboxOutcome) -> bytes:
    order = json.loads((folder / "order.json").read_text())
    if order["do"] == "unprepared":
        raise JobError("never reached")
    if order.get("particular") and os.environ.get(STRANGE):
        raise WrongFingerprint("it was made for another machine")
    if not outcome.ok and order.get("retry"):
        raise RuntimeError("try again")
    if not outcome.ok:
        raise JobError(f"The job failed: {outcome.ending}.")
    return (folder / "result").read_bytes()


def limits(data: bytes) -> Limits:
    given = json.loads(data).get("limits", {})
    return Limits(**{"wall_s": 20.0, "cpu_s": 10.0, "memory_mb": 512, "files_mb": 16, **given})


def environment(data: bytes) -> Mapping[str, str]:
    mark = os.environ.get(MARK)
    return {MARK: mark} if mark else {}
