"""Karn in the forge: keeps the blueprints, takes new ones in, and answers who asks for some."""

import json
import logging
from collections.abc import Iterator
from typing import Final, final

from esper.blueprints import STANDARD, BlueprintIR, Library, SiteShape, parse_ir, why_not
from esper.blueprints.hashing import canonical_json
from esper.karn.choice import choose
from esper.leyline.artifacts import BlueprintAnswer, BlueprintRequest, CompilationRequest, KernelSpec
from esper.leyline.envelope import COMPILATION, Priority, event_topic
from esper.leyline.errors import BlueprintError, ContractError, StoreError, TrustError
from esper.leyline.events import BlueprintSubmitted
from esper.leyline.kernels import ArtifactStatus, Blueprint
from esper.leyline.reports import Layout
from esper.oona.contracts import Bus, Delivery
from esper.urza.store import Urza

ROOT: Final = "innovation.blueprints"
SUBMITTED: Final = f"{ROOT}.submitted"
"""Topic of blueprints that somebody hands in."""
REFUSED: Final = f"{ROOT}.refused"
"""Topic of blueprints that were not taken in."""
ASKED: Final = f"{ROOT}.asked"
"""Topic of questions."""
ANSWERED: Final = f"{ROOT}.answered"
"""Topic of answers; they bear the trace id of their question."""

_GROUP: Final = "karn"
_WIDTH: Final = 64
_REFUSALS: Final = (BlueprintError, StoreError, TrustError, ContractError)
_TOKENS: Final = {"bd": 1, "btd": 128, "bchw": 128}
_log = logging.getLogger(__name__)


@final
class Karn:
    """The static library as a service; `step` does one round, so that whoever owns the loop may stop at any time.

    Args:
        bus: the forge's bus.
        urza: the forge's store.
        library: the blueprints that are there from the start.
    """

    def __init__(self, bus: Bus, urza: Urza, library: Library) -> None:
        """Listen, from where the last Karn stopped."""
        self.bus, self.urza, self.library = bus, urza, library
        self._letters = bus.subscribe(SUBMITTED, ASKED, group=_GROUP)

    def open(self) -> int:
        """Submit the standard blueprints; return how many of them were new to the store.

        They are checked when nothing else is to be done: no run waits for the check of a blueprint of ours. The rest
        of the library comes in when a run wants its kernels.
        """
        known = {blueprint.id for blueprint in self.urza.blueprints()}
        standard = [blueprint.ir for blueprint in self.library if blueprint.ir.name in STANDARD]
        fresh = [ir for ir in standard if ir.id not in known]
        for ir in fresh:
            try:
                self._take_in(stated(ir), _GROUP, trace_id="", priority=Priority.LOW)
            except _REFUSALS as error:
                _log.warning("%s of the library is not taken in: %s", ir.name, error)
        return len(fresh)

    def step(self, timeout_s: float) -> bool:
        """Answer one letter; tell whether there was one."""
        try:
            delivery = self._letters.receive(timeout_s)
        except ContractError as error:
            _log.warning("a letter cannot be read and is passed over: %s", error)
            return True
        if delivery is None:
            return False
        self._heed(delivery)
        self._letters.ack(delivery)
        return True

    def close(self) -> None:
        """Stop listening."""
        self._letters.close()

    def _heed(self, delivery: Delivery) -> None:
        trace_id = delivery.envelope.trace_id
        match delivery.message:
            case BlueprintRequest() as asked:
                self.bus.publish(choose(asked, self.library), ANSWERED, trace_id=trace_id)
            case Blueprint() as blueprint:
                try:
                    self._take_in(blueprint, delivery.envelope.sender, trace_id)
                except _REFUSALS as error:
                    _log.warning("%s is not taken in: %s", blueprint.name, error)
                    refusal = BlueprintAnswer(names=(blueprint.name,), why=str(error))
                    self.bus.publish(refusal, REFUSED, trace_id=trace_id)

    def _take_in(
        self, blueprint: Blueprint, submitter: str, trace_id: str, priority: Priority = Priority.NORMAL
    ) -> None:
        kept = self.urza.submit(blueprint, submitter)
        told = BlueprintSubmitted(
            blueprint_id=kept.id, name=kept.name, version=kept.version, parents=kept.parents, submitter=submitter
        )
        self.bus.publish(told, event_topic("BlueprintSubmitted"), trace_id=trace_id)
        if kept.status is ArtifactStatus.UNVALIDATED:
            # The eager kernel shows whether the blueprint holds at all; compiled ones are made when a run wants them.
            asked = CompilationRequest(spec=reference(kept.ir), pipeline="fast", requester=submitter)
            self.bus.publish(asked, f"{COMPILATION}.requested", priority=priority, trace_id=trace_id)


def stated(ir: BlueprintIR) -> Blueprint:
    """Return a blueprint as the store keeps it."""
    text = canonical_json(ir.model_dump(mode="json")).decode()
    return Blueprint(id=ir.id, name=ir.name, version=ir.version, ir=text)


def reference(text: str) -> KernelSpec:
    """Return the kernel by which a blueprint is judged: 64 features, 128 positions, sizes as they are by default.

    A blueprint that no such site can take is judged at the first of its layouts all the same, and refused there with
    the reason.

    Raises:
        BlueprintError: the text is no blueprint.
    """
    ir = parse_ir(plain(text))
    sites = list(_sites(ir))
    site = next((site for site in sites if why_not(ir, site) is None), sites[0])
    return KernelSpec(ir=text, layout=site.layout, d_in=site.d_in, d_out=site.d_out, tokens=site.tokens, kind=site.kind)


def _sites(ir: BlueprintIR) -> Iterator[SiteShape]:
    layouts: tuple[Layout, ...] = ir.layouts
    for layout in layouts:
        for kind in ir.site_kinds or ("block",):
            yield SiteShape(layout, _WIDTH, _WIDTH, _TOKENS[layout], kind)


def plain(text: str) -> object:
    """Read JSON.

    Raises:
        BlueprintError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BlueprintError(f"the blueprint's text is not JSON: {error}.") from error
