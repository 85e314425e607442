"""Distilling language models of the transformers library: what fits, the losses, and runs of the experiment."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import esper
from esper.data import ByteText, TokenText
from esper.leyline.errors import ConfigError
from esper.models.causal_lm import CausalLM
from esper.run import run
from esper.tolaria.pretrained import PretrainedTeacher, check_vocabularies, distilled_lm
from esper.tolaria.tasks import Distillation
from tests.hf_models import gpt2, llama, mixtral, saved, text, tokenizer
from tests.test_conf import composed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama teacher, students with and without experts, weights or tokenizers, and a text."""
    root, tokens = tmp_path_factory.mktemp("distil"), tokenizer()
    saved(root / "teacher", llama(len(tokens)), tokens)
    saved(root / "mixtral", mixtral(len(tokens)), tokens)
    saved(root / "padded", gpt2(len(tokens) + 20), tokens)
    saved(root / "bare", mixtral(len(tokens), 16), weights=False)
    saved(root / "small", gpt2(len(tokens) - 1, 16), weights=False)
    saved(root / "foreign", gpt2(200), tokenizer(290, learn_from="other words of another text " * 40))
    (root / "own.txt").write_text(text(150_000), encoding="utf-8")
    return root


def data(files: Path, name: str = "teacher") -> TokenText:
    sizes = {"context": 16, "batch_size": 4, "steps_per_epoch": 3, "decision_windows": 4, "report_windows": 4}
    return TokenText(tokenizer=str(files / name), path=str(files / "own.txt"), **sizes)  # type: ignore[arg-type]


def network(files: Path, student: str, **given: Any) -> CausalLM:
    return CausalLM(name=str(files / student), **given)


def prepared(files: Path, **given: Any) -> Distillation:
    task = Distillation(teacher=PretrainedTeacher(name=str(files / "teacher")), **given)
    task.prepare(data(files))
    return task


def test_the_objective_is_that_of_its_formula(files: Path) -> None:
    task = prepared(files, share=0.3, temperature=2.0, balance=5.0, router_z=7.0)
    student = network(files, "mixtral")
    x, y = next(iter(data(files).val_dataloader()))
    step = task.losses(student, (x, y))
    teacher = network(files, "teacher").eval()
    with torch.no_grad():
        wanted, given = (m(x).div(2.0).log_softmax(-1) for m in (teacher, student))
        ce = F.cross_entropy(student(x).transpose(1, 2), y)
    kl = (wanted.exp() * (wanted - given)).sum(-1).mean()
    student(x)
    found = {name: float(value.detach()) for name, value in student.auxiliary_losses().items()}
    expected = 0.7 * float(ce) + 0.3 * 4.0 * float(kl) + 5.0 * found["load_balance"] + 7.0 * found["router_z"]
    assert float(step.objective.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_student_with_padded_outputs_learns_from_a_teacher_without(files: Path) -> None:
    task, student = prepared(files, share=1.0), network(files, "padded")
    step = task.losses(student, next(iter(data(files).val_dataloader())))
    step.objective.backward()
    assert torch.isfinite(step.objective)
    assert 0 < float(step.objective.detach()) < 10


def test_the_teacher_is_frozen_evaluating_and_gone_after_the_fit(files: Path) -> None:
    module = distilled_lm(teacher=str(files / "teacher"), student=str(files / "mixtral"))
    task = module.task
    assert isinstance(task, Distillation)
    task.prepare(data(files))
    assert task.teacher is not None
    assert not task.teacher.training and not any(p.requires_grad for p in task.teacher.parameters())
    assert {id(p) for p in task.teacher.parameters()}.isdisjoint(id(p) for p in module.parameters())
    assert len(module.state_dict()) == len(network(files, "mixtral").state_dict())
    module.teardown("fit")
    assert task.teacher is None


def test_a_half_precision_teacher_says_about_the_same(files: Path) -> None:
    batch = next(iter(data(files).val_dataloader()))
    student = network(files, "mixtral")
    full, half = prepared(files, share=1.0), prepared(files, share=1.0)
    half.source = PretrainedTeacher(name=str(files / "teacher"), dtype="bfloat16")
    half.prepare(data(files))
    a, b = (float(task.losses(student, batch).objective.detach()) for task in (full, half))
    assert a == pytest.approx(b, abs=0.01) and a != b


def test_other_tokens_are_refused_with_both_sizes(files: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher, .*300 tokens.*foreign, .*\d+; they differ .*start=config"):
        check_vocabularies(str(files / "teacher"), str(files / "foreign"))
    with pytest.raises(ConfigError, match="do not share a vocabulary"):
        Distillation(teacher=PretrainedTeacher(name=str(files / "teacher"))).prepare(data(files, "foreign"))


def test_a_student_with_too_few_outputs_is_refused(files: Path) -> None:
    with pytest.raises(ConfigError, match="small has vocab_size 299, its tokenizer 300 tokens; set it"):
        check_vocabularies(str(files / "teacher"), str(files / "small"))


def test_a_random_student_may_leave_its_own_tokenizer_aside(files: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size 200"):
        check_vocabularies(str(files / "teacher"), str(files / "foreign"), own_tokens=False)
    check_vocabularies(str(files / "teacher"), str(files / "bare"))


def test_text_without_tokens_is_refused(files: Path) -> None:
    source = PretrainedTeacher(name=str(files / "teacher"))
    for given in (ByteText(), None):
        with pytest.raises(ConfigError, match=r"esper\.data\.TokenText"):
            source.teacher(given)


def settings(files: Path, student: str) -> list[str]:
    small = ["context=32", "steps_per_epoch=40", "decision_windows=16", "report_windows=16"]
    quick = ["start=5", "menu=[BP-WIDEN,BP-CONV-CAUSAL]", "budget=4000", "proxy=1500"]
    return [
        *("+experiment=moe_distill_hf", f"model.teacher={files / 'teacher'}", f"model.student={files / student}"),
        *(f"data.path={files / 'own.txt'}", "trainer.val_check_interval=10", "trainer.enable_progress_bar=false"),
        *(f"data.init_args.{setting}" for setting in small),
        *(f"tamiyo.settings.{setting}" for setting in quick),
        *("tamiyo.kasmina.stabilization_steps=5", "tamiyo.kasmina.ramp_steps=3"),
        *("model.init_args.warmup_steps=5", "model.init_args.optimizer.init_args.lr=0.005"),
    ]


@pytest.mark.slow
def test_the_experiment_distils_grows_and_compares(files: Path, tmp_path: Path) -> None:
    command = [sys.executable, "train.py", *settings(files, "mixtral"), f"hydra.run.dir={tmp_path}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    summary = json.loads((tmp_path / "growth.json").read_text())
    assert summary["steps"] == 40
    assert summary["grafts"] and all(graft["seed_id"].startswith("lm.model.layers") for graft in summary["grafts"])
    assert "without" in ran.stdout and "report loss" in ran.stdout
    assert (tmp_path / "twin" / "growth.json").is_file()
    decision = [loss for _, loss in summary["losses"]["decision"]]
    assert decision[-1] < decision[0] - 0.2
    checkpoint = torch.load(next((tmp_path / "checkpoints").iterdir()), weights_only=True)
    assert not any("teacher" in name for name in checkpoint["state_dict"])
    students = sum(p.numel() for p in network(files, "mixtral").parameters())
    assert sum(t.numel() for n, t in checkpoint["state_dict"].items() if n.startswith("network.")) == students
    again = esper.load_model(tmp_path / "model")
    assert again.host_parameters() == students
    prompt = torch.zeros(1, 3, dtype=torch.long)
    assert again.host.get_submodule("lm").generate(prompt, max_new_tokens=4).shape == (1, 7)  # type: ignore[operator]


@pytest.mark.slow
def test_the_experiment_takes_a_configuration_without_weights_or_tokenizer(files: Path, tmp_path: Path) -> None:
    given = [
        "compare=false",
        "data.init_args.steps_per_epoch=20",
        "model.init_args.gradient_checkpointing=true",
        "model.init_args.teacher_dtype=bfloat16",
        "tamiyo.settings.overhead=null",
    ]
    outcome = run(composed(*settings(files, "bare"), *given, folder=tmp_path))
    assert outcome.grown.grafts
    assert outcome.grown.report_loss is not None and outcome.grown.report_loss < 6


def test_what_does_not_fit_is_said_before_anything_is_read(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not share a vocabulary"):
        run(composed(*settings(files, "foreign"), folder=tmp_path))
    with pytest.raises(ConfigError, match=r"model\.teacher is not set"):
        run(composed("+experiment=moe_distill_hf", folder=tmp_path))
