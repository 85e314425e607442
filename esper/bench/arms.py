"""What is compared: each arm is the experiment's own configuration, changed in one respect."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from esper.bench.children import LORA, general_kind, site_of, spread, widened
from esper.tamiyo.config import TamiyoConfig, params_of
from esper.tamiyo.contracts import Site
from esper.tamiyo.policies.priors import WIDENINGS, widening

Config = dict[str, Any]

GROWN: Final = "heuristic"
"""The arm that sets the compute of its seed, and runs first."""

WIDE: Final = "static_wide_equal_flops"
OFF: Final = "off"

_FROM_START: Final = "esper.tolaria.from_start.FromStart"


class Plan(NamedTuple):
    """What an arm is made from.

    Args:
        config: the experiment with one seed.
        wide: the same with a wider net, of the size that growth may reach; None widens the net by children.
        schedule: kind that the arm `schedule` plants; empty takes a general one.
        found: row of the heuristic run of the same seed; empty before that run.
    """

    config: Config
    wide: Config | None = None
    schedule: str = ""
    found: Mapping[str, Any] = MappingProxyType({})

    @property
    def settings(self) -> dict[str, Any]:
        """The controller's settings."""
        return dict((self.config.get("tamiyo") or {}).get("settings") or {})

    @property
    def sites(self) -> list[Site]:
        """Where the network may grow."""
        return [site_of(told) for told in self.found["sites"]]

    @property
    def budget(self) -> int:
        """Parameters that growth may add."""
        given = self.settings.get("budget", TamiyoConfig.model_fields["budget"].default)
        return params_of(float(given), int(self.found["host_params"]))


class Arm(NamedTuple):
    """One arm.

    Args:
        make: returns its configuration.
        equal: whether its number of steps is such that it works as much as the heuristic run of its seed; else it
            takes the steps of the experiment.
        grows: whether its network changes during the run.
        about: what it is, for people.
    """

    make: Callable[[Plan], Config]
    equal: bool
    grows: bool
    about: str


def with_policy(config: Config, policy: str, **settings: Any) -> Config:
    """Return a configuration with another policy, and settings of its own.

    Example:
        >>> with_policy({"tamiyo": {"settings": {"budget": 9}}}, "off", seed=3)
        {'tamiyo': {'settings': {'budget': 9, 'seed': 3}, 'policy': 'off'}}
    """
    tamiyo = config.get("tamiyo") or {}
    return config | {"tamiyo": tamiyo | {"settings": (tamiyo.get("settings") or {}) | settings, "policy": policy}}


def with_children(config: Config, children: list[dict[str, Any]]) -> Config:
    """Return a configuration without growth whose network has children from the first step; without any, as it is."""
    static = with_policy(config, "off")
    if not children:
        return static
    callbacks = [{"class_path": _FROM_START, "init_args": {"children": children}}, *(_callbacks(config))]
    return static | {"trainer": static["trainer"] | {"callbacks": callbacks}}


def _callbacks(config: Config) -> list[Any]:
    given = config["trainer"].get("callbacks") or []
    return given if isinstance(given, list) else [given]


def _spread(plan: Plan, sites: list[Site], kind: Callable[[Site], str]) -> Config:
    children = spread(sites, kind, plan.budget, seed=int(plan.config.get("seed_everything") or 0))
    return with_children(plan.config, children)


def _heuristic(plan: Plan) -> Config:
    return with_policy(plan.config, "heuristic")


def _off(plan: Plan) -> Config:
    return with_policy(plan.config, "off")


def _wide(plan: Plan) -> Config:
    if plan.wide is not None:
        return with_policy(plan.wide, "off")
    return _spread(plan, widened(plan.sites), lambda site: widening(site.shape))


def _from_start(plan: Plan) -> Config:
    return with_children(plan.config, list(plan.found["children"]))


def _schedule(plan: Plan) -> Config:
    at = plan.settings.get("start", TamiyoConfig.model_fields["start"].default)
    kind = plan.schedule or general_kind(plan.sites)
    return with_policy(plan.config, "schedule", schedule=[{"at": at, "blueprint": kind, "site": "*", "params": None}])


def _random(plan: Plan) -> Config:
    return with_policy(plan.config, "random")


def _strict(plan: Plan) -> Config:
    tamiyo = plan.config.get("tamiyo") or {}
    given = tamiyo.get("kasmina") or {}
    kept = {key: given[key] for key in ("targets", "seeds_per_layer", "telemetry_every") if key in given}
    return with_policy(plan.config | {"tamiyo": tamiyo | {"kasmina": {"preset": "strict", **kept}}}, "heuristic")


def _lora(plan: Plan) -> Config:
    return _spread(plan, plan.sites, lambda site: LORA)


def _gradmax(plan: Plan) -> Config:
    return with_policy(plan.config, "gradmax", menu=list(WIDENINGS))


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        GROWN: Arm(_heuristic, False, True, "the live trial; its work is the compute that the static arms get"),
        OFF: Arm(_off, True, False, "the host alone, trained for the same compute"),
        "static_wide": Arm(_wide, False, False, "a wider net of the size that growth may reach, for the same steps"),
        WIDE: Arm(_wide, True, False, "the wider net, for the same compute"),
        "from_start": Arm(
            _from_start,
            True,
            False,
            "what the live trial of the same seed kept, there from step 0, for the same compute",
        ),
        "schedule": Arm(
            _schedule, False, True, "one general kind at the first site, with the whole budget, without a search"
        ),
        "random": Arm(_random, False, True, "a random kind at a random site"),
        "strict": Arm(_strict, False, True, "the live trial with the original life cycle"),
        "lora": Arm(_lora, True, False, "low-rank adapters at every site from step 0, for the same compute"),
        "gradmax_style": Arm(
            _gradmax, False, True, "widening where the gradient that new units would receive is largest"
        ),
    }
)
"""Every arm, in the order of the tables."""
