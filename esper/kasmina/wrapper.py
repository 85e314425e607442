"""The wrapped model that users hold: the host, its seeds, and requests made by hand."""

from collections import Counter
from typing import Any, NamedTuple, Self

from torch import nn

from esper.blueprints import load_library, why_not
from esper.kasmina.bank import SeedBank
from esper.kasmina.config import KasminaConfig
from esper.kasmina.sites import Targets
from esper.kasmina.strategies import STRATEGIES
from esper.leyline.errors import BlueprintDoesNotFit, ConfigError, SiteError
from esper.leyline.ids import SeedId
from esper.leyline.states import TRANSITIONS, SeedCommand, SeedState


class SeedView(NamedTuple):
    """One seed as a user sees it.

    Args:
        seed_id: `layer#chunk.slot`.
        state: where it is in its life.
        blueprint: what grows there, or empty.
        alpha: share of the child in the output, 0 to 1.
        params: parameters of the child.
        group: trial that it belongs to, or empty.
    """

    seed_id: str
    state: SeedState
    blueprint: str = ""
    alpha: float = 0.0
    params: int = 0
    group: str = ""


class GerminationRequest(NamedTuple):
    """A germination asked for by hand; applied at the next boundary."""

    seed: SeedId
    blueprint: str
    strategy: str


class MorphableModel(nn.Module):
    """A host model whose chosen layers carry seeds; call it exactly as the host.

    While nothing has grown, outputs, losses and gradients are bit for bit those of the host.

    Args:
        host: the model; it stays usable, and `.host` is it.
        bank: its seeds.
    """

    def __init__(self, host: nn.Module, bank: SeedBank) -> None:
        """Hold both."""
        super().__init__()
        self.host = host
        self.bank = bank
        self.requests: list[GerminationRequest] = []
        self.cancellations: list[SeedId] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host; its hooks do the rest."""
        return self.host(*args, **kwargs)

    @property
    def seeds(self) -> list[SeedView]:
        """Every seed: one per chunk of every site, and each further slot that was opened."""
        return [self._view(seed) for seed in self.bank.rows]

    def _view(self, seed: SeedId) -> SeedView:
        record, graft = self.bank.records.get(seed), self.bank.graft(seed)
        if record is None:
            return SeedView(str(seed), self.bank.state(seed))
        alpha = graft.strength if graft else 0.0
        return SeedView(str(seed), self.bank.state(seed), record.blueprint, alpha, record.params, record.group)

    def request_germination(self, seed_id: str, blueprint: str, strategy: str = "fixed_ramp") -> None:
        """Ask for a graft; it begins at the next boundary and walks the same gates as any other.

        Raises:
            NoSuchSeed: the id names nothing.
            SiteError: the seed is not dormant.
            BlueprintError: no blueprint has this name, or it does not fit the site.
            ConfigError: no strategy has this name.
        """
        seed = SeedId.parse(seed_id)
        if strategy not in STRATEGIES:
            raise ConfigError(f"unknown grafting strategy {strategy!r}; allowed: {', '.join(STRATEGIES)}.")
        if self.bank.state(seed) is not SeedState.DORMANT or any(r.seed == seed for r in self.requests):
            raise SiteError(f"{seed} is {self.bank.state(seed)} or already asked for; pick a DORMANT seed.")
        ir, site = load_library()[blueprint].ir, self.bank.site_shape(seed)
        if site is not None and (reason := why_not(ir, site)) is not None:
            raise BlueprintDoesNotFit(f"{blueprint} does not fit {seed}: {reason}.")
        self.requests.append(GerminationRequest(seed, blueprint, strategy))

    def cancel_germination(self, seed_id: str) -> None:
        """Take back a request, or cancel a seed that has not begun to graft.

        Raises:
            SiteError: the seed is past the point where it can be cancelled.
        """
        seed = SeedId.parse(seed_id)
        kept = [r for r in self.requests if r.seed != seed]
        if len(kept) < len(self.requests):
            self.requests = kept
            return
        state = self.bank.state(seed)
        if SeedCommand.CANCEL not in TRANSITIONS[state]:
            raise SiteError(f"{seed} is {state}; only a requested, GERMINATED or TRAINING seed can be cancelled.")
        self.cancellations.append(seed)

    def growth_report(self) -> str:
        """Return what has grown, as text."""
        counts = Counter(view.state.value for view in self.seeds)
        added = self.bank.added_parameters()
        host = self.host_parameters()
        lines = [
            f"{len(list(self.bank.all_layers()))} sites, {len(self.bank.rows)} seeds: "
            + ", ".join(f"{n} {state}" for state, n in sorted(counts.items())),
            f"parameters: {host:,} host + {added:,} grown",
        ]
        for view in self.seeds:
            if view.blueprint:
                lines.append(
                    f"  {view.seed_id}  {view.state}  {view.blueprint}  alpha {view.alpha:.2f}  {view.params:,} p"
                    + self._fault(view.seed_id)
                )
        lines += [f"  {path}: no seeds, {reason}" for path, reason in sorted(self.bank.refused.items())]
        return "\n".join(lines)

    def _fault(self, seed_id: str) -> str:
        graft = self.bank.graft(SeedId.parse(seed_id))
        return f"  bypassed: {graft.fault}" if graft is not None and graft.fault is not None else ""

    def host_parameters(self) -> int:
        """Return the number of parameters of the host alone, also where its seeds hang inside it."""
        grown = {id(p) for p in self.bank.parameters()}
        return sum(p.numel() for p in self.host.parameters() if id(p) not in grown)

    @classmethod
    def around(cls, host: nn.Module, config: KasminaConfig, targets: Targets = None) -> Self:
        """Attach fresh seeds to a host."""
        return cls(host, SeedBank(host, config, targets))


def wrap(model: nn.Module, config: Any = None, *, targets: Targets = None, seeds_per_layer: int = 1) -> MorphableModel:
    """Attach seeds to a model.

    Args:
        model: any module; it is left usable.
        config: `EsperConfig`, `KasminaConfig`, a dict of its keys, or None.
        targets: module types, globs over module paths, or a predicate; None takes attention, MLP, linear,
            convolution and normalisation modules.
        seeds_per_layer: contiguous chunks of each layer's features; 1 leaves the config's value.

    Raises:
        SiteError: the model is no module or already wrapped, a target matches nothing, or there are more seeds than
            features.
        ConfigError: the config is not valid.

    Example:
        >>> import torch
        >>> morphable = wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [seed.seed_id for seed in morphable.seeds]
        ['0#0.0', '2#0.0']
        >>> morphable(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
    """
    if not isinstance(model, nn.Module):
        raise SiteError(f"wrap takes a torch.nn.Module, not {type(model).__name__}.")
    section = getattr(config, "kasmina", config)
    settings = KasminaConfig.of(section)
    if seeds_per_layer != 1:
        settings = KasminaConfig.of(settings.model_dump() | {"seeds_per_layer": seeds_per_layer})
    if isinstance(model, MorphableModel):
        raise SiteError("the model is already wrapped; use `esper.unwrap` first to wrap it differently.")
    return MorphableModel.around(model, settings, targets)


def unwrap(morphable: MorphableModel) -> nn.Module:
    """Return the host itself, hooks gone, parameters as trained.

    Raises:
        SiteError: the argument is not a wrapped model.
    """
    if not isinstance(morphable, MorphableModel):
        raise SiteError(f"unwrap takes a MorphableModel, not {type(morphable).__name__}; wrap it first.")
    morphable.bank.detach()
    return morphable.host
