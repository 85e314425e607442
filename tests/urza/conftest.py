from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.urza import KeyRing, Urza


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys")


@pytest.fixture
def urza(tmp_path: Path, keys: KeyRing) -> Iterator[Urza]:
    with Urza(tmp_path / "store", keys) as store:
        yield store
