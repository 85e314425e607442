"""A query finds what a plain filter finds, and ranks it by what was asked."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.artifacts import KernelManifest
from esper.leyline.codec import from_json
from esper.leyline.kernels import ArtifactStatus, CompiledKernelArtifact, KernelQuery
from esper.urza.catalogue import RANKED, Catalogue
from tests.urza.samples import blueprint, compiled, spec, verdict

TAGS = ("fast", "small", "stable", "odd")
tags = st.lists(st.sampled_from(TAGS), max_size=3, unique=True).map(tuple)


@dataclass(frozen=True)
class Row:
    name: str
    status: ArtifactStatus
    tags: tuple[str, ...]
    latency_ms: float
    memory_mb: float
    layout: str
    target: str
    width: int
    hidden: int


rows = st.builds(
    Row,
    name=st.sampled_from(["BP-A", "BP-B"]),
    status=st.sampled_from([ArtifactStatus.VALIDATED, ArtifactStatus.VALIDATED, ArtifactStatus.REJECTED]),
    tags=tags,
    latency_ms=st.sampled_from([0.1, 0.5, 2.0]),
    memory_mb=st.sampled_from([1.0, 8.0, 64.0]),
    layout=st.sampled_from(["btd", "bd"]),
    target=st.sampled_from(["cpu", "cpu", "cuda"]),
    width=st.sampled_from([32, 64]),
    hidden=st.sampled_from([8, 16]),
)
queries = st.builds(
    KernelQuery,
    blueprint_id=st.sampled_from(["", "", "BP-A", blueprint("BP-B").id]),
    required_tags=tags,
    preferred_tags=tags,
    excluded_tags=tags,
    max_latency_ms=st.sampled_from([None, None, 0.5]),
    max_memory_mb=st.sampled_from([None, None, 8.0]),
    target=st.sampled_from(["cpu", "cuda"]),
    layout=st.sampled_from([None, "btd"]),
    dims=st.sampled_from([{}, {}, {"d": 64}, {"h": 8, "d_out": 32}, {"unknown": 1}]),
)


def records(row: Row, kernel_id: str) -> tuple[CompiledKernelArtifact, KernelManifest]:
    sizes = {"layout": row.layout, "target": row.target, "d_in": row.width, "d_out": row.width}
    made = compiled(kernel_id, row.name, spec=spec(row.name, dims={"h": row.hidden}, **sizes))
    measured = {"latency_ms": row.latency_ms, "memory_mb": row.memory_mb}
    kernel = CompiledKernelArtifact(
        id=kernel_id,
        name=row.name,
        status=row.status,
        blueprint_id=blueprint(row.name).id,
        compilation_pipeline="standard",
        validation_report=verdict(kernel_id, generated_tags=row.tags, measured=measured),
    )
    return kernel, from_json(KernelManifest, made.manifest)


def matches(row: Row, query: KernelQuery) -> bool:
    """The same question in plain words."""
    dims = {"d": row.width, "d_in": row.width, "d_out": row.width, "tokens": 32, "h": row.hidden}
    return (
        row.status is ArtifactStatus.VALIDATED
        and query.blueprint_id in ("", row.name, blueprint(row.name).id)
        and set(query.required_tags) <= set(row.tags)
        and not set(query.excluded_tags) & set(row.tags)
        and (query.max_latency_ms is None or row.latency_ms <= query.max_latency_ms)
        and (query.max_memory_mb is None or row.memory_mb <= query.max_memory_mb)
        and row.target == query.target
        and query.layout in (None, row.layout)
        and all(dims.get(name) == size for name, size in query.dims.items())
    )


@given(content=st.lists(rows, max_size=20), query=queries)
def test_find_is_a_plain_filter(content: list[Row], query: KernelQuery) -> None:
    catalogue = Catalogue()
    for number, row in enumerate(content):
        catalogue.update(*records(row, f"k{number}"))
    found = catalogue.find(query)
    expected = [f"k{number}" for number, row in enumerate(content) if matches(row, query)]
    assert list(found.matching_kernels) == expected
    ranked = [kernel.kernel_artifact_id for kernel in found.ranked]
    assert len(ranked) == min(len(expected), RANKED)
    assert set(ranked) <= set(expected)
    assert all(kernel.why for kernel in found.ranked)
    scores = [kernel.score for kernel in found.ranked]
    assert scores == sorted(scores, reverse=True)


@given(first=rows, second=rows)
def test_a_changed_kernel_has_one_row(first: Row, second: Row) -> None:
    catalogue = Catalogue()
    for row in (first, second):
        catalogue.update(*records(row, "k"))
    assert len(catalogue) == (second.status is ArtifactStatus.VALIDATED)
    for tag in TAGS:
        query = KernelQuery(required_tags=(tag,), target=second.target)
        assert (catalogue.find(query).matching_kernels == ("k",)) == matches(second, query)


def row(**fields: object) -> Row:
    whole: dict[str, object] = {
        "name": "BP-A",
        "status": ArtifactStatus.VALIDATED,
        "tags": (),
        "latency_ms": 0.5,
        "memory_mb": 1.0,
        "layout": "btd",
        "target": "cpu",
        "width": 64,
        "hidden": 8,
    }
    return Row(**{**whole, **fields})  # type: ignore[arg-type]


def test_preference_outranks_speed_and_speed_decides_the_rest() -> None:
    catalogue = Catalogue()
    catalogue.update(*records(row(latency_ms=2.0, tags=("stable",)), "preferred"))
    catalogue.update(*records(row(latency_ms=0.5), "slow"))
    catalogue.update(*records(row(latency_ms=0.1), "quick"))
    found = catalogue.find(KernelQuery(preferred_tags=("stable",)))
    assert [kernel.kernel_artifact_id for kernel in found.ranked] == ["preferred", "quick", "slow"]
    assert found.ranked[0].why == "1 of 1 preferred tags, 2 ms, risk 0.10, interest 0.00"


def test_a_kernel_without_a_benchmark_is_offered_last() -> None:
    catalogue = Catalogue()
    kernel, manifest = records(row(), "unmeasured")
    report = verdict("unmeasured").model_copy(update={"benchmark_results": None})
    catalogue.update(kernel.model_copy(update={"validation_report": report}), manifest)
    assert catalogue.find(KernelQuery()).ranked[0].why.startswith("no latency")
    assert catalogue.find(KernelQuery(max_latency_ms=100.0)).matching_kernels == ()
    catalogue.update(*records(row(), "measured"))
    assert [kernel.kernel_artifact_id for kernel in catalogue.find(KernelQuery()).ranked] == ["measured", "unmeasured"]


def test_many_kernels_and_facts_outgrow_the_first_columns() -> None:
    catalogue = Catalogue()
    for number in range(600):
        catalogue.update(*records(row(tags=(f"tag{number}",), latency_ms=1.0 + number), f"k{number}"))
    assert catalogue.find(KernelQuery(required_tags=("tag599",))).matching_kernels == ("k599",)
    assert len(catalogue.find(KernelQuery()).matching_kernels) == 600
