"""The host whose knowledge is at stake: a byte language model, trained once for each seed; and the two domains."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional as F

from esper.data import ByteText
from esper.files import replacing
from esper.leyline.errors import DataError
from esper.models import ByteLM

Batch = tuple[Tensor, Tensor]

ORIGINAL, NEW = "original", "new"
SITES: Final = ("*.after_attn", "*.after_ffn")
"""Where children are planted in turn: the residual stream, six places in three blocks."""

BATCH: Final = 8
WINDOWS: Final = 64
"""Windows of the report part that a loss is the mean of."""

_PEAK_LR, _FLOOR, _DECAY, _WARM_UP = 3e-3, 0.05, 0.3, 60


def domain(name: str, *, steps: int, seed: int, batch: int = BATCH) -> ByteText:
    """Return a domain: `original` is the standard library's Python, `new` the C++ headers of torch's `c10`.

    Args:
        name: which one.
        steps: training batches.
        seed: of the order of the batches.
        batch: windows of 128 bytes in each.

    Raises:
        DataError: this installation of torch ships no headers.
    """
    path = None if name == ORIGINAL else str(headers())
    return ByteText(path=path, steps_per_epoch=steps, seed=seed, batch_size=batch, report_windows=WINDOWS)


def headers() -> Path:
    """Return the folder of the new domain.

    Raises:
        DataError: it is not there.
    """
    folder = Path(torch.__file__).parent / "include" / "c10"
    if not folder.is_dir():
        raise DataError(f"no C++ headers at {folder}: this torch was installed without them; install it from a wheel.")
    return folder


def trained(folder: Path, *, steps: int, seed: int, **sizes: Any) -> ByteLM:
    """Return the host, trained on the original domain; it is trained once for all rows of a folder.

    Args:
        folder: where trained hosts are kept.
        steps: training steps.
        seed: of weights and data.
        sizes: of the model.
    """
    torch.manual_seed(seed)
    host = ByteLM(**sizes)
    name = "-".join(map(str, (steps, seed, *(f"{key}{value}" for key, value in sorted(sizes.items())))))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        file = folder / f"{name}.pt"
        if not file.exists():
            _train(host, domain(ORIGINAL, steps=steps, seed=seed).train_dataloader(), steps)
            with replacing(file) as whole:
                torch.save(host.state_dict(), whole)
        host.load_state_dict(torch.load(file, weights_only=True))
    return host


def _train(host: nn.Module, batches: Iterable[Batch], steps: int) -> None:
    optimizer = torch.optim.AdamW(host.parameters(), lr=_PEAK_LR, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _shape(steps))
    for x, y in batches:
        loss = mean_loss(host, x, y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(host.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _shape(steps: int) -> Callable[[int], float]:
    """Warm up, stay, and fall to a twentieth over the last three tenths."""

    def factor(step: int) -> float:
        left = (steps - step) / (_DECAY * steps)
        return min(1.0, (step + 1) / _WARM_UP, _FLOOR + (1 - _FLOOR) * min(1.0, left))

    return factor


def mean_loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of a batch, in nats per byte."""
    return F.cross_entropy(network(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def report_loss(network: nn.Module, data: ByteText) -> float:
    """Return the loss on the report part of a domain, which nothing is trained on, in nats per byte."""
    was, total, count = network.training, 0.0, 0
    network.eval()
    for x, y in data.test_dataloader():
        total, count = total + float(mean_loss(network, x, y)) * len(x), count + len(x)
    network.train(was)
    return total / count
