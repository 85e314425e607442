"""Language models and a vision transformer of the transformers library, tiny and random."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.compat.case import Batch, Case, draws

VOCABULARY, LENGTH = 31, 7
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2() -> GPT2LMHeadModel:
    """Two blocks, dropout on, `Conv1D` layers, head tied to the embedding."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, **_SPECIAL)
    )


def _decoder(**given: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return (
        {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_key_value_heads": 1} | sizes | _SPECIAL | given
    )


def llama() -> LlamaForCausalLM:
    """Two blocks, grouped queries, head tied to the embedding."""
    return LlamaForCausalLM(LlamaConfig(**_decoder(tie_word_embeddings=True)))


def mixtral() -> MixtralForCausalLM:
    """Two blocks of four experts, two of them active."""
    return MixtralForCausalLM(MixtralConfig(**_decoder(num_local_experts=4, num_experts_per_tok=2)))


def t5() -> T5ForConditionalGeneration:
    """One encoder and one decoder block, the embedding shared by both."""
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def vit() -> ViTForImageClassification:
    """Two blocks over 2 x 2 patches, three classes."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config)


def checkpointed(reentrant: bool) -> GPT2LMHeadModel:
    """GPT-2 whose blocks run again in the backward pass."""
    model = gpt2()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    # The library's hook that makes inputs require gradients cannot be pickled, and only frozen embeddings need it.
    model.disable_input_require_grads()
    return model


def _tokens(seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (4, LENGTH), generator=draws(seed))


def _text(seed: int) -> Batch:
    return Batch({"input_ids": _tokens(seed), "labels": _tokens(seed)})


def _pairs(seed: int) -> Batch:
    return Batch({"input_ids": _tokens(seed), "labels": _tokens(seed + 1)})


def _images(seed: int) -> Batch:
    pixels = torch.randn(4, 3, 16, 16, generator=draws(seed))
    return Batch({"pixel_values": pixels}, torch.arange(4) % 3)


def own_loss(output: Any, batch: Batch) -> Tensor:
    """The loss that the model computed itself."""
    loss: Tensor = output.loss
    return loss


def _logits_loss(output: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(output.logits, batch.target)


CASES = (
    Case("transformers GPT-2", gpt2, _text, own_loss, generates=True),
    Case("transformers Llama, tied", llama, _text, own_loss, generates=True),
    Case(
        "transformers Mixtral",
        mixtral,
        _text,
        own_loss,
        ("*.self_attn*", "*.mlp", "*.mlp.gate", "*.mlp.experts", "*norm"),
        generates=True,
    ),
    Case("transformers T5", t5, _pairs, own_loss, generates=True),
    Case("transformers ViT", vit, _images, _logits_loss),
    Case("transformers GPT-2, checkpointing, reentrant", lambda: checkpointed(True), _text, own_loss),
    Case("transformers GPT-2, checkpointing, non-reentrant", lambda: checkpointed(False), _text, own_loss),
    Case(
        "transformers GPT-2, ModelOutput and tuples", gpt2, _text, own_loss, ("transformer", "*.attn"), generates=True
    ),
)
