"""Children that keep a state beside their weights: saved, exported, resumed and averaged with it."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.blueprints import readings
from esper.tolaria.exchange import ChildGradients, bit_sum
from tests.blueprints.growing import capable, one_rank
from tests.grafts import grafted, wrapped
from tests.tolaria.test_export import loaded


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def trained(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> esper.MorphableModel:
    """A model with a balanced mixture and a tap, after a few passes in training."""
    torch.manual_seed(seed)
    model = wrapped(Net(), torch.randn(5, 6, 8))
    grafted(model, "up", "BP-LOAD-BAL-EMA", reads="input", dtype=dtype)
    grafted(model, "down", "BP-MON-ACT-STATS")
    model.train()
    for _ in range(4):
        model(torch.randn(5, 6, 8))
    return model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name.rpartition("child.")[2]: b for name, b in model.named_buffers() if "child." in name}


def test_there_is_a_state_to_lose() -> None:
    found = state(trained())
    assert found.keys() == {
        "mix.router.bias",
        "mix.router.load",
        "mix.router.recent",
        "tap.statistics",
        "tap.weight_seen",
    }
    assert found["mix.router.bias"].any() and found["tap.statistics"].any()


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = trained(), torch.randn(3, 6, 8)
    esper.save_model(model, tmp_path / "saved")
    again = esper.load_model(tmp_path / "saved", host=Net()).eval()
    assert all(torch.equal(value, state(again)[name]) for name, value in state(model).items())
    assert torch.equal(again(x), model(x))
    assert readings(again)["bank.layers./down.grafts.c0s0.child.tap"]["mean"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_leaves_with_an_export(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = trained(dtype=dtype), torch.randn(3, 6, 8)
    plain = esper.export(model, tmp_path / "net")
    assert all(torch.equal(value, state(plain)[name]) for name, value in state(model).items())
    assert torch.equal(plain(x), model(x))
    fresh = loaded(tmp_path / "net", Net())
    assert torch.equal(fresh(x), model(x))
    assert all(torch.equal(value, state(fresh)[name]) for name, value in state(model).items())


def test_the_plain_network_trains_on_without_it(tmp_path: Path) -> None:
    plain = esper.export(trained())
    before = {name: value.clone() for name, value in state(plain).items()}
    plain.train()(torch.randn(5, 6, 8))
    assert any(not torch.equal(value, before[name]) for name, value in state(plain).items()), "it goes on by itself"


class Together:
    """The ranks of a run as threads of one process."""

    def __init__(self, size: int) -> None:
        self.size, self.alone = size, False
        self.barrier, self.said = threading.Barrier(size), list[Tensor]()

    def add_up(self, flat: Tensor) -> None:
        self.said.append(flat.clone())
        self.barrier.wait()
        flat.copy_(torch.stack(sorted(self.said, key=lambda t: float(t.sum()))).sum(0))
        self.barrier.wait()
        self.said.clear()


def test_ranks_agree_on_it_after_every_step() -> None:
    models = [trained() for _ in range(2)]
    ranks: Any = Together(2)
    for rank, model in enumerate(models):
        torch.manual_seed(rank)
        model.train()(torch.randn(5, 6, 8) * (1 + rank)).sum().backward()
    expected = {name: (value + state(models[1])[name]) / 2 for name, value in state(models[0]).items()}
    assert sums(models[0]) != sums(models[1])
    threads = []
    for model in models:
        faults: Any = SimpleNamespace(flags=lambda: [0, 0], settle=lambda found: None)
        average = ChildGradients(model.bank, ranks, faults)
        threads.append(threading.Thread(target=average))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    for model in models:
        for name, value in state(model).items():
            torch.testing.assert_close(value, expected[name])
    assert sums(models[0]) == sums(models[1])


def sums(model: esper.MorphableModel) -> int:
    return bit_sum(b for graft in model.bank.grafted().values() for b in graft.child.buffers())


def test_what_needs_ranks_or_a_device_is_exported_for_anybody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = wrapped(Net(), torch.randn(5, 6, 8)), torch.randn(3, 6, 8)
    with one_rank(), capable(monkeypatch, "flash_attention"):
        grafted(model, "up", "BP-ALL-REDUCE-SHARD")
        grafted(model, "down", "BP-FLASH-ATTN-V2")
        for _ in range(3):
            model.train()(torch.randn(5, 6, 8))
        expected = model.eval()(x)
    esper.export(model, tmp_path / "net")
    torch.testing.assert_close(loaded(tmp_path / "net", Net())(x), expected, rtol=2e-2, atol=2e-2)
