"""`esper watch` as a user types it, in a pipe and in a terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from esper.cli import main
from esper.nissa.watch.live import FILE, Live
from tests.nissa.pages import run_folder
from tests.nissa.stories import story

# What is started in the background is deaf to SIGINT, and so are its children: a person's terminal is not.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from esper.cli import main
sys.exit(main())
"""

COMMAND = [sys.executable, "-c", PROGRAM, "watch"]
PATIENT_S = 120.0


def says(folder: Path, **told: object) -> None:
    part = folder / "part"
    part.write_text(Live.model_validate({"run_id": "r", "title": "demo"} | told).model_dump_json())
    part.replace(folder / FILE)


class Terminal:
    """A command in a terminal of 80 columns and 40 rows, and what it has shown."""

    def __init__(self, *arguments: str) -> None:
        self.hand, end = pty.openpty()
        size = {"COLUMNS": "80", "LINES": "40", "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=end, stdout=end, stderr=end, env=os.environ | size, close_fds=True
        )
        os.close(end)
        self.shown = ""

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + PATIENT_S
        while words not in self.shown:
            assert time.monotonic() < deadline and self.read(), self.shown

    def read(self) -> bool:
        """Take in what is shown next; False where nothing comes any more."""
        if not select.select([self.hand], [], [], PATIENT_S)[0]:
            return False
        try:
            piece = os.read(self.hand, 65536).decode()
        except OSError:  # The other end is closed.
            return False
        self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", piece)
        return bool(piece)

    def end(self) -> int:
        while self.read():
            pass
        return self.process.wait(PATIENT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENT_S)
        os.close(self.hand)


@pytest.fixture
def terminals() -> Iterator[Callable[..., Terminal]]:
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(closing(Terminal(*arguments)))


@pytest.mark.slow
def test_it_waits_for_a_run_and_follows_it_to_its_end(tmp_path: Path, terminals: Callable[..., Terminal]) -> None:
    terminal = terminals(str(tmp_path))
    terminal.wait_for("not begun")
    says(tmp_path, step=0, total_steps=100)
    terminal.wait_for("step 0 of 100")
    run_folder(tmp_path, story(lives=2, steps=50))
    terminal.wait_for("seeds ")
    says(tmp_path, step=100, total_steps=100, state="ended")
    assert terminal.end() == 0
    last = terminal.shown.rpartition("demo  ended")[2]
    assert "step 100 of 100" in last and "kept .1000" in last and "Traceback" not in terminal.shown


@pytest.mark.slow
def test_ctrl_c_ends_it_without_a_fuss(tmp_path: Path, terminals: Callable[..., Terminal]) -> None:
    says(tmp_path, step=5)
    terminal = terminals(str(tmp_path))
    terminal.wait_for("step 5")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 0 and "Traceback" not in terminal.shown and "Interrupt" not in terminal.shown


@pytest.mark.slow
def test_in_a_pipe_there_is_one_plain_picture_and_no_torch(tmp_path: Path) -> None:
    run_folder(tmp_path, story(lives=2))
    script = (
        "import sys; from esper.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or int(bool({'torch', 'lightning', 'matplotlib'} & set(sys.modules))))"
    )
    ascii_pipe = os.environ | {"PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1", "COLUMNS": "50"}
    done = subprocess.run(
        [sys.executable, "-c", script, "watch", str(tmp_path)], capture_output=True, env=ascii_pipe, timeout=PATIENT_S
    )
    assert done.returncode == 0 and done.stderr == b""
    assert b"\x1b" not in done.stdout and b"step 100" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 50


def test_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path, story(lives=2), "digits")
    assert main(["watch", str(tmp_path), "--once"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("digits  ended") and "\x1b" not in text and "kept .1000" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/missing"], "is no folder; give the one that a run writes"),
        ([], "give the folder of a run, or --connect HOST:PORT, and not both"),
        (["{}", "--connect", "127.0.0.1:7"], "and not both"),
        (["--connect", "somewhere:7"], "give --key and --server_key"),
        (["--connect", "127.0.0.1:7", "--server_key", "x"], "go together"),
        (["--connect", "127.0.0.1:7", "--key", "{}/missing", "--server_key", "x"], "make them with"),
        (["--connect", "7"], "write HOST:PORT"),
        (["--connect", "127.0.0.1:9", "--serve", "127.0.0.1:9"], "--serve needs the folder of a run"),
        (["{}", "--serve", "0.0.0.0:7", "--root", "{}/keys"], "no key is admitted: run `esper keys NAME --out FILE"),
    ],
)
def test_what_will_not_do_is_said(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["watch", *(argument.format(tmp_path) for argument in arguments)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error


def test_once_does_not_wait_for_a_server_for_ever(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper.nissa.watch.remote.Remote.__init__.__kwdefaults__", {"timeout_s": 0.2})
    with pytest.raises(SystemExit) as stop:
        main(["watch", "--connect", "127.0.0.1:9", "--once"])
    assert stop.value.code == 2 and "127.0.0.1:9 gives no answer" in capsys.readouterr().err


def test_keys_for_other_machines_are_those_of_esper_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from esper.nissa.watch.command import _keys

    root = str(tmp_path / "watch")
    assert main(["keys", "lab", "--out", str(tmp_path / "lab.key"), "--root", root]) == 0
    ours = _keys(root, "0.0.0.0:7")
    assert ours.public in capsys.readouterr().out and ours.admitted == tmp_path / "watch" / "keys" / "admitted"
