"""The envelope that every message travels in, and the topics it may be addressed to."""

import re
import time
from enum import IntEnum, unique

from pydantic import Field

from esper.leyline.base import Message
from esper.leyline.ids import new_id

TELEMETRY_SEED_HEALTH = "telemetry.seed.health"
"""High-rate telemetry; the only topic whose messages may be dropped, and are counted when they are."""
CONTROL_KASMINA_COMMANDS = "control.kasmina.commands"
"""Commands from Tamiyo to Kasmina."""
INNOVATION_FIELD_REPORTS = "innovation.field_reports"
"""What grafts really did."""
COMPILATION = "compilation"
"""Root of the compilation topics, `compilation.*`."""
VALIDATION = "validation"
"""Root of the validation topics, `validation.*`."""
SYSTEM_EVENTS = "system.events"
"""Root of everything else that happens, `system.events.*`."""


@unique
class Priority(IntEnum):
    """Order of delivery: the lowest number first."""

    EMERGENCY = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


class Envelope(Message):
    """Addressing of one message; the payload is the message as `encode` wrote it.

    Args:
        id: unique id; consumers drop a second copy by it.
        topic: dotted address in lower case, e.g. `system.events.seed_transitioned`.
        sender: who sent it.
        time: when it was sent, in seconds since the Unix epoch.
        trace_id: shared by everything that one cause set off; empty outside a trace.
        priority: order of delivery.
        kind: class name of the message inside.
        payload: the message's bytes.
    """

    id: str = Field(default_factory=new_id)
    topic: str = Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$")
    sender: str
    time: float = Field(default_factory=time.time, ge=0.0)
    trace_id: str = ""
    priority: Priority = Priority.NORMAL
    kind: str
    payload: bytes = b""


def event_topic(kind: str) -> str:
    """Return the topic of an event by the name of its class.

    Example:
        >>> event_topic("SeedTransitioned")
        'system.events.seed_transitioned'
    """
    return f"{SYSTEM_EVENTS}.{re.sub(r'(?<!^)(?=[A-Z])', '_', kind).lower()}"
