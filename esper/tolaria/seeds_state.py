"""What the seeds hold between two boundaries, as plain data: a state dict has only what outlives them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.bank import SeedBank, layer_name
from esper.kasmina.layer import KasminaLayer, SiteFacts
from esper.leyline.ids import SeedId


def seeds_state(bank: SeedBank) -> dict[str, Any]:
    """Return health sums, what the probing found, and the state arrays, row by row."""
    return {
        "layers": {layer.path: _layer_state(layer) for layer in bank.all_layers()},
        "refused": dict(bank.refused),
        "rows": [str(seed) for seed in bank.rows],
        "columns": {name: _kept(column) for name, column in bank.arrays.columns.items()},
        "crc": bank.arrays.crc,
        "sound": {str(seed): graft.sound for seed, graft in bank.grafted().items()},
    }


def restore_seeds(bank: SeedBank, state: Mapping[str, Any]) -> None:
    """Take back what `seeds_state` returned, into a bank whose topology is already restored."""
    for path, saved in state["layers"].items():
        if layer_name(path) in bank.layers:
            _restore_layer(bank.layer(path), saved)
    bank.refused.update(state["refused"])
    for name, sound in state["sound"].items():
        graft = bank.graft(SeedId.parse(name))
        if graft is not None:
            graft.sound = sound
    _restore_arrays(bank, state)


def _layer_state(layer: KasminaLayer) -> dict[str, Any]:
    return {
        "facts": list(layer.facts) if layer.facts is not None else None,
        "refusal": layer.refusal,
        "fired": [layer.fired[True], layer.fired[False]],
        "gradient_seen": layer.gradient_seen,
        "probing": layer.probing,
        "health": _kept(layer.health),
        "history": torch.from_numpy(layer.history.copy()),
        "samples": [float(count) for count in layer.samples],
        # Kept apart, as the layer does: put together now they would give other sums, in the last bit.
        "readings": {name: _plain(value) for name, value in vars(layer.readings).items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _kept(value) if isinstance(value, Tensor) else value


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _restore_layer(layer: KasminaLayer, saved: Mapping[str, Any]) -> None:
    layer.facts = SiteFacts(*saved["facts"]) if saved["facts"] is not None else None
    layer.refusal, layer.gradient_seen, layer.probing = saved["refusal"], saved["gradient_seen"], saved["probing"]
    layer.fired.update(zip((True, False), saved["fired"], strict=True))
    if saved["health"].shape != layer.health.shape:
        return  # An earlier release knew other signals: its sums mean something else.
    layer.health.copy_(saved["health"])
    layer.history = saved["history"].numpy().copy()
    layer.samples[:] = saved["samples"]
    vars(layer.readings).update({name: _on(value, layer.health) for name, value in saved["readings"].items()})


def _on(value: Any, like: Tensor) -> Any:
    if isinstance(value, list):
        return [_on(item, like) for item in value]
    return value.to(like.device) if isinstance(value, Tensor) else value


def _restore_arrays(bank: SeedBank, state: Mapping[str, Any]) -> None:
    rows = {SeedId.parse(name): row for row, name in enumerate(state["rows"])}
    if rows.keys() != bank.rows.keys():
        return  # Another version of the host offers other sites; the rows that `rebuild` made are right for it.
    bank.rows = rows
    for name, column in bank.arrays.columns.items():
        bank.arrays.columns[name] = state["columns"][name].to(column)
    bank.arrays.crc = state["crc"]
