"""The README beside a saved or exported network: what grew, where, on what evidence, and how to load it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Fate(NamedTuple):
    """What an export made of one child.

    Args:
        seed_id: its seed, `layer#chunk.slot`.
        blueprint: what it is.
        params: its parameters.
        how: what became of it.
        why: the reason, where it did not fold into the host.
    """

    seed_id: str
    blueprint: str
    params: int
    how: str
    why: str = ""


_SAVED = """\
# A grown network: {name}

Esper grew this network while it trained. {sum}

{table}

## Load it

```python
import esper

model = esper.load_model("path/to/this/folder"{argument})   # {host}
plain = esper.export(model)                                 # a plain torch.nn.Module, without seeds
```

## Files

| file | content |
|---|---|
| `weights.safetensors` | weights of the host and of the children |
| `topology.json` | every seed's record; rebuilds the children (format {format}, checked by SHA-256) |
| `lineage.json` | each fossil with its blueprint, kernel and evidence |
| `blueprints/` | the graph of every child, named by its content hash |
"""

_EXPORTED = """\
# A grown network: {name}

Esper grew this network while it trained. {sum}

{table}

What became of each child in this export:

{fates}

## Run it

Nothing of Esper is needed, only torch and the code that builds the host, a fresh `{name}` with any weights:

```python
from grown import load       # grown.py is in this folder

model = load(host)           # plants the children, fills in the weights, returns it in evaluation mode
```

`grown.py` is plain code to read and to change; `grow(host)` plants the children without filling them.
"""


def saved_card(topology: Mapping[str, Any], lineage: Mapping[str, Any], name: str) -> str:
    """Return the card of a folder that `save_model` wrote.

    Args:
        topology: content of `topology.json`.
        lineage: content of `lineage.json`.
        name: class of the host.
    """
    known = topology["host"] is not None
    return _SAVED.format(
        name=name,
        sum=_sum(lineage),
        table=growth_table(lineage),
        argument="" if known else ", host=fresh",
        host="the host is rebuilt from its recorded arguments" if known else f"`fresh` is a new {name}, any weights",
        format=topology["format"],
    )


def exported_card(lineage: Mapping[str, Any], fates: Sequence[Fate], name: str) -> str:
    """Return the card of a folder that `export` wrote."""
    rows = [(f"`{fate.seed_id}`", fate.blueprint, fate.how + (f" ({fate.why})" if fate.why else "")) for fate in fates]
    return _EXPORTED.format(
        name=name,
        sum=_sum(lineage),
        table=growth_table(lineage),
        fates=_table(("seed", "blueprint", "now"), rows) if rows else "There was none.",
    )


def growth_table(lineage: Mapping[str, Any]) -> str:
    """Return a Markdown table of the fossils with their evidence.

    Example:
        >>> print(growth_table({"fossils": []}))
        Nothing was kept; this is the host alone.
    """
    rows = [
        (
            f"`{fossil['seed_id']}`",
            fossil["blueprint"],
            fossil["reads"],
            ", ".join(f"{size}={value}" for size, value in fossil["dims"].items()) or "-",
            f"{fossil['params']:,}",
            _gain(fossil["counterfactual"]) + (f"; bypassed: {fossil['fault']}" if fossil.get("fault") else ""),
        )
        for fossil in lineage["fossils"]
    ]
    titles = ("where", "what", "reads the site's", "sizes", "parameters", "loss saved (interval, samples)")
    return _table(titles, rows) if rows else "Nothing was kept; this is the host alone."


def _sum(lineage: Mapping[str, Any]) -> str:
    host, added = lineage["host_params"], lineage["added_params"]
    share = f" (+{added / host:.1%})" if host else ""
    return f"{host:,} parameters of the host and {added:,} grown{share}; children kept: {len(lineage['fossils'])}."


def _gain(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "not measured"
    return f"{found['mean']:.4g} ({found['lower']:.4g} to {found['upper']:.4g}, n={found['n']:.0f})"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
