"""From a graph to a stripped shared library."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from esper.leyline.errors import KernelError
from esper.tezzeret.trace import any_batch

_PATIENCE_S: Final = 30.0


def compile_graph(graph: GraphModule, mode: FakeTensorMode, folder: Path, options: Mapping[str, Any]) -> Path:
    """Compile a graph into a shared library and return its path.

    Args:
        graph: its placeholders carry fake tensors.
        mode: the world of these fake tensors.
        folder: where the compiler may write what it likes.
        options: options of torch's compiler.

    Raises:
        KernelError: the compiler failed; the message holds its own words.
    """
    # Importing it takes a second and warns of torch's own old parts: only for a real compilation.
    from torch._inductor.compile_fx import compile_fx_aot

    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    place = {"aot_inductor.output_path": str(folder / "kernel.so")}
    try:
        with config.patch({**options, **place}), any_batch(), mode:
            library = Path(str(compile_fx_aot(graph, inputs)))
    except Exception as error:
        raise KernelError(f"torch cannot compile it: {type(error).__name__}: {str(error)[-2000:]}") from error
    _strip(library)
    return library


def _strip(library: Path) -> None:
    """Drop the symbols that only a debugger reads: a fifth of the size is left to hash and to load."""
    tool = shutil.which("strip")
    if tool is None:
        raise KernelError("no 'strip' on the path; install binutils.")
    flags = ["-x"] if library.suffix == ".dylib" else ["--strip-unneeded"]
    try:
        subprocess.run([tool, *flags, str(library)], check=True, capture_output=True, timeout=_PATIENCE_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"the library's symbols cannot be stripped: {error}") from error
