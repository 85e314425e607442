"""Which artifacts stay at hand: by use, age and the price of compiling them again. The others are archived, not lost.

`score = (1 + uses) * (1 + cpu_seconds) * 0.5 ** (age / half-life)`, the age being the time since the last use, or since
the kernel was made. What was refused scores 0. The lowest scores go first, until the rest fits the budget.
"""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple, final

from esper.files import replacing
from esper.leyline.errors import BadHash, StoreError
from esper.leyline.kernels import ArtifactStatus
from esper.urza.artifacts import MANIFEST, MAX_ARTIFACT, MAX_FILES, ArtifactTree, check_name, names, read_file
from esper.urza.canonical import sha256

HALF_LIFE_S: Final = 30 * 86_400.0
"""Time after which an unused kernel is worth half as much, in seconds."""

_S = ArtifactStatus
_MOVABLE: Final = frozenset({_S.VALIDATED, _S.REJECTED, _S.INVALID})


class Holding(NamedTuple):
    """A kernel whose files are at hand.

    Args:
        kernel_id: the kernel.
        status: how far it has come.
        size: bytes of its files.
        uses: times it was loaded, and grafts that were reported.
        idle_s: time since it was last used, or made, in seconds.
        cpu_seconds: price of compiling it again, in seconds of processor time.
    """

    kernel_id: str
    status: ArtifactStatus
    size: int
    uses: int = 0
    idle_s: float = 0.0
    cpu_seconds: float = 0.0


def score(holding: Holding) -> float:
    """Return what a kernel is worth keeping for; higher stays longer.

    Example:
        >>> score(Holding("k", ArtifactStatus.VALIDATED, 100, uses=1, idle_s=HALF_LIFE_S, cpu_seconds=9.0))
        10.0
    """
    if holding.status is not _S.VALIDATED:
        return 0.0
    return float((1 + holding.uses) * (1 + holding.cpu_seconds) * 0.5 ** (holding.idle_s / HALF_LIFE_S))


def to_archive(holdings: Iterable[Holding], budget: int) -> list[str]:
    """Return the kernels to archive so that the others take at most `budget` bytes, the least worth first.

    Kernels that wait for a compilation or a verdict stay, whatever they take.

    Example:
        >>> kept = Holding("kept", ArtifactStatus.VALIDATED, 60, uses=9)
        >>> to_archive([kept, Holding("gone", ArtifactStatus.REJECTED, 60)], budget=100)
        ['gone']
    """
    held = list(holdings)
    surplus, chosen = sum(holding.size for holding in held) - budget, []
    for holding in sorted(held, key=lambda holding: (score(holding), -holding.idle_s, holding.kernel_id)):
        if surplus > 0 and holding.status in _MOVABLE:
            chosen.append(holding.kernel_id)
            surplus -= holding.size
    return chosen


@final
class Archive:
    """One tar file per artifact that is not at hand.

    Args:
        root: folder of the archive; made when it is needed.
        tree: artifacts at hand.
    """

    def __init__(self, root: str | Path, tree: ArtifactTree) -> None:
        """Remember where."""
        self.root, self._tree = Path(root), tree

    def path(self, ref: str) -> Path:
        """Return the tar file of an artifact, whether it exists or not."""
        return self.root / f"{self._tree.path(ref).name}.tar"

    def pack(self, ref: str) -> Path:
        """Write an artifact into the archive; it stays at hand until the caller removes it."""
        with self._tree.opened(ref) as folder:
            files = {name: read_file(folder, name, MAX_ARTIFACT) for name in sorted(names(folder))}
        with (
            replacing(self.path(ref)) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o400
                tar.addfile(member, io.BytesIO(data))
        return self.path(ref)

    def read(self, ref: str) -> dict[str, bytes]:
        """Return the files of an archived artifact, nothing of them written anywhere.

        Raises:
            StoreError: there is no such file, or it is damaged.
            BadHash: it holds another artifact.
            UnsafePath: a name in it leaves its folder.
        """
        try:
            with tarfile.open(self.path(ref), mode="r:") as tar:
                files = _members(tar)
        except (OSError, tarfile.TarError, ValueError, EOFError) as error:
            raise StoreError(
                f"Archive {self.path(ref).name} cannot be read: {error}; compile the kernel anew."
            ) from error
        if sha256(files.get(MANIFEST, b"")) != ref:
            raise BadHash(f"Archive {self.path(ref).name} holds another artifact; compile the kernel anew.")
        return files

    def unpack(self, ref: str) -> None:
        """Bring an artifact back to hand; errors are those of `read`."""
        self._tree.write(ref, self.read(ref))


def _members(tar: tarfile.TarFile) -> dict[str, bytes]:
    """Read the plain files of a tar file, within the bounds of an artifact."""
    files: dict[str, bytes] = {}
    for member in tar:
        check_name(member.name)
        file = tar.extractfile(member) if member.isreg() else None
        total = member.size + sum(map(len, files.values()))
        if file is None or total > MAX_ARTIFACT or len(files) >= MAX_FILES or member.name in files:
            raise ValueError(f"{member.name!r} is no plain file, is there twice, or is too large")
        files[member.name] = file.read()
    return files
