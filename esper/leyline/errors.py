"""Every error that Esper raises.

```
EsperError
├── ConfigError (ValueError)          a setting is unknown or out of range
├── ContractError (ValueError)        a message breaks its contract
│   ├── IllegalTransition             a command that the life cycle forbids
│   └── SchemaMismatch                a message of a version that cannot be read
├── BlueprintError (ValueError)       a blueprint is malformed
│   └── BlueprintDoesNotFit           a blueprint that the site cannot take
├── SiteError (ValueError)            a place in the host that cannot carry seeds
│   └── NoSuchSeed (LookupError)      a seed id that names nothing
├── KernelError (RuntimeError)        a kernel failed to load or to run
├── CheckpointError (RuntimeError)    a checkpoint or saved model cannot be trusted
├── StateCorruption (RuntimeError)    the seeds' own state failed its checksum
├── RollbackError (RuntimeError)      a run cannot go back to a good state
├── DistributedError (RuntimeError)   the processes of one run differ, or one of them is gone
├── DataError (ValueError)            data are missing or not split as needed
├── OutputError (OSError)             a result cannot be written where asked
├── BusError (RuntimeError)           a message could not be sent, kept or received
├── StoreError (RuntimeError)         a record or artifact is missing, damaged or in conflict
├── JobError (RuntimeError)           a worker could not do its job
└── TrustError (RuntimeError)         something that was handed in is not what it claims to be
    ├── BadSignature                  a signature is missing or wrong
    ├── WrongRole                     signed by somebody who may not say this
    ├── BadHash                       bytes that differ from their hash
    ├── WrongFingerprint              made for another machine or another torch
    ├── StaleManifest                 an older statement, shown again
    ├── UnsafePath                    a path that leaves its folder
    └── UnknownPeer                   a message from an unknown key
```

A message says what was given, what is allowed and what to do.
"""

from collections.abc import Sequence


class EsperError(Exception):
    """Root of every error that Esper raises on purpose."""


class ConfigError(EsperError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class ContractError(EsperError, ValueError):
    """A message breaks the contract that both sides share."""


class IllegalTransition(ContractError):
    """A command that the life cycle forbids in the seed's present state."""

    def __init__(self, state: str, command: str, allowed: Sequence[str]) -> None:
        """Name the state, the command given and the commands allowed."""
        self.state, self.command, self.allowed = str(state), str(command), tuple(map(str, allowed))
        options = ", ".join(self.allowed) or "nothing: the state is terminal"
        super().__init__(f"{self.command} is not allowed in state {self.state}; allowed: {options}.")

    def __reduce__(self) -> tuple[type["IllegalTransition"], tuple[str, str, tuple[str, ...]]]:
        """Rebuild from the three arguments, so that the error can cross a process boundary."""
        return type(self), (self.state, self.command, self.allowed)


class SchemaMismatch(ContractError):
    """A message of a schema version that this release cannot read."""


class BlueprintError(EsperError, ValueError):
    """A blueprint is malformed."""


class BlueprintDoesNotFit(BlueprintError):
    """A blueprint that the site's layout or size cannot take."""


class SiteError(EsperError, ValueError):
    """A place in the host model cannot carry seeds."""


class NoSuchSeed(SiteError, LookupError):
    """A seed id that names nothing in this model."""


class KernelError(EsperError, RuntimeError):
    """A kernel failed to load or to run."""


class CheckpointError(EsperError, RuntimeError):
    """A checkpoint or a saved model is damaged or belongs to another model."""


class StateCorruption(EsperError, RuntimeError):
    """The seeds' state arrays failed their checksum."""


class RollbackError(EsperError, RuntimeError):
    """A run must go back, and no good snapshot of it is left."""


class DistributedError(EsperError, RuntimeError):
    """The processes of one run no longer hold the same state, or one of them is gone or silent."""


class DataError(EsperError, ValueError):
    """Data are missing, too small, or not split into the parts that are needed."""


class OutputError(EsperError, OSError):
    """A result cannot be written where it was asked for."""


class BusError(EsperError, RuntimeError):
    """A message could not be sent, kept or received."""


class StoreError(EsperError, RuntimeError):
    """A record or an artifact is missing, damaged, or in conflict with another."""


class JobError(EsperError, RuntimeError):
    """A worker could not do its job."""


class TrustError(EsperError, RuntimeError):
    """Something that was handed in is not what it claims to be; it is not used."""


class BadSignature(TrustError):
    """A signature is missing or wrong."""


class WrongRole(TrustError):
    """A statement signed by somebody who may not make it."""


class BadHash(TrustError):
    """Bytes that differ from the hash under which they are known."""


class WrongFingerprint(TrustError):
    """A kernel that was made for another machine or another toolchain."""


class StaleManifest(TrustError):
    """An older statement, shown again after a newer one."""


class UnsafePath(TrustError):
    """A path that leaves the folder it belongs to."""


class UnknownPeer(TrustError):
    """A message from a key that nobody has admitted."""
