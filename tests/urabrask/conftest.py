from pathlib import Path

import pytest

from tests.kernels import shared_folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all tests of a run share, in whatever process they are."""
    return shared_folder(tmp_path_factory)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make few calls where a thousand are usual; the thousand have tests of their own."""
    monkeypatch.setattr("esper.urabrask.endurance.CALLS", 30)
    monkeypatch.setattr("esper.urabrask.endurance._WINDOW", 10)
