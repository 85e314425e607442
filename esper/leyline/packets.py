"""The state of a run as Tamiyo sees it: columns, not objects, so that 10,000 seeds cost milliseconds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum, unique
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from esper.leyline.base import Message, Record
from esper.leyline.errors import ContractError
from esper.leyline.reports import Counterfactual, HardwareContext, SiteInfo
from esper.leyline.states import SEED_STATE_CODES, SeedState

DType = Literal["bool", "uint8", "int32", "int64", "float32", "float64"]
"""Element types that may travel."""

HEALTH_COLUMNS = (
    "chunk_mean",
    "chunk_variance",
    "dead_node_ratio",
    "avg_inter_node_correlation",
    "saturation",
    "gradient_norm",
    "gradient_norm_variance",
    "effective_rank",
    "growth_potential",
    "newborn_incumbent_ratio",
    "gradient_norm_trend",
    "dead_node_ratio_trend",
    "effective_rank_trend",
    "growth_potential_trend",
)
"""Telemetry that Kasmina always reports, explained in `docs/telemetry.md`; further columns may join them."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]
"""A part of a whole, 0 to 1."""

_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in get_args(DType)}
_STATES = tuple(SeedState)
_MAX_AXES = 4
_MAX_ITEMS = 2**32


@unique
class EdgeKind(StrEnum):
    """How two nodes of the topology relate. The order is the order of `EDGE_KIND_CODES`."""

    SEQUENTIAL = "SEQUENTIAL"
    """Neighbouring seeds of one layer: the source's chunk comes before the target's."""
    LAYER_FORWARD = "LAYER_FORWARD"
    """The source layer fires before the target layer in the forward pass."""
    CONTAINS = "CONTAINS"
    """The source layer holds the target seed."""
    CHILD_OF = "CHILD_OF"
    """The source layer is a module inside the target layer."""


EDGE_KIND_CODES = MappingProxyType({kind: code for code, kind in enumerate(EdgeKind)})
"""Edge kind to the uint8 code on the wire."""


class Array(Record):
    """A numeric array as a raw buffer: little-endian, C order.

    Args:
        dtype: element type.
        shape: axes, at most 4.
        data: the elements; `len(data) == product(shape) * itemsize`.

    Example:
        >>> Array.of([[1.0, 2.0]], "float32").numpy().shape
        (1, 2)
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: ArrayLike, dtype: DType | None = None) -> Self:
        """Copy `values` into a buffer, cast to `dtype` when one is given.

        Raises:
            ContractError: the element type may not travel.
        """
        array = np.asarray(values, dtype=dtype)
        name = array.dtype.name
        if name not in _DTYPES:
            raise ContractError(f"Arrays of {name} do not travel; cast to one of {', '.join(_DTYPES)}.")
        data = array.astype(_DTYPES[name], copy=False).tobytes()
        return cls(dtype=cast(DType, name), shape=array.shape, data=data)

    def numpy(self) -> NDArray[Any]:
        """Return a read-only view of the buffer."""
        return np.frombuffer(self.data, dtype=_DTYPES[self.dtype]).reshape(self.shape)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Refuse a shape that does not describe the buffer."""
        if len(self.shape) > _MAX_AXES or min(self.shape, default=0) < 0:
            raise ValueError(f"shape {self.shape} must have at most {_MAX_AXES} axes, none negative")
        if math.prod(max(size, 1) for size in self.shape) > _MAX_ITEMS:
            raise ValueError(f"shape {self.shape} is larger than the {_MAX_ITEMS} elements allowed")
        expected = math.prod(self.shape) * _DTYPES[self.dtype].itemsize
        if len(self.data) != expected:
            raise ValueError(f"{self.dtype}{list(self.shape)} needs {expected} bytes, got {len(self.data)}")
        return self


def _check_column(name: str, column: Array, dtype: DType, rows: int) -> None:
    """Raise `ContractError` unless `column` is one row of `dtype` per entry."""
    if column.dtype != dtype or column.shape != (rows,):
        raise ContractError(f"column {name} must be {dtype}[{rows}], got {column.dtype}{list(column.shape)}")


class SeedSummary(NamedTuple):
    """One row of a `SeedTable`, with the units of its columns."""

    seed_id: str
    state: SeedState
    alpha: float
    kernel_hash: int
    last_epoch: int
    ready: bool


class SeedTable(Record):
    """Every seed of a model, one row each.

    Args:
        seed_ids: full ids, `layer#chunk.slot`; unique.
        state: uint8 codes of `SEED_STATE_CODES`.
        alpha: float32 share of the child in the output, 0 to 1.
        kernel_hash: int64 short hash of the kernel; 0 for none.
        last_epoch: int32 epoch of the last transition; -1 for never.
        ready: uint8, 1 when the seed's present stage has done its work.
    """

    seed_ids: tuple[str, ...] = ()
    state: Array = Array.of([], "uint8")
    alpha: Array = Array.of([], "float32")
    kernel_hash: Array = Array.of([], "int64")
    last_epoch: Array = Array.of([], "int32")
    ready: Array = Array.of([], "uint8")

    @classmethod
    def of(
        cls,
        seed_ids: Sequence[str],
        *,
        state: ArrayLike | None = None,
        alpha: ArrayLike | None = None,
        kernel_hash: ArrayLike | None = None,
        last_epoch: ArrayLike | None = None,
        ready: ArrayLike | None = None,
    ) -> Self:
        """Build the table from columns; one left out holds the value of a dormant seed."""
        rows = len(seed_ids)

        def column(values: ArrayLike | None, dtype: DType, default: int = 0) -> Array:
            return Array.of(np.full(rows, default) if values is None else values, dtype)

        return cls(
            seed_ids=tuple(seed_ids),
            state=column(state, "uint8", SEED_STATE_CODES[SeedState.DORMANT]),
            alpha=column(alpha, "float32"),
            kernel_hash=column(kernel_hash, "int64"),
            last_epoch=column(last_epoch, "int32", -1),
            ready=column(ready, "uint8"),
        )

    def __len__(self) -> int:
        """Return the number of seeds."""
        return len(self.seed_ids)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Row of each seed id."""
        return {seed_id: row for row, seed_id in enumerate(self.seed_ids)}

    def rows(self) -> Iterator[SeedSummary]:
        """Yield the rows in order."""
        columns = (self.state, self.alpha, self.kernel_hash, self.last_epoch, self.ready)
        values = zip(self.seed_ids, *(column.numpy().tolist() for column in columns), strict=True)
        for seed_id, code, alpha, kernel, epoch, ready in values:
            yield SeedSummary(seed_id, _STATES[code], alpha, kernel, epoch, bool(ready))

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        """Refuse columns of other lengths or types, repeated ids, and codes that name no state."""
        rows = len(self.seed_ids)
        _check_column("state", self.state, "uint8", rows)
        _check_column("alpha", self.alpha, "float32", rows)
        _check_column("kernel_hash", self.kernel_hash, "int64", rows)
        _check_column("last_epoch", self.last_epoch, "int32", rows)
        _check_column("ready", self.ready, "uint8", rows)
        if len(set(self.seed_ids)) != rows:
            raise ValueError("seed ids repeat; each seed has one row")
        if (code := self.state.numpy().max(initial=0)) >= len(_STATES):
            raise ValueError(f"state code {code} names no state; codes end at {len(_STATES) - 1}")
        return self


class HealthMap(Record):
    """Telemetry by name, one float32 row per seed in the order of the packet's `seed_states`.

    Args:
        columns: float32 arrays by name; those of `HEALTH_COLUMNS` and any others. NaN marks 'not sampled'.

    Example:
        >>> HealthMap.of(dead_node_ratio=[0.0, 0.5]).column("dead_node_ratio").tolist()
        [0.0, 0.5]
    """

    columns: dict[str, Array] = Field(default_factory=dict)

    @classmethod
    def of(cls, **columns: ArrayLike) -> Self:
        """Build the map from one sequence per column."""
        return cls(columns={name: Array.of(values, "float32") for name, values in columns.items()})

    def column(self, name: str) -> NDArray[np.float32]:
        """Return one column.

        Raises:
            ContractError: no such column was sampled.
        """
        if name not in self.columns:
            known = ", ".join(sorted(self.columns)) or "none: nothing was sampled yet"
            raise ContractError(f"No health column {name!r}; this packet has: {known}.")
        return self.columns[name].numpy()

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        """Refuse columns of different lengths or of another type."""
        rows = next((column.shape[:1] for column in self.columns.values()), (0,))
        for name, column in self.columns.items():
            _check_column(name, column, "float32", sum(rows))
        return self


class Edges(Record):
    """The topology as index pairs.

    Node `i` is the seed of row `i` of `seed_states`; node `len(seed_states) + j` is layer `j` of `layers`.

    Args:
        layers: module paths of the layers that carry seeds, in the order of the forward pass.
        src: int32 node indices.
        dst: int32 node indices.
        kind: uint8 codes of `EDGE_KIND_CODES`.
    """

    layers: tuple[str, ...] = ()
    src: Array = Array.of([], "int32")
    dst: Array = Array.of([], "int32")
    kind: Array = Array.of([], "uint8")

    @classmethod
    def of(cls, layers: Sequence[str], edges: Sequence[tuple[int, int, EdgeKind]]) -> Self:
        """Build the columns from `(source, target, kind)` triples."""
        src, dst, kind = zip(*edges, strict=True) if edges else ((), (), ())
        codes = [EDGE_KIND_CODES[entry] for entry in kind]
        return cls(
            layers=tuple(layers),
            src=Array.of(src, "int32"),
            dst=Array.of(dst, "int32"),
            kind=Array.of(codes, "uint8"),
        )

    def __len__(self) -> int:
        """Return the number of edges."""
        return len(self.kind.data)

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        """Refuse columns of other lengths or types, and codes that name no kind."""
        _check_column("src", self.src, "int32", len(self))
        _check_column("dst", self.dst, "int32", len(self))
        _check_column("kind", self.kind, "uint8", len(self))
        if (code := self.kind.numpy().max(initial=0)) >= len(EdgeKind):
            raise ValueError(f"edge code {code} names no kind; codes end at {len(EdgeKind) - 1}")
        return self


class Budget(Record):
    """What growth may spend and has spent. `None` as a limit means no limit.

    Args:
        max_params: parameters that may be added.
        used_params: parameters of the children that are alive.
        max_flops: operations per sample that may be added to a forward.
        used_flops: operations per sample of the children that are alive.
        max_latency_ms: milliseconds that may be added to a forward.
        used_latency_ms: milliseconds added by the children that are alive.
        max_concurrent: adaptations that may be under way at once; a trial counts as one.
        in_progress: adaptations under way.
    """

    max_params: int | None = Field(default=None, ge=0)
    used_params: int = Field(default=0, ge=0)
    max_flops: int | None = Field(default=None, ge=0)
    used_flops: int = Field(default=0, ge=0)
    max_latency_ms: float | None = Field(default=None, ge=0.0)
    used_latency_ms: float = Field(default=0.0, ge=0.0)
    max_concurrent: int = Field(default=1, ge=0)
    in_progress: int = Field(default=0, ge=0)


class SystemStatePacket(Message):
    """Everything that a policy may decide on, taken at one boundary.

    Version 1.1 adds `site_paths`, `site_health` and `memory_pressure`.

    Args:
        run_id: the run.
        current_epoch: epoch that just ended, from 0.
        global_step: optimizer steps done.
        train_loss: mean training loss since the last boundary, in the task's unit; `None` if not yet known.
        validation_loss: loss on the decision part; `None` if not yet known.
        metrics: other metrics of the task by name, e.g. `validation_accuracy` (0 to 1).
        hardware_context: device of the run.
        seed_states: every seed, one row each.
        health_map: telemetry, no rows or one per seed: that of the seed's chunk.
        site_paths: module paths of the rows of `site_health`.
        site_health: the same telemetry of whole sites, one row each.
        memory_pressure: share of each device's memory that is in use, 0 to 1, by device: `cpu` is the machine itself.
        edges: topology over seeds and layers.
        sites: the places that carry seeds.
        last_decisions: explanations of the latest decisions, oldest first.
        evidence: paired measurement by seed id, for the seeds evaluated at this boundary.
        budget: what growth may still spend.
    """

    SCHEMA: ClassVar[str] = "1.1"
    schema_version: str = "1.1"
    run_id: str
    current_epoch: int = Field(ge=0)
    global_step: int = Field(ge=0)
    train_loss: float | None = None
    validation_loss: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    hardware_context: HardwareContext = HardwareContext(device_type="cpu")
    seed_states: SeedTable = SeedTable()
    health_map: HealthMap = HealthMap()
    site_paths: tuple[str, ...] = ()
    site_health: HealthMap = HealthMap()
    memory_pressure: dict[str, Share] = Field(default_factory=dict)
    edges: Edges = Edges()
    sites: tuple[SiteInfo, ...] = ()
    last_decisions: tuple[str, ...] = ()
    evidence: dict[str, Counterfactual] = Field(default_factory=dict)
    budget: Budget = Budget()

    @property
    def validation_accuracy(self) -> float | None:
        """Accuracy on the decision part, 0 to 1; `None` when the task reports none."""
        return self.metrics.get("validation_accuracy")

    def state_of(self, seed_id: str) -> SeedState:
        """Return the state of one seed.

        Raises:
            ContractError: the packet has no such seed.
        """
        row = self.seed_states.index.get(seed_id)
        if row is None:
            raise ContractError(f"No seed {seed_id!r} in this packet of {len(self.seed_states)} seeds.")
        return _STATES[self.seed_states.state.data[row]]

    def rows(self) -> Iterator[SeedSummary]:
        """Yield every seed in order."""
        return self.seed_states.rows()

    def named_edges(self) -> Iterator[tuple[str, str, EdgeKind]]:
        """Yield every edge as source name, target name and kind."""
        names, kinds = self.seed_states.seed_ids + self.edges.layers, tuple(EdgeKind)
        columns = (self.edges.src, self.edges.dst, self.edges.kind)
        for src, dst, code in zip(*(column.numpy().tolist() for column in columns), strict=True):
            yield names[src], names[dst], kinds[code]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse telemetry of another number of seeds, and edges or evidence that point nowhere."""
        rows = len(self.seed_states)
        for health, length in ((self.health_map, rows), (self.site_health, len(self.site_paths))):
            for name, column in health.columns.items():
                _check_column(name, column, "float32", length)
        nodes = rows + len(self.edges.layers)
        for ends in (self.edges.src.numpy(), self.edges.dst.numpy()):
            if ends.size and not 0 <= ends.min() <= ends.max() < nodes:
                raise ValueError(f"an edge leaves the {nodes} nodes of the topology")
        if unknown := [seed_id for seed_id in self.evidence if seed_id not in self.seed_states.index]:
            raise ValueError(f"evidence about seeds that are not in the packet: {', '.join(unknown)}")
        return self
