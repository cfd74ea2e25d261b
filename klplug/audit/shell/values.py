"""What a shell variable may hold when some of it can't be known: pieces, and choices among them.

A value is a row of pieces. A piece is text, or something only a run could tell, which stands as
written and says why. Where a condition is not decided, a value holds a choice with an option per
branch; two choices on one decision are made alike, so what is read off is always a whole run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TypeAlias


@dataclass(frozen=True)
class Word:
    """One argument after expansion.

    Attributes:
        text: what the program would get; parts that can't be known stand as written.
        line: line of the script, counted from 1; ``None`` for a command line.
        unknown: why parts of the text can't be known; empty where all is known.
        span: where the word stands in the script, from and to; ``None`` where it is made of
            more than one place. Words that one place is split into share it.
    """

    text: str
    line: int | None = None
    unknown: tuple[str, ...] = ()
    span: tuple[int, int] | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Decision:
    """A condition that is not decided; ``usual`` is the branch taken if nobody sets anything."""

    line: int
    options: int
    usual: int = 0


# Nothing changes one. Frozen it would take four times as long to make, and many are made.
@dataclass(slots=True, unsafe_hash=True)
class Piece:
    """A stretch of text on one line, on its way to become part of a word.

    Attributes:
        splits: an unquoted expansion: blanks in it part words.
        quoted: even without text it makes a word.
        unknown: why the text is not known.
        unset: nothing in the script sets it.
        soft: true as long as nobody sets a variable from outside, or passes an argument.
        end: no text, but the end of an array's element.
    """

    text: str
    line: int = field(default=0, compare=False)
    splits: bool = False
    quoted: bool = False
    unknown: str | None = None
    unset: bool = False
    soft: bool = False
    end: bool = False
    span: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def is_plain(self) -> bool:
        """Whether it is as a variable keeps it: set, and not told how or where it was written."""
        missing = self.unset and self.unknown is None
        return not (self.splits or self.quoted or self.span or missing)

    def with_text(self, text: str) -> Piece:
        """The same of another text."""
        facts = (self.unknown, self.unset, self.soft, self.end)
        return Piece(text, self.line, self.splits, self.quoted, *facts, self.span)

    def written(self, splits: bool, quoted: bool, span: tuple[int, int] | None = None) -> Piece:
        """The same text, as if it were written in another way, or elsewhere."""
        if (self.splits, self.quoted, self.span) == (splits, quoted, span):
            return self
        facts = (self.unknown, self.unset, self.soft, self.end)
        return Piece(self.text, self.line, splits, quoted, *facts, span)


@dataclass(frozen=True)
class Choice:
    """One of several values, by a decision. What is told of it is worked out once."""

    decision: Decision
    options: tuple[Value, ...]

    @cached_property
    def decisions(self) -> dict[Decision, None]:
        """Its own, and those within its options."""
        return {self.decision: None} | decisions(*self.options)

    @cached_property
    def size(self) -> int:
        """How many pieces and choices it holds."""
        return sum(len(option) + _in_choices(option) for option in self.options)

    @cached_property
    def length(self) -> int:
        """Of the text of all its options."""
        return sum(map(_length, self.options))

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is as a variable keeps it."""
        return all(p.is_plain for option in self.options for p in option)


Value: TypeAlias = "tuple[Piece | Choice, ...]"
Flat: TypeAlias = "tuple[Piece, ...]"
END = Piece("", end=True)
# What is known not to be there.
NOTHING: Value = (Piece("", unset=True),)
TOO_LONG = Piece("", unknown="it is too long to be read")
_TOO_OPEN = Piece("", unknown="too much hangs on conditions")
DEFAULT_IFS = " \t\n"

# Bound on the runs that one value is worked out for.
MOST_RUNS = 64
# Bounds on what a variable keeps.
_MAX_COMPACT = 64
_MAX_PIECES = 1_000
MAX_TEXT = 20_000
_MAX_ARRAY_TEXT = 200_000
_MAX_IN_CHOICES = 128
_MAX_IN_ARRAY_CHOICES = 4_000
_TOO_MUCH = ("it hangs on", "too much", "it is too long")


def decisions(*values: Value) -> dict[Decision, None]:
    """The decisions that these values hang on, in the order they are met."""
    found: dict[Decision, None] = {}
    for value in values:
        for piece in value:
            if isinstance(piece, Choice):
                found |= piece.decisions
    return found


def decided(value: Value, taken: dict[Decision, int]) -> Value:
    """The value once some decisions are taken."""
    if Choice not in map(type, value):
        return value
    result: list[Piece | Choice] = []
    for piece in value:
        if not isinstance(piece, Choice) or piece.decisions.keys().isdisjoint(taken):
            result.append(piece)
        elif piece.decision in taken:
            result += decided(piece.options[taken[piece.decision]], taken)
        else:
            result.append(
                Choice(piece.decision, tuple(decided(option, taken) for option in piece.options))
            )
    return tuple(result)


def usual(value: Value) -> Flat:
    """The value if every decision goes its usual way."""
    if Choice not in map(type, value):
        return flat(value)
    return flat(decided(value, {decision: decision.usual for decision in decisions(value)}))


def flat(value: Value) -> Flat:
    """The same value, for a reader that knows it holds no choice."""
    return tuple(piece for piece in value if isinstance(piece, Piece))


def runs(found: Sequence[Decision]) -> Iterator[dict[Decision, int]]:
    """Every way to take these decisions, the usual one first."""
    if not found:
        yield {}
        return
    first, rest = found[0], found[1:]
    options = sorted(range(first.options), key=lambda option: option != first.usual)
    for option in options:
        for others in runs(rest):
            yield {first: option, **others}


def number_of_runs(found: Sequence[Decision]) -> int:
    number = 1
    for decision in found:
        number *= decision.options
    return number


def lifted(function: Callable[..., Value], *values: Value) -> Value:
    """``function`` of values without choices, applied in each run that these values allow."""
    found = list(decisions(*values))
    if not found:
        return function(*values)
    if number_of_runs(found) > MOST_RUNS:
        return function(*(_collapsed(value) for value in values))
    first = found[0]
    options = tuple(
        lifted(function, *(decided(value, {first: option}) for value in values))
        for option in range(first.options)
    )
    return chosen(first, options)


def _collapsed(value: Value) -> Value:
    """Choices, of which there are too many, as what is not known."""
    return tuple(
        piece
        if isinstance(piece, Piece)
        else Piece(
            text(usual(piece.options[piece.decision.usual])),
            piece.decision.line,
            unknown=f"too much hangs on the condition on line {piece.decision.line}",
        )
        for piece in value
    )


def chosen(decision: Decision, options: Sequence[Value]) -> Value:
    """A choice, of no more than what differs between its options."""
    first, *others = options
    if all(other == first for other in others):
        return first
    start = min(_alike(first, other) for other in others)
    shortest = min(len(option) for option in options) - start
    stop = min(shortest, *(_alike(first[::-1], other[::-1]) for other in others))
    middle = tuple(option[start : len(option) - stop] for option in options)
    if any(isinstance(p, Piece) and p.end for option in (first, *middle) for p in option):
        # Whole elements of an array only.
        while start and not _closes(first[start - 1]):
            start -= 1
        while stop and not (stop == len(first) or _closes(first[-1 - stop])):
            stop -= 1
        middle = tuple(option[start : len(option) - stop] for option in options)
    tail = first[len(first) - stop :] if stop else ()
    return (*first[:start], Choice(decision, middle), *tail)


def _alike(one: Value, other: Value) -> int:
    """How many pieces two values begin with alike."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a is not b and a != b:
            return at
    return min(len(one), len(other))


def _closes(piece: Piece | Choice) -> bool:
    """True for what an element of an array may end with."""
    if isinstance(piece, Piece):
        return piece.end
    return any(option and _closes(option[-1]) for option in piece.options)


def text(pieces: Flat) -> str:
    return "".join(piece.text for piece in pieces)


def why_unknown(pieces: Flat) -> tuple[str, ...]:
    return tuple(dict.fromkeys(piece.unknown for piece in pieces if piece.unknown))


def reason(pieces: Flat, otherwise: str) -> str:
    """Why it is not known: where too much hangs on it, that, whatever is made of it."""
    reasons = (piece.unknown or "" for piece in pieces)
    return next((why for why in reasons if why.startswith(_TOO_MUCH)), otherwise)


def elements(pieces: Flat) -> list[Flat]:
    """An array's elements."""
    result: list[Flat] = []
    current: list[Piece] = []
    for piece in pieces:
        if piece.end:
            result.append(tuple(current))
            current = []
        else:
            current.append(piece)
    return result


def array(items: Sequence[Value]) -> Value:
    return tuple(piece for item in items for piece in (*item, END))


def fields(pieces: Flat, ifs: str = DEFAULT_IFS) -> Iterator[Flat]:
    """Field splitting: what one written word becomes."""
    if len(pieces) == 1 and not pieces[0].splits and pieces[0].text and not pieces[0].end:
        yield _unless_files(pieces)
        return
    current: list[Piece] = []
    exists = False
    between = separator(ifs)
    for piece in pieces:
        if piece.end:
            if exists:
                yield _unless_files(current)
            current, exists = [], False
        elif not piece.splits or piece.unknown or between is None:
            if piece.text or piece.quoted or piece.unknown:
                exists = True
            current.append(piece)
        else:
            position = 0
            for match in between.finditer(piece.text):
                if match.start() > position:
                    current.append(piece.with_text(piece.text[position : match.start()]))
                    exists = True
                if exists or not match[0].isspace():
                    if not _nothing(current):
                        yield _unless_files(current) or (replace(piece, text="", quoted=True),)
                    current, exists = [], False
                position = match.end()
            if position < len(piece.text):
                rest = piece.with_text(piece.text[position:]) if position else piece
                current.append(rest)
                exists = True
    if exists and not _nothing(current):
        yield _unless_files(current)


def _unless_files(pieces: Sequence[Piece]) -> Flat:
    """A field; from the root there are files, and which of them a pattern names is not known."""
    head = pieces[0].text if pieces else ""
    if head and head[0] != "/":
        return tuple(pieces)
    if not text(tuple(pieces)).startswith("/") or not any(
        not (piece.quoted or piece.unknown) and _FILES.search(piece.text) for piece in pieces
    ):
        return tuple(pieces)
    why = f"which files {text(tuple(pieces))} names is not known"
    return tuple(replace(piece, unknown=piece.unknown or why, splits=True) for piece in pieces)


_FILES = re.compile(r"[*?]|\[.+\]")


def _nothing(pieces: list[Piece]) -> bool:
    """An unquoted variable that nobody sets makes no word."""
    return bool(pieces) and all(
        (piece.unset and piece.splits and not piece.quoted)
        or not (piece.text or piece.quoted or piece.unknown)
        for piece in pieces
    )


@cache
def separator(ifs: str) -> re.Pattern[str] | None:
    if not ifs:
        return None
    blank = "".join(re.escape(c) for c in ifs if c.isspace())
    other = "".join(re.escape(c) for c in ifs if not c.isspace())
    around = f"[{blank}]*" if blank else ""
    ways = [f"{around}[{other}]{around}"] if other else []
    return re.compile("|".join([*ways, *([f"[{blank}]+"] if blank else [])]))


def word(pieces: Flat) -> Word:
    if len(pieces) == 1:
        (piece,) = pieces
        return Word(piece.text, piece.line, why_unknown(pieces), piece.span)
    spans = {piece.span for piece in pieces}
    return Word(
        text(pieces),
        pieces[0].line if pieces else None,
        why_unknown(pieces),
        spans.pop() if len(spans) == 1 else None,
    )


def after_equals(pieces: Flat) -> Flat:
    """Of ``NAME=value`` the value."""
    rest: list[Piece] = []
    passed = False
    for piece in pieces:
        if passed:
            rest.append(piece)
        elif "=" in piece.text and not piece.unknown:
            passed = True
            rest.append(piece.with_text(piece.text.partition("=")[2]))
    return tuple(rest)


def joined(items: Sequence[Flat], between: str, line: int) -> Flat:
    """One text of an array's elements."""
    made: list[Piece] = []
    for number, item in enumerate(items):
        if number:
            made.append(Piece(between, line))
        made += item
    return tuple(made)


def output(program: str) -> Piece:
    """What a program writes: without text of its own, until it is known where it is put."""
    return Piece("", unknown=f"what {program} writes is not known")


def as_array(items: Sequence[Flat] | Iterator[Flat], quotes: bool = False) -> Value:
    return array(
        [
            # Of what is not known, that it may be more than one element.
            tuple(
                p.written(p.splits and bool(p.unknown), p.quoted and quotes, p.span) for p in item
            )
            or (Piece(""),)
            for item in items
        ]
    )


def plain_value(value: Value) -> Value:
    """What a variable keeps: nothing of how it was written."""
    if len(value) > _MAX_COMPACT:
        value = _compact(value)
    if TOO_LONG in value[:2] or len(value) > _MAX_PIECES:  # the first is an opening quote
        return (TOO_LONG,)
    if sum(len(piece.text) for piece in value if isinstance(piece, Piece)) > MAX_TEXT:
        return (TOO_LONG,)
    return tuple(
        p
        if p.is_plain
        else p.written(False, False)
        if isinstance(p, Piece)
        else Choice(p.decision, tuple(plain_value(option) for option in p.options))
        for p in value
        if not (isinstance(p, Piece) and not (p.text or p.unknown or p.soft or p.unset))
    )


def plain_array(value: Value) -> Value:
    """What an array keeps: a loop that doubles it would take all memory there is."""
    if value[:1] in ((TOO_LONG,), (_TOO_OPEN,)):
        return value[:2]  # what is added is not read either, or it would all be counted again
    if len(value) > _MAX_PIECES or _length(value) > _MAX_ARRAY_TEXT:
        return array([(TOO_LONG,)])
    if _in_choices(value) > _MAX_IN_ARRAY_CHOICES:
        return array([(_TOO_OPEN,)])
    return value


def bounded(value: Value) -> Value:
    """A value, its choices as what is not known where they hold too much.

    Each condition that sets a variable from others, which hang on conditions, may double it.
    """
    if len(value) > _MAX_PIECES:
        return (TOO_LONG,)
    return _collapsed(value) if _in_choices(value) > _MAX_IN_CHOICES else value


def _in_choices(value: Value) -> int:
    if Choice not in map(type, value):
        return 0
    return sum(piece.size for piece in value if isinstance(piece, Choice))


def _length(value: Value) -> int:
    return sum(len(p.text) if isinstance(p, Piece) else p.length for p in value)


def _compact(value: Value) -> Value:
    """Neighbours on one line, as one piece."""
    made: list[Piece | Choice] = []
    for piece in value:
        last = made[-1] if made else None
        if (
            isinstance(piece, Piece)
            and isinstance(last, Piece)
            and not (piece.unknown or last.unknown or piece.end or last.end)
            and (piece.line, piece.soft, piece.unset) == (last.line, last.soft, last.unset)
        ):
            made[-1] = last.with_text(last.text + piece.text)
        else:
            made.append(piece)
    return tuple(made)


def is_counted(pieces: Flat) -> bool:
    """Whether an array has as many elements as are told: none is an unquoted $(...), say."""
    return not any(piece.unknown and piece.splits for piece in pieces)


def element_at(pieces: Flat, at: int) -> Value | None:
    items = elements(pieces)
    return items[at] if -len(items) <= at < len(items) else None
