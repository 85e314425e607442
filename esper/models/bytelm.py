"""A dense byte-level language model: the host of task C and the teacher of task D."""

from esper.models.transformer import ByteTransformer, FeedForward


class ByteLM(ByteTransformer):
    """Pre-norm causal transformer over bytes, with learned positions and an untied head.

    The default has 98,416 parameters; `ffn=58` (static wide) 114,670; the teacher
    `ByteLM(d_model=128, ffn=384)` 578,560. Growth sites are `blocks.N.after_attn` and
    `blocks.N.after_ffn` (residual stream), `blocks.N.attn` and `blocks.N.ffn`.

    Args:
        d_model: width of the residual stream, D.
        layers: number of blocks.
        heads: attention heads.
        ffn: hidden units of each feed-forward part.
        context: longest input, in bytes.
        vocab: number of symbols, V.

    Shapes:
        tokens: `[B, T] int64` with T <= context -> logits `[B, T, V]`.

    Raises:
        ConfigError: a size is out of range.

    Example:
        >>> import torch
        >>> ByteLM(d_model=8, heads=2)(torch.zeros(1, 5, dtype=torch.long)).shape
        torch.Size([1, 5, 256])
    """

    def __init__(
        self,
        *,
        d_model: int = 64,
        layers: int = 3,
        heads: int = 4,
        ffn: int = 16,
        context: int = 128,
        vocab: int = 256,
    ) -> None:
        """Make the model with PyTorch's default initialisation of the linear layers."""
        super().__init__(
            d_model=d_model,
            layers=layers,
            heads=heads,
            context=context,
            vocab=vocab,
            make_ffn=lambda: FeedForward(d_model=d_model, width=ffn),
        )
