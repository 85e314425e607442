"""Real rows: what they measure, and that equal compute is equal."""

from pathlib import Path
from typing import Any

import pytest

from esper.bench.arms import ARMS, GROWN, OFF, WIDE, Plan
from esper.bench.experiment import prepared
from esper.bench.worker import lasting, make, peak_mib
from esper.leyline.errors import ConfigError
from tests.bench.samples import digits


def row(name: str, folder: Path, **found: Any) -> dict[str, Any]:
    arm = ARMS[name]
    made = arm.make(Plan(prepared(digits()), found=found))
    return make(made, found["train_macs"] if arm.equal else None, folder / name)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return row(GROWN, tmp_path_factory.mktemp("grown"))


@pytest.mark.slow
def test_a_row_tells_what_was_kept_and_what_it_took(grown: dict[str, Any]) -> None:
    assert grown["steps"] == 80 and grown["host_params"] == 1358
    assert grown["kept"] and len(grown["children"]) == len(grown["kept"])
    assert grown["params"] > grown["host_params"] and grown["inference_macs"] > 1286
    # Three forwards a step of 64 samples, and the search on top.
    assert grown["train_macs"] > 80 * 3 * 64 * 1286 and grown["train_flops"] == 2 * grown["train_macs"]
    assert grown["report_loss"] > 0 and 0 < grown["report_accuracy"] < 1
    assert grown["latency_ms"] > 0 and grown["latency_batch"] == 256 and grown["seconds"] > 0
    assert 100 < grown["peak_mib"] <= peak_mib()
    assert "disjoint from what decides" in grown["report_part"]
    (site,) = grown["sites"]
    assert (site["path"], site["shape"]["d_in"], site["shape"]["layout"]) == ("layers.2", 16, "bd")


@pytest.mark.slow
@pytest.mark.parametrize("name", [OFF, "from_start", "lora"])
def test_static_arms_train_for_the_work_of_the_live_trial(name: str, grown: dict[str, Any], tmp_path: Path) -> None:
    made = row(name, tmp_path, **grown)
    step = made["train_macs"] / made["steps"]
    assert abs(made["train_macs"] - grown["train_macs"]) <= step / 2
    assert (tmp_path / name / "report_losses.json").exists() and not made["kept"]
    if name == OFF:
        assert made["steps"] > grown["steps"] and made["params"] == grown["host_params"]
    elif name == "from_start":
        assert made["params"] == grown["params"] and made["inference_macs"] == grown["inference_macs"]
    else:
        assert grown["host_params"] < made["params"] <= grown["host_params"] + 600


@pytest.mark.slow
def test_without_an_account_there_is_no_equal_compute(tmp_path: Path) -> None:
    config = ARMS[OFF].make(Plan(prepared(digits())))
    with pytest.raises(ConfigError, match="kept no account of its work"):
        make(
            lasting(config, 2) | {"trainer": config["trainer"] | {"max_steps": 2, "limit_val_batches": 0}},
            None,
            tmp_path,
        )


def test_the_wide_net_at_equal_compute_is_the_wide_net() -> None:
    assert ARMS[WIDE].make is ARMS["static_wide"].make and ARMS[WIDE].equal and not ARMS["static_wide"].equal
