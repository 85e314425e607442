"""Dormant overhead on four families of models: `python benchmarks/overhead.py [--quick] [--check]`.

The seeds of one and the same model are taken off and put back between two steps, because two copies of a model differ
by percents through their place in memory alone. "Control" is the model without seeds timed again: the noise floor. The
seeds are dormant, with default targets and default telemetry, of which one step in 32 is sampled; a step is forward and
backward. Processor time, one thread, 25 blocks, in each of which everything runs interleaved, there and back; the least
of six runs counts.

Dormant seeds touch no tensor in the 31 steps that are not sampled: what they cost is time in Python, the same for any
input. It is therefore measured where arithmetic is least, as the difference of a step with seeds and a bare one on the
smallest input of the model, because no machine that others use repeats a whole step to a part in a thousand. The
overhead is the median over the blocks of `(31 * small_difference + (sampled - bare)) / 32 / bare`. The plain estimate,
`(31 * unsampled + sampled) / 32 / bare` on whole steps, is shown beside it. One sampled step in 8 is read fully, which
costs more: both kinds are timed, and `sampled` is their mean at these shares.
`--check` exits with status 1 if the overhead is over 1 % for any model.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timing import Median, blocks
from torch import nn
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

from esper.kasmina.layer import FULLY_EVERY
from esper.kasmina.steps import SeedStepper
from esper.kasmina.wrapper import MorphableModel, wrap

EVERY = 32
BUDGET = 1.01


class Subject(NamedTuple):
    """A model, a batch for it, and the smallest batch that it takes."""

    model: nn.Module
    batch: dict[str, Any]
    small: dict[str, Any]


def gpt2() -> Subject:
    """Return the layers of GPT-2 small, half as wide and half as deep."""
    config = GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=8192, bos_token_id=0, eos_token_id=0)
    config.loss_type = "ForCausalLM"
    return Subject(GPT2LMHeadModel(config), _tokens(8192, 4, 64), _tokens(8192, 1, 2))


def vit() -> Subject:
    """Return ViT-Tiny at 224 pixels."""
    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=100)
    small = _images(16, 1) | {"interpolate_pos_encoding": True}
    return Subject(ViTForImageClassification(config), _images(224, 2), small)


def resnet() -> Subject:
    """Return ResNet-18 at 64 pixels."""
    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=100)
    return Subject(ResNetForImageClassification(config), _images(64, 16), _images(32, 2))


def mixtral() -> Subject:
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
    return Subject(MixtralForCausalLM(config), _tokens(8192, 4, 64), _tokens(8192, 1, 2))


MODELS: dict[str, Callable[[], Subject]] = {
    "GPT-2-like": gpt2,
    "ViT-Tiny": vit,
    "ResNet-18": resnet,
    "Mixtral-like": mixtral,
}


def _tokens(vocabulary: int, samples: int, length: int) -> dict[str, Any]:
    tokens = torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def _images(pixels: int, samples: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, pixels, pixels, generator=generator)
    return {"pixel_values": images, "labels": torch.arange(samples)}


class Result(NamedTuple):
    """One model: ratios to its bare self, and what a step of that takes."""

    name: str
    sites: int
    bare_ms: float
    control: Median
    small: Median
    sampled: Median
    plain: Median
    overhead: Median

    @property
    def met(self) -> bool:
        """Whether the median is within the budget."""
        return self.overhead.value <= BUDGET


class Seeds:
    """The seeds of a model, which can be taken off it and put back in microseconds.

    Args:
        model: the wrapped model, probed as by the first epoch of a run.
    """

    def __init__(self, model: MorphableModel) -> None:
        """Remember the hooks of every site."""
        self.model, self.stepper = model, SeedStepper(model.bank)
        self.sites = [layer.site for layer in model.bank.all_layers()]
        self.hooks = [(site._forward_hooks.copy(), site._forward_hooks_with_kwargs.copy()) for site in self.sites]

    def step(self, batch: dict[str, Any], *, at: int | None) -> Callable[[], None]:
        """Return a step of the bare host, or with seeds one as the callback makes it at a step of the run."""

        def bare() -> None:
            self.model.host.zero_grad()
            self.model.host(**batch).loss.backward()

        def seeded() -> None:
            assert at is not None
            self.stepper.begin(at)
            bare()
            self.stepper.observe_gradients()
            self.stepper.begin(at + 1)

        return bare if at is None else seeded

    def read(self, fully: bool) -> None:
        """Let the next sampled step be a full reading, as the first after a boundary is, or not."""
        for layer in self.model.bank.all_layers():
            layer.samples[:] = 0 if fully else 1

    def put(self, on: bool) -> None:
        """Take the seeds off, or put them back."""
        for site, (hooks, with_kwargs) in zip(self.sites, self.hooks, strict=True):
            site._forward_hooks.clear()
            site._forward_hooks_with_kwargs.clear()
            if on:
                site._forward_hooks.update(hooks)
                site._forward_hooks_with_kwargs.update(with_kwargs)


def seeded(host: nn.Module, batch: dict[str, Any]) -> MorphableModel:
    """Wrap a host and let it be probed, as by the first epoch of a run."""
    model = wrap(host)
    model(**batch).loss.backward()
    with torch.no_grad():
        model.eval()(**batch)
    model.train()
    for layer in model.bank.all_layers():
        layer.finish_probe()
    return model


def measure(name: str, count: int) -> Result:
    """Time one model."""
    torch.manual_seed(0)
    host, batch, least = MODELS[name]()
    seeds = Seeds(seeded(host, batch))
    assert seeds.model.bank.config.telemetry_every == EVERY
    calls = {
        "bare": seeds.step(batch, at=None),
        "control": seeds.step(batch, at=None),
        "unsampled": seeds.step(batch, at=1),
        "sampled": seeds.step(batch, at=0),
        "sampled fully": seeds.step(batch, at=0),
        "bare small": seeds.step(least, at=None),
        "unsampled small": seeds.step(least, at=1),
    }

    def prepare(call: str) -> None:
        seeds.put("sampled" in call)
        seeds.read("fully" in call)

    blocks(calls, 2, prepare=prepare)
    found = blocks(calls, count, repeats=3, prepare=prepare)
    for times in found:
        times["sampled"] += (times.pop("sampled fully") - times["sampled"]) / FULLY_EVERY
    return summary(name, len(seeds.sites), found)


def summary(name: str, sites: int, found: list[dict[str, float]]) -> Result:
    """Turn the seconds of the blocks into ratios to a bare step, 1 where nothing is added."""
    rest, extra = EVERY - 1, [times["unsampled small"] - times["bare small"] for times in found]
    pairs = list(zip(found, extra, strict=True))
    return Result(
        name,
        sites,
        bare_ms=1e3 * statistics.median(times["bare"] for times in found),
        control=Median.of([t["control"] / t["bare"] for t in found]),
        small=Median.of([1 + more / t["bare"] for t, more in pairs]),
        sampled=Median.of([t["sampled"] / t["bare"] for t in found]),
        plain=Median.of([(rest * t["unsampled"] + t["sampled"]) / EVERY / t["bare"] for t in found]),
        overhead=Median.of([1 + (rest * more + t["sampled"] - t["bare"]) / EVERY / t["bare"] for t, more in pairs]),
    )


def main() -> int:
    """Measure, print, and tell whether the budget was met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 blocks instead of 25")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if the budget is missed")
    parser.add_argument("models", nargs="*", default=list(MODELS), help="some of: " + ", ".join(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    columns = ("model", "sites", "bare", "control", "not sampled", "sampled", "plain estimate", "overhead", "at most")
    table = Table(*columns, box=SIMPLE_HEAD)
    results = [measure(name, 3 if args.quick else 25) for name in args.models]
    for r in results:
        shown = [m.percent() for m in (r.control, r.small, r.sampled, r.plain, r.overhead)]
        table.add_row(r.name, str(r.sites), f"{r.bare_ms:.0f} ms", *shown, f"{100 * (BUDGET - 1):.0f} %")
    Console(width=180).print(table)
    return int(args.check and not all(r.met for r in results))


if __name__ == "__main__":
    sys.exit(main())
