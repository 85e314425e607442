"""The state of all seeds as a structure of arrays with a checksum."""

import zlib

import numpy as np
import torch
from torch import Tensor

from esper.leyline.errors import StateCorruption
from esper.leyline.states import SEED_STATE_CODES, SeedState

_COLUMNS = {
    "lifecycle": torch.uint8,
    "kernel_hash": torch.int64,
    "alpha": torch.float32,
    "last_epoch": torch.int32,
    "latency_ms": torch.float32,
}
_STATES = tuple(SEED_STATE_CODES)


class SeedArrays:
    """One row per seed; columns are tensors on one device.

    Columns: `lifecycle` (uint8 state code), `kernel_hash` (int64), `alpha`, `last_epoch`,
    `latency_ms`. `seal` records a CRC-32 of all columns; `verify` compares.

    Example:
        >>> arrays = SeedArrays()
        >>> row = arrays.add_row()
        >>> arrays.state(row).value
        'DORMANT'
    """

    def __init__(self) -> None:
        """Start empty."""
        self.columns: dict[str, Tensor] = {name: torch.zeros(0, dtype=dtype) for name, dtype in _COLUMNS.items()}
        self.crc: int | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.columns["lifecycle"])

    def add_rows(self, count: int) -> int:
        """Append dormant rows and return the first one's index."""
        first = len(self)
        for name, column in self.columns.items():
            self.columns[name] = torch.cat([column, torch.zeros(count, dtype=column.dtype, device=column.device)])
        return first

    def add_row(self) -> int:
        """Append one dormant row and return its index."""
        return self.add_rows(1)

    def reset(self, rows: int) -> None:
        """Keep that many rows, all dormant."""
        self.columns = {name: torch.zeros_like(column[:rows]) for name, column in self.columns.items()}

    def state(self, row: int) -> SeedState:
        """Return the life-cycle state of a row."""
        return _STATES[int(self.columns["lifecycle"][row])]

    def set_state(self, row: int, state: SeedState) -> None:
        """Write the state of a row."""
        self.columns["lifecycle"][row] = SEED_STATE_CODES[state]

    def host(self, name: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
        """Return a column on the CPU as an array."""
        array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = self.columns[name].cpu().numpy()
        return array

    def checksum(self) -> int:
        """Return the CRC-32 over all columns in order."""
        crc = 0
        for column in self.columns.values():
            crc = zlib.crc32(column.cpu().numpy().tobytes(), crc)
        return crc

    def seal(self) -> None:
        """Record the checksum of the present content."""
        self.crc = self.checksum()

    def verify(self) -> None:
        """Compare with the sealed checksum.

        Raises:
            StateCorruption: the content changed since it was sealed.
        """
        if self.crc is not None and self.checksum() != self.crc:
            raise StateCorruption("the seeds' state changed outside the life cycle; restore from a checkpoint.")
