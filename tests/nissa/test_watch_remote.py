"""Watching over TCP, with real sockets: read-only, encrypted where others can listen, and alive after its server."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import zmq

from esper.leyline.errors import BusError, ConfigError, ContractError
from esper.leyline.events import DecisionMade
from esper.nissa.folder import read_chronicle
from esper.nissa.watch.follow import Follower, Sight
from esper.nissa.watch.remote import Remote, Server, endpoint
from esper.nissa.watch.source import EVENTS, PIECE
from esper.oona.keys import CurveKeys, admit
from esper.oona.wire import pack, unpack
from tests.nissa.pages import run_folder
from tests.nissa.stories import story

# What is started in the background is deaf to SIGINT, and so are its children: a person's terminal is not.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from esper.cli import main
sys.exit(main())
"""

PATIENT_S = 60
"""For answers that are sure to come, on a machine that has other things to do."""


@contextmanager
def serving(server: Server) -> Iterator[str]:
    stop = threading.Event()
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    try:
        yield server.address
    finally:
        stop.set()
        thread.join(PATIENT_S)
        assert not thread.is_alive()


def ask(address: str, *question: bytes) -> bytes:
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.connect(address)
        socket.send_multipart(question)
        assert socket.poll(1000 * PATIENT_S), "an answer"
        return b"".join(socket.recv_multipart())


def test_a_served_run_is_told_as_its_folder_tells_it(tmp_path: Path) -> None:
    chronicle = story(lives=4)
    said = DecisionMade(run_id="r", epoch=0, step=100, policy="heuristic", explanation="because " * 50_000)
    for _ in range(8):
        chronicle.hear(said)
    run_folder(tmp_path, chronicle)
    assert (tmp_path / EVENTS).stat().st_size > 3 * PIECE
    with serving(Server(tmp_path, "127.0.0.1:*")) as address, closing(Remote(address, timeout_s=PATIENT_S)) as remote:
        sight = Follower(remote).look()
        assert sight.problem == "" and sight.over and sight.damaged == 0
        assert sight.chronicle == read_chronicle(tmp_path)


@pytest.mark.parametrize(
    "question",
    [
        (b"",),
        (b"garbage",),
        (b"\x00" * 4000,),
        (pack(verb="write", file=EVENTS, offset=0, size=1, data=b"x"),),
        (pack(verb="read", file="/etc/hostname", offset=0, size=10),),
        (pack(verb="read", file="../secret", offset=0, size=10),),
        (pack(verb="read", file=EVENTS, offset=-1, size=10),),
        (pack(verb="read", file=EVENTS, offset=0, size=2**40),),
        (pack(verb="read", file=EVENTS, offset="0", size=1),),
        (b"a", b"b"),
    ],
)
def test_nothing_else_is_answered(tmp_path: Path, question: tuple[bytes, ...]) -> None:
    run = run_folder(tmp_path / "run", story(lives=1))
    (tmp_path / "secret").write_text("secret")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with serving(Server(run, "127.0.0.1:*")) as address:
        assert unpack(ask(address, *question), refused=str)
        with closing(Remote(address, timeout_s=PATIENT_S)) as remote:
            assert Follower(remote).look().over, "it goes on"
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_refusal_is_told(tmp_path: Path) -> None:
    run_folder(tmp_path, story(lives=1))
    with serving(Server(tmp_path, "127.0.0.1:*")) as address:
        remote = Remote(address, timeout_s=PATIENT_S)
        with closing(remote), pytest.raises(BusError, match="does not answer as a served run does"):
            remote.read("secret", 0, 1)


@contextmanager
def served(folder: Path, place: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", PROGRAM]
    arguments = ["watch", str(folder), "--serve", place]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert "can be watched at" in said, said
            yield process, said.split(" at ")[1].split()[0]
        finally:
            process.kill()


def until(follower: Follower, wanted: bool, within_s: float = PATIENT_S) -> Sight:
    deadline = time.monotonic() + within_s
    while bool((sight := follower.look()).problem) is not wanted:
        assert time.monotonic() < deadline, sight.problem
        time.sleep(0.05)
    return sight


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    run_folder(tmp_path, story(lives=1, steps=50))
    with ExitStack() as stack:
        with served(tmp_path, "127.0.0.1:*") as (process, address):
            follower = Follower(stack.enter_context(closing(Remote(address, timeout_s=1.0))))
            assert until(follower, wanted=False).step == 50
            os.kill(process.pid, signal.SIGKILL)
        lost = until(follower, wanted=True)
        assert "gives no answer; trying again" in lost.problem and lost.step == 50
        run_folder(tmp_path, story(lives=2, steps=100))
        with served(tmp_path, address) as (process, again):
            assert again == address
            found = until(follower, wanted=False)
            assert found.step == 100 and found.chronicle == read_chronicle(tmp_path)
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENT_S) == 0


def test_a_stranger_at_the_address(tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.REP) as stranger:
        stranger.linger, stranger.rcvtimeo = 0, 1000 * PATIENT_S
        port = stranger.bind_to_random_port("tcp://127.0.0.1")
        remote = Remote(f"127.0.0.1:{port}", timeout_s=PATIENT_S)
        for answer in (b"hello", pack(clock="now", files={}), pack(clock=1.0, files={EVENTS: [1]})):
            seen: list[Sight] = []
            thread = threading.Thread(target=lambda seen=seen: seen.append(Follower(remote).look()))
            thread.start()
            stranger.recv()
            stranger.send(answer)
            thread.join(PATIENT_S)
            assert "does not answer as a served run does" in seen[0].problem
        remote.close()


def test_only_admitted_keys_can_watch(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", story(lives=1))
    ours, known, unknown = (CurveKeys.generate() for _ in range(3))
    admit(tmp_path / "admitted", "lab", known.public)
    with serving(Server(run, "127.0.0.1:*", ours.admitting(tmp_path / "admitted"))) as address:
        for keys, right in ((known, ours.public), (unknown, ours.public), (known, unknown.public)):
            good = keys is known and right == ours.public
            with closing(Remote(address, keys.for_server(right), timeout_s=PATIENT_S if good else 1.0)) as remote:
                sight = Follower(remote).look()
            assert (sight.problem == "") == good
            assert ("with our key admitted" in sight.problem) is not good
        with closing(Remote(address, timeout_s=1.0)) as plain:
            assert "gives no answer" in Follower(plain).look().problem


def test_addresses_that_will_not_do(tmp_path: Path) -> None:
    for place in ("0.0.0.0:7070", "tcp://192.168.1.2:7070", "*:7070"):
        with pytest.raises(ConfigError, match="can be reached from other machines"):
            Server(tmp_path, place)
    with pytest.raises(ConfigError, match="another machine: give --key and --server_key"):
        Remote("lab.example.org:7070")
    for place in ("7070", "localhost", "localhost:http", "localhost:70700", "ipc:///tmp/x"):
        with pytest.raises(ConfigError, match="write HOST:PORT"):
            endpoint(place)
    taken = Server(tmp_path, "127.0.0.1:*")
    with pytest.raises(BusError, match="cannot be listened on"):
        Server(tmp_path, taken.address)
    taken.close()
    with pytest.raises(ConfigError, match="is no folder"):
        Server(tmp_path / "missing", "127.0.0.1:*")


def test_a_folder_does_not_serve_what_it_may_not(tmp_path: Path) -> None:
    server = Server(tmp_path, "127.0.0.1:*")
    with pytest.raises(ContractError):
        server._answer(pack(verb="read", file="secret", offset=0, size=1))
    server.close()
    server.close()
