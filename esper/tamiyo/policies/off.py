"""Never grows: the twin that growth is compared with."""

from typing import final

from esper.tamiyo.contracts import Decision, Observation
from esper.tamiyo.policies.base import Policy


@final
class Off(Policy):
    """Proposes nothing."""

    def propose(self, observation: Observation) -> Decision:
        """Return no command."""
        return Decision()
