"""Picture sets: tiny files in the official formats load; missing or damaged ones say what to do."""

import gzip
import struct
from pathlib import Path

import pytest
import torch

from esper.data import CIFAR10, CIFAR100, MNIST
from esper.data.vision import PictureModule
from esper.leyline.errors import ConfigError, DataError

PIXELS = 3 * 32 * 32


def cifar_file(path: Path, labels: list[tuple[int, ...]]) -> None:
    """Write records whose red, green and blue planes hold 1, 2, 3 plus the last label."""
    path.parent.mkdir(exist_ok=True)
    planes = (bytes(label) + b"".join(bytes([c + label[-1]]) * 1024 for c in (1, 2, 3)) for label in labels)
    path.write_bytes(b"".join(planes))


def idx_file(path: Path, magic: int, shape: tuple[int, ...], content: bytes) -> None:
    """Write an idx file, gzipped if its name says so."""
    raw = struct.pack(f">I{len(shape)}I", magic, *shape) + content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def make_cifar10(root: Path) -> None:
    """Five training batches of two pictures, and a test batch of three."""
    for number in range(1, 6):
        cifar_file(root / f"cifar-10-batches-bin/data_batch_{number}.bin", [(number,), (9,)])
    cifar_file(root / "cifar-10-batches-bin/test_batch.bin", [(0,), (1,), (2,)])


def make_cifar100(root: Path) -> None:
    """Four training pictures and two test pictures, each with a coarse and a fine label."""
    cifar_file(root / "cifar-100-binary/train.bin", [(5, number) for number in (0, 33, 66, 99)])
    cifar_file(root / "cifar-100-binary/test.bin", [(1, 2), (3, 4)])


def make_mnist(root: Path, suffix: str = ".gz") -> None:
    """Four training pictures and two test pictures."""
    for name, count in (("train", 4), ("t10k", 2)):
        pixels = b"".join(bytes([10 * number]) * 784 for number in range(count))
        idx_file(root / f"{name}-images-idx3-ubyte{suffix}", 0x803, (count, 28, 28), pixels)
        idx_file(root / f"{name}-labels-idx1-ubyte{suffix}", 0x801, (count,), bytes(range(count)))


def sizes(module: PictureModule) -> list[int]:
    """Pictures in each part."""
    return [len(part) for part in module.parts]


def test_cifar10(tmp_path: Path) -> None:
    make_cifar10(tmp_path)
    module = CIFAR10(root=str(tmp_path), decision=3, batch_size=2)
    assert sizes(module) == [7, 3, 3]
    x, y = next(iter(module.test_dataloader()))
    assert x.shape == (3, 3, 32, 32) and y.tolist() == [0, 1, 2]
    assert torch.equal(x[1].mean((1, 2)) * 255, torch.tensor([2.0, 3.0, 4.0]))


def test_cifar100_keeps_the_fine_label(tmp_path: Path) -> None:
    make_cifar100(tmp_path)
    module = CIFAR100(root=str(tmp_path), decision=1)
    assert sizes(module) == [3, 1, 2]
    assert next(iter(module.val_dataloader()))[1].tolist() == [99]
    assert next(iter(module.test_dataloader()))[1].tolist() == [2, 4]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path: Path, suffix: str) -> None:
    make_mnist(tmp_path, suffix)
    module = MNIST(root=str(tmp_path), decision=1, batch_size=3)
    assert sizes(module) == [3, 1, 2]
    x, y = next(iter(module.test_dataloader()))
    assert x.shape == (2, 1, 28, 28) and y.tolist() == [0, 1]
    assert float(x[1].max()) == pytest.approx(10 / 255)
    assert [len(x) for x, _ in module.train_dataloader()] == [3]


@pytest.mark.parametrize(
    ("module", "file", "name"),
    [
        (CIFAR10, "cifar-10-batches-bin/data_batch_1.bin", "cifar-10-binary.tar.gz"),
        (CIFAR100, "cifar-100-binary/train.bin", "cifar-100-binary.tar.gz"),
        (MNIST, "train-images-idx3-ubyte.gz", "THE MNIST DATABASE"),
    ],
)
def test_a_missing_file_is_named_with_its_place(
    tmp_path: Path, module: type[PictureModule], file: str, name: str
) -> None:
    with pytest.raises(DataError) as caught:
        module(root=str(tmp_path)).setup()
    assert str(tmp_path / file) in str(caught.value)
    assert name in str(caught.value)


def test_one_missing_file_among_others_is_the_one_named(tmp_path: Path) -> None:
    make_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-bin/data_batch_4.bin").unlink()
    with pytest.raises(DataError, match="data_batch_4.bin is missing"):
        CIFAR10(root=str(tmp_path)).setup()


def test_damaged_cifar_files(tmp_path: Path) -> None:
    make_cifar100(tmp_path)
    train = tmp_path / "cifar-100-binary/train.bin"
    train.write_bytes(train.read_bytes()[:-1])
    with pytest.raises(DataError, match="not a whole number of 3074-byte records"):
        CIFAR100(root=str(tmp_path)).setup()
    cifar_file(train, [(0, 100)])
    with pytest.raises(DataError, match="label 100; allowed: 0 to 99"):
        CIFAR100(root=str(tmp_path)).setup()


def test_damaged_mnist_files(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    images, labels = (tmp_path / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            MNIST(root=str(tmp_path), decision=1).setup()

    idx_file(labels, 0x801, (3,), bytes(3))
    refused("4 pictures but 3 labels")
    idx_file(images, 0x803, (4, 28, 28), bytes(5))
    refused("declares shape \\(4, 28, 28\\) but holds 5 bytes")
    idx_file(images, 0x801, (4,), bytes(4))
    refused("not an idx file of 3-dimensional bytes")
    images.write_bytes(images.read_bytes()[:-9])
    refused("not a whole gzip file")


def test_decision_part_must_leave_training_pictures(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    with pytest.raises(DataError, match="decision=4 leaves nothing to train on.*4 pictures"):
        MNIST(root=str(tmp_path), decision=4).setup()
    with pytest.raises(ConfigError, match="decision must be at least 1"):
        MNIST(decision=0)
