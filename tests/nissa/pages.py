"""A page taken apart, as a browser would read it, and folders of runs to make one from."""

import re
from html.parser import HTMLParser
from pathlib import Path

from esper.leyline.base import Message
from esper.leyline.codec import to_json
from esper.leyline.reports import FieldReport
from esper.nissa.chronicle import Chronicle
from esper.nissa.folder import growth_summary, write_json

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Collects elements, their ids, the text inside each tag, and whether everything is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, *tags: str) -> str:
        """What is written directly inside some kinds of elements."""
        return "\n".join(text for tag, text in self.texts if tag in tags)

    @property
    def ids(self) -> list[str]:
        """Every id, in order."""
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def run_folder(folder: Path, chronicle: Chronicle, title: str = "digits", **more: object) -> Path:
    """Write what a run with this chronicle would have left in its folder."""
    folder.mkdir(parents=True, exist_ok=True)

    def lines(messages: list[Message]) -> str:
        return "".join(to_json(message) + "\n" for message in messages)

    events = [message for message in chronicle.messages if not isinstance(message, FieldReport)]
    (folder / "events.jsonl").write_text(lines(events))
    (folder / "fieldreports.jsonl").write_text(lines(chronicle.of(FieldReport)))  # type: ignore[arg-type]
    write_json(folder / "growth.json", growth_summary(chronicle, title))
    for name, content in more.items():
        write_json(folder / f"{name}.json", content)
    return folder


def variables(sheet: str) -> dict[str, dict[str, str]]:
    """The colours of a style sheet by theme and name."""
    blocks = re.findall(r":root \{(.*?)\}", sheet, flags=re.DOTALL)
    found = [dict(re.findall(r"(--[a-z]+): (#[0-9a-f]{6});", block)) for block in blocks]
    assert len(found) == 2
    return {"light": found[0], "dark": found[0] | found[1]}


def contrast(one: str, other: str) -> float:
    """Contrast of two colours as WCAG 2 defines it."""
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
