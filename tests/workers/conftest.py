import time
import uuid
from collections.abc import Iterator

import psutil
import pytest

MARK = "ESPER_TEST_MARK"


def marked(value: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == value:
                found.append(process)
        except psutil.Error:
            continue
    return found


def zombies() -> set[int]:
    """Children of this process that ended and that nobody has heard out."""
    return {child.pid for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE}


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Mark every process that the test starts; none may be left when it ends."""
    value, before = uuid.uuid4().hex, zombies()
    monkeypatch.setenv(MARK, value)
    yield value
    until = time.monotonic() + 10.0
    while (left := marked(value)) and time.monotonic() < until:
        time.sleep(0.1)
    described = [(process.pid, process.cmdline()[:6]) for process in left]
    for process in left:
        process.kill()
    assert not described
    assert not zombies() - before
