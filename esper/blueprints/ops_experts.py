"""Mixtures of experts: choosing among features, and networks that a router sends each token to.

Letters in shapes: B batch, T tokens, D features read, E experts, K experts of a token, S places of an expert, H hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import ClassVar, Final, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints.op import Op, Size, Value
from esper.blueprints.routing import Balance, Router
from esper.blueprints.site import Layout
from esper.leyline.errors import BlueprintDoesNotFit

_HIDDEN: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}


class Choose(Op):
    """Softmax over the `k` largest features of each token; the others become zero.

    Args:
        k: features that are kept, at most all of them.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd", "bd")
    k: Size

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the input's shape."""
        if self.k > inputs[0].width:
            raise BlueprintDoesNotFit(f"{self.k} features cannot be kept of {inputs[0].width}.")
        return inputs[0]

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `TopSoftmax`."""
        return TopSoftmax(self.k)


class Spread(Op):
    """Multiplies equal blocks of features, each by one feature of the second input."""

    ARITY: ClassVar[int] = 2
    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd", "bd")

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the shape of the first input; the width of the second divides its width."""
        if inputs[0].width % inputs[1].width:
            raise BlueprintDoesNotFit(f"{inputs[0].width} features do not fall into {inputs[1].width} equal blocks.")
        return inputs[0]

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `BlockProduct`."""
        return BlockProduct(inputs[1].width)


class Experts(Op):
    """Two-layer experts without biases; a router sends each token to `k` of them, and adds up what they return.

    With k of 1 the result is scaled by the router's probability (Fedus et al., 2021), with more by the shares of the
    chosen ones (Lepikhin et al., 2020). An expert takes at most `capacity` percent of its even share of the tokens so
    far: a token that comes to a full expert gets nothing from it. No token is crowded out by a later one or by another
    sample, so the mixture is causal. The last layer starts at zero.

    Args:
        out: features of the result.
        hidden: hidden features of each expert.
        experts: number of experts; default 4.
        k: experts of each token; default 2.
        capacity: share of the tokens that an expert takes, in percent of an even split; default 125.
        fn: activation of the hidden layer; default gelu.
        balance: what evens the load out: `none`; `loss`, the auxiliary loss of Fedus et al. times `strength`; `bias`,
            an offset of each chance that moves by `strength` a pass against the mean load (Wang et al., 2024).
        strength: see `balance`; default 0.01.
        init: how the last layer starts; it must be zero.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd", "bd")
    PARAMETRIC: ClassVar[bool] = True
    # What an expert still takes follows from the tokens before.
    MIXES_TOKENS: ClassVar[bool] = True
    out: Size
    hidden: Size
    experts: Size = 4
    k: Size = 2
    capacity: int = Field(default=125, ge=10, le=1000)
    fn: Literal["gelu", "silu", "relu"] = "gelu"
    balance: Balance = "none"
    strength: float = Field(default=0.01, gt=0, le=1)
    init: Literal["zero"] = "zero"

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the input's shape with `out` features."""
        if self.k > self.experts:
            raise BlueprintDoesNotFit(f"a token cannot go to {self.k} of {self.experts} experts.")
        if self.k * self.capacity > 100 * self.experts:
            raise BlueprintDoesNotFit(f"{self.experts} experts of {self.capacity} % hold more than every token.")
        return inputs[0]._replace(width=self.out)

    def places(self, inputs: Sequence[Value]) -> int:
        """Return how many tokens of a sample an expert takes at most."""
        return -(-inputs[0].tokens * self.k * self.capacity // (100 * self.experts))

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `RoutedExperts`."""
        shape = (inputs[0].width, self.experts, self.k, self.capacity)
        router = Router(*shape, balance=self.balance, strength=self.strength, device=device)
        return RoutedExperts(router, self.hidden, self.out, self.fn, inputs[0].layout == "bd", device)

    def params(self, inputs: Sequence[Value]) -> int:
        """Return `E * (in + H * (in + out))`."""
        return self.experts * (inputs[0].width + self.hidden * (inputs[0].width + self.out))

    def macs(self, inputs: Sequence[Value]) -> int:
        """Return the router's `T * E * in` and `E * S * H * (in + out)`, S the places of an expert."""
        width, tokens = inputs[0].width, inputs[0].tokens
        return self.experts * (tokens * width + self.places(inputs) * self.hidden * (width + self.out))

    def scratch(self, inputs: Sequence[Value]) -> int:
        """Return what the places of all experts hold."""
        return self.experts * self.places(inputs) * (inputs[0].width + self.hidden + self.out)

    def reset(self, module: nn.Module, generator: torch.Generator) -> None:
        """Draw the router and the first layer; the last one is zero."""
        bound = module.get_parameter("up").shape[2] ** -0.5
        for name, reach in (("router.weight", bound), ("up", bound), ("down", 0.0)):
            nn.init.uniform_(module.get_parameter(name), -reach, reach, generator)


class TopSoftmax(nn.Module):
    """Softmax over the largest features.

    Args:
        k: how many are kept.

    Shapes:
        x: (B, ..., C); the result is the same.
    """

    def __init__(self, k: int) -> None:
        """Hold the setting; there are no weights."""
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """Return the shares, computed in single precision."""
        largest, places = torch.topk(x.float(), self.k, -1)
        return torch.zeros_like(x).scatter(-1, places, torch.softmax(largest, -1).to(x.dtype))


class BlockProduct(nn.Module):
    """Multiplies blocks of features.

    Args:
        blocks: number of blocks.

    Shapes:
        x: (B, ..., blocks C); shares: (B, ..., blocks); the result is as x.
    """

    def __init__(self, blocks: int) -> None:
        """Hold the setting; there are no weights."""
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        """Return the scaled blocks."""
        return (torch.unflatten(x, -1, (self.blocks, -1)) * shares.unsqueeze(-1)).flatten(-2)


class RoutedExperts(nn.Module):
    """Gathers the tokens of each expert, runs the expert on them, and brings the results back.

    Args:
        router: says where each token goes.
        hidden: hidden features H of each expert.
        out: features of the result.
        fn: activation.
        alone: whether each sample is a single token, without an axis of tokens.
        device: where the weights live.

    Shapes:
        x: (B, T, D) or (B, D); the result has `out` features instead.
    """

    def __init__(self, router: Router, hidden: int, out: int, fn: str, alone: bool, device: str) -> None:
        """Hold router and experts, not yet initialised."""
        super().__init__()
        self.router, self.fn, self.alone = router, fn, alone
        self.up = nn.Parameter(torch.empty(router.experts, hidden, router.width, device=device))
        self.down = nn.Parameter(torch.empty(router.experts, out, hidden, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of what each token's experts made of it."""
        x_BTD = x.unsqueeze(1) if self.alone else x
        tokens_BES, weights_BTE, places_BTE = self.router(x_BTD)
        parts = []
        for number in range(self.router.experts):
            made_BSO = self._expert(_rows(x_BTD, tokens_BES[:, number]), number)
            weight_BT1 = weights_BTE[..., number].unsqueeze(-1).to(made_BSO.dtype)
            parts.append(weight_BT1 * _rows(made_BSO, places_BTE[..., number]))
        result: Tensor = reduce(torch.add, parts)
        return result.squeeze(1) if self.alone else result

    def _expert(self, x_BSD: Tensor, number: int) -> Tensor:
        """Run one expert on its own places; all at once, torch's compiler would ask whether the batch is one."""
        return F.linear(_HIDDEN[self.fn](F.linear(x_BSD, self.up[number])), self.down[number])


def _rows(x_BSD: Tensor, index_BN: Tensor) -> Tensor:
    """Return the rows of each sample that the index names: (B, N, D)."""
    return x_BSD.gather(1, index_BN.unsqueeze(-1).expand(-1, -1, x_BSD.shape[2]))
