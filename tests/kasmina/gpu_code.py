"""The Triton kernels as code for a GPU that need not be there: `python -m tests.kasmina.gpu_code 90`.

Triton's interpreter runs a kernel as Python, so it accepts what the compiler would refuse.
"""

import sys
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from esper.kasmina import kernels_triton as kernels

_SIZES: Final = ("n", "span", "stride", "start", "count", "samples", "features", "chunks", "size")
_FLOATS: Final = ("dead", "band")


def compile_for(capability: int, kernel: Any, precision: str, **constants: int) -> None:
    """Compile one kernel for tensors of a precision; alphas are float32."""
    kinds = {name: "constexpr" for name in constants} | dict.fromkeys(_SIZES, "i32") | dict.fromkeys(_FLOATS, "fp32")
    kinds |= {f"a{i}": "*fp32" for i in range(4)}
    signature = {name: kinds.get(name, f"*{precision}") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def main() -> None:
    """Compile every kernel for every generation of GPUs that is named."""
    for capability in map(int, sys.argv[1:]):
        for precision in ("fp32", "bf16", "fp16"):
            for whole in (True, False):
                for kernel in (kernels._blend_kernel, kernels._scale_kernel):
                    compile_for(capability, kernel, precision, WHOLE=whole, BLOCK=kernels._BLOCK)
        for samples in (1, 32, 128):
            features = kernels._TILE // samples
            compile_for(capability, kernels._moments_kernel, "fp32", SAMPLES=samples, FEATURES=features)


if __name__ == "__main__":
    main()
