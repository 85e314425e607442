"""Many grafts, one after another."""

from pathlib import Path
from typing import Any

import pytest
import torch

from esper.bench.stability.grafts import CHILDREN, objectives, row
from esper.bench.stability.hosts import NEW, mean_loss, trained
from esper.bench.stability.summary import kept_by
from esper.kasmina.wrapper import wrap
from esper.models import ByteLM

SMALL = {"d_model": 16, "layers": 2, "heads": 2}
CONFIG: dict[str, Any] = {"grafts": 2, "steps": 22, "share": 0.1, "seed": 0, "host_steps": 4, "sizes": SMALL}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.mark.slow
@pytest.mark.parametrize("child", ["plain", "gated"])
def test_a_frozen_host_keeps_what_is_before_the_grafts(hosts: Path, child: str):
    history = row(CONFIG | {"domain": "new", "host": "frozen", "child": child}, hosts)["history"]
    assert [entry["grafts"] for entry in history] == [0, 1, 2]
    assert [entry["upstream"] for entry in history] == [0.0, 0.0, 0.0]
    assert history[0]["downstream"] == 0.0 < history[1]["downstream"]
    assert history[0]["params"] == 0 < history[1]["params"] < history[2]["params"]
    assert history[2]["new_loss"] < history[0]["new_loss"], "the children learn"


@pytest.mark.slow
def test_a_live_host_moves_everywhere(hosts: Path):
    made = row(CONFIG | {"domain": "same", "host": "live", "child": "plain", "grafts": 1}, hosts)
    assert made["history"][1]["upstream"] > 0
    assert made["history"][1]["trained_loss"] == made["history"][1]["original_loss"]
    kept = kept_by([made])
    assert kept.upstream == made["history"][1]["upstream"] and kept.worst_loss >= 0


@pytest.mark.slow
def test_a_host_is_trained_once(hosts: Path):
    first = trained(hosts, steps=3, seed=1, **SMALL)
    file = next(hosts.glob("3-1-*.pt"))
    torch.save({name: value + 1 for name, value in first.state_dict().items()}, file)
    again = trained(hosts, steps=3, seed=1, **SMALL)
    assert all(torch.equal(a + 1, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_rehearsal_asks_for_what_the_host_said_before():
    torch.manual_seed(0)
    before, changed = ByteLM(**SMALL), ByteLM(**SMALL)
    objective = next(objectives(NEW, CHILDREN["rehearsed"], before, 1, seed=0))
    batch = objective.args[1]
    with torch.no_grad():
        apart = [
            float(objective(wrap(host, targets=["*.after_attn"])) - mean_loss(host, *batch))
            for host in (before, changed)
        ]
    assert apart[0] == pytest.approx(0, abs=1e-5) and apart[1] > 1e-3
