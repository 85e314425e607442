"""A folder with a plain network: weights, and a Python file that plants the children in a fresh host.

```
weights.safetensors   host and children, under the names of the exported module's state dict
grown.py              the children as plain code: `load(host)` needs torch alone
lineage.json          what was kept, on what evidence
README.md             what grew, what became of it, how to run it
```
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from esper.tolaria.card import Fate, exported_card
from esper.tolaria.plain_code import code_of
from esper.tolaria.saved import WEIGHTS, replacing, save_weights

CODE = "grown.py"


def write_folder(model: nn.Module, path: Path, lineage: dict[str, Any], fates: Sequence[Fate]) -> None:
    """Write a plain network to a folder; an existing one is replaced as a whole.

    Args:
        model: what `export` made.
        path: the folder.
        lineage: what was kept, on what evidence.
        fates: what became of each child.

    Raises:
        ConfigError: a child cannot be written as plain code.
        OutputError: the folder cannot be written.
    """
    code = code_of(model)
    with replacing(path) as folder:
        weights = {name: t.detach().clone().contiguous() for name, t in model.state_dict().items()}
        save_weights(weights, folder / WEIGHTS)
        (folder / CODE).write_text(code, encoding="utf-8")
        (folder / "lineage.json").write_text(json.dumps(lineage, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(exported_card(lineage, fates, type(model).__name__), encoding="utf-8")
