"""Tiny integer formulas for sizes, such as `2*d` or `max(8, d_out//4)`.

```
sum     := product (("+" | "-") product)*
product := value (("*" | "//") value)*
value   := number | name | ("min" | "max") "(" sum ("," sum)* ")" | "(" sum ")"
```

A formula is parsed by hand into a tree and the tree is walked: text never reaches Python's own evaluator.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

from esper.leyline.errors import BlueprintError

Tree = int | str | tuple["str | Tree", ...]
"""A number, a name, or an operator followed by its operands."""

MAX_LENGTH: Final = 80
"""Longest formula, in characters; it also bounds the depth of the tree."""

FUNCTIONS: Final[Mapping[str, Callable[..., int]]] = {"min": min, "max": max}
"""Functions that a formula may call; each takes one argument or more."""

_TOKEN = re.compile(r"\s*(?:(?P<number>[0-9]+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<sign>//|[-+*(),]))")


@lru_cache(maxsize=1024)
def parse(text: str) -> Tree:
    """Parse a formula.

    Raises:
        BlueprintError: the text is not a formula of the grammar above.

    Example:
        >>> parse("2*d + 1")
        ('+', ('*', 2, 'd'), 1)
    """
    return _Parser(text).formula()


def names(text: str) -> frozenset[str]:
    """Return the names that a formula mentions.

    Example:
        >>> sorted(names("max(h, 2*d)"))
        ['d', 'h']
    """
    return frozenset(_names(parse(text)))


def evaluate(value: int | str, symbols: Mapping[str, int]) -> int:
    """Return the value of a formula, or of a number as it stands.

    Args:
        value: number or formula.
        symbols: value of every name that the formula may mention.

    Raises:
        BlueprintError: malformed text, an unknown name, or a division by zero.

    Example:
        >>> evaluate("max(8, 2*d)", {"d": 16})
        32
    """
    if isinstance(value, int):
        return value
    try:
        return _evaluate(parse(value), symbols)
    except KeyError as error:
        known = ", ".join(sorted(symbols)) or "none"
        raise BlueprintError(f"formula {value!r} uses unknown name {error}; known names: {known}.") from None
    except ZeroDivisionError:
        raise BlueprintError(f"formula {value!r} divides by zero with {dict(symbols)}.") from None


def _evaluate(tree: Tree, symbols: Mapping[str, int]) -> int:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return symbols[tree]
    values = [_evaluate(operand, symbols) for operand in tree[1:]]
    return _APPLY[str(tree[0])](*values)


def _names(tree: Tree) -> set[str]:
    if isinstance(tree, int):
        return set()
    if isinstance(tree, str):
        return {tree}
    return set().union(*(_names(operand) for operand in tree[1:]))


_APPLY: Final[Mapping[str, Callable[..., int]]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "//": lambda left, right: left // right,
    **FUNCTIONS,
}


class _Parser:
    """Recursive descent over the tokens of one formula."""

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > MAX_LENGTH:
            raise BlueprintError(f"a formula of {len(text)} characters is too long; at most {MAX_LENGTH} are allowed.")
        self.tokens = self._tokens()

    def _tokens(self) -> list[str]:
        tokens, at, end = [], 0, len(self.text.rstrip())
        while at < end:
            match = _TOKEN.match(self.text, at)
            if match is None:
                raise self._error(f"unexpected {self.text[at:].lstrip()[0]!r}")
            tokens.append(match.group().strip())
            at = match.end()
        return tokens[::-1]

    def _error(self, problem: str) -> BlueprintError:
        return BlueprintError(
            f"formula {self.text!r}: {problem}; write numbers, names, + - * //, min(), max() and parentheses."
        )

    def _peek(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def _take(self) -> str:
        if not self.tokens:
            raise self._error("it ends too early")
        return self.tokens.pop()

    def _expect(self, token: str) -> None:
        if self._peek() != token:
            raise self._error(f"expected {token!r}, found {self._peek() or 'the end'!r}")
        self._take()

    def formula(self) -> Tree:
        tree = self._sum()
        if self.tokens:
            raise self._error(f"unexpected {self._peek()!r}")
        return tree

    def _sum(self) -> Tree:
        tree = self._product()
        while self._peek() in ("+", "-"):
            tree = (self._take(), tree, self._product())
        return tree

    def _product(self) -> Tree:
        tree = self._value()
        while self._peek() in ("*", "//"):
            tree = (self._take(), tree, self._value())
        return tree

    def _value(self) -> Tree:
        token = self._take()
        if token.isdigit():
            return int(token)
        if token == "(":
            tree = self._sum()
            self._expect(")")
            return tree
        if token in FUNCTIONS:
            return self._call(token)
        if token.isidentifier():
            return token
        raise self._error(f"unexpected {token!r}")

    def _call(self, function: str) -> Tree:
        self._expect("(")
        operands = [self._sum()]
        while self._peek() == ",":
            self._take()
            operands.append(self._sum())
        self._expect(")")
        return (function, *operands)
