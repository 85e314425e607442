"""The binary interface of this process, by name."""

from pathlib import Path

import pytest
import torch

from esper.kasmina import fingerprint as module
from esper.kasmina.fingerprint import fingerprint


def test_a_changed_processor_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    monkeypatch.setattr(module, "_cpu_features", lambda: ["sse2"])
    assert fingerprint.__wrapped__() != before


def test_the_openmp_of_another_package_does_not_matter() -> None:
    import sklearn.cluster  # noqa: F401

    own = {path.name for path in (Path(torch.__file__).parent / "lib").iterdir()}
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert "scikit_learn.libs" in mapped, "this test needs a second OpenMP in the process"
    assert {name for name in module._libraries() if "omp" in name} <= own
