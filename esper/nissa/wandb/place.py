"""Which W&B run the folder of a run belongs to: `wandb.json`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from esper.nissa.folder import write_json

if TYPE_CHECKING:
    import wandb

WANDB_FILE = "wandb.json"

PREFIX = "growth"
"""Section of a W&B workspace that holds what is told at a run's end."""


class Place(NamedTuple):
    """A run in W&B.

    Args:
        entity: user or team; empty for a run that was logged offline.
        project: name of the project.
        id: the run's id there.
        url: its page; empty for a run that was logged offline.
        offline: whether it waits for `wandb sync`.
        files: folder of what W&B has written, from the run's own folder where it lies inside.
        told: digest of what was told at the run's end; empty if nothing was.
    """

    entity: str
    project: str
    id: str
    url: str = ""
    offline: bool = False
    files: str = ""
    told: str = ""

    @classmethod
    def of(cls, run: "wandb.Run", folder: Path) -> Self:
        """Return where a W&B run is; `folder` is that of our run."""
        files = Path(run.dir).resolve().parent
        inside = files.is_relative_to(folder.resolve())
        return cls(
            entity=run.entity or "",
            project=run.project or "",
            id=run.id,
            # W&B warns where an offline run is asked for its address.
            url="" if run.offline else run.url or "",
            offline=run.offline,
            files=str(files.relative_to(folder.resolve()) if inside else files),
        )

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return what the file in a run's folder says; None if there is none that can be read."""
        try:
            return cls(**json.loads((folder / WANDB_FILE).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError):
            return None

    def write(self, folder: Path) -> None:
        """Write the file.

        Raises:
            OutputError: it cannot be written.
        """
        write_json(folder / WANDB_FILE, self._asdict())
