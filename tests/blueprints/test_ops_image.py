"""Operations on whole images."""

import torch

from esper.blueprints import SiteShape, build, load_library, why_not
from esper.blueprints.ops_image import GlobalMean
from tests.blueprints.growing import grown, one_op, part, stirred

LIBRARY = load_library()


def test_a_pool_is_the_mean_of_the_pixels():
    x = torch.randn(2, 8, 4, 5)
    torch.testing.assert_close(GlobalMean()(x), x.flatten(2).mean(-1)[..., None, None])


def test_a_pool_alone_does_not_fill_an_image():
    assert "returns 1 positions; the site writes 20" in why_not(one_op("pool", "bchw"), SiteShape("bchw", 8, 8, 20))


def test_a_channel_that_answers_alone_is_raised():
    norm, x = part("response_norm", layout="bchw", tokens=20), torch.zeros(1, 8, 4, 5)
    x[:, 2] = 1.0
    found = norm(x)
    torch.testing.assert_close(found[0, 2], torch.full((4, 5), 8.0), rtol=2e-2, atol=0)
    assert not found[0, :2].any()
    even = torch.ones(1, 8, 4, 5)
    torch.testing.assert_close(norm(even), even, rtol=1e-4, atol=1e-4)


def test_squeeze_and_excitation_is_one_gate_for_each_channel():
    child, x = grown("BP-SQUEEZE-EXCITE"), torch.randn(2, 8, 4, 5)
    gate = child(x) / x
    torch.testing.assert_close(gate, gate[..., :1, :1].expand_as(gate), rtol=1e-3, atol=1e-4)
    assert (gate.abs() <= 1).all()


def test_large_kernels_see_23_pixels():
    ir = LIBRARY["BP-CONV-LARGE"].ir
    child = stirred(build(ir, SiteShape("bchw", 2, 2, 31 * 31), seed=0))
    x = torch.randn(1, 2, 31, 31)
    point = child.point(child.far(child.near(x)))
    changed = x.clone()
    changed[..., 15, 15] += 1
    moved = (child.point(child.far(child.near(changed))) - point).abs().sum((0, 1)) > 1e-6
    rows = moved.any(1).nonzero().flatten()
    assert (rows.min().item(), rows.max().item()) == (15 - 11, 15 + 11)
