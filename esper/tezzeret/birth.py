"""What a child does at birth, from its graph alone: whether it leaves the host as it is, and whether it can learn.

Each value is known to be zero at birth, known to be what the child reads, or neither. Parameters that start at zero
make a zero; some operations on a zero stop every gradient for good, or blow the first one up.
"""

from enum import StrEnum, unique
from typing import Final

from esper.blueprints import BlueprintIR
from esper.blueprints.ops_pointwise import Activation, Add, GroupNorm, LayerNorm, Mul, RMSNorm
from esper.blueprints.plan import Plan, Step
from esper.leyline.errors import BlueprintError


@unique
class Birth(StrEnum):
    """What is known of a value at birth."""

    ZERO = "zero"
    INPUT = "what the child reads"
    OTHER = "something else"


_NORMS: Final = (LayerNorm, RMSNorm, GroupNorm)
_FLAT_AT_ZERO: Final = ("relu", "relu2")


def check_birth(ir: BlueprintIR, plan: Plan) -> None:
    """Check that a child does nothing at birth and that its parameters can leave where they start.

    Raises:
        BlueprintError: it changes the host at birth, or part of it never learns; it names the node and the rule:
            `birth`, `zero-product`, `zero-chain`, `dead-relu` or `norm-of-zero`.
    """
    known = [Birth.INPUT]
    for step in plan.steps:
        inputs = [known[source] for source in step.sources]
        if ir.trainable and Birth.ZERO in inputs:
            _check_learns(step, inputs)
        known.append(_result(step, inputs))
    wanted = Birth.ZERO if ir.initial == "zero_residual" else Birth.INPUT
    if known[plan.result] is not wanted:
        raise BlueprintError(
            f"node {ir.output!r}: rule birth: {ir.initial} must return {wanted.value} at birth; this is "
            f"{known[plan.result].value}. Start the last layer at zero (a gain of an identity at one)."
        )


def _check_learns(step: Step, inputs: list[Birth]) -> None:
    rule = reason = ""
    op = step.op
    if isinstance(op, Mul) and inputs.count(Birth.ZERO) == len(inputs):
        rule, reason = "zero-product", "both factors are zero at birth, so neither ever gets a gradient"
    elif isinstance(op, Activation) and op.fn in _FLAT_AT_ZERO:
        rule, reason = "dead-relu", f"{op.fn} of a zero passes no gradient back"
    elif isinstance(op, _NORMS):
        rule, reason = "norm-of-zero", "the first step takes it from zero to full size, however small the step"
    elif _starts_at_zero(step):
        rule, reason = "zero-chain", "weights that start at zero behind a zero never get a gradient, nor those before"
    if rule:
        raise BlueprintError(f"node {step.id!r}: rule {rule}: {reason}; start only the last layer at zero.")


def _result(step: Step, inputs: list[Birth]) -> Birth:
    op, zeros = step.op, inputs.count(Birth.ZERO)
    if op.SILENT or op.IDENTITY:
        return Birth.ZERO if op.SILENT else inputs[0]
    if _starts_at_zero(step) or (isinstance(op, Mul) and zeros):
        return Birth.ZERO
    if isinstance(op, Add) and zeros:
        return max(inputs, key=lambda birth: birth is not Birth.ZERO)
    if getattr(op, "init", "") == "one":
        return inputs[0]
    if zeros == len(inputs) and not op.PARAMETRIC and not (isinstance(op, Activation) and op.fn == "sigmoid"):
        return Birth.ZERO
    return Birth.ZERO if zeros and op.PARAMETRIC and not getattr(op, "bias", True) else Birth.OTHER


def _starts_at_zero(step: Step) -> bool:
    return getattr(step.op, "init", "") == "zero"
