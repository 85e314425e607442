"""Children that have grown into a network, as ordinary modules.

Torch is all that this file needs, and `esper.export` writes it word for word into the folders that it makes.
"""

import inspect
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.outputs import first_input, first_tensor, replace_first


class Planted(nn.Module):
    """A child and its way into a site's output: `y + alpha * r` on the child's chunk of y.

    The residual r is what the child returns, or `child(y) - y` where it computes a replacement.

    Args:
        child: the network that has grown.
        reads: what it reads, the site's `output` or its `input`.
        replaces: whether it computes a replacement instead of a residual.
        axis: the feature axis.
        start: first feature of the chunk.
        width: features of the chunk; None for all.
        alpha: share of the child, 0 to 1.
        mixes_tokens: whether a token's result depends on other tokens.

    Shapes:
        x: the site's input; y: its output; the result has the shape of the chunk.
    """

    def __init__(
        self,
        child: nn.Module,
        *,
        reads: str = "output",
        replaces: bool = False,
        axis: int = -1,
        start: int = 0,
        width: int | None = None,
        alpha: float = 1.0,
        mixes_tokens: bool = False,
    ) -> None:
        """Hold the child and its place."""
        super().__init__()
        self.child = child
        self.reads, self.replaces, self.axis, self.start, self.width = reads, replaces, axis, start, width
        self.alpha, self.mixes_tokens = alpha, mixes_tokens

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        """Return what the child adds to its chunk."""
        part = y if self.width is None else y.narrow(self.axis, self.start, self.width)
        source = part if self.reads == "output" else x
        assert source is not None, "the child reads the site's input, but there is no float tensor in it"
        added: Tensor = self.child(self._in_own_precision(source)).to(part.dtype)
        if self.replaces:
            added = added - part
        return added if self.alpha == 1 else added * added.new_tensor(self.alpha)

    def _in_own_precision(self, source: Tensor) -> Tensor:
        # A child may keep float32 weights beside a bfloat16 host.
        own = next((p.dtype for p in self.child.parameters()), source.dtype)
        return source if torch.is_autocast_enabled(source.device.type) else source.to(own)


class Site(nn.ModuleDict):
    """The children of one module of the host; its bound method `hook` is that module's forward hook."""

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Add every child's share to the module's output."""
        y, x = first_tensor(output), first_input(args, kwargs)
        if y is None:
            return None
        out = y
        for planted in self.values():
            out = _plus(out, planted(x, y), planted)
        return replace_first(output, out)


def _plus(out: Tensor, added: Tensor, planted: nn.Module) -> Tensor:
    assert isinstance(planted, Planted)
    axis, start, width = planted.axis, planted.start, planted.width
    if width is None:
        return out + added
    behind = out.shape[axis] - start - width
    chunk = out.narrow(axis, start, width) + added
    return torch.cat([out.narrow(axis, 0, start), chunk, out.narrow(axis, start + width, behind)], axis)


class Grown(nn.ModuleDict):
    """Everything that has grown in a network: one `Site` per module of the host.

    It stands beside the host's own modules; hooks do the work, so that no name of the host changes.

    Args:
        sites: the children by name, for each module path of the host.
    """

    def __init__(self, sites: Mapping[str, Mapping[str, Planted]]) -> None:
        """Hold the children; `plant` hooks them in."""
        super().__init__()
        self.paths: dict[str, str] = {}
        self.recipe: list[dict[str, Any]] = []
        for path, children in sites.items():
            name = "at_" + path.replace(".", "_")
            while name in self.paths:
                name += "_"
            self.paths[name] = path
            self[name] = Site(dict(children))

    def forward(self, x: Any) -> Any:
        """Return x: a host that runs all its modules in a row, as `Sequential` does, passes here too."""
        return x


def plant(host: nn.Module, sites: Mapping[str, Mapping[str, Planted]], name: str = "grown") -> Grown:
    """Hook children into a network; they become its submodule `name`.

    Args:
        host: the network.
        sites: the children by name, for each module path of the host.
        name: attribute of the host that holds them.

    Example:
        >>> host = nn.Sequential(nn.Linear(2, 2))
        >>> grown = plant(host, {"0": {"c0s0": Planted(nn.Identity())}})
        >>> x = torch.ones(1, 2)
        >>> torch.equal(host(x), 2 * nn.functional.linear(x, host[0].weight, host[0].bias))
        True
    """
    grown = Grown(sites)
    for key, path in grown.paths.items():
        site = grown[key]
        assert isinstance(site, Site)
        host.get_submodule(path).register_forward_hook(site.hook, with_kwargs=True)
    host.add_module(name, grown)
    if any(isinstance(m, Planted) and m.mixes_tokens for m in grown.modules()):
        _refuse_caches(host)
    return grown


def _refuse_caches(host: nn.Module) -> None:
    """Let a language model write without a key-value cache, and refuse to go on from a filled one."""
    for module in host.modules():
        config = getattr(module, "generation_config", None)
        if config is not None:
            config.use_cache = False
            module.register_forward_pre_hook(_no_cache, with_kwargs=True)


def _no_cache(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    past = given.get("past_key_values", kwargs.get("past_key_values"))
    length = getattr(past, "get_seq_length", None)
    if length() if callable(length) else past:
        raise RuntimeError(
            "a child of this network mixes tokens, and with a key-value cache it would see the new ones alone; "
            "call generate(..., use_cache=False), or the model without past_key_values."
        )


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def load_weights(host: nn.Module, file: str | Path) -> nn.Module:
    """Fill a network from a `.safetensors` file, in the file's precision, and return it ready to be used.

    Args:
        host: a network with the file's names and shapes.
        file: 8 bytes with the length of a JSON header, the header, the numbers.
    """
    content = bytearray(Path(file).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.pop("__metadata__", None)
    state = {name: _tensor(content, end, entry) for name, entry in header.items()}
    for name, own in [*host.named_parameters(), *host.named_buffers()]:
        if name in state:
            own.data = own.data.to(state[name].dtype)
    host.load_state_dict(state)
    return host.eval()


def _tensor(content: bytearray, end: int, entry: Mapping[str, Any]) -> Tensor:
    shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
    if not prod(shape):
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(content, dtype=dtype, count=prod(shape), offset=end + entry["data_offsets"][0])
    return flat.view(shape)
