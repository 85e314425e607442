"""Growth under DDP, with real processes: the ranks hold the same, bit for bit, whatever happens on one of them."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import Job

pytestmark = pytest.mark.slow
SAME_ON_ALL_RANKS = ("seen", "history", "reports", "decisions", "ignored")


def require_same(ranks: list[dict[str, Any]], run: str) -> dict[str, Any]:
    """Check that all ranks of a run hold the same, but have seen different data; return rank 0's."""
    first = ranks[0][run]
    for other in ranks[1:]:
        for part in SAME_ON_ALL_RANKS:
            assert other[run][part] == first[part], f"{run}: {part}"
        assert other[run]["losses"] != first["losses"]
    assert first["seen"]
    return first


def fates(run: dict[str, Any]) -> list[tuple[str, str]]:
    return [(report["outcome"], report["reason"]) for report in run["reports"]]


def test_two_ranks_grow_repeat_and_resume_bit_for_bit(tmp_path: Path) -> None:
    ranks = Job("ddp_job.py", tmp_path, 2, "whole").results()
    first = require_same(ranks, "first")
    assert [group for seen in first["seen"][-1:] for group in seen["groups"]] == ["", "net.2#0.0", "net.0#0.0"]
    assert fates(first) and first["reports"][0]["counterfactual"]["n"] == 64
    for rank, found in enumerate(ranks):
        whole, again = found["first"], found["again"]
        for part in ("seen", "losses", "decisions", "history"):
            assert again[part] == whole[part], f"the same seed again: {part} of rank {rank}"
        for name, steps in (("part", 30), ("mid", 25)):
            resumed = found[name]
            assert resumed["losses"] == whole["losses"][steps:], f"{name}: losses of rank {rank}"
            assert resumed["seen"] == whole["seen"][-len(resumed["seen"]) :], f"{name}: state of rank {rank}"
            assert resumed["reports"] == whole["reports"] and resumed["history"] == whole["history"]
            assert torch.equal(resumed["rng"], whole["rng"]), f"{name}: random state of rank {rank}"
    assert not torch.equal(ranks[0]["first"]["rng"], torch.zeros(3))
    second = require_same(ranks, "second")
    assert any("grafts.c0s0.child" in name for name in second["ignored"])
    check_files(tmp_path / "one", first)


def check_files(folder: Path, run: dict[str, Any]) -> None:
    """Only rank 0 writes: every event is there once."""
    changes = [(e["seed_id"], e["source"], e["target"]) for e in events(folder, "SeedTransitioned")]
    assert len(changes) == len(set(changes))
    assert len((folder / "fieldreports.jsonl").read_text().splitlines()) == len(run["reports"])
    assert (folder / "growth.png").exists() and (folder / "model" / "topology.json").exists()


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["type"] == kind]


def test_four_ranks_grow_and_resume_and_a_killed_one_is_an_error(tmp_path: Path) -> None:
    job = Job("ddp_job.py", tmp_path, 4, "brief", "endless")
    job.lose(2, signal.SIGKILL)
    ranks = job.found()
    require_same(ranks, "first")
    for found in ranks:
        assert found["part"]["seen"] == found["first"]["seen"][3:]
        assert found["part"]["losses"] == found["first"]["losses"][-len(found["part"]["losses"]) :]


def test_what_happens_on_one_rank_is_settled_on_all_and_a_stopped_one_is_an_error(tmp_path: Path) -> None:
    job = Job("ddp_job.py", tmp_path, 2, "trouble", "endless")
    job.lose(1, signal.SIGSTOP)
    ranks = job.found()
    for run in ("raises", "nan", "asked", "reconstruction", "kernel", "rollback"):
        require_same(ranks, run)
    first = ranks[0]
    assert fates(first["raises"]) == fates(first["nan"]) == [("CULLED", "RUNTIME_ERROR")]
    (fault,) = events(tmp_path / "raises", "GraftFaulted")
    assert (fault["step"], fault["detail"]) == (20, "RuntimeError: broken on rank 1")
    assert [r["grafting_strategy"] for r in first["asked"]["reports"]] == ["performance_linked"]
    assert first["reconstruction"]["reports"][0]["stage_steps"]["TRAINING"] >= 12
    assert fates(first["kernel"]) == [("CULLED", "KERNEL_LOAD_FAILED")]
    assert ("ROLLED_BACK", "EMERGENCY") in fates(first["rollback"])
    (back,) = events(tmp_path / "rollback", "RolledBack")
    assert (back["trigger"], back["restored_step"]) == ("NON_FINITE_LOSS", 10)
    for found in ranks:
        assert "rank 1 in its weights" in found["drift"]["error"]
    assert ranks[0]["unwritable"]["error"].startswith("OutputError")
    assert ranks[1]["unwritable"]["error"].startswith("DistributedError: rank 0 has failed: cannot write")
