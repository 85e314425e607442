"""The gauntlet of one kernel: `python -m esper.urabrask.gauntlet FOLDER` tries `FOLDER/artifact` and writes findings.

It runs in a sandboxed child. A kernel that ends the process leaves `trail.json`, which says where. Native code shares
the process with its judge: it is contained and compared, not read. What keeps a forger out is that kernels are compiled
from blueprints by our own workers and signed by their parent.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from esper.kasmina.fingerprint import fingerprint
from esper.leyline.artifacts import KernelManifest
from esper.leyline.errors import BlueprintError, EsperError, KernelError, WrongFingerprint
from esper.leyline.events import Rejection
from esper.urabrask.benchmark import benchmark
from esper.urabrask.findings import Failure, Findings
from esper.urabrask.hardware import hardware
from esper.urabrask.inputs import load
from esper.urabrask.job import ARTIFACT, FINDINGS, UNFIT
from esper.urabrask.sanity import sanity
from esper.urabrask.trail import Trail
from esper.urza.canonical import parse

_MEBIBYTE: Final = 2**20


def run(folder: Path) -> Findings:
    """Try the artifact of a job's folder and write what was found.

    Raises:
        ContractError: its manifest cannot be read.
        WrongFingerprint: it was compiled for another machine than this one; nothing of it was loaded.
    """
    manifest = parse(KernelManifest, (folder / ARTIFACT / "manifest.json").read_bytes())
    _check_machine(manifest, folder)
    trail = Trail(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        findings = _tried(folder / ARTIFACT, manifest, trail)
    finally:
        torch.set_num_threads(threads)
        trail.close()
    (folder / FINDINGS).write_text(findings.model_dump_json(), encoding="utf-8")
    return findings


def _check_machine(manifest: KernelManifest, folder: Path) -> None:
    """Raise unless this is a machine for the kernel: another one may stop on its first instruction."""
    if manifest.fingerprint in ("", fingerprint()):
        return
    detail = (
        f"{manifest.kernel_id} was compiled for the binary interface {manifest.fingerprint[:12]}; this machine has "
        f"{fingerprint()[:12]}, and the kernel is tried on one like that which compiled it."
    )
    (folder / UNFIT).write_text(detail, encoding="utf-8")
    raise WrongFingerprint(detail)


def _tried(artifact: Path, manifest: KernelManifest, trail: Trail) -> Findings:
    found = Findings(kernel_id=manifest.kernel_id, pipeline=manifest.pipeline, hardware=hardware())
    try:
        trail.enter("load")
        subject = load(artifact, manifest)
    except (BlueprintError, KernelError) as error:
        kind = Rejection.INVALID_BLUEPRINT if isinstance(error, BlueprintError) else Rejection.SANITY_FAILED
        return found.model_copy(update={"failures": (Failure(check="load", detail=str(error), rejection=kind),)})
    sane = sanity(subject, trail)
    size = sum(path.stat().st_size for path in artifact.glob("*.so"))
    update = {**sane._asdict(), "nodes": len(subject.ir.nodes), "library_mb": size / _MEBIBYTE}
    if not sane.failures:
        trail.enter("benchmark")
        update["measured"] = benchmark(subject)
    return found.model_copy(update=update)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gauntlet in a folder; the exit status is 0 whatever the kernel does, as long as it lets us."""
    parser = argparse.ArgumentParser(prog="python -m esper.urabrask.gauntlet", description=__doc__)
    parser.add_argument("folder", type=Path, help=f"holds {ARTIFACT}/, gets {FINDINGS}")
    try:
        run(parser.parse_args(arguments).folder)
    except EsperError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
