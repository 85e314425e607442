"""Identifiers that cross subsystem boundaries."""

import re
from typing import NamedTuple
from uuid import uuid4

from esper.leyline.errors import ContractError

_SEED_ID = re.compile(r"(?P<layer>.*)#(?P<chunk>\d+)\.(?P<slot>\d+)")


class SeedId(NamedTuple):
    """One seed: the module path of its layer, its chunk of features, its slot in the chunk.

    Example:
        >>> str(SeedId("blocks.0.attn", 0, 2))
        'blocks.0.attn#0.2'
        >>> SeedId.parse("blocks.0.attn#0.2").slot
        2
    """

    layer: str
    chunk: int = 0
    slot: int = 0

    def __str__(self) -> str:
        """Return `layer#chunk.slot`."""
        return f"{self.layer}#{self.chunk}.{self.slot}"

    @classmethod
    def parse(cls, text: str) -> "SeedId":
        """Read the form that `str` writes.

        Raises:
            ContractError: the text is not of the form `layer#chunk.slot`.
        """
        match = _SEED_ID.fullmatch(text)
        if match is None:
            raise ContractError(f"{text!r} is not a seed id; write it as 'layer#chunk.slot', e.g. 'blocks.0.attn#0.0'.")
        return cls(match["layer"], int(match["chunk"]), int(match["slot"]))


def new_id() -> str:
    """Return a fresh random identifier of 32 hexadecimal digits."""
    return uuid4().hex
