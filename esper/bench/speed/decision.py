"""What a boundary costs: the state of every seed for Tamiyo, and Tamiyo's decision.

Processor time of the training thread, on which all of it happens: on a machine of one's own that is the clock.
"""

import statistics
from collections.abc import Callable, Sequence
from time import thread_time
from typing import Final

import numpy as np
import torch
from torch import nn

from esper.bench.speed.hosts import Subject, seeded
from esper.bench.speed.line import Line
from esper.bench.speed.timing import timed
from esper.kasmina.steps import SeedStepper
from esper.kasmina.wrapper import MorphableModel
from esper.kasmina.writer import Moment
from esper.leyline.packets import SystemStatePacket
from esper.tamiyo.controller import TamiyoController

SEEDS: Final = 10_000
DECISION_MS: Final = 100.0
TELEMETRY_MS: Final = 10.0

_START, _IN_A_LAYER = 10, 100
_RUN: Final = "speed"


def many_seeds(seeds: int = SEEDS) -> Subject:
    """Return a network whose layers have room for so many seeds, a hundred or fewer in each."""
    width = min(_IN_A_LAYER, seeds)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(seeds // width)))
    batch = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    return Subject(f"{seeds // width} layers", model, lambda host, x: host(x).square().mean(), batch, batch[:1])


def decision_lines(times: int, seeds: int = SEEDS) -> list[Line]:
    """Return the time of Tamiyo's whole turn at a boundary, nothing to do and at the start of a live trial.

    Args:
        times: boundaries without anything to do, and models in which a trial is started.
        seeds: how many there are.
    """
    quiet: list[float] = []
    start: list[float] = []
    commands = 0
    for _ in range(times):
        model = _observed(many_seeds(seeds))
        controller = TamiyoController(model, {"start": _START, "budget": 0.2})
        try:
            controller.prepare(Moment(_RUN, 0, 0))
            # Closing waits for the kernels that were foreseen, as the steps until the first boundary do in a run.
            controller.store.close()
            quiet.append(_turn(controller, _packet(controller, 1))[0])
            taken, given = _turn(controller, _packet(controller, _START))
        finally:
            controller.close()
        start.append(taken)
        commands += given
    ranking = _ranking(times, seeds)
    return [
        _decision_line(f"decision, {seeds:,} seeds, nothing to do", quiet, ranking, {}),
        _decision_line(f"decision, {seeds:,} seeds, a live trial begins", start, ranking, {"commands": commands}),
    ]


def _decision_line(what: str, taken: list[float], limit: float, numbers: dict[str, int]) -> Line:
    return Line(
        what=what,
        value=1e3 * statistics.median(taken),
        unit="ms",
        target=DECISION_MS,
        limit=limit,
        of="a sort of as many numbers",
        numbers={"times": len(taken), "most_ms": 1e3 * max(taken), **numbers},
    )


def _ranking(times: int, seeds: int) -> float:
    numbers = np.random.default_rng(0).random(seeds)
    return 1e3 * statistics.median(timed(lambda: np.argsort(numbers), times))


def _turn(controller: TamiyoController, packet: SystemStatePacket) -> tuple[float, int]:
    """Return the processor seconds of one turn, and how many commands it gave."""
    began = thread_time()
    _, commands = controller.step(packet)
    return thread_time() - began, len(commands)


def _packet(controller: TamiyoController, step: int) -> SystemStatePacket:
    return controller.observe(Moment(_RUN, 0, step), validation_loss=1.0)


# --- telemetry ------------------------------------------------------------------------------------------------------


def telemetry_lines(subjects: Sequence[Callable[[], Subject]], times: int) -> list[Line]:
    """Return the time from a boundary to the packet that Tamiyo decides on, for each model."""
    return [_telemetry_line(make(), times) for make in subjects]


def _telemetry_line(subject: Subject, times: int) -> Line:
    model = _observed(subject)
    controller, stepper, taken = TamiyoController(model, {"policy": "off"}), SeedStepper(model.bank), list[float]()
    try:
        for number in range(times + 1):
            _sampled(subject, stepper)
            began = thread_time()
            packet = _packet(controller, number)
            taken.append(thread_time() - began)
    finally:
        controller.close()
    columns = [packet.health_map.column(name) for name in packet.health_map.columns]
    copying = timed(lambda: [column.copy() for column in columns], times)
    return Line(
        what=f"telemetry after a boundary, {subject.name}, {len(model.bank.rows):,} seeds",
        value=1e3 * statistics.median(taken[1:]),
        unit="ms",
        target=TELEMETRY_MS,
        limit=1e3 * statistics.median(copying),
        of="memcpy of the same numbers",
        numbers={"times": times, "most_ms": 1e3 * max(taken[1:]), "columns": len(columns)},
    )


def _observed(subject: Subject) -> MorphableModel:
    """Return a model whose seeds have been probed and sampled."""
    chunks = min(_IN_A_LAYER, subject.batch.shape[-1]) if isinstance(subject.model, nn.Sequential) else 1
    model = seeded(subject, seeds_per_layer=chunks)
    _sampled(subject, SeedStepper(model.bank))
    return model


def _sampled(subject: Subject, stepper: SeedStepper) -> None:
    """Make a training step of which the health is sampled."""
    stepper.begin(0)
    subject.model.zero_grad()
    subject.loss(subject.model, subject.batch).backward()  # type: ignore[no-untyped-call]
    stepper.observe_gradients()
    stepper.begin(1)
