"""The configuration reference: every key of conf/, its value in every file, and what its constructor says of it."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from docs.tools.sources import ROOT, arguments_of, summary_of

CONF: Final = ROOT / "conf"
RECIPES: Final = "experiment"

_OF_PLACE: Final = {
    "bench": "esper.bench.experiment.Comparison",
    "forge": "esper.forge.client.Forge",
    "nissa": "esper.nissa.callback.GrowthReport",
    "tamiyo": "esper.Tamiyo",
    "tamiyo.kasmina": "esper.kasmina.config.KasminaConfig",
    "trainer": "lightning.pytorch.Trainer",
}
"""The constructor that takes what is mounted at a place, where the files name no class."""

_INSIDE: Final = {
    ("esper.Tamiyo", "settings"): "esper.tamiyo.config.TamiyoConfig",
    ("esper.tamiyo.config.TamiyoConfig", "rollback"): "esper.tamiyo.config.RollbackConfig",
    ("esper.tamiyo.config.TamiyoConfig", "schedule"): "esper.tamiyo.config.Planting",
}
"""The record that an argument takes as a mapping, or as a list of mappings."""

_ELSEWHERE: Final = {
    "torch.optim.AdamW": {
        "lr": "peak learning rate.",
        "betas": "decay of the running means of the gradient and of its square.",
        "weight_decay": "decoupled weight decay.",
    },
    "esper.nissa.loggers.csv_logger": {"save_dir": "folder of the run's files."},
    "esper.nissa.loggers.tensorboard_logger": {"save_dir": "folder of the run's files."},
}
"""What is said of arguments where no docstring in reach does."""

_OF_RUN: Final = {
    "seed_everything": "seed of the run: first weights, order of the data, random choices.",
    "output_dir": "folder of everything that the run writes.",
    "hydra.launcher.n_jobs": "runs of a sweep (`-m`) at a time.",
    "hydra.run.dir": "folder of a single run.",
    "hydra.sweep.dir": "folder of a sweep.",
    "hydra.sweep.subdir": "folder of one run in it.",
}
"""What is said of the keys of train.yaml that have no comment there."""

_PACKAGE: Final = re.compile(r"# @package (\S+)")


class Key(NamedTuple):
    """One key of the configuration.

    Args:
        owner: class, function or record that takes it; empty for the run itself.
        place: dotted path of the mapping that holds it, in the composed configuration.
        name: its name.
        meaning: what it does.
        values: its value in each file that has it.
    """

    owner: str
    place: str
    name: str
    meaning: str
    values: dict[str, str]


class _Seen(NamedTuple):
    owner: str
    place: str
    name: str
    value: Any
    comment: str


# --- reading --------------------------------------------------------------------------------------------------------


def groups() -> list[str]:
    """Return the groups that take a constructor's arguments, in the order of the run's defaults."""
    entries = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    named = [key for entry in entries if isinstance(entry, dict) for key in entry if not key.startswith("override")]
    folders = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != RECIPES)
    return [*(name for name in named if name in folders), *(name for name in folders if name not in named)]


def default_of(group: str) -> str:
    """Return the option that a run takes unless told otherwise, or an empty text."""
    entries = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    return next((str(entry[group]) for entry in entries if isinstance(entry, dict) and group in entry), "")


def keys_of(group: str) -> list[Key]:
    """Return the keys of a group, each once, with its value in every file.

    Raises:
        LookupError: nothing says what a key means.
    """
    found: dict[tuple[str, str], Key] = {}
    for file in sorted((CONF / group).glob("*.yaml")):
        for seen in _walk_file(group, file):
            words = meaning(seen.owner, seen.name, seen.comment)
            known = found.setdefault((seen.owner, seen.name), Key(seen.owner, seen.place, seen.name, words, {}))
            known.values.setdefault(file.stem, value_text(seen.value))
    return list(found.values())


def keys_of_run() -> list[Key]:
    """Return the keys of train.yaml."""
    text = (CONF / "train.yaml").read_text(encoding="utf-8")
    said, content = comments(text), yaml.safe_load(text)
    del content["defaults"]
    return [
        Key("", "", name, said.get(name) or _OF_RUN[name], {"train": value_text(value)})
        for name, value in _leaves(content)
    ]


def _leaves(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _walk_file(group: str, file: Path) -> Iterator[_Seen]:
    text = file.read_text(encoding="utf-8")
    package = _PACKAGE.search(text)
    place = package[1] if package else group
    return _walk(yaml.safe_load(text), _OF_PLACE.get(place, ""), place, "", comments(text))


def _walk(value: Any, owner: str, place: str, path: str, said: Mapping[str, str]) -> Iterator[_Seen]:
    """Yield the keys of a mapping, and those of what is inside."""
    if "class_path" in value:
        # What stands beside is short for the same key inside.
        owner, value = value["class_path"], value.get("init_args") or {}
        place, path = f"{place}.init_args", f"{path}init_args."
    for key, inner in value.items():
        yield _Seen(owner, place, key, inner, said.get(f"{path}{key}", ""))
        for item in inner if isinstance(inner, list) else [inner]:
            if isinstance(item, dict):
                below = _INSIDE.get((owner, key), item.get("class_path", ""))
                yield from _walk(item, below, f"{place}.{key}", f"{path}{key}.", said)


def comments(text: str) -> dict[str, str]:
    r"""Return the comment behind each key of a YAML file, by its dotted path.

    Example:
        >>> comments("a: 1   # one\nb:\n  c: 2  # two\n")
        {'a': 'one', 'b.c': 'two'}
    """
    lines, found = text.splitlines(), dict[str, str]()

    def visit(node: yaml.Node, above: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            comment = lines[key.start_mark.line].partition(" # ")[2].strip()
            if comment and not isinstance(value, yaml.MappingNode):
                found[f"{above}{key.value}"] = comment
            visit(value, f"{above}{key.value}.")

    visit(yaml.compose(text, yaml.SafeLoader), "")
    return found


def meaning(owner: str, name: str, comment: str = "") -> str:
    """Return what a key means: its constructor's words, then the comment of the file.

    Raises:
        LookupError: nobody says it.
    """
    told = _ELSEWHERE.get(owner, {}).get(name) or (arguments_of(owner).get(name, "") if owner else "")
    if not told:
        raise LookupError(f"{owner or 'no class'} tells of a key {name!r}; add it to the Args of what takes it.")
    return f"{told} ({comment})" if comment and comment.rstrip(".") not in told else told


def value_text(value: Any) -> str:
    """Return a value as YAML in one line; what has keys of its own is told below."""
    if isinstance(value, dict):
        return str(value.get("class_path", "see below"))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "see below"
    if isinstance(value, str):
        return value or '""'
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


# --- writing --------------------------------------------------------------------------------------------------------


@cache
def page() -> str:
    """Return the configuration reference."""
    intro = (CONF / "README.md").read_text(encoding="utf-8").partition("\n")[2].strip()
    parts = ["# Configuration reference", intro, "## The run", "`conf/train.yaml`", _table(keys_of_run(), "")]
    for group in groups():
        parts += [f"## {group}", *_group(group)]
    return "\n\n".join([*parts, "## experiment", *_recipes()]) + "\n"


def _group(group: str) -> Iterator[str]:
    default = default_of(group)
    options = [f"`{file.stem}`" + (" (default)" * (file.stem == default)) for file in _files(group)]
    yield f"Options: {', '.join(options)}."
    keys = keys_of(group)
    for owner in dict.fromkeys(key.owner for key in keys):
        own = [key for key in keys if key.owner == owner]
        summary = "" if owner.startswith("torch.") else f" {summary_of(owner)}"
        yield f"### `{owner}` {{ #{group}-{owner.rpartition('.')[2].lower()} }}"
        yield f"At `{own[0].place}`.{summary}"
        yield _table(own, default)


def _files(group: str) -> list[Path]:
    return sorted((CONF / group).glob("*.yaml"))


def _table(keys: list[Key], default: str) -> str:
    rows = [f"| `{key.name}` | {_values(key.values, default)} | {_cell(key.meaning)} |" for key in keys]
    return "\n".join(["| key | value | meaning |", "|---|---|---|", *rows])


def _values(values: dict[str, str], default: str) -> str:
    """Return a value that all files share, or each with the files that have it, the default's first."""
    files: dict[str, list[str]] = {}
    for option in sorted(values, key=lambda name: name != default):
        files.setdefault(values[option], []).append(option)
    if len(files) == 1:
        return f"`{_cell(next(iter(files)))}`"
    return "<br>".join(f"`{_cell(value)}` ({', '.join(options)})" for value, options in files.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _recipes() -> Iterator[str]:
    yield "Recipes on top of the others: `python train.py +experiment=NAME`."
    rows = []
    for file in _files(RECIPES):
        said = next(x for x in file.read_text(encoding="utf-8").splitlines() if x.startswith("# ") and "@" not in x)
        words = said.removeprefix("# ").partition(" Lab book:")[0]
        rows.append(f"| [`{file.stem}`](experiments/{file.stem}/README.md) | {_cell(words)} |")
    yield "\n".join(["| recipe | what it is |", "|---|---|", *rows])
