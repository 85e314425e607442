"""Blueprints: small network graphs as data, and the interpreter that turns one into a module for a given site."""

from esper.blueprints.build import Child, build
from esper.blueprints.cost import Cost, cost, fit_dims, why_not
from esper.blueprints.ir import BlueprintIR, parse_ir
from esper.blueprints.library import STANDARD, Blueprint, Library, load_library
from esper.blueprints.ops_monitor import readings
from esper.blueprints.site import SiteShape

__all__ = [
    "STANDARD",
    "Blueprint",
    "BlueprintIR",
    "Child",
    "Cost",
    "Library",
    "SiteShape",
    "build",
    "cost",
    "fit_dims",
    "load_library",
    "parse_ir",
    "readings",
    "why_not",
]
