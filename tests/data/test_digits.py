"""The digits: shapes, scale, a split that uses every digit once."""

import pytest

from esper.data import Digits
from esper.leyline.errors import DataError


def test_flat_and_picture_shapes() -> None:
    flat, labels = next(iter(Digits().train_dataloader()))
    picture, _ = next(iter(Digits(flat=False).train_dataloader()))
    assert flat.shape == (64, 64) and picture.shape == (64, 1, 8, 8)
    assert (picture.flatten(1) == flat).all()
    assert float(flat.min()) == 0 and float(flat.max()) == 1
    assert set(labels.tolist()) <= set(range(10))


def test_every_digit_is_in_one_part() -> None:
    assert [len(part) for part in Digits().parts] == [1200, 298, 299]
    assert [len(part) for part in Digits(train=1000, decision=500).parts] == [1000, 500, 297]


@pytest.mark.parametrize(("train", "decision", "message"), [(1500, 297, "report part"), (1700, 400, "only 1797")])
def test_a_split_without_report_is_refused(train: int, decision: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Digits(train=train, decision=decision).setup()
