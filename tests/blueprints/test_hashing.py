"""The canonical JSON and the ids that content addressing rests on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.blueprints.hashing import canonical_json, content_hash
from esper.blueprints.library import load_library

PINNED = {
    "BP-ATTN-STD": "2941a61633d765266c4b17da9c28f2021bd484a98c8234a28488630f9788f4ec",
    "BP-CONV-CAUSAL": "2fabe9951ce34a9772f0ce0fc4a30b11735de82f5f4a3de324edc82bd22f5488",
    "BP-CONV-RES": "e19f1ed118960680a7cefbd613066063e6f6e0b1ee43c830dff9b2650318948a",
    "BP-EXPERT-MLP": "1f0e705a4ae5f88d1c09c5a49776934512b55fe7fe0f7a8ea34ea7d83072812f",
    "BP-MLP-GELU": "fc3a4affd73e1626023fc52e87d8147f44c882defa05b098c4a2a91fe3cc4c46",
    "BP-MLP-SWIGLU": "f6e86bed03fb1aee9293ce7bb03d757d1a7d6a6eda5f62a58e177df59ca65fc4",
    "BP-NORM-RMS": "41ab5033071d8f2f515312b5b7f64f81d09aabb494747c9a5069ca696afafbc9",
    "BP-PROJ-IA3": "3b64b8dc1bf2396214ae0f4799f401718fd1bbdf77c5b52d59deea5787b6ec1c",
    "BP-PROJ-LORA": "6537f24036bc91e0b2f52a1c8bdd5687c20e93f3d26152786e2778088ffef592",
    "BP-WIDEN": "219a193031943054f77ea1f6ba27ed75c4f133021fc216c1e1c7052d41e11da3",
}


@pytest.mark.parametrize("name", load_library().names())
def test_the_ids_of_the_library_never_change(name):
    assert load_library()[name].ir.id == PINNED[name]


def test_every_pinned_blueprint_is_still_there():
    assert set(load_library().names()) == set(PINNED)


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.integers() | st.booleans() | st.text()))
def test_the_order_of_keys_does_not_matter(data):
    assert content_hash(dict(reversed(data.items()))) == content_hash(data)
    assert canonical_json(data).isascii()


def test_kinds_of_numbers_are_told_apart():
    assert len({content_hash([value]) for value in (1, 1.0, True, "1")}) == 4


def test_a_number_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))
