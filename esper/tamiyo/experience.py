"""What grafts of earlier runs came to: beliefs about kinds and places that shrink the menu and correct the priors."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, final

import numpy as np

from esper.leyline.codec import from_json
from esper.leyline.errors import ConfigError, ContractError
from esper.leyline.reports import FieldReport
from esper.urza.signing import KeyRing
from esper.urza.store import Urza

DRAWS: Final = 32
"""Thompson draws of a trial; every kind that wins one takes part."""

_FILE, _STORE, _KEYS = "fieldreports.jsonl", "store", "keys"
_TRIAL = "trial"
_Z: Final = 1.645
_HOSTS_SD: Final = 0.01
_PRIOR_SD: Final = 0.05
_PLACE_SD: Final = 0.01


class Belief(NamedTuple):
    """A normal belief about a gain, as a fraction of the loss.

    Args:
        mean: expected gain.
        sd: standard deviation of the belief.
        n: observations that it rests on.
    """

    mean: float
    sd: float
    n: int = 0

    def told(self, gain: float, sd: float) -> "Belief":
        """Return the belief after an observation: the mean of both, weighted by precision.

        Example:
            >>> Belief(0.0, 1.0).told(1.0, 1.0).mean
            0.5
        """
        before, new = self.sd**-2, sd**-2
        precision = before + new
        return Belief((before * self.mean + new * gain) / precision, precision**-0.5, self.n + 1)


class Outcome(NamedTuple):
    """What one graft came to.

    Args:
        blueprint: its name.
        layout: axes of the place.
        kind: family of the host's module there.
        third: third of the forward pass, 0 to 2.
        gain: gain on the decision part as a fraction of the loss.
        sd: its standard error, in the same unit.
        on_trial: whether it was a proxy of a trial, all of which have about the same share of their host.
    """

    blueprint: str
    layout: str
    kind: str
    third: int
    gain: float
    sd: float
    on_trial: bool


@final
class Experience:
    """The outcomes of earlier runs, and what they make one believe.

    Beliefs are normal (Thompson, 1933; Russo et al., 2018, arXiv 1707.02038): an outcome counts with its own standard
    error and that of hosts among each other, .01 of the loss.

    Args:
        outcomes: of grafts that were measured.

    Example:
        >>> Experience().promising(["BP-GLU", "BP-WIDEN"], "btd", seed=0)
        ('BP-GLU', 'BP-WIDEN')
    """

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        """Form the beliefs about places once: they are asked for often."""
        self.outcomes = tuple(outcomes)
        self._places: dict[tuple[str, int], Belief] = {}
        for found, usual in _elsewhere(self.outcomes):
            place = found.kind, found.third
            before = self._places.get(place, Belief(0.0, _PLACE_SD))
            self._places[place] = before.told(found.gain - usual, math.hypot(found.sd, _HOSTS_SD))

    @classmethod
    def of(cls, reports: Iterable[FieldReport]) -> Self:
        """Return the outcomes of field reports; a report that was written twice counts once."""
        once = {(r.run_id, r.seed_id, r.group, r.blueprint_id): r for r in reports}
        return cls(found for report in once.values() if (found := _outcome(report)) is not None)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Return the outcomes of a file of field reports, of the runs in a folder, or of a forge's store.

        Raises:
            ConfigError: nothing is there, or it cannot be read.
        """
        return cls.of(_reports(Path(path)))

    def kind(self, blueprint: str, layout: str, prior: float = 0.0) -> Belief:
        """Return the belief about a kind on trial, as a fraction of the loss.

        Args:
            blueprint: the kind.
            layout: axes of the place.
            prior: expected gain before anything was seen.
        """
        belief = Belief(prior, _PRIOR_SD)
        for found in self.outcomes:
            if found.on_trial and (found.blueprint, found.layout) == (blueprint, layout):
                belief = belief.told(found.gain, math.hypot(found.sd, _HOSTS_SD))
        return belief

    def place(self, kind: str, depth: float) -> float:
        """Return how much more a graft gains at such a place than its kind does elsewhere, as a fraction of the loss.

        Args:
            kind: family of the host's module.
            depth: relative place in the forward pass, 0 to 1.
        """
        found = self._places.get((kind, _third(depth)))
        return found.mean if found is not None else 0.0

    def promising(
        self, names: Sequence[str], layout: str, *, seed: int, priors: Sequence[float] = ()
    ) -> tuple[str, ...]:
        """Return the kinds that a trial should have, in the menu's order.

        Kinds never seen on trial take part. Of the others those that win at least one of 32 Thompson draws, so that a
        menu shrinks as fast as the evidence allows, and no kind is given up for good while it may yet be the best.

        Args:
            names: the menu.
            layout: axes of the place.
            seed: of the draws.
            priors: expected gains before anything was seen; none are 0.
        """
        known = list(priors) or [0.0] * len(names)
        beliefs = [self.kind(name, layout, prior) for name, prior in zip(names, known, strict=True)]
        seen = [i for i, belief in enumerate(beliefs) if belief.n]
        if not seen:
            return tuple(names)
        means, sds = np.array([[beliefs[i].mean, beliefs[i].sd] for i in seen]).T
        draws = np.random.default_rng(seed).normal(means, sds, size=(DRAWS, len(seen)))
        winners = {seen[i] for i in draws.argmax(axis=1).tolist()}
        return tuple(name for i, name in enumerate(names) if i in winners or not beliefs[i].n)

    def plain(self) -> list[list[Any]]:
        """Return plain data."""
        return [list(outcome) for outcome in self.outcomes]

    @classmethod
    def from_plain(cls, data: Iterable[Sequence[Any]]) -> Self:
        """Take back what `plain` returned."""
        return cls(Outcome(*outcome) for outcome in data)


def _elsewhere(outcomes: Sequence[Outcome]) -> Iterator[tuple[Outcome, float]]:
    """Yield each outcome whose kind was also seen at other places, with what it gains there on average."""
    gains: defaultdict[tuple[Hashable, ...], list[float]] = defaultdict(list)
    for o in outcomes:
        gains[_same(o)].append(o.gain)
        gains[*_same(o), o.kind, o.third].append(o.gain)
    sums = {key: (math.fsum(found), len(found)) for key, found in gains.items()}
    for o in outcomes:
        total, n = sums[_same(o)]
        here, m = sums[*_same(o), o.kind, o.third]
        if n > m:
            yield o, (total - here) / (n - m)


def _same(outcome: Outcome) -> tuple[Hashable, ...]:
    return outcome.blueprint, outcome.layout, outcome.on_trial


def _third(depth: float) -> int:
    return min(2, int(3 * depth))


def _outcome(report: FieldReport) -> Outcome | None:
    found, loss = report.counterfactual, report.post_metric
    if found is None or not loss or not all(map(math.isfinite, (found.mean, found.lower, found.upper, loss))):
        return None
    return Outcome(
        blueprint=report.blueprint_id,
        layout=report.site.layout,
        kind=report.site_kind,
        third=_third(report.site.depth),
        gain=found.mean / abs(loss),
        sd=(found.upper - found.lower) / 2 / _Z / abs(loss),
        on_trial=report.group.startswith(_TRIAL),
    )


def _reports(path: Path) -> Iterator[FieldReport]:
    if (path / _STORE).is_dir() and (path / _KEYS).is_dir():
        urza = Urza(path / _STORE, KeyRing.public_only(path / _KEYS))
        try:
            yield from (kept.report for kept in urza.reports())
        finally:
            urza.close()
    elif path.is_dir():
        for file in sorted(path.rglob(_FILE)):
            yield from _lines(file)
    elif path.is_file():
        yield from _lines(path)
    else:
        raise ConfigError(
            f"experience={str(path)!r} is not there; give a {_FILE}, a folder of runs, the folder of a forge, or null."
        )


def _lines(file: Path) -> Iterator[FieldReport]:
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield from_json(FieldReport, line)
        except ContractError as error:
            if number < len(lines):  # the last line of a run that was killed may be torn
                raise ConfigError(f"{file}, line {number}, is no field report: {error} Mend the file.") from error
