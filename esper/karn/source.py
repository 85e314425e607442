"""Asking Karn from a run or a terminal, and what to do when he does not answer."""

import time
from typing import final

import pybreaker

from esper.blueprints import Library
from esper.karn.choice import choose
from esper.karn.service import ANSWERED, ASKED
from esper.leyline.artifacts import BlueprintAnswer, BlueprintRequest
from esper.leyline.errors import BusError, ContractError
from esper.leyline.ids import new_id
from esper.oona.contracts import Bus


@final
class BlueprintSource:
    """Karn behind a circuit breaker.

    When he does not answer, the answer is conservative: blueprints of the library here that are safe actions. After
    three failures in a row he is not even asked for a while.

    Args:
        bus: where he listens.
        library: what is known without him.
        timeout_s: longest wait for an answer, in seconds.
        rest_s: time without questions after three failures, in seconds.

    Example:
        >>> from esper.blueprints import load_library
        >>> from esper.oona.memory import MemoryBus
        >>> source = BlueprintSource(MemoryBus(), load_library(), timeout_s=0.01)
        >>> source.ask(BlueprintRequest(layout="bchw")).conservative
        True
    """

    def __init__(self, bus: Bus, library: Library, *, timeout_s: float = 2.0, rest_s: float = 30.0) -> None:
        """Start with the circuit closed."""
        self.bus, self.library, self.timeout_s = bus, library, timeout_s
        self._breaker = pybreaker.CircuitBreaker(fail_max=3, reset_timeout=rest_s, throw_new_error_on_trip=False)

    def ask(self, request: BlueprintRequest) -> BlueprintAnswer:
        """Return Karn's answer, or a conservative one that says why."""
        try:
            answer: BlueprintAnswer = self._breaker.call(self._ask, request)
        except (BusError, ContractError, pybreaker.CircuitBreakerError) as error:
            return choose(request, self.library, conservative=str(error))
        return answer

    def _ask(self, request: BlueprintRequest) -> BlueprintAnswer:
        trace_id, deadline = new_id(), time.monotonic() + self.timeout_s
        with self.bus.subscribe(ANSWERED) as answers:
            self.bus.publish(request, ASKED, trace_id=trace_id)
            while (left := deadline - time.monotonic()) > 0:
                delivery = answers.receive(left)
                if delivery is None:
                    break
                answers.ack(delivery)
                if delivery.envelope.trace_id == trace_id and isinstance(delivery.message, BlueprintAnswer):
                    return delivery.message
        raise BusError(f"Karn did not answer in {self.timeout_s:.1f} s.")
