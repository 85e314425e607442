"""Dormant overhead on four families of models: `python benchmarks/overhead.py [--quick] [--check]`.

`esper.bench.speed.dormant` says how it is measured; `esper bench speed --rows dormant` does the same on hosts of ours.
Here 25 blocks, in each of which the least of six runs counts. The plain estimate on whole steps,
`(31 * unsampled + sampled) / 32 / bare`, is shown beside the overhead.
`--check` exits with status 1 if the overhead is over 1 % for any model.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
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

from esper.bench.speed.dormant import BUDGET, overhead
from esper.bench.speed.hosts import Subject


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the loss that a model of transformers computes by itself."""
    return model(**batch).loss


def gpt2() -> Subject:
    """Return the layers of GPT-2 small, half as wide and half as deep."""
    config = GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=8192, bos_token_id=0, eos_token_id=0)
    config.loss_type = "ForCausalLM"
    return Subject("GPT-2-like", GPT2LMHeadModel(config), loss, _tokens(8192, 4, 64), _tokens(8192, 1, 2))


def vit() -> Subject:
    """Return ViT-Tiny at 224 pixels."""
    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=100)
    small = _images(16, 1) | {"interpolate_pos_encoding": True}
    return Subject("ViT-Tiny", ViTForImageClassification(config), loss, _images(224, 2), small)


def resnet() -> Subject:
    """Return ResNet-18 at 64 pixels."""
    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=100)
    return Subject("ResNet-18", ResNetForImageClassification(config), loss, _images(64, 16), _images(32, 2))


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
    return Subject("Mixtral-like", MixtralForCausalLM(config), loss, _tokens(8192, 4, 64), _tokens(8192, 1, 2))


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
    results = []
    for name in args.models:
        torch.manual_seed(0)
        results.append(overhead(MODELS[name](), 3 if args.quick else 25))
    for r in results:
        shown = [m.percent() for m in (r.control, r.small, r.sampled, r.plain, r.overhead)]
        table.add_row(r.name, str(r.sites), f"{r.bare_ms:.0f} ms", *shown, f"{100 * (BUDGET - 1):.0f} %")
    Console(width=180).print(table)
    return int(args.check and not all(r.met for r in results))


if __name__ == "__main__":
    sys.exit(main())
