"""The networks that are measured: a byte-level language model and a convolutional network of realistic width."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper.kasmina.wrapper import MorphableModel, wrap
from esper.models import ByteLM, SmallCNN

Loss = Callable[[nn.Module, Any], Tensor]


class Subject(NamedTuple):
    """A model to measure.

    Args:
        name: for people.
        model: the host.
        loss: its loss on a batch.
        batch: a batch.
        small: the smallest batch that it takes.
    """

    name: str
    model: nn.Module
    loss: Loss
    batch: Any
    small: Any


def language_model(*, d_model: int = 384, layers: int = 6, samples: int = 4, length: int = 64) -> Subject:
    """Return a ByteLM; by default 10.9 M parameters: half as wide and half as deep as GPT-2 small."""
    torch.manual_seed(0)
    model = ByteLM(d_model=d_model, layers=layers, heads=d_model // 64 or 1, ffn=4 * d_model)
    tokens = torch.randint(0, 256, (samples, length), generator=torch.Generator().manual_seed(0))
    return Subject("ByteLM", model, _loss, tokens, tokens[:1, :2])


def image_model(*, widths: tuple[int, ...] = (3, 64, 64, 128, 128, 256, 256, 10), samples: int = 16) -> Subject:
    """Return a convolutional network; by default 1.1 M parameters, for images of 32 by 32."""
    torch.manual_seed(0)
    images = torch.randn(samples, widths[0], 32, 32, generator=torch.Generator().manual_seed(0))
    return Subject("CNN", SmallCNN(widths=widths), _loss, images, images[:1, :, :4, :4])


def _loss(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss that needs no labels."""
    logits: Tensor = model(batch)
    return logits.logsumexp(-1).mean()


def seeded(subject: Subject, **settings: Any) -> MorphableModel:
    """Wrap a host and let it be probed, as by the first epoch of a run; `settings` are those of `esper.wrap`."""
    model = wrap(subject.model, **settings)
    subject.loss(model, subject.batch).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        subject.loss(model.eval(), subject.batch)
    model.train()
    for layer in model.bank.all_layers():
        layer.finish_probe()
    return model
