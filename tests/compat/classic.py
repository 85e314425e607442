"""Plain PyTorch networks, each with one trait that trips tools which reach into a model."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from tests.compat.case import Batch, Case, draws

WIDTH, CLASSES = 8, 3


def _vectors(seed: int) -> Batch:
    return Batch(torch.randn(6, WIDTH, generator=draws(seed)), torch.arange(6) % CLASSES)


def _sequences(seed: int) -> Batch:
    return Batch(torch.randn(4, 5, WIDTH, generator=draws(seed)), torch.arange(4) % CLASSES)


def _padded(seed: int) -> Batch:
    hidden = torch.arange(5) >= torch.tensor([[5], [3], [4], [2]])
    return Batch((_sequences(seed).inputs, hidden), torch.arange(4) % CLASSES)


def _time_major(seed: int) -> Batch:
    return Batch(_sequences(seed).inputs.transpose(0, 1).contiguous(), torch.arange(4) % CLASSES)


def _images(seed: int) -> Batch:
    return Batch(torch.randn(4, 3, 8, 8, generator=draws(seed)), torch.arange(4) % CLASSES)


def _maps(seed: int) -> Batch:
    return Batch(_images(seed).inputs, torch.randn(4, 1, 8, 8, generator=draws(seed + 1)))


def _words(seed: int) -> Batch:
    return Batch(torch.randint(0, 11, (4, 5), generator=draws(seed)), torch.arange(20).reshape(4, 5) % 11)


def cross_entropy(output: Any, batch: Batch) -> Tensor:
    """Loss of class scores, the last axis of the output."""
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), batch.target.reshape(-1))


def _squares(output: Any, batch: Batch) -> Tensor:
    return F.mse_loss(output, batch.target)


class Encoder(nn.Module):
    """PyTorch's own encoder, whose fast path skips `forward` of its layers in evaluation."""

    def __init__(self, nested: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=hidden)[:, 0])


class Recurrent(nn.Module):
    """An LSTM, which returns `(y, (h, c))`."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=batch_first)
        self.head, self.axis = nn.Linear(WIDTH, CLASSES), 1 if batch_first else 0

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return self.head(y).mean(self.axis)


class UNet(nn.Module):
    """Two levels down and up again, with skips by concatenation and by addition."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)])
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.join, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        shallow = F.relu(self.down[0](x))
        deep = F.relu(self.down[1](F.max_pool2d(shallow, 2)))
        deep = deep + self.middle(deep)
        return self.head(self.join(torch.cat([shallow, self.up(deep)], dim=1)))


def inplace_cnn() -> nn.Module:
    """Batch normalisation and in-place ReLU behind each convolution."""
    blocks = [m for i, o in ((3, 6), (6, 6)) for m in (nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU(inplace=True))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


def conv1d() -> nn.Module:
    """Features on axis 1 of three."""
    return nn.Sequential(nn.Conv1d(5, 6, 1), nn.ReLU(), nn.Conv1d(6, 4, 1), nn.Flatten(), nn.Linear(4 * WIDTH, CLASSES))


class Tied(nn.Module):
    """The head shares the embedding's weight, and two layers share one module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight
        self.one = nn.Linear(WIDTH, WIDTH)
        self.two, self.free = self.one, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.free(torch.tanh(self.two(torch.tanh(self.one(self.embed(x)))))))


class Reused(nn.Module):
    """One block runs three times; one activation runs on two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.act = nn.Linear(WIDTH, WIDTH), nn.GELU()
        self.narrow, self.head = nn.Linear(WIDTH, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.act(self.block(x))
        return self.head(self.act(self.narrow(x)))


class Checkpointed(nn.Module):
    """Blocks that run again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.reentrant = nn.Linear(WIDTH, WIDTH), reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=self.reentrant) if self.training else block(x))
        return self.head(x)


class Pair(NamedTuple):
    """A tuple with names."""

    value: Tensor
    extra: Tensor


@dataclass(frozen=True)
class Record:
    """A dataclass that cannot be changed."""

    label: str
    value: Tensor


@dataclass
class Output(ModelOutput):
    """The transformers library's kind of output: dataclass and dict at once."""

    loss: Tensor | None = None
    value: Tensor | None = None


class Wrapping(nn.Module):
    """A linear layer that wraps its result in some container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(WIDTH, WIDTH), kind

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.linear(x))
        if self.kind == "tuple":
            return y, x
        if self.kind == "named tuple":
            return Pair(y, x)
        if self.kind == "dict":
            return {"n": 1, "value": y}
        return Record("x", y) if self.kind == "dataclass" else Output(value=y)


class Containers(nn.Module):
    """One layer for each kind of output."""

    def __init__(self) -> None:
        super().__init__()
        kinds = ("tuple", "named tuple", "dict", "dataclass", "ModelOutput")
        self.parts = nn.ModuleList(map(Wrapping, kinds))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        pair, named, table, record, output = (part(x) for part in self.parts)
        return self.head(pair[0] + named.value + table["value"] + record.value + output.value)


CASES = (
    Case("nn.TransformerEncoder", Encoder, _sequences, cross_entropy, fused=True),
    Case("nn.TransformerEncoder, padded batches", Encoder, _padded, cross_entropy, fused=True),
    Case(
        "nn.TransformerEncoder, padded, not nested", lambda: Encoder(nested=False), _padded, cross_entropy, fused=True
    ),
    Case("nn.LSTM", lambda: Recurrent(True), _sequences, cross_entropy, ("lstm", "head")),
    Case("nn.LSTM, time-major", lambda: Recurrent(False), _time_major, cross_entropy, ("lstm", "head")),
    Case("U-Net with skips", UNet, _maps, _squares, ("down.*", "middle*", "up", "join", "head"), "BP-CONV-RES"),
    Case("CNN, in-place ReLU", inplace_cnn, _images, cross_entropy, ("[0-4]",), "BP-CONV-RES"),
    Case("CNN of Conv1d", conv1d, _sequences, cross_entropy, ("?",)),
    Case("tied weights and modules", Tied, _words, cross_entropy),
    Case("reused modules", Reused, _vectors, cross_entropy, ("block", "act", "narrow", "head")),
    Case("gradient checkpointing, reentrant", lambda: Checkpointed(True), _vectors, cross_entropy),
    Case("gradient checkpointing, non-reentrant", lambda: Checkpointed(False), _vectors, cross_entropy),
    Case("tuple, dict and dataclass outputs", Containers, _vectors, cross_entropy, ("parts.?",)),
)
