"""The rows that are there: one file for each configuration and seed, made once and found again by their content."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from esper import __version__
from esper.bench.arms import Config
from esper.files import replacing
from esper.leyline.errors import OutputError

Row = dict[str, Any]

JOB_FILE, ROW_FILE = "job.json", "row.json"
"""What a process that makes a row reads and writes in the folder of its run."""

FORMAT: Final = 1
"""Version of a row; rows of another one are made again."""


@dataclass(frozen=True)
class Job:
    """A row that is wanted.

    Args:
        arm: name of its arm.
        seed: of its run.
        config: what is run; `OUTPUT` stands for its folder.
        work: multiply-accumulates that its training takes; None takes the steps of the configuration.
    """

    arm: str
    seed: int
    config: Config
    work: float | None = None

    @property
    def key(self) -> str:
        """Hash of everything that the row depends on; arms that are the same run have the same."""
        content = {"format": FORMAT, "version": __version__, "config": self.config, "work": self.work}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Rows:
    """The rows of a folder.

    Args:
        folder: where they are; it is made with the first one.
    """

    def __init__(self, folder: Path) -> None:
        """Read nothing yet."""
        self.folder = folder

    def find(self, job: Job) -> Row | None:
        """Return the row of a job, or None if it was not made yet.

        Raises:
            OutputError: its file cannot be read.
        """
        file = self.folder / f"{job.key}.json"
        if not file.exists():
            return None
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{file} cannot be read ({error}); remove it, and the row is made again.") from error
        return {**row, "arm": job.arm, "key": job.key}

    def keep(self, job: Job, row: Row) -> Row:
        """Write the row of a job, and return it as it will be found."""
        write(self.folder / f"{job.key}.json", row | {"arm": job.arm, "seed": job.seed, "key": job.key})
        found = self.find(job)
        assert found is not None
        return found


def write(path: Path, content: Any) -> None:
    """Write JSON as a whole or not at all; numbers that are not finite become null.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with replacing(path) as file:
            file.write((json.dumps(_finite(content), indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose a writable folder.") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
