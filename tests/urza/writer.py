"""A process that writes to a store until it is killed: `python -m tests.urza.writer ROOT NAME [MOMENT]`.

With MOMENT it kills itself right before (2, 4, 6, ...) or after (3, 5, 7, ...) the first, second, third call of
`os.fsync`, that is between any two steps that are durable.
"""

import itertools
import os
import random
import signal
import sys
from pathlib import Path

from esper.leyline.errors import StoreError
from esper.leyline.kernels import ArtifactStatus
from esper.urza import Urza
from tests.urza.samples import blueprint, compiled, opened, verdict


def turn(urza: Urza, kernel_id: str, chance: random.Random) -> None:
    """Take one kernel through a part of its life."""
    urza.put(compiled(kernel_id, files={"fw.so": chance.randbytes(40_000), "bw.so": chance.randbytes(40_000)}))
    passed = chance.random() < 0.8
    urza.judge(verdict(kernel_id, passed=passed), None if passed else "too slow")
    if passed and chance.random() < 0.3:
        urza.reject(kernel_id, "it faulted")
    if chance.random() < 0.3:
        urza.set_kernel(kernel_id, ArtifactStatus.COMPILING)
        urza.put(compiled(kernel_id, files={"fw.so": chance.randbytes(40_000)}))
    if chance.random() < 0.2:
        urza.curate(budget=400_000)


def die_at(moment: int) -> None:
    """Make one moment around the calls of `os.fsync` the last of this process."""
    moments, real = itertools.count(2), os.fsync

    def reached() -> None:
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync(handle: int) -> None:
        reached()
        real(handle)
        reached()

    os.fsync = fsync


def main(root: str, name: str, moment: int = 0) -> None:
    """Write until killed, or one fixed kernel with a death at a chosen moment."""
    with opened(Path(root)) as urza:
        print("ready", flush=True)
        if moment:
            die_at(moment)
            urza.submit(blueprint())
            urza.put(compiled(name))
            urza.judge(verdict(name))
            urza.curate(budget=0)
            return
        chance = random.Random(name)
        for number in itertools.count():
            try:
                turn(urza, f"{name}-{number}", chance)
            except StoreError as error:
                if "other writers" not in str(error) and "locked" not in str(error):
                    raise


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
