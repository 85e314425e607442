"""What a model is trained for: the loss of a batch, and the loss of each of its samples.

Shape letters: B samples, T tokens, V vocabulary, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F

from esper.leyline.errors import ConfigError


class StepLosses(NamedTuple):
    """Losses of one batch.

    Args:
        objective: scalar that training minimises.
        samples_B: task loss of each sample, comparable between models.
        metrics: further scalars by name.
    """

    objective: Tensor
    samples_B: Tensor
    metrics: dict[str, Tensor]


class Task(ABC):
    """Turns a network and a batch into losses."""

    @abstractmethod
    def losses(self, network: nn.Module, batch: Any) -> StepLosses:
        """Return the losses of a batch."""

    def prepare(self, data: LightningDataModule | None) -> None:
        """Get ready for training; called once before the fit."""
        return

    def release(self) -> None:
        """Let go of what only training needs; called once after the fit."""
        return


@final
class Classification(Task):
    """Cross-entropy over classes; batches are `(x [B, ...], label [B])`.

    Example:
        >>> task = Classification()
        >>> step = task.losses(nn.Linear(2, 3), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)))
        >>> step.samples_B.shape
        torch.Size([4])
    """

    def losses(self, network: nn.Module, batch: Any) -> StepLosses:
        """Return cross-entropy and accuracy."""
        x, label_B = batch
        logits_BC = network(x)
        samples_B = F.cross_entropy(logits_BC, label_B, reduction="none")
        accuracy = (logits_BC.argmax(-1) == label_B).float().mean()
        return StepLosses(samples_B.mean(), samples_B, {"accuracy": accuracy})


@final
class LanguageModeling(Task):
    """Next-token cross-entropy in nats; batches are `(tokens [B, T], targets [B, T])`.

    `objective = mean CE + balance * load_balance + router_z * router_z_loss`, the last two where the network has
    `auxiliary_losses()`.

    Args:
        balance: weight of a mixture's load-balancing loss.
        router_z: weight of a mixture's router z-loss.
    """

    def __init__(self, *, balance: float = 0.01, router_z: float = 0.001) -> None:
        """Remember the weights."""
        self.balance, self.router_z = balance, router_z

    def losses(self, network: nn.Module, batch: Any) -> StepLosses:
        """Return the losses of a batch."""
        tokens_BT, targets_BT = batch
        samples_B = _token_losses(network(tokens_BT), targets_BT)
        extra = _auxiliary(network, self.balance, self.router_z)
        return StepLosses(samples_B.mean() + extra, samples_B, {})


@final
class Distillation(Task):
    """Learn from data and from a teacher at once (Hinton et al., 2015).

    `objective = (1 - share) * CE + share * t^2 * KL(teacher || student) / (B T) + balance * load_balance + router_z *
    router_z_loss`, with both distributions softened by the temperature t. The teacher is no part of the student: it is
    frozen, and neither optimized nor saved. Where one of the two has more outputs, as padding, only those that both
    have are compared.

    Args:
        teacher: where the teacher comes from.
        share: weight of the teacher's part, in [0, 1].
        temperature: t, above 0.
        balance: weight of a mixture's load-balancing loss.
        router_z: weight of a mixture's router z-loss.
    """

    def __init__(
        self,
        *,
        teacher: "TeacherSource",
        share: float = 0.5,
        temperature: float = 1.0,
        balance: float = 0.01,
        router_z: float = 0.001,
    ) -> None:
        """Remember the settings; the teacher is made in `prepare`."""
        if not 0 <= share <= 1 or temperature <= 0:
            raise ConfigError(f"share={share} must be in [0, 1] and temperature={temperature} above 0.")
        self.source, self.share, self.temperature = teacher, share, temperature
        self.balance, self.router_z = balance, router_z
        self.teacher: nn.Module | None = None

    def prepare(self, data: LightningDataModule | None) -> None:
        """Load the teacher, or train it once."""
        self.teacher = self.source.teacher(data).eval().requires_grad_(False)

    def release(self) -> None:
        """Forget the teacher, whose memory may be larger than the student's."""
        self.teacher = None

    def losses(self, network: nn.Module, batch: Any) -> StepLosses:
        """Return the losses of a batch; without gradients the teacher is not asked."""
        tokens_BT, targets_BT = batch
        logits_BTV = network(tokens_BT)
        samples_B = _token_losses(logits_BTV, targets_BT)
        objective = samples_B.mean()
        if torch.is_grad_enabled():
            kl = self._divergence(logits_BTV, tokens_BT)
            objective = (1 - self.share) * objective + self.share * kl
            objective = objective + _auxiliary(network, self.balance, self.router_z)
        return StepLosses(objective, samples_B, {})

    def _divergence(self, logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
        if self.teacher is None:
            raise ConfigError("the teacher is not ready; call prepare(data) before training.")
        t = self.temperature
        with torch.no_grad():
            known_BTV = self.teacher.to(tokens_BT.device)(tokens_BT)
            shared = min(known_BTV.shape[-1], logits_BTV.shape[-1])
            wanted = (known_BTV[..., :shared].float() / t).log_softmax(-1).flatten(0, 1)
        given = (logits_BTV[..., :shared].float() / t).log_softmax(-1).flatten(0, 1)
        return t**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)


class TeacherSource(ABC):
    """Gives a trained teacher."""

    @abstractmethod
    def teacher(self, data: LightningDataModule | None) -> nn.Module:
        """Return the teacher, trained."""


def _token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
    return losses.view(targets_BT.shape).mean(-1)


def _auxiliary(network: nn.Module, balance: float, router_z: float) -> Tensor:
    host = getattr(network, "host", network)
    auxiliary: Callable[[], dict[str, Tensor]] | None = getattr(host, "auxiliary_losses", None)
    found = auxiliary() if auxiliary is not None else {}
    weights = {"load_balance": balance, "router_z": router_z}
    return sum((weights[name] * value for name, value in found.items() if name in weights), torch.zeros(()))
