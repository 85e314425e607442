"""The document's table says what the library is; `python benchmarks/blueprints.py --write` makes it anew."""

import re

from benchmarks.blueprints import BEGIN, DOCUMENT, END, TITLES, Row, document, markdown, place
from esper.blueprints import load_library

TEXT = DOCUMENT.read_text(encoding="utf-8")
TABLE = TEXT.partition(BEGIN)[2].partition(END)[0].strip()
COMPILED = {cells[1].strip("` "): cells[-2].strip() for line in TABLE.splitlines()[2:] if (cells := line.split("|"))}


def test_the_table_is_that_of_the_library():
    """Whether a compiled kernel can be made is not tried here: tests/tezzeret does it."""
    rows = [Row(known, place(known), COMPILED.get(known.ir.name, "missing")) for known in load_library()]
    assert markdown(rows) == TABLE, "run python benchmarks/blueprints.py --write"


def test_all_but_those_with_a_state_or_a_need_can_be_compiled():
    refused = {name: why for name, why in COMPILED.items() if why != "yes"}
    assert refused == {
        "BP-ALL-REDUCE-SHARD": "no: needs process_group",
        "BP-FLASH-ATTN-V2": "no: needs flash_attention",
        "BP-LOAD-BAL-EMA": "no: keeps a state",
        "BP-MON-ACT-STATS": "no: keeps a state",
    }


def test_writing_it_anew_changes_the_table_alone():
    again = document(TEXT, "| new |")
    assert again.partition(BEGIN)[0] == TEXT.partition(BEGIN)[0]
    assert again.partition(END)[2] == TEXT.partition(END)[2]
    assert "| new |" in again and TITLES[0] in TABLE and document(again, TABLE) == TEXT


def test_it_names_blueprints_that_are_there():
    named = set(re.findall(r"BP-[A-Z0-9]+(?:-[A-Z0-9]+)*(?![-A-Z0-9.])", TEXT))
    assert named <= set(load_library().names())
