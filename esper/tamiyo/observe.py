"""Turn a wrapped model and a boundary's numbers into the packet and the observation that decisions are made on."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from esper.kasmina.bank import SeedBank
from esper.kasmina.lifecycle import stage_complete
from esper.kasmina.record import SeedRecord
from esper.kasmina.steps import boundary_health
from esper.kasmina.telemetry import METRICS
from esper.kasmina.trends import TREND_METRICS
from esper.kasmina.writer import Moment, SeedWriter
from esper.leyline.ids import SeedId
from esper.leyline.packets import HealthMap, SeedTable, SystemStatePacket
from esper.leyline.reports import HardwareContext, SiteInfo
from esper.leyline.states import SeedState
from esper.tamiyo.contracts import SeedStatus, Site

_COLUMNS = METRICS + TREND_METRICS
_ENDED = frozenset({SeedState.FOSSILIZED, SeedState.ROLLED_BACK})


def statuses(bank: SeedBank, writer: SeedWriter, *, final: bool) -> tuple[SeedStatus, ...]:
    """Return every seed that is not dormant, in seed order."""
    return tuple(_status(bank, writer, seed, record, final) for seed, record in sorted(bank.records.items()))


def _status(bank: SeedBank, writer: SeedWriter, seed: SeedId, record: SeedRecord, final: bool) -> SeedStatus:
    graft, state = bank.graft(seed), SeedState(record.state)
    ready = stage_complete(
        record,
        bank.config,
        graft.strength if graft else 0.0,
        state is SeedState.LOADING and writer.kernel_ready(seed),
    )
    # At the end of a run a finished ramp may be judged without waiting out the rest of its stage.
    ready = ready or (final and state in (SeedState.STABILIZATION, SeedState.FINE_TUNING))
    return SeedStatus(
        seed_id=str(seed),
        state=state,
        ready=ready and state not in _ENDED,
        blueprint=record.blueprint,
        group=record.group,
        params=record.params,
        macs=record.macs,
        latency_ms=record.latency_ms,
        memory_mb=record.memory_mb,
        trainable=bool(record.ir.get("trainable", True)),
        fault=(graft.fault or "") if graft else "",
    )


def sites(bank: SeedBank) -> tuple[Site, ...]:
    """Return the places that may take another child; chunks other than the first are for seeds asked for by hand."""
    layers = [layer for layer in bank.all_layers() if layer.facts is not None and layer.refusal is None]
    found = []
    for index, layer in enumerate(layers):
        seed = bank.free_slot(layer.path)
        shape = bank.site_shape(seed)
        assert shape is not None and layer.facts is not None
        depth = index / max(1, len(layers) - 1)
        closed = _under_embargo(bank, layer.path)
        found.append(Site(layer.path, seed.chunk, seed.slot, shape, depth, layer.facts.same_grid, closed))
    return tuple(found)


def _under_embargo(bank: SeedBank, path: str) -> frozenset[str]:
    """Return the blueprints that failed at a site and must rest there, in whatever slot."""
    return frozenset(
        record.blueprint
        for seed, record in bank.records.items()
        if seed.layer == path and record.state == SeedState.CULLED.value and record.steps_in_stage < record.embargo
    )


def site_info(bank: SeedBank, path: str) -> SiteInfo:
    """Return what a field report says of a place."""
    layers = list(bank.all_layers())
    layer = bank.layer(path)
    assert layer.facts is not None
    return SiteInfo(
        module_path=path,
        module_type=type(layer.site).__name__,
        layout=layer.facts.layout,
        width=layer.facts.width,
        input_width=max(1, layer.facts.input_width),
        depth=layers.index(layer) / max(1, len(layers) - 1),
    )


def packet(
    bank: SeedBank,
    writer: SeedWriter,
    moment: Moment,
    *,
    train_loss: float | None = None,
    validation_loss: float | None = None,
    metrics: Mapping[str, float] | None = None,
    last_decisions: Sequence[str] = (),
) -> SystemStatePacket:
    """Return the state of the system at a boundary; the health since the last one is taken, so ask once."""
    seeds, whole = _health(bank)
    return SystemStatePacket(
        run_id=moment.run_id,
        current_epoch=moment.epoch,
        global_step=moment.step,
        train_loss=_finite(train_loss),
        validation_loss=_finite(validation_loss),
        metrics=dict(metrics or {}),
        hardware_context=hardware(bank),
        seed_states=_seed_table(bank, writer),
        health_map=seeds,
        site_paths=tuple(layer.path for layer in bank.all_layers()),
        site_health=whole,
        memory_pressure=memory_pressure(bank),
        last_decisions=tuple(last_decisions),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _seed_table(bank: SeedBank, writer: SeedWriter) -> SeedTable:
    ready = {s.seed_id for s in statuses(bank, writer, final=False) if s.ready}
    names = [str(seed) for seed in bank.rows]
    return SeedTable.of(
        names,
        state=bank.arrays.host("lifecycle"),
        alpha=bank.arrays.host("alpha"),
        kernel_hash=bank.arrays.host("kernel_hash"),
        last_epoch=bank.arrays.host("last_epoch"),
        ready=np.array([name in ready for name in names], dtype=np.uint8),
    )


def _health(bank: SeedBank) -> tuple[HealthMap, HealthMap]:
    """Return one row per seed, where every slot of a chunk shows the chunk's health, and one per site."""
    layers = list(bank.all_layers())
    found = boundary_health(layers)
    by_layer = {layer.path: health for layer, health in zip(layers, found, strict=True)}
    return (
        _table([by_layer[seed.layer][seed.chunk] for seed in bank.rows]),
        _table([health[-1] for health in found]),
    )


def _table(rows: Sequence[NDArray[np.float32]]) -> HealthMap:
    table = np.stack(rows) if rows else np.zeros((0, len(_COLUMNS)))
    return HealthMap.of(**{name: table[:, column] for column, name in enumerate(_COLUMNS)})


def memory_pressure(bank: SeedBank) -> dict[str, float]:
    """Return the share of memory in use, 0 to 1, of the machine and of every CUDA device that carries seeds."""
    found = {"cpu": psutil.virtual_memory().percent / 100}
    for device in {layer.health.device for layer in bank.all_layers()}:
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            found[str(device)] = 1.0 - free / total
    return dict(sorted(found.items()))


def hardware(bank: SeedBank) -> HardwareContext:
    """Return the device that the seeds live on."""
    layer = next(bank.all_layers(), None)
    device = layer.health.device if layer is not None else torch.device("cpu")
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return HardwareContext(
            device_type="cuda",
            device_name=name,
            memory_available_gb=free / 2**30,
            supports_bf16=torch.cuda.is_bf16_supported(),
            supports_quantization=True,
        )
    free = psutil.virtual_memory().available
    return HardwareContext(device_type=device.type, memory_available_gb=free / 2**30, supports_bf16=True)
