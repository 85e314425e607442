"""Fuzz what reads other people's bytes: `python benchmarks/fuzz.py [--cases 1000000] [--seed 0] [--write FILE]`.

The readers are those of blueprints, of the canonical texts that are signed (manifest, attestation), of messages and of
envelopes. A case is a valid example that was damaged: bytes flipped, cut, doubled or spliced with another example; or
one place of its structure replaced by an edge case, dropped, doubled, nested deeply or renamed. A reader must return
something that can be written again, or raise an EsperError, within a second. Cases are shared evenly among readers.
Anything else is printed with the number that repeats it (`--only READER:NUMBER`), and the exit status is 1.
"""

import argparse
import copy
import json
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgpack  # type: ignore[import-untyped]
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from esper import leyline as ll
from esper.blueprints import load_library, parse_ir
from esper.blueprints.hashing import canonical_json
from esper.karn.service import plain
from esper.leyline.artifacts import Attestation, KernelManifest
from esper.leyline.errors import EsperError
from esper.urza import canonical

GOLDEN = Path(__file__).parents[1] / "tests" / "leyline" / "golden"
SLOWEST_S = 1.0
EDGES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        " ",
        "\x00",
        "\ud800",
        "é" * 300,
        "input",
        "../../etc/passwd",
        "1.0.0",
        "d" * 70_000,
        "d**d**d**d",
        "(" * 400,
    ),
    *([], {}, [[]], [None] * 1000, {"": None}, {"a": {"a": {"a": 1}}}),
)


class Reader(NamedTuple):
    """One reader: its name, valid examples as structures, how they are written, and how they are read."""

    name: str
    examples: list[Any]
    write: Callable[[Any], bytes]
    read: Callable[[bytes], object]


class Crash(NamedTuple):
    """A case that was neither read nor refused."""

    reader: str
    number: int
    what: str


class Tally(NamedTuple):
    """What became of the cases of one reader."""

    reader: str
    cases: int
    read: int
    refused: Counter[str]
    crashes: list[Crash]
    slowest_ms: float


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _wire(value: Any) -> bytes:
    found: bytes = msgpack.packb(value, default=str, unicode_errors="surrogatepass")
    return found


def _blueprint(data: bytes) -> object:
    text = data.decode("utf-8", "replace")
    return canonical_json(parse_ir(plain(text)).model_dump(mode="json"))


def _signed(kind: type[KernelManifest] | type[Attestation]) -> Callable[[bytes], object]:
    return lambda data: canonical.canonical(canonical.parse(kind, data))


def _message(data: bytes) -> object:
    return ll.encode(ll.decode(ll.REGISTRY, data))


def _letter(data: bytes) -> object:
    envelope = ll.decode(ll.Envelope, data)
    return ll.encode(ll.decode(ll.REGISTRY, envelope.payload))


def _fields(name: str) -> Any:
    return msgpack.unpackb((GOLDEN / f"{name}.msgpack").read_bytes())


def readers() -> list[Reader]:
    """Return every reader with its examples."""
    blueprints = [known.ir.model_dump(mode="json") for known in load_library()]
    messages = [_fields(name) for name in sorted(ll.REGISTRY)]
    letters = [["Envelope", _fields("Envelope")[1] | {"kind": m[0], "payload": _wire(m)}] for m in messages]
    signed = [Reader(k.__name__.lower(), [_plain(k)], _json, _signed(k)) for k in (KernelManifest, Attestation)]
    return [
        Reader("blueprint", blueprints, _json, _blueprint),
        *signed,
        Reader("message", messages, _wire, _message),
        Reader("envelope", letters, _wire, _letter),
    ]


def _plain(kind: type[KernelManifest] | type[Attestation]) -> Any:
    message = ll.decode(kind, (GOLDEN / f"{kind.__name__}.msgpack").read_bytes())
    return json.loads(canonical.canonical(message))


def places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Return every place of a structure, as a container and its key or index."""
    found = [] if found is None else found
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        found.append((value, key))
        places(value[key], found)
    return found


def nested(depth: int, chance: random.Random) -> Any:
    """Return lists or mappings nested deeply."""
    value: Any = None
    as_list = chance.random() < 0.5
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


def damaged(value: Any, chance: random.Random) -> Any:
    """Return a copy of a structure with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        where = places(value)
        if not where:
            return value
        holder, key = chance.choice(where)
        match chance.randrange(7):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(chance.choice(EDGES))
            case 3:
                holder[key] = copy.deepcopy(_at(chance.choice(where)))
            case 4:
                del holder[key]
            case 5 if isinstance(holder, dict):
                holder[chance.choice((f"{key}_", "type", "", "__class__", str(key).upper()))] = holder.pop(key)
            case 5:
                holder.insert(key, copy.deepcopy(holder[key]))
            case _:
                holder[key] = nested(chance.choice((5, 50, 200)), chance) if chance.random() < 0.1 else None
    return value


def _at(place: tuple[Any, Any]) -> Any:
    holder, key = place
    try:
        return holder[key]
    except (KeyError, IndexError):
        return None


def corrupted(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Return bytes that were flipped, cut, doubled, nested without end, or joined with those of another example."""
    found, place = bytearray(data), chance.randrange(len(data) or 1)
    match chance.randrange(6):
        case 0:
            for _ in range(chance.randint(1, 4)):
                found[chance.randrange(len(found))] = chance.randrange(256)
        case 1:
            del found[place:]
        case 2:
            del found[place : place + chance.randint(1, 16)]
        case 3:
            found[place:place] = found[place : place + chance.randint(1, 64)]
        case 4 if chance.random() < 0.1:
            found[place:place] = chance.choice((b"[", b'{"a":', b"\x91", b"\x81\xa1a")) * 50_000
        case _:
            found[place:] = other[chance.randrange(len(other)) :]
    return bytes(found)


def case(reader: Reader, number: int, seed: int) -> bytes:
    """Return the bytes of one case; they depend on its number alone."""
    chance = random.Random(f"{seed}:{reader.name}:{number}")
    example = chance.choice(reader.examples)
    data = reader.write(damaged(example, chance) if chance.random() < 0.7 else example)
    return corrupted(data, reader.write(chance.choice(reader.examples)), chance) if chance.random() < 0.4 else data


def campaign(reader: Reader, numbers: range, seed: int) -> Tally:
    """Run cases of one reader."""
    read, refused, crashes, slowest = 0, Counter[str](), list[Crash](), 0.0
    for number in numbers:
        data, began = case(reader, number, seed), time.process_time()
        try:
            reader.read(data)
            read += 1
        except EsperError as error:
            refused[type(error).__name__] += 1
        except Exception as error:
            crashes.append(Crash(reader.name, number, f"{type(error).__name__}: {error}"[:200]))
        took = time.process_time() - began
        if took > SLOWEST_S:
            crashes.append(Crash(reader.name, number, f"took {took:.1f} s"))
        slowest = max(slowest, took)
    return Tally(reader.name, len(numbers), read, refused, crashes, 1e3 * slowest)


def table(tallies: list[Tally]) -> Table:
    """Lay the campaign out."""
    shown = Table("reader", "cases", "read", "refused with", "neither", "slowest ms", box=MARKDOWN)
    for t in tallies:
        kinds = ", ".join(f"{name} {count:,}" for name, count in t.refused.most_common())
        shown.add_row(t.reader, f"{t.cases:,}", f"{t.read:,}", kinds, str(len(t.crashes)), f"{t.slowest_ms:.0f}")
    return shown


def main() -> int:
    """Run, print, and return 1 if a case was neither read nor refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1_000_000, help="cases in all (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="READER:NUMBER", help="repeat one case and let its error through")
    parser.add_argument("--write", type=Path, help="Markdown file")
    given = parser.parse_args()
    every = readers()
    if given.only:
        name, number = given.only.split(":")
        reader = next(reader for reader in every if reader.name == name)
        print(reader.read(case(reader, int(number), given.seed)))
        return 0
    began = time.perf_counter()
    tallies = [campaign(reader, range(given.cases // len(every)), given.seed) for reader in every]
    console = Console(width=170, record=True)
    console.print(table(tallies))
    for crash in (crash for tally in tallies for crash in tally.crashes[:20]):
        console.print(f"--only {crash.reader}:{crash.number}  {crash.what}", markup=False)
    if given.write:
        took = f"{(time.perf_counter() - began) / 60:.0f} min"
        where = f"Python {platform.python_version()}, {platform.machine()}, seed {given.seed}, {took}"
        head = f"# Fuzzing\n\nCommand: `python benchmarks/fuzz.py --cases {given.cases}`. {where}.\n"
        text = (__doc__ or "").partition("\n\n")[2]
        given.write.write_text(f"{head}\n{text}\n{console.export_text()}", encoding="utf-8")
    return int(any(tally.crashes for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
