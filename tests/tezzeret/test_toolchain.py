"""Names of toolchains and kernels."""

import os
import subprocess
import sys

import pytest

from esper.leyline.artifacts import Pipeline
from esper.leyline.errors import BlueprintError, KernelError
from esper.tezzeret import toolchain
from esper.tezzeret.pipelines import flags, resolve
from esper.tezzeret.toolchain import fingerprint, kernel_id, toolchain_hash
from tests.tezzeret.samples import graph, label, library, spec

PIPELINES: tuple[Pipeline, ...] = ("fast", "standard", "aggressive")


def test_kernels_that_differ_have_different_ids() -> None:
    ids = {kernel_id(one, "standard"): label(one) for one in library()}
    assert len(ids) == len(list(library()))
    varied = [{}, {"tokens": 7}, {"d_out": 32}, {"dtype": "bfloat16"}, {"dims": {"h": 8}}]
    assert len({kernel_id(spec(**fields), "standard") for fields in varied}) == len(varied)


def test_the_same_kernel_said_differently_has_one_id() -> None:
    assert kernel_id(spec(), "standard") == kernel_id(spec(dims={"h": 32}), "standard")
    assert kernel_id(spec(), "standard") == kernel_id(spec(kind="mlp"), "standard")
    assert kernel_id(spec(), "aggressive") == kernel_id(spec(), "standard")


def test_an_id_says_what_the_kernel_is_and_fits_a_file_name() -> None:
    name = kernel_id(spec(), "standard")
    assert name.split("-")[1:] == ["cpu.btd.12.16.6.float32.h32", "standard", toolchain_hash()]
    dims = {f"d{number}_{'x' * 12}": {"default": 1000 + number} for number in range(16)}
    nodes = [
        f"n{number} linear {'input' if number == 0 else f'n{number - 1}'} out={name}"
        for number, name in enumerate(dims)
    ]
    many = graph(*nodes, "last linear n15 out=8 init=zero", dims=dims)
    assert len(kernel_id(many, "standard")) < 200


def test_a_malformed_blueprint_and_an_unknown_target_have_no_id() -> None:
    with pytest.raises(BlueprintError):
        kernel_id(spec(ir="{}"), "standard")
    with pytest.raises(KernelError, match="targets: cpu, cuda"):
        kernel_id(spec(target="abacus"), "standard")


def test_an_id_names_the_machine_unless_the_kernel_has_no_compiled_files(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {pipeline: kernel_id(spec(), pipeline) for pipeline in PIPELINES}
    monkeypatch.setattr(toolchain, "fingerprint", lambda: "f" * 64)
    there = {pipeline: kernel_id(spec(), pipeline) for pipeline in PIPELINES}
    assert {pipeline for pipeline in PIPELINES if here[pipeline] == there[pipeline]} == {"fast"}
    assert {name.rsplit("-", 1)[0] for name in here.values()} == {name.rsplit("-", 1)[0] for name in there.values()}


@pytest.mark.slow
def test_a_process_that_may_use_less_of_the_processor_gives_another_id() -> None:
    code = "from esper.tezzeret.toolchain import *; print(fingerprint(), toolchain_hash())"
    command, less = [sys.executable, "-c", code], {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    said = subprocess.run(command, env=less, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert said[0] != fingerprint() and said[1] != toolchain_hash()


@pytest.mark.slow
def test_another_process_finds_the_same_fingerprint_and_toolchain() -> None:
    code = "from esper.tezzeret.toolchain import *; print(fingerprint(), toolchain_hash())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.split() == [fingerprint(), toolchain_hash()]


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelError, match="no-such-compiler"):
        toolchain.compiler.__wrapped__()


def test_an_alias_says_so() -> None:
    assert resolve("aggressive", "cuda") == "aggressive"
    assert flags("aggressive", "cpu")[1:] == flags("standard", "cpu")
