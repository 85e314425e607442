"""Take a grown network home: a plain module, its children folded into the host or standing beside it."""

import copy
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from esper.blueprints.build import Child
from esper.blueprints.merge import Fold, fold_into, why_not_fold
from esper.kasmina.bank import SeedBank
from esper.kasmina.decoding import mixes_tokens
from esper.kasmina.graft import Graft
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.record import SeedRecord
from esper.kasmina.wrapper import MorphableModel
from esper.leyline.errors import ConfigError
from esper.leyline.ids import SeedId
from esper.leyline.states import SeedState
from esper.tolaria.card import Fate
from esper.tolaria.hugging_face import keep_children_when_saved
from esper.tolaria.plain_folder import write_folder
from esper.tolaria.planted import Planted, plant
from esper.tolaria.programs import Example, check_same, save_onnx, save_program
from esper.tolaria.saved import lineage, with_seeds

Unfinished = Literal["refuse", "keep", "drop"]

_NOT_FOLDERS = frozenset({".bin", ".ckpt", ".h5", ".pkl", ".pt", ".pth", ".safetensors", ".torchscript"})


class _Kept(NamedTuple):
    """A child that is part of the exported network.

    Args:
        seed: its seed.
        record: what is known of it.
        graft: the child and its alpha.
        axis: the feature axis of its site.
    """

    seed: SeedId
    record: SeedRecord
    graft: Graft
    axis: int

    @property
    def path(self) -> str:
        """Path of its site in the host; `torch.compile` puts a word of its own in front."""
        return self.seed.layer.removeprefix("_orig_mod.")


def export(
    morphable: nn.Module,
    path: str | Path | None = None,
    *,
    merge: bool = True,
    example: Any = None,
    unfinished: Unfinished = "refuse",
) -> nn.Module:
    """Return the grown network as a plain module in evaluation mode; the model given stays as it is.

    The network is the host with its fossils. A child that folds exactly into a float32 or float64 linear or
    convolutional host (`BP-PROJ-LORA`, `BP-PROJ-IA3`, and whatever is affine) becomes part of its weights, within 1e-6
    of the grown outputs; every other child becomes a submodule in `grown` and computes, bit for bit, what it did. A
    child that a fault had bypassed is left out, as it was.

    Args:
        morphable: the wrapped model, or a module that grew with the `Tamiyo` callback.
        path: where to write, or None. `NAME.pt2` is a `torch.export` program, `NAME.onnx` an ONNX model, anything else
            a folder with the weights and a Python file that needs torch alone; see docs/export.md.
        merge: whether to fold; False leaves every child beside the host.
        example: inputs of one call: a tensor, a tuple of arguments, or a dict of keyword arguments. Programs need it,
            except for Esper's own models, modules with `example_input_array`, and transformers. Where it is given, the
            exported outputs are compared with the grown ones.
        unfinished: what to do with children that already take part but have not passed their gate: `refuse`, `keep`
            them at their present alpha, or `drop` them. Those that do not change the output are always left out.

    Raises:
        ConfigError: no seeds, unfinished children, a missing example, or a path of no known kind.
        OutputError: the path cannot be written.
        CheckpointError: the exported network does not compute what the grown one did.

    Example:
        >>> import torch, esper
        >>> morphable = esper.wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> plain = export(morphable)
        >>> type(plain).__name__, [name for name, _ in plain.named_parameters()]
        ('Sequential', ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    kind = _kind(path)
    grown = with_seeds(morphable)
    inputs = Example.of(example, grown.host, needed=kind in (".pt2", ".onnx"))
    twin, fates = copy.deepcopy(grown), list[Fate]()
    kept = _chosen(twin, unfinished, fates)
    host = _bare(twin)
    _join(host, kept, merge, fates)
    if inputs is not None:
        check_same(inputs.run(grown.host), inputs.run(host), "the exported module", folded=_any_folded(fates))
    keep_children_when_saved(host)
    if path is not None:
        _write(host, Path(path), kind, inputs, lineage(grown), fates)
    return host


def _kind(path: str | Path | None) -> str:
    suffix = "" if path is None else Path(path).suffix
    if suffix in _NOT_FOLDERS:
        raise ConfigError(
            f"esper.export does not write {suffix} files: name a .pt2 program, a .onnx model, or a folder. "
            "To keep seeds and lineage for more growth, use esper.save_model."
        )
    return suffix if suffix in (".pt2", ".onnx") else ""


def _write(
    host: nn.Module, path: Path, kind: str, inputs: Example | None, story: dict[str, Any], fates: list[Fate]
) -> None:
    if kind:
        assert inputs is not None
        (save_program if kind == ".pt2" else save_onnx)(host, inputs, path, story)
    else:
        write_folder(host, path, story, fates)


def _chosen(model: MorphableModel, unfinished: Unfinished, fates: list[Fate]) -> list[_Kept]:
    """Return the children that are part of the network, site by site in the order in which they blend."""
    if unfinished not in ("refuse", "keep", "drop"):
        raise ConfigError(f"unfinished={unfinished!r}; allowed: refuse, keep, drop.")
    kept, waiting = [], []
    for seed, graft in _in_order(model.bank):
        record = model.bank.records[seed]
        finished = record.state == SeedState.FOSSILIZED.value
        if not graft.live or graft.objective != "graft":
            why = f"bypassed: {graft.fault}" if graft.fault is not None else f"{record.state}, adds nothing"
            fates.append(Fate(str(seed), record.blueprint, record.params, "left out", why))
        elif finished or unfinished == "keep":
            kept.append(_Kept(seed, record, graft, model.bank.layer(seed.layer).dim))
        elif unfinished == "drop":
            fates.append(Fate(str(seed), record.blueprint, record.params, "left out", record.state))
        else:
            waiting.append(f"{seed} ({record.blueprint}, {record.state}, alpha {graft.strength:.2f})")
    if waiting:
        raise ConfigError(
            f"{len(waiting)} of the children have not passed their gate yet: {', '.join(waiting)}. Train until they "
            "are judged, or say unfinished='drop' to leave them out or unfinished='keep' to freeze them as they are."
        )
    return kept


def _in_order(bank: SeedBank) -> list[tuple[SeedId, Graft]]:
    by_graft = {id(graft): seed for seed, graft in bank.grafted().items()}
    grafts = [graft for layer in bank.all_layers() for graft in layer.all_grafts()]
    return [(by_graft[id(graft)], graft) for graft in grafts if id(graft) in by_graft]


def _bare(twin: MorphableModel) -> nn.Module:
    """Free the copied host of its seeds, its gradients and training mode."""
    host = twin.host
    twin.bank.detach()
    for module in host.modules():
        for name in [n for n, child in module.named_children() if isinstance(child, SeedBank)]:
            del module._modules[name]
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), KasminaLayer):
                del module._forward_hooks[key]
    for parameter in [*host.parameters(), *twin.bank.parameters()]:
        parameter.grad = None
    plain: nn.Module = getattr(host, "_orig_mod", host)
    return plain.eval()


def _join(host: nn.Module, kept: list[_Kept], merge: bool, fates: list[Fate]) -> None:
    """Fold what folds into the host, and plant the rest."""
    folds: dict[str, list[Fold]] = {}
    rest: dict[str, dict[str, Planted]] = {}
    for child in kept:
        why = _why_beside(host, child, kept) if merge else "merge=False"
        if why is None:
            folds.setdefault(child.path, []).append(_fold(child))
        else:
            rest.setdefault(child.path, {})[f"c{child.seed.chunk}s{child.seed.slot}"] = _planted(child)
        how = "folded into the host's weights" if why is None else "a module of its own"
        fates.append(Fate(str(child.seed), child.record.blueprint, child.record.params, how, why or ""))
    for path, found in folds.items():
        fold_into(host.get_submodule(path), found)
    if rest:
        plant(host, rest, _free_name(host)).eval()


def _why_beside(host: nn.Module, child: _Kept, kept: list[_Kept]) -> str | None:
    """Return why a child stays a module, or None where it folds."""
    if not isinstance(child.graft.child, Child):
        return "its network is not built from a blueprint"
    site = host.get_submodule(child.path)
    why = why_not_fold(site, _fold(child))
    if why is not None:
        return why
    for other in kept:
        beside = (other.seed.layer, other.seed.chunk) == (child.seed.layer, child.seed.chunk)
        if beside and other.graft.reads == "output" and not _folds_alone(site, other):
            return f"{other.seed} reads the output that it would change"
    return None


def _folds_alone(site: nn.Module, child: _Kept) -> bool:
    return isinstance(child.graft.child, Child) and why_not_fold(site, _fold(child)) is None


def _fold(child: _Kept) -> Fold:
    network = child.graft.child
    assert isinstance(network, Child)
    return Fold(network, child.graft.start, float(child.graft.alpha))


def _planted(child: _Kept) -> Planted:
    graft = child.graft
    return Planted(
        graft.child,
        reads=graft.reads,
        replaces=graft.replaces,
        axis=child.axis,
        start=graft.start,
        width=graft.width,
        alpha=float(graft.alpha),
        mixes_tokens=mixes_tokens(child.record.ir),
    )


def _free_name(host: nn.Module) -> str:
    name, number = "grown", 1
    while hasattr(host, name):
        number += 1
        name = f"grown_{number}"
    return name


def _any_folded(fates: list[Fate]) -> bool:
    return any(fate.how.startswith("folded") for fate in fates)
