"""One site of the host: its forward hook, its grafts, its health."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from esper.blueprints.site import Layout
from esper.kasmina import fused, telemetry
from esper.kasmina.graft import Graft
from esper.kasmina.outputs import first_input, first_tensor, replace_first
from esper.kasmina.readings import Kept, Readings, read_again
from esper.kasmina.sites import SiteKind
from esper.kasmina.trends import no_history
from esper.leyline.errors import SiteError
from esper.leyline.events import Fault

_LAYOUTS: dict[int, Layout] = {2: "bd", 3: "btd", 4: "bchw"}
_CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_NESTED = (
    "in evaluation its tensors are nested, by the fast path for padded batches; "
    "build the encoder with enable_nested_tensor=False"
)
_FORWARD, _GRADIENT = slice(len(telemetry.FORWARD_METRICS)), telemetry.COLUMN["gradient_norm"]
FULLY_EVERY = 8
"""Of so many sampled activations one is read fully: products of rows cost as much as all the rest."""
_Function = TypeVar("_Function", bound=Callable[..., Any])
_outside_compiled: Callable[..., Callable[[_Function], _Function]] = partial(
    torch.compiler.disable, reason="what grows at a site is no part of the compiled host"
)


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
        rows = telemetry.row_count(chunks)
        self.register_buffer("health", torch.zeros(rows, len(telemetry.METRICS)), persistent=False)
        self.history = no_history(rows)
        # Counted without asking the device.
        self.samples = np.zeros(len(telemetry.METRICS))
        self.readings = Readings(chunks)
        self._fully = False

    @property
    def site(self) -> nn.Module:
        """The host's module."""
        return self._site[0]

    @property
    def dim(self) -> int:
        """The feature dimension of the output."""
        return 1 if self.facts is not None and self.facts.layout == "bchw" else -1

    @_outside_compiled(recursive=False)
    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Observe, and blend what is live; None leaves the output as it is.

        In a host under `torch.compile` the graph breaks here, and the hook runs between two compiled pieces: those stay
        as they are whatever grows, and a fault of a child is contained as in an eager host. Traced into the host it
        would cost nothing while dormant, but every graft would compile anew what it sits in.
        """
        if self.probing or self.live:
            return self._act(module, args, kwargs, output)
        if self.sampling and module.training:
            self._read(output)
        return None

    @_outside_compiled()
    def _act(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        y, x = first_tensor(output), first_input(args, kwargs)
        if y is not None and y.is_nested:
            self._bypass_nested()
            return None
        if self.probing:
            self._probe(module, x, y)
        if y is None or self.facts is None:
            return None
        if self.sampling and module.training:
            self._sample(y)
        result = self._blend(x, y) if self.live else y
        if self.probing and y is not x:
            result = self._watch(result)
        return replace_first(output, result) if result is not y else None

    def refresh(self) -> None:
        """Recompute which grafts the hook must run."""
        self.live = tuple(graft for graft in self.all_grafts() if graft.live)

    def all_grafts(self) -> Iterator[Graft]:
        """Yield the grafts in the order of their slots."""
        for graft in self.grafts.values():
            assert isinstance(graft, Graft)
            yield graft

    def _blend(self, x: Tensor | None, y: Tensor) -> Tensor:
        with _kept_whole():
            found = [graft.contribution(x, y, self.dim) for graft in self.live]
            additions = [addition for addition in found if addition is not None]
            result = fused.blend(y, additions, self.dim) if additions else y
        if any(graft.fault is not None for graft in self.live):
            self.refresh()
        return result

    @_outside_compiled()
    def _read(self, output: Any) -> None:
        """Sample a dormant site."""
        y = first_tensor(output)
        if y is not None and self.facts is not None and not y.is_nested:
            self._sample(y)

    def _sample(self, y: Tensor) -> None:
        if y.numel() == 0:
            return  # An expert without tokens has nothing to tell.
        if _recomputing():
            kept = read_again(y.detach(), self.dim) if self._fully else None
        else:
            self._fully = bool(self.samples[0] % FULLY_EVERY == 0)
            kept = self.readings.read_activation(y.detach(), self.dim, fully=self._fully)
            self.samples[_FORWARD] += 1
        if y.requires_grad and torch.is_grad_enabled():
            y.register_hook(partial(self._sample_gradient, kept if self._fully else None))  # type: ignore[no-untyped-call]

    def _sample_gradient(self, kept: Kept | None, grad: Tensor) -> None:
        # A gradient that is differentiated again has a graph behind it, which must not be kept.
        self.readings.read_gradient(grad.detach(), self.dim, kept)
        self.samples[_GRADIENT] += 1

    def clear_health(self) -> None:
        """Begin anew."""
        self.health.zero_()
        self.samples[:] = 0

    def take_health(self, mean_SM: Tensor) -> None:
        """Replace the health since the last drain by a mean, [R, metrics], NaN where not sampled."""
        self.health.copy_(mean_SM.nan_to_num(0.0))
        self.samples[:] = (~mean_SM.isnan()).any(0).numpy()

    def add_health(self, metric: str, values: Tensor | float) -> None:
        """Add one sample of a metric, per chunk or the same for all."""
        column = telemetry.COLUMN[metric]
        self.health[:, column] += values
        self.samples[column] += 1

    def _bypass_nested(self) -> None:
        if self.probing:
            self.refusal = _NESTED
        for graft in self.live:
            graft.fail(Fault.WRONG_SHAPE, _NESTED)
        self.refresh()

    def _probe(self, module: nn.Module, x: Tensor | None, y: Tensor | None) -> None:
        self.fired[module.training] = True
        if y is None:
            self.refusal = "its output holds no float tensor"
            return
        if self.facts is None:
            self._take_facts(module, x, y)
        else:
            self._check_facts(y)
        if y is x and y.requires_grad and torch.is_grad_enabled():
            y.register_hook(self._see_gradient)  # type: ignore[no-untyped-call]

    def _watch(self, y: Tensor) -> Tensor:
        """Return y, as a copy of its own until a gradient has reached it.

        The module may use y itself, as a router does whose logits nobody else reads; only a copy tells whether
        something behind the site listens. What a frozen part of the host puts out asks for no gradient; its copy does,
        for once, because a child there would.
        """
        if self.gradient_seen or not torch.is_grad_enabled() or not (y.requires_grad or self.site.training):
            return y
        copy = y.clone() if y.requires_grad else y.detach().requires_grad_().clone()
        copy.register_hook(self._see_gradient)  # type: ignore[no-untyped-call]
        return copy

    def _see_gradient(self, grad: Tensor) -> None:
        self.gradient_seen = True

    def _take_facts(self, module: nn.Module, x: Tensor | None, y: Tensor) -> None:
        layout = _LAYOUTS.get(y.dim())
        if layout is None or (layout == "bchw" and not _is_convolutional(module)):
            self.refusal = f"its output has shape {tuple(y.shape)}; [B, D], [B, T, D] or [B, C, H, W] is needed"
            if y.dim() == 4:
                self.refusal += ", the latter from a convolution or a 2-d normalisation"
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

    def _check_facts(self, y: Tensor) -> None:
        """Refuse a module that is used again on something else, as a shared activation function is."""
        assert self.facts is not None
        found = (_LAYOUTS.get(y.dim()), y.shape[self.dim] if y.dim() > 1 else 0)
        if self.refusal is None and found != (self.facts.layout, self.facts.width):
            self.refusal = (
                f"it runs on several kinds of features: {self.facts.width} in layout {self.facts.layout}, "
                f"then an output of shape {tuple(y.shape)}"
            )

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


def _recomputing() -> bool:
    """Whether a backward pass runs this forward again, as gradient checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _kept_whole() -> AbstractContextManager[None]:
    """Under gradient checkpointing, let a child keep its own activations.

    Checkpointing counts what a forward saves and refuses a second run that saves less. So a child that failed in the
    first run, and is bypassed in the second, must not take part in that count.
    """
    if torch.compiler.is_exporting() or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _grid(t: Tensor, axis: int) -> tuple[int, ...]:
    shape = list(t.shape)
    del shape[axis]
    return tuple(shape)


def _is_convolutional(module: nn.Module) -> bool:
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm, nn.Identity)
    return any(isinstance(m, kinds) or type(m).__name__.endswith("Norm2d") for m in module.modules())
