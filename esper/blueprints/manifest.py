"""What is known of a blueprint beside its graph: expected benefit, risk, price and needs."""

from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from esper.blueprints.capabilities import CAPABILITIES
from esper.blueprints.op import explain
from esper.leyline.errors import BlueprintError

Score = Annotated[float, Field(ge=0, le=1)]

SAFE_RISK: Final = 0.1
"""Highest risk of what may grow in conservative mode."""

GUARDED_RISK: Final = 0.3
"""Highest risk of what changes nothing but what it computes."""


class BlueprintManifest(BaseModel):
    """Facts and beliefs that guide the choice of a blueprint; field reports overrule the beliefs.

    Args:
        summary: what it computes, in a sentence.
        family: kind of network: blueprints of a family compete for the same purpose.
        source: where the idea was published; empty if it is common knowledge.
        benefit_prior: expected gain in accuracy and in stability of training, each 0 to 1; a weak prior.
        risk_score: chance to harm the host, 0 (none) to 1.
        expected_latency_ms: forward time at the reference shape: 8 x 128 tokens of 64 features with default
            sizes (8 images of 8 x 16 pixels for `bchw`), fp32, one CPU core.
        requires_capability: what the machine must offer, from `esper.blueprints.capabilities`; empty if nothing.
        mergeable: whether it folds into a linear host exactly.
        is_safe_action: whether it may be planted in conservative mode; its risk is then 0.1 at most.
        causal: whether a token's result is independent of later tokens.
        tier: cheapest kernel tier that serves it.
        rank: default rank of a low-rank blueprint.
        capacity_factor: share of tokens that an expert accepts, relative to an even split.
        max_tokens_per_expert: most tokens of a sample that an expert accepts, at the reference shape.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    summary: str = Field(min_length=1, max_length=300)
    family: str = Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=32)
    source: str = Field(default="", max_length=300)
    benefit_prior: tuple[Score, Score]
    risk_score: Score
    expected_latency_ms: float = Field(gt=0)
    requires_capability: tuple[str, ...] = ()
    mergeable: bool
    is_safe_action: bool
    causal: bool
    tier: Literal["fast", "standard", "aggressive"] = "fast"
    rank: int | None = Field(default=None, ge=1)
    capacity_factor: float | None = Field(default=None, gt=0)
    max_tokens_per_expert: int | None = Field(default=None, ge=1)

    @field_validator("requires_capability")
    @classmethod
    def _check_capability(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in CAPABILITIES:
                raise ValueError(f"unknown capability {name!r}; known: {', '.join(CAPABILITIES)}")
        return names

    @model_validator(mode="after")
    def _check_risk(self) -> Self:
        if self.is_safe_action and self.risk_score > SAFE_RISK:
            raise ValueError(f"a safe action has a risk_score of at most {SAFE_RISK}")
        return self

    @property
    def safety_tier(self) -> Literal[1, 2, 3]:
        """How careful to be: 1 may grow in conservative mode too, 2 not then, 3 changes more than what it computes.

        Of the third tier are those with a risk above 0.3: they act on gradients or on other ranks, or need hardware.
        """
        if self.is_safe_action:
            return 1
        return 2 if self.risk_score <= GUARDED_RISK else 3


def parse_manifest(data: object) -> BlueprintManifest:
    """Return the manifest that plain data describe.

    Raises:
        BlueprintError: a field is unknown, missing or out of range.
    """
    try:
        return BlueprintManifest.model_validate(data)
    except ValidationError as error:
        raise BlueprintError(f"manifest: {explain(error)}") from None
