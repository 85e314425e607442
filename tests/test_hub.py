"""Models by name: the cache, a real download from a small server, and networks that do not answer."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest

from esper import hub
from esper.leyline.errors import ConfigError
from tests.hf_models import gpt2, saved, tokenizer

COMMIT = "0123456789012345678901234567890123456789"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: the list of a repository's files, and each of them."""

    folder: Path

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        body = self.listing() if self.path.startswith("/api/") else self.file()
        self.send_response(200 if body is not None else 404)
        self.send_header("ETag", f'"{abs(hash(self.path))}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if with_body and body is not None:
            self.wfile.write(body)

    def listing(self) -> bytes:
        files = sorted(self.folder.iterdir())
        if "/tree/" in self.path:
            sizes = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
            return json.dumps(sizes).encode()
        names = [{"rfilename": file.name} for file in files]
        return json.dumps({"id": "org/model", "sha": COMMIT, "siblings": names}).encode()

    def file(self) -> bytes | None:
        file = self.folder / self.path.rpartition("/")[2]
        return file.read_bytes() if "/resolve/" in self.path and file.is_file() else None

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Ours", (Hub,), {"folder": folder}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own, and an address at which nobody is."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


def test_a_name_is_downloaded_once_and_then_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokenizer()
    source = saved(tmp_path / "source", gpt2(len(tokens)), tokens)
    (source / "consolidated.safetensors").write_bytes(b"a second copy of the weights")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    with serving(source) as address, monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patched.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        small = hub.folder_of("org/model", setting="model.teacher")
        assert (small / "tokenizer.json").is_file() and not hub.has_weights(small)
        folder = hub.folder_of("org/model", setting="model.teacher", weights=True)
    assert hub.has_weights(folder)
    assert {"pytorch_model.bin", "consolidated.safetensors"}.isdisjoint(file.name for file in folder.iterdir())
    assert hub.folder_of("org/model", setting="model.teacher", weights=True) == folder
    assert hub.read_tokenizer("org/model", setting="data.tokenizer").get_vocab() == tokens.get_vocab()


def test_a_name_that_is_nowhere_says_where_to_put_the_files() -> None:
    with pytest.raises(ConfigError, match=r"model\.student=org/model .*cannot be reached.*FOLDER.*HF_HOME"):
        hub.folder_of("org/model", setting="model.student")


def test_offline_the_network_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_unreachable", lambda address: pytest.fail("the network was asked"))
    with pytest.raises(ConfigError, match=r"org/model.*HF_HUB_OFFLINE"):
        hub.folder_of("org/model", setting="model.student")


def test_a_network_that_never_answers_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "REACH_TIMEOUT_S", 0.3)
        started = time.monotonic()
        with pytest.raises(ConfigError, match="cannot be reached"):
            hub.folder_of("org/model", setting="model.student")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(name: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        hub.folder_of(name, setting="model.student")


@pytest.mark.parametrize("name", [None, ""])
def test_nothing_named(name: str | None) -> None:
    with pytest.raises(ConfigError, match=r"model\.teacher is not set"):
        hub.folder_of(name, setting="model.teacher")


def test_a_missing_shard_is_no_complete_model(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert not hub.has_weights(tmp_path)
    (tmp_path / "b.safetensors").touch()
    assert hub.has_weights(tmp_path)
    index.write_text("nonsense")
    assert not hub.has_weights(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    tokens = tokenizer()
    folder = saved(tmp_path / "model", gpt2(len(tokens)), tokens)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="model: the model cannot be read"):
        hub.read_model(folder, setting="model.teacher", dtype=None)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="the tokenizer cannot be read"):
        hub.read_tokenizer(str(folder), setting="data.tokenizer")
    (folder / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="T5Config is no causal language model"):
        hub.read_config(folder, setting="model.teacher")


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", gpt2(300))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(ConfigError, match=r"lacks 12 weights, e\.g\. 'transformer\.h\.2"):
        hub.read_model(folder, setting="model.teacher", dtype=None)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"esper-morphogenetic\[hf\]"):
        hub.library()


ABSENT = """
import sys
from importlib import metadata
gone, known = ("transformers", "huggingface_hub", "tokenizers"), metadata.distribution
def distribution(name):
    if name.replace("-", "_") in gone:
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.distribution = distribution
sys.modules |= dict.fromkeys(gone)
import esper, esper.run, esper.tolaria.pretrained, esper.models.causal_lm
try:
    esper.models.causal_lm.CausalLM(name="org/model")
except esper.EsperError as error:
    print(error)
"""


@pytest.mark.slow
def test_everything_else_works_where_transformers_is_not_installed() -> None:
    found = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "pip install 'esper-morphogenetic[hf]'" in found.stdout
