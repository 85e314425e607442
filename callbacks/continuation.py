"""What a byte-level language model says while it learns and grows."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from esper.leyline.errors import ConfigError


class Continuation(Callback):
    """Let the model continue a prompt after validations, and add what it says to a file.

    The likeliest byte follows each time, so no random number is drawn and the run stays what it was, bit for bit.

    Args:
        prompt: text to go on from.
        length: bytes to add, at least 1.
        every: steps between continuations, at least 1; each falls on the first validation that is due.
        context: longest input of the model, in bytes.
        file: name of the file in the run's folder.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> from esper.models import ByteLM
        >>> len(continued(ByteLM(d_model=8, heads=2), "def ", length=3, context=128))
        3
    """

    def __init__(
        self,
        *,
        prompt: str = "def ",
        length: int = 80,
        every: int = 500,
        context: int = 128,
        file: str = "continuations.txt",
    ) -> None:
        """Check the settings."""
        if not prompt or min(length, every, context) < 1:
            raise ConfigError(
                f"prompt={prompt!r}, length={length}, every={every}, context={context}; give a text that is not "
                "empty and numbers of at least 1."
            )
        self.prompt, self.length, self.every, self.context, self.file = prompt, length, every, context, file
        self._due = every

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a continuation if one is due."""
        if trainer.sanity_checking or trainer.global_step < self._due:
            return
        self._due = trainer.global_step + self.every
        said = continued(pl_module, self.prompt, length=self.length, context=self.context)
        if trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir) / self.file, trainer.global_step, said)

    def _write(self, file: Path, step: int, said: bytes) -> None:
        text = (self.prompt.encode() + said).decode(errors="replace")
        with file.open("a", encoding="utf-8") as target:
            target.write(f"--- step {step}\n{text}\n")

    def state_dict(self) -> dict[str, Any]:
        """Return when the next one is due, for a checkpoint."""
        return {"due": self._due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._due = int(state_dict["due"])


@torch.no_grad()
def continued(model: nn.Module, prompt: str, *, length: int, context: int) -> bytes:
    """Return the bytes that a model finds likeliest after a prompt, one after the other.

    Shapes:
        The model takes `[1, T] int64` with T <= context and returns logits `[1, T, 256]`.
    """
    device = next(model.parameters()).device
    text = torch.tensor([list(prompt.encode())], device=device)
    trained = {module: module.training for module in model.modules()}
    model.eval()
    for _ in range(length):
        logits: Tensor = model(text[:, -context:])
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
    for module, training in trained.items():
        module.training = training
    return bytes(text[0, -length:].tolist())
