"""Commands that Tamiyo gives to Kasmina, and the signal it gives to Tolaria."""

from typing import Final, Literal

from pydantic import Field

from esper.leyline.base import Message
from esper.leyline.ids import new_id
from esper.leyline.states import Reason, SeedCommand

SPREAD: Final = "spread"
"""Begins the name of a group that is one decision: its children stay to the end of the run, and are then judged
together, by what becomes of the loss without all of them."""


class KasminaControlCommand(Message):
    """One step asked of one seed; applied at a boundary, in seed order, by the one writer.

    Args:
        command: the verb; the transition table says where it leads.
        target_layer_id: module path of the layer.
        target_seed_id: full seed id, `layer#chunk.slot`.
        reason: why, for the event and the field report.
        kernel_artifact_id: kernel to load; empty for commands that load nothing.
        blueprint_id: name of the blueprint, e.g. `BP-MLP-GELU`; only for GERMINATE.
        selected_for_tags: tags for which the kernel was chosen.
        grafting_strategy: registered strategy name; only for GERMINATE.
        dims: sizes of the blueprint's free dimensions, e.g. `{"h": 16}`; only for GERMINATE.
        reads: override of where the child reads; `declared` keeps the blueprint's own.
        init_seed: seed of the child's initial weights, the same on every rank.
        group: trial that the seed belongs to; empty outside a trial.
    """

    command_id: str = Field(default_factory=new_id)
    command: SeedCommand
    target_layer_id: str
    target_seed_id: str
    reason: Reason = Reason.REQUESTED
    kernel_artifact_id: str = ""
    blueprint_id: str = ""
    selected_for_tags: tuple[str, ...] = ()
    grafting_strategy: str = ""
    dims: dict[str, int] = Field(default_factory=dict)
    reads: Literal["declared", "output", "input"] = "declared"
    init_seed: int = Field(default=0, ge=0)
    group: str = ""


class AdaptationSignal(Message):
    """What Tolaria must do after a step of the controller."""

    optimizer_rebuild_required: bool = False
    emergency_rollback_required: bool = False
    reason: str = ""
