"""Does the search get cheaper from run to run, and the result no worse? `python benchmarks/sequence.py [--write FILE]`.

Ten byte-level transformers of different width, depth and feed-forward size are grown one after another. Each is grown
twice with the same seed: once learning from the field reports of those before it (`experience`), once without. Shown
are how many kinds were on trial, what the search took of the training's work, what was kept, and the loss on the report
part, which nothing decides on.
"""

import argparse
import logging
import platform
import tempfile
import warnings
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import lightning
import torch
from rich.console import Console
from scipy.stats import t as student

import esper
from esper.data import ByteText
from esper.models import ByteLM

STEPS, START, INTERVAL, TRIAL = 800, 100, 50, 150
HOSTS = (
    {"d_model": 48, "layers": 2, "ffn": 16},
    {"d_model": 64, "layers": 2, "ffn": 32},
    {"d_model": 48, "layers": 3, "ffn": 32},
    {"d_model": 64, "layers": 3, "ffn": 16},
    {"d_model": 32, "layers": 3, "ffn": 32},
    {"d_model": 64, "layers": 2, "ffn": 64},
    {"d_model": 48, "layers": 4, "ffn": 16},
    {"d_model": 32, "layers": 2, "ffn": 64},
    {"d_model": 64, "layers": 4, "ffn": 32},
    {"d_model": 48, "layers": 2, "ffn": 64},
)


class Row(NamedTuple):
    """What one run came to.

    Args:
        params: parameters of the host.
        tried: kinds on trial.
        search: work of the search, as a share of the rest of the training.
        kept: kinds that were kept.
        loss: on the report part, in nats per byte.
    """

    params: int
    tried: int
    search: float
    kept: str
    loss: float


def run(number: int, folder: Path, experience: Path | None) -> Row:
    """Grow one host."""
    lightning.seed_everything(number, verbose=False)
    seeds = {"stabilization_steps": TRIAL - INTERVAL, "ramp_steps": 20}
    morphable = esper.wrap(ByteLM(**HOSTS[number]), seeds, targets=["*.after_attn", "*.ffn"])
    host = morphable.host_parameters()
    settings = {"seed": number, "start": START, "experience": str(experience) if experience else None}
    controller = esper.TamiyoController(morphable, settings)
    data = ByteText(seed=number, steps_per_epoch=INTERVAL)
    adam = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3, "weight_decay": 0.01, "betas": [0.9, 0.98]}}
    trainer = esper.TolariaTrainer(
        morphable,
        controller,
        {
            "task": {"class_path": "esper.tolaria.tasks.LanguageModeling"},
            "optimizer": adam,
            "max_epochs": -1,
            "max_steps": STEPS,
            "val_check_interval": INTERVAL,
            "gradient_clip_val": 1.0,
            "warmup_steps": 40,
            "decay": 0.3,
            "accelerator": "cpu",
            "seed": number,
            "output_dir": str(folder),
        },
        data=data,
    )
    _, history = trainer.train()
    controller.close()
    last, trial = history[-1], [r for r in controller.reports if r.group.startswith("trial")]
    kept = sorted({r.blueprint_id.removeprefix("BP-") for r in controller.reports if r.outcome.value == "FOSSILIZED"})
    search = last["search_macs"] / (last["macs"] - last["search_macs"])
    return Row(host, len(trial), search, ", ".join(kept), last["report_loss"])


def sequence(folder: Path, console: Console) -> list[tuple[Row, Row]]:
    """Grow all hosts, each with what was learned so far and without."""
    learned, found = folder / "learning", []
    for number in range(len(HOSTS)):
        learning = run(number, learned / f"{number}", learned if number else None)
        fresh = run(number, folder / "fresh" / f"{number}", None)
        found.append((learning, fresh))
        console.print(f"{number}: {learning}, without experience {fresh}")
    return found


def table(rows: list[tuple[Row, Row]]) -> str:
    """Return the rows as Markdown, and what they come to."""
    told = [
        "| run | host, parameters | kinds on trial | search | kept | report loss | without experience: kinds | search "
        "| kept | report loss |",
        "|---|--:|--:|--:|---|--:|--:|--:|---|--:|",
    ]
    for number, (a, b) in enumerate(rows, 1):
        cells = (number, f"{a.params:,}", *_cells(a), *_cells(b))
        told.append(f"| {' | '.join(map(str, cells))} |")
    gains = [b.loss - a.loss for a, b in rows]
    mean, half = fmean(gains), student.ppf(0.975, len(gains) - 1) * stdev(gains) / len(gains) ** 0.5
    later = rows[len(rows) // 2 :]
    learning, fresh = (fmean(row.search for row in arm) for arm in zip(*later, strict=True))
    told += [
        "",
        f"Gain of learning on the report loss, paired over the {len(rows)} runs: {mean:+.4f} nats, 95 % interval "
        f"{mean - half:+.4f} to {mean + half:+.4f} (Student's t). Over the last {len(later)} runs the search took "
        f"{learning:.1%} of the training's work, without experience {fresh:.1%}.",
    ]
    return "\n".join(told)


def _cells(row: Row) -> tuple[Any, ...]:
    return row.tried, f"{row.search:.1%}", row.kept or "nothing", f"{row.loss:.3f}"


def main() -> None:
    """Run, print, and write where asked."""
    parser = argparse.ArgumentParser(description="Grow ten hosts of one family in sequence.")
    parser.add_argument("--write", type=Path, help="also write the table as Markdown")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        found = table(sequence(Path(folder), Console()))
    print(found)
    if given.write:
        where = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread"
        head = f"# Ten hosts of one family, one after another\n\nCommand: `python benchmarks/sequence.py`. {where}.\n"
        text = (__doc__ or "").partition("\n\n")[2]
        given.write.write_text(f"{head}\n{text}\n{found}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
