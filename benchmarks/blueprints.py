"""What every blueprint of the library costs, as a table: `python benchmarks/blueprints.py [--rounds 30] [--write]`.

Parameters and multiply-accumulates of one sample are exact, at 64 features and 128 positions (1 for `bd`) with default
sizes. The latency is the forward of 8 samples there, fp32, one thread: the least processor time of several rounds, each
the mean of as many passes as fit into 20 ms, because what else the machine does only ever adds. `compiled` tells
whether a compiled kernel can be made, by tracing forward and backward; nothing is compiled.
`--write` puts the latencies into the manifests and the table into `docs/blueprints.md`.
"""

import argparse
import ctypes
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from esper.blueprints import Blueprint, SiteShape, cost, load_library
from esper.blueprints.build import Child
from esper.blueprints.estimate import reference
from esper.blueprints.library import BUILT_IN, read_blueprint
from esper.blueprints.plan import make_plan
from esper.karn.service import reference as reference_kernel
from esper.karn.service import stated
from esper.kasmina.library_store import example
from esper.leyline.errors import EsperError
from esper.tezzeret.trace import trace

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "blueprints.md"
BEGIN: Final = "<!-- table: python benchmarks/blueprints.py --write -->"
END: Final = "<!-- end of table -->"
TITLES: Final = ("blueprint", "tier", "reads", "fits", "parameters", "MACs", "ms", "causal", "merges", "compiled")
SAMPLES: Final = 8
_ROUND_S: Final = 0.02
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


class Row(NamedTuple):
    """One line of the table."""

    blueprint: Blueprint
    site: SiteShape
    compiled: str

    def cells(self) -> tuple[str, ...]:
        """Return what stands in the columns of `TITLES`."""
        ir, manifest = self.blueprint.ir, self.blueprint.manifest
        price = cost(ir, self.site)
        kinds = f" ({', '.join(ir.site_kinds)})" if ir.site_kinds else ""
        return (
            f"`{ir.name}`",
            str(manifest.safety_tier),
            " or ".join((ir.reads, *ir.also_reads)),
            " ".join(ir.layouts) + kinds,
            f"{price.params:,}",
            f"{price.macs:,}",
            f"{manifest.expected_latency_ms:.2g}",
            "yes" if manifest.causal else "no",
            "yes" if manifest.mergeable else "no",
            self.compiled,
        )


def place(blueprint: Blueprint) -> SiteShape:
    """Return the place at which a blueprint is measured."""
    site = reference(blueprint.ir)
    assert site is not None, f"{blueprint.ir.name} does not fit its reference place"
    return site


def compilable(blueprint: Blueprint) -> str:
    """Return `yes`, or why no compiled kernel can be made."""
    if blueprint.ir.requires:
        return f"no: needs {', '.join(blueprint.ir.requires)}"
    try:
        trace(reference_kernel(stated(blueprint.ir).ir))
    except EsperError as error:
        return "no: keeps a state" if "beside its weights" in str(error) else f"no: {error}"
    return "yes"


def latencies(library: Sequence[Blueprint], rounds: int) -> list[float]:
    """Return the least time of each blueprint's forward at its reference place, in ms of processor time.

    The rounds go through the whole library, so that what else the machine does for a while hits none of them alone.
    """
    children, least = [_child(blueprint) for blueprint in library], [float("inf")] * len(library)
    with torch.no_grad():
        for _ in range(rounds):
            for number, (child, x) in enumerate(children):
                child(x)
                passes = max(1, int(_ROUND_S / max(1e-6, _seconds(child, x, 1))))
                least[number] = min(least[number], 1000 * _seconds(child, x, passes) / passes)
    return least


def keep_memory() -> None:
    """Let the C library keep what was freed: else some layers get fresh pages in every pass, others not, by chance."""
    if sys.platform == "linux":
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, 1 << 30)


def _child(blueprint: Blueprint) -> tuple[Child, Tensor]:
    """Return a child and what it reads; without `build`, so that what needs a device or ranks can be measured too."""
    ir, site = blueprint.ir, place(blueprint)
    plan, generator = make_plan(ir, site), torch.Generator().manual_seed(0)
    child = Child(ir, site, plan, "cpu").eval()
    for step in plan.steps:
        step.op.reset(child.get_submodule(step.id), generator)
    return child, torch.randn((SAMPLES, *example(site, ir).shape[1:]), generator=generator)


def _seconds(child: Child, x: Tensor, passes: int) -> float:
    begin = time.process_time()
    for _ in range(passes):
        child(x)
    return time.process_time() - begin


def markdown(rows: Sequence[Row]) -> str:
    """Return the table."""
    lines = [TITLES, ("---",) * len(TITLES), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def document(text: str, table: str) -> str:
    """Return the document with the table between its marks."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def write_latency(name: str, value: float) -> None:
    """Put a latency into a manifest, with two digits that count."""
    path = _file(name)
    text = re.sub(r"(expected_latency_ms: ).*", rf"\g<1>{float(f'{value:.2g}')}", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")


def _file(name: str) -> Path:
    return BUILT_IN / f"{name.lower()}.yaml"


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description="Measure the blueprints of the library.")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of the measurement (default: 30)")
    parser.add_argument("--write", action="store_true", help="write latencies and table")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    keep_memory()
    warnings.filterwarnings("ignore", ".*torch.jit.script_method.* is deprecated")
    library = list(load_library())
    for blueprint, found in zip(library, latencies(library, given.rounds), strict=True):
        stands = blueprint.manifest.expected_latency_ms
        print(f"{blueprint.ir.name:24} {found:8.3f} ms, the manifest says {stands:.3g}")
        if given.write:
            write_latency(blueprint.ir.name, found)
    written = [read_blueprint(_file(blueprint.ir.name)) for blueprint in library]
    table = markdown([Row(known, place(known), compilable(known)) for known in written])
    print(f"\n{table}")
    if given.write:
        DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
