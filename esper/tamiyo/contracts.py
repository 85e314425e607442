"""What a policy sees and what it says. Pure data; no model, no trainer."""

from typing import NamedTuple

from esper.blueprints import SiteShape
from esper.leyline.commands import KasminaControlCommand
from esper.leyline.events import Candidate
from esper.leyline.packets import SystemStatePacket
from esper.leyline.reports import FieldReport
from esper.leyline.states import IN_PROGRESS, SeedState
from esper.tamiyo.experience import Experience
from esper.tamiyo.work import Work

_NONE = Experience()


class SeedStatus(NamedTuple):
    """One adaptation as the controller sees it.

    Args:
        seed_id: `layer#chunk.slot`.
        state: state in the life cycle.
        ready: whether its stage has done its work.
        blueprint: what grows, or empty.
        group: trial that it belongs to, or empty.
        params: parameters of the child.
        macs: its multiply-accumulates per sample.
        latency_ms: its forward time of 8 samples, in milliseconds.
        memory_mb: its memory in training, in MiB.
        trainable: whether the child has weights that learn.
        fault: what its kernel did wrong, or empty.
    """

    seed_id: str
    state: SeedState
    ready: bool
    blueprint: str = ""
    group: str = ""
    params: int = 0
    macs: int = 0
    latency_ms: float = 0.0
    memory_mb: float = 0.0
    trainable: bool = True
    fault: str = ""


class Site(NamedTuple):
    """A place where something may grow.

    Args:
        path: module path.
        chunk: chunk of the feature dimension.
        slot: first free slot.
        shape: what a child must fit.
        depth: relative place in the forward pass, 0 to 1.
        same_grid: whether the site's input has the positions of its output.
        closed: blueprints that failed here and are under embargo.
    """

    path: str
    chunk: int
    slot: int
    shape: SiteShape
    depth: float
    same_grid: bool
    closed: frozenset[str] = frozenset()


class Observation(NamedTuple):
    """Everything that a decision may depend on.

    Args:
        packet: state of the system, with the evidence taken at this boundary.
        seeds: every seed that is not dormant.
        sites: places that may take another child, in module order.
        reports: field reports of the life cycles that ended in this run.
        total_steps: length of the run in training steps.
        host_params: parameters of the host.
        losses: decision losses at the boundaries so far, oldest first.
        work: what was worked so far, and by what sizes.
        experience: what grafts of earlier runs came to.
        paused: whether germination is paused.
        final: whether the run ends here.
    """

    packet: SystemStatePacket
    seeds: tuple[SeedStatus, ...]
    sites: tuple[Site, ...]
    reports: tuple[FieldReport, ...]
    total_steps: int
    host_params: int
    losses: tuple[float, ...] = ()
    work: Work = Work()
    experience: Experience = _NONE
    paused: bool = False
    final: bool = False

    @property
    def step(self) -> int:
        """Training steps done."""
        return self.packet.global_step

    @property
    def busy(self) -> bool:
        """Whether an adaptation is under way."""
        return any(seed.state in IN_PROGRESS for seed in self.seeds)


class Decision(NamedTuple):
    """Commands and why.

    Args:
        commands: what to do, in any order.
        explanation: one sentence per decision.
        candidates: what was weighed.
    """

    commands: tuple[KasminaControlCommand, ...] = ()
    explanation: str = ""
    candidates: tuple[Candidate, ...] = ()
