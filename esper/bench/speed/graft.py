"""What the first step with a new child takes, and whether the compiler makes the host anew."""

import statistics
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from torch import nn
from torch._dynamo.utils import counters

from esper.bench.speed.hosts import Subject, seeded
from esper.bench.speed.line import Line
from esper.bench.speed.timing import seconds
from esper.kasmina.kernels import KernelRequest
from esper.kasmina.library_store import LibraryKernelStore
from esper.kasmina.wrapper import MorphableModel
from esper.kasmina.writer import Moment, SeedWriter
from esper.leyline.commands import KasminaControlCommand
from esper.leyline.errors import KernelError
from esper.leyline.ids import SeedId
from esper.leyline.states import SeedCommand

BUDGET: Final = 1.2
"""Most that the first step with a child may take of a steady one."""

KIND: Final = "BP-CONV-CAUSAL"
STREAM: Final = ("*.after_attn", "*.after_ffn")
PLACE: Final = "blocks.0.after_attn"
_STEADY, _WARM_UP, _PATIENCE_S = 5, 2, 60.0
Step = Callable[[], None]


class Grafts(NamedTuple):
    """What some grafts showed.

    Args:
        first: the first step with each child over the mean of its steady steps, the graft itself included.
        bare: as many steps without a graft over the mean of the steady steps after them.
        recompiled: graphs that the compiler made meanwhile.
        steady_ms: median of the steady steps, in milliseconds of processor time.
    """

    first: list[float]
    bare: list[float]
    recompiled: int
    steady_ms: float


def grafts(model: MorphableModel, step: Step, count: int, place: str = PLACE) -> Grafts:
    """Graft so many children, one after the other, and cull each again.

    Raises:
        KernelError: the kernel did not come.
    """
    store = LibraryKernelStore()
    writer = SeedWriter(model.bank, store, lambda event: None)
    found = Grafts([], [], 0, 0.0)
    steady: list[float] = []
    try:
        _several(step, _WARM_UP + 1)
        before = _graphs()
        for number in range(count):
            _once(writer, step, SeedId(place, 0, number), found, steady)
    finally:
        store.close()
    return found._replace(recompiled=_graphs() - before, steady_ms=1e3 * statistics.median(steady))


def _once(writer: SeedWriter, step: Step, seed: SeedId, found: Grafts, steady: list[float]) -> None:
    _apply(writer, SeedCommand.GERMINATE, seed)
    _apply(writer, SeedCommand.LOAD, seed)
    _wait(writer.store, writer.request(seed))
    _several(step, _WARM_UP)
    alone = seconds(step)
    found.bare.append(alone / _several(step, _STEADY))
    first = seconds(lambda: _first(writer, seed, step))
    steady.append(_several(step, _STEADY))
    found.first.append(first / steady[-1])
    _apply(writer, SeedCommand.CULL, seed)


def _several(step: Step, times: int) -> float:
    """Return the mean processor time of some steps, in seconds."""
    return sum(seconds(step) for _ in range(times)) / times


def _graphs() -> int:
    """Return how many graphs were compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def _wait(store: object, request: KernelRequest) -> None:
    assert isinstance(store, LibraryKernelStore)
    deadline = time.monotonic() + _PATIENCE_S
    while store.poll(request) is None:
        if time.monotonic() > deadline:
            raise KernelError(f"the kernel of {request.blueprint} did not come in {_PATIENCE_S:.0f} s.")
        time.sleep(0.001)


def _first(writer: SeedWriter, seed: SeedId, step: Step) -> None:
    _graft(writer, seed)
    step()


def _graft(writer: SeedWriter, seed: SeedId) -> None:
    _apply(writer, SeedCommand.GRAFT, seed)
    graft = writer.bank.graft(seed)
    assert graft is not None
    graft.set_alpha(0.05)
    writer.bank.layer(seed.layer).refresh()


def _apply(writer: SeedWriter, verb: SeedCommand, seed: SeedId) -> None:
    command = KasminaControlCommand(
        command=verb,
        target_layer_id=seed.layer,
        target_seed_id=str(seed),
        blueprint_id=KIND if verb is SeedCommand.GERMINATE else "",
    )
    writer.apply([command], Moment("speed", 0, 0))


def lines(make: Callable[[], Subject], count: int) -> list[Line]:
    """Return the graft step in an eager host, and in one whose blocks are compiled, and how often that was made anew.

    The compiler's own code generation is left out, because what makes it begin again is decided before: the blocks are
    traced and guarded as for any compiled host.
    """
    lines, before = [], _graphs()
    for how in ("eager", "compiled"):
        subject = make()
        if how == "compiled":
            compile_blocks(subject.model)
        found = grafts(seeded(subject, targets=list(STREAM)), step_of(subject), count)
        lines.append(_graft_line(found, how))
    recompiled = Line(
        what=f"recompiles of the host in {count} grafts",
        value=found.recompiled,
        unit="",
        target=0.0,
        limit=0.0,
        of="no graft",
        numbers={"graphs": _graphs() - before},
    )
    return [*lines, recompiled]


def _graft_line(found: Grafts, how: str) -> Line:
    return Line(
        what=f"first step with a child over steady, {how} host, steady {found.steady_ms:.0f} ms",
        value=statistics.median(found.first),
        unit="x",
        target=BUDGET,
        limit=statistics.median(found.bare),
        of="a step without a graft",
        numbers={"first": found.first, "bare": found.bare, "steady_ms": found.steady_ms},
    )


def step_of(subject: Subject) -> Step:
    """Return a training step without an optimizer: forward and backward."""

    def step() -> None:
        subject.model.zero_grad()
        subject.loss(subject.model, subject.batch).backward()  # type: ignore[no-untyped-call]

    return step


def compile_blocks(host: nn.Module, backend: str = "eager") -> None:
    """Compile every block of a host.

    Args:
        host: has `blocks`.
        backend: of torch.compile; `eager` traces and guards as any other does, and generates no code.
    """
    blocks = host.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        block.compile(backend=backend)
