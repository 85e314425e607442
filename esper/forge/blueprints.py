"""Commands of the terminal that need a forge at work: hand a blueprint in, ask which would serve."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from esper.blueprints import load_library
from esper.blueprints.library import read_blueprint
from esper.forge.client import Forge
from esper.forge.commands import ROOT, store_of
from esper.karn.service import REFUSED, SUBMITTED, stated
from esper.karn.source import BlueprintSource
from esper.leyline.artifacts import BlueprintAnswer, BlueprintRequest
from esper.leyline.errors import BusError, StoreError
from esper.leyline.ids import new_id
from esper.leyline.kernels import ArtifactStatus
from esper.oona.contracts import Bus
from esper.urza.store import Urza

_LOOK_S: Final = 0.5
_START_S: Final = 120.0
_ENDED: Final = frozenset({ArtifactStatus.VALIDATED, ArtifactStatus.INVALID, ArtifactStatus.REJECTED})


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
    with store_of(root) as urza:
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
