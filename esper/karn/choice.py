"""Which blueprints would serve: a pure choice from what is known of them."""

from collections.abc import Iterable
from typing import Final

from esper.blueprints import Blueprint, SiteShape, cost, why_not
from esper.blueprints.capabilities import lacking
from esper.blueprints.cost import fit_dims
from esper.leyline.artifacts import BlueprintAnswer, BlueprintRequest
from esper.leyline.errors import BlueprintDoesNotFit

TIERS: Final = ("fast", "standard", "aggressive")
"""Kernel tiers, the cheapest first."""


def choose(request: BlueprintRequest, known: Iterable[Blueprint], *, conservative: str = "") -> BlueprintAnswer:
    """Return the blueprints that would serve, the best prior first.

    Args:
        request: what is asked.
        known: the blueprints to choose from.
        conservative: why only safe actions may be considered; empty considers all.

    Example:
        >>> from esper.blueprints import load_library
        >>> "BP-CONV-RES" in choose(BlueprintRequest(layout="bchw"), load_library()).names
        True
    """
    serving = [blueprint for blueprint in known if _serves(request, blueprint)]
    if conservative:
        serving = [blueprint for blueprint in serving if blueprint.manifest.is_safe_action]
    ranked = sorted(serving, key=lambda blueprint: (-_worth(blueprint), blueprint.ir.name))
    names = tuple(blueprint.ir.name for blueprint in ranked)
    why = f"{len(names)} serve" + (f"; safe ones only: {conservative}" if conservative else "")
    return BlueprintAnswer(names=names, conservative=bool(conservative), why=why)


def _worth(blueprint: Blueprint) -> float:
    gain, stability = blueprint.manifest.benefit_prior
    return gain + stability - blueprint.manifest.risk_score


def _serves(request: BlueprintRequest, blueprint: Blueprint) -> bool:
    ir = blueprint.ir
    if request.layout is not None and request.layout not in ir.layouts:
        return False
    if request.kind and ir.site_kinds and request.kind not in ir.site_kinds:
        return False
    if TIERS.index(blueprint.manifest.tier) > TIERS.index(request.tier):
        return False
    if lacking(ir) or not any(blueprint.manifest.benefit_prior):
        return False  # It cannot grow here, or it only watches.
    site = _site(request, blueprint)
    return site is None or _affordable(request, blueprint, site)


def _site(request: BlueprintRequest, blueprint: Blueprint) -> SiteShape | None:
    """Return the place that is asked about; None while its widths are not known."""
    width = request.d_out or request.d_in
    if width is None:
        return None
    layout = request.layout or blueprint.ir.layouts[0]
    kind = request.kind or (blueprint.ir.site_kinds[0] if blueprint.ir.site_kinds else "block")
    return SiteShape(layout, request.d_in or width, request.d_out or width, 1 if layout == "bd" else 64, kind)


def _affordable(request: BlueprintRequest, blueprint: Blueprint, site: SiteShape) -> bool:
    if why_not(blueprint.ir, site) is not None:
        return False
    if request.max_params is None:
        return True
    try:
        return cost(blueprint.ir, site, fit_dims(blueprint.ir, site, request.max_params)).params <= request.max_params
    except BlueprintDoesNotFit:
        return False
