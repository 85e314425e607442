"""What a run came to: its grafts, its losses, and whether growth earned its place."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from esper.files import replacing
from esper.nissa.chronicle import Chronicle, Life
from esper.nissa.paired import MIN_SAMPLES, Interval, paired_interval

REPORT_FILE = "report.json"
"""In a run's folder: its loss on the report part, and that of each sample, for a paired comparison later."""


@dataclass(frozen=True)
class GraftLine:
    """One adaptation in one line.

    Args:
        seed_id: `layer#chunk.slot`.
        blueprint: what grew.
        group: trial that it belonged to, or empty.
        params: its parameters.
        born: training step of its germination.
        ended: training step at which its life ended; None while it goes on.
        outcome: final state, or the present one.
        reason: why it ended so, or empty.
        gain: measured gain in decision loss; None when it was never evaluated.
        lower: lower bound of the gain.
        upper: upper bound of the gain.
        samples: paired samples of the measurement.
        price: gain that its parameters had to pay for.
        kernel: what it ran on, `eager` or `compiled`; empty for none, or while its life goes on.
    """

    seed_id: str
    blueprint: str
    group: str
    params: int
    born: int
    ended: int | None
    outcome: str
    reason: str
    gain: float | None
    lower: float | None
    upper: float | None
    samples: int
    price: float
    kernel: str = ""

    @property
    def kept(self) -> bool:
        """Whether it became part of the network."""
        return self.outcome == "FOSSILIZED"


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Args:
        title: name of the run.
        output_dir: folder of its artifacts.
        host_params: parameters before growth.
        added_params: parameters that growth added and kept.
        report_loss: loss on the report part; None if it was not measured.
        report_samples: the same loss of each sample, for a paired comparison.
        decision_loss: last loss on the decision part.
        grafts: every adaptation, in order of germination.
        steps: training steps.
        train_macs: multiply-accumulates of the training, probes included; None if not counted.
        search_share: work of the search as a share of all other work of the training; None if not counted.
        missed_kernels: compiled kernels that the run asked for and that nobody has judged yet.
        seconds: wall-clock time.
    """

    title: str
    output_dir: str
    host_params: int
    added_params: int
    report_loss: float | None = None
    report_samples: tuple[float, ...] | None = None
    decision_loss: float | None = None
    grafts: tuple[GraftLine, ...] = ()
    steps: int = 0
    train_macs: int | None = None
    search_share: float | None = None
    missed_kernels: int = 0
    seconds: float = 0.0


def summarize(
    chronicle: Chronicle,
    *,
    title: str,
    output_dir: str,
    report_loss: float | None = None,
    report_samples: tuple[float, ...] | None = None,
    train_macs: int | None = None,
    seconds: float = 0.0,
) -> RunResult:
    """Return the result of a run from its chronicle and what was measured after it.

    What was measured is also kept in the run's folder, where there is one, see `REPORT_FILE`.
    """
    if output_dir and report_loss is not None and Path(output_dir).is_dir():
        _keep_report(Path(output_dir) / REPORT_FILE, report_loss, report_samples)
    return RunResult(
        title=title,
        output_dir=output_dir,
        host_params=chronicle.host_params,
        added_params=chronicle.added_params,
        report_loss=report_loss,
        report_samples=report_samples,
        decision_loss=next((loss for _, loss in reversed(chronicle.decision_losses)), None),
        grafts=graft_lines(chronicle),
        steps=chronicle.steps,
        train_macs=train_macs,
        search_share=chronicle.search_share,
        seconds=seconds,
    )


def _keep_report(file: Path, loss: float, samples: Sequence[float] | None) -> None:
    whole = samples if samples is None or all(map(math.isfinite, samples)) else None
    with replacing(file) as opened:
        told = {"loss": loss if math.isfinite(loss) else None, "samples": whole}
        opened.write(json.dumps(told).encode() + b"\n")


def graft_lines(chronicle: Chronicle) -> tuple[GraftLine, ...]:
    """Return every adaptation of a run in order of germination."""
    return tuple(_line(life, chronicle.price_per_kparam) for life in chronicle.lives())


def _line(life: Life, price_per_kparam: float) -> GraftLine:
    first, last, report = life.stages[0], life.stages[-1], life.report
    params = report.cost.params if report else 0
    line = GraftLine(
        seed_id=life.seed_id,
        blueprint=life.blueprint,
        group=life.group,
        params=params,
        born=first.start,
        ended=last.start if life.outcome else None,
        outcome=last.state.value,
        reason=report.reason.value if report else "",
        gain=None,
        lower=None,
        upper=None,
        samples=0,
        price=report.eval_metrics.get("price", price_per_kparam * params / 1000) if report else 0.0,
        kernel=_kernel(report.kernel_artifact_id) if report else "",
    )
    found = report.counterfactual if report else None
    if found is None:
        return line
    return replace(line, gain=found.mean, lower=found.lower, upper=found.upper, samples=found.n)


def _kernel(kernel_id: str) -> str:
    return ("eager" if "-eager-" in kernel_id else "compiled") if kernel_id else ""


def headline(chronicle: Chronicle, twin: Chronicle | None = None) -> str:
    """Return what happened in one line, for the head of a picture; `twin` is the same run without growth."""
    lines = graft_lines(chronicle)
    kept = [line for line in lines if line.kept]
    loss = _decision_words(chronicle, twin)
    if not lines:
        return f"Nothing was tried{loss}"
    if not kept:
        return f"Tried {len(lines)}, kept none{loss}"
    return f"Tried {len(lines)}, kept {_counted(kept)} for {_price(chronicle)}{loss}"


def _decision_words(chronicle: Chronicle, twin: Chronicle | None) -> str:
    losses, other = chronicle.decision_losses, twin.decision_losses if twin is not None else []
    if not losses:
        return ""
    against = f", {number(other[-1][1])} without growth" if other else ""
    return f"; decision loss {number(losses[-1][1])}{against}"


def _counted(kept: list[GraftLine]) -> str:
    names = [line.blueprint for line in kept]
    parts = [f"{names.count(n)} {n}" if names.count(n) > 1 else n for n in dict.fromkeys(names)]
    return ", ".join(parts[:2]) + (f" and {len(parts) - 2} more kinds" if len(parts) > 2 else "")


def _price(run: Chronicle | RunResult) -> str:
    share = f" (+{100 * run.added_params / run.host_params:.1f} %)" if run.host_params else ""
    return f"{run.added_params:,} more parameters{share}"


def verdict(grown: RunResult, twin: RunResult | None = None) -> str:
    """Say in one sentence whether growth earned its place against the same run without it.

    Args:
        grown: the run with growth.
        twin: the same run under the policy `off`; None if there was none.

    Example:
        >>> a = RunResult("a", "out", 1000, 100, report_loss=1.9, report_samples=(1.9, 1.8, 2.0, 1.9, 1.9))
        >>> b = RunResult("b", "twin", 1000, 0, report_loss=2.0, report_samples=(2.0, 1.9, 2.1, 2.0, 2.0))
        >>> print(verdict(a, b))
        Growth earned its place: report loss 1.900 against 2.000 without it (5.0 % lower; paired gain .100, \
95 % interval .100 to .100), for 100 more parameters (+10.0 %).
    """
    if twin is None:
        return _alone(grown)
    if grown.report_loss is None or twin.report_loss is None:
        return "No verdict: the report part was not measured in both runs."
    with_growth, without = grown.report_loss, twin.report_loss
    if not (math.isfinite(with_growth) and math.isfinite(without)):
        return _broken(with_growth, without)
    interval = paired_interval(twin.report_samples, grown.report_samples)
    head = _interval_head(interval, grown) if interval else _number_head(without - with_growth, grown)
    size = f"{_relative(with_growth, without)}; {_evidence(interval, grown, twin)}"
    losses = f"report loss {number(with_growth)} against {number(without)} without it"
    return f"{head}: {losses} ({size}), {_tail(grown, twin)}."


def _alone(run: RunResult) -> str:
    kept = [line for line in run.grafts if line.kept]
    tried = f"{len(run.grafts)} adaptation{'' if len(run.grafts) == 1 else 's'} tried"
    if not run.grafts:
        return "Nothing was tried, so there is nothing to judge."
    if not kept and all(line.gain is None for line in run.grafts):
        return f"Nothing was kept of {tried}: the run ended before any could be measured."
    if not kept:
        return f"Nothing was kept of {tried}: none earned its price on the decision part."
    return (
        f"Kept {_counted(kept)} of {tried}, for {_price(run)}; "
        "compare=true would tell whether that paid against the same run without growth."
    )


def _broken(with_growth: float, without: float) -> str:
    if math.isfinite(without):
        return f"Growth did not pay: report loss is {with_growth} with it and {number(without)} without it."
    if math.isfinite(with_growth):
        return f"No verdict: report loss is {number(with_growth)} with growth, but {without} without it."
    return f"No verdict: report loss is {with_growth} with growth and {without} without it."


_HEADS = {
    (True, 1): "Growth earned its place",
    (True, -1): "Growth did not pay",
    (False, 1): "Nothing was kept, yet the run came out ahead",
    (False, -1): "Nothing was kept, and the search did not pay",
}
_EVEN = "No difference that the report part can tell"


def _interval_head(interval: Interval, grown: RunResult) -> str:
    sign = 1 if interval.lower > 0 else -1 if interval.upper < 0 else 0
    return _HEADS.get((grown.added_params > 0, sign), _EVEN)


def _number_head(gain: float, grown: RunResult) -> str:
    if gain == 0:
        return _EVEN
    side = "lower" if gain > 0 else "higher"
    return f"Report loss is {side} with growth, but chance is not ruled out"


def _evidence(interval: Interval | None, grown: RunResult, twin: RunResult) -> str:
    if interval is not None:
        low, high = number(interval.lower, interval.mean), number(interval.upper, interval.mean)
        return f"paired gain {number(interval.mean)}, 95 % interval {low} to {high}"
    counts = {len(run.report_samples) for run in (grown, twin) if run.report_samples}
    if len(counts) == 1 and counts.copy().pop() < MIN_SAMPLES:
        return f"{counts.pop()} report samples are too few for an interval"
    return "a single number, without an interval"


def _relative(with_growth: float, without: float) -> str:
    if with_growth == without:
        return "equal"
    side = "lower" if with_growth < without else "higher"
    if without <= 0:
        return f"{number(abs(without - with_growth))} {side}"
    percent = 100 * abs(without - with_growth) / without
    return f"{percent:.1f} % {side}" if percent >= 0.05 else f"less than .1 % {side}"


def _tail(grown: RunResult, twin: RunResult) -> str:
    price = f"for {_price(grown)}" if grown.added_params else "and no parameter was added"
    if not grown.train_macs or not twin.train_macs:
        return price
    ratio = grown.train_macs / twin.train_macs - 1
    if abs(ratio) < 0.005:
        return f"{price}, at the same training compute"
    return f"{price}, with {100 * abs(ratio):.1f} % {'more' if ratio > 0 else 'less'} training compute"


def gain_scale(lines: Iterable[GraftLine]) -> float:
    """Return a scale for `number` that shows all gains with as many decimals, two more than the largest needs."""
    sizes = (abs(line.gain) for line in lines if line.gain is not None and math.isfinite(line.gain))
    return max(sizes, default=1.0) / 100


def number(value: float, scale: float | None = None) -> str:
    """Return a loss for people: three decimals, more where the number (or `scale`) is small.

    Example:
        >>> number(1.98341), number(0.1571), number(-0.00042), number(0.02, scale=0.00042)
        ('1.983', '.157', '-.00042', '.02000')
    """
    if not math.isfinite(value):
        return str(value)
    size = abs(value if scale is None else scale)
    if 0 < size < 1e-6:
        return f"{value:.1e}"
    decimals = 3 if size == 0 else max(3, 1 - math.floor(math.log10(size)))
    text = f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
