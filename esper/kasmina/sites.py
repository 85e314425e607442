"""Find the places in a host model that may carry seeds, and name their family."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from esper.leyline.errors import SiteError

SiteKind = Literal["attention", "mlp", "linear", "conv2d", "norm", "stream", "block"]
Target = str | type[nn.Module]
Targets = Target | Sequence[Target] | Callable[[str, nn.Module], bool] | None

_ATTENTION = ("attn", "attention", "self_attn", "selfattention")
_MLP = ("mlp", "ffn", "feedforward", "feed_forward", "moe")
_DEFAULT_KINDS = frozenset({"attention", "mlp", "linear", "conv2d", "norm"})


def site_kind(path: str, module: nn.Module) -> SiteKind:
    """Return the family of a module, from its type first and its name second.

    Example:
        >>> site_kind("blocks.0.fc", nn.Linear(2, 2))
        'linear'
    """
    type_name, name = type(module).__name__.lower(), path.rpartition(".")[2].lower()
    # `Conv1D` of the transformers library and `Linear` of PyTorch Geometric are linear; PyTorch's `Conv1d` is not.
    if isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear"):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    if isinstance(module, nn.Identity):
        return "stream"
    if "norm" in type_name:
        return "norm"
    if isinstance(module, nn.MultiheadAttention) or "attention" in type_name or name in _ATTENTION:
        return "attention"
    if any(word in type_name for word in _MLP) or name in _MLP:
        return "mlp"
    return "block"


def find_sites(host: nn.Module, targets: Targets = None) -> dict[str, nn.Module]:
    """Return the modules that `targets` names, by path, in module order.

    Args:
        host: the model.
        targets: module types and glob patterns over module paths, a predicate `(path, module) -> bool`,
            or None for attention, MLP, linear, convolution and normalisation modules.

    Raises:
        SiteError: a target matches nothing.

    Example:
        >>> list(find_sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear))
        ['0']
    """
    modules = {path: module for path, module in host.named_modules() if path}
    if targets is None:
        return {p: m for p, m in modules.items() if site_kind(p, m) in _DEFAULT_KINDS and not _is_container(m)}
    if callable(targets) and not isinstance(targets, type):
        return _require(modules, {p: m for p, m in modules.items() if targets(p, m)}, "the predicate")
    wanted = [targets] if isinstance(targets, str | type) else list(targets)
    found: dict[str, nn.Module] = {}
    for target in wanted:
        found |= _require(modules, dict(_matching(modules, target)), repr(target))
    return {path: module for path, module in modules.items() if path in found}


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def _matching(modules: dict[str, nn.Module], target: Target) -> Iterator[tuple[str, nn.Module]]:
    for path, module in modules.items():
        if isinstance(module, target) if isinstance(target, type) else fnmatchcase(path, target):
            yield path, module


def _require(modules: dict[str, nn.Module], found: dict[str, nn.Module], target: str) -> dict[str, nn.Module]:
    if found:
        return found
    near = get_close_matches(target.strip("'"), modules, n=3) or list(modules)[:5]
    raise SiteError(
        f"target {target} matches no module; module paths look like {', '.join(map(repr, near)) or '(none)'}. "
        "Give a glob over module paths, a module type, or a predicate."
    )


def is_time_major(host: nn.Module, path: str) -> bool:
    """Return whether `batch_first=False` is said by the module at `path`, one around it, or one beside those."""
    names = path.split(".")
    around = [host.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    beside = [child for module in around for child in module.children()]
    return any(getattr(module, "batch_first", None) is False for module in around + beside)


def fused_sites(host: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the encoder layers whose fused evaluation PyTorch leaves when a hook sits at one of `paths`.

    Seeds that nobody uses then still change no bit of training; evaluation equals the fused path's to rounding.
    """
    if not torch.backends.mha.get_fastpath_enabled():
        return []
    layers = [path for path, module in host.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
    return [layer for layer in layers if any(f"{path}.".startswith(f"{layer}.") or not layer for path in paths)]


def tied_sites(host: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Return, for each path whose module or weights are shared, the reason why it cannot carry a seed."""
    owners = Counter(id(m) for _, m in host.named_modules(remove_duplicate=False))
    holders: Counter[int] = Counter()
    for module in host.modules():
        holders.update({id(p) for p in module.parameters(recurse=False)})
    reasons = {}
    for path in paths:
        module = host.get_submodule(path)
        if owners[id(module)] > 1:
            reasons[path] = "the module is used under several names"
        elif any(holders[id(p)] > 1 for p in module.parameters(recurse=False)):
            reasons[path] = "its weights are tied to another module"
    return reasons
