"""Follows a run: takes in what its files say anew, and tells where the run stands."""

import json
from typing import Any, NamedTuple, final

from esper.leyline.codec import REGISTRY, from_json
from esper.leyline.errors import BusError, ContractError
from esper.leyline.events import RunEvent
from esper.leyline.reports import FieldReport
from esper.nissa.chronicle import Chronicle
from esper.nissa.folder import add_summary, chronicle_of
from esper.nissa.watch import live
from esper.nissa.watch.live import Live, read_live
from esper.nissa.watch.source import EVENTS, REPORTS, SUMMARY, Listing, Mark, Source, Tail, read_whole


class Sight(NamedTuple):
    """Where a run stands, as far as is known.

    Args:
        name: what is watched, for people.
        chronicle: what was heard of the run.
        live: what it was doing when it last said so; None for a run that says nothing.
        title: its name; empty if it has none.
        silence_s: time since it last said something, in seconds.
        over: whether it has ended, or was stopped.
        damaged: lines that cannot be read.
        problem: why nothing newer is known; empty if nothing is in the way.
    """

    name: str
    chronicle: Chronicle = Chronicle()
    live: Live | None = None
    title: str = ""
    silence_s: float = 0.0
    over: bool = False
    damaged: int = 0
    problem: str = ""

    @property
    def begun(self) -> bool:
        """Whether the run has said anything yet."""
        return self.live is not None or bool(self.chronicle.messages)

    @property
    def step(self) -> int:
        """Training steps done."""
        return max(self.chronicle.steps, self.live.step if self.live is not None else 0)


@final
class Follower:
    """Looks at a run as often as it is asked to, and reads only what is new.

    Args:
        source: the run's files.
    """

    def __init__(self, source: Source) -> None:
        """Know nothing yet."""
        self._source = source
        self._tails = {file: Tail(source, file) for file in (EVENTS, REPORTS)}
        self._told: dict[str, list[RunEvent | FieldReport]] = {file: [] for file in self._tails}
        self._damaged = dict.fromkeys(self._tails, 0)
        self._marks: dict[str, Mark | None] = {}
        self._live: Live | None = None
        self._summary: dict[str, Any] = {}
        self._sight = Sight(source.name, Chronicle())

    def look(self) -> Sight:
        """Return where the run stands now; while nobody answers, where it stood, and the problem."""
        try:
            listing = self._source.look()
            heard = [self._take_in(file, listing) for file in self._tails]
            said, ended = self._read_live(listing), self._read_summary(listing)
        except BusError as error:
            self._sight = self._sight._replace(problem=str(error))
            return self._sight
        if said or ended or any(heard) or self._sight.problem:
            self._sight = self._tell(anew=ended or any(heard) or bool(self._sight.problem))
        self._sight = self._sight._replace(silence_s=self._silence(listing))
        return self._sight

    def _take_in(self, file: str, listing: Listing) -> bool:
        tail, told = self._tails[file], self._told[file]
        lines = tail.read(listing)
        if tail.restarted:
            told.clear()
            self._damaged[file] = 0
        for line in lines:
            try:
                message = from_json(REGISTRY, line)
            except ContractError:
                self._damaged[file] += 1
                continue
            if isinstance(message, RunEvent | FieldReport):
                told.append(message)
        return bool(lines) or tail.restarted

    def _changed(self, file: str, listing: Listing) -> Mark | None:
        """Return the mark of a file that is not what it was."""
        mark = listing.files.get(file)
        return mark if mark != self._marks.get(file) else None

    def _read_live(self, listing: Listing) -> bool:
        mark = self._changed(live.FILE, listing)
        found = read_live(read_whole(self._source, live.FILE, mark.size)) if mark is not None else None
        if found is None:
            return False
        self._live, self._marks[live.FILE] = found, mark
        return True

    def _read_summary(self, listing: Listing) -> bool:
        """Read the summary of a run that is over; that of a running one is of an earlier part of it."""
        mark = self._changed(SUMMARY, listing)
        if mark is None or self._running():
            return False
        try:
            found = json.loads(read_whole(self._source, SUMMARY, mark.size))
        except ValueError:  # It is being written.
            return False
        self._summary, self._marks[SUMMARY] = found if isinstance(found, dict) else {}, mark
        return True

    def _running(self) -> bool:
        return self._live is not None and self._live.state == "running"

    def _silence(self, listing: Listing) -> float:
        return max(0.0, listing.clock - self._live.time) if self._live is not None else 0.0

    def _tell(self, anew: bool) -> Sight:
        """Return where the run stands; unless told anew, what was heard of the same run is as it was."""
        events = [m for m in self._told[EVENTS] if isinstance(m, RunEvent)]
        last, said = events[-1].run_id if events else None, self._live
        # A run that has just begun has no event yet; one that writes none of this has no `live.json`.
        if said is not None and said.run_id != last and said.state != "running" and last is not None:
            said = None
        chronicle, run_id = self._sight.chronicle, said.run_id if said is not None else last
        if anew or chronicle.run_id != run_id:
            reports = [m for m in self._told[REPORTS] if isinstance(m, FieldReport)]
            chronicle = chronicle_of(events, reports, run_id)
        over = said is not None and said.state != "running"
        if said is not None:
            chronicle.policy, chronicle.host_params = said.policy, said.host_params
        if not self._running() and self._summary.get("run_id") == chronicle.run_id:
            add_summary(chronicle, self._summary)
            over = True
        title = said.title if said is not None else str(self._summary.get("title") or "") if over else ""
        damaged = sum(self._damaged.values())
        return Sight(self._source.name, chronicle, said, title, over=over, damaged=damaged)
