"""What earlier runs teach: beliefs, the shrinking menu, where they are read from."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.codec import to_json
from esper.leyline.errors import ConfigError
from esper.leyline.reports import Counterfactual, FieldReport, SiteInfo
from esper.leyline.states import Reason, SeedState
from esper.tamiyo.experience import Belief, Experience
from esper.urza.signing import KeyRing
from esper.urza.store import Urza

NAMES = ("BP-CONV-CAUSAL", "BP-MLP-GELU", "BP-WIDEN")


def told(
    run: int, blueprint: str, gain: float, *, kind: str = "stream", depth: float = 0.0, group: str = "trial-0"
) -> FieldReport:
    place = SiteInfo(module_path="a", module_type="Identity", layout="btd", width=8, input_width=8, depth=depth)
    return FieldReport(
        run_id=f"r{run}",
        blueprint_id=blueprint,
        seed_id=f"{kind}.{depth}#0.0",
        site=place,
        post_metric=2.0,
        counterfactual=Counterfactual(mean=2 * gain, lower=2 * gain - 0.005, upper=2 * gain + 0.005, n=32),
        outcome=SeedState.CULLED,
        reason=Reason.OUTCOMPETED,
        group=group,
        site_kind=kind,
    )


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.01, 1)), min_size=1, max_size=6), st.randoms())
def test_a_belief_does_not_depend_on_the_order(seen: list[tuple[float, float]], chance: object) -> None:
    def after(order: list[tuple[float, float]]) -> Belief:
        belief = Belief(0.0, 0.05)
        for gain, sd in order:
            belief = belief.told(gain, sd)
        return belief

    one, two = after(seen), after(seen[::-1])
    assert math.isclose(one.mean, two.mean, abs_tol=1e-9) and math.isclose(one.sd, two.sd)
    assert one.sd < 0.05 and one.n == len(seen)


def test_gains_count_as_a_share_of_the_loss() -> None:
    belief = Experience.of([told(run, "BP-WIDEN", 0.04) for run in range(50)]).kind("BP-WIDEN", "btd")
    assert belief.mean == pytest.approx(0.04, abs=1e-3) and belief.n == 50


def test_the_menu_shrinks_with_the_evidence_and_keeps_what_may_yet_be_best() -> None:
    def sizes(gap: float) -> list[int]:
        found = []
        for runs in range(6):
            seen = [told(r, n, gap if n == NAMES[0] else 0.0) for r in range(runs) for n in NAMES]
            found.append(len(Experience.of(seen).promising(NAMES, "btd", seed=0)))
        return found

    clear, unclear = sizes(0.05), sizes(0.0)
    assert clear[0] == 3 and clear[-1] == 1 and clear == sorted(clear, reverse=True)
    assert unclear == [3] * 6


def test_what_was_never_seen_takes_part() -> None:
    seen = [told(run, name, 0.1 if name == NAMES[0] else 0.0) for run in range(9) for name in NAMES[:2]]
    experience = Experience.of(seen)
    assert experience.promising(NAMES, "btd", seed=0) == ("BP-CONV-CAUSAL", "BP-WIDEN")
    assert experience.promising(NAMES, "bd", seed=0) == NAMES  # another kind of place


def test_only_proxies_speak_for_their_kind() -> None:
    alone = Experience.of([told(0, "BP-WIDEN", 0.5, group="schedule-0")])
    assert alone.kind("BP-WIDEN", "btd").n == 0 and alone.outcomes


def test_places_are_compared_by_the_same_kind_elsewhere() -> None:
    early = [told(run, "BP-WIDEN", 0.1, depth=0.0) for run in range(5)]
    late = [told(run, "BP-WIDEN", 0.0, depth=0.9) for run in range(5)]
    experience = Experience.of([*early, *late])
    assert experience.place("stream", 0.1) > 0.05 > -0.05 > experience.place("stream", 1.0)
    assert experience.place("mlp", 0.1) == Experience.of(early).place("stream", 0.0) == 0.0  # nothing to compare with


def test_it_is_plain_data_and_comes_back() -> None:
    experience = Experience.of([told(0, "BP-WIDEN", 0.1), told(1, "BP-MLP-GELU", 0.2)])
    assert Experience.from_plain(experience.plain()).outcomes == experience.outcomes


def test_what_was_not_measured_teaches_nothing() -> None:
    report = told(0, "BP-WIDEN", 0.1)
    unmeasured = report.model_copy(update={"counterfactual": None})
    nowhere = report.model_copy(update={"counterfactual": Counterfactual(mean=0, lower=-math.inf, upper=math.inf, n=1)})
    assert not Experience.of([unmeasured, nowhere]).outcomes


def test_it_is_read_from_a_file_a_folder_of_runs_and_a_forge(tmp_path: Path) -> None:
    reports = [told(run, "BP-WIDEN", 0.1) for run in range(3)]
    for report in reports:
        folder = tmp_path / "runs" / report.run_id
        folder.mkdir(parents=True)
        # A resumed run may have written it twice, and one that was killed half a line.
        text = to_json(report) + "\n"
        (folder / "fieldreports.jsonl").write_text(text + text + text[:40])
    urza = Urza(tmp_path / "forge" / "store", KeyRing(tmp_path / "forge" / "keys"))
    for report in reports:
        urza.report(report)
    urza.close()
    expected = Experience.of(reports).outcomes
    assert Experience.read(tmp_path / "runs").outcomes == expected
    assert Experience.read(tmp_path / "forge").outcomes == expected
    assert Experience.read(tmp_path / "runs" / "r0" / "fieldreports.jsonl").outcomes == expected[:1]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Experience.read(tmp_path / "nowhere")
    (tmp_path / "fieldreports.jsonl").write_text("{}\n{}\n")
    with pytest.raises(ConfigError, match="line 1"):
        Experience.read(tmp_path)
