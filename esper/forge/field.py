"""Field reports on their way from the bus into the store."""

import logging
from typing import Final, final

from esper.leyline.envelope import INNOVATION_FIELD_REPORTS
from esper.leyline.errors import ContractError
from esper.leyline.reports import FieldReport
from esper.oona.contracts import Bus
from esper.urza.store import Urza

_GROUP: Final = "urza"
_log = logging.getLogger(__name__)


@final
class ReportKeeper:
    """Keeps what grafts really did; `step` does one round, so that whoever owns the loop may stop at any time.

    Args:
        bus: the forge's bus.
        urza: the forge's store.
    """

    def __init__(self, bus: Bus, urza: Urza) -> None:
        """Listen, from where the last one stopped."""
        self._urza = urza
        self._letters = bus.subscribe(INNOVATION_FIELD_REPORTS, group=_GROUP)

    def step(self, timeout_s: float) -> bool:
        """Keep one report; tell whether there was one.

        Raises:
            StoreError: the store cannot be written; the report comes again.
        """
        try:
            delivery = self._letters.receive(timeout_s)
        except ContractError as error:
            _log.warning("a field report cannot be read and is passed over: %s", error)
            return True
        if delivery is None:
            return False
        try:
            if isinstance(delivery.message, FieldReport):
                self._urza.report(delivery.message)
            else:
                _log.warning("%s on %s is dropped.", delivery.envelope.kind, delivery.envelope.topic)
        except ContractError as error:
            _log.warning("a field report of %s is not kept: %s", delivery.envelope.sender, error)
        self._letters.ack(delivery)
        return True

    def close(self) -> None:
        """Stop listening."""
        self._letters.close()
