"""Growth of a host that FSDP2 shards over two real processes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.tolaria.folders import CHECKSUMS, META
from esper.tolaria.resume import newest
from tests.distributed.launch import Job

pytestmark = pytest.mark.slow


def test_a_sharded_host_grows_and_resumes_from_both_formats(tmp_path: Path) -> None:
    ranks = Job("fsdp_job.py", tmp_path, 2, "sharded").results()
    for run in ranks[0]:
        for part in ("seen", "history", "reports"):
            assert ranks[1][run][part] == ranks[0][run][part], f"{run}: {part}"
        assert ranks[1][run]["losses"] != ranks[0][run]["losses"]
    for found in ranks:
        check_resumption(found, "full")
        check_resumption(found, "distributed")
        assert found["full"]["losses"] == found["distributed"]["losses"]
    assert ranks[0]["full"]["seen"][-1]["groups"] == ["", "net.2#0.0", "net.0#0.0"]
    check_trouble(tmp_path / "trouble", ranks[0]["trouble"])
    entry = torch.load(tmp_path / "distributed" / "checkpoints" / "epoch=2.ckpt" / "meta.pt", weights_only=True)
    assert [child["options"]["esper_seed"] for child in entry["esper"]["children"]] == ["net.2#0.0", "net.0#0.0"]


def check_resumption(found: dict[str, Any], name: str) -> None:
    whole, resumed = found[name], found[f"{name} resumed"]
    assert resumed["seen"] == whole["seen"][3:]
    assert resumed["losses"] == whole["losses"][30:]
    assert resumed["history"] == whole["history"]


def check_trouble(folder: Path, run: dict[str, Any]) -> None:
    """A child that failed on one rank is culled, and a NaN loss on one rank takes all of them back."""
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert run["reports"] == [("CULLED", "RUNTIME_ERROR")]
    (fault,) = (event for event in told if event["type"] == "GraftFaulted")
    assert fault["detail"] == "RuntimeError: broken on rank 1"
    (back,) = (event for event in told if event["type"] == "RolledBack")
    assert back["restored_step"] == 20


# --- checkpoint folders ------------------------------------------------------------------------------------------

MOMENTS = ("seal-before", "checksums_of-before", "seal-after", "put_in_place-after")
"""Steps of a save before or after which rank 0 is killed; all of them only where there is time."""


@pytest.mark.parametrize("moment", MOMENTS[: None if os.environ.get("ESPER_SOAK") else 1])
def test_a_run_killed_in_a_save_goes_on_from_its_last_whole_folder(tmp_path: Path, moment: str) -> None:
    killed, *others = Job("folders_job.py", tmp_path, 2, moment, "cut").wait()
    assert killed == -signal.SIGKILL and all(others), "the other rank must end too"
    kept = tmp_path / "cut" / "checkpoints"
    left = [path.name for path in kept.iterdir() if path.name.startswith(".")]
    found = newest(tmp_path / "cut")
    if moment == "put_in_place-after":
        assert found == kept / "step=24.ckpt" and not left
    else:
        assert found == kept / "last.ckpt" and len(left) == 1 and left[0].startswith(".step=24.ckpt.")
    # What was written last is cut short, under both of its names; then the one before is good enough.
    spoiled = [path for path in (kept / "last.ckpt", *kept.glob("step=[12][48].ckpt")) if path.is_dir()]
    for path in spoiled:
        shard = path / "__1_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="passed over a checkpoint: .*__1_0.distcp is not what was saved"):
        assert newest(tmp_path / "cut") == kept / "step=12.ckpt"
    entry = torch.load(kept / "step=12.ckpt" / META, weights_only=True)["esper"]
    assert [seed["state"] for seed in entry["topology"]] == ["GRAFTING"]
    for rank in Job("folders_job.py", tmp_path, 2, "never", "cut", "whole").results():
        cut, whole = rank["cut"], rank["whole"]
        assert cut.pop("losses") == whole.pop("losses")[12:]
        assert cut == whole
    assert all((path / CHECKSUMS).is_file() and not path.name.startswith(".") for path in kept.iterdir())
