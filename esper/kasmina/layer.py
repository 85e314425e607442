"""One site of the host: its forward hook, its grafts, its health."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper.blueprints.site import Layout
from esper.kasmina import telemetry
from esper.kasmina.graft import Graft
from esper.kasmina.sites import SiteKind
from esper.leyline.errors import SiteError

_LAYOUTS: dict[int, Layout] = {2: "bd", 3: "btd", 4: "bchw"}
_CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


class SiteFacts(NamedTuple):
    """What the first batch told about a site.

    Args:
        layout: `bd`, `btd` or `bchw`.
        width: features of the output.
        input_width: features of the input; 0 when the site takes no float tensor.
        tokens: positions per sample: T, H * W, or 1.
        same_grid: whether input and output have the same positions.
    """

    layout: Layout
    width: int
    input_width: int
    tokens: int
    same_grid: bool


class KasminaLayer(nn.Module):
    """Carries the seeds of one site; its bound method `hook` is the site's forward hook.

    It lives beside the host, so that the host's own state-dict keys never change.
    While every seed is dormant the hook returns None: no split, no copy.

    Args:
        path: module path of the site in the host.
        kind: family of the site's module.
        chunks: contiguous chunks of the feature dimension.
        site: the host's module.
    """

    health: Tensor
    samples: Tensor

    def __init__(self, path: str, kind: SiteKind, chunks: int, site: nn.Module) -> None:
        """Start unprobed: the first batch tells the site's shape."""
        super().__init__()
        # A tuple hides the host's module from this module's own parameters, yet follows deepcopy and pickle.
        self._site = (site,)
        self.path, self.kind, self.chunks = path, kind, chunks
        self.grafts = nn.ModuleDict()
        self.facts: SiteFacts | None = None
        self.refusal: str | None = None
        self.time_major = False
        self.fired = {True: False, False: False}
        self.gradient_seen = False
        self.probing = True
        self.sampling = False
        self.live: tuple[Graft, ...] = ()
        self.register_buffer("health", torch.zeros(chunks, len(telemetry.METRICS)), persistent=False)
        self.register_buffer("samples", torch.zeros(len(telemetry.METRICS)), persistent=False)

    @property
    def site(self) -> nn.Module:
        """The host's module."""
        return self._site[0]

    @property
    def dim(self) -> int:
        """The feature dimension of the output."""
        return 1 if self.facts is not None and self.facts.layout == "bchw" else -1

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Observe, and blend what is live; None leaves the output as it is."""
        if not (self.probing or self.sampling or self.live):
            return None
        y, x = _first_tensor(output), _first_input(args, kwargs)
        if self.probing:
            self._probe(module, x, y)
        if y is None or self.facts is None:
            return None
        if self.sampling and module.training:
            self._sample(y)
        result = self._blend(x, y) if self.live else y
        if self.probing and y is not x:
            result = self._watch(result)
        return _replace_first(output, result) if result is not y else None

    def refresh(self) -> None:
        """Recompute which grafts the hook must run."""
        self.live = tuple(graft for graft in self.all_grafts() if graft.live)

    def all_grafts(self) -> Iterator[Graft]:
        """Yield the grafts in the order of their slots."""
        for graft in self.grafts.values():
            assert isinstance(graft, Graft)
            yield graft

    def _blend(self, x: Tensor | None, y: Tensor) -> Tensor:
        out, copied, dim = y, False, self.dim
        for graft in self.live:
            added = graft.contribution(x, y, dim)
            if added is None:
                continue
            if graft.width is None:
                out, copied = out + added, True
                continue
            out, copied = (out if copied else out.clone()), True
            out.narrow(dim, graft.start, graft.width).add_(added)
        if any(graft.fault is not None for graft in self.live):
            self.refresh()
        return out

    def _sample(self, y: Tensor) -> None:
        with torch.no_grad():
            stats = telemetry.chunk_statistics(telemetry.thinned(telemetry.as_rows(y, self.dim)), self.chunks)
            self.health[:, : stats.shape[1]] += stats
            self.samples[: stats.shape[1]] += 1
        if y.requires_grad and torch.is_grad_enabled():
            y.register_hook(self._sample_gradient)  # type: ignore[no-untyped-call]

    def _sample_gradient(self, grad: Tensor) -> None:
        norms = telemetry.chunk_gradient_norms(telemetry.as_rows(grad, self.dim), self.chunks)
        self.add_health("gradient_norm", norms)

    def add_health(self, metric: str, values: Tensor | float) -> None:
        """Add one sample of a metric, per chunk or the same for all."""
        column = telemetry.COLUMN[metric]
        self.health[:, column] += values
        self.samples[column] += 1

    def _probe(self, module: nn.Module, x: Tensor | None, y: Tensor | None) -> None:
        self.fired[module.training] = True
        if y is None:
            self.refusal = "its output holds no float tensor"
            return
        if self.facts is None:
            self._take_facts(module, x, y)
        if y is x and y.requires_grad and torch.is_grad_enabled():
            y.register_hook(self._see_gradient)  # type: ignore[no-untyped-call]

    def _watch(self, y: Tensor) -> Tensor:
        """Return y, as a copy of its own until a gradient has reached it.

        The module may use y itself, as a router does whose logits nobody else reads; only a copy tells whether
        something behind the site listens.
        """
        if self.gradient_seen or not (y.requires_grad and torch.is_grad_enabled()):
            return y
        copy = y.clone()
        copy.register_hook(self._see_gradient)  # type: ignore[no-untyped-call]
        return copy

    def _see_gradient(self, grad: Tensor) -> None:
        self.gradient_seen = True

    def _take_facts(self, module: nn.Module, x: Tensor | None, y: Tensor) -> None:
        layout = _LAYOUTS.get(y.dim())
        if layout is None or (layout == "bchw" and not _is_convolutional(module)):
            self.refusal = f"its output has shape {tuple(y.shape)}; [B, D], [B, T, D] or [B, C, H, W] is needed"
            return
        if layout == "btd" and isinstance(module, _CHANNELS_SECOND):
            self.refusal = f"its output has shape {tuple(y.shape)} with the features on axis 1; they must come last"
            return
        if layout == "btd" and self.time_major:
            self.refusal = "its tensors are time-major (batch_first=False); a child would mix samples"
            return
        axis = 1 if layout == "bchw" else -1
        width = y.shape[axis]
        require_chunks(self.path, self.chunks, width)
        same_grid = x is not None and x.dim() == y.dim() and _grid(x, axis) == _grid(y, axis)
        input_width = x.shape[axis] if x is not None and x.dim() == y.dim() else 0
        self.facts = SiteFacts(layout, width, input_width, max(1, y[0].numel() // width), same_grid)

    def finish_probe(self) -> str | None:
        """End probing; return why the site is refused, or None."""
        self.probing = False
        if self.refusal is None and not any(self.fired.values()):
            self.refusal = "its forward never runs (its weights may be used directly)"
        elif self.refusal is None and self.fired[True] and not self.gradient_seen:
            self.refusal = "no gradient flows through its output"
        elif self.refusal is None and self.fired[True] and not self.fired[False]:
            self.refusal = "it does not run in evaluation"
        return self.refusal


def require_chunks(path: str, chunks: int, width: int) -> None:
    """Check that a layer has at least as many features as chunks.

    Raises:
        SiteError: more seeds than features are asked for.
    """
    if chunks > width:
        raise SiteError(
            f"seeds_per_layer={chunks} is larger than the {width} features of {path!r}; "
            f"use 1 to {width}, or leave this layer out of `targets`."
        )


def _grid(t: Tensor, axis: int) -> tuple[int, ...]:
    shape = list(t.shape)
    del shape[axis]
    return tuple(shape)


def _is_convolutional(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm | nn.Identity) for m in module.modules())


def _first_tensor(output: Any) -> Tensor | None:
    value = output[0] if isinstance(output, tuple | list) and output else output
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def _replace_first(output: Any, value: Tensor) -> Any:
    if isinstance(output, Tensor):
        return value
    rest = (value, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
