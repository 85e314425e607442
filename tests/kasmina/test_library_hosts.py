"""The library in real hosts: every blueprint at a place that takes it leaves the host as it is, then learns."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints import Library, load_library, readings
from esper.blueprints.capabilities import lacking
from esper.kasmina.library_store import LibraryKernelStore
from esper.models import ByteLM
from esper.tamiyo import observe
from esper.tamiyo.menu import Menu, Room
from tests.kasmina.conftest import Rig, S

LIBRARY = Library(blueprint for blueprint in load_library() if not lacking(blueprint.ir))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.cell, self.head = nn.GRU(5, 12, batch_first=True), nn.GRUCell(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.rnn(x)
        state = outputs.new_zeros(len(x), 8)
        for token in range(x.shape[1]):
            state = self.cell(outputs[:, token], state)
        return self.head(state)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.two, self.head = nn.Conv2d(10, 7, 3, padding=1, stride=2), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.two(torch.relu(self.norm(self.one(x))))).mean((2, 3)))


def tokens() -> Tensor:
    return torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(0))


HOSTS: dict[str, tuple[Any, Any, Any]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 6)), lambda: torch.randn(6, 5), None),
    "text": (lambda: ByteLM(d_model=16, layers=1, heads=2, ffn=24, context=16), tokens, None),
    "images": (Images, lambda: torch.randn(4, 3, 9, 8), None),
    "recurrent": (Recurrent, lambda: torch.randn(4, 7, 5), ["rnn", "cell"]),
}
FITTING = {"dense": 26, "text": 42, "images": 34, "recurrent": 42}
"""How many blueprints grow somewhere in each host, at least."""


@pytest.mark.parametrize("host", HOSTS)
def test_every_blueprint_that_fits_grows_there(host: str) -> None:
    make, x, targets = HOSTS[host]
    torch.manual_seed(0)
    store = LibraryKernelStore(LIBRARY)
    rig = Rig(make(), x(), targets=targets, store=store)
    before = [rig.model(rig.x).detach(), rig.model.eval()(rig.x).detach()]
    menu, grown = Menu(LIBRARY, LIBRARY.names()), {}
    for name in LIBRARY.names():
        offers = (menu.offer(site, name, Room(20_000)) for site in observe.sites(rig.bank))
        offer = next((found for found in offers if found is not None), None)
        if offer is not None:
            given = {"blueprint": name, "dims": offer.dims, "reads": offer.reads, "init_seed": 1}
            grown[name] = rig.grow(offer.seed_id, S.GRAFTING, alpha=1.0, **given)
    store.close()
    assert len(grown) >= FITTING[host], sorted(set(LIBRARY.names()) - set(grown))
    for training, expected in ((False, before[1]), (True, before[0])):
        torch.testing.assert_close(rig.model.train(training)(rig.x), expected, rtol=1e-5, atol=1e-6)
    learn(rig, grown)
    assert all(graft.fault is None for graft in grown.values()), {n: g.fault for n, g in grown.items()}
    for name, graft in grown.items():
        assert LIBRARY[name].ir.trainable == any(moved(p) for p in graft.child.parameters()), name
    if "BP-MON-ACT-STATS" in grown:
        [found] = readings(rig.model).values()
        assert found["mean"].isfinite().all()


def learn(rig: Rig, grown: dict[str, Any]) -> None:
    parameters = [p for graft in grown.values() for p in graft.child.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for parameter in parameters:
        parameter.start = parameter.detach().clone()  # type: ignore[attr-defined]
    rig.model.train()
    for _ in range(3):
        optimizer.zero_grad()
        rig.forward_backward()
        optimizer.step()


def moved(parameter: Any) -> bool:
    return not torch.equal(parameter, parameter.start)


def test_the_canon_layer_grows_at_its_four_places() -> None:
    torch.manual_seed(0)
    host, x = ByteLM(d_model=16, layers=1, heads=2, ffn=24, context=16), tokens()
    places = ["blocks.0.norm_attn", "blocks.0.attn.qkv", "blocks.0.norm_ffn", "blocks.0.ffn.up"]
    rig = Rig(host, x, targets=places, store=LibraryKernelStore())
    grafts = [rig.grow(f"{place}#0.0", S.GRAFTING, blueprint="BP-CANON", alpha=1.0) for place in places]
    rig.store.close()
    assert [graft.child.site.d_out for graft in grafts] == [16, 48, 16, 24]
    rig.forward_backward()
    assert all(graft.grad_norm() > 0 for graft in grafts)
    with torch.no_grad():
        for graft in grafts:
            graft.child.mix.conv.weight.fill_(0.25)
        norm, h = host.blocks[0].norm_ffn, torch.randn(1, 5, 16)
        plain = F.layer_norm(h, (16,), norm.weight, norm.bias)
        past = [F.pad(plain, (0, 0, back, 0))[:, :5] for back in range(4)]
        torch.testing.assert_close(norm(h), plain + 0.25 * sum(past))
