"""Parts of the byte-level transformers: causal attention, feed-forward, block, and the shell around them.

Shape letters: B batch, T time, D model width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.leyline.errors import ConfigError, DataError
from esper.models.remembered import RememberedModule

POSITION_STD = 0.02
EMBEDDING_STD = 0.04


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and the past (Vaswani et al., 2017).

    `softmax(Q K^T / sqrt(D / heads) + causal mask) V`, with one projection for Q, K and V.

    Args:
        d_model: width of the residual stream, D.
        heads: number of heads; divides `d_model`.

    Shapes:
        x: `[B, T, D]` -> `[B, T, D]`.

    Raises:
        ConfigError: `heads` does not divide `d_model`.
    """

    def __init__(self, *, d_model: int, heads: int) -> None:
        """Make the projections."""
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ConfigError(f"heads={heads} must divide d_model={d_model}.")
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position with its past."""
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        return out


class FeedForward(nn.Module):
    """`down(gelu(up(x)))`, applied to each position alone.

    Args:
        d_model: width of the residual stream, D.
        width: hidden units.

    Shapes:
        x: `[B, T, D]` -> `[B, T, D]`.
    """

    def __init__(self, *, d_model: int, width: int) -> None:
        """Make the two layers."""
        super().__init__()
        self.up = nn.Linear(d_model, width)
        self.act = nn.GELU()
        self.down = nn.Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the two layers."""
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each added to the residual stream.

    `after_attn` and `after_ffn` are identities on the residual stream, right behind each addition:
    named places where a network can be observed or grown.

    Args:
        d_model: width of the residual stream, D.
        heads: attention heads.
        ffn: the feed-forward part, `[B, T, D] -> [B, T, D]`.

    Shapes:
        x: `[B, T, D]` -> `[B, T, D]`.
    """

    def __init__(self, *, d_model: int, heads: int, ffn: nn.Module) -> None:
        """Put the parts together."""
        super().__init__()
        self.norm_attn = nn.LayerNorm(d_model)
        self.attn = CausalSelfAttention(d_model=d_model, heads=heads)
        self.after_attn = nn.Identity()
        self.norm_ffn = nn.LayerNorm(d_model)
        self.ffn = ffn
        self.after_ffn = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and feed-forward to the stream."""
        x = self.after_attn(x + self.attn(self.norm_attn(x)))
        out: Tensor = self.after_ffn(x + self.ffn(self.norm_ffn(x)))
        return out


class ByteTransformer(RememberedModule):
    """Embedding, blocks, final norm and an untied head: the shell of both byte models.

    Args:
        d_model: width of the residual stream, D.
        layers: number of blocks.
        heads: attention heads.
        context: longest input, in bytes.
        vocab: number of symbols, V.
        make_ffn: makes the feed-forward part of one block.

    Shapes:
        tokens: `[B, T] int64` with T <= context -> logits `[B, T, V]`.

    Raises:
        ConfigError: a size is out of range.
    """

    def __init__(
        self, *, d_model: int, layers: int, heads: int, context: int, vocab: int, make_ffn: Callable[[], nn.Module]
    ) -> None:
        """Make the shell and fill it with blocks."""
        super().__init__()
        _require_sizes(d_model=d_model, layers=layers, context=context, vocab=vocab)
        self.context = context
        self.embedding = nn.Embedding(vocab, d_model)
        self.positions = nn.Parameter(torch.empty(context, d_model))
        self.blocks = nn.ModuleList(Block(d_model=d_model, heads=heads, ffn=make_ffn()) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.positions, std=POSITION_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next symbol at every position.

        Raises:
            DataError: the input is longer than the context.
        """
        time = tokens.shape[1]
        if time > self.context:
            raise DataError(f"The input has {time} positions, the model's context is {self.context}; cut the input.")
        x = self.embedding(tokens) + self.positions[:time]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _require_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} must be at least 1, not {size}.")
