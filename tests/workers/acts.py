"""What the tests' jobs do in the sandbox: one function per behaviour. Only the standard library, to start at once."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def echo(order: dict[str, Any]) -> bytes:
    return str(order.get("say", "")).encode()


def sleep(order: dict[str, Any]) -> bytes:
    time.sleep(order["seconds"])
    return b"slept"


def allocate(order: dict[str, Any]) -> bytes:
    held = bytearray(order["mb"] * 2**20)
    return str(len(held)).encode()


def spin(order: dict[str, Any]) -> bytes:
    until = time.process_time() + order.get("seconds", 1e9)
    while time.process_time() < until:
        pass
    return b"spun"


def fork_bomb(order: dict[str, Any]) -> bytes:
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.01)


def escape(order: dict[str, Any]) -> bytes:
    """Leave a grandchild behind in a session of its own."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    if order.get("wait"):
        time.sleep(1000)
    return b"escaped"


def segfault(order: dict[str, Any]) -> bytes:
    import ctypes

    ctypes.string_at(0)
    raise AssertionError("still here")


def huge_file(order: dict[str, Any]) -> bytes:
    with Path("huge").open("wb") as file:
        for _ in range(order["mb"]):
            file.write(bytes(2**20))
    return b"written"


def many_files(order: dict[str, Any]) -> bytes:
    for number in range(order["count"]):
        Path(f"part{number}").write_bytes(bytes(2**20))
        time.sleep(0.02)
    return b"written"


def write_outside(order: dict[str, Any]) -> bytes:
    Path(order["path"]).write_text("outside")
    return b"written"


def read(order: dict[str, Any]) -> bytes:
    return Path(order["path"]).read_bytes()


def connect(order: dict[str, Any]) -> bytes:
    import socket

    socket.create_connection(("127.0.0.1", order["port"]), timeout=2.0).close()
    return b"connected"


def exit_with(order: dict[str, Any]) -> bytes:
    sys.stderr.write(order.get("say", ""))
    sys.exit(order["status"])


def kill_keeper(order: dict[str, Any]) -> bytes:
    """Try to kill all that may be killed, the parents first."""
    import signal

    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
    return b""


def environ(order: dict[str, Any]) -> bytes:
    return json.dumps(dict(os.environ)).encode()


ACTS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    act.__name__: act
    for act in (
        echo, sleep, allocate, spin, fork_bomb, escape, segfault, huge_file, many_files, write_outside, read,
        connect, exit_with, kill_keeper, environ,
    )
}  # fmt: skip


def work(folder: Path) -> None:
    """Do the order in the folder, in whichever process this is."""
    order = json.loads((folder / "order.json").read_text())
    (folder / "result").write_bytes(ACTS[order["do"]](order))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
