"""Planted defects: does the live trial find what a network lacks, and does it mend it?"""

import tempfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from esper.bench.rows import Row
from esper.blueprints import load_library
from esper.data import ByteText, EsperDataModule, Spirals
from esper.kasmina.wrapper import MorphableModel, wrap
from esper.models import MLP, ByteLM
from esper.tamiyo.controller import TamiyoController
from esper.tolaria.trainer import TolariaTrainer

DEPTH, DEAD_BIAS = 12, -20.0
INTERVAL: Final = 50
"""Steps between boundaries."""


class Defect(NamedTuple):
    """A defect, and the same network without it.

    Args:
        about: what is wrong, for people.
        host: makes the network; the argument says whether it is sound.
        data: makes the data in the order of a seed.
        task: what it is trained for.
        lr: peak learning rate of AdamW.
        steps: training steps.
        targets: globs over the places that may grow.
        places: globs over the places at the defect and just around it.
        families: families of blueprints that are the right kind.
        growth: settings of the policy, which is the live trial; the rest as shipped.
    """

    about: str
    host: Callable[[bool], nn.Module]
    data: Callable[[int], EsperDataModule]
    task: str
    lr: float
    steps: int
    targets: tuple[str, ...]
    places: tuple[str, ...]
    families: tuple[str, ...]
    growth: dict[str, Any]


class Stack(nn.Module):
    """Many layers in a row, with or without a path around each.

    Args:
        skip: whether each layer adds to what it reads.
        width: of every layer.

    Shapes:
        x: `[B, 2]` -> `[B, 2]`.
    """

    def __init__(self, *, skip: bool, width: int = 16) -> None:
        """Make the layers, the same with and without paths around them."""
        super().__init__()
        self.skip = skip
        self.first = nn.Linear(2, width)
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(DEPTH))
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.first(x)
        for layer in self.body:
            x = x + layer(x) if self.skip else layer(x)
        out: Tensor = self.last(x)
        return out


class Local(nn.Module):
    """Adds to every token a learned mixture of its features over the last four tokens, and starts as nothing.

    Args:
        width: features.

    Shapes:
        x: `[B, T, D]` -> `[B, T, D]`.
    """

    def __init__(self, width: int) -> None:
        """Start at zero."""
        super().__init__()
        self.mix = nn.Conv1d(width, width, 4, bias=False)
        nn.init.zeros_(self.mix.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Look back, never ahead."""
        past = nn.functional.pad(x.transpose(1, 2), (3, 0))
        out: Tensor = x + self.mix(past).transpose(1, 2)
        return out


def _narrow(sound: bool) -> nn.Module:
    return MLP(widths=(2, 16, 16 if sound else 2, 16, 16, 2))


def _dead(sound: bool) -> nn.Module:
    host = MLP(widths=(2, 16, 12, 16, 16, 2))
    if not sound:
        layer = host.get_submodule("layers.2.0")
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.bias[2:] = DEAD_BIAS
    return host


def _plain(sound: bool) -> nn.Module:
    return Stack(skip=sound)


def _blind(sound: bool) -> nn.Module:
    host = ByteLM(layers=2, ffn=64)
    if sound:
        host.get_submodule("blocks.0").add_module("after_attn", Local(64))
    return host


def _points(seed: int) -> EsperDataModule:
    return Spirals(seed=seed)


def _text(seed: int) -> EsperDataModule:
    return ByteText(seed=seed, steps_per_epoch=INTERVAL, report_windows=96)


_SPIRALS: Final = {
    "menu": ("BP-MLP-GELU", "BP-PROJ-LORA", "BP-WIDEN"),
    "budget": 165,
    "proxy": 50,
    "decision_samples": 1000,
}
_FLAT: Final = (_points, "Classification", 5e-3, 1500)
_LAYERS: Final = (("layers.[02468]",), ("layers.2",), ("widen",))
DEFECTS: Final = {
    "width": Defect("a layer of 2 units where 16 are sound", _narrow, *_FLAT, *_LAYERS, _SPIRALS),
    "dead": Defect("10 of 12 units of a layer dead", _dead, *_FLAT, *_LAYERS, _SPIRALS),
    "skip": Defect(
        f"{DEPTH} layers without a path around them",
        *(_plain, *_FLAT, ("body.?", "body.1?"), ("body.*",), ("low-rank", "widen"), _SPIRALS),
    ),
    "locality": Defect(
        "nothing mixes neighbouring bytes at once",
        *(
            _blind,
            _text,
            "LanguageModeling",
            3e-3,
            600,
            ("*.after_attn", "*.ffn"),
            ("blocks.0.*",),
            ("token-conv",),
            {},
        ),
    ),
}


def row(config: dict[str, Any], folder: Path) -> Row:
    """Train the defective network, the sound one, and the defective one with the live trial.

    Args:
        config: `defect`, `seed`, and `steps` where they are not the defect's own.
        folder: not used; nothing is shared between rows.
    """
    torch.set_num_threads(1)
    defect = DEFECTS[config["defect"]]
    steps = config["steps"] or defect.steps
    return {
        "defective": _train(defect, steps, config["seed"], sound=False)["loss"],
        "sound": _train(defect, steps, config["seed"], sound=True)["loss"],
        **_train(defect, steps, config["seed"], sound=False, grows=True),
    }


def _train(defect: Defect, steps: int, seed: int, *, sound: bool, grows: bool = False) -> dict[str, Any]:
    """Train one network by the product's own trainer, and return its report loss and what was kept."""
    seed_everything(seed, verbose=False)
    network = wrap(defect.host(sound), {"stabilization_steps": 3 * INTERVAL}, targets=list(defect.targets))
    settings = {"policy": "heuristic", **defect.growth} if grows else {"policy": "off"}
    controller = TamiyoController(network, settings | {"seed": seed})
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TolariaTrainer(network, controller, _settings(defect, steps, seed, scratch), data=defect.data(seed))
        _, history = trainer.train()
    controller.close()
    return {"loss": history[-1]["report_loss"], "kept": _kept(network)}


def _settings(defect: Defect, steps: int, seed: int, folder: str) -> dict[str, Any]:
    adam = {"lr": defect.lr, "weight_decay": 0.01}
    return {
        "task": {"class_path": f"esper.tolaria.tasks.{defect.task}"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": adam},
        "max_epochs": -1,
        "max_steps": steps,
        "val_check_interval": INTERVAL,
        "gradient_clip_val": 1.0,
        "accelerator": "cpu",
        "seed": seed,
        "output_dir": folder,
    }


def _kept(network: MorphableModel) -> list[dict[str, str]]:
    library, records = load_library(), network.bank.records
    kept = [
        (seed.layer, record.blueprint.partition("@")[0]) for seed, record in records.items() if _stays(record.state)
    ]
    return [{"site": site, "kind": kind, "family": library[kind].manifest.family} for site, kind in kept]


def _stays(state: str) -> bool:
    return state == "FOSSILIZED"


class Finding(NamedTuple):
    """What became of one defect with one seed.

    Args:
        gap: by how much the sound network is better.
        recovered: share of the gap that growth made good; not a number where there is no gap.
        placed: whether a child was kept at the defect or just around it.
        right: whether a kept child there is of the right kind.
    """

    gap: float
    recovered: float
    placed: bool
    right: bool

    @property
    def resolved(self) -> bool:
        """Whether a child at the defect made half of the gap good."""
        return self.placed and self.recovered >= 0.5


def finding(row: Row, defect: Defect) -> Finding:
    """Return what a row shows.

    Args:
        row: as `row` made it.
        defect: what was planted.
    """
    gap = row["defective"] - row["sound"]
    there = [c for c in row["kept"] if any(fnmatchcase(c["site"], place) for place in defect.places)]
    recovered = (row["defective"] - row["loss"]) / gap if gap > 0 else float("nan")
    return Finding(gap, recovered, bool(there), any(child["family"] in defect.families for child in there))
