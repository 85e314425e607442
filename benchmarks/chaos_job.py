"""What the rounds of `chaos.py` run in processes of their own, forked from a server that has torch imported already."""

import contextlib
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STEPS, LAST = 220, 190
PACE_S = 0.008
PATIENCE_S = 300.0
PRELOADED = [
    "lightning.pytorch",
    "esper.data",
    "esper.models",
    "esper.tolaria.module",
    "esper.tamiyo.callback",
    "esper.forge.commands",
    "esper.forge.process",
]
GO, STRUCK, RESULT, FACTS = "go", "struck", "result.json", "facts.json"


def begin(task: Callable[..., None], folder: Path, name: str, *arguments: Any) -> None:
    """Do a task as a process of the round: in its folder, by which it is known, with files for what it says."""
    # A shell that starts a job in the background lets it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(folder)
    handle = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(handle, stream)
    import torch

    torch.set_num_threads(1)
    task(folder, *arguments)


# --- the run -----------------------------------------------------------------------------------------------------


def train(folder: Path, root: str, hold: int) -> None:
    """Train a run in which one graft is planted, with the forge of a folder, and write down what came out.

    Args:
        folder: the round's.
        root: the forge's; empty for none.
        hold: step before which the run waits until it is told to go on.
    """
    from esper.forge.client import Forge

    with Forge(enabled=bool(root), root=root or "none", cpu_budget_s=None) as forge:
        losses = _fit(folder, forge.store("chaos"), hold)
    reports = [json.loads(line) for line in (folder / "fieldreports.jsonl").read_text().splitlines()]
    grafts = [[report["blueprint_id"], report["outcome"], report["reason"]] for report in reports]
    kernels = [report["kernel_artifact_id"] for report in reports]
    part = folder / "result.part"
    part.write_text(json.dumps({"losses": losses, "grafts": grafts, "kernels": kernels}))
    part.replace(folder / RESULT)


def _fit(folder: Path, store: Any, hold: int) -> list[str]:
    """Train, and return the loss of every step, exactly."""
    import torch
    from lightning.pytorch import Callback, Trainer

    import esper
    from esper.data import ByteText
    from esper.models import ByteLM
    from esper.quiet import quiet
    from esper.tolaria.module import TolariaModule
    from esper.tolaria.tasks import LanguageModeling

    losses: list[str] = []

    class Conductor(Callback):
        """Keeps the losses, and holds the run where the round wants it to wait."""

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step in (hold, LAST):
                _await(folder / (GO if trainer.global_step == hold else STRUCK))
            time.sleep(PACE_S)

        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"].detach()).hex())

    quiet()
    torch.manual_seed(0)
    params = 2 * 32 * _hidden() + _hidden() + 32
    planting = {"at": 10, "blueprint": "BP-MLP-GELU", "site": "blocks.0.after_ffn", "params": params}
    module = TolariaModule(
        network=ByteLM(d_model=32, layers=1, heads=2, ffn=2, context=16),
        task=LanguageModeling(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.003),
    )
    tamiyo = esper.Tamiyo(
        "schedule",
        ["*.after_ffn"],
        store,
        kasmina={"stabilization_steps": 100, "ramp_steps": 10},
        settings={"schedule": (planting,), "budget": 20_000, "price_per_kparam": 0.0, "decision_samples": 256},
        output_dir=str(folder),
    )
    trainer = Trainer(
        max_steps=STEPS,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[tamiyo, Conductor()],
    )
    text = ByteText(context=16, batch_size=8, path=_text(folder), steps_per_epoch=STEPS, decision_windows=256)
    trainer.fit(module, datamodule=text)
    return losses


def _await(file: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody made {file} in {PATIENCE_S:.0f} s")
        time.sleep(0.02)


def _text(folder: Path) -> str:
    place = folder / "text"
    place.mkdir(exist_ok=True)
    for name in ("bank", "layer", "seed", "sites", "wrapper", "writer"):
        source = ROOT / f"esper/kasmina/{name}.py"
        if source.exists():
            shutil.copy(source, place / source.name)
    return str(place)


def _hidden() -> int:
    """Return the hidden units of the run's child, which has the default size."""
    from esper.blueprints import SiteShape, load_library
    from esper.blueprints.dims import resolve_dims

    return resolve_dims(load_library()["BP-MLP-GELU"].ir, SiteShape("btd", 32, 32, 16, "block"), {})["h"]


# --- the forge ---------------------------------------------------------------------------------------------------


def forge(folder: Path, root: str) -> None:
    """Be a forge, until told to end."""
    from esper.forge.process import main

    raise SystemExit(main([f"--root={root}"]))


# --- before and after --------------------------------------------------------------------------------------------


def compile(folder: Path) -> None:
    """Compile the kernel that the runs graft."""
    from esper.blueprints import load_library
    from esper.karn.service import stated
    from esper.leyline.artifacts import KernelSpec
    from esper.tezzeret.compile import compile_kernel

    ir, dims = stated(load_library()["BP-MLP-GELU"].ir).ir, {"h": _hidden()}
    spec = KernelSpec(ir=ir, layout="btd", d_in=32, d_out=32, tokens=16, kind="block", dims=dims)
    made = compile_kernel(spec, "standard", folder)
    (folder / "record.json").write_text(made.record.model_dump_json())


def prepare(folder: Path, root: str, kernel: str) -> None:
    """Make a forge's folder in which the library is known, one compiled and some eager kernels are VALIDATED.

    What a round asks for beyond that, and what its kernels hold, is written into `facts.json`.

    Args:
        folder: where the facts go.
        root: the forge's folder.
        kernel: folder of the compiled kernel of BP-MLP-GELU at the run's site.
    """
    from esper.blueprints import load_library
    from esper.forge.link import Places
    from esper.karn.service import reference, stated
    from esper.leyline.codec import to_json
    from esper.urza.signing import KeyRing
    from esper.urza.store import Urza

    library, places = load_library(), Places(root)
    places.root.mkdir(parents=True, mode=0o700)
    with Urza(places.store, KeyRing(places.keys)) as urza:
        for known in library:
            urza.submit(stated(known.ir), "karn")
        kept = {_promote(urza, Path(kernel))}
        for name in ("BP-PROJ-LORA", "BP-WIDEN", "BP-MLP-SWIGLU"):
            eager = folder / name
            eager.mkdir()
            kept.add(_promote(urza, _eager(eager, reference(stated(library[name].ir).ir))))
        files = {name: urza.manifest(name).files for name in kept}
    asked = {name: to_json(request) for name, request in _requests().items()}
    (folder / FACTS).write_text(json.dumps({"files": files, "asked": asked}))


def _eager(folder: Path, spec: Any) -> Path:
    from esper.tezzeret.compile import compile_kernel

    made = compile_kernel(spec, "fast", folder)
    (folder / "record.json").write_text(made.record.model_dump_json())
    return folder


def _promote(urza: Any, folder: Path) -> str:
    """Put a kernel into the store with a verdict, and return its id."""
    from esper.leyline.artifacts import CompiledKernel
    from esper.leyline.kernels import UrabraskValidationReport
    from esper.leyline.reports import HardwareContext

    text = (folder / "manifest.json").read_text()
    files = {name: (folder / name).read_bytes() for name in json.loads(text)["files"]}
    kernel = urza.put(CompiledKernel(manifest=text, files=files, record=(folder / "record.json").read_text()))
    verdict = UrabraskValidationReport(
        kernel_artifact_id=kernel.id,
        passed_validation=True,
        risk_score=0.1,
        conf_level=0.9,
        hardware_context=HardwareContext(device_type="cpu"),
        report_timestamp=time.time(),
    )
    urza.judge(verdict)
    return str(kernel.id)


def _requests() -> dict[str, Any]:
    """Return what rounds ask for, by the id of the kernel: eager ones, one for a GPU, and one to be compiled."""
    from esper.blueprints import load_library
    from esper.karn.service import stated
    from esper.leyline.artifacts import CompilationRequest, KernelSpec
    from esper.tezzeret.toolchain import kernel_id

    ir, gain = (stated(load_library()[name].ir).ir for name in ("BP-MLP-GELU", "BP-PROJ-IA3"))
    small: dict[str, Any] = {"layout": "bd", "tokens": 1, "kind": "linear"}
    asked = [
        CompilationRequest(spec=KernelSpec(ir=ir, d_in=8, d_out=8, **small), pipeline="fast"),
        CompilationRequest(spec=KernelSpec(ir=ir, d_in=8, d_out=12, **small), pipeline="fast"),
        CompilationRequest(spec=KernelSpec(ir=ir, d_in=8, d_out=8, target="cuda", **small), pipeline="standard"),
        CompilationRequest(spec=KernelSpec(ir=gain, d_in=8, d_out=8, **small), pipeline="standard"),
    ]
    return {kernel_id(request.spec, request.pipeline or "standard"): request for request in asked}


def inspect(folder: Path, root: str) -> None:
    """Ask `esper doctor --store` and the loader's door about a store, and write down what they say."""
    from esper.forge.commands import check
    from esper.forge.link import Places
    from esper.leyline.errors import EsperError
    from esper.tezzeret.toolchain import fingerprint
    from esper.urza.signing import KeyRing
    from esper.urza.store import Urza

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = check(["--store", root])
    places, kernels = Places(root), dict[str, dict[str, Any]]()
    with Urza(places.store, KeyRing.public_only(places.keys)) as urza:
        for name in urza.core.records.kernels.keys():  # noqa: SIM118 - a table is no dict
            try:
                kernels[name] = {"status": urza.kernel(name).status.value, "refused": "", "files": {}}
                if kernels[name]["status"] == "VALIDATED":
                    found = urza.verified(name, fingerprint())
                    kernels[name] |= {"files": found.manifest.files, "spec": found.manifest.spec.model_dump_json()}
            except EsperError as error:
                kernels[name] = {"status": "", **kernels.get(name, {}), "refused": f"{type(error).__name__}: {error}"}
        given_up = sorted({entry.subject for entry in urza.core.ledger.entries() if entry.action == "given up"})
    told = {"status": status, "said": said.getvalue().splitlines(), "kernels": kernels, "given_up": given_up}
    (folder / "doctor.json").write_text(json.dumps(told))
