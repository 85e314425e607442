"""Commands of the terminal around the forge: run one, join one, look into its store, hand a blueprint in."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from esper.blueprints import load_library
from esper.blueprints.library import read_blueprint
from esper.forge.client import Forge
from esper.forge.link import Places
from esper.forge.service import curve_keys
from esper.karn.service import REFUSED, SUBMITTED, stated
from esper.karn.source import BlueprintSource
from esper.leyline.artifacts import BlueprintAnswer, BlueprintRequest
from esper.leyline.errors import BusError, StoreError
from esper.leyline.ids import new_id
from esper.leyline.kernels import ArtifactStatus, CompiledKernelArtifact
from esper.oona.contracts import Bus
from esper.oona.keys import CurveKeys, admit
from esper.urza.signing import KeyRing
from esper.urza.store import Urza

ROOT: Final = ".cache/forge"
_LOOK_S: Final = 0.5
_START_S: Final = 120.0
_ENDED: Final = frozenset({ArtifactStatus.VALIDATED, ArtifactStatus.INVALID, ArtifactStatus.REJECTED})


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
    with _store(given.root) as urza:
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
    with _store(given.root, private=True) as urza:
        done = urza.curate(int(given.budget_mb * 2**20))
    print(done)
    return int(bool(done.findings))


def check(args: Sequence[str]) -> int:
    """Verify every signature, hash and ledger line of the store; nothing is repaired; 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="esper doctor --store", description="Verify the store of kernels.")
    parser.add_argument("--store", nargs="?", const=ROOT, default=ROOT, metavar="ROOT", help="folder of the forge")
    with _store(parser.parse_args(args).store) as urza:
        found = urza.check()
        counts = f"{len(urza.kernels())} kernels, {len(urza.blueprints())} blueprints"
    for finding in found:
        print(finding)
    print(f"{counts}: {len(found) or 'nothing'} wrong.")
    return int(bool(found))


def submit(args: Sequence[str]) -> int:
    """Hand a blueprint in, and wait for the verdict; 0 if it is VALIDATED."""
    parser = argparse.ArgumentParser(prog="esper blueprints submit", description="Hand a blueprint to the forge.")
    parser.add_argument("file", type=Path, help="YAML file with `ir` and `manifest`")
    parser.add_argument("--root", default=ROOT, help="folder of the forge (default: %(default)s)")
    parser.add_argument("--timeout_s", type=float, default=600.0, help="longest wait, in seconds (default: 600)")
    given = parser.parse_args(args)
    blueprint = stated(read_blueprint(given.file).ir)
    with Forge(enabled=True, root=given.root) as local, _connected(local) as bus:
        trace_id, deadline = new_id(), time.monotonic() + given.timeout_s
        with bus.subscribe(REFUSED) as refusals:
            bus.publish(blueprint, SUBMITTED, trace_id=trace_id)
            print(f"{blueprint.name}@{blueprint.version} {blueprint.id[:16]} is submitted.", flush=True)
            return _follow(given.root, blueprint.id, refusals, trace_id, deadline)


def ask(args: Sequence[str]) -> int:
    """Print which blueprints would serve a site."""
    parser = argparse.ArgumentParser(prog="esper blueprints ask", description="Ask Karn which blueprints would serve.")
    parser.add_argument("--layout", choices=("btd", "bd", "bchw"))
    parser.add_argument("--kind", default="", help="family of the site's module, e.g. mlp")
    parser.add_argument("--width", type=int, help="features of the site")
    parser.add_argument("--max_params", type=int, help="budget of parameters")
    parser.add_argument("--tier", choices=("fast", "standard", "aggressive"), default="aggressive")
    parser.add_argument("--root", default=ROOT, help="folder of the forge (default: %(default)s)")
    given = parser.parse_args(args)
    request = BlueprintRequest(
        layout=given.layout,
        kind=given.kind,
        d_in=given.width,
        d_out=given.width,
        max_params=given.max_params,
        tier=given.tier,
    )
    with Forge(enabled=True, root=given.root) as local, _connected(local) as bus:
        answer = BlueprintSource(bus, load_library(), timeout_s=10.0).ask(request)
    print("\n".join(answer.names))
    print(answer.why, file=sys.stderr)
    return 0


def _connected(local: Forge) -> Bus:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            return local.connect()
        except BusError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_S)


def _follow(root: str, blueprint_id: str, refusals: Any, trace_id: str, deadline: float) -> int:
    """Print every status that a blueprint comes to; return 0 when that is VALIDATED."""
    with _store(root) as urza:
        shown: ArtifactStatus | None = None
        while time.monotonic() < deadline:
            refusal = refusals.receive(_LOOK_S)
            if refusal is not None and refusal.envelope.trace_id == trace_id:
                assert isinstance(refusal.message, BlueprintAnswer)
                print(f"refused: {refusal.message.why}")
                return 1
            status = _status(urza, blueprint_id)
            if status is not None and status is not shown:
                reason = urza.reason(blueprint_id)
                print(f"{status.value}{': ' + reason if reason else ''}", flush=True)
                shown = status
            if status in _ENDED:
                return int(status is not ArtifactStatus.VALIDATED)
    print("no verdict yet; the forge goes on with it whenever one works here. See: esper kernels", file=sys.stderr)
    return 1


def _status(urza: Urza, blueprint_id: str) -> ArtifactStatus | None:
    try:
        return urza.blueprint(blueprint_id).status
    except StoreError:
        return None


def _store(root: str, *, private: bool = False) -> Urza:
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
