"""Growth of a host that FSDP2 shards over two real processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

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
