"""Handwritten digits, 8 x 8 pixels, from scikit-learn: the data of task B."""

import torch

from esper.data.base import EsperDataModule, Parts, require_positive, split_tensors
from esper.data.samplers import generator_for

EXAMPLES = 1797
SPLIT_SEED = 1234


class Digits(EsperDataModule):
    """The 1,797 digits of scikit-learn, scaled to [0, 1], split once and for all at random.

    Args:
        batch_size: digits in a training batch, B.
        train: digits to train on.
        decision: digits that gates decide on; all that is left is the report part.
        seed: chooses the order of training; the split does not depend on it.
        flat: give 64 numbers instead of a 1 x 8 x 8 picture.
        num_workers: loader processes.

    Shapes:
        batch: `(x [B, 64] or [B, 1, 8, 8] float32, y [B] int64)`, y from 0 to 9.

    Raises:
        ConfigError: a number is out of range.
        DataError: nothing is left for the report part.

    Example:
        >>> len(Digits().parts.train), len(Digits().parts.decision), len(Digits().parts.report)
        (1200, 298, 299)
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        train: int = 1200,
        decision: int = 298,
        seed: int = 0,
        flat: bool = True,
        num_workers: int = 0,
    ) -> None:
        """Check the settings; the digits are read at the first use."""
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        require_positive(train=train, decision=decision)
        self.train, self.decision, self.flat = train, decision, flat

    def build(self) -> Parts:
        """Shuffle the digits with a fixed seed and cut them into parts."""
        # Importing scikit-learn takes a second, which the other data sets need not pay.
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]

        raw = load_digits()
        order = torch.randperm(EXAMPLES, generator=generator_for(SPLIT_SEED))
        x = torch.from_numpy(raw.data).float()[order] / 16
        y = torch.from_numpy(raw.target).long()[order]
        report = max(0, EXAMPLES - self.train - self.decision)
        return split_tensors(x if self.flat else x.view(-1, 1, 8, 8), y, (self.train, self.decision, report))
