"""Karn's choice: what fits, what can be afforded, and what is safe when he cannot be asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints import Library, SiteShape, cost, load_library, why_not
from esper.blueprints.capabilities import lacking
from esper.blueprints.cost import fit_dims
from esper.karn.choice import TIERS, choose
from esper.leyline.artifacts import BlueprintRequest
from esper.leyline.errors import BlueprintDoesNotFit

WHOLE = load_library()
LIBRARY = Library(b for b in WHOLE if not lacking(b.ir) and any(b.manifest.benefit_prior))


@given(layout=st.sampled_from(["btd", "bd", "bchw"]), width=st.sampled_from([8, 64, 96]), budget=st.integers(0, 50_000))
def test_what_is_offered_fits_and_can_be_paid(layout: str, width: int, budget: int) -> None:
    site = SiteShape(layout, width, width, 1 if layout == "bd" else 64, "block")
    asked = BlueprintRequest(layout=layout, d_in=width, d_out=width, max_params=budget, kind="block")
    offered = choose(asked, LIBRARY).names
    for known in LIBRARY:
        fits = why_not(known.ir, site) is None
        try:
            paid = fits and cost(known.ir, site, fit_dims(known.ir, site, budget)).params <= budget
        except BlueprintDoesNotFit:
            paid = False
        assert (known.ir.name in offered) is paid


def test_what_cannot_grow_here_or_only_watches_is_not_offered() -> None:
    names = choose(BlueprintRequest(), WHOLE).names
    assert set(names) == {known.ir.name for known in LIBRARY}
    assert not {"BP-FLASH-ATTN-V2", "BP-ALL-REDUCE-SHARD", "BP-MON-ACT-STATS"} & set(names)


def test_the_best_prior_comes_first() -> None:
    names = choose(BlueprintRequest(), LIBRARY).names
    worth = [sum(LIBRARY[n].manifest.benefit_prior) - LIBRARY[n].manifest.risk_score for n in names]
    assert len(names) == len(LIBRARY) and worth == sorted(worth, reverse=True)


def test_conservative_offers_safe_actions_only() -> None:
    answer = choose(BlueprintRequest(), LIBRARY, conservative="nobody there")
    assert answer.conservative and "nobody there" in answer.why
    assert set(answer.names) == {known.ir.name for known in LIBRARY if known.manifest.is_safe_action}


@pytest.mark.parametrize("tier", TIERS)
def test_no_dearer_tier_than_asked_for(tier: str) -> None:
    for name in choose(BlueprintRequest(tier=tier), LIBRARY).names:
        assert TIERS.index(LIBRARY[name].manifest.tier) <= TIERS.index(tier)
