"""The three ways to make a kernel, and the options that each gives to the compiler."""

from collections.abc import Mapping
from typing import Any, Final

from esper.leyline.artifacts import Pipeline
from esper.leyline.errors import KernelError

_COMPILED: Final[Mapping[str, Any]] = {
    # Otherwise the number of threads of the compiling process would be built into the kernel.
    "cpp.dynamic_threads": True,
    "aot_inductor.compile_wrapper_opt_level": "O1",
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.package": False,
    "always_keep_tensor_constants": False,
    "compile_threads": 1,
    # Layouts that depend on the batch would tie a kernel to some batch sizes.
    "layout_optimization": False,
}

OPTIONS: Final[Mapping[Pipeline, Mapping[str, Any]]] = {
    "fast": {},
    "standard": _COMPILED,
    "aggressive": {
        **_COMPILED,
        "max_autotune": True,
        "coordinate_descent_tuning": True,
        "aot_inductor.embed_kernel_binary": True,
    },
}
"""Options of torch's compiler by pipeline. `fast` compiles nothing."""

TARGETS: Final = ("cpu", "cuda")
"""Devices that kernels can be compiled for."""


def resolve(pipeline: Pipeline, target: str) -> Pipeline:
    """Return the pipeline that really runs: on a CPU, autotuning was measured to change nothing but the cost.

    Raises:
        KernelError: the target is unknown.

    Example:
        >>> resolve("aggressive", "cpu"), resolve("aggressive", "cuda")
        ('standard', 'aggressive')
    """
    if target not in TARGETS:
        raise KernelError(f"no kernels for target {target!r}; targets: {', '.join(TARGETS)}.")
    return "standard" if pipeline == "aggressive" and target == "cpu" else pipeline


def flags(asked: Pipeline, target: str) -> tuple[str, ...]:
    """Return the options as `name=value`, and a remark where another pipeline than the one asked for runs.

    Example:
        >>> flags("aggressive", "cpu")[0]
        'aggressive=standard: autotuning changes nothing on a CPU'
    """
    runs = resolve(asked, target)
    remark = () if runs == asked else (f"{asked}={runs}: autotuning changes nothing on a CPU",)
    return (*remark, *(f"{name}={value}" for name, value in sorted(OPTIONS[runs].items())))
