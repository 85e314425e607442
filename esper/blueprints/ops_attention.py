"""Attention from separate queries, keys and values.

Letters in shapes: B batch, T tokens, N heads, C features of a head, W window, G blocks of W tokens.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from esper.blueprints.op import Op, Size, Value
from esper.blueprints.ops_heads import head_width
from esper.blueprints.site import Layout
from esper.leyline.errors import BlueprintDoesNotFit


class _Attend(Op):
    """Attention over three inputs: queries, keys and values."""

    ARITY: ClassVar[int] = 3
    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd",)
    MIXES_TOKENS: ClassVar[bool] = True
    heads: Size = 4

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the shape of the values."""
        widths = [head_width(value.width, self.heads) for value in inputs]
        if widths[0] != widths[1]:
            raise BlueprintDoesNotFit(f"its queries have {widths[0]} features in a head and its keys {widths[1]}.")
        return inputs[2]

    def scratch(self, inputs: Sequence[Value]) -> int:
        """Return `heads * T^2`, the scores."""
        return self.heads * inputs[0].tokens ** 2


class Attend(_Attend):
    """Scaled dot-product attention, several heads of queries to one of keys and values where `kv_heads` is smaller.

    Args:
        heads: heads of the queries; default 4.
        kv_heads: heads of keys and values; it must divide `heads`; default 4.
        causal: whether a token is blind to those after it; default true.
    """

    kv_heads: Size = 4
    causal: bool = True

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return as many heads as there are of queries, as wide as those of the values."""
        if self.heads % self.kv_heads:
            raise BlueprintDoesNotFit(f"{self.heads} heads of queries cannot share {self.kv_heads} of keys evenly.")
        query = head_width(inputs[0].width, self.heads)
        key, value = (head_width(given.width, self.kv_heads) for given in inputs[1:])
        if query != key:
            raise BlueprintDoesNotFit(f"its queries have {query} features in a head and its keys {key}.")
        return inputs[0]._replace(width=self.heads * value)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `GroupedAttention`."""
        return GroupedAttention(self.heads, self.kv_heads, self.causal)

    def macs(self, inputs: Sequence[Value]) -> int:
        """Return `T^2 * (queries + result)`: scores and sums, without credit for the masked half."""
        return inputs[0].tokens ** 2 * (inputs[0].width + self.infer(inputs).width)


class FlashAttention(_Attend):
    """Causal attention by the fused kernel alone (Dao, 2023), in bfloat16: no score is ever written to memory.

    Args:
        heads: number of heads; each needs a multiple of 8 features; default 4.
    """

    REQUIRES: ClassVar[tuple[str, ...]] = ("flash_attention",)

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the shape of the values; all three inputs are equally wide."""
        for value in inputs:
            if value.width != inputs[0].width or head_width(value.width, self.heads) % 8:
                raise BlueprintDoesNotFit(f"{self.heads} equal heads of a multiple of 8 features are needed.")
        return inputs[2]

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `FusedAttention`."""
        return FusedAttention(self.heads)

    def macs(self, inputs: Sequence[Value]) -> int:
        """Return `2 * T^2 * a`, without credit for the masked half."""
        return 2 * inputs[0].tokens ** 2 * inputs[0].width

    def scratch(self, inputs: Sequence[Value]) -> int:
        """Return 0: the scores stay in the kernel."""
        return 0


class LocalAttention(_Attend):
    """Causal attention to the present token and `window - 1` before it, in blocks of `window` tokens.

    Args:
        heads: number of heads; default 4.
        window: tokens seen.
    """

    window: Size

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `WindowAttention`."""
        return WindowAttention(self.heads, self.window)

    def macs(self, inputs: Sequence[Value]) -> int:
        """Return `T * 2 W * (queries + values)`, T rounded up to whole blocks."""
        padded = -(-inputs[0].tokens // self.window) * self.window
        return padded * 2 * self.window * (inputs[0].width + inputs[2].width)

    def scratch(self, inputs: Sequence[Value]) -> int:
        """Return the scores of every token with two blocks."""
        return self.heads * (inputs[0].tokens + self.window) * 2 * self.window


class LinearAttention(_Attend):
    """Causal attention whose weights are products of positive features, `elu(q) + 1` and `elu(k) + 1`.

    Its cost grows with the tokens, not with their square: past blocks are summed into one matrix for each head
    (Katharopoulos et al., 2020).

    Args:
        heads: number of heads; default 4.
        block: tokens that are related one by one; default 16. It changes speed, not results.
    """

    block: int = Field(default=16, ge=1, le=1024)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `KernelAttention`."""
        return KernelAttention(self.heads, self.block)

    def macs(self, inputs: Sequence[Value]) -> int:
        """Return the products inside blocks, with the sums of past blocks, and those that make these sums."""
        blocks, size = -(-inputs[0].tokens // self.block), self.block
        key, value = inputs[0].width // self.heads, inputs[2].width // self.heads + 1
        inside = size * size * (key + value)
        return self.heads * (blocks * (inside + 2 * size * key * value) + blocks * blocks * key * value)

    def scratch(self, inputs: Sequence[Value]) -> int:
        """Return the scores inside blocks and the matrices of past blocks."""
        blocks = -(-inputs[0].tokens // self.block)
        matrices = inputs[0].width * (inputs[2].width // self.heads + 1)
        return blocks * (self.heads * self.block**2 + 2 * matrices)


def _heads(x_BTA: Tensor, heads: int) -> Tensor:
    """Return (B, N, T, C)."""
    return torch.unflatten(x_BTA, -1, (heads, -1)).transpose(1, 2)


def _joined(x_BNTC: Tensor) -> Tensor:
    """Return (B, T, N C)."""
    return x_BNTC.transpose(1, 2).flatten(2)


def _in_blocks(x_BNTC: Tensor, size: int) -> Tensor:
    """Return (B, N, G, size, C), padded behind with zeros to whole blocks."""
    return torch.unflatten(F.pad(x_BNTC, (0, 0, 0, -x_BNTC.shape[2] % size)), 2, (-1, size))


class GroupedAttention(nn.Module):
    """Attention in which neighbouring heads of queries share a head of keys and values.

    Args:
        heads: heads N of the queries.
        kv_heads: heads of keys and values.
        causal: whether to mask later tokens.

    Shapes:
        q: (B, T, N C); k: (B, T, kv_heads C); v: (B, T, kv_heads D); result (B, T, N D).
    """

    def __init__(self, heads: int, kv_heads: int, causal: bool) -> None:
        """Hold the settings; there are no weights."""
        super().__init__()
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attended values."""
        shared = self.heads // self.kv_heads
        k_BNTC, v_BNTC = (_heads(x, self.kv_heads).repeat_interleave(shared, 1) for x in (k, v))
        return _joined(F.scaled_dot_product_attention(_heads(q, self.heads), k_BNTC, v_BNTC, is_causal=self.causal))


class FusedAttention(nn.Module):
    """Causal attention that only the fused kernel may compute, in bfloat16.

    Args:
        heads: number of heads N.

    Shapes:
        q, k, v: (B, T, N C); the result is the same.
    """

    def __init__(self, heads: int) -> None:
        """Hold the setting; there are no weights."""
        super().__init__()
        self.heads = heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attended values, in the precision of q."""
        q_BNTC, k_BNTC, v_BNTC = (_heads(x, self.heads).to(torch.bfloat16) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            mixed = F.scaled_dot_product_attention(q_BNTC, k_BNTC, v_BNTC, is_causal=True)
        return _joined(mixed).to(q.dtype)


class WindowAttention(nn.Module):
    """Attention of each block of tokens to itself and the block before, cut to a window.

    Args:
        heads: number of heads N.
        window: tokens W that a token sees, itself included.

    Shapes:
        q, k: (B, T, N C); v: (B, T, N D); result (B, T, N D).
    """

    def __init__(self, heads: int, window: int) -> None:
        """Hold the settings; there are no weights."""
        super().__init__()
        self.heads, self.window = heads, window

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attended values."""
        q_BNGWC, k_BNGWC, v_BNGWC = (_in_blocks(_heads(x, self.heads), self.window) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(
            q_BNGWC, _with_last(k_BNGWC), _with_last(v_BNGWC), attn_mask=self._seen(q_BNGWC)
        )
        return _joined(mixed.flatten(2, 3).narrow(2, 0, q.shape[1]))

    def _seen(self, like: Tensor) -> Tensor:
        """Return which of two blocks' tokens each token sees (G, W, 2 W); the first block has none before it."""
        band = like.new_ones(self.window, 2 * self.window, dtype=torch.bool).triu(1).tril(self.window)
        later = like.new_ones(like.shape[2], dtype=torch.int64).cumsum(0).view(-1, 1, 1) > 1
        return band & (later | (like.new_ones(2 * self.window, dtype=torch.int64).cumsum(0) > self.window))


def _with_last(x_BNGWC: Tensor) -> Tensor:
    """Put the tokens of the block before in front of each block's own: (B, N, G, 2 W, C)."""
    before = F.pad(x_BNGWC, (0, 0, 0, 0, 1, 0)).narrow(2, 0, x_BNGWC.shape[2])
    return torch.cat((before, x_BNGWC), 3)


class KernelAttention(nn.Module):
    """Linear attention: inside a block by scores, to everything before it by one matrix for each head.

    Args:
        heads: number of heads N.
        block: tokens W of a block.

    Shapes:
        q, k: (B, T, N C); v: (B, T, N D); result (B, T, N D).
    """

    def __init__(self, heads: int, block: int) -> None:
        """Hold the settings; there are no weights."""
        super().__init__()
        self.heads, self.block = heads, block

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the weighted means of the values."""
        q_BNGWC, k_BNGWC = (_in_blocks(F.elu(_heads(x, self.heads)) + 1, self.block) for x in (q, k))
        # A further feature of ones sums the weights themselves.
        v_BNGWD = _in_blocks(F.pad(_heads(v, self.heads), (0, 1), value=1.0), self.block)
        inside = torch.tril(q_BNGWC @ k_BNGWC.transpose(-1, -2)) @ v_BNGWD
        sums = inside + q_BNGWC @ self._past(k_BNGWC.transpose(-1, -2) @ v_BNGWD)
        summed = sums.flatten(2, 3).narrow(2, 0, q.shape[1])
        weighted, weights = summed[..., :-1], summed[..., -1:]
        return _joined(weighted / weights.clamp_min(1e-6))

    def _past(self, sums_BNGCD: Tensor) -> Tensor:
        """Add up the matrices of the blocks before each block."""
        blocks = sums_BNGCD.shape[2]
        earlier_GG = sums_BNGCD.new_ones(blocks, blocks).tril(-1)
        return torch.unflatten(earlier_GG @ sums_BNGCD.flatten(3), 3, (sums_BNGCD.shape[3], -1))
