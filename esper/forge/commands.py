"""Commands of the terminal around the forge: run one, join one, look into its store. Only running one needs torch."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from esper.forge.curve import curve_keys
from esper.forge.link import Places
from esper.leyline.errors import StoreError
from esper.leyline.kernels import CompiledKernelArtifact
from esper.oona.keys import CurveKeys, admit
from esper.urza.signing import KeyRing
from esper.urza.store import Urza

ROOT: Final = ".cache/forge"
"""Folder of the forge, unless said otherwise."""

_LOOK_S: Final = 0.5


def forge(args: Sequence[str]) -> int:
    """Run a forge until it is told to end; runs that begin meanwhile use it."""
    from esper.forge.process import main

    return main(args)


def worker(args: Sequence[str]) -> int:
    """Join the pool of a forge on another machine."""
    parser = argparse.ArgumentParser(prog="esper worker", description="Join a pool of a forge on another machine.")
    parser.add_argument("pool", choices=("tezzeret", "urabrask"), help="what to do: compile, or try kernels out")
    parser.add_argument("--connect", required=True, metavar="ADDRESS", help="as `esper forge --listen` has told it")
    parser.add_argument("--key", required=True, type=Path, metavar="FILE", help="our key pair, of `esper keys`")
    parser.add_argument("--server_key", required=True, metavar="KEY", help="the forge's public key, of `esper keys`")
    given = parser.parse_args(args)
    from esper.workers.worker import main

    module = f"esper.{given.pool}.job"
    return main(
        ["--connect", given.connect, "--module", module, "--key", str(given.key), "--server-key", given.server_key]
    )


def keys(args: Sequence[str]) -> int:
    """Make a key pair for a worker of another machine, admit its public key, and print what that machine needs."""
    parser = argparse.ArgumentParser(prog="esper keys", description="Admit a worker of another machine to the forge.")
    parser.add_argument("name", help="what to call the worker")
    parser.add_argument("--out", required=True, type=Path, help="file for the key pair; carry it to the other machine")
    parser.add_argument("--root", default=ROOT, help="folder of the forge (default: %(default)s)")
    given = parser.parse_args(args)
    places, pair = Places(given.root), CurveKeys.generate()
    pair.save(given.out)
    admit(places.keys / "admitted", given.name, pair.public)
    print(f"--key {given.out} --server_key '{curve_keys(places).public}'")
    return 0


def kernels(args: Sequence[str]) -> int:
    """Print the kernels of the store and how far they are."""
    parser = argparse.ArgumentParser(prog="esper kernels", description="List compiled kernels and their status.")
    parser.add_argument("--root", default=ROOT, help="folder of the forge (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--watch", action="store_true", help="go on until interrupted, and show what changes")
    given = parser.parse_args(args)
    with store_of(given.root) as urza:
        if given.json:
            print(json.dumps([_row(urza, kernel) for kernel in urza.kernels()], indent=2))
        elif given.watch:
            _watch(urza)
        else:
            _console().print(_table(urza))
    return 0


def curate(args: Sequence[str]) -> int:
    """Archive what is not used, clear away what was left over, check everything; 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="esper curate", description="Nightly upkeep of the store.")
    parser.add_argument("--root", default=ROOT, help="folder of the forge (default: %(default)s)")
    parser.add_argument("--budget_mb", type=float, default=2048.0, help="space that kernels may take, in MiB")
    given = parser.parse_args(args)
    with store_of(given.root, private=True) as urza:
        done = urza.curate(int(given.budget_mb * 2**20))
    print(done)
    return int(bool(done.findings))


def check(args: Sequence[str]) -> int:
    """Verify every signature, hash and ledger line of the store; nothing is repaired; 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="esper doctor --store", description="Verify the store of kernels.")
    parser.add_argument("--store", nargs="?", const=ROOT, default=ROOT, metavar="ROOT", help="folder of the forge")
    with store_of(parser.parse_args(args).store) as urza:
        found = urza.check()
        counts = f"{len(urza.kernels())} kernels, {len(urza.blueprints())} blueprints"
    for finding in found:
        print(finding)
    print(f"{counts}: {len(found) or 'nothing'} wrong.")
    return int(bool(found))


def store_of(root: str, *, private: bool = False) -> Urza:
    """Return the store of a forge.

    Args:
        root: folder of the forge.
        private: whether its private keys are needed.

    Raises:
        StoreError: no forge has ever worked there.
    """
    places = Places(root)
    if not places.store.is_dir():
        raise StoreError(f"{places.root} holds no store; a run or `esper forge --root {root}` makes one.")
    return Urza(places.store, KeyRing(places.keys) if private else KeyRing.public_only(places.keys))


def _watch(urza: Urza) -> None:
    try:
        with Live(_table(urza), console=_console(), refresh_per_second=2) as live:
            while True:
                time.sleep(_LOOK_S)
                live.update(_table(urza))
    except KeyboardInterrupt:
        return


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _row(urza: Urza, kernel: CompiledKernelArtifact) -> dict[str, Any]:
    record, report = kernel.compilation_record, kernel.validation_report
    return {
        "kernel": kernel.id,
        "blueprint": f"{kernel.name}@{kernel.version}",
        "pipeline": kernel.compilation_pipeline,
        "status": kernel.status.value,
        "compile_cpu_s": round(record.cpu_seconds, 1) if record else None,
        "step_to_eager": report.baseline_comparison.get("step") if report else None,
        "risk": report.risk_score if report else None,
        "tags": list(report.generated_tags) if report else [],
        "grafts": urza.outcomes(kernel.id).model_dump(exclude={"schema_version"}),
        "reason": urza.reason(kernel.id),
    }


def _table(urza: Urza) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for title in ("kernel", "blueprint", "tier", "status", "compiled in", "step / eager", "risk"):
        table.add_column(title, no_wrap=True)
    for title in ("grafted", "tags, or why not"):
        table.add_column(title)
    for kernel in urza.kernels():
        row = _row(urza, kernel)
        ratio, spent = row["step_to_eager"], row["compile_cpu_s"]
        table.add_row(
            row["kernel"][:40],
            row["blueprint"],
            row["pipeline"],
            row["status"],
            f"{spent:.0f} CPU-s" if spent is not None else "",
            f"{ratio:.2f}" if ratio is not None else "",
            f"{row['risk']:.2f}" if row["risk"] is not None else "",
            str(urza.outcomes(kernel.id)),
            row["reason"] or " ".join(row["tags"]),
        )
    return table
