"""The library: blueprints by name, one YAML file each with the graph (`ir`) and the manifest (`manifest`)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Final

import yaml

from esper.blueprints.estimate import Estimate, estimate
from esper.blueprints.ir import BlueprintIR, Placement, parse_ir
from esper.blueprints.manifest import BlueprintManifest, parse_manifest
from esper.blueprints.site import SiteShape
from esper.leyline.errors import BlueprintError

BUILT_IN: Final = Path(__file__).with_name("library")
"""Folder of the blueprints that come with Esper."""

STANDARD: Final = (
    "BP-ATTN-STD",
    "BP-CONV-CAUSAL",
    "BP-CONV-RES",
    "BP-EXPERT-MLP",
    "BP-MLP-GELU",
    "BP-MLP-SWIGLU",
    "BP-NORM-RMS",
    "BP-PROJ-IA3",
    "BP-PROJ-LORA",
    "BP-WIDEN",
)
"""The blueprints that may grow where no menu is given: one of each general kind."""

MAX_BYTES: Final = 1 << 16
"""Largest blueprint file that is read."""


@dataclass(frozen=True)
class Blueprint:
    """A graph and what is known of it.

    Args:
        ir: the graph.
        manifest: benefit, risk and needs.
    """

    ir: BlueprintIR
    manifest: BlueprintManifest

    def __post_init__(self) -> None:
        """Check that the graph and the manifest agree."""
        if self.ir.mergeable != self.manifest.mergeable:
            raise BlueprintError(f"{self.ir.name}: ir and manifest disagree about mergeable; make them equal.")
        if set(self.ir.requires) != set(self.manifest.requires_capability):
            needs = ", ".join(self.ir.requires) or "nothing"
            raise BlueprintError(f"{self.ir.name}: requires_capability must name what its operations need: {needs}.")

    def estimate(
        self, site: SiteShape, dims: Mapping[str, int] | None = None, *, reads: Placement | None = None
    ) -> Estimate:
        """Return what it costs at a place, the latency by the manifest's until a kernel has been measured.

        Args:
            site: the place.
            dims: chosen sizes.
            reads: where the child reads; None is what the graph declares.

        Raises:
            BlueprintError: as `make_plan`.
        """
        ir = self.ir if reads is None else self.ir.reading(reads)
        return estimate(ir, site, dims, latency_ms=self.manifest.expected_latency_ms)


class Library:
    """Blueprints by name.

    Args:
        blueprints: the members; their names must differ.

    Example:
        >>> load_library()["BP-MLP-GELU"].ir.full_name
        'BP-MLP-GELU@1.0.0'
    """

    def __init__(self, blueprints: Iterable[Blueprint]) -> None:
        """Index the blueprints by name."""
        self._by_name: dict[str, Blueprint] = {}
        for blueprint in blueprints:
            if blueprint.ir.name in self._by_name:
                raise BlueprintError(f"two blueprints are called {blueprint.ir.name!r}; rename one.")
            self._by_name[blueprint.ir.name] = blueprint

    def __getitem__(self, name: str) -> Blueprint:
        """Return a blueprint.

        Raises:
            BlueprintError: there is none of that name; the message lists near misses.
        """
        if name not in self._by_name:
            near = get_close_matches(name.upper(), self._by_name, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise BlueprintError(f"no blueprint {name!r}; {hint}known: {', '.join(self.names())}.")
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a blueprint of that name."""
        return name in self._by_name

    def __iter__(self) -> Iterator[Blueprint]:
        """Iterate over the blueprints in the order of their names."""
        return (self._by_name[name] for name in self.names())

    def __len__(self) -> int:
        """Return the number of blueprints."""
        return len(self._by_name)

    def names(self) -> tuple[str, ...]:
        """Return the names in alphabetical order."""
        return tuple(sorted(self._by_name))


def load_library(extra_dirs: Iterable[str | Path] = ()) -> Library:
    """Return the built-in blueprints and those of further folders.

    Args:
        extra_dirs: folders of `*.yaml` files, one blueprint each.

    Raises:
        BlueprintError: a folder is missing, a file is malformed, or a name occurs twice.
    """
    extra = [read_blueprint(path) for folder in map(Path, extra_dirs) for path in _files(folder)]
    return Library([*_built_in(), *extra])


@cache
def _built_in() -> tuple[Blueprint, ...]:
    """Read the files that come with Esper, once in a process."""
    return tuple(read_blueprint(path) for path in _files(BUILT_IN))


def read_blueprint(path: Path) -> Blueprint:
    """Return the blueprint of one YAML file.

    Raises:
        BlueprintError: the file cannot be read or is malformed; the message names it.
    """
    try:
        data = yaml.load(_text(path), _PlainLoader)
        if not isinstance(data, dict) or set(data) != {"ir", "manifest"}:
            raise BlueprintError("it must hold exactly 'ir' and 'manifest'.")
        return Blueprint(parse_ir(data["ir"]), parse_manifest(data["manifest"]))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, BlueprintError) as error:
        raise BlueprintError(f"{path}: {error}") from error


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise BlueprintError(f"{folder} is not a folder; give a folder of blueprint files (*.yaml).")
    return sorted(folder.glob("*.yaml"))


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise BlueprintError(f"the file is larger than {MAX_BYTES} bytes.")
    return path.read_text(encoding="utf-8")


class _PlainLoader(yaml.SafeLoader):
    """Plain data only; a key given twice, or an alias, is an error."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise BlueprintError("YAML aliases are not allowed; write the value out.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise BlueprintError(f"line {node.start_mark.line + 1}: key {key!r} is given twice.")
        return super().construct_mapping(node, deep)
