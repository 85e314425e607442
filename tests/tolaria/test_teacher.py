"""The cached teacher: one recipe, one teacher."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file

from esper.data import ByteText
from esper.leyline.errors import ConfigError
from esper.models import ByteLM
from esper.tolaria.tasks import Distillation
from esper.tolaria.teacher import CachedTeacher


def data(seed: int = 0) -> ByteText:
    return ByteText(context=16, batch_size=4, steps_per_epoch=3, seed=seed, decision_windows=4, report_windows=4)


def source(folder: Path, **given: int) -> CachedTeacher:
    network = ByteLM(d_model=16, layers=1, heads=given.pop("heads", 2), ffn=8, context=16)
    return CachedTeacher(network=network, steps=3, cache_dir=str(folder), **given)


def test_it_is_trained_once_and_read_afterwards(tmp_path: Path) -> None:
    first = source(tmp_path).teacher(data())
    files = list(tmp_path.iterdir())
    stamp = files[0].stat().st_mtime_ns
    second = source(tmp_path).teacher(data())
    assert [f.suffix for f in files] == [".safetensors"]
    assert files[0].stat().st_mtime_ns == stamp
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_outer_random_state_has_no_part_in_it(tmp_path: Path) -> None:
    def trained(outer: int) -> list[torch.Tensor]:
        torch.manual_seed(outer)
        teacher = source(tmp_path / str(outer)).teacher(data())
        return list(teacher.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained(1), trained(2), strict=True))


def test_everything_that_makes_another_teacher_makes_another_key(tmp_path: Path) -> None:
    plain = source(tmp_path).key(data())
    others = [
        source(tmp_path, heads=4).key(data()),
        source(tmp_path, seed=1).key(data()),
        source(tmp_path).key(data(seed=1)),
    ]
    assert len({plain, *others}) == 4
    assert source(tmp_path).key(data()) == plain


def test_it_starts_from_the_models_own_initialisation(tmp_path: Path) -> None:
    fresh = source(tmp_path)._fresh()
    assert 0.03 < float(fresh.get_submodule("embedding").weight.detach().std()) < 0.05  # type: ignore[union-attr,operator]


def test_a_damaged_cache_is_trained_again(tmp_path: Path) -> None:
    source(tmp_path).teacher(data())
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"nonsense")
    source(tmp_path).teacher(data())
    assert load_file(file)


def test_the_data_module_keeps_its_trainer(tmp_path: Path) -> None:
    module = data()
    module.trainer = outer = object()  # type: ignore[assignment]
    source(tmp_path).teacher(module)
    assert module.trainer is outer  # type: ignore[comparison-overlap]


def test_without_data_there_is_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data module"):
        source(tmp_path).teacher(None)


def test_a_student_of_itself_has_nothing_to_learn_from_the_teachers_part(tmp_path: Path) -> None:
    task = Distillation(teacher=source(tmp_path), share=1.0)
    module: LightningDataModule = data()
    task.prepare(module)
    assert task.teacher is not None
    student = ByteLM(d_model=16, layers=1, heads=2, ffn=8, context=16)
    student.load_state_dict(task.teacher.state_dict())
    batch = next(iter(module.val_dataloader()))
    assert float(task.losses(student, batch).objective.detach()) == pytest.approx(0.0, abs=1e-5)
    other = ByteLM(d_model=16, layers=1, heads=2, ffn=8, context=16)
    assert float(task.losses(other, batch).objective.detach()) > 0.0


@pytest.mark.parametrize("bad", [{"share": 1.5}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(tmp_path: Path, bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        Distillation(teacher=source(tmp_path), **bad)  # type: ignore[arg-type]
