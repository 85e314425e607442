"""The forge's services in one process, with a real broker and real journals, and no worker."""

import os
from pathlib import Path

from esper.blueprints import load_library
from esper.forge.link import Places
from esper.forge.service import Workshop
from esper.karn.service import reference, stated
from esper.leyline.artifacts import CompilationRequest
from esper.tezzeret.service import REQUESTED
from esper.workers.contracts import JobState
from esper.workers.limits import KEYS


def test_the_library_is_checked_only_while_nothing_is_to_be_compiled(tmp_path: Path) -> None:
    with Workshop(Places(tmp_path / "forge"), tezzeret=0, urabrask=0) as shop:
        compiling, checking = (shop.pools[name]._journal for name in ("tezzeret", "urabrask"))
        while checking.counts().get(JobState.WAITING, 0) < 2:
            shop.step()
        spec = reference(stated(load_library()["BP-MLP-GELU"].ir).ir)
        shop.bus.publish(CompilationRequest(spec=spec, pipeline="standard", requester="run"), REQUESTED)
        while not compiling.counts().get(JobState.WAITING):
            shop.step()
        shop.step()
        assert checking.lease("w", 60.0) is None
        job = compiling.lease("w", 60.0)
        shop.step()
        assert job is not None and checking.lease("w", 60.0) is None, "it is being compiled"
        compiling.failed(job.id, "no compiler", final=True, worker="w")
        shop.step()
        assert checking.lease("w", 60.0) is not None


def test_it_leaves_the_environment_of_its_process_as_it_was(tmp_path: Path) -> None:
    before = dict(os.environ)
    with Workshop(Places(tmp_path / "forge"), tezzeret=0, urabrask=0):
        assert os.environ[KEYS] == str(tmp_path / "forge" / "keys"), "what its workers inherit"
    assert dict(os.environ) == before
