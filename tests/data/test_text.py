"""Byte windows: shapes, the split of the standard library, own text, and what is refused."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.data import ByteText
from esper.data.text import own_text, standard_library
from esper.leyline.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def library() -> ByteText:
    """The default data, read once."""
    return ByteText()


def fake_library(root: Path, *folders: str) -> Path:
    """A small library of 24 modules, each with a text of its own, and the folders asked for."""
    for name in [f"m{number}" for number in range(24)] + [f"{folder}/inside" for folder in folders]:
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<{name}>")
    return root


def test_batches_are_windows_shifted_by_one(library: ByteText) -> None:
    for loader, size in ((library.train_dataloader(), 8), (library.val_dataloader(), 32)):
        x, y = next(iter(loader))
        assert x.shape == y.shape == (size, 128)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert int(x.min()) >= 0 and int(x.max()) <= 255


def test_default_sizes(library: ByteText) -> None:
    assert len(library.train_dataloader()) == 100
    assert (len(library.parts.decision), len(library.parts.report)) == (32, 192)


def test_reading_is_fast() -> None:
    started = time.process_time()
    ByteText().setup()
    assert time.process_time() - started < 1.5


def test_an_epochs_length_does_not_change_the_batches() -> None:
    short, long = (ByteText(context=8, steps_per_epoch=steps).train_dataloader() for steps in (2, 4))
    twice = [x for _ in range(2) for x, _ in short]
    assert all(torch.equal(a, b) for a, (b, _) in zip(twice, long, strict=True))


def test_library_split_by_file(tmp_path: Path) -> None:
    root = fake_library(tmp_path, "site-packages", "json", "json/test", "idlelib", "lib2to3/test", "__pycache__")
    train, decision, report = (text.decode() for text in standard_library(root))
    assert decision == "<idlelib/inside><lib2to3/test/inside>"
    assert report.count("<") == 2
    assert sorted((train + report).split(">")) == sorted(["", "<json/inside", *(f"<m{number}" for number in range(24))])
    assert standard_library(root) == tuple(text.encode() for text in (train, decision, report))


def test_library_without_its_decision_folders_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, decision, report = standard_library(fake_library(tmp_path))
    assert (train.count(b"<"), decision.count(b"<"), report.count(b"<")) == (20, 2, 2)
    assert len(set((train + decision + report).split(b">"))) == 25
    assert "neither idlelib nor lib2to3" in caplog.text


def test_library_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 0 Python files.*Set path"):
        standard_library(tmp_path)


@given(st.binary(min_size=1, max_size=300))
def test_own_text_is_cut_into_disjoint_parts(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_bytes(content)
    assert b"".join(own_text(path)) == content


def test_own_folder_leaves_out_hidden_and_binary_files(tmp_path: Path) -> None:
    for name, content in {"b.txt": b"world", "a/x.md": b"hello ", ".git/y": b"no", "z.bin": b"\0no"}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert b"".join(own_text(tmp_path)) == b"hello world"


def test_own_text_trains(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(bytes(range(100)) * 10)
    module = ByteText(path=str(tmp_path / "own.txt"), context=8, decision_windows=4, report_windows=5)
    assert next(iter(module.train_dataloader()))[0].shape == (8, 8)
    assert [len(x) for x, _ in module.test_dataloader()] == [5]


def test_fixed_windows_do_not_overlap(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(b"a" * 200)
    part = ByteText(path=str(tmp_path), context=4, decision_windows=4, report_windows=4).parts.report
    starts = list(part.starts)  # type: ignore[attr-defined]
    assert all(b - a >= 5 for a, b in zip(starts, starts[1:], strict=False))
    assert starts[-1] + 5 <= 20


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"corpus": "stdlb"}, ConfigError, "'stdlb'.*'stdlib'"),
        ({"context": 0}, ConfigError, "context must be at least 1"),
        ({"decision_windows": 0}, ConfigError, "decision_windows"),
        ({"path": "nowhere.txt"}, DataError, "No text at .*nowhere.txt"),
        ({"path": "empty"}, DataError, "holds no text"),
        ({"path": "own.txt", "context": 400}, DataError, "train part has 400 bytes; context 400"),
        ({"path": "own.txt", "context": 8}, DataError, "decision part has 50 bytes.*32 separate windows of 9 bytes"),
    ],
)
def test_bad_settings_say_what_to_do(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.txt").write_bytes(bytes(500))
    if "path" in settings:
        settings = {**settings, "path": str(tmp_path / settings["path"])}
    with pytest.raises(error, match=message):
        ByteText(**settings).setup()
