"""`live.json`: what a run is doing, written twice a second beside its journal for whoever looks on."""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, final

from pydantic import ValidationError

from esper.leyline.base import Record
from esper.nissa.curve import LossCurve

FILE: Final = "live.json"
EVERY_S: Final = 0.5
"""Least time between two writes, in seconds."""

_SPEED_BEATS = 20
_RECENT = 20
"""Training steps whose mean loss is told."""

_log = logging.getLogger(__name__)


class Live(Record):
    """What a run was doing when it last wrote.

    Args:
        run_id: the run.
        title: its name.
        policy: name of its policy.
        host_params: parameters before growth.
        total_steps: training steps that it is to take; None if no number is set.
        state: `running`; `ended`, with everything written; or `stopped` by an interrupt or an error.
        detail: what stopped it, in one line.
        epoch: epoch, from 0.
        step: training steps done.
        steps_per_s: speed over the last seconds; None before the second write.
        train_loss: mean of the last training losses; None before the first.
        alphas: share in the layer's output of each child that is not fully blended in, by seed id.
        began: when the run began, or was resumed, in seconds since the Unix epoch; 0 if unknown.
        time: when this was written, the same.
    """

    run_id: str
    title: str = ""
    policy: str = ""
    host_params: int = 0
    total_steps: int | None = None
    state: Literal["running", "ended", "stopped"] = "running"
    detail: str = ""
    epoch: int = 0
    step: int = 0
    steps_per_s: float | None = None
    train_loss: float | None = None
    alphas: dict[str, float] = {}
    began: float = 0.0
    time: float = 0.0


def read_live(text: bytes) -> Live | None:
    """Return what a run wrote; None for nothing, or for what this release cannot read.

    Example:
        >>> read_live(b'{"run_id": "r", "step": 5}').step
        5
        >>> read_live(b"{") is None
        True
    """
    try:
        return Live.model_validate_json(text)
    except ValidationError:
        return None


@final
class Pulse:
    """Writes `live.json` into a run's folder; a run goes on without it where that fails.

    Args:
        folder: the run's.
        live: what does not change, and where the run begins.
    """

    def __init__(self, folder: Path, live: Live) -> None:
        """Say that the run has begun."""
        self._file, self._live = folder / FILE, live
        self._beats: deque[tuple[float, int]] = deque(maxlen=_SPEED_BEATS)
        self._due = 0.0
        self._write({"began": time.time()})

    def beat(self, step: int, epoch: int, alphas: Mapping[str, float], losses: LossCurve) -> None:
        """Write if it is time to; call it at every step.

        Args:
            step: training steps done.
            epoch: epoch, from 0.
            alphas: share of every child there is.
            losses: training losses so far.
        """
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + EVERY_S
        self._beats.append((now, step))
        told = {
            "step": step,
            "epoch": epoch,
            "steps_per_s": self._speed(),
            "train_loss": _recent(losses),
            "alphas": {seed: alpha for seed, alpha in alphas.items() if alpha < 1.0},
        }
        self._write(told)

    def end(self, state: Literal["ended", "stopped"], step: int, losses: LossCurve, detail: str = "") -> None:
        """Say that the run is over; nothing is written after that."""
        if self._live.state == "running":
            told = {"state": state, "detail": detail, "step": step, "train_loss": _recent(losses)}
            self._write(told)

    def _speed(self) -> float | None:
        (began, first), (now, last) = self._beats[0], self._beats[-1]
        return (last - first) / (now - began) if now > began else None

    def _write(self, told: Mapping[str, object]) -> None:
        self._live = self._live.model_copy(update={**told, "time": time.time()})
        part = self._file.with_name(f".{FILE}.{os.getpid()}")
        try:
            # Not made durable: that could hold a training step up, and the next write comes soon.
            part.write_text(self._live.model_dump_json() + "\n", encoding="utf-8")
            part.replace(self._file)
        except OSError as error:
            _log.warning("%s cannot be written, so nobody can watch the run live: %s", self._file, error)
            self._due = math.inf


def _recent(losses: LossCurve) -> float | None:
    points = losses.points[-max(1, _RECENT // losses.stride) :]
    mean = sum(loss for _, loss in points) / len(points) if points else math.nan
    return mean if math.isfinite(mean) else None
