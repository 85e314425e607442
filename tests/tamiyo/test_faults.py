"""A kernel that fails in the middle of training never stops it."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.kasmina.kernels import Kernel, KernelRequest, KernelStore
from esper.kasmina.library_store import LibraryKernelStore
from esper.leyline.errors import KernelError
from tests.helpers import QUICK, Plain, digits, planting, trainer


class Spoil(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.full_like(grad, math.nan)


class Failing(nn.Module):
    """A child that behaves for a while."""

    def __init__(self, child: nn.Module, how: str, after: int) -> None:
        super().__init__()
        self.child, self.how, self.after, self.calls = child, how, after, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if self.how == "gradient to the host" and self.calls > self.after:
            return self.child(Spoil.apply(x))
        result: Tensor = self.child(x)
        if self.calls <= self.after:
            return result
        if self.how == "gradient":
            return Spoil.apply(result)
        if self.how == "raises":
            raise RuntimeError("the kernel is broken")
        return {"nan": result * math.nan, "shape": result[..., :-1], "type": None}[self.how]


@final
class FailingStore(KernelStore):
    """The library's kernels, each wrapped so that it fails."""

    def __init__(self, how: str, after: int) -> None:
        self.inner, self.how, self.after, self.evicted = LibraryKernelStore(), how, after, []

    def prefetch(self, request: KernelRequest) -> None:
        self.inner.prefetch(request)

    def poll(self, request: KernelRequest) -> Kernel | None:
        kernel = self.inner.poll(request)
        if kernel is None:
            return None

        def make(seed: int, device: torch.device) -> nn.Module:
            return Failing(kernel.make(seed, device), self.how, self.after)

        return Kernel(kernel.kernel_id, kernel.ir, kernel.params, kernel.macs, kernel.nbytes, make)

    def evict(self, kernel_id: str) -> None:
        self.evicted.append(kernel_id)
        self.inner.evict(kernel_id)

    def close(self) -> None:
        self.inner.close()


KINDS = {"raises": "RAISED", "nan": "NOT_FINITE", "shape": "WRONG_SHAPE", "type": "WRONG_SHAPE"}
GRADIENTS = {"gradient": "NOT_FINITE", "gradient to the host": "NOT_FINITE"}


@pytest.mark.parametrize(("how", "after"), [*product(KINDS, (0, 7)), *product(GRADIENTS, (7,)), ("gradient", 0)])
def test_the_run_goes_on_and_the_seed_is_culled(tmp_path: Path, how: str, after: int) -> None:
    store = FailingStore(how, after)
    callback = esper.Tamiyo(
        "schedule", store=store, kasmina=QUICK | {"embargo_steps": 10_000}, settings=planting(), targets=["net.*"]
    )
    module = Plain()
    trainer(tmp_path, callback).fit(module, datamodule=digits())
    assert len(module.train_losses) == 80
    assert all(math.isfinite(loss) for loss in module.train_losses)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    faults = [e["fault"] for e in events if e["type"] == "GraftFaulted"]
    assert faults == [(KINDS | GRADIENTS)[how]]
    (report,) = callback.controller.reports
    assert (report.outcome.value, report.reason.value) == ("CULLED", "RUNTIME_ERROR")
    assert [v.state.value for v in callback.morphable.seeds if v.blueprint] == ["CULLED"]  # under embargo
    assert len(store.evicted) == 1
    assert not [name for name, _ in module.named_parameters() if "esper" in name]


def test_from_the_fault_on_the_host_trains_as_if_nothing_were_there(tmp_path: Path) -> None:
    # The child fails on its first call at alpha > 0, so it never has an effect.
    runs = []
    for policy in ("off", "schedule"):
        module = Plain()
        callback = esper.Tamiyo(
            policy, store=FailingStore("nan", 0), kasmina=QUICK, settings=planting(), targets=["net.*"]
        )
        trainer(tmp_path / policy, callback).fit(module, datamodule=digits())
        runs.append(module.train_losses)
    assert runs[0] == runs[1]


def test_a_kernel_that_cannot_be_loaded_ends_in_culled(tmp_path: Path) -> None:
    @final
    class Empty(KernelStore):
        def prefetch(self, request: KernelRequest) -> None:
            pass

        def poll(self, request: KernelRequest) -> Kernel | None:
            raise KernelError("the store is on fire")

        def evict(self, kernel_id: str) -> None:
            pass

        def close(self) -> None:
            pass

    callback = esper.Tamiyo("schedule", store=Empty(), kasmina=QUICK, settings=planting(), targets=["net.*"])
    module = Plain()
    trainer(tmp_path, callback).fit(module, datamodule=digits())
    assert [r.reason.value for r in callback.controller.reports] == ["KERNEL_LOAD_FAILED"]
