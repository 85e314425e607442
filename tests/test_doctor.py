"""`esper doctor`, as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esper.cli import main
from esper.doctor import Patient, examine, load_patient, parse_inputs
from esper.kasmina.wrapper import wrap
from esper.leyline.errors import ConfigError

MODEL = """\
import torch
from torch import nn
from neighbour import WIDTH


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), nn.Flatten())
        self.head, self.spare = nn.Linear(36 * WIDTH, 4), nn.Linear(4, 4)

    def forward(self, image, scale=None):
        return self.head(self.body(image)) * (1.0 if scale is None else scale.float().mean())


def build():
    return Net()


def build_with_batch():
    return Net(), torch.randn(2, 3, 8, 8)


def build_by_name():
    return Net(), {"image": torch.randn(2, 3, 8, 8), "scale": torch.ones(2)}


def broken():
    raise ValueError("no weights here")


def number():
    return 3


def reader():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))


class Lightning(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, index):
        return self.net(batch).mean()


class Example(Net):
    example_input_array = torch.randn(2, 3, 8, 8)


ready = Net()
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 8\n")
    path = tmp_path / "doctored.py"
    path.write_text(MODEL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("doctored", "neighbour"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return path


def diagnosis(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main(["doctor", *args, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("build", ["--input", "2x3x8x8"]),
        ("build", ["--input", "image=2x3x8x8", "--input", "scale=2:int5"]),
        ("build_with_batch", []),
        ("build_by_name", []),
        ("Example", []),
    ],
)
def test_every_way_to_give_a_batch(
    factory: str, options: list[str], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = diagnosis(capsys, f"{file}:{factory}", *options)
    assert found["probed"]
    assert [(s["path"], s["kind"], s["layout"], s["input_width"], s["width"], s["tokens"]) for s in found["sites"]] == [
        ("body.0", "conv2d", "bchw", 3, 8, 36),
        ("body.1", "norm", "bchw", 8, 8, 36),
        ("head", "linear", "bd", 288, 4, 1),
    ]
    assert "BP-CONV-RES" in found["sites"][0]["blueprints"]
    assert "BP-WIDEN" in found["sites"][2]["blueprints"]
    assert found["refused"] == {"spare": "its forward never runs (its weights may be used directly)"}


def test_without_a_batch_it_says_what_it_cannot_know(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = diagnosis(capsys, f"{file}:build")
    assert not found["probed"]
    assert [site["path"] for site in found["sites"]] == ["body.0", "body.1", "head", "spare"]
    assert {site["layout"] for site in found["sites"]} == {None}
    assert "Let the factory return (model, batch), or say for example --input 2x3x32x32" in found["notes"][0]


def test_the_printed_page(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"{file}:build_with_batch"]) == 0
    page = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert lines[0] == "Net, 1,416 parameters: 3 sites take 3 seeds, 1 refused"
    assert "body.0 conv2d bchw, HW=36 3 -> 8 1" in lines
    assert "head linear bd 288 -> 4 2" in lines
    assert "BP-CONV-RES, BP-SQUEEZE-EXCITE" in lines
    assert "2: BP-PROJ-LORA, BP-WIDEN" in lines
    assert "spare its forward never runs (its weights may be used directly)" in lines
    assert max(map(len, page.splitlines())) <= 80
    assert main(["doctor", f"{file}:build"]) == 0
    page = capsys.readouterr().out
    assert "4 sites may take 4 seeds" in page
    assert "body.0 conv2d ? ? ?" in [" ".join(line.split()) for line in page.splitlines()]
    assert "Note: No batch was given" in page


def test_targets_and_chunks(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--targets", "body.?", "head", "--seeds-per-layer", "4"]
    found = diagnosis(capsys, f"{file}:build_with_batch", *options)
    assert [site["path"] for site in found["sites"]] == ["body.0", "body.1", "body.3", "head"]
    assert found["seeds"] == 16
    assert found["refused"].keys() == {"body.2"}


def test_no_place_for_seeds_is_told_by_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "torch.nn:ReLU", "--input", "2x3"]) == 1
    assert "0 sites take 0 seeds" in capsys.readouterr().out


def test_it_finds_what_a_run_would_find() -> None:
    host = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    found = examine(Patient(host, torch.randn(2, 3, 8)))
    assert found["refused"].keys() == {"self_attn.out_proj"}
    assert len(found["sites"]) + len(found["refused"]) == len(list(wrap(nn.TransformerEncoderLayer(8, 2, 8)).seeds))
    assert "fused evaluation" in found["notes"][0]


def test_a_language_model_is_told_of_its_cache() -> None:
    class Writer(nn.Sequential):
        generation_config = object()

    assert "mix tokens" in examine(Patient(Writer(nn.Linear(4, 4)), torch.ones(2, 3, 4)))["notes"][0]
    assert examine(Patient(Writer(nn.Linear(4, 4)), torch.ones(2, 4)))["notes"] == []


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["{0}"], "names no factory; give it as FILE.py:FACTORY"),
        (["{0}:"], "names no factory"),
        (["nowhere.py:build"], "there is no file nowhere.py; give it as FILE.py:FACTORY"),
        (["{0}:biuld"], "has no 'biuld'; did you mean 'build'?"),
        (["{0}:zzz"], "has no 'zzz'; it offers Example, Lightning, Net, broken"),
        (["{0}:broken"], "raised ValueError: no weights here; ESPER_TRACEBACK=1 shows where"),
        (["{0}:number"], "returned int; a torch.nn.Module, or a pair of module and example batch"),
        (["{0}:ready"], "is a Net; a function or class that returns a model is needed"),
        (["no.such.package:build"], "no.such.package cannot be imported: ModuleNotFoundError"),
        (["{0}:build", "--input", "2x3"], "the model does not run on this batch: RuntimeError"),
        (["{0}:reader", "--input", "2x3"], "the batch holds floats, and token ids are given as --input 2x16:int100;"),
        (["{0}:Lightning", "--input", "2x3x8x8"], "let the factory return the network inside it; ESPER_TRACEBACK=1"),
        (["{0}:build", "--input", "2x3x"], "'2x3x' is no shape; write 2x3x32x32"),
        (["{0}:build", "--input", "0x3"], "'0x3' is no shape"),
        (["{0}:build", "--input", "2x3:int0"], "is no shape"),
        (["{0}:build", "--input", "2x3", "--input", "scale=2"], "give every input a name of its own, or none"),
        (["{0}:build", "--targets", "boddy*"], "target 'boddy*' matches no module"),
        (["{0}:build", "--seeds-per-layer", "9"], "seeds_per_layer=9 is larger than the 8 features of 'body.0'"),
    ],
)
def test_what_is_not_accepted(args: list[str], expected: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *(arg.format(file) for arg in args)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


def test_a_file_that_cannot_be_imported(file: Path) -> None:
    file.write_text("import torch\n1 / 0\n")
    with pytest.raises(ConfigError, match=r"doctored\.py cannot be imported: ZeroDivisionError"):
        load_patient(f"{file}:build")


def test_random_inputs_are_the_same_each_time() -> None:
    one, two = (parse_inputs(["x=4x5", "ids=4x6:int7"]) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in ("x", "ids"))
    assert one["ids"].dtype is torch.int64
    assert 0 <= one["ids"].min() <= one["ids"].max() < 7


@pytest.mark.slow
def test_as_a_command(file: Path) -> None:
    command = [sys.executable, "-c", "import sys; from esper.cli import main; sys.exit(main())"]
    run = subprocess.run(
        [*command, "doctor", "doctored.py:build_with_batch"],
        cwd=file.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "3 sites take 3 seeds" in run.stdout
    assert run.stderr == ""
