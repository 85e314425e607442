"""What the numbers say in words, and never more than their intervals."""

from esper.bench.arms import GROWN, OFF, WIDE
from esper.bench.estimate import BOOTSTRAP, Estimate
from esper.bench.results import Results

PAID, NOT, OPEN = "growth paid", "growth did not pay", "cannot be told"


def word(gain: Estimate) -> str:
    """Return the verdict on a gain.

    Example:
        >>> word(Estimate.of([0.1, 0.2, 0.15, 0.12, 0.11])), word(Estimate.of([-0.1, 0.2]))
        ('growth paid', 'cannot be told')
    """
    if not gain.known or gain.lower <= 0 <= gain.upper:
        return OPEN
    return PAID if gain.lower > 0 else NOT


def sentences(results: Results) -> list[str]:
    """Return the verdict on an experiment, and what else its rows tell."""
    told = [verdict(results), _known_beforehand(results), _same_as_off(results), _failures(results)]
    return [sentence for sentence in told if sentence]


def verdict(results: Results) -> str:
    """Return in one sentence whether growth paid against the same compute spent on a wider net, or on a longer run."""
    name, reference = results.experiment, results.reference
    gain = results.gain(GROWN, reference)
    if gain is None or reference is None:
        return f"{name}: {OPEN}: it takes {GROWN} and {WIDE}, or {OFF}, of the same seeds."
    parts = [_against(results, gain, reference)]
    alone = results.gain(GROWN, OFF) if reference != OFF else None
    if alone is not None:
        parts.append(_against(results, alone, OFF))
    return f"{name}: {word(gain)}: {'; '.join(parts)}."


def _against(results: Results, gain: Estimate, reference: str) -> str:
    what = {WIDE: "the static wide net", OFF: "the host alone"}[reference]
    compute = results.compute(reference)
    at = "equal compute" if abs(compute - 1) < 0.02 else f"{compute:.2f} times its compute"
    seeds = f"better on {gain.wins} of {gain.n} seed{'' if gain.n == 1 else 's'}"
    return f"its gain is {gain.told(sign=True)} on {what} at {at} ({_evidence(gain)}), {seeds}"


def _evidence(gain: Estimate) -> str:
    if not gain.known:
        return "one seed, no interval" if gain.n == 1 else "no interval, a run diverged"
    how = "paired bootstrap" if gain.method == BOOTSTRAP else f"Student's t, as {gain.n} seeds are too few to resample"
    return f"95 % interval, {how}"


def _known_beforehand(results: Results) -> str:
    gain = results.gain("from_start", GROWN)
    if gain is None or not gain.known:
        return ""
    heads = {
        PAID: "Had it been known beforehand, what growth kept would have done better from step 0",
        NOT: "What growth kept does worse when it is there from step 0",
        OPEN: "Whether what growth kept would have done better from step 0 cannot be told",
    }
    return f"{heads[word(gain)]}: the gain of from_start on {GROWN} is {gain.told(sign=True)}."


def _same_as_off(results: Results) -> str:
    found = [(arm, results.as_off(arm)) for arm in results.arms]
    told = [f"{arm} (seed {', '.join(map(str, seeds))})" for arm, seeds in found if seeds]
    return f"Nothing to plant, so the same run as {OFF}: {', '.join(told)}." if told else ""


def _failures(results: Results) -> str:
    told = [f"{arm} seed {seed} ({why})" for (arm, seed), why in sorted(results.failed.items())]
    return f"Not made: {'; '.join(told)}." if told else ""
