"""Distil one pretrained language model into another: the teacher, and the module that trains the student."""

from typing import Any, final

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from esper import hub
from esper.leyline.errors import ConfigError
from esper.models.causal_lm import CausalLM, Start
from esper.tolaria.module import TolariaModule
from esper.tolaria.tasks import Distillation, TeacherSource


@final
class PretrainedTeacher(TeacherSource):
    """A causal language model of the transformers library, used as it is.

    Args:
        name: a folder, or a name on the Hub.
        dtype: `float32`, `bfloat16` or `float16`: the type its weights are held in.
    """

    def __init__(self, *, name: str | None, dtype: str = "float32") -> None:
        """Remember the name; weights are read when training starts."""
        self.name, self.dtype = name, dtype

    def teacher(self, data: LightningDataModule | None) -> nn.Module:
        """Return the teacher with its weights.

        Raises:
            ConfigError: the data are not in the teacher's tokens, or the teacher cannot be read.
        """
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is None:
            given = type(data).__name__ if data is not None else "no data module"
            raise ConfigError(
                f"a pretrained teacher needs text in its own tokens, and {given} has no tokenizer; "
                "train on esper.data.TokenText."
            )
        own = hub.read_tokenizer(self.name, setting="model.teacher")
        require_same_tokens(own, tokenizer, teacher=f"{self.name}", student=f"{getattr(data, 'tokenizer_name', '')}")
        rank_zero_info(f"Esper: reading the teacher {self.name}.")
        return CausalLM(name=self.name, start="weights", dtype=self.dtype, setting="model.teacher")


def distilled_lm(
    *,
    teacher: str | None = None,
    student: str | None = None,
    start: Start = "auto",
    student_dtype: str = "float32",
    teacher_dtype: str = "float32",
    gradient_checkpointing: bool = False,
    share: float = 0.5,
    temperature: float = 1.0,
    balance: float = 0.01,
    router_z: float = 0.001,
    optimizer: OptimizerCallable = torch.optim.AdamW,
    warmup_steps: int = 0,
    decay: float = 0.3,
    floor: float = 0.05,
    total_steps: int | None = None,
) -> TolariaModule:
    """Return the module that distils any causal language model into any other with the same vocabulary.

    Args:
        teacher: a folder, or a name on the Hub; it is frozen, and neither optimized nor saved.
        student: a folder, or a name on the Hub. A folder with only config.json starts from random weights.
        start: `auto`, `weights` or `config`, see `CausalLM`.
        student_dtype: type of the student's weights; `float32` for mixed precision.
        teacher_dtype: type of the teacher's weights.
        gradient_checkpointing: recompute the student's activations: less memory, about a third more time.
        share: weight of the teacher's part of the loss, in [0, 1].
        temperature: softening of both distributions, above 0.
        balance: weight of the load-balancing loss of a student with experts.
        router_z: weight of its routers' z-loss.
        optimizer: makes the optimizer from the student's parameters.
        warmup_steps: linear warm-up of the learning rate, in optimizer steps.
        decay: fraction of the run over which the rate decays linearly at the end.
        floor: final rate as a fraction of the peak.
        total_steps: length of the schedule; None takes the trainer's.

    Raises:
        ConfigError: a model is not there, or the two do not share a vocabulary.
    """
    # Tokenizers are small: what does not fit together is said before gigabytes are read.
    check_vocabularies(teacher, student, own_tokens=start != "config")
    network = CausalLM(
        name=student,
        start=start,
        dtype=student_dtype,
        gradient_checkpointing=gradient_checkpointing,
        setting="model.student",
    )
    task = Distillation(
        teacher=PretrainedTeacher(name=teacher, dtype=teacher_dtype),
        share=share,
        temperature=temperature,
        balance=balance,
        router_z=router_z,
    )
    return TolariaModule(
        network=network,
        task=task,
        optimizer=optimizer,
        warmup_steps=warmup_steps,
        decay=decay,
        floor=floor,
        total_steps=total_steps,
    )


def check_vocabularies(teacher: str | None, student: str | None, *, own_tokens: bool = True) -> None:
    """Check that two models can speak of the same tokens.

    Args:
        teacher: a folder, or a name on the Hub.
        student: a folder, or a name on the Hub.
        own_tokens: whether the student has learnt the tokens of its own tokenizer, if there is one.

    Raises:
        ConfigError: the tokenizers differ, or a model has fewer outputs than there are tokens.
    """
    tokens = hub.read_tokenizer(teacher, setting="model.teacher")
    folder = hub.folder_of(student, setting="model.student")
    if own_tokens and hub.has_tokenizer(folder):
        own = hub.read_tokenizer(student, setting="model.student")
        require_same_tokens(tokens, own, teacher=f"{teacher}", student=f"{student}")
    for role, name in (("teacher", teacher), ("student", student)):
        config = hub.read_config(hub.folder_of(name, setting=f"model.{role}"), setting=f"model.{role}")
        outputs = int(config.get_text_config().vocab_size)
        if outputs < len(tokens):
            raise ConfigError(
                f"the {role} {name} has vocab_size {outputs:,}, its tokenizer {len(tokens):,} tokens; set it "
                f"to at least {len(tokens):,} in its config.json, or choose another {role}."
            )


def require_same_tokens(teachers: Any, students: Any, *, teacher: str, student: str) -> None:
    """Check that two tokenizers give every token the same number.

    Raises:
        ConfigError: they do not; both are named with their sizes.
    """
    theirs, own = teachers.get_vocab(), students.get_vocab()
    if theirs == own:
        return
    differing = sorted({token for token, _ in theirs.items() ^ own.items()})
    raise ConfigError(
        "teacher and student do not share a vocabulary: the teacher's tokenizer "
        f"({teacher}, {type(teachers).__name__}) has {len(theirs):,} tokens, the student's "
        f"({student}, {type(students).__name__}) {len(own):,}; they differ in {len(differing):,}, e.g. "
        f"{differing[0]!r}. Choose two models of one family; or start the student from random weights in the teacher's "
        "tokens: its vocab_size in the student's config.json, model.start=config, and data.tokenizer=TEACHER."
    )
