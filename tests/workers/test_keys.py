"""The jobs of both pools are kept from the forge's private keys."""

from pathlib import Path

import pytest

from esper.tezzeret import job as compilation
from esper.urabrask.job import keys as keys_of_a_gauntlet
from esper.workers.limits import KEYS, Limits, keys
from esper.workers.sandbox import run_sandboxed


def test_a_job_sees_the_folder_of_keys_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets, folder = tmp_path / "keys", tmp_path / "job"
    secrets.mkdir()
    folder.mkdir()
    (secrets / "urabrask.key").write_text("secret")
    assert keys() == ()
    monkeypatch.setenv(KEYS, str(secrets))
    assert compilation.limits(b"").hidden == keys_of_a_gauntlet() == (str(secrets),)
    command = ["cat", str(secrets / "urabrask.key")]
    assert run_sandboxed(command, folder, Limits()).ok, "without the limit the command can read it"
    outcome = run_sandboxed(command, folder, Limits(hidden=keys()))
    if any("mounts" in missing for missing in outcome.missing):
        pytest.skip("this system refuses mounts of its own to a sandbox")
    assert not outcome.ok and (secrets / "urabrask.key").exists()
