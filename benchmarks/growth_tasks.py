"""The six tasks of the growth benchmark: hosts, data, schedules, and what may grow in each arm."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from esper.blueprints import load_library
from esper.blueprints.families import MENUS
from esper.data import ByteText, Digits, EsperDataModule, Shapes, Spirals
from esper.models import MLP, ByteLM, MoEByteLM, SmallCNN
from esper.models.flops import macs, parameter_count

STATIC = ("small", "wide")
FIXED = {"schedule_fixed": "BP-MLP-GELU", "schedule_best": "BP-WIDEN"}
TOKENS = {"schedule_gelu": "BP-MLP-GELU", "schedule_conv": "BP-CONV-CAUSAL", "schedule_dense": "BP-CONV-CAUSAL-DENSE"}
ALIASES = {"schedule_fixed": "schedule_gelu", "schedule_best": "schedule_conv"}
"""What the general names of arms mean on C and D, which had names of their own before there were other tasks."""


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: letter of the task.
        title: what it is, for people.
        model: class of the hosts.
        small: arguments of the host that may grow.
        wide: arguments of the static net of the same final size.
        data: class of the data module.
        data_args: its arguments, without the seed.
        batch: examples in a training batch.
        lr: peak learning rate of AdamW, weight decay .01.
        steps: training steps of `wide` that set the compute of every arm.
        decay: fraction of the run over which the rate decays.
        start: step at which growth begins.
        trial: steps from the germination to the judgement.
        interval: steps between boundaries.
        decision: samples of the decision part, all of which judge.
        targets: places that may grow.
        site: place of the scheduled children.
        menu: what may grow in `live` and `random`.
        proxy: parameters of each proxy of a trial, or a fraction of the host's.
        schedules: kind of the child in each scheduled arm.
        variants: further arms: `live_3` has three growth points that share the budget, `live_shadow` trains the proxies
            in the shadow before they are grafted.
        ranked: the best kind, then the second best where it is known.
        dominant: families of blueprints that are off the menu in `live_no_best`.
        betas: of AdamW.
        warmup: steps of linear warm-up.
        clip: largest norm of the gradients.
        teacher: arguments of the language model that D distils.
        expected: losses of the project's first measurements, by arm.
    """

    name: str
    title: str
    model: type[nn.Module]
    small: Mapping[str, Any]
    wide: Mapping[str, Any]
    data: type[EsperDataModule]
    data_args: Mapping[str, Any]
    batch: int
    lr: float
    steps: int
    decay: float
    start: int
    trial: int
    interval: int
    decision: int
    targets: tuple[str, ...]
    site: str
    menu: tuple[str, ...]
    proxy: float
    schedules: Mapping[str, str]
    ranked: tuple[str, ...]
    dominant: tuple[str, ...]
    variants: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    clip: float | None = None
    teacher: Mapping[str, Any] | None = None
    expected: Mapping[str, str] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm, in the order of the table."""
        return (*STATIC, "random", *self.schedules, "live", "live_no_best", *self.variants)

    def digest(self, arm: str) -> str:
        """Return a hash of the settings that an arm depends on: rows of other settings are not mixed with its own."""
        told = {"title", "schedules", "menu", "variants", "ranked", "dominant", "expected"}
        common = {key: value for key, value in vars(self).items() if key not in told}
        content = repr((common, self.schedules.get(arm), () if arm in STATIC else self.menu_of(arm)))
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def arm(self, name: str) -> str:
        """Return the task's own name of an arm."""
        return name if name in self.arms else ALIASES.get(name, name)

    def host(self, arm: str) -> nn.Module:
        """Return a fresh host for an arm."""
        return self.model(**(self.wide if arm == "wide" else self.small))

    def parameters(self, arm: str) -> int:
        """Return the number of parameters of an arm's host."""
        return parameter_count(self.host(arm))

    def module(self, seed: int) -> EsperDataModule:
        """Return the data in the order of a seed."""
        return self.data(seed=seed, batch_size=self.batch, **self.data_args)

    def example(self) -> Tensor:
        """Return one input, as a batch."""
        found: Tensor = self.module(0).parts.decision[0][0]
        return found.unsqueeze(0)

    def menu_of(self, arm: str) -> tuple[str, ...]:
        """Return what may grow in an arm."""
        if arm != "live_no_best":
            return self.menu
        library = load_library()
        return tuple(name for name in self.menu if library[name].manifest.family not in self.dominant)


@dataclass(frozen=True)
class Account:
    """Compute of a task, in multiply-accumulates of one sample's forward; the budget is that of the whole run.

    Args:
        small: the host that may grow.
        wide: the static wide net.
        teacher: the teacher of D.
        budget: what training `wide` takes.
    """

    small: int
    wide: int
    teacher: int
    budget: int

    @classmethod
    def of(cls, task: Task) -> "Account":
        """Count the hosts; a training step costs three forwards, the teacher's one."""
        example = task.example()
        small, wide = macs(task.host("small"), example), macs(task.host("wide"), example)
        teacher = macs(ByteLM(**task.teacher), example) if task.teacher else 0
        return cls(small, wide, teacher, task.steps * task.batch * (3 * wide + teacher))

    def host(self, arm: str) -> int:
        """Return what an arm's host takes."""
        return self.wide if arm == "wide" else self.small


MLP_TARGETS = ("layers.[02468]",)
TEXT_TARGETS = ("*.after_attn", "*.ffn")
CNN_TARGETS = ("convs.[1-9]",)

SPIRALS = Task(
    name="A",
    title="spirals, perceptron",
    model=MLP,
    small={"widths": (2, 16, 3, 16, 16, 2)},
    wide={"widths": (2, 16, 8, 16, 16, 2)},
    data=Spirals,
    data_args={},
    batch=128,
    lr=5e-3,
    steps=3000,
    decay=0.3,
    start=1500,
    trial=200,
    interval=50,
    decision=1000,
    targets=MLP_TARGETS,
    site="layers.2",
    # One proxy of each must fit into 165 parameters, and one unit of BP-WIDEN takes 49.
    menu=("BP-MLP-GELU", "BP-NORM-RMS", "BP-PROJ-IA3", "BP-PROJ-LORA", "BP-WIDEN"),
    proxy=49,
    schedules=FIXED,
    ranked=("BP-WIDEN", "BP-PROJ-LORA"),
    dominant=("widen",),
)

DIGITS = Task(
    name="B",
    title="digits, perceptron",
    model=MLP,
    small={"widths": (64, 16, 4, 16, 16, 10)},
    wide={"widths": (64, 16, 22, 16, 16, 10)},
    data=Digits,
    data_args={},
    batch=64,
    lr=3e-3,
    steps=1500,
    decay=0.3,
    start=750,
    trial=100,
    interval=50,
    decision=298,
    targets=MLP_TARGETS,
    site="layers.2",
    menu=MENUS["dense"],
    proxy=66,
    schedules=FIXED,
    ranked=(),
    dominant=("widen",),
)

BYTES = Task(
    name="C",
    title="bytes, transformer",
    model=ByteLM,
    small={"ffn": 16},
    wide={"ffn": 58},
    data=ByteText,
    data_args={"steps_per_epoch": 100, "report_windows": 192},
    batch=8,
    lr=3e-3,
    steps=2400,
    decay=0.30,
    start=300,
    trial=200,
    interval=100,
    decision=32,
    targets=TEXT_TARGETS,
    site="blocks.0.after_attn",
    menu=MENUS["transformer"],
    proxy=0.02,
    schedules=TOKENS,
    ranked=("BP-CONV-CAUSAL", "BP-CONV-CAUSAL-DENSE"),
    dominant=("token-conv",),
    variants=("live_3", "live_shadow"),
    betas=(0.9, 0.98),
    warmup=60,
    clip=1.0,
    expected={"small": "1.863", "wide": "1.787", "live": "1.724", "schedule_conv": "1.738", "live_no_best": "1.855"},
)

MIXTURE = Task(
    name="D",
    title="bytes, distilled mixture of experts",
    model=MoEByteLM,
    small={"expert_width": 16},
    wide={"expert_width": 24},
    data=ByteText,
    data_args={"steps_per_epoch": 50, "report_windows": 128},
    batch=8,
    lr=3e-3,
    steps=600,
    decay=0.35,
    start=150,
    trial=100,
    interval=50,
    decision=32,
    targets=TEXT_TARGETS,
    site="blocks.0.after_attn",
    menu=MENUS["transformer"],
    proxy=0.02,
    schedules=TOKENS,
    ranked=(),
    dominant=("token-conv",),
    betas=(0.9, 0.98),
    warmup=40,
    clip=1.0,
    teacher={"d_model": 128, "layers": 3, "heads": 4, "ffn": 384},
    expected={"small": "2.140", "wide": "2.119", "random": "2.112", "live": "1.983", "schedule_conv": "1.960"},
)

DIGITS_CNN = Task(
    name="V1",
    title="digits, small CNN",
    model=SmallCNN,
    small={"widths": (1, 16, 4, 16, 16, 10)},
    wide={"widths": (1, 16, 8, 16, 16, 10)},
    data=Digits,
    data_args={"flat": False},
    batch=64,
    lr=3e-3,
    steps=1000,
    decay=0.3,
    start=150,
    trial=150,
    interval=50,
    decision=298,
    targets=CNN_TARGETS,
    site="convs.1",
    menu=MENUS["vision"],
    proxy=210,
    schedules={"schedule_fixed": "BP-CONV-RES", "schedule_best": "BP-CONV-NEXT"},
    ranked=(),
    dominant=("gate",),
)

SHAPES = Task(
    name="V2",
    title="shapes, small CNN",
    model=SmallCNN,
    small={"widths": (1, 16, 4, 16, 16, 5)},
    wide={"widths": (1, 16, 8, 16, 16, 5)},
    data=Shapes,
    data_args={},
    batch=64,
    lr=3e-3,
    steps=1200,
    decay=0.3,
    start=150,
    trial=150,
    interval=50,
    decision=500,
    targets=CNN_TARGETS,
    site="convs.1",
    menu=MENUS["vision"],
    proxy=210,
    schedules={"schedule_fixed": "BP-CONV-RES", "schedule_best": "BP-CONV-DILATED"},
    ranked=(),
    dominant=("image-conv",),
)

TASKS = {task.name: task for task in (SPIRALS, DIGITS, BYTES, MIXTURE, DIGITS_CNN, SHAPES)}
ARMS = tuple(dict.fromkeys([arm for task in TASKS.values() for arm in task.arms]))


def teacher_of(task: Task, folder: str) -> dict[str, Any]:
    """Return D's teacher as a class to instantiate; it is trained once for each order of the data."""
    network = {"class_path": "esper.models.ByteLM", "init_args": dict(task.teacher or {})}
    return {"class_path": "esper.tolaria.teacher.CachedTeacher", "init_args": {"network": network, "cache_dir": folder}}


def goal_of(task: Task, teachers: str) -> dict[str, Any]:
    """Return what a task is trained for, as a class to instantiate."""
    if task.teacher is not None:
        args = {"teacher": teacher_of(task, teachers), "router_z": 0.0}
        return {"class_path": "esper.tolaria.tasks.Distillation", "init_args": args}
    name = "LanguageModeling" if task.data is ByteText else "Classification"
    return {"class_path": f"esper.tolaria.tasks.{name}"}
