"""All seeds of one model: layers, records, state arrays, and the topology that a checkpoint needs."""

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from esper.blueprints import SiteShape, build, parse_ir
from esper.kasmina import telemetry
from esper.kasmina.config import KasminaConfig
from esper.kasmina.decoding import DecodingGuard, mixes_tokens
from esper.kasmina.graft import Graft
from esper.kasmina.layer import KasminaLayer, SiteFacts, require_chunks
from esper.kasmina.record import SeedRecord
from esper.kasmina.sites import Targets, find_sites, fused_sites, is_time_major, site_kind, tied_sites
from esper.kasmina.state import SeedArrays
from esper.leyline.errors import CheckpointError, EsperError, NoSuchSeed, SiteError
from esper.leyline.events import Fault
from esper.leyline.ids import SeedId
from esper.leyline.states import WITH_CHILD, SeedState

_log = logging.getLogger(__name__)

TOPOLOGY_KEY = "topology"
"""State-dict key of the grown topology (UTF-8 JSON in a uint8 tensor); absent while nothing has grown."""

_EXTRAS = ("facts", "alpha", "objective", "draws", "trains", "remembers_host")

_FAULT: dict[str, Any] = {"fault": None, "fault_kind": "", "fault_reported": False}
"""Extras that a topology of an earlier release lacks, and what they were then."""


class SeedBank(nn.Module):
    """Holds one `KasminaLayer` per site in a ModuleDict beside the host.

    Its state dict describes itself: once something has grown, the entry `topology` lets `load_state_dict` rebuild the
    children before it fills them. While nothing has grown it adds no key at all.

    Args:
        host: the model to attach to.
        config: how seeds live.
        targets: where they sit; None takes `config.targets`, then the default families.
    """

    def __init__(self, host: nn.Module, config: KasminaConfig, targets: Targets = None) -> None:
        """Attach a hook to every site that may carry seeds."""
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict()
        self.arrays = SeedArrays()
        self.rows: dict[SeedId, int] = {}
        self.records: dict[SeedId, SeedRecord] = {}
        self.births = 0
        self.refused: dict[str, str] = {}
        self.handles: list[RemovableHandle] = []
        require_unwrapped(host)
        self.decoding = DecodingGuard(host)
        sites = find_sites(host, targets if targets is not None else config.targets)
        self.refused.update(tied_sites(host, sites))
        for path, module in sites.items():
            if path not in self.refused:
                self._attach(path, module)
                self.layer(path).time_major = is_time_major(host, path)
        if fused := fused_sites(host, (layer.path for layer in self.all_layers())):
            _log.warning("hooks turn the fused evaluation of %s off; it is equal to rounding.", ", ".join(fused))
        self.arrays.seal()
        self.register_state_dict_post_hook(_write_topology)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_read_topology)  # type: ignore[no-untyped-call]

    def _attach(self, path: str, module: nn.Module) -> None:
        chunks = self.config.seeds_per_layer
        width = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
        if isinstance(width, int):
            require_chunks(path, chunks, width)
        layer = KasminaLayer(path, site_kind(path, module), chunks, module)
        self.layers[layer_name(path)] = layer
        self.handles.append(module.register_forward_hook(layer.hook, with_kwargs=True))
        first = self.arrays.add_rows(chunks)
        self.rows.update({SeedId(path, chunk): first + chunk for chunk in range(chunks)})

    def detach(self) -> None:
        """Remove every hook from the host."""
        self.decoding.release()
        while self.handles:
            self.handles.pop().remove()

    def all_layers(self) -> Iterator[KasminaLayer]:
        """Yield the layers in module order."""
        for layer in self.layers.values():
            assert isinstance(layer, KasminaLayer)
            yield layer

    def layer(self, path: str) -> KasminaLayer:
        """Return the layer of a site.

        Raises:
            NoSuchSeed: no seeds sit there; the message says why when the site was refused.
        """
        key = layer_name(path)
        if key not in self.layers:
            why = self.refused.get(path)
            near = ", ".join(layer.path for layer in list(self.all_layers())[:5]) or "(none)"
            raise NoSuchSeed(f"{path!r} carries no seeds" + (f": {why}" if why else f"; sites are {near}, ..."))
        layer = self.layers[key]
        assert isinstance(layer, KasminaLayer)
        return layer

    def state(self, seed: SeedId) -> SeedState:
        """Return the state of a seed; a slot that was never used is DORMANT.

        Raises:
            NoSuchSeed: the layer or chunk does not exist.
        """
        row = self.rows.get(seed)
        if row is not None:
            return self.arrays.state(row)
        if seed.chunk >= self.layer(seed.layer).chunks:
            raise NoSuchSeed(f"{seed} names chunk {seed.chunk}; {seed.layer!r} has {self.layer(seed.layer).chunks}.")
        return SeedState.DORMANT

    def open(self, seed: SeedId) -> int:
        """Return the row of a seed, opening its slot if it is new."""
        self.state(seed)
        if seed not in self.rows:
            self.rows[seed] = self.arrays.add_row()
        return self.rows[seed]

    def free_slot(self, path: str, chunk: int = 0, taken: frozenset[SeedId] = frozenset()) -> SeedId:
        """Return the first dormant slot of a chunk that is not in `taken`."""
        slot = 0
        while (seed := SeedId(path, chunk, slot)) in taken or self.state(seed) is not SeedState.DORMANT:
            slot += 1
        return seed

    def site_shape(self, seed: SeedId) -> SiteShape | None:
        """Return the shape that a child of this seed must fit, or None before the first batch."""
        layer = self.layer(seed.layer)
        if layer.facts is None or layer.refusal is not None:
            return None
        _, width = telemetry.chunk_span(layer.facts.width, layer.chunks, seed.chunk)
        facts = layer.facts
        return SiteShape(facts.layout, facts.input_width, width, facts.tokens, layer.kind)

    def graft(self, seed: SeedId) -> Graft | None:
        """Return the child in a seed's slot, or None."""
        grafts = self.layer(seed.layer).grafts
        name = graft_name(seed)
        graft = grafts[name] if name in grafts else None  # noqa: SIM401 - a ModuleDict has no `get`
        assert graft is None or isinstance(graft, Graft)
        return graft

    def grafted(self) -> dict[SeedId, Graft]:
        """Return the seeds that hold a child, in the order of birth."""
        living = [(r.birth, s) for s, r in self.records.items() if SeedState(r.state) in WITH_CHILD]
        found = {seed: self.graft(seed) for _, seed in sorted(living)}
        return {seed: graft for seed, graft in found.items() if graft is not None}

    def plant(self, seed: SeedId, child: nn.Module, record: SeedRecord) -> Graft:
        """Put a child into a seed's slot as a shadow at alpha 0."""
        layer = self.layer(seed.layer)
        assert layer.facts is not None
        start, width = telemetry.chunk_span(layer.facts.width, layer.chunks, seed.chunk)
        graft = Graft(
            child,
            reads=record.reads,
            replaces=record.ir.get("initial") == "identity",
            start=start,
            width=None if layer.chunks == 1 else width,
        )
        graft.norm_bound, graft.noise = self.config.shadow_norm_bound, self.config.reconstruction_noise
        # Boundaries lie inside validation, and what is evaluating then must train afterwards.
        return self.replant(seed, graft.to(layer.health.device).train(), record)

    def replant(self, seed: SeedId, graft: Graft, record: SeedRecord) -> Graft:
        """Put a child that exists already into a seed's slot."""
        layer = self.layer(seed.layer)
        layer.grafts[graft_name(seed)] = graft
        layer.refresh()
        if mixes_tokens(record.ir):
            self.decoding.add(str(seed), graft)
        return graft

    def uproot(self, seed: SeedId) -> None:
        """Remove the child of a seed without a trace."""
        layer = self.layer(seed.layer)
        layer.grafts.pop(graft_name(seed))
        self.decoding.drop(str(seed))
        layer.refresh()

    def impose(self, record: SeedRecord) -> None:
        """Give a seed a record and the state that it names, without a child."""
        seed = SeedId.parse(record.seed_id)
        if self.graft(seed) is not None:
            self.uproot(seed)
        self.records[seed] = record
        self.births = max(self.births, record.birth + 1)
        self.arrays.set_state(self.open(seed), SeedState(record.state))
        self.arrays.seal()

    def topology(self) -> list[dict[str, Any]]:
        """Return every record as plain data, in order of birth, with the layer's facts and the child's alpha."""
        entries = []
        for seed, record in sorted(self.records.items(), key=lambda item: (item[1].birth, str(item[0]))):
            graft, facts = self.graft(seed), self.layer(seed.layer).facts
            entries.append(
                record.to_plain()
                | {"facts": list(facts) if facts else None, "alpha": graft.strength if graft else 0.0}
                | {"objective": graft.objective if graft else "", "draws": graft.draws if graft else 0}
                | {"trains": _trains(graft)}
                | {"remembers_host": graft is not None and graft.reference is not None}
                | {name: getattr(graft, name) if graft else default for name, default in _FAULT.items()}
            )
        return entries

    def rebuild(self, topology: list[dict[str, Any]]) -> None:
        """Make the seeds what `topology` says; weights are filled by `load_state_dict`.

        Raises:
            CheckpointError: the topology is damaged, or names a site that this host does not have.
        """
        entries = [self._read(entry) for entry in topology]
        for seed in list(self.grafted()):
            self.uproot(seed)
        self.records.clear()
        self.births = 0
        first_slots = sum(layer.chunks for layer in self.all_layers())
        self.rows = {seed: row for seed, row in self.rows.items() if row < first_slots}
        self.arrays.reset(first_slots)
        for entry in entries:
            self._restore(*entry)
        self.arrays.seal()

    def _read(self, entry: Mapping[str, Any]) -> tuple[SeedRecord, dict[str, Any], nn.Module | None]:
        """Read one entry, and build its child, before anything changes."""
        try:
            extras = {name: entry[name] for name in _EXTRAS} | {n: entry.get(n, old) for n, old in _FAULT.items()}
            extras["facts"] = SiteFacts(*extras["facts"]) if extras["facts"] is not None else None
            if extras["fault"] is not None:
                Fault(extras["fault_kind"])
            record = SeedRecord.from_plain({name: value for name, value in entry.items() if name not in extras})
            self.state(SeedId.parse(record.seed_id))
            child = _build(record) if SeedState(record.state) in WITH_CHILD else None
        except (EsperError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the saved topology does not fit this model: {error!r}") from error
        return record, extras, child

    def _restore(self, record: SeedRecord, extras: Mapping[str, Any], child: nn.Module | None) -> None:
        seed = SeedId.parse(record.seed_id)
        layer, row = self.layer(seed.layer), self.open(seed)
        if extras["facts"] is not None and layer.facts is None:
            layer.facts = extras["facts"]
        self.records[seed] = record
        self.births = max(self.births, record.birth + 1)
        self.arrays.set_state(row, SeedState(record.state))
        if child is not None:
            self._regrow(seed, record, extras, child)
            self.arrays.columns["alpha"][row] = extras["alpha"]

    def _regrow(self, seed: SeedId, record: SeedRecord, extras: Mapping[str, Any], child: nn.Module) -> None:
        graft = self.plant(seed, child, record)
        graft.objective, graft.draws = extras["objective"], extras["draws"]
        for name in _FAULT:
            setattr(graft, name, extras[name])
        graft.set_alpha(extras["alpha"])
        graft.child.requires_grad_(extras["trains"])
        if extras["remembers_host"]:
            graft.remember_host(self.layer(seed.layer).site)
        self.layer(seed.layer).refresh()

    def added_parameters(self) -> int:
        """Return the number of parameters that grafts add to the host."""
        return sum(p.numel() for graft in self.grafted().values() for p in graft.child.parameters())


def layer_name(path: str) -> str:
    """Return the name of a site's layer in the bank; the slash in front keeps it apart from a ModuleDict's methods."""
    return "/" + path.replace(".", "/")


def require_unwrapped(host: nn.Module) -> None:
    """Check that no other bank hangs on the host.

    Raises:
        SiteError: its modules already carry seeds.
    """
    for path, module in host.named_modules():
        if any(isinstance(getattr(hook, "__self__", None), KasminaLayer) for hook in module._forward_hooks.values()):
            raise SiteError(f"{path or 'the model'} already carries seeds; give a fresh host, or `esper.unwrap` first.")


def graft_name(seed: SeedId) -> str:
    """Return the name of a seed's child inside its layer, e.g. `c0s1`."""
    return f"c{seed.chunk}s{seed.slot}"


def _build(record: SeedRecord) -> nn.Module:
    return build(parse_ir(record.ir), SiteShape(**record.site), record.dims, seed=record.init_seed)


def _trains(graft: Graft | None) -> bool:
    return graft is not None and any(p.requires_grad for p in graft.child.parameters())


def _write_topology(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    assert isinstance(module, SeedBank)
    if module.records:
        text = json.dumps(module.topology(), sort_keys=True).encode()
        state[prefix + TOPOLOGY_KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8).clone()


def _read_topology(module: nn.Module, state: dict[str, Any], prefix: str, *_rest: object) -> None:
    assert isinstance(module, SeedBank)
    saved = state.pop(prefix + TOPOLOGY_KEY, None)
    if saved is None and not module.records:
        return
    module.rebuild(parse_topology(saved) if saved is not None else [])


def parse_topology(saved: Any) -> list[dict[str, Any]]:
    """Read what a state dict holds under `topology`.

    Raises:
        CheckpointError: it is not a JSON list of records.
    """
    try:
        topology = json.loads(saved.cpu().numpy().tobytes().decode())
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the saved topology cannot be read: {error}") from error
    if not (isinstance(topology, list) and all(isinstance(entry, dict) for entry in topology)):
        raise CheckpointError("the saved topology is no list of records; it is damaged or was not written by Esper.")
    return topology
