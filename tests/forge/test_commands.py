"""The terminal's commands around the forge's store."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from esper.cli import main
from esper.forge.client import Forge
from esper.forge.commands import store_of
from esper.karn.service import stated
from esper.leyline.errors import StoreError
from esper.oona.keys import CurveKeys, admitted
from esper.urza.signing import KeyRing
from esper.urza.store import Urza
from esper.workers import wire
from tests.kernels import built, parcel, shared_folder, spec
from tests.urza.test_field import FAULTED, report


def test_without_a_store_each_says_so(tmp_path: Path) -> None:
    for command in (["kernels", "--root"], ["curate", "--root"], ["doctor", "--store"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, str(tmp_path / "nothing")])
        assert ended.value.code not in (0, None)


def test_a_key_is_admitted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "forge", tmp_path / "lab2.key"
    assert main(["keys", "lab2", "--out", str(out), "--root", str(root)]) == 0
    told = capsys.readouterr().out
    assert str(out) in told and "--server_key" in told
    assert CurveKeys.load(out).public in admitted(root / "keys" / "admitted")


TORCHLESS = "import sys; from esper.cli import main; sys.exit(main(sys.argv[1:]) or 77 * ('torch' in sys.modules))"
"""Runs a command; the status is 77 if it has imported torch, which takes seconds that only jobs need."""


@pytest.fixture
def pool() -> Iterator[tuple[zmq.Socket[bytes], str, str]]:
    """A pool's socket, its address and its public key."""
    keys, context = CurveKeys.generate(), zmq.Context[Any]()
    router = context.socket(zmq.ROUTER)
    router.curve_server, router.curve_secretkey = True, keys.secret.encode()
    port = router.bind_to_random_port("tcp://127.0.0.1")
    yield router, f"tcp://127.0.0.1:{port}", keys.public
    context.destroy(linger=0)


@pytest.mark.parametrize("name", ["tezzeret", "urabrask"])
def test_a_worker_joins_without_torch(name: str, pool: tuple[zmq.Socket[bytes], str, str], tmp_path: Path) -> None:
    router, address, server = pool
    CurveKeys.generate().save(tmp_path / "key")
    joining = ["worker", name, "--connect", address, "--key", str(tmp_path / "key"), "--server_key", server]
    with subprocess.Popen([sys.executable, "-c", TORCHLESS, *joining]) as process:
        assert router.poll(60_000), "it did not join"
        identity, *frames = router.recv_multipart()
        assert wire.unpack(frames)[0] == wire.HELLO
        router.send_multipart([identity, *wire.pack(wire.STOP)])
        assert process.wait(60) == 0


def test_the_store_is_looked_at_without_torch(tmp_path: Path) -> None:
    places = Forge(enabled=False, root=str(tmp_path / "forge")).places
    Urza(places.store, KeyRing(places.keys)).close()
    for command in (["kernels", "--root"], ["doctor", "--store"], ["curate", "--root"]):
        assert subprocess.run([sys.executable, "-c", TORCHLESS, *command, str(places.root)]).returncode == 0


@pytest.mark.slow
def test_the_store_is_listed_checked_and_curated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from esper.blueprints import load_library

    places = Forge(enabled=False, root=str(tmp_path / "forge")).places
    with Urza(places.store, KeyRing(places.keys)) as urza:
        urza.submit(stated(load_library()["BP-MLP-GELU"].ir))
        kernel = urza.put(parcel(built(shared_folder(tmp_path_factory), spec())))
        library = urza.folder(kernel.id) / "fw.so"
        urza.report(report(1, kernel.id))
        urza.report(report(2, kernel.id, **FAULTED))
    root = str(places.root)
    assert main(["kernels", "--root", root, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["kernel"] == kernel.id and row["status"] == "PENDING_BENCHMARKING"
    assert row["grafts"] == {"grafted": 2, "fossilized": 1, "culled": 0, "faulted": 1}
    assert main(["kernels", "--root", root]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert "BP-MLP-GELU@1.0.0" in listed and "2: 1 stayed, 1 faulted" in listed
    assert main(["doctor", "--store", root]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    assert main(["curate", "--root", root]) == 0
    library.chmod(0o600)
    library.write_bytes(library.read_bytes()[:-1])
    assert main(["doctor", "--store", root]) == 1
    assert "1 wrong" in capsys.readouterr().out


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        store_of(str(tmp_path))
