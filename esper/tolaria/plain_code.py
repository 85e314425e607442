"""Write grown children as plain Python: classes that torch alone can run."""

import ast
import copy
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from esper.blueprints.build import Child
from esper.blueprints.dims import width_read
from esper.kasmina import outputs
from esper.leyline.errors import CheckpointError, ConfigError
from esper.tolaria import planted
from esper.tolaria.planted import Grown, Planted, Site

_HEAD = '''\
"""What grew in this {host}, and how to put it into a fresh one. Torch is all that this file needs.

    from grown import load

    model = load(host)    # host: a fresh {host}, any weights
"""

import copy
import inspect
import json
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# --- the children ---


'''

_TAIL = '''\
def grow(host: nn.Module) -> nn.Module:
    """Plant the children, not yet filled, in a fresh host."""
{plants}
    return host


def load(host: nn.Module, file: str | Path | None = None) -> nn.Module:
    """Plant the children in a fresh host and fill both; the weights lie beside this file."""
    return load_weights(grow(host), file or Path(__file__).with_name("weights.safetensors"))


# --- how a child joins its host ---

'''


def code_of(model: nn.Module) -> str:
    """Return a module's source that plants the children of `model` in a fresh host and loads its weights.

    Args:
        model: a plain network; its children are in `Grown` modules.

    Raises:
        ConfigError: a child does something that cannot be written as plain code.
        CheckpointError: the code written does not compute what a child computes.
    """
    classes, plants, written = list[str](), list[str](), dict[str, Planted]()
    for path, grown in _grown(model):
        parent, _, name = path.rpartition(".")
        plants += [f"    plant(host{f'.get_submodule({parent!r})' if parent else ''}, {{"]
        for key, site in grown.items():
            plants.append(f"        {grown.paths[key]!r}: {{")
            assert isinstance(site, Site)
            for slot, child in site.items():
                assert isinstance(child, Planted)
                title = f"Child{len(written)}"
                written[title] = child
                classes.append(_class(title, child, grown.paths[key]))
                plants.append(f"            {slot!r}: {_call(title, child)},")
            plants.append("        },")
        plants.append(f"    }}, {name!r})")
    source = _HEAD.format(host=type(model).__name__) + "".join(classes) + _TAIL.format(plants="\n".join(plants))
    source += _body(outputs) + _body(planted)
    _verify(source, written)
    return source


def _grown(model: nn.Module) -> Iterator[tuple[str, Grown]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, Grown))


def _body(module: ModuleType) -> str:
    """Return a file's text behind its docstring and imports."""
    text = inspect.getsource(module)
    tree = ast.parse(text)
    last = max(node.end_lineno or 0 for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    return "\n".join(text.splitlines()[last:]) + "\n"


def _call(title: str, child: Planted) -> str:
    plain = Planted(nn.Identity())
    names = ("reads", "replaces", "axis", "start", "width", "alpha", "mixes_tokens")
    given = [f"{name}={getattr(child, name)!r}" for name in names if getattr(child, name) != getattr(plain, name)]
    return f"Planted({', '.join([f'{title}()', *given])})"


def _class(title: str, child: Planted, path: str) -> str:
    try:
        network = _alone(child.child)
        graph = _Tracer().trace(network)
        code = graph.python_code("self").src
    except Exception as error:  # a tracer may fail in any way
        raise ConfigError(
            f"the child at {path!r} cannot be written as plain code ({error}); export to a .pt2 or .onnx file."
        ) from error
    count = sum(p.numel() for p in child.child.parameters())
    what = child.child.ir.full_name if isinstance(child.child, Child) else type(child.child).__name__
    lines = [
        f"class {title}(nn.Module):",
        f'    """{what} at `{path}`, {count:,} parameters."""',
        "",
        "    def __init__(self) -> None:",
        "        super().__init__()",
        *(f"        {line}" for line in _parts(graph, network)),
        "",
        *(f"    {line}".rstrip() for line in _tidy(code)),
    ]
    return "\n".join(lines) + "\n\n\n"


class _Tracer(fx.Tracer):
    """Reads buffers as it reads parameters: where they are, not what they hold."""

    proxy_buffer_attributes = True


def _alone(network: nn.Module) -> nn.Module:
    """Return a copy in evaluation and without hooks: what has grown inside a child is planted by itself."""
    twin = copy.deepcopy(network).eval()
    for module in twin.modules():
        module._forward_hooks.clear()
    return twin


def _tidy(code: str) -> list[str]:
    """Drop the tracer's clean-up statements and blank lines."""
    bare = re.sub(r";  [\w =]+ = None$", "", code, flags=re.MULTILINE)
    bare = bare.replace("torch._C._nn.", "nn.functional.").replace("torch.nn.functional.", "nn.functional.")
    bare = bare.replace("x : torch.Tensor", "x: Tensor").replace("-> torch.Tensor:", "-> Tensor:")
    return [line for line in bare.splitlines() if line.strip()]


def _parts(graph: fx.Graph, network: nn.Module) -> Iterator[str]:
    """Yield the statements that make what the code mentions, and the state that only training used."""
    mentioned = [node for node in graph.nodes if node.op in ("call_module", "get_attr")]
    wanted = dict.fromkeys(str(node.target) for node in mentioned)
    wanted |= dict.fromkeys(name for name in network.state_dict() if not any(_is_in(name, path) for path in wanted))
    made = set[str]()
    for target in wanted:
        *around, _ = target.split(".")
        for depth in range(1, len(around) + 1):
            holder = ".".join(around[:depth])
            if holder not in made:
                made.add(holder)
                yield f"self.{holder} = nn.Module()"
        yield _constructor(network, target)


def _is_in(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _constructor(network: nn.Module, target: str) -> str:
    tensor = dict([*network.named_parameters(), *network.named_buffers()]).get(target)
    if isinstance(tensor, nn.Parameter):
        return f"self.{target} = nn.Parameter(torch.empty({tuple(tensor.shape)}))"
    if tensor is not None:
        holder, dot, name = target.rpartition(".")
        return f"self{dot}{holder}.register_buffer({name!r}, torch.empty({tuple(tensor.shape)}))"
    module = network.get_submodule(target)
    # Torch's own layers print themselves as their constructor's call; older releases know no bias without affine.
    return f"self.{target} = nn." + re.sub(r"(affine=False), bias=\w+", r"\1", repr(module))


@torch.no_grad()
def _verify(source: str, written: dict[str, Planted]) -> None:
    """Run what was written against what has grown."""
    names: dict[str, Any] = {"__name__": "grown"}
    try:
        exec(compile(source, "grown.py", "exec"), names)  # noqa: S102 - we wrote it just now
        copies = {title: names[title]() for title in written}
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise ConfigError(
            f"the children cannot be written as plain code ({error}); export to a .pt2 or .onnx file."
        ) from error
    for title, child in written.items():
        twin, network = copies[title], _alone(child.child)
        twin.load_state_dict(network.state_dict(), assign=True)
        twin.eval()
        if isinstance(network, Child) and not _agree(network, twin):
            raise CheckpointError(f"the code written for {network.ir.full_name} does not compute what it computes.")


def _agree(network: Child, twin: nn.Module) -> bool:
    site, width = network.site, width_read(network.ir, network.site)
    side = max(1, round(site.tokens**0.5))
    shape = {"bd": (3, width), "btd": (3, site.tokens, width), "bchw": (3, width, side, side)}[site.layout]
    like = next(iter(network.parameters()), torch.zeros(()))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    return torch.equal(network(x), twin(x))
