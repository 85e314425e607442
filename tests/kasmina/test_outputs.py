from collections import OrderedDict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.kasmina.outputs import first_input, first_tensor, replace_first
from tests.kasmina.conftest import Output

Y, OTHER, WHOLE = torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, dtype=torch.int64)


@dataclass(frozen=True)
class Frozen:
    label: str
    value: Tensor
    derived: Tensor = field(init=False, default=WHOLE)


@pytest.mark.parametrize(
    "output",
    [
        Y,
        (Y, OTHER),
        [Y, None],
        Output(Y, OTHER),
        {"n": 1, "ids": WHOLE, "value": Y, "later": OTHER},
        OrderedDict(value=Y),
        Frozen("x", Y),
    ],
)
def test_the_activation_is_found_and_replaced_in_a_copy(output: Any) -> None:
    assert first_tensor(output) is Y
    value = torch.full((2, 3), 5.0)
    twin = replace_first(output, value)
    assert type(twin) is type(output)
    assert first_tensor(twin) is value
    assert first_tensor(output) is Y, "the module's own output was changed"


def test_what_stands_beside_the_activation_stays() -> None:
    assert replace_first((Y, OTHER), Y + 1)[1] is OTHER
    assert replace_first({"value": Y, "later": OTHER}, Y + 1)["later"] is OTHER
    assert replace_first(Frozen("x", Y), Y + 1).derived is WHOLE


@pytest.mark.parametrize(
    "output",
    [None, 3, "text", WHOLE, (), (WHOLE, Y), [None, Y], {}, {"ids": WHOLE}, MappingProxyType({"value": Y}), Frozen],
)
def test_what_holds_no_activation(output: Any) -> None:
    assert first_tensor(output) is None


def test_the_first_input_may_be_named() -> None:
    assert first_input((WHOLE,), {"mask": None, "x": Y}) is Y
    assert first_input((), {"ids": WHOLE}) is None
