"""The canonical text: one per message, and nothing but a refusal for anything else."""

import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.leyline.artifacts import Attestation, KernelManifest, Role
from esper.leyline.base import Message
from esper.leyline.errors import BadSignature, ContractError, EsperError
from esper.leyline.kernels import ArtifactStatus, CompilationRecord
from esper.urza.canonical import canonical, canonical_text, parse
from tests.urza.samples import compiled, spec

CASES = 40 * int(os.environ.get("ESPER_SOAK", "5"))

attestations = st.builds(
    Attestation,
    kernel_artifact_id=st.text(max_size=20),
    artifact_hash=st.text(max_size=20),
    status=st.sampled_from(ArtifactStatus),
    role=st.sampled_from(Role),
    serial=st.integers(0, 2**63),
    signature=st.binary(max_size=64),
)
manifests = st.builds(
    KernelManifest,
    kernel_id=st.text(max_size=20),
    name=st.text(max_size=20),
    blueprint_id=st.text(max_size=20),
    spec=st.just(spec()),
    pipeline=st.sampled_from(["fast", "standard", "aggressive"]),
    parameters=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    files=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    created=st.floats(0, 1e12),
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(message=attestations | manifests)
def test_messages_come_back_as_they_were(message: Message) -> None:
    text = canonical(message)
    again = parse(type(message), text)
    assert again == message
    assert canonical(again) == text


@given(message=manifests, order=st.randoms())
def test_the_order_of_keys_does_not_matter(message: KernelManifest, order: random.Random) -> None:
    fields = list(json.loads(canonical(message)).items())
    order.shuffle(fields)
    assert canonical(parse(KernelManifest, json.dumps(dict(fields), indent=1))) == canonical(message)


@settings(max_examples=CASES)
@given(data=st.binary(max_size=200) | junk.map(lambda value: json.dumps(value).encode()))
def test_bytes_of_any_kind_are_read_or_refused(data: bytes) -> None:
    for kind in (Attestation, KernelManifest, CompilationRecord):
        try:
            parse(kind, data)
        except ContractError as error:
            assert str(error)


@settings(max_examples=CASES)
@given(name=st.sampled_from(sorted(KernelManifest.model_fields)), value=junk)
def test_a_manifest_with_any_one_field_exchanged_is_read_or_refused(name: str, value: object) -> None:
    fields = json.loads(compiled().manifest) | {name: value}
    try:
        again = parse(KernelManifest, json.dumps(fields))
        canonical(again)
    except EsperError as error:
        assert str(error)


def test_one_kind_cannot_be_shown_as_another() -> None:
    record = canonical(CompilationRecord(pipeline="fast"))
    with pytest.raises(ContractError, match="not expected here"):
        parse(Attestation, record)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1}, b"bytes", {"a": object()}])
def test_what_has_no_canonical_text_is_refused(value: object) -> None:
    with pytest.raises(ContractError, match="no canonical JSON"):
        canonical_text(value)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ContractError):
        parse(Attestation, b"[" * 100_000)
    assert issubclass(BadSignature, EsperError)
