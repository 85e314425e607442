"""Esper: a neural network that grows while it trains, and keeps only what earns its place."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.kasmina.wrapper import MorphableModel, SeedView, unwrap, wrap
    from esper.leyline.errors import EsperError
    from esper.settings import EsperConfig, load_config
    from esper.tamiyo.callback import Tamiyo
    from esper.tamiyo.controller import TamiyoController
    from esper.tolaria.export import export
    from esper.tolaria.saved import load_model, save_model
    from esper.tolaria.trainer import TolariaTrainer

__version__ = "0.1.0"

# Imported on first use: the contracts must load without torch.
_HOME = {
    "EsperConfig": "esper.settings",
    "EsperError": "esper.leyline.errors",
    "MorphableModel": "esper.kasmina.wrapper",
    "SeedView": "esper.kasmina.wrapper",
    "Tamiyo": "esper.tamiyo.callback",
    "TamiyoController": "esper.tamiyo.controller",
    "TolariaTrainer": "esper.tolaria.trainer",
    "export": "esper.tolaria.export",
    "load_config": "esper.settings",
    "load_model": "esper.tolaria.saved",
    "save_model": "esper.tolaria.saved",
    "unwrap": "esper.kasmina.wrapper",
    "wrap": "esper.kasmina.wrapper",
}

__all__ = [
    "EsperConfig",
    "EsperError",
    "MorphableModel",
    "SeedView",
    "Tamiyo",
    "TamiyoController",
    "TolariaTrainer",
    "export",
    "load_config",
    "load_model",
    "save_model",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'esper' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*__all__, "__version__"])
