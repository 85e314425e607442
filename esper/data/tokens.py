"""Text in the tokens of a Hugging Face tokenizer, in the same three parts as the byte-level text."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from esper import hub
from esper.data.text import own_text, standard_library
from esper.data.windows import WindowedText

_log = logging.getLogger(__name__)

_PIECE = 2**16
"""Characters that are tokenised at once; pieces end with a line."""


class TokenText(WindowedText):
    """Windows of tokens for next-token prediction.

    Own text: the first eight tenths of the bytes train, the ninth decides, the last reports; without a path, the
    standard library in the parts of `ByteText`. Each part is tokenised by itself, without special tokens.
    Training windows are drawn at random offsets by (seed, step); the others are fixed and do not overlap.

    Args:
        tokenizer: a folder, or a name on the Hub; usually the student's.
        instead: where to take it from when `tokenizer` is a folder without one; usually the teacher.
        path: a UTF-8 text file, or a folder of them; None takes the standard library.
        context: tokens that the model reads, T.
        batch_size: windows in a training batch, B.
        steps_per_epoch: batches that make one epoch.
        seed: chooses the training windows.
        decision_windows: windows in the decision part.
        report_windows: windows in the report part.
        num_workers: loader processes.

    Shapes:
        batch: `(x [B, T] int64, y [B, T] int64)`, token ids.

    Raises:
        ConfigError: a number is out of range, or the tokenizer cannot be read.
        DataError: the path does not exist, or a part is too short for its windows.
    """

    unit: ClassVar[str] = "tokens"

    def __init__(
        self,
        *,
        tokenizer: str | None = None,
        instead: str | None = None,
        path: str | None = None,
        context: int = 128,
        batch_size: int = 8,
        steps_per_epoch: int = 100,
        seed: int = 0,
        decision_windows: int = 32,
        report_windows: int = 192,
        num_workers: int = 0,
    ) -> None:
        """Check the settings; text and tokenizer are read at the first use."""
        super().__init__(
            context=context,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            decision_windows=decision_windows,
            report_windows=report_windows,
            num_workers=num_workers,
        )
        self.tokenizer_name, self.instead, self.path = tokenizer, instead, path
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, read at the first use."""
        if self._tokenizer is None:
            if self.instead and not hub.has_tokenizer(hub.folder_of(self.tokenizer_name, setting="data.tokenizer")):
                _log.info("%s has no tokenizer; using that of %s.", self.tokenizer_name, self.instead)
                self.tokenizer_name = self.instead
            self._tokenizer = hub.read_tokenizer(self.tokenizer_name, setting="data.tokenizer")
        return self._tokenizer

    def read(self) -> Iterator[Tensor]:
        """Yield the tokens of the three parts."""
        texts = standard_library() if self.path is None else own_text(Path(self.path))
        yield from (encode(self.tokenizer, text) for text in texts)


def encode(tokenizer: Any, text: bytes) -> Tensor:
    """Return the token ids of a text, `int32 [N]`; bytes that are not UTF-8 become replacement characters."""
    pieces = list(_pieces(text.decode("utf-8", errors="replace")))
    # One string of megabytes costs far more memory than its pieces, and a warning about the model's context.
    ids = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else []
    return torch.tensor([token for piece in ids for token in piece], dtype=torch.int32)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        line_end = text.rfind("\n", start, start + _PIECE) + 1
        end = line_end if line_end > 0 and start + _PIECE < len(text) else start + _PIECE
        yield text[start:end]
        start = end
