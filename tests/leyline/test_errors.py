"""The error tree in the docstring is the real one."""

import copy
import pickle
import re

import pytest

from esper import leyline
from esper.leyline import errors

_LINE = re.compile(r"(?P<indent>[│├└─ ]*)(?P<name>\w+)(?: \((?P<also>\w+)\))?(?: {2,}.*)?")


def drawn() -> dict[str, set[str]]:
    """Return the base classes of each class as the docstring draws them."""
    tree = (errors.__doc__ or "").split("```")[1].strip().splitlines()
    path: list[str] = []
    bases = {}
    for line in tree:
        match = _LINE.fullmatch(line)
        assert match, line
        path[len(match["indent"]) // 4 :] = [match["name"]]
        bases[match["name"]] = {path[-2] if len(path) > 1 else "Exception", match["also"]} - {None}
    return bases


def real() -> dict[str, type[Exception]]:
    """Return every error class defined in the module."""
    found = [errors.EsperError]
    for cls in found:
        found += [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__]
    return {cls.__name__: cls for cls in found}


def test_drawing_has_every_class() -> None:
    """No class is missing from the drawing, and none is invented."""
    assert drawn().keys() == real().keys()


@pytest.mark.parametrize("name", sorted(drawn()))
def test_drawing_has_the_real_bases(name: str) -> None:
    """Parents and built-in bases are as drawn."""
    assert {base.__name__ for base in real()[name].__bases__} == drawn()[name]


@pytest.mark.parametrize("name", sorted(drawn()))
def test_errors_are_public_and_documented(name: str) -> None:
    """Each error is exported and says what it means."""
    assert getattr(leyline, name) is real()[name]
    assert real()[name].__doc__


@pytest.mark.parametrize("name", sorted(drawn()))
def test_errors_cross_process_boundaries(name: str) -> None:
    """Each error survives pickling and copying with its message."""
    error = real()[name]("S", "C", ["A"]) if name == "IllegalTransition" else real()[name]("what, why, what to do")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
