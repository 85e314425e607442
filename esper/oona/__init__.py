"""Oona: the message bus; its broker is `esper.oona.broker.Broker`."""

from esper.oona.client import ZmqBus
from esper.oona.contracts import NO_OFFSET, Bus, BusLimits, Delivery, Subscription
from esper.oona.keys import CurveKeys, admit, admitted
from esper.oona.memory import MemoryBus

__all__ = [
    "NO_OFFSET",
    "Bus",
    "BusLimits",
    "CurveKeys",
    "Delivery",
    "MemoryBus",
    "Subscription",
    "ZmqBus",
    "admit",
    "admitted",
]
