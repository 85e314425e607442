"""Any causal language model of the transformers library, as a network from tokens to logits.

Shape letters: B batch, T time, V vocabulary.
"""

from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from esper import hub
from esper.leyline.errors import ConfigError
from esper.models.remembered import RememberedModule

Start = Literal["auto", "weights", "config"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CausalLM(RememberedModule):
    """A causal language model by name or local folder; `lm` is the transformers model itself.

    The load-balancing loss and the router's z-loss of a mixture of experts are offered by `auxiliary_losses()`.

    Args:
        name: a folder, or a name on the Hub.
        start: `weights` reads them, `config` draws random ones for the folder's configuration, and `auto` reads
            weights unless a local folder holds none.
        dtype: `float32`, `bfloat16` or `float16`: the type the weights are held in.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        setting: what the user sets to give the name, for messages.

    Shapes:
        tokens: `[B, T] int64` -> logits `[B, T, V]`.

    Raises:
        ConfigError: the model is not there, is no causal language model, or transformers is not installed.
    """

    def __init__(
        self,
        *,
        name: str | None,
        start: Start = "auto",
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        setting: str = "name",
    ) -> None:
        """Read or make the model."""
        super().__init__()
        if start not in get_args(Start) or dtype not in DTYPES:
            raise ConfigError(
                f"start={start!r} must be one of {', '.join(get_args(Start))}; "
                f"dtype={dtype!r} must be one of {', '.join(DTYPES)}."
            )
        self.lm: nn.Module = _load(name, start, DTYPES[dtype], setting)
        if gradient_checkpointing:
            _recompute(self.lm)
        self.lm.train()
        text: Any = self.lm.config.get_text_config()
        self.vocabulary = int(text.vocab_size)
        self.top_k = int(getattr(text, "num_experts_per_tok", None) or 1)
        self.routes = "output_router_logits" in signature(self.lm.forward).parameters
        self.losses: dict[str, Tensor] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at every position; keep the routing losses where they can be learnt."""
        asked = {"output_router_logits": True} if self.routes and torch.is_grad_enabled() else {}
        out: Any = self.lm(input_ids=tokens, use_cache=False, **asked)
        self.losses = routing_losses(out, self.top_k) if asked else {}
        logits: Tensor = out.logits
        return logits

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return the routing losses of the last forward with gradients; empty for a model without experts.

        `load_balance` is 1 for perfectly even routing; `router_z` is the mean squared log-sum-exp of the routers'
        logits.
        """
        return self.losses

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last forward's losses out of copies and pickles: they hold an autograd graph."""
        return {**self.__dict__, "losses": {}}


def routing_losses(output: Any, top_k: int) -> dict[str, Tensor]:
    """Return the routing losses that a transformers output holds.

    Args:
        output: of a model that was asked for its router logits; `aux_loss` is the library's, which is `top_k` for
            even routing, `router_logits` one tensor `[.., E]` for each layer with experts.
        top_k: experts used by one token.
    """
    found: dict[str, Tensor] = {}
    balance = getattr(output, "aux_loss", None)
    if isinstance(balance, Tensor):
        found["load_balance"] = balance / top_k
    logits = [layer for layer in getattr(output, "router_logits", None) or () if isinstance(layer, Tensor)]
    if logits:
        found["router_z"] = torch.stack([layer.float().logsumexp(-1).square().mean() for layer in logits]).mean()
    return found


def _recompute(lm: Any) -> None:
    settings = {"use_reentrant": False}
    if hasattr(lm, "activation_checkpointing_enable"):
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:  # its name before transformers 5
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def _load(name: str | None, start: Start, dtype: torch.dtype, setting: str) -> Any:
    local = name is not None and Path(name).expanduser().is_dir()
    folder = hub.folder_of(name, setting=setting, weights=start != "config" and not local)
    config = hub.read_config(folder, setting=setting)
    if start == "config" or (start == "auto" and local and not any(folder.glob("*.safetensors*"))):
        return hub.make_model(config, dtype=dtype)
    return hub.read_model(folder, setting=setting, dtype=dtype)
