"""``test``, ``[`` and ``[[ ]]``: what holds, what does not, and what only a run could tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from klplug.audit.shell.patterns import regex
from klplug.audit.shell.values import Flat, Piece, Value, text

_INTEGER = re.compile(r"\s*[+-]?\d+\s*")
_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "-eq": lambda a, b: a == b,
    "-ne": lambda a, b: a != b,
    "-lt": lambda a, b: a < b,
    "-le": lambda a, b: a <= b,
    "-gt": lambda a, b: a > b,
    "-ge": lambda a, b: a >= b,
}
BINARY = ("==", "=", "!=", "<", ">", "=~", "-nt", "-ot", "-ef", *_COMPARED)


@dataclass(frozen=True)
class Holds:
    """Whether a condition holds.

    Attributes:
        value: ``None`` where only a run could tell.
        soft: as long as nobody sets a variable from outside, or passes an argument.
    """

    value: bool | None
    soft: bool = False

    def __invert__(self) -> Holds:
        return Holds(None if self.value is None else not self.value, self.soft)


UNKNOWN = Holds(None)


def both(left: Holds, right: Holds) -> Holds:
    if left.value is False or right.value is False:
        sure = any(h.value is False and not h.soft for h in (left, right))
        return Holds(False, not sure)
    if left.value is None or right.value is None:
        return UNKNOWN
    return Holds(True, left.soft or right.soft)


def either(left: Holds, right: Holds) -> Holds:
    return ~both(~left, ~right)


def known(pieces: Flat) -> tuple[str, bool] | None:
    """The text, and whether it is soft; an argument that nobody passes is empty."""
    if any(piece.unknown and not (piece.unset and piece.soft) for piece in pieces):
        return None
    return (
        "".join("" if piece.unset else piece.text for piece in pieces),
        any(piece.soft for piece in pieces),
    )


def unary(operator: str, pieces: Flat, is_set: Callable[[str], Holds]) -> Holds:
    if operator in ("-n", "-z"):
        return ~_empty(pieces) if operator == "-n" else _empty(pieces)
    if operator == "-v":
        name = known(pieces)
        return UNKNOWN if name is None else is_set(name[0])
    empty = _empty(pieces)
    # No file has an empty name.
    return Holds(False, empty.soft) if empty.value else UNKNOWN


def _empty(pieces: Flat) -> Holds:
    if any(piece.text and not piece.unknown for piece in pieces):
        return Holds(False, any(piece.soft for piece in pieces))
    if any(piece.unknown and not piece.unset for piece in pieces):
        return UNKNOWN
    return Holds(True, any(piece.unknown or piece.soft for piece in pieces))


def binary(operator: str, left: Flat, right: Flat, patterns: bool) -> Holds:
    """A comparison; with ``patterns`` as ``[[`` makes it."""
    a, b = known(left), known(right)
    if a is None or b is None:
        # Against nothing, an unset variable is compared as an empty one.
        for one, other in ((left, b), (right, a)):
            if operator in ("=", "==", "!=") and other is not None and not other[0]:
                empty = _empty(one)
                return ~empty if operator == "!=" else empty
        return UNKNOWN
    soft = a[1] or b[1]
    if operator in _COMPARED:
        numbers = [n if n.strip() or not patterns else "0" for n in (a[0], b[0])]
        if not all(_INTEGER.fullmatch(n) for n in numbers):
            return Holds(False, soft)
        return Holds(_COMPARED[operator](int(numbers[0]), int(numbers[1])), soft)
    if operator in ("<", ">"):
        return Holds(a[0] < b[0] if operator == "<" else a[0] > b[0], soft)
    if operator == "=~":
        pattern = "".join(re.escape(p.text) if p.quoted else p.text for p in right)
        try:
            return Holds(re.search(_posix(pattern), a[0]) is not None, soft)
        except re.error:
            return UNKNOWN
    if operator in ("-nt", "-ot", "-ef"):
        return UNKNOWN
    same = matches(a[0], right) if patterns else a[0] == b[0]
    return Holds(same != (operator == "!="), soft)


def matches(subject: str, pattern: Flat) -> bool:
    parts = tuple((piece.text, piece.quoted) for piece in pattern if not piece.unset)
    return regex(parts).fullmatch(subject) is not None


def _posix(pattern: str) -> str:
    classes = {"digit": "0-9", "alpha": "a-zA-Z", "alnum": "a-zA-Z0-9", "space": r"\s"}
    return re.sub(r"\[:(\w+):\]", lambda m: classes.get(m[1], m[0]), pattern)


def test(words: Sequence[Flat], is_set: Callable[[str], Holds]) -> Holds:
    """``test``, by the number of its arguments, as POSIX has it."""
    texts = [text(word) if not any(p.unknown for p in word) else None for word in words]
    if not words:
        return Holds(False)
    if len(words) == 1:
        return ~_empty(words[0])
    if texts[0] == "!" and not (len(words) == 3 and texts[1] in BINARY):
        return ~test(words[1:], is_set)
    if len(words) == 2:
        operator = texts[0]
        return unary(operator, words[1], is_set) if operator else UNKNOWN
    if len(words) == 3 and texts[1] in BINARY:
        operator = texts[1]
        assert operator is not None
        return binary(operator, words[0], words[2], patterns=False)
    if texts[0] == "(" and texts[-1] == ")":
        return test(words[1:-1], is_set)
    for connective, joined in (("-o", either), ("-a", both)):
        for at in range(len(words) - 2, 0, -1):
            if texts[at] == connective:
                return joined(test(words[:at], is_set), test(words[at + 1 :], is_set))
    return Holds(False)


def as_status(holds: Holds, line: int = 0) -> Value:
    """What ``$?`` holds then."""
    if holds.value is None:
        return (Piece("", line, unknown="whether it holds is not known"),)
    return (Piece(str(int(not holds.value)), line, soft=holds.soft),)
