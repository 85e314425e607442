"""Start the ranks of a job as real processes, as a cluster's launcher would, and collect what they found."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Job:
    """The processes of one job; each writes `rank<r>.pt` and its words to `rank<r>.log`."""

    def __init__(self, script: str, folder: Path, ranks: int, *arguments: str) -> None:
        self.folder, self.ranks = folder, ranks
        folder.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self.processes = [self._start(script, rank, port, arguments) for rank in range(ranks)]

    def _start(self, script: str, rank: int, port: str, arguments: tuple[str, ...]) -> "subprocess.Popen[bytes]":
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        place |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks), "OMP_NUM_THREADS": "1"}
        # Gloo would look up the host's name, which need not lead anywhere on a test machine.
        place |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(rank)}
        with (self.folder / f"rank{rank}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "distributed" / script), str(self.folder), *arguments],
                env=os.environ | place,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )

    def wait(self, timeout_s: float = 240.0) -> list[int]:
        """Return the exit codes; kills what is left after the time."""
        end = time.monotonic() + timeout_s
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a rank hangs:\n{self.said()}") from None
        finally:
            self.kill()

    def wait_for(self, name: str, timeout_s: float = 300.0) -> None:
        """Wait until every rank has made a file `<name><rank>` and is still alive."""
        end = time.monotonic() + timeout_s
        while not all((self.folder / f"{name}{rank}").exists() for rank in range(self.ranks)):
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes), self.said()
            time.sleep(0.1)

    def lose(self, rank: int, sent: signal.Signals, within_s: float = 45.0) -> None:
        """Kill or stop a rank; all others must end with an error in time."""
        try:
            self.wait_for("alive")
            self.processes[rank].send_signal(sent)
            end = time.monotonic() + within_s
            for other in (r for r in range(self.ranks) if r != rank):
                assert self.processes[other].wait(max(0.1, end - time.monotonic())) != 0
                assert "DistributedError" in self.said(other) or "RuntimeError" in self.said(other)
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def said(self, rank: int | None = None) -> str:
        ranks = range(self.ranks) if rank is None else [rank]
        return "\n".join((self.folder / f"rank{r}.log").read_text(errors="replace")[-6000:] for r in ranks)

    def results(self) -> list[dict[str, Any]]:
        """Return what the ranks wrote, after all have ended well."""
        codes = self.wait()
        assert codes == [0] * self.ranks, f"exit codes {codes}\n{self.said()}"
        return self.found()

    def found(self) -> list[dict[str, Any]]:
        return [torch.load(self.folder / f"rank{r}.pt", weights_only=True) for r in range(self.ranks)]
