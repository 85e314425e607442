"""Planted defects."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.bench.stability.defects import DEFECTS, finding, row
from esper.bench.stability.parts import DEFECT_NAMES
from esper.bench.stability.summary import mended
from esper.blueprints import load_library
from esper.data import Spirals


def made(**given: Any) -> dict[str, Any]:
    child = {"site": "layers.2", "kind": "BP-WIDEN", "family": "widen"}
    return {"defective": 0.5, "sound": 0.1, "loss": 0.2, "kept": [child]} | given


def test_half_of_the_gap_and_a_child_at_the_defect_resolve_it():
    defect = DEFECTS["width"]
    assert finding(made(), defect).resolved and finding(made(), defect).recovered == pytest.approx(0.75)
    assert not finding(made(loss=0.31), defect).resolved
    far = [{"site": "layers.6", "kind": "BP-WIDEN", "family": "widen"}]
    elsewhere = finding(made(kept=far), defect)
    assert not elsewhere.resolved and not elsewhere.placed and not elsewhere.right
    other = finding(made(kept=[{"site": "layers.2", "kind": "BP-MLP-GELU", "family": "mlp"}]), defect)
    assert other.resolved and not other.right


def test_without_a_gap_there_is_nothing_to_resolve():
    found = mended("width", [made(sound=0.6), made()])
    assert (found.n, found.resolved, found.placed) == (2, 1, 2) and found.recovered == pytest.approx(0.75)
    assert math.isnan(mended("width", [made(sound=0.6)]).recovered)


def test_every_defect_names_places_and_kinds_that_are_there():
    families = {blueprint.manifest.family for blueprint in load_library()}
    assert set(DEFECTS) == set(DEFECT_NAMES)
    assert all(set(defect.families) <= families for defect in DEFECTS.values())


def test_dead_units_are_dead_and_only_they():
    x = Spirals().parts.train[:][0]
    for sound in (False, True):
        host = DEFECTS["dead"].host(sound)
        units: list[torch.Tensor] = []
        host.get_submodule("layers.2.1").register_forward_hook(lambda module, args, out, to=units: to.append(out))
        host(x)
        assert int((units[0] == 0).all(0).sum()) >= 10 if not sound else int((units[0] == 0).all(0).sum()) < 6


@pytest.mark.slow
def test_the_sound_network_is_better(tmp_path: Path):
    found = row({"defect": "skip", "seed": 0, "steps": 250}, tmp_path)
    assert found["sound"] < found["defective"] - 0.02
