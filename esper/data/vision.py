"""CIFAR-10, CIFAR-100 and MNIST, read from the official files that the user has put in place.

Nothing is downloaded and nothing is unpickled: CIFAR is read in its binary version, MNIST as idx files.
The official test set is the report part; the end of the official training set is the decision part.
"""

import gzip
import math
import struct
import zlib
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from esper.data.base import EsperDataModule, Parts, require_positive
from esper.leyline.errors import DataError

CIFAR_PIXELS = 3 * 32 * 32
IDX_IMAGES, IDX_LABELS = 0x803, 0x801


class Pictures(NamedTuple):
    """Pictures `uint8 [N, C, H, W]` and their labels `int64 [N]`."""

    images: Tensor
    labels: Tensor


class PictureDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pictures kept as bytes and scaled to [0, 1] when asked for.

    Args:
        pictures: pictures and labels.

    Shapes:
        item: `(x [C, H, W] float32, y [] int64)`.
    """

    def __init__(self, pictures: Pictures) -> None:
        """Keep the pictures."""
        self.pictures = pictures

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pictures.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one picture and its label."""
        return self.pictures.images[index].float() / 255, self.pictures.labels[index]


class PictureModule(EsperDataModule):
    """A public picture set in its official files.

    Args:
        root: folder that holds the official folder or files.
        batch_size: pictures in a training batch, B.
        decision: pictures at the end of the official training set that gates decide on.
        seed: chooses the order of training.
        num_workers: loader processes.

    Shapes:
        batch: `(x [B, C, H, W] float32 in [0, 1], y [B] int64)`.

    Raises:
        ConfigError: a number is out of range.
        DataError: a file is missing or damaged, or the decision part leaves nothing to train on.
    """

    official_name: ClassVar[str]

    def __init__(
        self,
        *,
        root: str = "data",
        batch_size: int = 128,
        decision: int = 5000,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        """Check the settings; pictures are read at the first use."""
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        require_positive(decision=decision)
        self.root, self.decision = root, decision

    @abstractmethod
    def read(self) -> tuple[Pictures, Pictures]:
        """Return the official training and test sets."""

    def build(self) -> Parts:
        """Read the files and take the decision part off the training set."""
        (images, labels), test = self.read()
        keep = len(labels) - self.decision
        if keep < 1:
            raise DataError(
                f"decision={self.decision} leaves nothing to train on: the training set has {len(labels)} pictures."
            )
        train, decision = Pictures(images[:keep], labels[:keep]), Pictures(images[keep:], labels[keep:])
        return Parts(*map(PictureDataset, (train, decision, test)))

    def find(self, *names: str) -> Path:
        """Return the first of the alternative files that is there.

        Raises:
            DataError: none is there; says which file to put where.
        """
        paths = [Path(self.root, name) for name in names]
        for path in paths:
            if path.is_file():
                return path
        raise DataError(
            f"{paths[0]} is missing. Esper downloads nothing: get {self.official_name} from its authors' "
            f"page and put the file at {' or '.join(str(path.absolute()) for path in paths)}, or set root."
        )


class CIFAR10(PictureModule):
    """CIFAR-10 (Krizhevsky, 2009), binary version: 3 x 32 x 32, 10 classes. See `PictureModule` for the settings."""

    official_name = "the set 'CIFAR-10 binary version (suitable for C programs)', cifar-10-binary.tar.gz,"

    def read(self) -> tuple[Pictures, Pictures]:
        """Read the five training batches and the test batch."""
        batches = [self._batch(f"data_batch_{number}") for number in range(1, 6)]
        train = Pictures(*(torch.cat(part) for part in zip(*batches, strict=True)))
        return train, self._batch("test_batch")

    def _batch(self, name: str) -> Pictures:
        return read_cifar(self.find(f"cifar-10-batches-bin/{name}.bin"), label_bytes=1, classes=10)


class CIFAR100(PictureModule):
    """CIFAR-100 (Krizhevsky, 2009), binary version: 3 x 32 x 32, 100 fine classes. See `PictureModule`."""

    official_name = "the set 'CIFAR-100 binary version (suitable for C programs)', cifar-100-binary.tar.gz,"

    def read(self) -> tuple[Pictures, Pictures]:
        """Read the training and the test file."""
        train, test = (self.find(f"cifar-100-binary/{name}.bin") for name in ("train", "test"))
        return read_cifar(train, label_bytes=2, classes=100), read_cifar(test, label_bytes=2, classes=100)


class MNIST(PictureModule):
    """MNIST (LeCun et al., 1998), idx files, plain or gzipped: 1 x 28 x 28, 10 classes. See `PictureModule`."""

    official_name = "'THE MNIST DATABASE of handwritten digits'"

    def read(self) -> tuple[Pictures, Pictures]:
        """Read the four official files."""
        return self._set("train"), self._set("t10k")

    def _set(self, name: str) -> Pictures:
        images = read_idx(self._file(f"{name}-images-idx3-ubyte"), IDX_IMAGES)
        labels = read_idx(self._file(f"{name}-labels-idx1-ubyte"), IDX_LABELS).long()
        if len(images) != len(labels):
            raise DataError(f"MNIST {name}: {len(images)} pictures but {len(labels)} labels; put both files anew.")
        return Pictures(images.unsqueeze(1), labels)

    def _file(self, name: str) -> Path:
        return self.find(f"{name}.gz", name)


def read_cifar(path: Path, *, label_bytes: int, classes: int) -> Pictures:
    """Read one CIFAR file of the binary version; the last label byte of a record is the one kept.

    Args:
        path: the file: records of label bytes, then 3,072 pixels (red, green, blue; row by row).
        label_bytes: 1 in CIFAR-10, 2 (coarse, fine) in CIFAR-100.
        classes: number of classes.

    Raises:
        DataError: the size is no whole number of records, or a label is out of range.
    """
    record, content = label_bytes + CIFAR_PIXELS, path.read_bytes()
    if not content or len(content) % record:
        raise DataError(f"{path} has {len(content)} bytes, not a whole number of {record}-byte records; put it anew.")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    labels = rows[:, label_bytes - 1].long()
    if int(labels.max()) >= classes:
        raise DataError(f"{path} holds label {int(labels.max())}; allowed: 0 to {classes - 1}. Is it another set?")
    return Pictures(rows[:, label_bytes:].reshape(-1, 3, 32, 32), labels)


def read_idx(path: Path, magic: int) -> Tensor:
    """Read an idx file of unsigned bytes, plain or gzipped.

    Args:
        path: the file; a name that ends in `.gz` is unpacked.
        magic: the number it must start with: 0x803 for pictures, 0x801 for labels.

    Shapes:
        result: `uint8`, the shape that the file declares.

    Raises:
        DataError: not such a file, or shorter or longer than it declares.
    """
    content = _unpacked(path)
    dims = magic & 0xFF
    header = 4 * (1 + dims)
    if len(content) < header or struct.unpack(">I", content[:4])[0] != magic:
        raise DataError(f"{path} is not an idx file of {dims}-dimensional bytes (magic {magic:#x}); put it anew.")
    shape: tuple[int, ...] = struct.unpack(f">{dims}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DataError(f"{path} declares shape {shape} but holds {len(content) - header} bytes; put it anew.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); put it anew.") from error
