"""Both presets run the whole life cycle inside a real training."""

import json
from pathlib import Path

import pytest
import torch

import esper
from tests.helpers import Plain, digits, planting, trainer

STRICT = {
    "preset": "strict", "training_steps": 10, "ramp_steps": 8, "stabilization_steps": 10, "fine_tuning_steps": 10,
}  # fmt: skip


def stages(folder: Path) -> list[str]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [e["target"] for e in events if e["type"] == "SeedTransitioned"]


def strict_run(folder: Path, ckpt: Path | None = None) -> tuple[Plain, esper.Tamiyo]:
    module = Plain()
    callback = esper.Tamiyo("schedule", kasmina=STRICT, settings=planting(), targets=["net.*"])
    trainer(folder, callback, epochs=12).fit(module, datamodule=digits(), ckpt_path=ckpt)
    return module, callback


def test_strict_freezes_its_fossil(tmp_path: Path) -> None:
    module, _ = strict_run(tmp_path)
    assert stages(tmp_path)[-2:] == ["FINE_TUNING", "FOSSILIZED"]
    children = [p for name, p in module.named_parameters() if "esper" in name]
    assert children
    assert not any(p.requires_grad for p in children)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_strict_resumes_bit_exactly_from_every_stage(tmp_path: Path) -> None:
    whole, _ = strict_run(tmp_path / "whole")
    for epoch in range(0, 11):
        part, _ = strict_run(tmp_path / f"part{epoch}", tmp_path / "whole" / "checkpoints" / f"epoch={epoch}.ckpt")
        assert part.train_losses == whole.train_losses[10 * (epoch + 1) :], f"epoch {epoch}"


@pytest.mark.parametrize("strategy", ["fixed_ramp", "performance_linked", "drift_controlled", "grad_norm_gated"])
def test_every_strategy_brings_a_child_in(tmp_path: Path, strategy: str) -> None:
    kasmina = {"strategy": strategy, "ramp_steps": 5, "stabilization_steps": 10}
    module = Plain()
    callback = esper.Tamiyo("schedule", kasmina=kasmina, settings=planting(), targets=["net.*"])
    trainer(tmp_path, callback, epochs=10).fit(module, datamodule=digits())
    assert "STABILIZATION" in stages(tmp_path)


def test_the_same_seed_twice_gives_the_same_run(tmp_path: Path) -> None:
    def once(folder: Path) -> tuple[list[float], list[str], list[torch.Tensor]]:
        module = Plain()
        settings = {"budget": 4000, "start": 20, "decision_samples": 32, "seed": 3}
        callback = esper.Tamiyo(kasmina={"stabilization_steps": 10, "ramp_steps": 4}, settings=settings)
        trainer(folder, callback, epochs=12).fit(module, datamodule=digits())
        return module.train_losses, callback.controller.explanations, list(module.state_dict().values())

    first, second = once(tmp_path / "a"), once(tmp_path / "b")
    assert first[0] == second[0]
    assert first[1] == second[1]
    assert any("trial" in text for text in first[1])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))
