"""Keys of the bus's encryption: who may connect, and how each side knows the other."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self, final

import zmq

from esper.leyline.errors import ConfigError, OutputError, TrustError

_KEY_CHARACTERS = 40
_SUFFIX = ".pub"


@final
@dataclass(frozen=True)
class CurveKeys:
    """One side's CURVE key pair, and what it needs to know of the other side.

    Args:
        public: public key, 40 characters (Z85).
        secret: secret key, 40 characters (Z85); never printed.
        server: public key of the broker, for a client.
        admitted: folder of the public keys that may connect, for a broker; see `admit`.

    Raises:
        ConfigError: a key does not have 40 characters.

    Example:
        >>> broker, client = CurveKeys.generate(), CurveKeys.generate()
        >>> len(client.for_server(broker.public).server)
        40
    """

    public: str
    secret: str = field(repr=False)
    server: str = ""
    admitted: Path | None = None

    def __post_init__(self) -> None:
        """Check the keys' length."""
        for name, key in (("public", self.public), ("secret", self.secret), ("server", self.server or "0" * 40)):
            if len(key) != _KEY_CHARACTERS:
                raise ConfigError(f"The {name} key has {len(key)} characters; a CURVE key has {_KEY_CHARACTERS}.")

    @classmethod
    def generate(cls) -> Self:
        """Make a fresh pair."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    def for_server(self, public: str) -> Self:
        """Return the same pair for a client of the broker with this public key."""
        return replace(self, server=public)

    def admitting(self, folder: str | Path) -> Self:
        """Return the same pair for a broker that admits the keys in a folder."""
        return replace(self, admitted=Path(folder))

    def save(self, path: str | Path) -> Path:
        """Write the pair to `path`, readable by its owner only, and the public key to `path.pub`.

        Raises:
            OutputError: the file exists, or it cannot be written.
        """
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(f"{self.public}\n{self.secret}\n")
            target.with_name(target.name + _SUFFIX).write_text(f"{self.public}\n", encoding="ascii")
        except OSError as error:
            raise OutputError(
                f"The keys cannot be written to {target}: {error}; a key is never overwritten."
            ) from error
        return target

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the pair that `save` wrote.

        Raises:
            TrustError: the file is missing, others may read it, or it does not hold a pair.
        """
        source = Path(path)
        try:
            mode, text = source.stat().st_mode, source.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise TrustError(
                f"The keys {source} cannot be read: {error}; make them with CurveKeys.generate()."
            ) from error
        if mode & 0o077:
            raise TrustError(
                f"Others may read the secret key {source} (mode {mode & 0o777:o}); run: chmod 600 {source}"
            )
        match text.split():
            case [public, secret] if _is_pair(public, secret):
                return cls(public, secret)
        raise TrustError(f"{source} does not hold a key pair; expected a public key and its secret key, one per line.")


def _is_pair(public: str, secret: str) -> bool:
    try:
        return zmq.curve_public(secret.encode()) == public.encode()
    except (ValueError, zmq.ZMQError):
        return False


def admit(folder: str | Path, name: str, public: str) -> Path:
    """Let the owner of a public key connect: write the key to `folder/name.pub`; a broker heeds it at once.

    Raises:
        ConfigError: the name is not a plain file name, or the key does not have 40 characters.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     keys = CurveKeys.generate()
        ...     _ = admit(folder, "worker-1", keys.public)
        ...     admitted(folder)[keys.public]
        'worker-1'
    """
    if not name or name != Path(name).name or name.startswith("."):
        raise ConfigError(f"{name!r} is not a name for a peer; use one that can be a file's name, e.g. 'worker-1'.")
    if len(public) != _KEY_CHARACTERS:
        raise ConfigError(f"The key of {name!r} has {len(public)} characters; a CURVE key has {_KEY_CHARACTERS}.")
    target = Path(folder) / f"{name}{_SUFFIX}"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"{public}\n", encoding="ascii")
    return target


def admitted(folder: str | Path) -> dict[str, str]:
    """Return the names of the admitted peers by public key; files that hold no key are passed over."""
    found = {}
    for path in sorted(Path(folder).glob(f"*{_SUFFIX}")):
        key = path.read_text(encoding="ascii", errors="replace").strip()
        if len(key) == _KEY_CHARACTERS:
            found[key] = path.name.removesuffix(_SUFFIX)
    return found
