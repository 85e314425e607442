"""Run as a program: trains with an offline W&B logger, breaks and repeats its end, and tells what W&B's log holds.

W&B keeps state in the process that uses it, so no test does.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esper.nissa.loggers import wandb_logger
from esper.nissa.wandb.log import WandbEnd, tell
from esper.run import run

BLOCK, HEADER, START = 32768, 7, 7
"""Sizes of a block, of the head of a part, and of the head of the file, in bytes."""


def records(file: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: parts in blocks; a record may go on in the next."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), START, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def written(folder: Path) -> dict[str, Any]:
    """What W&B wrote for one run."""
    (file,) = folder.glob("*.wandb")
    found: dict[str, Any] = {"history": [], "summary": {}, "artifacts": [], "charts": {}, "media": {}}
    for record in records(file):
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        found["history"] += [items] if items else []
        for item in record.summary.update:
            found["summary"]["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.config.update:
            if list(item.nested_key[:2]) == ["_wandb", "visualize"]:
                found["charts"][item.nested_key[2]] = json.loads(item.value_json)["panel_config"]["panelDefId"]
        if record.HasField("run"):
            found |= {"name": record.run.display_name, "group": record.run.run_group}
        if record.HasField("artifact"):
            made = record.artifact
            files = sorted(entry.path for entry in made.manifest.contents)
            found["artifacts"].append(
                {"type": made.type, "name": made.name, "metadata": json.loads(made.metadata or "{}"), "files": files}
            )
    for path in (folder / "files" / "media").rglob("*.*"):
        found["media"][str(path.relative_to(folder / "files"))] = path.read_text() if path.suffix != ".png" else ""
    return found


def newest(folder: Path) -> Path:
    """The W&B run that was begun last."""
    return max((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Train with a twin; then end a W&B run that is gone, and tell one twice."""
    import wandb

    folder = Path(config["output_dir"])
    run(config)
    place = json.loads((folder / "wandb.json").read_text())

    gone = wandb_logger(save_dir=str(folder / "gone"))
    gone.experiment.finish()
    with warnings.catch_warnings(record=True) as heard, WandbEnd([gone], folder):
        warnings.simplefilter("always")

    again = wandb_logger(save_dir=str(folder / "again"))
    missed = [tell(again.experiment, folder), tell(again.experiment, folder)]
    again.experiment.finish()

    # What writes the files is a process of its own, which may be behind.
    wandb.teardown()
    found = {"run": folder, "twin": folder / "twin", "again": folder / "again"}
    told = {name: written(newest(place)) for name, place in found.items()}
    return told | {"place": place, "gone": [str(warning.message) for warning in heard], "missed": missed}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(main(json.loads(source.read_text()))))
