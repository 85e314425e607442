"""What a boundary's packet says of the seeds, the sites and the machine."""

import numpy as np
import pytest
import torch

from esper.kasmina.telemetry import METRICS, chunk_span
from esper.kasmina.trends import TREND_METRICS
from esper.leyline.codec import decode, encode
from esper.leyline.packets import HEALTH_COLUMNS, SystemStatePacket
from esper.tamiyo import observe
from tests.kasmina.conftest import Rig, batch, mlp


def rig(chunks: int) -> Rig:
    return Rig(mlp(), batch(), config={"seeds_per_layer": chunks, "telemetry_every": 1})


def packet(found: Rig, steps: int = 5) -> SystemStatePacket:
    """Sample some steps of training, as if up to a boundary."""
    for step in range(steps):
        found.stepper.begin(step)
        found.forward_backward()
    return observe.packet(found.bank, found.writer, found.moment(steps))


@pytest.mark.parametrize("chunks", [1, 3])
def test_every_signal_reaches_the_packet(chunks: int) -> None:
    found = decode(SystemStatePacket, encode(packet(rig(chunks))))
    assert METRICS + TREND_METRICS == HEALTH_COLUMNS
    assert set(found.health_map.columns) == set(found.site_health.columns) == set(HEALTH_COLUMNS)
    assert found.site_paths == ("0", "2", "4")
    for name in HEALTH_COLUMNS:
        seeds, sites = found.health_map.column(name), found.site_health.column(name)
        assert seeds.shape == (3 * chunks,) and sites.shape == (3,)
        # Without a graft there is no newborn to compare.
        assert np.isnan(seeds).all() if name == "newborn_incumbent_ratio" else np.isfinite([*seeds, *sites]).all(), name
        assert chunks > 1 or np.array_equal(seeds, sites, equal_nan=True)


def test_a_site_is_not_the_mean_of_its_chunks() -> None:
    """Its own rank and gradient norm, of all features together."""
    found = packet(rig(2))
    of_chunks = found.health_map.column("gradient_norm").reshape(3, 2)
    assert found.site_health.column("gradient_norm")[1] == pytest.approx(np.linalg.norm(of_chunks[1]), rel=0.05)
    means, widths = found.health_map.column("chunk_mean").reshape(3, 2), [chunk_span(5, 2, c)[1] for c in range(2)]
    assert found.site_health.column("chunk_mean")[2] == pytest.approx(np.average(means[2], weights=widths), rel=1e-4)
    ranks = found.health_map.column("effective_rank").reshape(3, 2)
    assert (found.site_health.column("effective_rank") < ranks.sum(1)).all()


def test_trends_look_back_over_boundaries() -> None:
    found = rig(1)
    norms = []
    for _ in range(3):
        last = packet(found)
        norms.append(last.health_map.column("gradient_norm")[1])
        found.x = found.x * 1.5
    expected = np.polyfit(range(3), norms, 1)[0] / np.mean(norms)
    assert expected > 0.1
    assert last.health_map.column("gradient_norm_trend")[1] == pytest.approx(expected, rel=1e-4)
    unsampled = observe.packet(found.bank, found.writer, found.moment(99)).health_map
    assert np.isnan(unsampled.column("gradient_norm")).all()
    assert unsampled.column("gradient_norm_trend")[1] == last.health_map.column("gradient_norm_trend")[1]


def test_memory_pressure_is_a_share_per_device() -> None:
    found = rig(1)
    assert observe.memory_pressure(found.bank).keys() == {"cpu"}
    assert 0 < observe.memory_pressure(found.bank)["cpu"] <= 1
    assert observe.hardware(found.bank).memory_available_gb > 0


def test_a_model_without_sites_has_an_empty_packet() -> None:
    shared = torch.nn.Linear(3, 3)
    found = Rig(torch.nn.Sequential(shared, shared), batch())
    empty = packet(found, steps=1)
    assert empty.site_paths == () and len(empty.seed_states) == 0
    assert set(empty.health_map.columns) == set(HEALTH_COLUMNS)
