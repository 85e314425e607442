"""Tiny language models and a tokenizer in the files of the transformers library, made on the spot."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from esper.data.text import standard_library


def text(size: int = 60_000) -> str:
    """Real text, the same on every run on one machine."""
    return standard_library()[2][:size].decode("utf-8", errors="ignore")


def tokenizer(words: int = 300, learn_from: str | None = None) -> Any:
    """A byte-level BPE tokenizer, trained just now."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([learn_from or text()], vocab_size=words, show_progress=False, special_tokens=["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>")


def gpt2(vocab: int, width: int = 32) -> GPT2LMHeadModel:
    """A GPT-2 without dropout."""
    torch.manual_seed(1)
    sizes = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes))


def llama(vocab: int, width: int = 32, **given: Any) -> LlamaForCausalLM:
    """A Llama."""
    torch.manual_seed(2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **_sizes(width), **given))


def mixtral(vocab: int, width: int = 32) -> MixtralForCausalLM:
    """A Mixtral of four experts, two of which a token uses."""
    torch.manual_seed(3)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=vocab, **_sizes(width), **experts))


def _sizes(width: int) -> dict[str, int]:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2, **heads, **ends}


def saved(folder: Path, model: Any, tokens: Any = None, *, weights: bool = True) -> Path:
    """Write a model's folder, as `save_pretrained` of the transformers library does."""
    (model if weights else model.config).save_pretrained(folder)
    if tokens is not None:
        tokens.save_pretrained(folder)
    return folder
