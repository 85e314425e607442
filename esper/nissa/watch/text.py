"""Pieces of text for a terminal: rows that fit, bars, curves, durations."""

from collections.abc import Sequence

from rich.text import Text

NARROW = 60
"""Columns below which less is told."""

_BLOCKS = "▁▂▃▄▅▆▇█"


def plain(text: str) -> str:
    r"""Return a text without anything that could move the cursor or colour the terminal.

    Example:
        >>> plain("a\x1b[31mb\nc")
        'a [31mb c'
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)


def cut(text: Text, width: int) -> Text:
    """Return a text that takes one row at most."""
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text


def bar(share: float, width: int, style: str) -> Text:
    """Return a bar that is filled to a share of its width."""
    full = round(share * width)
    return Text("━" * full, style=style).append("╌" * (width - full), style="dim")


def duration(seconds: float) -> str:
    """Return a time for people.

    Example:
        >>> duration(4.2), duration(125), duration(7300)
        ('4 s', '2 min', '2 h 1 min')
    """
    minutes = int(seconds // 60)
    if not minutes:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def spark(values: Sequence[float], width: int) -> str:
    """Return a curve of one row.

    Example:
        >>> spark([3.0, 2.0, 1.0], 3)
        '█▅▁'
    """
    last = len(values) - 1
    picked = values if last < width else [values[round(i * last / (width - 1))] for i in range(width)]
    low, high = min(picked), max(picked)
    return "".join(_BLOCKS[round(7 * (value - low) / (high - low))] if high > low else _BLOCKS[0] for value in picked)
