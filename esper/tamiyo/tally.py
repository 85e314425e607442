"""What a run adds up between boundaries, and its record of them."""

import math
from typing import Any

from esper.kasmina.bank import SeedBank
from esper.kasmina.writer import Moment
from esper.leyline.commands import SPREAD
from esper.leyline.events import EpochEvent
from esper.leyline.ids import SeedId
from esper.leyline.states import IN_PROGRESS
from esper.tamiyo.work import WorkTally


class Tally:
    """Mean training loss since the last boundary, and one record per boundary.

    Example:
        >>> tally = Tally()
        >>> tally.add(2.0, step=1), tally.add(4.0, step=1)
        (True, False)
        >>> tally.train_loss
        3.0
    """

    def __init__(self) -> None:
        """Start empty."""
        self.history: list[dict[str, float]] = []
        self.work = WorkTally()
        self.sum, self.count, self._last_step = 0.0, 0, -1

    def add(self, loss: float, *, step: int, samples: int = 0) -> bool:
        """Add the loss of a batch of so many samples; return whether the optimizer has made a step since the last."""
        self.sum, self.count = self.sum + loss, self.count + 1
        new, self._last_step = step != self._last_step, step
        self.work.add(samples, new_step=new)
        return new

    @property
    def train_loss(self) -> float | None:
        """The mean since the last boundary."""
        return self.sum / self.count if self.count else None

    def record(self, moment: Moment, bank: SeedBank, *, samples: int, decision_loss: float | None) -> EpochEvent:
        """Close the span that ends at a boundary: note it and return its event.

        Args:
            moment: the boundary.
            bank: seeds of the model.
            samples: samples of the decision part measured so far.
            decision_loss: loss on the decision part, if it was measured.
        """
        train_loss, added = self.train_loss, float(bank.added_parameters())
        macs = {seed: bank.records[seed].macs for seed in bank.grafted()}
        # What is spread is an investment that is judged late, not a search.
        on_trial = sum(n for seed, n in macs.items() if bank.state(seed) in IN_PROGRESS and not _spread(bank, seed))
        self.work.close(evidence=samples, living=sum(macs.values()), on_trial=on_trial)
        entry = {
            "step": float(moment.step),
            "epoch": float(moment.epoch),
            "added_params": added,
            "added_macs": float(sum(macs.values())),
            "decision_samples": float(samples),
        }
        work = {"macs": self.work.total, "search_macs": self.work.search} if self.work.host else {}
        entry |= work
        entry |= {"train_loss": train_loss} if train_loss is not None else {}
        entry |= {"decision_loss": decision_loss} if decision_loss is not None else {}
        self.history.append(entry)
        self.sum, self.count = 0.0, 0
        return EpochEvent(
            run_id=moment.run_id,
            epoch=moment.epoch,
            step=moment.step,
            train_loss=_finite(train_loss),
            validation_loss=_finite(decision_loss),
            metrics={"added_params": added} | work,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "history": [dict(entry) for entry in self.history],
            "loss": [self.sum, self.count, self._last_step],
            "work": self.work.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.history[:] = [dict(entry) for entry in state["history"]]
        self.sum, self.count, self._last_step = state["loss"]
        self.work.load_state_dict(state.get("work", {}))


def _spread(bank: SeedBank, seed: SeedId) -> bool:
    return bank.records[seed].group.startswith(SPREAD)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
