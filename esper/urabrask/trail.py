"""The trail: what the gauntlet is doing right now, in a file that outlives a crash of its process."""

import json
import os
from pathlib import Path
from typing import NamedTuple, final

from pydantic import ValidationError

from esper.urabrask.findings import Recipe

NAME = "trail.json"
"""Name of the file in the job's folder."""

_LENGTH = 512


class Place(NamedTuple):
    """Where a process was when it ended: a check and, if there was one, the input."""

    check: str
    recipe: Recipe | None = None


@final
class Trail:
    """Writes every check and every input down before they are tried.

    Args:
        folder: folder of the job.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     trail = Trail(Path(name))
        ...     trail.enter("batches")
        ...     trail.give(Recipe(shape=(2, 4)))
        ...     trail.close()
        ...     place = last_place(Path(name))
        >>> place.check, place.recipe.shape
        ('batches', (2, 4))
    """

    def __init__(self, folder: Path) -> None:
        """Make the file."""
        self._handle = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.check, self.recipe = "start", None
        self.enter("start")

    check: str
    recipe: Recipe | None

    def enter(self, check: str) -> None:
        """Begin a check."""
        self.check, self.recipe = check, None
        self._write()

    def give(self, recipe: Recipe) -> None:
        """Try an input."""
        self.recipe = recipe
        self._write()

    def close(self) -> None:
        """Close the file; it stays."""
        os.close(self._handle)

    def _write(self) -> None:
        given = None if self.recipe is None else self.recipe.model_dump(mode="json")
        text = json.dumps({"check": self.check, "recipe": given}).encode()
        os.pwrite(self._handle, text.ljust(_LENGTH), 0)


def last_place(folder: Path) -> Place:
    """Return where the process of a job's folder was last; a file that cannot be read says nothing."""
    try:
        with (folder / NAME).open("rb") as file:
            data = json.loads(file.read(_LENGTH))
        given = data["recipe"]
        return Place(str(data["check"])[:80], None if given is None else Recipe.model_validate(given))
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return Place("start")
