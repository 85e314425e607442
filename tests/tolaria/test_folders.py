"""Checkpoint folders are whole or passed over, whatever became of the process that wrote them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.files import part_of, put_in_place
from esper.leyline.errors import CheckpointError
from esper.tolaria.atomic import AtomicCheckpointIO
from esper.tolaria.checkpoint import require_readable
from esper.tolaria.folders import CHECKSUMS, META, checksums_of, require_whole, seal
from esper.tolaria.resume import chosen, newest


def saved(path: Path, *, sealed: bool = True, **given: Any) -> Path:
    """Write what a sharding strategy writes: tensors in files of their own, and `meta.pt`."""
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(os.urandom(3000))
    (path / "__1_0.distcp").write_bytes(os.urandom(3000))
    (path / ".metadata").write_bytes(b"where they are")
    meta = {"pytorch-lightning_version": "2.6.6", "lr_schedulers": [], "loops": {}} | given
    torch.save(meta, path / META)
    if sealed:
        seal(path, checksums_of([path / "__0_0.distcp"]))
    return path


def older(path: Path) -> Path:
    for file in path.iterdir():
        os.utime(file, ns=(10**18, 10**18))
    return path


def test_the_newest_whole_folder_is_chosen(tmp_path: Path) -> None:
    first, second = older(saved(tmp_path / "b.ckpt")), saved(tmp_path / "a.ckpt")
    assert newest(tmp_path) == second and chosen("auto", tmp_path) == str(second)
    (tmp_path / "last.ckpt").symlink_to(first)
    assert newest(tmp_path) == second
    assert chosen(first, tmp_path) == str(first) and chosen(tmp_path, "elsewhere") == str(second)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", META, CHECKSUMS])
@pytest.mark.parametrize("harm", ["cut", "flipped", "gone"])
def test_a_damaged_folder_is_passed_over_and_refused(tmp_path: Path, name: str, harm: str) -> None:
    good, bad = older(saved(tmp_path / "a.ckpt")), saved(tmp_path / "b.ckpt")
    file = bad / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(content if harm == "flipped" else content[:-1])
    with pytest.warns(UserWarning, match=r"passed over a checkpoint: .*b\.ckpt"):
        assert newest(tmp_path) == good
    if (name, harm) != (CHECKSUMS, "gone"):
        with pytest.raises(CheckpointError, match="use another checkpoint"):
            require_readable(bad, resuming=True)


def test_a_folder_that_another_program_wrote_is_used_only_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", sealed=False)
    with pytest.warns(UserWarning, match=f"has no {CHECKSUMS}"):
        assert newest(tmp_path) is None
    assert chosen(path, tmp_path) == str(path)
    require_readable(path, resuming=True)


def test_what_no_training_can_go_on_from_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", esper={"format": 99})
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*has another format, 99"):
        require_readable(path, resuming=True)
    require_readable(path)
    meta = torch.load(path / META, weights_only=True)
    del meta["lr_schedulers"], meta["esper"]
    torch.save(meta, path / META)
    seal(path, {})
    with pytest.raises(CheckpointError, match="holds weights only"):
        require_readable(path, resuming=True)
    with pytest.raises(CheckpointError, match="several processes that shard the host"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_checksums_that_name_files_elsewhere_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt")
    text = (path / CHECKSUMS).read_text()
    (path / CHECKSUMS).write_text(text.replace("__0_0.distcp", "../__0_0.distcp"))
    with pytest.raises(CheckpointError, match="makes no sense"):
        require_whole(path)


# --- in the place of an older one --------------------------------------------------------------------------------


def test_a_folder_takes_the_place_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    target.write_text("a checkpoint in one file")
    for _ in range(2):
        part = saved(part_of(target))
        marks = sorted(file.name for file in part.iterdir())
        put_in_place(part, target)
        require_whole(target)
        assert sorted(file.name for file in target.iterdir()) == marks
        assert list(tmp_path.iterdir()) == [target]


def test_what_a_failed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    saved(part_of(target), sealed=False)
    assert not part_of(target).exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from esper import files

target, calls = Path(sys.argv[1]), int(sys.argv[2])
real, count = Path.rename, iter(range(100))

def rename(self, to):
    if next(count) == calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, to)

Path.rename = rename
part = Path(sys.argv[3])
files.put_in_place(part, target)
"""


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_after_a_kill_in_a_replacement_a_whole_folder_is_there(tmp_path: Path, calls: int) -> None:
    target = older(saved(tmp_path / "last.ckpt"))
    part = saved(tmp_path / "made")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), str(calls), str(part)], check=False, timeout=60)
    assert done.returncode == -9
    found = newest(tmp_path)
    assert found == (tmp_path / "last-replaced.ckpt" if calls == 1 else target)
    shutil.rmtree(part, ignore_errors=True)
    put_in_place(saved(part_of(target)), target)
    assert list(tmp_path.iterdir()) == [target]
