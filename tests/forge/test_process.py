"""The forge as a process: started by a run, shared with others, gone with its run, whatever ends that."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from esper.forge.client import SWITCH, Forge
from esper.kasmina.kernels import KernelRequest
from esper.leyline.errors import BusError, ConfigError
from esper.oona.contracts import Bus
from esper.urza import KeyRing, Urza
from tests.kernels import SITE
from tests.urza.test_field import report

REQUEST = KernelRequest("BP-MLP-GELU", SITE)
OWNER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that is started in the background ignores it
from esper.forge.client import Forge
with Forge(enabled=True, root=sys.argv[1], tezzeret=1, urabrask=0) as forge:
    store = forge.store("run")
    print("ready", flush=True)
    time.sleep(120)
"""


def until(ready: Callable[[], Any], limit_s: float = 90.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := ready()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)
    return found


def family(root: Path) -> list[psutil.Process]:
    """Every process that has the folder on its command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(root) in " ".join(process.info["cmdline"] or []) and process.pid != os.getpid():
            found.append(process)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "forge"
    yield folder
    until(lambda: not family(folder), 30.0)


def connected(forge: Forge) -> Bus:
    def attempt() -> Bus | None:
        try:
            return forge.connect()
        except BusError:
            return None

    made: Bus = until(attempt)
    return made


def test_the_switch_and_bad_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert Forge().store("run") is None
    monkeypatch.delenv(SWITCH)
    assert Forge().enabled
    with pytest.raises(ConfigError, match="known, any"):
        Forge(adopt="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 or more"):
        Forge(tezzeret=-1)


def test_one_that_ends_at_once_is_not_started_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[subprocess.Popen[bytes]] = []

    def spawn(self: Forge) -> subprocess.Popen[bytes]:
        starts.append(subprocess.Popen(["false"]))
        return starts[-1]

    monkeypatch.setattr(Forge, "_spawn", spawn)
    with Forge(enabled=True, root=str(tmp_path)) as forge:
        for _ in range(5):
            with pytest.raises(BusError, match="starting"):
                forge.connect()
            starts[0].wait(10.0)
        assert len(starts) == 1
        forge._next_start = 0.0
        with pytest.raises(BusError, match="starting"):
            forge.connect()
        assert len(starts) == 2


@pytest.mark.slow
def test_it_is_shared_and_ends_with_the_one_who_started_it(root: Path) -> None:
    with Forge(enabled=True, root=str(root), tezzeret=1, urabrask=0) as first, connected(first):
        with Forge(enabled=True, root=str(root)) as second, connected(second):
            card = second.running()
        assert first.running() == card, "a guest must not end it"
    assert first.running() is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_is_left_when_the_run_is_killed(root: Path, number: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(root)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert owner.stdout is not None
    with owner.stdout as told:
        assert told.readline() == b"ready\n"
    watcher = Forge(enabled=True, root=str(root))
    until(watcher.running)
    owner.send_signal(number)
    owner.wait(60.0)
    until(lambda: not family(root), 60.0)


@pytest.mark.slow
def test_a_forge_that_is_killed_costs_the_run_nothing_and_is_started_again(root: Path) -> None:
    with Forge(enabled=True, root=str(root), tezzeret=1, urabrask=0) as forge:
        store = forge.store("run")
        assert store is not None
        card = until(forge.running)
        psutil.Process(card["pid"]).kill()
        began = time.monotonic()
        store.report(told := report(counterfactual=None))
        assert until(lambda: store.poll(REQUEST)).kernel_id.count("-eager-") == 1
        assert time.monotonic() - began < 5.0
        assert until(lambda: (now := forge.running()) and now["pid"] != card["pid"])
        with Urza(forge.places.store, KeyRing.public_only(forge.places.keys)) as urza:
            assert [kept.report for kept in until(urza.reports)] == [told], "what was said to no one is said again"
    assert forge.running() is None


@pytest.mark.slow
def test_two_that_start_at_once_agree_on_one(root: Path) -> None:
    with Forge(enabled=True, root=str(root), tezzeret=0) as one, Forge(enabled=True, root=str(root)) as two:
        for forge in (one, two):
            with pytest.raises(BusError, match="starting"):
                forge.connect()
        with connected(one), connected(two):
            assert one.running() == two.running()
