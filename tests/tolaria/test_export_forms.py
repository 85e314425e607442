"""Every form of an export: in a process without Esper, as programs, from the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.cli import main
from esper.leyline.errors import ConfigError
from esper.models import MLP, ByteLM
from tests.grafts import grafted, wrapped


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(x)
    return found[0] if isinstance(found, tuple) else found


def close(one: Tensor, other: Tensor, share: float = 1e-6) -> bool:
    return bool((one.double() - other.double()).abs().max() <= share * one.double().abs().max())


def loaded(folder: Path, host: nn.Module) -> nn.Module:
    names: dict[str, Any] = {"__name__": "grown", "__file__": str(folder / "grown.py")}
    exec(compile((folder / "grown.py").read_text(), "grown.py", "exec"), names)
    model: nn.Module = names["load"](host)
    return model


HOST = """
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.ffn = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.ffn(x))
"""

RUN = """
import sys
sys.modules["esper"] = None
try:
    import esper
except ImportError:
    pass
else:
    raise SystemExit("esper could be imported")
sys.path.insert(0, sys.argv[1])
import torch
wanted = torch.load("wanted.pt", weights_only=True)
x, y = wanted["x"], wanted["y"]
def same(found, exact=True):
    assert torch.equal(found, y) if exact else torch.allclose(found, y, rtol=1e-4, atol=1e-5), (found - y).abs().max()
program = torch.export.load("net.pt2").module()
same(program(x))
same(torch.cat([program(x[:1]), program(x[1:])]), False)
sys.path.insert(0, "net")
from mine import Mine
from grown import load
with torch.no_grad():
    same(load(Mine())(x))
    assert torch.equal(torch.load("folded.pth", weights_only=False)(x), wanted["folded"])
if len(sys.argv) > 2:
    import onnxruntime
    session = onnxruntime.InferenceSession("net.onnx")
    name = session.get_inputs()[0].name
    same(torch.from_numpy(session.run(None, {name: x.numpy()})[0]), False)
    assert session.run(None, {name: x[:2].repeat(3, 1).numpy()})[0].shape[0] == 6
assert not [name for name in sys.modules if name.startswith("esper.")]
print("same")
"""


@pytest.mark.slow
def test_a_process_without_esper_runs_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(HOST)
    monkeypatch.syspath_prepend(tmp_path)
    from mine import Mine  # type: ignore[import-not-found]

    torch.manual_seed(0)
    tokens = torch.randint(0, 32, (3, 9))
    model = wrapped(Mine(), tokens)
    for blueprint in ("BP-ATTN-STD", "BP-CONV-CAUSAL", "BP-NORM-RMS", "BP-WIDEN", "BP-EXPERT-MLP"):
        grafted(model, "ffn", blueprint)
    esper.export(model, tmp_path / "net")
    esper.export(model, tmp_path / "net.pt2", example=tokens)
    esper.export(model, tmp_path / "net.onnx", example=tokens)
    # Where everything folds, a network of the user's own classes is left, and even a pickle needs no Esper.
    linear = wrapped(Mine(), tokens)
    grafted(linear, "ffn.0", "BP-PROJ-LORA")
    folded = esper.export(linear, example=tokens)
    torch.save(folded, tmp_path / "folded.pth")
    wanted = {"x": tokens, "y": outputs(model, tokens), "folded": outputs(folded, tokens)}
    torch.save(wanted, tmp_path / "wanted.pt")
    (tmp_path / "run.py").write_text(RUN)
    result = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "run.py", str(tmp_path), "onnx"],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"} | {
            key: value for key, value in os.environ.items() if key in ("HOME", "PATH", "TMPDIR")
        },
    )  # fmt: skip
    assert result.stdout.strip() == "same", result.stderr
    lineage = {"lineage.json": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=lineage)
    assert len(json.loads(lineage["lineage.json"])["fossils"]) == 5


@pytest.mark.slow
def test_an_example_that_is_a_slice_makes_a_program_for_any_batch(tmp_path: Path) -> None:
    tokens = torch.randint(0, 32, (4, 10))
    host = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 8))
    model = wrapped(host, tokens)
    grafted(model, "1", "BP-NORM-RMS")
    esper.export(model, tmp_path / "net.pt2", example=tokens[:, :-1])
    program = torch.export.load(tmp_path / "net.pt2").module()
    other = torch.randint(0, 32, (7, 9))
    assert close(program(other), outputs(model, other))


class Pairs(nn.Module):
    """Takes two samples, or refuses to be traced."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.fc, self.branches = nn.Linear(4, 4), branches

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and float(x.sum()) > 1e9:
            return x
        return self.fc(x).reshape(2, 4)


@pytest.mark.slow
def test_what_torch_cannot_do_is_said(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match="batches of 2 only"):
        esper.export(wrapped(Pairs(), x), tmp_path / "net.pt2", example=x)
    assert torch.export.load(tmp_path / "net.pt2").module()(x).shape == (2, 4)
    with pytest.raises(ConfigError, match="cannot trace Pairs"):
        esper.export(wrapped(Pairs(branches=True), x), tmp_path / "other.pt2", example=x)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]


@pytest.mark.slow
def test_espers_own_models_need_no_example(tmp_path: Path) -> None:
    tokens = torch.randint(0, 256, (2, 12))
    model = wrapped(ByteLM(d_model=16, layers=1, heads=2, ffn=8, context=12), tokens)
    grafted(model, "blocks.0.ffn", "BP-MLP-SWIGLU")
    esper.export(model, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    for batch in (1, 2, 5):
        x = torch.randint(0, 256, (batch, 12))
        assert close(outputs(model, x), program(x).detach(), 1e-5)


DOCS = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.mark.slow
def test_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(block, "docs/export.md", "exec"), {})
    assert (tmp_path / "net" / "grown.py").exists()


def test_the_command_exports_a_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(5, 6)
    model = wrapped(MLP(widths=(6, 10, 4)), x)
    grafted(model, "layers.0", "BP-PROJ-LORA")
    esper.save_model(model, tmp_path / "run" / "model")
    for extra, count in ([], 0), (["--no-merge"], 1):
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "net"), *extra]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / "net")
        fresh = loaded(tmp_path / "net", MLP(widths=(6, 10, 4)))
        assert close(outputs(model, x), outputs(fresh, x))
        assert [type(m).__name__ for m in fresh.modules()].count("Planted") == count
