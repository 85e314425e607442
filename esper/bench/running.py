"""What every bench does while it runs: it has its folder to itself, and ends in order when it is stopped."""

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from esper.leyline.errors import OutputError


def positive(text: str) -> int:
    """Return a count above 0 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second bench out of the same folder.

    Raises:
        OutputError: one is there, or the folder cannot be written.
    """
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OutputError(f"another bench writes to {folder}; wait for it, or give another --out.") from None
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}; give another --out.") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def ends_in_order() -> Iterator[None]:
    """Let a polite kill end the rows too."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
