"""`esper watch`: follow a run here, let others follow it, or follow one elsewhere."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live as Screen

from esper.leyline.errors import BusError, ConfigError
from esper.nissa.watch.follow import Follower
from esper.nissa.watch.source import Folder, Source
from esper.nissa.watch.view import ROWS, picture
from esper.oona.keys import CurveKeys

ROOT = ".cache/watch"
"""Folder of the keys for watching from other machines."""

_LOOK_S = 0.5


def watch(args: Sequence[str]) -> int:
    """Follow a run, serve it, or follow one that is served, and return the exit status."""
    given = _parser().parse_args(args)
    if (given.run is None) == (given.connect is None):
        raise ConfigError("esper watch: give the folder of a run, or --connect HOST:PORT, and not both.")
    try:
        if given.serve is not None:
            return _serve(given.run, given.serve, given.root)
        source = _source(given)
        try:
            return _once(source) if given.once or not sys.stdout.isatty() else _follow(source)
        finally:
            source.close()
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="esper watch", description="Watch a run in the terminal.")
    parser.add_argument("run", nargs="?", help="folder that the run writes")
    parser.add_argument("--once", action="store_true", help="print one picture and end")
    parser.add_argument("--serve", metavar="HOST:PORT", help="let others watch this run; nothing is shown here")
    parser.add_argument("--connect", metavar="HOST:PORT", help="watch a run that is served there")
    parser.add_argument("--key", type=Path, metavar="FILE", help="our key pair, of `esper keys`, for another machine")
    parser.add_argument("--server_key", metavar="KEY", help="the server's public key, of `esper keys`")
    parser.add_argument("--root", default=ROOT, help="folder of the server's keys (default: %(default)s)")
    return parser


def _source(given: argparse.Namespace) -> Source:
    if given.connect is None:
        return Folder(given.run)
    from esper.nissa.watch.remote import Remote

    if (given.key is None) != (given.server_key is None):
        raise ConfigError("esper watch: --key and --server_key go together; `esper keys` tells both.")
    keys = CurveKeys.load(given.key).for_server(given.server_key) if given.key is not None else None
    return Remote(given.connect, keys)


# --- serve ----------------------------------------------------------------------------------------------------------


def _serve(run: str | None, place: str, root: str) -> int:
    from esper.nissa.watch.remote import Server, endpoint
    from esper.oona.gate import is_local

    if run is None:
        raise ConfigError("esper watch: --serve needs the folder of a run.")
    server = Server(run, place, None if is_local(endpoint(place)) else _keys(root, place))
    print(f"{run} can be watched at {server.address} until Ctrl-C", flush=True)
    server.run()
    return 0


def _keys(root: str, place: str) -> CurveKeys:
    """Return our pair for watchers of other machines."""
    from esper.forge.curve import curve_keys
    from esper.forge.link import Places
    from esper.oona.keys import admitted

    places = Places(root)
    folder = places.keys / "admitted"
    if not admitted(folder):
        raise ConfigError(
            f"{place} can be reached from other machines and no key is admitted: run `esper keys NAME --out FILE "
            f"--root {root}` for each watcher, or listen on 127.0.0.1."
        )
    return curve_keys(places).admitting(folder)


# --- show -----------------------------------------------------------------------------------------------------------


def _once(source: Source) -> int:
    """Print one picture, without control codes where there is no terminal."""
    sight = Follower(source).look()
    if sight.problem:
        raise BusError(sight.problem)
    if hasattr(sys.stdout, "reconfigure"):
        # A pipe may be told to be ASCII.
        sys.stdout.reconfigure(errors="replace")
    console = Console(force_terminal=sys.stdout.isatty())
    console.print(picture(sight, console.width, ROWS))
    return 0


def _follow(source: Source) -> int:
    """Show the run until it is over; what was shown last stays."""
    follower, console = Follower(source), Console()
    with Screen(console=console, auto_refresh=False, vertical_overflow="crop") as screen:
        while True:
            sight = follower.look()
            screen.update(picture(sight, console.width, console.height), refresh=True)
            if sight.over:
                return 0
            time.sleep(_LOOK_S)
