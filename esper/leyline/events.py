"""What has happened, in the past tense: every event that Esper records."""

from enum import StrEnum, unique
from typing import Self

from pydantic import Field, model_validator

from esper.leyline.base import Message, Record
from esper.leyline.states import Reason, SeedCommand, SeedState, next_state


@unique
class Fault(StrEnum):
    """What a kernel did wrong in a forward."""

    RAISED = "RAISED"
    WRONG_SHAPE = "WRONG_SHAPE"
    NOT_FINITE = "NOT_FINITE"


@unique
class RollbackTrigger(StrEnum):
    """What made a run return to its last good snapshot."""

    NON_FINITE_LOSS = "NON_FINITE_LOSS"
    LOSS_SPIKE = "LOSS_SPIKE"
    STATE_CORRUPTION = "STATE_CORRUPTION"
    REQUESTED = "REQUESTED"


@unique
class Rejection(StrEnum):
    """Why a kernel was rejected."""

    INVALID_BLUEPRINT = "INVALID_BLUEPRINT"
    COMPILATION_FAILED = "COMPILATION_FAILED"
    SANITY_FAILED = "SANITY_FAILED"
    GRADIENT_MISMATCH = "GRADIENT_MISMATCH"
    TOO_SLOW = "TOO_SLOW"
    TOO_RISKY = "TOO_RISKY"


@unique
class Violation(StrEnum):
    """Which check of trust failed."""

    SIGNATURE = "SIGNATURE"
    HASH = "HASH"
    FINGERPRINT = "FINGERPRINT"
    PERMISSION = "PERMISSION"
    SANDBOX = "SANDBOX"


class RunEvent(Message):
    """Something that happened in a run.

    Args:
        run_id: the run.
        epoch: epoch it happened in, from 0.
        step: optimizer steps done by then.
    """

    run_id: str
    epoch: int = Field(ge=0)
    step: int = Field(ge=0)


class EpochEvent(RunEvent):
    """A boundary was reached.

    Args:
        train_loss: mean training loss since the last boundary, in the task's unit.
        validation_loss: loss on the decision part.
        metrics: other metrics by name.
        duration_s: wall-clock time since the last boundary, in seconds.
    """

    train_loss: float | None = None
    validation_loss: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    duration_s: float = Field(default=0.0, ge=0.0)


class SeedTransitioned(RunEvent):
    """A seed went from one state to another; only what the transition table allows can be said.

    Args:
        seed_id: full seed id, `layer#chunk.slot`.
        kernel_artifact_id: its kernel; empty for none.
        blueprint_id: name of its blueprint; empty for none.
        source: state before.
        target: state after.
        command: what was asked of it.
        reason: why.
        detail: one sentence for people.
        group: trial that it belongs to; empty outside a trial.
    """

    seed_id: str
    kernel_artifact_id: str = ""
    blueprint_id: str = ""
    source: SeedState
    target: SeedState
    command: SeedCommand
    reason: Reason
    detail: str = ""
    group: str = ""

    @model_validator(mode="after")
    def _allowed(self) -> Self:
        """Refuse a transition that the table does not have."""
        if (leads_to := next_state(self.source, self.command)) is not self.target:
            raise ValueError(f"{self.command} leads from {self.source} to {leads_to}, not to {self.target}")
        return self


class Candidate(Record):
    """One choice that a policy weighed.

    Args:
        seed_id: where.
        blueprint_id: what; empty when the choice is about a child that exists.
        score: higher is better; the unit is the policy's own.
        chosen: whether it was taken.
        why: one sentence: why, or why not.
    """

    seed_id: str
    blueprint_id: str = ""
    score: float = 0.0
    chosen: bool = False
    why: str = ""


class DecisionMade(RunEvent):
    """A policy decided.

    Args:
        policy: name of the policy.
        commands: ids of the commands it gave, in order.
        explanation: why, in words.
        candidates: what it weighed.
    """

    policy: str
    commands: tuple[str, ...] = ()
    explanation: str = ""
    candidates: tuple[Candidate, ...] = ()


class GraftFaulted(RunEvent):
    """A kernel failed in a forward and was bypassed by identity in that same forward.

    Args:
        seed_id: full seed id, `layer#chunk.slot`.
        kernel_artifact_id: the kernel.
        blueprint_id: name of its blueprint.
        fault: what it did.
        detail: the error's own words.
    """

    seed_id: str
    kernel_artifact_id: str = ""
    blueprint_id: str = ""
    fault: Fault
    detail: str = ""


class RolledBack(RunEvent):
    """A run returned to its last good snapshot.

    Args:
        trigger: what made it.
        restored_epoch: epoch of the snapshot.
        restored_step: optimizer steps done at the snapshot.
        locked_seeds: ids of the seeds that are ROLLED_BACK from now on.
        detail: one sentence for people.
    """

    trigger: RollbackTrigger
    restored_epoch: int = Field(ge=0)
    restored_step: int = Field(ge=0)
    locked_seeds: tuple[str, ...] = ()
    detail: str = ""


class BlueprintSubmitted(Message):
    """A blueprint entered the catalogue.

    Args:
        blueprint_id: SHA-256 of its IR.
        name: e.g. `BP-MLP-GELU`.
        version: semantic version.
        parents: ids of the blueprints it was derived from.
        submitter: who handed it in.
    """

    blueprint_id: str
    name: str
    version: str = "1.0.0"
    parents: tuple[str, ...] = ()
    submitter: str = ""


class KernelReady(Message):
    """A kernel was compiled and waits for its benchmark.

    Args:
        kernel_artifact_id: the kernel.
        blueprint_id: id of its blueprint.
        pipeline: `fast`, `standard` or `aggressive`.
        target: device type.
        compilation_seconds: wall-clock time, in seconds.
    """

    kernel_artifact_id: str
    blueprint_id: str
    pipeline: str
    target: str = "cpu"
    compilation_seconds: float = Field(default=0.0, ge=0.0)


class KernelCharacterized(Message):
    """A kernel passed its benchmark and may be used.

    Args:
        kernel_artifact_id: the kernel.
        blueprint_id: id of its blueprint.
        tags: tags that it earned.
        risk_score: 0 (safe) to 1.
        conf_level: confidence in the risk score, 0 to 1.
    """

    kernel_artifact_id: str
    blueprint_id: str
    tags: tuple[str, ...] = ()
    risk_score: float = Field(ge=0.0, le=1.0)
    conf_level: float = Field(ge=0.0, le=1.0)


class KernelRejected(Message):
    """A kernel may not be used.

    Args:
        kernel_artifact_id: the kernel.
        blueprint_id: id of its blueprint.
        reason: why.
        detail: one sentence for people.
    """

    kernel_artifact_id: str
    blueprint_id: str
    reason: Rejection
    detail: str = ""


class WorkerDied(Message):
    """A worker process ended before its job did.

    Args:
        pool: pool that it belonged to.
        worker_id: the worker.
        job_id: job that it held; empty for none.
        attempt: how many times the job has been tried, from 1; 0 without a job.
        exit_code: its exit status, negative for a signal; `None` if unknown.
        requeued: whether the job will be tried again.
        detail: one sentence for people.
    """

    pool: str
    worker_id: str
    job_id: str = ""
    attempt: int = Field(default=0, ge=0)
    exit_code: int | None = None
    requeued: bool = False
    detail: str = ""


class SlowConsumer(Message):
    """A subscriber cannot keep up.

    Args:
        consumer: the subscriber.
        topic: topic that it lags on.
        queued: messages that wait for it.
        dropped: messages that it lost so far; only high-rate telemetry may be lost.
        lag_s: age of the oldest message that waits, in seconds.
    """

    consumer: str
    topic: str
    queued: int = Field(ge=0)
    dropped: int = Field(default=0, ge=0)
    lag_s: float = Field(default=0.0, ge=0.0)


class SecurityAlert(Message):
    """A check of trust failed.

    Args:
        source: who noticed.
        subject: id of the kernel, record or worker.
        violation: which check failed.
        detail: one sentence for people.
    """

    source: str
    subject: str
    violation: Violation
    detail: str = ""
