"""Brace expansion, ``{a,b}`` and ``{1..3}``: text alone, before anything else is expanded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from klplug.audit.shell import syntax


def brace_words(parts: Sequence[syntax.Part]) -> list[tuple[syntax.Part, ...]]:
    """Brace expansion: ``{a,b}`` and ``{1..3}`` outside of quotes."""
    if not any(
        isinstance(p, syntax.Literal) and not p.quoted and "{" in p.text for p in parts
    ) or not any(isinstance(p, syntax.Literal) and not p.quoted and "}" in p.text for p in parts):
        return [tuple(parts)]
    items: list[syntax.Part] = []
    for part in parts:
        if isinstance(part, syntax.Literal) and not part.quoted:
            items += [syntax.Literal(c, part.line, False) for c in part.text]
        else:
            items.append(part)
    return [_rejoined(made) for made in _words(items)]


def _rejoined(items: Sequence[syntax.Part]) -> tuple[syntax.Part, ...]:
    made: list[syntax.Part] = []
    for item in items:
        last = made[-1] if made else None
        if (
            isinstance(item, syntax.Literal)
            and isinstance(last, syntax.Literal)
            and (item.quoted, item.line) == (last.quoted, last.line)
        ):
            made[-1] = syntax.Literal(last.text + item.text, last.line, last.quoted)
        else:
            made.append(item)
    return tuple(made)


def _words(items: list[syntax.Part]) -> list[list[syntax.Part]]:
    def char(at: int) -> str:
        item = items[at]
        return item.text if isinstance(item, syntax.Literal) and not item.quoted else ""

    for start in range(len(items)):
        if char(start) != "{":
            continue
        depth, commas, close = 0, [], None
        for at in range(start, len(items)):
            here = char(at)
            depth += {"{": 1, "}": -1}.get(here, 0)
            if here == "," and depth == 1:
                commas.append(at)
            if depth == 0:
                close = at
                break
        if close is None:
            continue
        bodies: list[list[syntax.Part]] = []
        if commas:
            edges = [start, *commas, close]
            for left, right in itertools.pairwise(edges):
                bodies += _words(items[left + 1 : right])
        else:
            inner = "".join(char(at) for at in range(start + 1, close))
            bodies = [[syntax.Literal(t, items[start].line, False)] for t in _range(inner)]
            if len(inner) != close - start - 1:
                bodies = []
        if bodies:
            tails = _words(items[close + 1 :])
            return [[*items[:start], *body, *tail] for body in bodies for tail in tails]
    return [items]


def _range(inner: str) -> list[str]:
    match = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?", inner)
    if match:
        first, last = int(match[1]), int(match[2])
        step = abs(int(match[3] or 1)) or 1
        width = 0
        if any(re.match(r"-?0\d", m) for m in (match[1], match[2])):
            width = max(len(match[1]), len(match[2]))
        sign = 1 if last >= first else -1
        numbers = range(first, last + sign, sign * step)[:10_000]
        return [f"{n:0{width}d}" for n in numbers]
    if letters := re.fullmatch(r"([a-zA-Z])\.\.([a-zA-Z])", inner):
        first, last = ord(letters[1]), ord(letters[2])
        sign = 1 if last >= first else -1
        return [chr(n) for n in range(first, last + sign, sign)]
    return []
