"""What differs between the ranks on purpose, kept in the one checkpoint that rank 0 writes: random state and losses."""

import io
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from esper.tolaria.distributed import Ranks

KEY = "ranks"
"""Name of the list in a checkpoint's `esper` entry, one item per rank."""


def gather_states(ranks: Ranks, own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the plain states of all ranks, tensors included; collective, empty for a single process.

    Args:
        ranks: the processes of the run.
        own: plain data and tensors of this rank.
    """
    if ranks.alone:
        return []
    buffer = io.BytesIO()
    torch.save(dict(own), buffer)
    return [torch.load(io.BytesIO(data), weights_only=True) for data in ranks.gather(buffer.getvalue())]


def own_state(checkpoint: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """Return what a checkpoint holds for a rank; empty, with a warning, where the number of ranks has changed."""
    entry = checkpoint.get("esper") or {}
    saved = entry.get(KEY) or []
    if len(saved) == size:
        return dict(saved[rank])
    if entry and max(1, len(saved)) != size:
        rank_zero_warn(
            f"Esper: the checkpoint was written by {max(1, len(saved))} processes and {size} resume from it; weights "
            "and growth go on as saved, but the random state and the order of the data differ from then on."
        )
    return {}
