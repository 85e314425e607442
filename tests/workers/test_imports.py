import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["pool", "worker", "in_process", "checks"])
def test_a_worker_starts_without_torch(module: str) -> None:
    code = f"import sys, esper.workers.{module}; sys.exit(bool({{'torch', 'lightning'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_keeper_needs_the_standard_library_only() -> None:
    code = "import sys, esper.workers.child; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-S", "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
