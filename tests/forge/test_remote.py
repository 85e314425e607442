"""A forge on one machine, its worker on another: `esper forge --listen`, `esper worker`, and a cable between them."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
import zmq

from esper.blueprints import parse_ir
from esper.cli import main
from esper.forge.client import Forge
from esper.forge.curve import curve_keys
from esper.forge.link import REQUESTED, Places
from esper.karn.service import SUBMITTED, stated
from esper.kasmina.fingerprint import fingerprint
from esper.leyline.artifacts import CompilationRequest
from esper.leyline.envelope import event_topic
from esper.leyline.events import KernelReady, SecurityAlert, Violation
from esper.leyline.kernels import ArtifactStatus
from esper.oona.client import ZmqBus
from esper.oona.contracts import Subscription
from esper.oona.keys import CurveKeys
from esper.tezzeret.job import SHELF
from esper.urza import KeyRing, Urza
from tests.forge.test_process import until
from tests.kernels import shared_folder, spec
from tests.workers.network import two_networks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300.0


class Lab(NamedTuple):
    """A forge that listens here, and how to start a worker of it on the other machine."""

    places: Places
    card: dict[str, Any]
    server: str
    worker: Callable[..., AbstractContextManager[object]]

    def urza(self) -> Urza:
        return Urza(self.places.store, KeyRing.public_only(self.places.keys))

    def jobs(self, pool: str, state: str) -> list[tuple[str, str]]:
        """Return the key of every job of a pool in one state, and who has it."""
        base = sqlite3.connect(f"file:{self.places.jobs / pool / 'jobs.sqlite'}?mode=ro", uri=True)
        found = base.execute("SELECT key, worker FROM jobs WHERE state = ?", (state,)).fetchall()
        base.close()
        return found


@contextmanager
def esper(*words: str, before: tuple[str, ...] = (), **variables: str) -> Iterator[None]:
    """Run a command of the terminal until the block ends."""
    command = [*before, sys.executable, "-c", "import sys; from esper.cli import main; sys.exit(main())", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    places, key = Places(tmp_path / "forge"), tmp_path / "lab2.key"
    root = str(places.root)
    assert main(["keys", "lab2", "--out", str(key), "--root", root]) == 0
    server = curve_keys(places).public
    with (
        two_networks() as network,
        esper("forge", "--root", root, "--listen", "10.91.0.1", "--tezzeret", "0", "--urabrask", "0"),
    ):
        card = until(Forge(enabled=True, root=root).running)

        def worker(pool: str, **variables: str) -> AbstractContextManager[object]:
            joining = ("--connect", card["pools"][pool], "--key", str(key), "--server_key", server)
            return esper("worker", pool, *joining, before=network.there, **variables)

        yield Lab(places, card, server, worker)


def knock(address: str, server: str) -> str:
    """Try to join with a key that nobody has admitted; return its public part."""
    keys, context = CurveKeys.generate(), zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.curve_publickey, dealer.curve_secretkey = keys.public.encode(), keys.secret.encode()
    dealer.curve_serverkey = server.encode()
    dealer.connect(address)
    assert not dealer.poll(1000)
    context.destroy(linger=0)
    return keys.public


def heard(news: Subscription, kind: type) -> Any:
    """Return the next message of a kind."""

    def look() -> Any:
        delivery = news.receive(0.5)
        if delivery is None:
            return None
        news.ack(delivery)
        return delivery.message if isinstance(delivery.message, kind) else None

    return until(look, PATIENCE_S)


def test_a_worker_on_another_machine_makes_a_blueprint_valid_and_a_stranger_gets_no_job(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ZmqBus(lab.card["address"], "test") as bus, bus.subscribe(event_topic("SecurityAlert")) as alerts:
        stranger = knock(lab.card["pools"]["urabrask"], lab.server)
        alert = heard(alerts, SecurityAlert)
    assert (alert.subject, alert.violation) == (stranger, Violation.PERMISSION)

    design = yaml.safe_load((ROOT / "esper/blueprints/library/bp-proj-lora.yaml").read_text(encoding="utf-8"))
    design["ir"] |= {"name": "BP-MINE", "layouts": ["bd"]}
    (mine := tmp_path / "mine.yaml").write_text(yaml.safe_dump(design), encoding="utf-8")
    ir = parse_ir(design["ir"])
    with ZmqBus(lab.card["address"], "test") as bus:
        bus.publish(stated(ir), SUBMITTED)
    # The library's own checks wait too, and this one goes before them.
    until(lambda: [key for key, _ in lab.jobs("urabrask", "WAITING") if key.startswith(ir.id[:16])])
    until(lambda: len(lab.jobs("urabrask", "WAITING")) > 1)
    with lab.worker("urabrask"):
        assert main(["blueprints", "submit", str(mine), "--root", str(lab.places.root)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert any(line.startswith("BP-MINE@1.0.0") for line in told) and told[-1] == "VALIDATED"
    ((key, worker),) = lab.jobs("urabrask", "DONE")
    assert key.startswith(ir.id[:16]) and worker.startswith("remote/")
    with lab.urza() as urza:
        (blueprint,) = [each for each in urza.blueprints() if each.name == "BP-MINE"]
        assert blueprint.status is ArtifactStatus.VALIDATED
        assert urza.verified(blueprint.kernels[0]).manifest.pipeline == "fast"
        assert urza.check() == []


@pytest.mark.skipif(not os.environ.get("ESPER_SOAK"), reason="half a minute of compiling; ESPER_SOAK asks for it")
def test_a_worker_on_another_machine_compiles(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> None:
    shelf = shared_folder(tmp_path_factory) / "shelf"
    with (
        ZmqBus(lab.card["address"], "test") as bus,
        bus.subscribe("compilation.ready") as news,
        lab.worker("tezzeret", **{SHELF: str(shelf)}),
    ):
        bus.publish(CompilationRequest(spec=spec(), pipeline="standard"), REQUESTED)
        while (ready := heard(news, KernelReady)).pipeline != "standard":
            continue
    ((_, worker),) = lab.jobs("tezzeret", "DONE")
    assert worker.startswith("remote/")
    with lab.urza() as urza:
        manifest = urza.manifest(ready.kernel_artifact_id)
        assert manifest.spec == spec() and manifest.fingerprint == fingerprint()
        assert urza.check() == []
