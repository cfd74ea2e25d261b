"""Glob patterns, as ``case``, ``[[ ]]`` and ``${X%...}`` match them."""

from __future__ import annotations

import re
from functools import cache

_CLASSES = {
    **{"alnum": "a-zA-Z0-9", "alpha": "a-zA-Z", "digit": "0-9", "lower": "a-z"},
    **{"upper": "A-Z", "space": r"\s", "blank": r" \t", "punct": r"!-/:-@\[-`{-~"},
    **{"xdigit": "0-9a-fA-F", "word": r"\w"},
}


@cache
def regex(pattern: tuple[tuple[str, bool], ...]) -> re.Pattern[str]:
    """A pattern's regular expression; stretches that are quoted mean themselves.

    Args:
        pattern: (text, quoted), in order.
    """
    text = "".join(part for part, _ in pattern)
    quoted = [mark for part, mark in pattern for _ in part]
    return re.compile(_translated(text, quoted), re.DOTALL)


def _translated(text: str, quoted: list[bool]) -> str:
    out: list[str] = []
    groups: list[str] = []
    at = 0
    while at < len(text):
        here = text[at]
        if quoted[at]:
            out.append(re.escape(here))
        elif here in "?*+@!" and text[at + 1 : at + 2] == "(" and not quoted[at + 1]:
            out.append("(?!" if here == "!" else "(?:")
            groups.append(here)
            at += 1
        elif here == "|" and groups:
            out.append("|")
        elif here == ")" and groups:
            kind = groups.pop()
            out.append({"@": ")", "!": ").*"}.get(kind, f"){kind}"))
        elif here == "*":
            out.append(".*")
        elif here == "?":
            out.append(".")
        elif here == "[" and (bracket := _bracket(text, at)) is not None:
            out.append(bracket[0])
            at = bracket[1] - 1
        elif here == "\\" and at + 1 < len(text):
            at += 1
            out.append(re.escape(text[at]))
        else:
            out.append(re.escape(here))
        at += 1
    return "".join(out) + ")" * len(groups)


def _bracket(text: str, at: int) -> tuple[str, int] | None:
    """A bracket expression, and where it ends."""
    match = re.compile(r"\[([!^]?)(\]?(?:\[:\w+:\]|[^\]])*)\]").match(text, at)
    if match is None or not match[2]:
        return None
    inner = re.sub(r"([\\\[&~|])(?!:\w+:\])", r"\\\1", match[2])
    inner = re.sub(r"\\?\[:(\w+):\]", lambda m: _CLASSES.get(m[1], m[1]), inner)
    if inner.startswith("]"):
        inner = "\\" + inner
    try:
        re.compile(f"[{inner}]")
    except re.error:
        return None
    return f"[{'^' if match[1] else ''}{inner}]", match.end()


def without(whole: str, pattern: tuple[tuple[str, bool], ...], action: str) -> str:
    """``${X#pattern}`` and its kin: the shortest or the longest match taken off."""
    compiled = regex(pattern)
    lengths = range(len(whole) + 1)
    longest = len(action) == 2
    for length in reversed(lengths) if longest else lengths:
        part = whole[:length] if action[0] == "#" else whole[len(whole) - length :]
        if compiled.fullmatch(part):
            return whole[length:] if action[0] == "#" else whole[: len(whole) - length]
    return whole
