"""Policies: they propose what to germinate; the gates decide what stays."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.menu import Menu
from esper.tamiyo.policies.base import Policy
from esper.tamiyo.policies.gradmax import GradMax
from esper.tamiyo.policies.heuristic import Heuristic
from esper.tamiyo.policies.off import Off
from esper.tamiyo.policies.random import Random
from esper.tamiyo.policies.schedule import Schedule

POLICIES: Mapping[str, Callable[[TamiyoConfig, Menu], Policy]] = MappingProxyType(
    {"off": Off, "random": Random, "schedule": Schedule, "heuristic": Heuristic, "gradmax": GradMax}
)


def make_policy(config: TamiyoConfig, menu: Menu) -> Policy:
    """Return the policy that the config names."""
    return POLICIES[config.policy](config, menu)


__all__ = ["POLICIES", "GradMax", "Heuristic", "Off", "Policy", "Random", "Schedule", "make_policy"]
