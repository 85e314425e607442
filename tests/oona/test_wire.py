"""What wakes a poll."""

import os
import select

from esper.oona.wire import Wake


def readable(handle: int) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))


def test_it_is_readable_from_set_to_clear() -> None:
    wake = Wake()
    wake.clear()
    assert not readable(wake.handle)
    wake.set()
    assert readable(wake.handle)
    wake.clear()
    assert not readable(wake.handle)
    wake.close()


def test_after_the_end_it_writes_to_nobody() -> None:
    wake = Wake()
    wake.close()
    pipes = [os.pipe() for _ in range(4)]  # One of them has the closed one's numbers now.
    wake.set()
    wake.close()
    assert not any(readable(read) for read, _ in pipes)
    for pipe in pipes:
        for end in pipe:
            os.close(end)
