"""A checkpoint is written whole or not at all, and read as plain data."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import AsyncCheckpointIO

import esper
from esper.files import replacing
from esper.leyline.errors import CheckpointError
from esper.tolaria.atomic import AtomicCheckpointIO
from tests.helpers import Plain, digits, trainer


class _Falls:
    """Fails while it is written, as a full disk or a kill would."""

    def __reduce__(self) -> Any:
        raise OSError("the disk is full")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(3)}}, path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="full"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(3), "x": _Falls()}}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_the_name_appears_with_the_whole_content_only(tmp_path: Path) -> None:
    with replacing(tmp_path / "deep" / "a.bin") as file:
        file.write(b"half")
        file.flush()
        assert not (tmp_path / "deep" / "a.bin").exists()
        file.write(b" and half")
    assert (tmp_path / "deep" / "a.bin").read_bytes() == b"half and half"


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    host, gone = socket.gethostname(), 2**22 + 1
    for name in (f".a.ckpt.{host}.{gone}.part", f".b.ckpt.{host}.{os.getppid()}.part", ".c.ckpt.elsewhere.7.part"):
        (tmp_path / name).write_bytes(b"half")
    with replacing(tmp_path / "d.ckpt") as file:
        file.write(b"whole")
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == [f".b.ckpt.{host}.{os.getppid()}.part", ".c.ckpt.elsewhere.7.part", "d.ckpt"]


def test_objects_are_refused_unless_trusted(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}, "thing": Path("x")}, path)
    with pytest.raises(CheckpointError, match=r"more than plain data.*weights_only=False"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=False)["thing"] == Path("x")


def test_the_callback_alone_makes_writing_atomic(tmp_path: Path) -> None:
    fit = trainer(tmp_path, esper.Tamiyo("off"), epochs=1)
    assert type(fit.strategy.checkpoint_io) is TorchCheckpointIO
    fit.fit(Plain(), datamodule=digits())
    assert type(fit.strategy.checkpoint_io) is AtomicCheckpointIO


def test_an_io_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    for given in (Own(), AsyncCheckpointIO()):
        fit = Trainer(
            plugins=[given], max_steps=1, callbacks=[esper.Tamiyo("off")], accelerator="cpu", logger=False,
            default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            enable_checkpointing=False,
        )  # fmt: skip
        fit.fit(Plain(), datamodule=digits())
        assert fit.strategy.checkpoint_io is given
