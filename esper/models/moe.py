"""A byte-level language model whose feed-forward parts are mixtures of experts: the student of task D.

Shape letters: N tokens, D model width, E experts, H width of one expert.
"""

from typing import Any

import torch
from torch import Tensor, nn

from esper.leyline.errors import ConfigError
from esper.models.transformer import ByteTransformer


class MixtureOfExperts(nn.Module):
    """Top-k mixture of small GELU experts behind a softmax router (Shazeer et al., 2017; Switch, 2021).

    `y = sum_e g_e * down_e(gelu(up_e(x)))`, where g is the router's softmax, kept for the k largest
    and renormalised to sum to 1. All experts are computed, side by side in two matrix products, and
    weighted by the gate: at four experts of width 16 this is faster than gathering tokens, but the work
    done (and what `macs` counts) is that of all E experts, not of k.

    Args:
        d_model: width of the residual stream, D.
        experts: number of experts, E.
        expert_width: hidden units of one expert, H.
        top_k: experts used by one token.

    Shapes:
        x: `[..., D]` -> `[..., D]`.

    Raises:
        ConfigError: `top_k` is not between 1 and `experts`.
    """

    def __init__(self, *, d_model: int, experts: int, expert_width: int, top_k: int) -> None:
        """Make router and experts; each expert starts like a pair of linear layers of its own."""
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ConfigError(f"top_k={top_k} must be between 1 and experts={experts}.")
        self.experts, self.expert_width, self.top_k = experts, expert_width, top_k
        self.router = nn.Linear(d_model, experts)
        self.up = nn.Linear(d_model, experts * expert_width, bias=False)
        self.act = nn.GELU()
        self.down = nn.Linear(experts * expert_width, d_model, bias=False)
        nn.init.uniform_(self.down.weight, -(expert_width**-0.5), expert_width**-0.5)
        self.losses: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Route each token to its experts and keep the routing losses."""
        logits = self.router(x)
        probabilities = logits.softmax(-1)
        top, chosen = probabilities.topk(self.top_k, dim=-1)
        gate = torch.zeros_like(probabilities).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        self.losses = {
            "load_balance": load_balance(probabilities, chosen),
            "router_z": logits.logsumexp(-1).square().mean(),
        }
        hidden = self.act(self.up(x)) * gate.repeat_interleave(self.expert_width, dim=-1)
        out: Tensor = self.down(hidden)
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last forward's losses out of copies and pickles: they hold an autograd graph."""
        return {**self.__dict__, "losses": {}}


class MoEByteLM(ByteTransformer):
    """`ByteLM` with a mixture of experts for each feed-forward part.

    The default has 92,040 parameters; `expert_width=24` has 100,232. Growth sites are those of `ByteLM`;
    `blocks.N.ffn.router`, `.up` and `.down` are linear layers (`up` and `down` hold all experts side by side).

    Args:
        d_model: width of the residual stream, D.
        layers: number of blocks.
        heads: attention heads.
        experts: experts of each block, E.
        expert_width: hidden units of one expert, H.
        top_k: experts used by one token.
        context: longest input, in bytes.
        vocab: number of symbols, V.

    Shapes:
        tokens: `[B, T] int64` with T <= context -> logits `[B, T, V]`.

    Raises:
        ConfigError: a size is out of range.

    Example:
        >>> model = MoEByteLM(d_model=8, heads=2)
        >>> _ = model(torch.zeros(1, 5, dtype=torch.long))
        >>> sorted(model.auxiliary_losses())
        ['load_balance', 'router_z']
    """

    def __init__(
        self,
        *,
        d_model: int = 64,
        layers: int = 2,
        heads: int = 4,
        experts: int = 4,
        expert_width: int = 16,
        top_k: int = 2,
        context: int = 128,
        vocab: int = 256,
    ) -> None:
        """Make the model."""
        super().__init__(
            d_model=d_model,
            layers=layers,
            heads=heads,
            context=context,
            vocab=vocab,
            make_ffn=lambda: MixtureOfExperts(d_model=d_model, experts=experts, expert_width=expert_width, top_k=top_k),
        )

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return the routing losses of the last forward, each the mean over the blocks, unweighted.

        `load_balance` is 1 for perfectly even routing; `router_z` is the mean squared log-sum-exp of the
        router's logits. Empty before the first forward and in a fresh copy.
        """
        layers = [module.losses for module in self.modules() if isinstance(module, MixtureOfExperts) and module.losses]
        if not layers:
            return {}
        return {name: torch.stack([losses[name] for losses in layers]).mean() for name in layers[0]}


def load_balance(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Return `E * sum_e f_e * p_e` (Fedus et al., 2021, eq. 4), which is 1 for even routing and at most E.

    Args:
        probabilities: the router's softmax, `[..., E]`; p is its mean over tokens.
        chosen: the experts used, `[..., k]`; f is their share of all uses, without a gradient.
    """
    experts = probabilities.shape[-1]
    share = torch.bincount(chosen.flatten(), minlength=experts).to(probabilities.dtype) / chosen.numel()
    return experts * (share * probabilities.reshape(-1, experts).mean(0)).sum()
