"""The forge as a process: `python -m esper.forge.process --root FOLDER` works until it is told to end."""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

import psutil
from filelock import FileLock, Timeout

from esper.files import replacing
from esper.forge.link import Places
from esper.forge.service import Workshop
from esper.leyline.errors import EsperError
from esper.workers.confine import be_nice

_NICE = 10
_log = logging.getLogger("esper.forge")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a forge; return the exit status: 0 when told to end, 1 when it cannot work, 2 when another one works here."""
    parser = argparse.ArgumentParser(prog="esper forge", description="Run the forge: bus, store and pools.")
    parser.add_argument("--root", default=".cache/forge", help="its folder (default: %(default)s)")
    parser.add_argument("--tezzeret", type=int, default=1, metavar="N", help="workers that compile (default: 1)")
    parser.add_argument(
        "--urabrask", type=int, default=1, metavar="N", help="workers that try kernels out (default: 1)"
    )
    parser.add_argument("--cpu_budget_s", type=float, default=None, metavar="S", help="seconds of compiling per day")
    parser.add_argument("--listen", default=None, metavar="HOST", help="let workers of other machines join, with keys")
    parser.add_argument("--parent", type=int, default=0, help="end when this process does")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    places = Places(given.root)
    places.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(places.lock, timeout=0):
            return _work(places, given)
    except Timeout:
        _log.info("another forge works in %s.", places.root)
        return 2
    except (EsperError, OSError) as error:
        _log.error("the forge cannot work: %s", error)
        return 1


def _work(places: Places, given: argparse.Namespace) -> int:
    stop = _stop_signals()
    # Whatever it does, the training process comes first.
    be_nice(_NICE)
    with Workshop(
        places,
        tezzeret=given.tezzeret,
        urabrask=given.urabrask,
        cpu_budget_s=given.cpu_budget_s,
        listen=given.listen,
    ) as workshop:
        try:
            _show_card(places, workshop)
            while not stop.is_set() and _parent_lives(given.parent):
                workshop.step()
        finally:
            places.card.unlink(missing_ok=True)
    return 0


def _stop_signals() -> threading.Event:
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, lambda *_: stop.set())
    return stop


def _parent_lives(parent: int) -> bool:
    # The parent's death hands its children to somebody else.
    return parent == 0 or os.getppid() == parent


def _show_card(places: Places, workshop: Workshop) -> None:
    """Write where the forge is, once it is; whoever reads the card checks that its process still lives."""
    pools = {name: pool.address for name, pool in workshop.pools.items()}
    card = {
        "address": workshop.broker.address,
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),
        "pools": pools,
    }
    with replacing(places.card) as file:
        file.write(json.dumps(card, indent=2).encode())
    _log.info("the forge works in %s.", places.root)
    for name, address in pools.items():
        if address:
            _log.info("workers of %s join at %s.", name, address)


if __name__ == "__main__":
    sys.exit(main())
