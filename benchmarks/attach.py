"""Time to attach: `python benchmarks/attach.py [--quick] [--check]`.

`esper.wrap` against PEFT's `get_peft_model` (LoRA of rank 8) on the same sites of GPT-2 small (124 M parameters, random
weights): first the 48 projections of its 12 blocks, then, for Esper alone, its default sites. The two take turns in one
process, each on a model of its own that is made outside the clock; medians of wall time on one thread.
`--check` exits with status 1 if Esper takes more than twice as long.
`esper bench speed --rows attach` measures the same on a transformer of ours.
"""

import argparse
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import esper
from esper.bench.speed.attach import BUDGET, rounds, with_default_seeds

PROJECTIONS = ("c_attn", "c_proj", "c_fc")


def host() -> GPT2LMHeadModel:
    """Return GPT-2 small; what the numbers are does not matter here, so nobody waits for a random draw."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    return model.to_empty(device="cpu")


def with_lora(model: GPT2LMHeadModel) -> int:
    """Attach LoRA; return the number of sites."""
    config = LoraConfig(r=8, target_modules=list(PROJECTIONS), fan_in_fan_out=True, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    return sum(name.endswith(".lora_A") for name, _ in peft_model.named_modules())


def with_seeds(model: GPT2LMHeadModel) -> int:
    """Attach seeds at the same sites; return their number."""
    morphable = esper.wrap(model, targets=[f"transformer.h.*.{name}" for name in PROJECTIONS])
    return len(morphable.bank.layers)


ROUTES = {
    "peft.get_peft_model, LoRA of rank 8": with_lora,
    "esper.wrap, the same sites": with_seeds,
    "esper.wrap, default sites": with_default_seeds,
}


def main() -> int:
    """Measure, print, and tell whether the budget was met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 15")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if the budget is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    found = rounds(host, ROUTES, 3 if args.quick else 15)
    base_sites, base = found["peft.get_peft_model, LoRA of rank 8"]
    table = Table("what", "sites", "median", "ratio", "at most", box=SIMPLE_HEAD)
    for name, (sites, milliseconds) in found.items():
        limit = f"{BUDGET:.1f}" if sites == base_sites and milliseconds != base else ""
        table.add_row(name, str(sites), f"{milliseconds:.1f} ms", f"{milliseconds / base:.2f}", limit)
    Console(width=100).print(table)
    sites, milliseconds = found["esper.wrap, the same sites"]
    assert sites == base_sites, f"{sites} and {base_sites} sites are not the same"
    return int(args.check and milliseconds > BUDGET * base)


if __name__ == "__main__":
    sys.exit(main())
