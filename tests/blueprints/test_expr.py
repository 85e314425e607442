"""Formulas: the parser agrees with Python's integers on every formula, and refuses everything else."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esper.blueprints.expr import MAX_LENGTH, evaluate, names, parse
from esper.leyline.errors import BlueprintError

SYMBOLS = {"d": 12, "h": 5, "d_out": 7}


def _join(parts):
    left, sign, right = parts
    return f"({left} {sign} {right})"


def _call(parts):
    function, operands = parts
    return f"{function}({', '.join(operands)})"


LEAVES = st.integers(0, 99).map(str) | st.sampled_from(sorted(SYMBOLS))
FORMULAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//"]), inner).map(_join),
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//"]), inner).map(" ".join),
        st.tuples(st.sampled_from(["min", "max"]), st.lists(inner, min_size=2, max_size=3)).map(_call),
    ),
    max_leaves=8,
).filter(lambda text: len(text) <= MAX_LENGTH)


def _by_python(text):
    return eval(text, {"__builtins__": {"min": min, "max": max}}, dict(SYMBOLS))


@settings(deadline=None)
@given(FORMULAS)
@example("2*d//h-1*3")
@example("d - h - 1")
def test_a_formula_has_the_value_that_python_gives_it(text):
    try:
        wanted = _by_python(text)
    except ZeroDivisionError:
        with pytest.raises(BlueprintError, match="divides by zero"):
            evaluate(text, SYMBOLS)
    else:
        assert evaluate(text, SYMBOLS) == wanted


@settings(deadline=None)
@given(FORMULAS)
def test_names_are_those_that_occur(text):
    assert names(text) == {
        name for name in SYMBOLS if name in text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }


@settings(deadline=None)
@given(st.text(max_size=2 * MAX_LENGTH))
def test_any_text_is_a_formula_or_a_clear_error(text):
    try:
        parse(text)
    except BlueprintError as error:
        assert "formula" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "2*",
        "*2",
        "(d",
        "d)",
        "2 d",
        "d/2",
        "-1",
        "d**2",
        "min",
        "min()",
        "max(d,)",
        "f(d)",
        "d.x",
        "1.5",
        "d;h",
    ]
    + ["__import__('os')", "d if h else 1", "h" * (MAX_LENGTH + 1), "²"],
)
def test_other_text_is_refused(text):
    with pytest.raises(BlueprintError, match="formula"):
        parse(text)


def test_an_unknown_name_is_named_with_those_that_exist():
    with pytest.raises(BlueprintError, match=r"unknown name 'w'; known names: d, d_out, h"):
        evaluate("2*w", SYMBOLS)


def test_a_number_stands_for_itself():
    assert evaluate(7, {}) == 7
