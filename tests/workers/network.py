"""A second machine for tests: a network namespace of its own at the other end of a cable."""

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Network:
    """Two network namespaces joined by a cable: 10.91.0.1 here, 10.91.0.2 there."""

    def __init__(self) -> None:
        self.name = f"esper{uuid.uuid4().hex[:6]}"
        self.near, self.far = f"n{self.name}"[:12], f"f{self.name}"[:12]
        self.there = ("ip", "netns", "exec", self.name)

    def run(self, *words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True)
        if done.returncode:
            raise OSError(done.stderr.decode().strip())

    def open(self) -> None:
        self.run("netns", "add", self.name)
        self.run("link", "add", self.near, "type", "veth", "peer", "name", self.far, "netns", self.name)
        self.run("addr", "add", "10.91.0.1/24", "dev", self.near)
        self.run("link", "set", self.near, "up")
        self.run("-n", self.name, "addr", "add", "10.91.0.2/24", "dev", self.far)
        self.run("-n", self.name, "link", "set", self.far, "up")

    def close(self) -> None:
        subprocess.run(["ip", "link", "del", self.near], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


@contextmanager
def two_networks() -> Iterator[Network]:
    """Skip the test where the system does not let us make a namespace."""
    made = Network()
    try:
        made.open()
    except OSError as error:
        made.close()
        pytest.skip(f"no second network namespace: {error}")
    try:
        yield made
    finally:
        made.close()
