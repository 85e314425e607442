"""The kernels against plain torch, on Triton's interpreter, or on a GPU where there is one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from esper.kasmina.checks import check_triton

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv" / "triton"
linux = pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton for this system")


def with_triton(*command: str, **variables: str) -> str:
    """Run a module of the tests in a process that finds Triton; return what it printed."""
    if find_spec("triton") is None and not (FOLDER / "triton").is_dir():
        raise RuntimeError(f"{FOLDER} lacks triton; run `make setup`, which installs tests/kasmina/triton.lock there.")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", ""), str(FOLDER)])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@linux
@pytest.mark.slow
def test_on_the_interpreter():
    reached = json.loads(with_triton("tests.kasmina.interpreted", TRITON_INTERPRET="1").splitlines()[-1])
    assert reached["blend"] == 1, "a layer blends all its children in one call"
    assert reached["chunk_moments"] >= 1


@linux
@pytest.mark.slow
def test_they_compile_for_gpus(tmp_path):
    with_triton("tests.kasmina.gpu_code", "90", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    check_triton("cuda")
