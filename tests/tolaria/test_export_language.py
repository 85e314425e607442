"""Grown language models of the transformers library leave as programs and as plain folders."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import esper
from tests.compat.language import t5
from tests.grafts import grafted, stir, wrapped
from tests.hf_models import gpt2, llama

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow
SITES = {gpt2: "transformer.h.0.mlp", llama: "model.layers.0.mlp"}


@pytest.mark.parametrize("build", [gpt2, llama], ids=["gpt2", "llama"])
def test_a_grown_model_runs_in_onnxruntime(build: Any, tmp_path: Path) -> None:
    host = shallow(build).eval()
    stir(host, scale=0.1)
    host.tie_weights()
    ids = torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(1))
    model = wrapped(host, ids)
    grafted(model, SITES[build], "BP-MLP-SWIGLU")
    grafted(model, SITES[build], "BP-CONV-CAUSAL")
    wanted = logits(model, ids)
    assert not torch.equal(logits(shallow(build).eval(), ids), wanted)
    esper.export(model, tmp_path / "net.onnx", example={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for batch in (ids, ids.repeat(2, 1)[:3]):
        found = outputs(session, batch)
        assert torch.allclose(found, logits(model, batch), rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(ids).logits
    return found


def shallow(build: Any) -> Any:
    """Return a model of one block: translating a second one would only take twice the time."""
    given = build(48, width=16)
    given.config.num_hidden_layers = 1
    torch.manual_seed(1)
    return type(given)(given.config)


def outputs(session: Any, ids: Tensor) -> Tensor:
    """Return the logits that a session computes."""
    given = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    return torch.from_numpy(session.run(None, {one.name: given[one.name] for one in session.get_inputs()})[0])


LOAD = """
import sys
sys.modules["esper"] = None
sys.path.insert(0, "net")
import torch
from transformers import T5Config, T5ForConditionalGeneration
from grown import load
config = T5Config.from_pretrained("config")
given = torch.load("given.pt", weights_only=True)
with torch.no_grad():
    model = load(T5ForConditionalGeneration(config)).eval()
    assert torch.equal(model(**given["inputs"]).logits, given["logits"])
assert not [name for name in sys.modules if name.startswith("esper.")]
print("same")
"""


def test_an_encoder_decoder_leaves_as_a_plain_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    host = t5().eval()
    stir(host, scale=0.1)
    draw = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(3, 31, (2, length), generator=draw) for length in (7, 5))
    inputs = {"input_ids": ids, "decoder_input_ids": labels}
    model = wrapped(host, **inputs)
    grafted(model, "encoder.block.0.layer.0", "BP-MLP-GELU")
    grafted(model, "decoder.block.0.layer.1", "BP-ATTN-STD")
    esper.export(model, tmp_path / "net", example=inputs)
    host.config.save_pretrained(tmp_path / "config")
    with torch.no_grad():
        torch.save({"inputs": inputs, "logits": model(**inputs).logits}, tmp_path / "given.pt")
    (tmp_path / "load.py").write_text(LOAD)
    kept = {key: value for key, value in os.environ.items() if key in ("HOME", "PATH", "TMPDIR")}
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "load.py"], cwd=tmp_path, env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr
