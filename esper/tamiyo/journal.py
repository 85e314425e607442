"""The run's own record: events and field reports as JSON lines."""

from pathlib import Path
from typing import TextIO

from esper.leyline.base import Message
from esper.leyline.codec import to_json
from esper.leyline.errors import OutputError
from esper.leyline.reports import FieldReport


class Journal:
    """Appends every event to `events.jsonl` and every field report to `fieldreports.jsonl`.

    Args:
        folder: where; made if it does not exist.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open both files."""
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._events: TextIO = (self.folder / "events.jsonl").open("a", encoding="utf-8")
            self._reports: TextIO = (self.folder / "fieldreports.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.folder}: {error.strerror or error}; choose another output folder."
            ) from error

    def write(self, message: Message) -> None:
        """Append one message and flush, so that a killed run loses nothing."""
        file = self._reports if isinstance(message, FieldReport) else self._events
        file.write(to_json(message) + "\n")
        file.flush()

    def close(self) -> None:
        """Close both files; may be called twice."""
        self._events.close()
        self._reports.close()
