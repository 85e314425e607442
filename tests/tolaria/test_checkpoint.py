"""A damaged checkpoint is refused with one clear error, whatever the damage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import esper
from esper.data import Digits
from esper.leyline.errors import CheckpointError
from esper.models import MLP
from esper.run import EsperCLI
from esper.tolaria.checkpoint import FORMAT, digests, migrate, require_readable
from tests.helpers import QUICK, Plain, digits, grow, planting, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
EPOCH = "checkpoints/epoch=7.ckpt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run in which something grew."""
    folder = tmp_path_factory.mktemp("run")
    grow(folder)
    return folder / EPOCH


def resume(folder: Path, checkpoint: Path) -> Plain:
    module = Plain()
    callback = esper.Tamiyo("schedule", kasmina=QUICK, settings=planting(), targets=["net.*"])
    trainer(folder, callback, epochs=9).fit(module, datamodule=digits(), ckpt_path=checkpoint)
    return module


def changed(source: Path, target: Path, change: Any) -> Path:
    content = torch.load(source, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


def flipped(source: Path, target: Path, name: str) -> Path:
    """Flip one bit of a tensor where it lies in the file."""
    content = bytearray(source.read_bytes())
    wanted = torch.load(source, weights_only=True)["state_dict"][name].numpy().tobytes()
    content[content.index(wanted) + len(wanted) // 2] ^= 1
    target.write_bytes(bytes(content))
    return target


def test_an_undamaged_checkpoint_resumes(saved: Path, tmp_path: Path) -> None:
    assert len(resume(tmp_path, saved).train_losses) == 10


@pytest.mark.parametrize("where", ["net.0.weight", "the child"])
def test_one_flipped_bit_is_found(saved: Path, tmp_path: Path, where: str) -> None:
    names = torch.load(saved, weights_only=True)["state_dict"]
    name = where if where in names else next(n for n in names if ".child." in n and n.endswith("weight"))
    damaged = flipped(saved, tmp_path / "damaged.ckpt", name)
    with pytest.raises(CheckpointError, match=f"damaged: '{name}'"):
        resume(tmp_path, damaged)
    with pytest.raises(CheckpointError, match="wrong checksum"):
        require_readable(damaged)


def test_weights_alone_do_not_resume(saved: Path, tmp_path: Path) -> None:
    weights = changed(saved, tmp_path / "weights.ckpt", lambda content: content.pop("optimizer_states"))
    with pytest.raises(CheckpointError, match="weights only"):
        resume(tmp_path, weights)
    with pytest.raises(CheckpointError, match="save_weights_only=False"):
        require_readable(weights, resuming=True)
    require_readable(weights)


@pytest.mark.parametrize("entry", [None, 3, {}, {"format": 99}])
def test_the_entry_itself(saved: Path, tmp_path: Path, entry: Any) -> None:
    other = changed(saved, tmp_path / "other.ckpt", lambda content: content.update(esper=entry))
    if entry is None:
        resume(tmp_path, other)
    else:
        with pytest.raises(CheckpointError, match="another format"):
            resume(tmp_path, other)


def test_a_checkpoint_made_without_growth_resumes(tmp_path: Path) -> None:
    trainer(tmp_path, None).fit(Plain(), datamodule=digits())
    assert len(resume(tmp_path / "resumed", tmp_path / EPOCH).train_losses) == 10


def test_a_module_may_leave_weights_out(tmp_path: Path) -> None:
    class Partial(Plain):
        strict_loading = False  # type: ignore[assignment]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            del checkpoint["state_dict"]["net.0.weight"]

    trainer(tmp_path, esper.Tamiyo("off"), epochs=1).fit(Partial(), datamodule=digits())
    fit = trainer(tmp_path, esper.Tamiyo("off"), epochs=2)
    fit.fit(Partial(), datamodule=digits(), ckpt_path=tmp_path / "checkpoints/epoch=0.ckpt")
    assert fit.current_epoch == 2


# --- files -------------------------------------------------------------------------------------------------------


def _cut(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes()[:-1000])


FILES: dict[str, Any] = {
    "cut short": _cut,
    "cut to the half": lambda source, target: target.write_bytes(source.read_bytes()[: source.stat().st_size // 2]),
    "empty": lambda _, target: target.write_bytes(b""),
    "text": lambda _, target: target.write_text("not a checkpoint"),
    "missing": lambda _, target: None,
    "a folder": lambda _, target: target.mkdir(),
    "a list": lambda _, target: torch.save([1, 2], target),
    "a bare state dict": lambda _, target: torch.save(nn.Linear(2, 2).state_dict(), target),
    "a whole module": lambda _, target: torch.save(nn.Linear(2, 2), target),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_checkpoint_is_named(saved: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "given.ckpt"
    FILES[kind](saved, target)
    with pytest.raises(CheckpointError, match=r"given\.ckpt"):
        require_readable(target)


@pytest.mark.parametrize("path", [None, "last", "best", "hpc", "s3://bucket/a.ckpt", "registry:model"])
def test_what_lightning_looks_up_passes(path: str | None) -> None:
    require_readable(path, resuming=True)


def test_the_old_file_format_of_torch_is_read(tmp_path: Path) -> None:
    content = {"state_dict": {}, "pytorch-lightning_version": "2.6.0"}
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    require_readable(tmp_path / "old.ckpt")


def test_both_ways_to_train_look_first(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.ckpt")
    model = esper.wrap(MLP(widths=(64, 8, 10)))
    controller = esper.TamiyoController(model, {"policy": "off"})
    config = {"max_epochs": 1, "output_dir": str(tmp_path), "accelerator": "cpu"}
    with pytest.raises(CheckpointError, match="missing"):
        esper.TolariaTrainer(model, controller, config, data=Digits()).train(missing)
    controller.close()
    network = {"class_path": "esper.models.MLP", "init_args": {"widths": [64, 8, 10]}}
    given = {"network": network, "task": {"class_path": "esper.tolaria.tasks.Classification"}}
    fit = {"model": {"class_path": "TolariaModule", "init_args": given}, "data": {"class_path": "Digits"}}
    with pytest.raises(CheckpointError, match="missing"):
        EsperCLI({"subcommand": "fit", "fit": fit | {"ckpt_path": missing, "output_dir": str(tmp_path)}})


# --- digests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.cfloat])
def test_a_digest_tells_names_types_shapes_and_values_apart(dtype: torch.dtype) -> None:
    base = torch.zeros(2, 3, dtype=dtype)
    other = base.clone()
    other[1, 2] = 1
    found = [digests({"a": t})["a"] for t in (base, other, base.reshape(3, 2), base[:, :2], base[0, 0], base[:0])]
    found.append(digests({"b": base})["b"])
    assert len(set(found)) == len(found)
    assert digests({"a": other.t().contiguous().t()}) == digests({"a": other})


def test_what_is_no_dense_tensor_has_no_digest() -> None:
    assert digests({"extra": {"a": 1}, "sparse": torch.eye(2).to_sparse(), "keep": torch.ones(1)}).keys() == {"keep"}


def test_weights_only_files_are_written_as_ever(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="light", save_weights_only=True)
    fit = trainer(tmp_path, None, epochs=1, callbacks=[esper.Tamiyo("off"), keep])
    fit.fit(Plain(), datamodule=digits())
    require_readable(tmp_path / "light.ckpt")
    with pytest.raises(CheckpointError, match="weights only"):
        require_readable(tmp_path / "light.ckpt", resuming=True)


# --- versions ----------------------------------------------------------------------------------------------------

OLD = Path(__file__).parent / "data" / "format-1.ckpt"


def test_a_checkpoint_of_the_first_format_goes_on_growing(tmp_path: Path) -> None:
    """Written by the release before `run` was added, after the first epoch of eight, while a child was ramping."""
    old = torch.load(OLD, weights_only=True)
    assert old["esper"]["format"] == 1 and [e["state"] for e in old["esper"]["topology"]] == ["GRAFTING"]
    module = Plain()
    callback = esper.Tamiyo("schedule", kasmina=QUICK, settings=planting(), targets=["net.*"])
    fit = trainer(tmp_path, callback)
    fit.fit(module, datamodule=digits(), ckpt_path=OLD)
    assert len(module.train_losses) == 70 and fit.current_epoch == 8
    assert [report.outcome.value for report in callback.controller.reports] == ["FOSSILIZED"]  # type: ignore[union-attr]
    assert [entry["step"] for entry in callback.history] == [10.0 * n for n in range(1, 9)] + [80.0]


def test_the_first_format_is_brought_to_the_present_one() -> None:
    old = torch.load(OLD, weights_only=True)
    migrate(old)
    assert old["esper"]["format"] == FORMAT and old["esper"]["run"] == {"pause": "EPOCH"}
    before = str(old["esper"])
    migrate(old)
    assert str(old["esper"]) == before


def test_a_newer_format_is_refused_in_words(saved: Path, tmp_path: Path) -> None:
    newer = changed(saved, tmp_path / "newer.ckpt", lambda content: content["esper"].update(format=FORMAT + 1))
    for read in (lambda: resume(tmp_path, newer), lambda: require_readable(newer, resuming=True)):
        with pytest.raises(CheckpointError, match=f"this release reads 1 to {FORMAT}.*newer release wrote it"):
            read()
