"""Where each token goes: a router with bounded experts and an even load.

Letters in shapes: B batch, T tokens, D features read, E experts, K experts of a token, S places of an expert.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints.state import StatefulModule, with_loss

Balance = Literal["none", "loss", "bias"]
"""What evens the load of the experts out."""

_FADE = 0.9
"""Share of an expert's mean load that a forward pass leaves as it was."""


class Router(StatefulModule):
    """Chooses experts for each token and gives it a place with each, as long as there is one.

    An expert takes a token while it holds fewer than `capacity` percent of an even share of the tokens up to this one.

    Args:
        width: features that it reads.
        experts: number of experts E.
        k: experts of each token.
        capacity: share of the tokens that an expert takes, in percent of an even split.
        balance: what evens the load out.
        strength: weight of the auxiliary loss, or move of the offset.
        device: where the weights live.

    Shapes:
        x: (B, T, D). Results: tokens (B, E, S), the token at each place; weights (B, T, E), zero for an expert that the
        token has no place with; places (B, T, E), the token's place with it. What is empty is 0.
    """

    bias: Tensor
    load: Tensor
    recent: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        k: int,
        capacity: int,
        *,
        balance: Balance = "none",
        strength: float = 0.01,
        device: str = "cpu",
    ) -> None:
        """Hold the weights, not yet initialised, and an even load."""
        super().__init__()
        self.width, self.experts, self.k, self.capacity = width, experts, k, capacity
        self.balance, self.strength = balance, strength
        self.weight = nn.Parameter(torch.empty(experts, width, device=device))
        if balance == "bias":
            even = torch.full((experts,), 1 / experts, device=device)
            for name, start in (("bias", torch.zeros_like(even)), ("load", even), ("recent", even.clone())):
                self.register_buffer(name, start)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, weights and places."""
        chances_BTE = torch.softmax(F.linear(x, self.weight).float(), -1)
        wanted_BTE = chances_BTE.detach()
        if self.balance == "bias":
            self._lean_against()
            wanted_BTE = wanted_BTE + self.bias
        asked_BTE = F.one_hot(torch.topk(wanted_BTE, self.k, -1).indices, self.experts).sum(2)
        self._remember(asked_BTE)
        if self.balance == "loss" and self.training and self.weight.requires_grad:
            chances_BTE = with_loss(chances_BTE, self.strength * uneven(chances_BTE, asked_BTE / self.k))
        takes_BTE, places_BTE, tokens = self._seated(asked_BTE)
        weights_BTE = chances_BTE * asked_BTE
        if self.k > 1:
            weights_BTE = weights_BTE / weights_BTE.sum(-1, keepdim=True)
        return tokens, weights_BTE * takes_BTE, places_BTE

    def _seated(self, asked_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give places in the order of the tokens; return who takes one, which, and the token of each place."""
        per_expert, tokens = 100 * self.experts, asked_BTE.shape[1]
        number_T1 = asked_BTE.new_ones(tokens).cumsum(0).unsqueeze(-1)
        limit_T1 = -(-number_T1 * (self.k * self.capacity) // per_expert)
        asked_so_far = asked_BTE.cumsum(1)
        # Whoever comes to a full expert is lost to it for good: those lost so far are the most that were ever too many.
        lost_BTE = torch.cummax((asked_so_far - limit_T1).clamp_min(0), 1).values
        held_BTE = asked_so_far - lost_BTE
        takes_BTE = held_BTE > F.pad(held_BTE, (0, 0, 1, 0)).narrow(1, 0, tokens)
        places = -(-tokens * self.k * self.capacity // per_expert)
        place_BTE = torch.where(takes_BTE, held_BTE - 1, places)
        empty = asked_BTE.new_zeros(asked_BTE.shape[0], places + 1, self.experts)
        seated = empty.scatter(1, place_BTE, (number_T1 - 1).expand_as(place_BTE)).narrow(1, 0, places)
        return takes_BTE, place_BTE * takes_BTE, seated.transpose(1, 2)

    def _lean_against(self) -> None:
        """Move the offsets against the mean load; what the last pass has found counts from here on."""
        if not (self.observes() and self.weight.requires_grad):
            return
        with torch.no_grad():
            self.load.lerp_(self.recent, 1 - _FADE)
            self.bias.add_(torch.sign(1 / self.experts - self.load), alpha=self.strength)

    def _remember(self, asked_BTE: Tensor) -> None:
        if self.balance == "bias" and self.observes() and asked_BTE.numel():
            with torch.no_grad():
                self.recent.copy_(asked_BTE.float().mean((0, 1)) / self.k)


def uneven(chances_BTE: Tensor, load_BTE: Tensor) -> Tensor:
    """Return how uneven the load is: `E * sum_e load_e * chance_e`, means over all tokens; 1 where it is even.

    The load has no gradient, the chances have: this is the auxiliary loss of Fedus et al., 2021, before its factor.

    Example:
        >>> even = torch.full((1, 4, 2), 0.5)
        >>> float(uneven(even, even))
        1.0
    """
    experts = chances_BTE.shape[-1]
    return experts * (load_BTE.detach().float().mean((0, 1)) * chances_BTE.mean((0, 1))).sum()
