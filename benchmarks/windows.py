"""How far does the choice of report windows alone move the losses of tasks C and D?

The small and the wide host of each task are trained as in `growth.py`, then measured on many random draws of as many
windows as the report part has. The spread of a level is what two honest measurements of the same model may differ by;
the spread of the paired difference is how much of that is left when both hosts are measured on the same windows.

    python benchmarks/windows.py
"""

import statistics
from typing import Any

import growth
import torch
from growth_tasks import BYTES, MIXTURE, Task
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.data.text import standard_library

DRAWS = 64
ARMS = ("small", "wide")


def host_of(task: Task, arm: str) -> nn.Module:
    """Return one of the task's static hosts, trained as in the table."""
    kept: list[nn.Module] = []
    original = esper.TolariaTrainer.train

    def train(self: esper.TolariaTrainer, *args: Any) -> Any:
        kept.append(self.model.host)
        return original(self, *args)

    esper.TolariaTrainer.train = train  # type: ignore[method-assign]
    growth.run(task, arm, 0)
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


def told(name: str, values: list[float]) -> str:
    """Return a row of the table."""
    spread = f"{statistics.stdev(values):.3f} | {min(values):.3f} | {max(values):.3f}"
    return f"| {name} | {statistics.mean(values):.3f} | {spread} |"


def main() -> None:
    """Print the rows of the table."""
    text = torch.frombuffer(bytearray(standard_library()[2]), dtype=torch.uint8)
    for task in (BYTES, MIXTURE):
        hosts, n = {arm: host_of(task, arm) for arm in ARMS}, task.data_args["report_windows"]
        draws = [torch.randint(len(text) - 129, (n,), generator=torch.Generator().manual_seed(s)) for s in range(DRAWS)]
        means = {arm: [float(losses(host, text, starts).mean()) for starts in draws] for arm, host in hosts.items()}
        for arm, values in means.items():
            Console().print(told(f"{task.name} {arm}, {n} windows", values))
        paired = [small - wide for small, wide in zip(*means.values(), strict=True)]
        Console().print(told(f"{task.name} small - wide", paired))
        Console().print(f"{task.name}: correlation of the levels {statistics.correlation(*means.values()):.3f}")


if __name__ == "__main__":
    main()
