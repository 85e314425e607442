"""Windows of tokens: nothing of the text is lost, the parts are disjoint, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.data import TokenText
from esper.data.tokens import _PIECE, _pieces, encode
from esper.leyline.errors import ConfigError, DataError
from tests.hf_models import text, tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokens")
    tokenizer().save_pretrained(root / "tokenizer")
    (root / "own.txt").write_text(text(), encoding="utf-8")
    (root / "empty").mkdir()
    return root


def module(files: Path, **given: Any) -> TokenText:
    sizes = {"context": 16, "batch_size": 4, "steps_per_epoch": 3, "decision_windows": 8, "report_windows": 8}
    return TokenText(**{"tokenizer": str(files / "tokenizer"), "path": str(files / "own.txt"), **sizes, **given})


def test_batches_are_windows_shifted_by_one(files: Path) -> None:
    data = module(files)
    for loader, size in ((data.train_dataloader(), 4), (data.val_dataloader(), 8), (data.test_dataloader(), 8)):
        x, y = next(iter(loader))
        assert x.shape == y.shape == (size, 16) and x.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert 0 <= int(x.min()) <= int(x.max()) < len(data.tokenizer)


def test_the_three_parts_are_the_text_in_its_order(files: Path) -> None:
    data = module(files)
    parts = [part.data for part in data.parts]  # type: ignore[attr-defined]
    assert "".join(data.tokenizer.decode(ids) for ids in parts) == text()
    assert len(parts[0]) > 5 * len(parts[1])


@given(st.text(max_size=200).map(lambda t: t * 3), st.integers(1, 40))
def test_pieces_put_together_are_the_text(content: str, size: int) -> None:
    import esper.data.tokens as tokens

    before, tokens._PIECE = tokens._PIECE, size
    try:
        pieces = list(_pieces(content))
    finally:
        tokens._PIECE = before
    assert "".join(pieces) == content
    assert all(0 < len(piece) <= size for piece in pieces)


def test_long_text_is_cut_at_the_end_of_a_line(files: Path) -> None:
    lines = "line of text\n" * (_PIECE // 5)
    pieces = list(_pieces(lines))
    assert len(pieces) > 2 and all(piece.endswith("\n") for piece in pieces)
    data = module(files)
    assert data.tokenizer.decode(encode(data.tokenizer, lines.encode())) == lines


def test_the_standard_library_is_read_without_a_path(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tuple(text(size).encode() for size in (40_000, 8_000, 8_000))
    monkeypatch.setattr("esper.data.tokens.standard_library", lambda: parts)
    assert len(module(files, path=None).parts.train) > 1000


def test_a_folder_without_a_tokenizer_takes_the_other(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "esper")
    data = module(files, tokenizer=str(files / "empty"), instead=str(files / "tokenizer"))
    assert len(data.tokenizer) == 300
    assert "empty has no tokenizer; using that of" in caplog.text


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"context": 0}, ConfigError, "context must be at least 1"),
        ({"tokenizer": None}, ConfigError, r"data\.tokenizer is not set"),
        ({"tokenizer": "empty"}, ConfigError, "empty has no tokenizer"),
        ({"path": "nowhere.txt"}, DataError, "No text at .*nowhere.txt"),
        ({"context": 10**6}, DataError, "train part has .* tokens; context 1000000"),
        ({"decision_windows": 9999}, DataError, "decision part has .* tokens.*9999 separate windows of 17 tokens"),
    ],
)
def test_bad_settings_say_what_to_do(
    files: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    paths = {key: str(files / value) for key, value in settings.items() if isinstance(value, str)}
    with pytest.raises(error, match=message):
        module(files, **{**settings, **paths}).setup()
