"""How far does the choice of report windows alone move the losses of tasks C and D?

One small model of each task is trained as in `growth.py`, then measured on many random draws of as many windows as the
report part has. The spread is what two honest measurements of the same model may differ by.

    python benchmarks/windows.py
"""

import statistics
from typing import Any

import growth
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.data.text import standard_library

DRAWS = 64


def small_host(task: growth.Task) -> nn.Module:
    """Return the task's small host, trained as in the table."""
    kept: list[nn.Module] = []
    original = esper.TolariaTrainer.train

    def train(self: esper.TolariaTrainer, *args: Any) -> Any:
        kept.append(self.model.host)
        return original(self, *args)

    esper.TolariaTrainer.train = train  # type: ignore[method-assign]
    growth.run(task, "small", 0)
    esper.TolariaTrainer.train = original  # type: ignore[method-assign]
    return kept[0].eval()


def losses(host: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
    """Return the loss of each window, [n]."""
    found = []
    with torch.no_grad():
        for part in starts.split(64):
            windows = torch.stack([text[start : start + 129] for start in part.tolist()]).long()
            logits = host(windows[:, :-1])
            logits = logits if isinstance(logits, Tensor) else logits[0]
            each = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
            found.append(each.view(len(part), -1).mean(1))
    return torch.cat(found)


def main() -> None:
    """Print one line per task."""
    text = torch.frombuffer(bytearray(standard_library()[2]), dtype=torch.uint8)
    for task in growth.TASKS.values():
        host, n = small_host(task), task.report_windows
        draws = (torch.randint(len(text) - 129, (n,), generator=torch.Generator().manual_seed(s)) for s in range(DRAWS))
        means = [float(losses(host, text, starts).mean()) for starts in draws]
        told = (
            f"mean {statistics.mean(means):.3f}, sd {statistics.stdev(means):.3f}, {min(means):.3f} to {max(means):.3f}"
        )
        Console().print(f"{task.name} small, seed 0, {DRAWS} draws of {n} windows: {told}")


if __name__ == "__main__":
    main()
