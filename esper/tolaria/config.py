"""Settings of a training run without Hydra or the command line."""

from typing import Any, Literal

from pydantic import Field

from esper.config import Settings


class ClassSpec(Settings):
    """A class and its constructor arguments, as in the Lightning command line.

    Args:
        class_path: import path, e.g. `esper.data.Digits`.
        init_args: keyword arguments.
    """

    class_path: str
    init_args: dict[str, Any] = Field(default_factory=dict)


class TolariaConfig(Settings):
    """How a model is trained.

    Args:
        data: data module with training, decision (validation) and report (test) parts.
        task: loss of a batch.
        optimizer: torch optimizer.
        max_epochs: passes over the training part; -1 for no bound.
        max_steps: optimizer steps; -1 for no bound.
        val_check_interval: training batches between boundaries; None for one boundary an epoch.
        gradient_clip_val: clip gradient norms, host and children apart; None does not clip.
        warmup_steps: linear warm-up of the learning rate.
        decay: fraction of the run over which the rate decays at the end.
        floor: final rate as a fraction of the peak.
        child_lr_scale: ratio of a child's learning rate to the host's.
        child_warmup_steps: optimizer steps from birth to a child's full learning rate.
        precision: as in Lightning, e.g. `32-true` or `bf16-mixed`.
        accelerator: `auto`, `cpu` or `gpu`.
        seed: seed of the run; None leaves the random state alone.
        output_dir: folder of logs, checkpoints and reports.
        checkpoint: whether to keep the last checkpoint in `output_dir/checkpoints`.
        progress: whether to show a progress bar.
    """

    data: ClassSpec | None = None
    task: ClassSpec = ClassSpec(class_path="esper.tolaria.tasks.Classification")
    optimizer: ClassSpec = ClassSpec(class_path="torch.optim.AdamW", init_args={"lr": 3e-3, "weight_decay": 0.01})
    max_epochs: int = Field(default=10, ge=-1)
    max_steps: int = Field(default=-1, ge=-1)
    val_check_interval: int | None = Field(default=None, ge=1)
    gradient_clip_val: float | None = Field(default=None, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay: float = Field(default=0.3, ge=0, le=1)
    floor: float = Field(default=0.05, ge=0, le=1)
    child_lr_scale: float = Field(default=1.0, gt=0)
    child_warmup_steps: int = Field(default=0, ge=0)
    precision: str = "32-true"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    seed: int | None = Field(default=0, ge=0)
    output_dir: str = "outputs"
    checkpoint: bool = False
    progress: bool = False
