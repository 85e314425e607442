"""Dormant overhead on four families of models: `python benchmarks/overhead.py [--quick] [--check]`.

Each model is there three times with the same weights: bare, bare again (the control: its difference from the first is
the noise floor), and with dormant seeds at the default targets and default telemetry. In each of 25 blocks the three
and the wrapped model's sampled step (one step in 32) run interleaved, there and back, six times each, of which the
least counts; a step is forward and backward. The overhead is the median over the blocks of
`(31 * unsampled + sampled) / 32 / bare`, processor time, one thread.
`--check` exits with status 1 if that median is over 1 % for any model.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timing import Median, blocks
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from esper.kasmina.steps import SeedStepper
from esper.kasmina.wrapper import MorphableModel, wrap

EVERY = 32
BUDGET = 1.01


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the layers of GPT-2 small, half as wide and half as deep."""
    config = GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=8192, bos_token_id=0, eos_token_id=0)
    config.loss_type = "ForCausalLM"
    return GPT2LMHeadModel(config), _tokens(8192, 4, 64)


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return ViT-Tiny at 224 pixels."""
    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=100)
    return ViTForImageClassification(config), _images(224, 2)


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return ResNet-18 at 64 pixels."""
    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=100)
    return ResNetForImageClassification(config), _images(64, 16)


def mixtral() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return four layers of Mixtral with eight experts each, two per token, 256 wide."""
    config = MixtralConfig(
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=8192,
        output_router_logits=True,
    )
    return MixtralForCausalLM(config), _tokens(8192, 4, 64)


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "GPT-2-like": gpt2,
    "ViT-Tiny": vit,
    "ResNet-18": resnet,
    "Mixtral-like": mixtral,
}


def _tokens(vocabulary: int, samples: int, length: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def _images(pixels: int, samples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, pixels, pixels, generator=generator)
    return {"pixel_values": images, "labels": torch.arange(samples)}


class Result(NamedTuple):
    """The four ratios of one model to its bare self, and what a step of that takes."""

    name: str
    sites: int
    bare_ms: float
    control: Median
    unsampled: Median
    sampled: Median
    overhead: Median

    @property
    def met(self) -> bool:
        """Whether the median is within the budget."""
        return self.overhead.value <= BUDGET


def step(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return one forward and backward pass."""

    def run() -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    return run


def seeded(host: nn.Module, batch: dict[str, Tensor]) -> MorphableModel:
    """Wrap a host and let it be probed, as by the first epoch of a run."""
    model = wrap(host)
    step(model, batch)()
    with torch.no_grad():
        model.eval()(**batch)
    model.train()
    for layer in model.bank.all_layers():
        layer.finish_probe()
    return model


def telemetric(model: MorphableModel, batch: dict[str, Tensor], stepper: SeedStepper, *, at: int) -> Callable[[], None]:
    """Return a step as the callback makes it, at a step of the run that is sampled or not."""
    plain = step(model, batch)

    def run() -> None:
        stepper.begin(at)
        plain()
        stepper.observe_gradients()
        stepper.begin(at + 1)

    return run


def measure(name: str, count: int) -> Result:
    """Time one model."""
    torch.manual_seed(0)
    bare, batch = MODELS[name]()
    control, model = copy.deepcopy(bare), seeded(copy.deepcopy(bare), batch)
    assert model.bank.config.telemetry_every == EVERY
    stepper = SeedStepper(model.bank)
    calls = {
        "bare": step(bare.train(), batch),
        "control": step(control.train(), batch),
        "unsampled": telemetric(model, batch, stepper, at=1),
        "sampled": telemetric(model, batch, stepper, at=0),
    }
    blocks(calls, 2)
    found = blocks(calls, count, repeats=3)
    ratios = {name: Median.of([times[name] / times["bare"] for times in found]) for name in calls}
    windows = [((EVERY - 1) * t["unsampled"] + t["sampled"]) / EVERY / t["bare"] for t in found]
    bare_ms = 1e3 * statistics.median(times["bare"] for times in found)
    sites = len(model.bank.layers)
    return Result(name, sites, bare_ms, ratios["control"], ratios["unsampled"], ratios["sampled"], Median.of(windows))


def main() -> int:
    """Measure, print, and tell whether the budget was met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 blocks instead of 25")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if the budget is missed")
    parser.add_argument("models", nargs="*", default=list(MODELS), help="some of: " + ", ".join(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    columns = ("model", "sites", "bare step", "control", "unsampled step", "sampled step", "overhead", "at most")
    table = Table(*columns, box=SIMPLE_HEAD)
    results = [measure(name, 3 if args.quick else 25) for name in args.models]
    for r in results:
        shown = [m.percent() for m in (r.control, r.unsampled, r.sampled, r.overhead)]
        table.add_row(r.name, str(r.sites), f"{r.bare_ms:.0f} ms", *shown, f"{100 * (BUDGET - 1):.0f} %")
    Console(width=160).print(table)
    return int(args.check and not all(r.met for r in results))


if __name__ == "__main__":
    sys.exit(main())
