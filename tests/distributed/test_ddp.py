"""Growth under DDP, with real processes: the ranks hold the same, bit for bit, whatever happens on one of them."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.kasmina.bank import layer_name
from esper.leyline.ids import SeedId
from esper.tolaria.exchange import bit_sum
from tests.distributed import ddp_job
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


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Be aware that when using `ckpt_path`")
def test_one_two_and_four_ranks_hand_a_run_on_and_a_killed_one_is_an_error(tmp_path: Path) -> None:
    ddp_job.fit(tmp_path / "1", epochs=3, more=[ddp_job.every(tmp_path / "1", 11)])
    two = Job("ddp_job.py", tmp_path / "2", 2, "resized").results()
    job = Job("ddp_job.py", tmp_path / "4", 4, "brief", "endless")
    job.lose(2, signal.SIGKILL)
    four = job.found()
    require_same(four, "first")
    for found in four:
        assert found["part"]["seen"] == found["first"]["seen"][3:]
        assert found["part"]["losses"] == found["first"]["losses"][-len(found["part"]["losses"]) :]
    # In the middle, 15 of 20 batches are done, so 7 of ten; then 5 of ten, so two of five.
    for ranks, steps in ((two, {"end": 20, "middle": 23}), (four, {"end": 5, "middle": 3})):
        for name, left in steps.items():
            require_handed_on(ranks, name, tmp_path / ddp_job.HANDED_ON[len(ranks)][name], left)
    ckpt = tmp_path / ddp_job.HANDED_ON[4]["end"]
    with pytest.warns(UserWarning, match="written by 2 processes and 1 resume from it"):
        alone = ddp_job.fit(tmp_path / "alone", ckpt=ckpt, epochs=5)
    require_saved(alone, ckpt)
    assert len(alone["losses"]) == 20 and alone["reports"][: len(two[0]["end"]["reports"])]


def require_handed_on(ranks: list[dict[str, Any]], name: str, ckpt: Path, left: int) -> None:
    """Check that a run goes on from what another number of ranks has saved, and to its end."""
    first = require_same(ranks, name)
    require_saved(first, ckpt)
    assert len(first["losses"]) == left and first["seen"][-1]["step"] == first["start"]["step"] + left


def require_saved(run: dict[str, Any], ckpt: Path) -> None:
    """Check that a run has started with the weights, children, moments and seeds of a checkpoint, bit for bit."""
    saved, start = torch.load(ckpt, weights_only=True), run["start"]
    weights, moments = saved["state_dict"], saved["optimizer_states"][0]["state"]
    assert start["host"] == bit_sum(value for name, value in weights.items() if name.startswith("net."))
    # A module names its children by their places, a bank in the order of their birth.
    places = [SeedId.parse(entry["seed_id"]) for entry in saved["esper"]["topology"]]
    within = [f"{layer_name(seed.layer)}.grafts.c{seed.chunk}s{seed.slot}.child." for seed in places]
    assert start["children"] == bit_sum(v for part in within for name, v in weights.items() if part in name)
    assert start["optimizer"] == bit_sum(value for state in moments.values() for value in state.values())
    assert start["topology"] == saved["esper"]["topology"] and start["topology"]
    assert start["step"] == saved["global_step"]


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
