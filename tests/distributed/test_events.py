"""What happens to a run of two processes: culling, going back, signals and replaced layers, with real processes."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.tolaria.checkpoint import require_readable
from tests.distributed.event_job import CASES, STOPS
from tests.distributed.launch import Job
from tests.distributed.test_ddp import events, fates, require_same
from tests.tolaria.runs import told

pytestmark = pytest.mark.slow
GROWN = {"net.2#0.0", "net.0#0.0"}


def test_two_ranks_cull_go_back_and_stop_as_one(tmp_path: Path) -> None:
    job = Job("event_job.py", tmp_path, 2, "events", "endless")
    check_stop_from_outside(job, tmp_path / "endless")
    ranks = job.found()
    check_culled(ranks, tmp_path / "culled")
    for name in CASES:
        check_back(name, [found["back"][name] for found in ranks], tmp_path / name)
    for rank, found in enumerate(ranks):
        for name in STOPS:
            check_stopped(found["stopped"], name, tmp_path, rank)
    check_synced([found["synced"] for found in ranks])


def check_culled(ranks: list[dict[str, Any]], folder: Path) -> None:
    """The second planting fails its gate and leaves nothing behind, on any rank."""
    first = require_same([found["culled"] for found in ranks], "culled")
    assert fates(first) == [("FOSSILIZED", "GATE_PASSED"), ("CULLED", "GATE_FAILED")]
    assert all(found["counterfactual"]["n"] > 0 for found in first["reports"])
    grown = [seen for seen in first["seen"] if "net.0#0.0" in seen["groups"]]
    last = first["seen"][-1]
    assert grown and last["groups"] == ["", "net.2#0.0"] and len(last["alphas"]) == 1
    # The removed child's moments are gone too.
    assert last["with state"] < max(seen["with state"] for seen in grown)
    (removed,) = (e for e in events(folder, "SeedTransitioned") if e["target"] == "CULLED")
    assert (removed["seed_id"], removed["reason"]) == ("net.0#0.0", "GATE_FAILED")


def check_back(name: str, ranks: list[dict[str, Any]], folder: Path) -> None:
    """Every rank came back to what it had held itself, locked the same seed, and told so once."""
    for found in ranks:
        assert found["wrong"] == [], name
        (back,) = found["backs"]
        assert back[3:] == ["net.3#0.0"] and found["states"] == ["ROLLED_BACK"] and found["groups"] == 1, name
    one, other = ranks
    for part in ("backs", "told", "weights"):
        assert one[part] == other[part], f"{name}: {part}"
    assert one["random at the snapshot"] != other["random at the snapshot"]
    expected = {"NaN": "was nan", "spike": "loss of a batch was", "asked in validation": "the validation of rank 1"}
    assert expected.get(name, "") in one["told"][0]
    lines = [json.loads(line) for line in (folder / "fieldreports.jsonl").read_text().splitlines()]
    assert [(line["outcome"], line["reason"]) for line in lines] == [("ROLLED_BACK", "EMERGENCY")], name
    assert len(events(folder, "RolledBack")) == 1, name


def check_stopped(runs: dict[str, Any], name: str, folder: Path, rank: int) -> None:
    """A run that was asked to stop on some rank ended on all, and its resumption is the uninterrupted run."""
    whole, part, resumed = runs["whole"], runs[name], runs[f"{name} resumed"]
    assert part["code"] == 128 + signal.SIGTERM
    at, _ = STOPS[name]
    assert len(part["losses"]) == min(at.values())
    assert part["losses"] + resumed["losses"] == whole["losses"], f"{name}: losses of rank {rank}"
    assert resumed["seen"] == whole["seen"][-len(resumed["seen"]) :], f"{name}: state of rank {rank}"
    for same in ("history", "decisions"):
        assert resumed[same] == whole[same], f"{name}: {same} of rank {rank}"
    assert fates(resumed) == fates(whole) == [("FOSSILIZED", "GATE_PASSED")]
    assert torch.equal(resumed["rng"], whole["rng"]), f"{name}: random state of rank {rank}"
    for journal in ("events.jsonl", "fieldreports.jsonl"):
        assert told(folder / name, journal) == told(folder / "whole", journal), f"{name}: {journal}"


def check_stop_from_outside(job: Job, folder: Path) -> None:
    """Asked to stop on one rank only, all ranks save together and end in time."""
    try:
        job.wait_for("alive")
        job.processes[1].send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert job.wait(60.0) == [143, 143], job.said()
        assert time.monotonic() - started < 45.0
    finally:
        job.kill()
    require_readable(folder / "checkpoints" / "interrupted.ckpt", weights_only=True, resuming=True)
    ending = "SIGTERM: the run ends after step"
    assert ending in job.said(0) and ending not in job.said(1)


def check_synced(ranks: list[dict[str, Any]]) -> None:
    """Normalisation shared by the ranks: its sites take no seeds, and the others grow; a child there is not lost."""
    first = require_same(ranks, "synced")
    reason = "OverRanks has taken its place since seeds were attached, as sync_batchnorm does"
    assert first["refused"] == {"net.1": reason}
    assert first["seen"][-1]["groups"] != [""] and {report["seed_id"] for report in first["reports"]} <= GROWN
    assert first["reports"]
    for found in ranks:
        assert "SyncBatchNorm layers only work with GPU modules" in found["torch's own"]["error"]
        assert found["grown there"]["error"].startswith("ConfigError: 'net.1' carries a child, but OverRanks")
