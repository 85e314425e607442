"""Tells the W&B runs of a training run what came of it, and ends them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from esper.leyline.errors import EsperError
from esper.nissa.page.runs import Run, read_run
from esper.nissa.wandb import content
from esper.nissa.wandb.place import Place

if TYPE_CHECKING:
    import wandb

WITHOUT = ", without growth"
"""Ends the name of a twin in W&B."""

_TOLD = ("events.jsonl", "growth.json", "report.json", "lineage.json", "twin/growth.json", "twin/report.json")
"""Files that differ wherever there is something new to tell."""


@final
class WandbEnd:
    """Ends the W&B runs of some loggers when its block ends; they are told what came of the run unless that failed.

    W&B never ends or loses a run: what it does not take is named in one warning.

    Args:
        loggers: of the trainer; others than `WandbLogger` are left alone.
        folder: the run's.
    """

    def __init__(self, loggers: Sequence[Logger], folder: str | Path) -> None:
        """Nothing has ended yet."""
        self._loggers = [logger for logger in loggers if isinstance(logger, WandbLogger)]
        self._folder = Path(folder)
        self._trained = False

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Tell, and end."""
        self._end(self._loggers, well=self._trained or kind is None)

    def make_way(self) -> None:
        """End what W&B would write the twin into; the run itself has gone well, whatever becomes of its twin."""
        self._trained = True
        if self._loggers:
            import wandb

            self._end([logger for logger in self._loggers if logger.experiment is wandb.run], well=True)

    def _end(self, loggers: Sequence[WandbLogger], *, well: bool) -> None:
        self._loggers = [logger for logger in self._loggers if logger not in loggers]
        missed = [what for logger in loggers for what in _ended(logger, self._folder, well=well)]
        if missed:
            rank_zero_warn(f"Esper: W&B did not take {'; '.join(missed)}. The run's folder has everything.")


def _ended(logger: WandbLogger, folder: Path, *, well: bool) -> list[str]:
    """Tell one W&B run if all went well, end it, and return what it did not take."""
    missed: list[str] = []
    failed = _tried("what came of the run", lambda: missed.extend(_told(logger, folder))) if well else []
    return [*missed, *failed, *_tried("its last part", lambda: logger.experiment.finish())]


def _told(logger: WandbLogger, folder: Path) -> list[str]:
    import wandb

    run = logger.experiment
    return tell(run, folder) if isinstance(run, wandb.Run) and not run.disabled else []


def tell(run: "wandb.Run", folder: Path) -> list[str]:
    """Log what came of a run, once; return what could not be logged, in words.

    Args:
        run: the W&B run, not ended.
        folder: of our run.

    Raises:
        EsperError: the folder is no run's, or cannot be written.
    """
    place, digest = Place.of(run, folder), _digest(folder)
    if Place.read(folder) == place._replace(told=digest):
        return []
    place.write(folder)
    story = read_run(folder)
    if folder.name == "twin" and run.name and not run.name.endswith(WITHOUT):
        run.name += WITHOUT
    missed = [*_log(run, story), *_tried("the summary", lambda: run.summary.update(content.numbers(story)))]
    missed += _tried("the model", lambda: run.log_artifact(content.model(story, run.id)))
    if not missed:
        place._replace(told=digest).write(folder)
    return missed


def _log(run: "wandb.Run", story: Run) -> list[str]:
    """Log tables, charts, picture and page at one step."""
    made: dict[str, Any] = {}
    missed: list[str] = []
    for key, maker in content.parts(story).items():
        missed += _tried(key, lambda key=key, maker=maker: made.update({key: maker()}))
    shown = {key: part for key, part in made.items() if part is not None}
    step = {"trainer/global_step": story.chronicle.steps}
    return missed + _tried(", ".join(shown), lambda: run.log(shown | step))


def _tried(what: str, action: Any) -> list[str]:
    """Do something with W&B; return what it was, and why it failed, if it did."""
    try:
        action()
    except Exception as error:
        return [f"{what} ({_words(error)})"]
    return []


def _words(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, EsperError) else f"{type(error).__name__}: {text}"


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for name in _TOLD:
        file = folder / name
        found.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return found.hexdigest()
