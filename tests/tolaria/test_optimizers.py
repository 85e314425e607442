"""Surgery leaves the host's optimizer state bit for bit and every scheduler consistent."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as lr

import esper
from esper.kasmina.bank import SeedBank
from esper.kasmina.library_store import LibraryKernelStore
from esper.kasmina.writer import Moment, SeedWriter
from esper.leyline.errors import CheckpointError
from esper.leyline.ids import SeedId
from esper.leyline.states import SeedCommand
from esper.tamiyo.gate import command_for
from esper.tolaria.optimizers import SEED_KEY, BirthWarmUp, sync_optimizer, take_children_out, verify_groups

Make = Callable[[Optimizer], Any]
SCHEDULERS: dict[str, Make] = {
    "lambda": lambda o: lr.LambdaLR(o, lambda step: 1 / (step + 1)),
    "multiplicative": lambda o: lr.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr.StepLR(o, 3),
    "exponential": lambda o: lr.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr.CosineAnnealingLR(o, 20),
    "onecycle": lambda o: lr.OneCycleLR(o, 0.1, total_steps=40),
    "cyclic": lambda o: lr.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "restarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 5),
    "sequential": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1), lr.CosineAnnealingLR(o, 20)], [4]),
    "chained": lambda o: lr.ChainedScheduler([lr.ExponentialLR(o, 0.9), lr.StepLR(o, 3)], o),
}


def grown() -> tuple[esper.MorphableModel, Callable[[str, int], SeedId], Callable[[SeedId], None]]:
    """A wrapped model with a way to graft and to cull."""
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    model(torch.randn(4, 6)).sum().backward()
    model.zero_grad()
    store = LibraryKernelStore()
    writer = SeedWriter(model.bank, store, lambda event: None)
    moment = Moment("run", 0, 0)

    def graft(path: str, slot: int) -> SeedId:
        seed = SeedId(path, 0, slot)
        germinate = command_for(str(seed), SeedCommand.GERMINATE, "REQUESTED")  # type: ignore[arg-type]
        writer.apply([germinate.model_copy(update={"blueprint_id": "BP-MLP-GELU", "dims": {"h": 4}})], moment)
        writer.apply([command_for(str(seed), SeedCommand.LOAD, "SLOT_FREE")], moment)  # type: ignore[arg-type]
        while store.poll(writer.request(seed)) is None:
            pass
        writer.apply([command_for(str(seed), SeedCommand.TRAIN, "KERNEL_READY")], moment)  # type: ignore[arg-type]
        writer.apply([command_for(str(seed), SeedCommand.GRAFT, "STAGE_COMPLETE")], moment)  # type: ignore[arg-type]
        return seed

    def cull(seed: SeedId) -> None:
        writer.apply([command_for(str(seed), SeedCommand.CULL, "GATE_FAILED")], moment)  # type: ignore[arg-type]

    return model, graft, cull


def train(model: nn.Module, optimizer: Optimizer, scheduler: Any, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_host_state_is_bitwise_kept_and_the_child_follows_the_schedule(name: str) -> None:
    model, graft, cull = grown()
    optimizer = AdamW(model.host.parameters(), lr=0.05)
    scheduler = SCHEDULERS[name](optimizer)
    train(model, optimizer, scheduler, 3)
    before = deepcopy(optimizer.state_dict())
    seed = graft("0", 0)
    assert sync_optimizer(optimizer, [scheduler], model.bank)
    after = optimizer.state_dict()
    for index, state in before["state"].items():
        assert all(torch.equal(state[k], after["state"][index][k]) for k in state)
    train(model, optimizer, scheduler, 6)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[1] == pytest.approx(rates[0])
    cull(seed)
    assert sync_optimizer(optimizer, [scheduler], model.bank)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == len(list(model.host.parameters()))
    train(model, optimizer, scheduler, 3)


def test_plateau_keeps_one_minimum_per_group() -> None:
    model, graft, _ = grown()
    optimizer = SGD(model.host.parameters(), lr=0.1)
    scheduler = lr.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    graft("0", 0)
    sync_optimizer(optimizer, [scheduler], model.bank)
    for _ in range(4):
        scheduler.step(1.0)
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


def test_removing_the_first_of_two_children_keeps_the_second_ones_state() -> None:
    model, graft, cull = grown()
    optimizer = AdamW(model.host.parameters(), lr=0.05)
    first, second = graft("0", 0), graft("0", 1)
    for seed in (first, second):
        child = model.bank.graft(seed)
        assert child is not None
        child.set_alpha(0.5)
        model.bank.layer("0").refresh()
    sync_optimizer(optimizer, [], model.bank)
    train(model, optimizer, None, 3)
    graft_two = model.bank.graft(second)
    assert graft_two is not None
    parameter = next(p for n, p in graft_two.child.named_parameters() if "down" in n)
    moment = optimizer.state[parameter]["exp_avg"].clone()
    cull(first)
    sync_optimizer(optimizer, [], model.bank)
    assert [g.get(SEED_KEY) for g in optimizer.param_groups] == [None, str(second)]
    assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)


def test_the_learning_rate_scale_holds_for_child_groups_only() -> None:
    model, graft, _ = grown()
    optimizer = AdamW(model.host.parameters(), lr=0.1)
    graft("0", 0)
    sync_optimizer(optimizer, [lr.CosineAnnealingLR(optimizer, 10)], model.bank, lr_scale=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.05]


def test_groups_of_another_order_are_refused() -> None:
    model, graft, _ = grown()
    optimizer = AdamW(model.host.parameters())
    graft("0", 0), graft("2", 0)
    sync_optimizer(optimizer, [], model.bank)
    saved = [dict(group) for group in optimizer.param_groups]
    verify_groups(saved, optimizer)
    with pytest.raises(CheckpointError, match="resume with the same model"):
        verify_groups([saved[0], saved[2], saved[1]], optimizer)


def test_children_seen_by_configure_optimizers_leave_the_hosts_group() -> None:
    model, graft, _ = grown()
    graft("0", 0)
    optimizer = AdamW(model.parameters())
    take_children_out(optimizer, model.bank)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.host.parameters()]
    sync_optimizer(optimizer, [], model.bank)
    assert len(optimizer.param_groups) == 2


def test_birth_warm_up_scales_young_children_and_hides_it_from_the_schedule() -> None:
    model, graft, _ = grown()
    optimizer = SGD(model.host.parameters(), lr=1.0)
    seed = graft("0", 0)
    child = model.bank.graft(seed)
    assert child is not None
    child.set_alpha(1.0)
    model.bank.layer("0").refresh()
    sync_optimizer(optimizer, [], model.bank)
    BirthWarmUp(4).attach(optimizer)
    down = next(p for n, p in child.child.named_parameters() if "down" in n and p.dim() == 2)
    moves = []
    for _ in range(5):
        before = down.detach().clone()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moves.append(float((down.detach() - before).abs().max()))
        assert optimizer.param_groups[1]["lr"] == 1.0
    assert moves == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_shadow_training_uses_its_own_weight_decay() -> None:
    model, graft, _ = grown()
    optimizer = AdamW(model.host.parameters(), weight_decay=0.01)
    seed = graft("0", 0)
    child = model.bank.graft(seed)
    assert child is not None
    child.objective = "shadow"
    sync_optimizer(optimizer, [], model.bank)
    assert optimizer.param_groups[1]["weight_decay"] == model.bank.config.shadow_weight_decay
    child.objective = "graft"
    sync_optimizer(optimizer, [], model.bank)
    assert optimizer.param_groups[1]["weight_decay"] == 0.01


def test_an_unchanged_bank_changes_nothing() -> None:
    bank = esper.wrap(nn.Sequential(nn.Linear(2, 2))).bank
    assert isinstance(bank, SeedBank)
    assert not sync_optimizer(SGD([nn.Parameter(torch.zeros(1))], lr=0.1), [], bank)
