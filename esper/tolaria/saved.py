"""Save a grown model to a folder and load it elsewhere.

```
weights.safetensors   host and children
topology.json         every seed's record; rebuilds the children
lineage.json          what was kept, on what evidence
blueprints/*.json     the IR of every child, by content hash
README.md             the same for people: what grew, where, why, and how to load it
```
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from esper.blueprints import parse_ir
from esper.kasmina.bank import TOPOLOGY_KEY, SeedBank
from esper.kasmina.config import KasminaConfig
from esper.kasmina.wrapper import MorphableModel
from esper.leyline.errors import CheckpointError, ConfigError, EsperError, OutputError
from esper.leyline.states import SeedState
from esper.tolaria.card import saved_card
from esper.tolaria.factory import describe_factory, make_host
from esper.tolaria.planted import Grown
from esper.tolaria.planting import plant_all

WEIGHTS = "weights.safetensors"

FORMAT = 2
"""Version of `topology.json`: 1 had no digest of itself, and its seeds knew neither faults nor drawn masks."""


def save_model(morphable: nn.Module, path: str | Path, *, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a grown model to a folder; an existing one is replaced as a whole.

    Args:
        morphable: the wrapped model, or a module that grew with the `Tamiyo` callback.
        path: the folder.
        state: what `whole_state` returned; needed where one process writes a host that several shard.

    Raises:
        ConfigError: the model carries no seeds.
        OutputError: the folder cannot be written.
    """
    morphable = with_seeds(morphable)
    with replacing(Path(path)) as folder:
        _write(morphable, folder, whole_state(morphable) if state is None else state)
    return Path(path)


def whole_state(morphable: MorphableModel) -> dict[str, torch.Tensor]:
    """Return the state that is saved; the weights of a sharded host are put together, all its processes at once."""
    gathered = ((name, getattr(t, "full_tensor", lambda t=t: t)()) for name, t in _state(morphable).items())
    return {name: t.detach() for name, t in gathered}


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a folder to write to, which then takes the place of `target` as a whole; an error leaves the old one.

    Raises:
        OutputError: the folder cannot be written, or holds something else than a saved network.
    """
    try:
        if target.exists() and not (target / WEIGHTS).exists() and (target.is_file() or any(target.iterdir())):
            raise OutputError(f"{target} holds something else than a saved network; name a new or an empty folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            yield staging
            _replace(target, staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot save to {target}: {error}; choose a writable folder.") from error


def with_seeds(model: nn.Module) -> MorphableModel:
    """Return the wrapped model that `model` is, holds, or became by growing inside a trainer.

    Raises:
        ConfigError: the model carries no seeds.
    """
    wrapped = next((m for m in model.modules() if isinstance(m, MorphableModel)), None)
    bank = next((m for m in model.modules() if isinstance(m, SeedBank)), None)
    if wrapped is not None:
        return wrapped
    if bank is None:
        name = type(model).__name__
        raise ConfigError(f"{name} carries no seeds; wrap it with esper.wrap, or train it with esper.Tamiyo, first.")
    layer = next(bank.all_layers())
    host = next(m for m in model.modules() if dict(m.named_modules()).get(layer.path) is layer.site)
    return MorphableModel(host, bank)


def save_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors to a new file that others may read like any other: safetensors makes it the owner's alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(weights, path)
    path.chmod(mode)


def _write(morphable: MorphableModel, folder: Path, state: dict[str, torch.Tensor]) -> None:
    bank = morphable.bank
    weights = {name: t.clone().contiguous() for name, t in state.items()}
    save_weights(weights, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    topology = {
        "format": FORMAT,
        "weights_sha256": digest,
        "host": describe_factory(morphable.host),
        "planted": [child for m in morphable.host.modules() if isinstance(m, Grown) for child in m.recipe],
        "kasmina": bank.config.model_dump(mode="json"),
        "sites": [layer.path for layer in bank.all_layers()],
        "seeds": bank.topology(),
    }
    story = lineage(morphable)
    _dump(folder / "topology.json", topology | {"sha256": signature(topology)})
    _dump(folder / "lineage.json", story)
    card = saved_card(topology, story, type(morphable.host).__name__)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "blueprints").mkdir()
    for record in bank.records.values():
        if record.ir:
            _dump(folder / "blueprints" / f"{parse_ir(record.ir).id}.json", record.ir)


def signature(topology: dict[str, Any]) -> str:
    """Return the SHA-256 of everything else in a `topology.json`, whatever its spacing and the order of its keys."""
    plain = json.loads(json.dumps({name: value for name, value in topology.items() if name != "sha256"}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _state(morphable: MorphableModel) -> dict[str, torch.Tensor]:
    state = morphable.state_dict()
    shared = {k for k in state if k.endswith(f".{TOPOLOGY_KEY}") and k.startswith("bank")}
    # A LightningModule host also holds the bank; one copy is enough.
    return {k: v for k, v in state.items() if k not in shared and not k.startswith("host.esper.")}


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace(target: Path, staging: Path) -> None:
    staging.chmod(0o755)
    if target.exists():
        old = Path(mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
        target.rename(old / target.name)
        staging.rename(target)
        shutil.rmtree(old)
    else:
        staging.rename(target)


def lineage(morphable: MorphableModel) -> dict[str, Any]:
    """Return every fossil with its blueprint, kernel, price and the evidence on which it was kept."""
    bank = morphable.bank
    fossils = []
    for seed, graft in bank.grafted().items():
        record = bank.records[seed]
        if record.state == SeedState.FOSSILIZED.value:
            fossils.append(
                {
                    "seed_id": record.seed_id,
                    "blueprint": record.blueprint,
                    "blueprint_sha256": parse_ir(record.ir).id,
                    "kernel_id": record.kernel_id,
                    "reads": record.reads,
                    "dims": record.dims,
                    "params": record.params,
                    "group": record.group,
                    "stage_steps": record.stage_steps,
                    "pre_metric": record.pre_metric,
                    "fault": graft.fault,
                    "counterfactual": _evidence(record.evidence),
                }
            )
    host = sum(p.numel() for p in morphable.parameters()) - bank.added_parameters()
    return {"host_params": host, "added_params": bank.added_parameters(), "fossils": fossils}


def _evidence(found: list[float] | None) -> dict[str, float] | None:
    return dict(zip(("mean", "lower", "upper", "n"), found, strict=True)) if found else None


def load_model(path: str | Path, host: nn.Module | None = None) -> MorphableModel:
    """Load what `save_model` wrote.

    Args:
        path: the folder.
        host: a fresh module of the same architecture, any weights. May be left out when the saved host was an Esper
            model, which is rebuilt from its recorded constructor arguments.

    Raises:
        CheckpointError: a file is missing or damaged, or the host does not match.
    """
    folder = Path(path)
    topology = read_topology(folder)
    try:
        model = host if host is not None else make_host(topology["host"])
        planted = topology.get("planted")
        if planted and not any(isinstance(m, Grown) for m in model.modules()):
            plant_all(model, planted)
        wrapped = _wrap(model, topology)
        wrapped.bank.rebuild(topology["seeds"])
        _fill(wrapped, folder / WEIGHTS, topology["weights_sha256"])
    except CheckpointError:
        raise
    except (EsperError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be loaded into this host: {error}") from error
    return wrapped.eval()


def read_topology(folder: Path) -> dict[str, Any]:
    """Return the checked content of a saved folder's `topology.json`.

    Raises:
        CheckpointError: it is missing, damaged, or of a format that this release does not know.
    """
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a file; load_model reads folders that save_model wrote. A Lightning checkpoint resumes with "
            "Trainer(callbacks=[esper.Tamiyo(...)]).fit(module, ckpt_path=...)."
        )
    try:
        topology = json.loads((folder / "topology.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no topology.json; give a folder that save_model wrote.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'topology.json'} cannot be read: {error}") from error
    if not isinstance(topology, dict) or topology.get("format") not in (1, FORMAT):
        raise CheckpointError(f"{folder} has another format than 1 to {FORMAT}; use the release that saved it.")
    if topology["format"] > 1 and topology.get("sha256") != signature(topology):
        raise CheckpointError(f"{folder / 'topology.json'} is damaged: its content is not what was saved.")
    return topology if topology["format"] == FORMAT else _migrated(topology)


def _migrated(first: dict[str, Any]) -> dict[str, Any]:
    """Return a topology of format 1 as this format would have written it."""
    seeds = first.get("seeds")
    # Reconstruction training drew its masks from the start again after each load.
    return first | {"seeds": [{"draws": 0} | seed for seed in seeds] if isinstance(seeds, list) else seeds}


def _present_name(name: str) -> str:
    """Return the name of a weight today: in early folders of format 1 a layer's name began without a slash."""
    layers = "bank.layers."
    bare = name.startswith(layers) and not name.startswith(f"{layers}/")
    return f"{layers}/{name.removeprefix(layers)}" if bare else name


def _wrap(model: nn.Module, topology: dict[str, Any]) -> MorphableModel:
    paths = {name for name, _ in model.named_modules()}
    missing = sorted(set(topology["sites"]) - paths)
    if missing:
        raise CheckpointError(f"this host has no module {missing[0]!r}; give a host of the saved architecture.")
    wanted = set(topology["sites"])
    config = KasminaConfig.of(topology["kasmina"])
    return MorphableModel.around(model, config, lambda name, _: name in wanted)


def _fill(model: MorphableModel, file: Path, digest: str) -> None:
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != digest:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is {found[:12]}..., {digest[:12]}... was saved.")
        state = {_present_name(name): t for name, t in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    own = model.state_dict()
    missing, unexpected = set(_state(model)) - set(state), set(state) - set(own)
    if missing or unexpected:
        name = sorted(missing | unexpected)[0]
        raise CheckpointError(f"the host does not match the saved weights, e.g. {name!r}; give the same architecture.")
    with torch.no_grad():
        for name, value in state.items():
            if own[name].shape != value.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(value.shape)} in the file, {tuple(own[name].shape)} here."
                )
            own[name].copy_(value)
