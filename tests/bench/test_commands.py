"""`esper bench growth` as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from esper.cli import main
from tests.bench.samples import digits, until

ROOT = Path(__file__).parents[2]


def failure(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *args])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_a_user_mistypes_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "did you mean 'heuristic'?" in failure(capsys, "growth", "--arms", "heuristik", "+experiment=quickstart")
    assert "the kinds are growth, speed, stability" in failure(capsys, "grow")
    assert "Did you mean 'quickstart'?" in failure(capsys, "growth", "+experiment=quickstrt")
    assert "0 is not above 0" in failure(capsys, "growth", "--seeds", "0")
    assert main(["bench"]) == 0 and "equal training compute" in capsys.readouterr().out


def test_two_benches_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(digits()))
    out.mkdir()
    with FileLock(out / ".lock"):
        assert "another bench writes to" in failure(capsys, "growth", "--config", str(file), "--out", str(out))
    (tmp_path / "file").write_text("")
    assert "give another --out" in failure(
        capsys, "growth", "--config", str(file), "--out", str(tmp_path / "file" / "out")
    )


@pytest.mark.slow
def test_a_bench_is_stopped_and_goes_on(tmp_path: Path) -> None:
    config = digits() | {"nissa": {"title": "tiny"}}
    config["trainer"] |= {"max_steps": 30, "val_check_interval": 10}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", "import sys; from esper.cli import main; sys.exit(main(sys.argv[1:]))"]
    command += ["bench", "growth", "--config", "tiny.yaml", "--seeds", "1", "--arms", "heuristic"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    out = tmp_path / "outputs/bench/tiny"
    until((out / "runs/heuristic-0/log.txt").exists)
    # As Ctrl-C, which a shell may have taken from what it runs in the background.
    first.terminate()
    told, _ = first.communicate(timeout=600)
    assert first.returncode == 130 and "the same command goes on" in told
    assert not list(out.glob("rows/*.json"))

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny: cannot be told" in done.stdout and len(list(out.glob("rows/*.json"))) == 1
    assert {"growth.md", "growth.json"} <= {file.name for file in out.iterdir()}
