"""What is taken home computes what grew, with and without Esper."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import esper
from esper.blueprints import load_library, parse_ir, why_not
from esper.blueprints.capabilities import lacking
from esper.kasmina.bank import SeedBank
from esper.kasmina.layer import KasminaLayer
from esper.leyline.errors import CheckpointError, ConfigError, OutputError
from esper.leyline.events import Fault
from esper.leyline.ids import SeedId
from esper.leyline.states import SeedState
from esper.models import MLP
from esper.tolaria.planted import Grown, Planted
from tests.grafts import grafted, stir, wrapped
from tests.helpers import grow

OFFSET = parse_ir(
    {
        "name": "BP-TRY-OFFSET",
        "mergeable": True,
        "layouts": ["bd", "btd"],
        "nodes": [{"id": "a", "op": "linear", "attrs": {"out": "d_out"}}],
        "output": "a",
    }
)
MIXING = parse_ir(
    {
        "name": "BP-TRY-BOTH",
        "mergeable": True,
        "layouts": ["bd", "btd", "bchw"],
        "nodes": [{"id": "g", "op": "gain"}, {"id": "twice", "op": "add", "inputs": ["g", "input"]}],
        "output": "twice",
    }
)
LIBRARY = load_library()


class Tokens(nn.Module):
    """Token-wise layers with an output that is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.down(torch.relu(self.up(x))) + x, 3


class Images(nn.Module):
    """Convolutions, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(torch.relu(self.a(x))).mean((2, 3)))


HOSTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "bd": (lambda: MLP(widths=(6, 10, 8, 4)), (5, 6)),
    "btd": (Tokens, (3, 7, 8)),
    "bchw": (Images, (2, 3, 6, 6)),
}
SITES = {"bd": ["layers.0", "layers.2", "layers.4"], "btd": ["up", "down", ""], "bchw": ["a", "b", "out"]}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(x)
    return found[0] if isinstance(found, tuple) else found


def close(one: Tensor, other: Tensor, share: float = 1e-6) -> bool:
    return bool((one.double() - other.double()).abs().max() <= share * one.double().abs().max())


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_an_export_computes_what_grew(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(sorted(HOSTS)))
    make, shape = HOSTS[layout]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(shape)
    model = wrapped(make(), x, chunks=data.draw(st.sampled_from([1, 2])))
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from([p for p in SITES[layout] if p]))
        chunk = data.draw(st.integers(0, model.bank.layer(path).chunks - 1))
        site = model.bank.site_shape(SeedId(path, chunk))
        assert site is not None
        fitting = [ir for ir in [b.ir for b in LIBRARY] + [OFFSET, MIXING] if why_not(ir, site) is None]
        ir = data.draw(st.sampled_from(fitting))
        grafted(model, path, ir, chunk=chunk, reads=data.draw(st.sampled_from([ir.reads, *ir.also_reads])))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wanted = outputs(model, x)
    beside, folded = esper.export(model, merge=False, example=x), esper.export(model, example=x)
    assert torch.equal(outputs(beside, x), wanted)
    assert close(wanted, outputs(folded, x))
    assert not any(isinstance(m, SeedBank | KasminaLayer) for m in [*beside.modules(), *folded.modules()])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(outputs(model, x), wanted)
    if not any(isinstance(m, Grown) for m in folded.modules()):
        assert folded.state_dict().keys() == make().state_dict().keys()


@pytest.mark.parametrize("path", ["a", "b"])
def test_gains_fold_into_convolutions(path: str) -> None:
    x = torch.randn(2, 3, 6, 6)
    model = wrapped(Images(), x)
    grafted(model, path, "BP-PROJ-IA3")
    grafted(model, path, MIXING)
    plain = esper.export(model, example=x)
    assert plain.state_dict().keys() == Images().state_dict().keys()
    assert close(outputs(model, x), outputs(plain, x))
    assert not torch.equal(outputs(plain, x), outputs(model.host, x[:1]))


def kept(plain: nn.Module) -> int:
    return sum(isinstance(m, Planted) for m in plain.modules())


def test_what_cannot_fold_exactly_stays_a_module() -> None:
    x = torch.randn(5, 6)

    def exported(path: str, *blueprints: Any, host: nn.Module | None = None) -> int:
        model = wrapped(
            host or nn.Sequential(nn.Linear(6, 8, bias=False), nn.Sequential(nn.Linear(8, 4))), x, targets=["*"]
        )
        for blueprint in blueprints:
            grafted(model, path, blueprint)
        plain = esper.export(model, example=x)
        assert close(outputs(model, x), outputs(plain, x))
        return kept(plain)

    assert exported("0", "BP-PROJ-LORA", "BP-PROJ-IA3") == 0
    assert exported("0", OFFSET) == 1, "the host has no bias for the child's offset"
    assert exported("0", "BP-PROJ-LORA", "BP-MLP-GELU") == 2, "the other child reads the output that would change"
    assert exported("0", "BP-PROJ-LORA", "BP-WIDEN") == 1, "the other child reads the input"
    assert exported("1", "BP-PROJ-LORA") == 1, "the site is a Sequential"
    hooked = nn.Sequential(nn.Linear(6, 4))
    hooked[0].register_forward_hook(lambda module, args, output: output.relu())
    assert exported("0", "BP-PROJ-LORA", host=hooked) == 1, "the user's hook lies between"


@pytest.mark.parametrize("merge", [True, False])
def test_a_half_precision_host_keeps_its_children_beside_it(merge: bool, tmp_path: Path) -> None:
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = wrapped(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).bfloat16(), x)
    grafted(model, "0", "BP-PROJ-LORA")
    grafted(model, "2", "BP-MLP-GELU", dtype=torch.bfloat16)
    plain = esper.export(model, tmp_path / "net", merge=merge, example=x)
    assert torch.equal(plain(x), model(x)), "nothing was rounded"
    assert kept(plain) == 2
    host = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    assert torch.equal(loaded(tmp_path / "net", host)(x), model(x)), "the file's precision is taken"
    assert kept(esper.export(copy.deepcopy(model).float())) == 1, "in float32 the low-rank child folds"


def loaded(folder: Path, host: nn.Module) -> nn.Module:
    names: dict[str, Any] = {"__name__": "grown", "__file__": str(folder / "grown.py")}
    exec(compile((folder / "grown.py").read_text(), "grown.py", "exec"), names)
    assert "esper" not in {line.split()[1].split(".")[0] for line in names_imported(folder)}
    model: nn.Module = names["load"](host)
    return model


def names_imported(folder: Path) -> list[str]:
    return [line for line in (folder / "grown.py").read_text().splitlines() if line.startswith(("import ", "from "))]


@pytest.mark.parametrize("name", [b.ir.name for b in LIBRARY if not lacking(b.ir)])
def test_every_blueprint_can_be_written_as_plain_code(name: str, tmp_path: Path) -> None:
    ir = LIBRARY[name].ir
    layout = ir.layouts[0]
    make, shape = HOSTS[layout]
    x = torch.randn(shape)
    model = wrapped(make(), x, chunks=2)
    path = SITES[layout][0]
    grafted(model, path, ir, chunk=0)
    grafted(model, path, ir, chunk=1, state=SeedState.STABILIZATION, alpha=0.3)
    plain = esper.export(model, tmp_path / "net", merge=False, unfinished="keep")
    fresh = loaded(tmp_path / "net", make())
    assert torch.equal(outputs(fresh, x), outputs(model, x))
    assert fresh.state_dict().keys() == plain.state_dict().keys()


@dataclass
class Answer:
    """An output that is a dataclass."""

    logits: Tensor
    note: str = "as it was"


class Head(nn.Module):
    """A module whose output is a dataclass, used as a site."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.linear(x))


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Head()

    def forward(self, x: Tensor) -> Tensor:
        answer = self.mlp(x)
        assert answer.note == "as it was"
        return answer.logits


def test_a_site_with_a_structured_output(tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    model = wrapped(Asking(), x)
    grafted(model, "mlp", "BP-WIDEN")
    plain = esper.export(model, tmp_path / "net", example=x)
    assert torch.equal(plain(x), model(x))
    assert torch.equal(loaded(tmp_path / "net", Asking())(x), model(x))


def test_children_on_their_way(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(5, 6)
    model = wrapped(MLP(widths=(6, 10, 8, 4)), x)
    grafted(model, "layers.0", "BP-MLP-GELU")
    fossil_alone = outputs(model, x)
    unfinished = grafted(model, "layers.2", "BP-WIDEN", state=SeedState.GRAFTING, alpha=0.4)
    with pytest.raises(ConfigError, match=r"layers.2#0.0 \(BP-WIDEN, GRAFTING, alpha 0.40\).*unfinished='drop'"):
        esper.export(model)
    assert torch.equal(esper.export(model, unfinished="drop")(x), fossil_alone)
    assert torch.equal(esper.export(model, unfinished="keep")(x), outputs(model, x))
    unfinished.objective = "shadow"
    model.bank.layer("layers.2").refresh()
    plain = esper.export(model)
    assert torch.equal(plain(x), fossil_alone), "a shadow changes nothing, so leaving it out changes nothing"
    assert kept(plain) == 1
    with pytest.raises(ConfigError, match="refuse, keep, drop"):
        esper.export(model, unfinished="perhaps")  # type: ignore[arg-type]


def test_a_fossil_that_was_bypassed_is_left_out(tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    model = wrapped(MLP(widths=(6, 10, 4)), x)
    grafted(model, "layers.0", "BP-MLP-GELU").fail(Fault.RAISED, "it raised")
    plain = esper.export(model, tmp_path / "net", example=x)
    assert kept(plain) == 0
    assert "left out (bypassed: it raised)" in (tmp_path / "net" / "README.md").read_text()


def test_a_module_that_grew_in_a_trainer(tmp_path: Path) -> None:
    module, callback = grow(tmp_path)
    assert callback.morphable.bank.grafted()
    plain = esper.export(module)
    x = torch.randn(5, 64)
    assert type(plain) is type(module)
    assert torch.equal(plain.eval().net(x), module.eval().net(x))
    assert not any(isinstance(m, SeedBank) for m in plain.modules())
    assert all(p.grad is None for p in plain.parameters())
    assert plain._trainer is None


def test_an_export_trains_copies_and_grows_again(tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    model = wrapped(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), x)
    grafted(model, "0", "BP-MLP-GELU")
    plain = esper.export(model)
    twin = copy.deepcopy(plain)
    stir(twin)
    assert torch.equal(plain(x), model(x)), "a copy has children of its own"
    assert not torch.equal(twin(x), plain(x))
    plain(x).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    again = wrapped(plain, x)
    grafted(again, "2", "BP-WIDEN")
    grafted(again, "grown.at_0.c0s0.child.up", "BP-PROJ-LORA")
    third = esper.export(again, tmp_path / "net", merge=False)
    assert torch.equal(third(x), again(x))
    fresh = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    assert torch.equal(loaded(tmp_path / "net", fresh)(x), again(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_host_comes_out_plain(tmp_path: Path) -> None:
    def host() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    x = torch.randn(5, 6)
    model = wrapped(torch.compile(host(), backend="eager"), x)
    grafted(model, "_orig_mod.0", "BP-PROJ-LORA")
    grafted(model, "_orig_mod.2", "BP-WIDEN")
    plain = esper.export(model, tmp_path / "net", example=x)
    assert type(plain) is nn.Sequential
    assert close(outputs(model, x), outputs(loaded(tmp_path / "net", host()), x))
    again = torch.compile(plain, backend="eager", fullgraph=True)
    assert torch.equal(again(x), plain(x)), "what has grown compiles into one graph"


class Twice(nn.Module):
    """Uses the weight of a layer in a second place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) @ self.fc.weight


def test_a_weight_that_is_used_twice_is_found_by_the_example() -> None:
    x = torch.randn(5, 4)
    model = wrapped(Twice(), x)
    grafted(model, "fc", "BP-PROJ-LORA")
    with pytest.raises(CheckpointError, match="merge=False"):
        esper.export(model, example=x)
    assert torch.equal(esper.export(model, example=x, merge=False)(x), model(x))


def test_paths_that_will_not_do(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    model = wrapped(Twice(), x)
    with pytest.raises(ConfigError, match=r"\.pt2 program"):
        esper.export(model, tmp_path / "net.pt")
    with pytest.raises(ConfigError, match="example=x"):
        esper.export(model, tmp_path / "net.pt2")
    with pytest.raises(ConfigError, match="carries no seeds"):
        esper.export(nn.Linear(1, 1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("ten years")
    with pytest.raises(OutputError, match="something else"):
        esper.export(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "ten years"
    esper.export(model, tmp_path / "net")
    esper.export(model, tmp_path / "net")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "net"]
