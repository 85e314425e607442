"""Keys: private ones are private, pairs match, and a signature is of one role under one message."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.artifacts import Role
from esper.leyline.errors import BadSignature, StoreError, TrustError, WrongRole
from esper.urza.signing import KeyRing


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    return KeyRing(tmp_path_factory.mktemp("keys"))


@given(
    data=st.binary(max_size=64), other=st.binary(max_size=64), role=st.sampled_from(Role), wrong=st.sampled_from(Role)
)
def test_a_signature_is_of_one_role_and_one_message(
    ring: KeyRing, data: bytes, other: bytes, role: Role, wrong: Role
) -> None:
    signature = ring.sign(role, data)
    ring.verify(role, data, signature)
    if (wrong, other) != (role, data):
        with pytest.raises(BadSignature):
            ring.verify(wrong, other, signature)
    with pytest.raises(BadSignature):
        ring.verify(role, data, other)


def test_private_files_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    first = KeyRing(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.key")} == {0o600}
    again = KeyRing(folder)
    again.verify(Role.KARN, b"x", first.sign(Role.KARN, b"x"))
    (folder / "karn.key").chmod(0o640)
    with pytest.raises(TrustError, match="0600"):
        KeyRing(folder)


def test_public_keys_do_not_sign(tmp_path: Path) -> None:
    KeyRing(tmp_path)
    reader = KeyRing.public_only(tmp_path)
    with pytest.raises(WrongRole):
        reader.sign(Role.KARN, b"x")


def test_missing_broken_and_foreign_keys(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        KeyRing.public_only(tmp_path / "nowhere")
    KeyRing(tmp_path / "a")
    KeyRing(tmp_path / "b")
    (tmp_path / "a/karn.pub").write_bytes((tmp_path / "b/karn.pub").read_bytes())
    with pytest.raises(TrustError, match="does not belong"):
        KeyRing(tmp_path / "a")
    (tmp_path / "b/karn.pub").write_bytes(b"c2hvcnQ=")
    with pytest.raises(StoreError, match="5 bytes, not 32"):
        KeyRing.public_only(tmp_path / "b")


def test_a_lost_public_key_is_made_again(tmp_path: Path) -> None:
    first = KeyRing(tmp_path)
    (tmp_path / "karn.pub").unlink()
    KeyRing(tmp_path).verify(Role.KARN, b"x", first.sign(Role.KARN, b"x"))


def test_processes_that_start_together_make_one_set(tmp_path: Path) -> None:
    script = "import sys; from esper.urza import KeyRing; print(KeyRing(sys.argv[1]).sign('karn', b'x').hex())"
    command = [sys.executable, "-c", script, str(tmp_path / "keys")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate(timeout=60)[0] for process in started}) == 1


def test_torch_is_not_loaded() -> None:
    script = "import sys, esper.urza; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
