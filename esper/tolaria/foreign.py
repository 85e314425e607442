"""Training loaders that cannot be put back into the middle of an epoch: what that means is said, once."""

import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

_LIGHTNINGS_OWN = "You're resuming from a checkpoint that ended before the epoch ended"


def cannot_resume(loader: Any) -> bool:
    """Return whether a loader lacks the two methods by which its place is saved and restored.

    Example:
        >>> cannot_resume([1, 2, 3])
        True
    """
    return not all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def warn_of_foreign_loaders(trainer: Trainer) -> None:
    """Say what will differ after a resume inside an epoch, and what to do; silent where nothing will."""
    fit = trainer.fit_loop
    loader, done = fit._combined_loader, fit.epoch_loop.batch_progress.current.ready
    if loader is None or done >= fit.max_batches or done == 0:
        return
    foreign = [source for source in loader.flattened if cannot_resume(source)]
    if foreign:
        # Lightning's own warning would follow, and says less.
        warnings.filterwarnings("ignore", message=_LIGHTNINGS_OWN)
        kinds = ", ".join(sorted({type(source).__name__ for source in foreign}))
        rank_zero_warn(
            f"Esper: the training loader ({kinds}) cannot be put back to where the checkpoint was written, after "
            f"{done} batches of its epoch. The rest of the epoch will read from the beginning of a new pass: some "
            "samples come twice, others not at all, and the losses differ from those of an uninterrupted run; weights, "
            "optimizer and growth go on as saved. Give the loader state_dict() and load_state_dict(), as "
            "esper.data.SeededLoader and torchdata's StatefulDataLoader have, or resume from the end of an epoch."
        )
    elif fit._data_fetcher is not None and fit._data_fetcher.length is None:
        rank_zero_warn(
            "Esper: the training loader has no length, so Lightning reads one batch ahead of training; that batch is "
            "not trained on after a resume. Give the loader a __len__, or resume from the end of an epoch."
        )
