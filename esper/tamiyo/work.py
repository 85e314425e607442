"""The work of a run, in multiply-accumulates: what training takes, and what the search for something better takes."""

from collections.abc import Iterable
from typing import Any, NamedTuple

_STEP: int = 3
"""Forwards that a training step costs: itself, and twice as much backward."""


class Work(NamedTuple):
    """What was worked so far, and by what sizes.

    Args:
        host: multiply-accumulates of the host for one sample; 0 while they are not known.
        batch: samples of one training step, on average.
        total: multiply-accumulates so far, of training and of search.
        search: those of the search alone: children on trial, and the passes that judge them.
        trial_steps: training steps from a germination to the judgement.
        judged_on: samples that one measurement of a judgement takes.
    """

    host: float = 0.0
    batch: float = 0.0
    total: float = 0.0
    search: float = 0.0
    trial_steps: int = 0
    judged_on: int = 0

    @property
    def known(self) -> bool:
        """Whether a trial's price can be told."""
        return self.host > 0 and self.batch > 0

    @property
    def overhead(self) -> float:
        """The search's share of the training so far: its work divided by all other work."""
        return self.search / (self.total - self.search) if self.total > self.search else 0.0

    def trial(self, children: Iterable[int]) -> float:
        """Return the work of a trial whose children have so many multiply-accumulates per sample.

        Each is trained with the host, and then taken away once for the judgement.

        Example:
            >>> Work(host=100, batch=8, trial_steps=10, judged_on=4).trial([10])
            3280
        """
        macs = list(children)
        training = _STEP * self.batch * self.trial_steps * sum(macs)
        return training + (len(macs) + 1) * self.judged_on * (self.host + sum(macs))

    def left(self, fraction: float, total_steps: int) -> float:
        """Return the work that the search may still take in a run of so many steps."""
        return fraction * _STEP * self.batch * self.host * total_steps - self.search


class WorkTally:
    """Adds up the work of a run between boundaries.

    Example:
        >>> tally = WorkTally()
        >>> tally.host = 100.0
        >>> tally.add(8, new_step=True)
        >>> tally.close(evidence=4, living=0, on_trial=0)
        >>> tally.total, tally.search
        (2800.0, 400.0)
    """

    def __init__(self) -> None:
        """Start at nothing."""
        self.host, self.total, self.search = 0.0, 0.0, 0.0
        self.samples, self.steps = 0, 0
        self._open, self._evidence, self._living, self._on_trial = 0, 0, 0.0, 0.0

    def add(self, samples: int, *, new_step: bool) -> None:
        """Count a batch of training, which may be one of several of a step."""
        self.samples, self.steps, self._open = self.samples + samples, self.steps + new_step, self._open + samples

    def close(self, *, evidence: int, living: float, on_trial: float) -> None:
        """Account for the span that ends at a boundary.

        Args:
            evidence: samples of the decision part measured so far in the run.
            living: multiply-accumulates per sample of all children from here on.
            on_trial: those of the children that are not kept yet.
        """
        judged = (evidence - self._evidence) * (self.host + self._living)
        search = judged + _STEP * self._open * self._on_trial
        kept = _STEP * self._open * (self.host + self._living - self._on_trial)
        if self.host:
            self.total, self.search = self.total + kept + search, self.search + search
        self._open, self._evidence, self._living, self._on_trial = 0, evidence, living, on_trial

    def work(self, *, trial_steps: int, judged_on: int) -> Work:
        """Return the account."""
        batch = self.samples / self.steps if self.steps else 0.0
        return Work(self.host, batch, self.total, self.search, trial_steps, judged_on)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        vars(self).update(state)
