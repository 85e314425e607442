"""From a run to a recipe: a configuration that trains the architecture it found from scratch."""

from pathlib import Path
from typing import Any

import yaml

from esper.blueprints import BlueprintIR, SiteShape, load_library, parse_ir
from esper.config import moved
from esper.kasmina.telemetry import chunk_span
from esper.leyline.errors import BlueprintError, CheckpointError, ConfigError, OutputError
from esper.leyline.ids import SeedId
from esper.leyline.states import SeedState
from esper.tolaria.saved import read_topology

FROM_START = "esper.tolaria.from_start.FromStart"
FILE = "recipe.yaml"

_HEAD = """\
# The architecture that a run discovered, trained from scratch: every child is there from the first step, and nothing
# grows. Run it with
#     esper fit --config {name}
#     python train.py --config-path {folder} --config-name {stem}
# Found by: {run}
"""


def write_recipe(run: str | Path, file: str | Path | None = None) -> Path:
    """Write the recipe of a run.

    Args:
        run: folder of a run of `esper fit` or `train.py`.
        file: where to write; None takes `recipe.yaml` in the run's folder.

    Raises:
        CheckpointError: the folder is not that of a finished run.
        ConfigError: the run kept nothing.
        OutputError: the file cannot be written.
    """
    target = Path(run) / FILE if file is None else Path(file)
    content = recipe(run)
    where = target.parent.resolve()
    head = _HEAD.format(name=target, folder=where, stem=target.stem, run=Path(run).resolve())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(head + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; choose a writable place.") from error
    return target


def recipe(run: str | Path) -> dict[str, Any]:
    """Return the configuration that trains from scratch what a run has found.

    It is the run's own, with the policy `off`, the kept children present from the first step, and a folder of its own,
    `from_scratch` inside the run's.

    Args:
        run: folder of a run of `esper fit` or `train.py`.

    Raises:
        CheckpointError: the folder is not that of a finished run.
        ConfigError: the run kept nothing.
    """
    folder = Path(run)
    config = _config(folder)
    children = kept_children(folder / "model")
    if not children:
        raise ConfigError(f"{folder} kept nothing; its host alone is config.yaml with tamiyo.policy set to off.")
    there: dict[str, Any] = moved(config, str(config["output_dir"]), f"{config['output_dir']}/from_scratch")
    trainer, nissa = there["trainer"], there.get("nissa") or {}
    given = trainer.get("callbacks") or []
    planting = {"class_path": FROM_START, "init_args": {"children": children}}
    callbacks = [planting, *(given if isinstance(given, list) else [given])]
    # Left out, the folders of these sections follow `output_dir`.
    return there | {
        "trainer": trainer | {"callbacks": callbacks, "default_root_dir": None},
        "tamiyo": (there.get("tamiyo") or {}) | {"policy": "off", "output_dir": None},
        "nissa": nissa | {"title": f"{nissa.get('title') or folder.resolve().name} from scratch", "output_dir": None},
        "compare": False,
    }


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{folder / 'config.yaml'} cannot be read ({error}); give the folder of a run of `esper fit` or train.py."
        ) from error
    if not isinstance(config, dict) or not {"output_dir", "trainer", "model"} <= config.keys():
        raise CheckpointError(f"{folder / 'config.yaml'} is not the configuration of a run.")
    return config


def kept_children(saved: Path) -> list[dict[str, Any]]:
    """Return what a saved model kept, as `FromStart` takes it; a child that a fault had bypassed is left out.

    Args:
        saved: folder that `save_model` wrote.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    topology = read_topology(saved)
    try:
        kept = [s for s in topology["seeds"] if s["state"] == SeedState.FOSSILIZED.value and not s.get("fault")]
        return [_child(entry, topology["kasmina"]["seeds_per_layer"]) for entry in kept]
    except (BlueprintError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved / 'topology.json'} makes no sense: {error!r}") from error


def _child(entry: dict[str, Any], chunks: int) -> dict[str, Any]:
    seed, ir, shape = SeedId.parse(entry["seed_id"]), parse_ir(entry["ir"]), SiteShape(**entry["site"])
    start, width = chunk_span(int(entry["facts"][1]), chunks, seed.chunk)
    return {
        "site": seed.layer,
        "slot": f"c{seed.chunk}s{seed.slot}",
        "blueprint": ir.name if _is_in_library(ir) else entry["ir"],
        "reads": ir.reads,
        "dims": {name: value for name, value in entry["dims"].items() if ir.dims[name].free},
        "shape": shape._asdict(),
        "start": start,
        "width": None if chunks == 1 else width,
        "init_seed": entry["init_seed"],
    }


def _is_in_library(ir: BlueprintIR) -> bool:
    """Return whether the library gives this very graph under its name."""
    try:
        return load_library()[ir.name].ir.reading(ir.reads).id == ir.id
    except BlueprintError:
        return False
