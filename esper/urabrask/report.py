"""From findings to the verdict: what passes, what is rejected and why."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from esper.leyline.artifacts import KernelSpec
from esper.leyline.events import Rejection
from esper.leyline.kernels import BenchmarkResults, UrabraskValidationReport
from esper.urabrask import wep
from esper.urabrask.findings import Findings, Measured
from esper.urabrask.limits import GAIN
from esper.urabrask.risk import LIMIT, PREFIX, confidence, features, risk
from esper.urabrask.tags import Standing, tags


class Verdict(NamedTuple):
    """What Urabrask says of a kernel.

    Args:
        report: what goes into the store.
        rejection: why it may not be used; None when it may.
        detail: the same in one sentence, with the failing input or the numbers; empty when it passed.
        interest: how much the kernel deserves further work, 0 to 1.
    """

    report: UrabraskValidationReport
    rejection: Rejection | None = None
    detail: str = ""
    interest: float = 0.0


def verdict(findings: Findings, spec: KernelSpec, peers: Sequence[Standing] = ()) -> Verdict:
    """Judge a kernel by what was found.

    Args:
        findings: of its gauntlet.
        spec: what it computes.
        peers: kernels on the same hardware that it is compared with.
    """
    found = features(findings)
    danger = 1.0 if findings.failures else risk(found)
    rejection, detail = _judged(findings, danger)
    comparison = _comparison(findings.measured)
    report = UrabraskValidationReport(
        kernel_artifact_id=findings.kernel_id,
        benchmark_results=None if findings.measured is None else _results(findings.measured),
        generated_tags=tags(findings, spec.layout, spec.dtype, peers),
        baseline_comparison={**comparison, **{PREFIX + name: value for name, value in found.items()}},
        passed_validation=rejection is None,
        risk_score=danger,
        conf_level=confidence(findings),
        hardware_context=findings.hardware,
        report_timestamp=time.time(),
    )
    return Verdict(report, rejection, detail, 0.0 if rejection else _interest(comparison, danger))


def _judged(findings: Findings, danger: float) -> tuple[Rejection | None, str]:
    if findings.failures:
        first = findings.failures[0]
        others = len(findings.failures) - 1
        return first.rejection, f"{first}" + (f" (and {others} more)" if others else "")
    if findings.measured is None:
        return Rejection.SANITY_FAILED, "it was not measured."
    slow = "" if findings.pipeline == "fast" else _too_slow(findings.measured)
    if slow:
        return Rejection.TOO_SLOW, slow
    if danger > LIMIT:
        return Rejection.TOO_RISKY, f"its risk is {danger:.2f}; at most {LIMIT} is allowed."
    return None, ""


def _too_slow(measured: Measured) -> str:
    """Return why a compiled kernel is not worth its risk; empty where it is."""
    gain = 1.0 - measured.step_ratio
    numbers = (
        f"forward and backward take {measured.step_ms:.3f} ms, {measured.eager_step_ms:.3f} ms in the eager module "
        f"(ratio {measured.step_ratio:.3f}, spread over identical runs {measured.ratio_spread:.3f})"
    )
    if gain < GAIN:
        return f"{numbers}; a compiled kernel must be faster by {GAIN:.0%}."
    if gain <= measured.ratio_spread:
        return f"{numbers}; the difference is within the spread, so it may be chance."
    return ""


def _comparison(measured: Measured | None) -> dict[str, float]:
    """Return the ratios to the eager module, their score, and how steady the measurement was."""
    if measured is None:
        return {}
    found = wep.ratios(measured)
    spreads = {"spread.ratio": measured.ratio_spread, "spread.latency": measured.latency_spread}
    return {**found, "wep": wep.score(found), **spreads}


def _results(measured: Measured) -> BenchmarkResults:
    return BenchmarkResults(
        latency_ms_mean=measured.forward_ms,
        latency_ms_p99=measured.forward_ms_p99,
        throughput_ops_per_sec=1e3 / max(measured.forward_ms, 1e-9),
        memory_mb_peak=measured.memory_mb,
        power_watts_avg=measured.power_watts,
        precision_drift=measured.drift,
    )


def _interest(comparison: dict[str, float], danger: float) -> float:
    """Return what it saves, times how safe it is: half the eager module's time, without risk, is 1."""
    return round(min(1.0, max(0.0, 2.0 * (1.0 - comparison["step"]))) * (1.0 - danger), 6)
