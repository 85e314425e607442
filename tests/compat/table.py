"""The table in `docs/compatibility.md`: one row per model, each cell what a check returned.

`python -m tests.compat.table` runs every check and writes the file.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.compat.case import Case

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "compatibility.md"
VISION = ROOT / ".venv" / "vision"
FAMILIES = ("language", "graphs", "classic")
"""Modules whose models live in the environment itself."""

HEAD = """\
# Compatibility

What `esper.wrap` and the two-line callback do with models of many kinds. This table is written by the tests of
`tests/compat/`, with tiny models and random weights, and a test fails when it differs from what they find:
`python -m tests.compat.table` writes it anew. `esper doctor model.py:factory` tells the same of a model of yours.

- **Seeds**: sites that take seeds. **Refused**: sites that do not, how many for which reason, and one of them; all are
  in `bank.refused` and in `growth_report()`, nothing is left out silently.
- **Dormant**: while nothing has grown, outputs, loss, gradients, buffers and random state are bit for bit those of the
  bare model: in training and evaluation, with and without gradients, in float32 and bfloat16, while sites are probed
  and health is sampled, and in a Lightning run.
- **Grows**: a child at every site at once; each gets a finite gradient that is not zero, its weights move, and at alpha
  0 every bit is again the bare model's.
- **State dict**: the host's keys are the same after growth, and a fresh model takes the grown state back.
- **Copies**: `deepcopy` and `pickle` of the grown model compute the same, and their children are their own.
- **Generate**: `generate` writes the same while dormant, and when grown what the model computes without a cache.
- **Resume**: a plain LightningModule with `callbacks=[esper.Tamiyo(...)]` grows by schedule, and the run resumed from
  a checkpoint with a child in mid-life ends bit for bit where the uninterrupted run ends.

"""

TAIL = """
## What to know

- **Text generation.** A child that mixes tokens (`BP-ATTN-STD`, `BP-CONV-CAUSAL`) would see one token at a time under
  a key-value cache, and the model would write something else. So while one is in the model,
  `generation_config.use_cache` is False, which is said once in the log; a forward that continues from a filled cache
  is refused with an error; and the setting returns when the child goes. Children that work token by token leave the
  cache alone.
- **`nn.TransformerEncoderLayer`.** PyTorch leaves its fused evaluation for any module with hooks, which is said once in
  the log. Evaluation then equals the fused one to rounding, and bit for bit after
  `torch.backends.mha.set_fastpath_enabled(False)`. Training is not concerned. With padded batches the encoder also
  makes nested tensors in evaluation; build it with `enable_nested_tensor=False` to have seeds there.
- **Gradient checkpointing.** Children keep their own activations; the host's are computed again as before. Health is
  counted once per step.
- **Outputs of several parts.** Of a tuple the first element is changed, of a dict or dataclass the first float tensor;
  the site is refused when no gradient comes back through it.
- **Layouts.** `[B, D]` (also nodes of a graph, or tokens routed to experts), `[B, T, D]` and `[B, C, H, W]`. Features
  on axis 1 of three, time-major tensors and 5-d tensors are refused.
"""


class Row(NamedTuple):
    """One model's cells, as text."""

    model: str
    seeds: str
    refused: str
    dormant: str
    grows: str
    state_dict: str
    copies: str
    generate: str
    resume: str


TITLES = ("Model", "Seeds", "Refused", "Dormant", "Grows", "State dict", "Copies", "Generate", "Resume")


def row(case: Case, folder: Path) -> Row:
    """Run every check on a model."""
    from tests.compat import checks, fits
    from tests.compat.growth import wrapped

    with warnings.catch_warnings():
        _quiet()
        dormant = checks.dormant(case)
        model = wrapped(case)
        found = {"seeds": str(checks.seeds(model)), "refused": checks.refused(model), "dormant": dormant}
        found["grows"] = checks.grows(case, model)
        checks.at_alpha_zero(case, model)
        found["state_dict"] = checks.state_dict(case, model)
        found["copies"] = checks.copies(case, model)
        found["generate"] = checks.generates(case, model)
        found["resume"] = fits.grows_and_resumes(case, folder)
        return Row(case.name, **found)


def _quiet() -> None:
    """Leave out what the libraries say of each other, PyTorch of nested tensors, and Lightning of loaders."""
    for start in (
        ".*torch.jit.script. is deprecated",
        "The PyTorch API of nested tensors",
        "The '.*_dataloader' does not have many workers",
        "The number of training batches",
        "Checkpoint directory",
        "The dirpath has changed",
        ".*LeafSpec.*is deprecated",
    ):
        warnings.filterwarnings("ignore", start)


def cases(families: Iterable[str] = FAMILIES) -> Iterator[Case]:
    """Yield the models of some families."""
    for family in families:
        with warnings.catch_warnings():
            _quiet()
            module = importlib.import_module(f"tests.compat.{family}")
        yield from module.CASES


def vision_rows() -> list[Row]:
    """Check the timm models in a Python process of their own, which finds timm and torchvision in their folder.

    Raises:
        RuntimeError: the folder is missing, or a check failed.
    """
    if not (VISION / "timm").is_dir():
        raise RuntimeError(f"{VISION} lacks timm; run `make setup`, which installs tests/compat/vision.lock there.")
    paths = os.pathsep.join([str(VISION), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", "tests.compat.vision"]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(f"the timm models failed:\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}")
    return [Row(*cells) for cells in json.loads(run.stdout.splitlines()[-1])]


def committed() -> dict[str, Row]:
    """Return the rows of the committed file, by model."""
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [Row(*(cell.strip() for cell in line.strip("|").split(" | "))) for line in lines[1:]]
    return {found.model: found for found in rows}


def render(rows: Iterable[Row]) -> str:
    """Return the whole document."""
    lines = [f"| {' | '.join(cells)} |" for cells in (TITLES, *rows)]
    return HEAD + "\n".join([lines[0], "|---" * len(TITLES) + "|", *lines[1:]]) + "\n" + TAIL


def main() -> None:
    """Run everything and write the document."""
    rows = []
    for case in cases():
        print(case.name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(case, Path(folder)))
    DOCUMENT.write_text(render([*rows, *vision_rows()]), encoding="utf-8")


if __name__ == "__main__":
    main()
