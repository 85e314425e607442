"""What a module has logged so far in an epoch, as plain data: Lightning's checkpoints leave it out."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor
from torchmetrics import Metric

_META = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)
_SHOWN = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_VALUES = ("value", "cumulated_batch_size", "_forward_cache")

NOTHING_LOGGED: Mapping[str, Any] = {"shown": {}, "averages": {}, "metrics": {}}


def logged_state(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return the last metrics shown, what is being averaged over the epoch, and the states of torchmetrics."""
    connector, results = trainer._logger_connector, trainer.fit_loop.epoch_loop._results
    shown = {name: _plain_scalars(getattr(connector, name)) for name in _SHOWN}
    averages = {key: _average(item) for key, item in results.items() if _is_plain(item)}
    return {"shown": shown, "averages": averages, "metrics": _metrics_state(module)}


def restore_logged(trainer: Trainer, module: LightningModule, state: Mapping[str, Any]) -> None:
    """Take back what `logged_state` returned."""
    connector, results = trainer._logger_connector, trainer.fit_loop.epoch_loop._results
    for name, values in state["shown"].items():
        setattr(connector, name, {key: _copied(value, module.device) for key, value in values.items()})
    _restore_metrics(module, state["metrics"])
    for key, average in state["averages"].items():
        results[key] = _restored(average, trainer, module)


def _plain_scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) for key, value in values.items() if isinstance(value, Tensor | float | int)}


def _copied(value: Any, device: torch.device | None = None) -> Any:
    return value.detach().clone().to(device or value.device) if isinstance(value, Tensor) else value


def _is_plain(item: _ResultMetric) -> bool:
    return not item.has_reset and (item.is_tensor or item.meta.metric_attribute is not None)


def _average(item: _ResultMetric) -> dict[str, Any]:
    meta = {name: getattr(item.meta, name) for name in _META}
    sync = {"_should": item.meta.sync._should, "rank_zero_only": item.meta.sync.rank_zero_only}
    values = {name: _copied(vars(item)[name]) for name in _VALUES if isinstance(vars(item).get(name), Tensor)}
    reduced = {"reduce_fx": item.meta.reduce_fx.__name__, "updates": item._update_count, "tensor": item.is_tensor}
    return {"meta": meta, "sync": sync, "values": values} | reduced


def _restored(average: Mapping[str, Any], trainer: Trainer, module: LightningModule) -> _ResultMetric:
    meta = _Metadata(**average["meta"], reduce_fx=average["reduce_fx"])
    meta.sync = _Sync(fn=trainer.strategy.reduce, **average["sync"])
    item = _ResultMetric(meta, average["tensor"])
    for name, value in average["values"].items():
        setattr(item, name, _copied(value, module.device))
    if not item.is_tensor:
        assert meta.metric_attribute is not None
        item.value = module.get_submodule(meta.metric_attribute)
    item._update_count = average["updates"]
    return item.to(module.device)


def _metrics_state(module: LightningModule) -> dict[str, Any]:
    return {
        name: {"states": {s: _listed(getattr(m, s)) for s in m._defaults}, "updates": m._update_count}
        for name, m in module.named_modules()
        if isinstance(m, Metric)
    }


def _restore_metrics(module: LightningModule, state: Mapping[str, Any]) -> None:
    found = dict(module.named_modules())
    for name, saved in state.items():
        metric = found.get(name)
        if isinstance(metric, Metric):
            for key, value in saved["states"].items():
                setattr(metric, key, _listed(value, module.device))
            metric._update_count, metric._computed = saved["updates"], None


def _listed(value: Any, device: torch.device | None = None) -> Any:
    return [_copied(v, device) for v in value] if isinstance(value, list) else _copied(value, device)
