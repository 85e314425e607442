"""The researcher's journey through the SDK, exactly as the documentation shows it."""

from pathlib import Path

import pytest
import torch
from torch import nn

import esper

CONFIG = """
kasmina: {targets: ["1"], ramp_steps: 5, stabilization_steps: 10}
tamiyo: {policy: heuristic, start: 10, budget: 3000, proxy: 400, decision_samples: 64}
tolaria:
  data: {class_path: esper.data.Digits, init_args: {batch_size: 64, train: 640}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.003}}
  max_epochs: 8
  accelerator: cpu
"""


def network() -> nn.Module:
    """A bottleneck that widening can relieve; the middle block is one module, so that a child can go around it."""
    torch.manual_seed(0)
    middle = nn.Sequential(nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 16))
    return nn.Sequential(nn.Sequential(nn.Linear(64, 16), nn.ReLU()), middle, nn.ReLU(), nn.Linear(16, 10))


def test_load_wrap_control_train_save(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    config = esper.load_config(tmp_path / "run.yaml")
    config = config.model_copy(
        update={"tolaria": config.tolaria.model_copy(update={"output_dir": str(tmp_path / "out")})}
    )
    morphable = esper.wrap(network(), config)
    controller = esper.TamiyoController(morphable, config.tamiyo)
    final_model, history = esper.TolariaTrainer(morphable, controller, config.tolaria).train()
    path = esper.save_model(final_model, tmp_path / "model")

    assert final_model is morphable
    assert [entry["step"] for entry in history] == [*range(10, 90, 10), 80]
    assert history[-1]["report_loss"] < 2.3
    assert "FOSSILIZED" in final_model.growth_report()
    x = torch.rand(4, 64)
    loaded = esper.load_model(path, host=network())
    assert torch.equal(loaded(x), final_model.eval()(x))
    host = esper.unwrap(final_model)
    assert list(host.state_dict()) == list(network().state_dict())
    controller.close()


def test_a_germination_asked_for_by_hand_walks_the_same_gates(tmp_path: Path) -> None:
    morphable = esper.wrap(network(), {"ramp_steps": 5, "stabilization_steps": 10}, targets=["1"])
    controller = esper.TamiyoController(morphable, {"policy": "off", "decision_samples": 64})
    morphable.request_germination("1#0.0", "BP-MLP-GELU", "drift_controlled")
    config = {
        "data": {"class_path": "esper.data.Digits", "init_args": {"train": 640}},
        "max_epochs": 6,
        "output_dir": str(tmp_path),
        "accelerator": "cpu",
    }
    esper.TolariaTrainer(morphable, controller, config).train()
    controller.close()
    (report,) = controller.reports
    assert (report.blueprint_id, report.grafting_strategy) == ("BP-MLP-GELU", "drift_controlled")
    assert report.counterfactual is not None


def test_requests_that_make_no_sense_are_refused_at_once() -> None:
    morphable = esper.wrap(network(), targets=["1", "3"])
    morphable(torch.rand(2, 64))
    with pytest.raises(esper.EsperError, match="carries no seeds"):
        morphable.request_germination("9#0.0", "BP-MLP-GELU", "fixed_ramp")
    with pytest.raises(esper.EsperError, match="layer#chunk.slot"):
        morphable.request_germination("nonsense", "BP-MLP-GELU", "fixed_ramp")
    with pytest.raises(esper.EsperError, match="BP-MLP-GELU"):
        morphable.request_germination("1#0.0", "BP-MLP-GELUU", "fixed_ramp")
    with pytest.raises(esper.EsperError, match="does not fit"):
        morphable.request_germination("1#0.0", "BP-CONV-RES", "fixed_ramp")
    with pytest.raises(esper.EsperError, match="fixed_ramp"):
        morphable.request_germination("1#0.0", "BP-MLP-GELU", "slowly")
    morphable.request_germination("1#0.0", "BP-MLP-GELU", "fixed_ramp")
    with pytest.raises(esper.EsperError, match="already asked for"):
        morphable.request_germination("1#0.0", "BP-MLP-GELU", "fixed_ramp")
    morphable.cancel_germination("1#0.0")
    with pytest.raises(esper.EsperError, match="can be cancelled"):
        morphable.cancel_germination("1#0.0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tamiyo: {polcy: off}", "did you mean 'policy'"),
        ("tamyio: {policy: off}", "did you mean 'tamiyo'"),
        ("kasmina: {seeds_per_layer: 0}", "greater than or equal to 1"),
        ("tamiyo: {policy: clever}", "'heuristic'"),
        ("- a list", "a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_config_error_names_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(esper.EsperError, match=message):
        esper.load_config(tmp_path / "run.yaml")


def test_a_bare_off_means_off(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("tamiyo: {policy: off}")
    assert esper.load_config(tmp_path / "run.yaml").tamiyo.policy == "off"


def test_a_missing_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(esper.EsperError, match="cannot read"):
        esper.load_config(tmp_path / "nowhere.yaml")


def test_without_data_the_trainer_says_what_to_set() -> None:
    morphable = esper.wrap(network())
    controller = esper.TamiyoController(morphable)
    with pytest.raises(esper.EsperError, match="tolaria.data.class_path"):
        esper.TolariaTrainer(morphable, controller)


def test_unknown_names_of_the_package_are_named() -> None:
    with pytest.raises(AttributeError, match="TolariaTrainer"):
        _ = esper.TolariaTrainr
