"""Settings of the seeds: where they sit and how a graft walks its life cycle."""

from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, model_validator

from esper.config import Settings

PRESETS = MappingProxyType(
    {
        "measured": {},
        "strict": {
            "training_objective": "reconstruction",
            "training_steps": 100,
            "ramp_steps": 100,
            "stabilization_steps": 50,
            "fine_tuning_steps": 100,
            "freeze_stabilization": True,
            "freeze_fossils": True,
        },
    }
)
"""`measured` follows what growth was measured to need; `strict` is the original design to the letter."""


class KasminaConfig(Settings):
    """How seeds live. Durations are training steps.

    Args:
        preset: values for whatever is not given: `measured` or `strict`.
        targets: glob patterns over module paths; None takes the default families.
        seeds_per_layer: contiguous chunks of the feature dimension, at least 1.
        training_objective: `shadow` (task gradient, no effect) or `reconstruction` (own denoising loss).
        training_steps: length of TRAINING; 0 passes straight to GRAFTING.
        shadow_norm_bound: largest ratio of residual to activation norm in shadow training.
        shadow_weight_decay: weight decay of a child in shadow training.
        reconstruction_noise: fraction of features hidden from a child that learns to restore them.
        reconstruction_lr: learning rate of reconstruction training.
        strategy: grafting strategy: `fixed_ramp`, `performance_linked`, `drift_controlled`, `grad_norm_gated`.
        ramp_steps: steps from alpha 0 to 1.
        stabilization_steps: steps at alpha 1 before the evidence is taken.
        fine_tuning_steps: steps between a passed gate and FOSSILIZED.
        freeze_stabilization: freeze the child during STABILIZATION.
        freeze_fossils: freeze the child when it is FOSSILIZED.
        embargo_steps: steps for which a culled seed stays closed.
        telemetry_every: sample health every so many steps; 0 never.
    """

    preset: Literal["measured", "strict"] = "measured"
    targets: tuple[str, ...] | None = None
    seeds_per_layer: int = Field(default=1, ge=1)
    training_objective: Literal["shadow", "reconstruction"] = "shadow"
    training_steps: int = Field(default=0, ge=0)
    shadow_norm_bound: float = Field(default=1.0, gt=0)
    shadow_weight_decay: float = Field(default=3.0, ge=0)
    reconstruction_noise: float = Field(default=0.2, gt=0, lt=1)
    reconstruction_lr: float = Field(default=1e-3, gt=0)
    strategy: Literal["fixed_ramp", "performance_linked", "drift_controlled", "grad_norm_gated"] = "fixed_ramp"
    ramp_steps: int = Field(default=20, ge=1)
    stabilization_steps: int = Field(default=100, ge=0)
    fine_tuning_steps: int = Field(default=0, ge=0)
    freeze_stabilization: bool = False
    freeze_fossils: bool = False
    embargo_steps: int = Field(default=200, ge=0)
    telemetry_every: int = Field(default=32, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {**PRESETS.get(given.get("preset", "measured"), {}), **given}
