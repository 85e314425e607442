"""What differs between the ranks on purpose, kept in the one checkpoint that rank 0 writes: random state and losses."""

import io
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from esper.tolaria.distributed import Ranks
from esper.tolaria.pause import Pause

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


def reshare(checkpoint: dict[str, Any], size: int) -> None:
    """Let another number of processes go on with an epoch that is under way, in place: they share what is left of it.

    Lightning's count of batches and the place of our own loaders are those of one process of as many as there were.
    Both are rounded down, so that less than one batch a process comes twice, and none is left out. What other loaders
    save is left as it is; gradients that were being accumulated belong to one process, and are dropped.

    Args:
        checkpoint: what Lightning read, with an `esper` entry of the present format.
        size: processes that go on.
    """
    entry, fit = checkpoint.get("esper") or {}, checkpoint.get("loops", {}).get("fit_loop", {})
    before = max(1, len(entry.get(KEY) or []))
    if not entry or not fit or before == size:
        return
    entry["run"].pop("gradients", None)
    current = fit["epoch_loop.batch_progress"]["current"]
    done = {name: count * before // size for name, count in current.items()}
    for loader in fit.get("state_dict", {}).get("combined_loader", []):
        if isinstance(loader, dict) and loader.keys() == {"seed", "epoch", "position"}:
            batch = loader["position"] // max(1, current["ready"])
            loader["position"] = batch * done["ready"]
    current.update(done)
    if done["ready"] == 0 and entry["run"]["pause"] in (Pause.STEP, Pause.BOUNDARY):
        entry["run"]["pause"] = Pause.ITERATION.value


def own_state(checkpoint: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """Return what a checkpoint holds for a rank; empty, with a warning, where the number of ranks has changed."""
    entry = checkpoint.get("esper") or {}
    saved = entry.get(KEY) or []
    if len(saved) == size:
        return dict(saved[rank])
    if entry and max(1, len(saved)) != size:
        rank_zero_warn(
            f"Esper: the checkpoint was written by {max(1, len(saved))} processes and {size} resume from it; weights "
            "and growth go on as saved, but the random state and the order of the data differ from then on. The batch "
            "size is per process, and with it the number of steps in an epoch changes."
        )
    return {}
