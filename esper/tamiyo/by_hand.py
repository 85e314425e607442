"""What a user asks for on the model itself: the same life cycle and the same gates as any other graft."""

from esper.kasmina.wrapper import GerminationRequest, MorphableModel
from esper.leyline.states import TRANSITIONS, Reason, SeedCommand
from esper.tamiyo import gate, observe
from esper.tamiyo.config import TamiyoConfig, params_of
from esper.tamiyo.contracts import Decision, Observation, Site
from esper.tamiyo.menu import Menu, Offer, germinate
from esper.tamiyo.policies.base import remaining


def cancel(morphable: MorphableModel) -> Decision:
    """Return the cancellations that were asked for; one that comes too late is explained, not carried out."""
    asked, morphable.cancellations = morphable.cancellations, []
    timely = [seed for seed in asked if SeedCommand.CANCEL in TRANSITIONS[morphable.bank.state(seed)]]
    late = [f"{seed} cannot be cancelled any more" for seed in asked if seed not in timely]
    commands = (gate.command_for(str(seed), SeedCommand.CANCEL, Reason.USER_CANCELLED) for seed in timely)
    said = [f"{seed} cancelled by hand" for seed in timely]
    return Decision(tuple(commands), "; ".join(said + late))


def germination(morphable: MorphableModel, observation: Observation, config: TamiyoConfig, menu: Menu) -> Decision:
    """Return the next germination that was asked for; it waits while growth is paused or another one is under way."""
    if observation.paused or observation.busy or observation.final or not morphable.requests:
        return Decision()
    request = morphable.requests.pop(0)
    site = _site(morphable, request)
    if site is None:
        return Decision(explanation=f"{request.seed} cannot germinate: the site was refused or saw no batch")
    offer = _offer(site, request.blueprint, observation, config, menu)
    if offer is None:
        room = remaining(observation, config)
        return Decision(
            explanation=f"{request.blueprint} does not fit {request.seed} within the {room.params:,} parameters left"
        )
    command = germinate(offer, seed=config.seed, strategy=request.strategy, group=f"by-hand {request.seed}")
    return Decision((command,), f"{request.blueprint} at {request.seed} asked for by hand, {offer.params:,} parameters")


def _site(morphable: MorphableModel, request: GerminationRequest) -> Site | None:
    shape = morphable.bank.site_shape(request.seed)
    site = next((s for s in observe.sites(morphable.bank) if s.path == request.seed.layer), None)
    if site is None or shape is None:
        return None
    return site._replace(chunk=request.seed.chunk, slot=request.seed.slot, shape=shape, closed=frozenset())


def _offer(site: Site, name: str, observation: Observation, config: TamiyoConfig, menu: Menu) -> Offer | None:
    """Return a child of a proxy's size, or the next larger one that fits in what is left of the budget."""
    room = remaining(observation, config)
    size = max(1, params_of(config.proxy, observation.host_params))
    while size < room.params:
        if (offer := menu.offer(site, name, room.at_most(size))) is not None:
            return offer
        size *= 2
    return menu.offer(site, name, room)
