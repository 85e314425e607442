"""What is measured is what is there."""

from pathlib import Path

import pytest
import torch

from esper.leyline.artifacts import KernelManifest
from esper.urabrask.benchmark import Power, benchmark, peak_memory_mb
from esper.urabrask.inputs import load
from tests.urabrask.kernels import spec


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def run() -> None:
        first = torch.ones(2**18)
        second = first + 1
        del first
        third = second + 1
        del second, third

    assert peak_memory_mb(run) == pytest.approx(2.0, abs=0.01)


def test_power_is_read_where_there_is_a_counter(tmp_path: Path) -> None:
    assert Power.find(tmp_path) is None
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    counter.write_text("2500000\n")
    meter = Power.find(tmp_path)
    assert meter is not None and meter() == 2.5


def test_power_is_none_where_the_counter_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir(parents=True)
    assert Power.find(tmp_path) is None


@pytest.mark.slow
def test_a_child_beside_itself_is_as_fast_and_as_exact() -> None:
    of = spec(d=16, tokens=8)
    manifest = KernelManifest(kernel_id="k", name="BP-MLP-GELU", blueprint_id="b", spec=of, pipeline="fast")
    found = benchmark(load(Path(), manifest))
    assert found.step_ratio == pytest.approx(1.0, abs=max(0.1, 2 * found.ratio_spread))
    assert found.drift == found.eager_drift < 1e-5
    assert found.memory_mb == found.eager_memory_mb > 0.0
    assert found.forward_ms <= found.forward_ms_p99 and found.forward_ms < found.step_ms * 2
    assert found.calls >= 120
