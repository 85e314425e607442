"""The rows of a bench beside each other: what each arm came to, and what it gains on the others."""

import math
from collections import Counter
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from esper.bench.arms import ARMS, GROWN, OFF, WIDE
from esper.bench.estimate import Estimate
from esper.bench.rows import Row


@dataclass(frozen=True)
class Results:
    """What was made of an experiment.

    Args:
        experiment: its name.
        rows: by arm and seed.
        failed: why a row is missing, by arm and seed.
        wide: what the static wide net is, for people.
    """

    experiment: str
    rows: dict[tuple[str, int], Row] = field(default_factory=dict)
    failed: dict[tuple[str, int], str] = field(default_factory=dict)
    wide: str = ""

    @property
    def arms(self) -> list[str]:
        """Arms that have a row, in the order of the tables."""
        return [arm for arm in ARMS if self.of(arm)]

    def of(self, arm: str) -> dict[int, Row]:
        """Return the rows of an arm by seed."""
        return {seed: row for (name, seed), row in sorted(self.rows.items()) if name == arm}

    @property
    def reference(self) -> str | None:
        """Arm that the others are compared with: the wide net at equal compute, else the host alone; None for none."""
        return next((arm for arm in (WIDE, OFF) if self.of(arm)), None)

    def loss(self, arm: str) -> Estimate:
        """Return the report loss of an arm."""
        return Estimate.of([_loss(row) for row in self.of(arm).values()])

    def accuracy(self, arm: str) -> Estimate | None:
        """Return the accuracy of an arm on the report part; None if it has none."""
        found = [row["report_accuracy"] for row in self.of(arm).values()]
        return Estimate.of(found) if found and None not in found else None

    def gains(self, arm: str, reference: str) -> dict[int, float]:
        """Return by how much an arm's report loss is lower than that of another arm of the same seed."""
        other = self.of(reference)
        return {seed: _loss(other[seed]) - _loss(row) for seed, row in self.of(arm).items() if seed in other}

    def gain(self, arm: str, reference: str | None) -> Estimate | None:
        """Return the mean of `gains`; None for an arm and itself, and where no seed has both."""
        found = self.gains(arm, reference) if reference is not None and reference != arm else {}
        return Estimate.of(list(found.values())) if found else None

    def compute(self, arm: str) -> float:
        """Return the training work of an arm, as a ratio to that of the heuristic run of the same seed."""
        grown = self.of(GROWN)
        found = [row["train_macs"] / grown[seed]["train_macs"] for seed, row in self.of(arm).items() if seed in grown]
        return fmean(found) if found else math.nan

    def mean(self, arm: str, what: str) -> float:
        """Return the mean of a number over the rows of an arm; not a number where a row has none."""
        found = [row[what] for row in self.of(arm).values()]
        return fmean(found) if found and None not in found else math.nan

    def kept(self, arm: str) -> str:
        """Return what was kept, and in how many runs."""
        if not ARMS[arm].grows:
            return ""
        runs = Counter(kind for row in self.of(arm).values() for kind in set(row["kept"]))
        told = [f"{kind.removeprefix('BP-')} {count}" for kind, count in runs.most_common()]
        return ", ".join(told) or "nothing"

    def as_off(self, arm: str) -> list[int]:
        """Return the seeds whose run of an arm is that of `off`, because there was nothing to plant."""
        off = self.of(OFF)
        return [s for s, row in self.of(arm).items() if arm != OFF and s in off and row["key"] == off[s]["key"]]

    def plain(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "format": 1,
            "experiment": self.experiment,
            "reference": self.reference,
            "wide": self.wide,
            "arms": {arm: self._arm(arm) for arm in self.arms},
            "failed": [{"arm": a, "seed": s, "why": why} for (a, s), why in sorted(self.failed.items())],
            "rows": [row for _, row in sorted(self.rows.items())],
        }

    def _arm(self, arm: str) -> dict[str, Any]:
        gains = {name: self.gain(arm, name) for name in (WIDE, OFF)}
        accuracy = self.accuracy(arm)
        return {
            "about": ARMS[arm].about,
            "seeds": list(self.of(arm)),
            "report_loss": self.loss(arm)._asdict(),
            "report_accuracy": accuracy._asdict() if accuracy else None,
            "gain_on": {name: found._asdict() for name, found in gains.items() if found},
            "compute": self.compute(arm),
            "as_off": self.as_off(arm),
        }


def _loss(row: Row) -> float:
    return math.nan if row["report_loss"] is None else float(row["report_loss"])
