"""The canonical JSON and the ids that content addressing rests on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.blueprints.hashing import canonical_json, content_hash
from esper.blueprints.library import load_library

PINNED = {
    "BP-ALL-REDUCE-SHARD": "c64d7ec13fe5d07f83e5bf2b45c8706698f7136b1c62ed3dc77d9239494d776a",
    "BP-ATTN-FULL": "f025a65b37dcde979491f7f3666409ea254087ed742c6e92b0e19c49b9a5194e",
    "BP-ATTN-LINEAR": "27a85eb6abc3de22869ab70b7c99aabdc4ee013660ea8bbda5ffbe006fe3acbf",
    "BP-ATTN-LOCAL": "bb4f51364218450084131873d16f7bd1edac96ae628d107418e1447ef93e119a",
    "BP-ATTN-SPLIT-QK": "c832644621ba15ff93aa1537faff01db20bb1a28f4895f916db009d823437f75",
    "BP-ATTN-STD": "2941a61633d765266c4b17da9c28f2021bd484a98c8234a28488630f9788f4ec",
    "BP-CANON": "c0c310bf357a20d0c8b662f062724e8ebbfff7de7e05db58f2e3821bd374766a",
    "BP-CAP-FUSE-HFFN": "6af4c27de2d1ed6f2f89544700dd605e3386efd13d00f9482201ef2a9c9859e5",
    "BP-CLAMP-GRAD-NORM": "a02e3e4dce1569f4760d75813bd42901f2f79581be82b8ebe6ddf4b3ac35181f",
    "BP-CONV-CAUSAL": "2fabe9951ce34a9772f0ce0fc4a30b11735de82f5f4a3de324edc82bd22f5488",
    "BP-CONV-CAUSAL-DENSE": "edcbc949d282cc36eebbfd40baa4113dedb40fccc964e35d3ca54a9db08dcb54",
    "BP-CONV-CAUSAL-DILATED": "af6b432d558b2372a1d5efb7356742ab0916dbe45f6104b5aac452460af0effd",
    "BP-CONV-DEPTHWISE": "7afbd834456035c74d6a690e50f1aec5279dbf826333a10958116ae57ecfb03b",
    "BP-CONV-DILATED": "70d482ef9a2e04ebdac47c7fef55f6a79e1649a524c99ab29f31a585022186ea",
    "BP-CONV-INVERTED": "29a1ed719dd0513f07d0a61470611695cb4543241f36354e53d750827381f9fa",
    "BP-CONV-LARGE": "1455949e111375ff98ae2703778fd9ebddefa32e9bd4a7c40c0daa55f4f66327",
    "BP-CONV-NEXT": "cd8d1b54603bfec00bf5fcf8a018f1708e83a81ef811fdf309fe75c31cd2445d",
    "BP-CONV-RES": "e19f1ed118960680a7cefbd613066063e6f6e0b1ee43c830dff9b2650318948a",
    "BP-CONV-SHORT": "1519998beabd02c9e94603c2a1cb750e0ca633abe68edf430c72caf136ec60f8",
    "BP-CONV-TOKENS": "8833718840896977813e09a824556af4311fd7e8b6e4e1732fe63d883b1ad0dc",
    "BP-EXPERT-CONTEXT": "31ca24ae8ac066d6639694c4034661156034d9514a8e1e86f9737b4ee9859683",
    "BP-EXPERT-MLP": "1f0e705a4ae5f88d1c09c5a49776934512b55fe7fe0f7a8ea34ea7d83072812f",
    "BP-EXPERT-MLP-1D": "84470a793732b0b22d5311bee7540647206424a0ac4753990c6806b78fb48225",
    "BP-EXPERT-MLP-SWIGLU": "4a1bf0a9f45dff5471c7f69f748c87c8864ab136b966bb63ac114753325bd0b9",
    "BP-FLASH-ATTN-V2": "851f812f35b025547896d28838e5ea753823d2161cdec3204a2132653430c014",
    "BP-GATE-LOWRANK": "c8fff5a540a50f4998abd817a73b07abf6af4f25ec5c3d151973c01017dbba49",
    "BP-GLU": "28a0062a5d3d8791a848db9baa963c01a98e52ac8e02344958e880006cb32b8e",
    "BP-KV-CACHE-8BIT": "c2a2b17bf8bf5ad99092cb37b28554b3095a82b1145e5b8e775ca31a8395c183",
    "BP-KV-GROUPED-ROPE": "8be91c1adefcb64a5c7ca53df5e0111c92c1d3626300073d1f20670c2ef0e81e",
    "BP-LN-RMS": "8231b859bf5f0a2cd09ec096c01380e891b232967a612b1a3c8e23eb95b62db4",
    "BP-LOAD-BAL-EMA": "1d3b2bfe88682650a122dcd3d2ede119c85307b7f76a2b750b991d70844f2ce9",
    "BP-MLP-GELU": "fc3a4affd73e1626023fc52e87d8147f44c882defa05b098c4a2a91fe3cc4c46",
    "BP-MLP-GELU-2048": "eae69585071042f78e750853e39fd8dbbd3d1b06a1a200f5c6cf7e92ca0ad2ee",
    "BP-MLP-RELU2": "a5fee3cfee12e22003923454e4e79d25923b860673fc9d0b062d327a086a932d",
    "BP-MLP-SWIGLU": "f6e86bed03fb1aee9293ce7bb03d757d1a7d6a6eda5f62a58e177df59ca65fc4",
    "BP-MLP-SWIGLU-4096": "4ecc300bde031a793518744f2a2ba67ea62966e5747383517c3a5ddb9ac6fafe",
    "BP-MOE-SOFT": "cff7728a436c87ae76e391a75b6a1c38ad345e62badb3b96c8f86567e50c90fe",
    "BP-MON-ACT-STATS": "95d7d3e54bae2fe4d4f161330dd77405591badc646cd8d0378ff30b020e72432",
    "BP-NORM-RMS": "41ab5033071d8f2f515312b5b7f64f81d09aabb494747c9a5069ca696afafbc9",
    "BP-NORM-TANH": "a80294d74e94888657fe712e116239a6ec15b85a0e066540bdd438bf0ac702f0",
    "BP-PROJ-IA3": "3b64b8dc1bf2396214ae0f4799f401718fd1bbdf77c5b52d59deea5787b6ec1c",
    "BP-PROJ-LORA": "6537f24036bc91e0b2f52a1c8bdd5687c20e93f3d26152786e2778088ffef592",
    "BP-PROJ-LORA-64": "7720b092e0ed3cbe38dc0723fcda1f3d9af0c217fdc05154c3a513fd47815363",
    "BP-RNN-GATED": "1ab2c18e947d31707e87ec3cbd29771eb82d392d25a04b728b94d33f13034ac2",
    "BP-RNN-MINGRU": "73d25f502fe64668c4a95663b693476ebe99f0ad314f54978f9e7747b35f84d2",
    "BP-ROUTER-MOE-AUXLOSS": "2767cfcb3c310fb55d42200586ba8eddc23a7aa6ce475ebb591dc501fb83b070",
    "BP-ROUTER-TOP2": "ab88ce21822056db93ea21d7bd2813269f1962451b2f9758a0dcfae82c2dc072",
    "BP-SQUEEZE-EXCITE": "e33b8031684bbca7940132da0270b9252712862390f7ef1abdbe17cf4d077c5e",
    "BP-SSM-DIAG": "0cd959c8426a1a80522957614e5664b71a983d112dbe4a88ba91bc9f9f3f0da3",
    "BP-TOKEN-SHIFT": "378b959815728e54e9a88329166d63be4fce8f930b4e3c0d3a98cd434d33f0b5",
    "BP-WIDEN": "219a193031943054f77ea1f6ba27ed75c4f133021fc216c1e1c7052d41e11da3",
    "BP-WIDEN-ATTN": "9554fc27df978df57f9ec05eea81c6e9737f1967cc9072a1ff9e716e8c20fcd1",
    "BP-WIDEN-CONV": "ea71ce9847f3167afc13ec77ffa20c4402e5e351c650d1c6030c28891ae3ae6b",
    "BP-WIDEN-SWIGLU": "f05ccb3336107daeb14e1652c3f340d346592808b542ee069c05c3c4036761ed",
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
