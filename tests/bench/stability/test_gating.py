"""Gates that tell domains apart."""

import pytest
import torch

from esper.bench.stability.gating import gates, told_apart
from esper.blueprints import SiteShape, build, load_library


def test_both_domains_weigh_the_same():
    shut = torch.full((8, 3, 1), -20.0)
    # Six of eight windows are of the new domain, and wrong; that is half of the loss.
    assert float(told_apart(shut, 6)) == pytest.approx(10.0, abs=1e-3)
    shut[:6] = 20.0
    assert float(told_apart(shut, 6)) == pytest.approx(0.0, abs=1e-3)


def test_a_gate_learns_to_tell_by_the_context():
    """The last token alone says nothing: only what came before it tells the kinds of text apart."""
    child = build(load_library()["BP-EXPERT-CONTEXT"].ir, SiteShape("btd", 8, 8, 12), seed=0)
    x = torch.randn(32, 12, 8, generator=torch.Generator().manual_seed(0))
    x[:16, :-1] += torch.linspace(-2, 2, 8)
    optimizer = torch.optim.AdamW(child.parameters(), lr=1e-2)
    for _ in range(60):
        with gates(child) as seen:
            child(x)
        optimizer.zero_grad()
        told_apart(seen[0], 16).backward()
        optimizer.step()
    assert (seen[0][:16, -1] > 0).all() and (seen[0][16:, -1] < 0).all()
    assert not torch.any(child(x)), "the gate has learned, the child still changes nothing"
