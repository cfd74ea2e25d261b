"""The advice of a report as an edit of the script: the rest of the file stays byte for byte."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from klplug.audit.errors import AuditError


@dataclass(frozen=True)
class Change:
    """One word of a command: deleted, added, or replaced.

    Attributes:
        line: where it stands; ``None`` for a command line.
        delete: the word that goes.
        add: the word that comes, as it is typed into a shell.
        span: from where to where the script's text is replaced; ``None`` where the word does not
            stand there as such.
        written: what stands there, where that is not the word: the shell makes it of a variable.
        behind: the word that an added one comes behind.
    """

    line: int | None
    delete: str | None = None
    add: str | None = None
    span: tuple[int, int] | None = None
    written: str | None = None
    behind: str = ""

    def to_json(self) -> dict[str, int | str | None]:
        return {"line": self.line, "delete": self.delete, "add": self.add}


def edited(text: str, changes: Iterable[Change]) -> str:
    """A script once its words are changed.

    Raises:
        AuditError: a word that does not stand literally in the script.
    """
    placed = [(_place(text, change), change) for change in changes]
    # From the end, so that places before stay; of two at one place the last is put in first.
    order = sorted(enumerate(placed), key=lambda row: (row[1][0], row[0]), reverse=True)
    for _, (span, change) in order:
        if change.delete is None:
            text = f"{text[: span[1]]} {change.add}{text[span[1] :]}"
        elif change.add is not None:
            text = text[: span[0]] + change.add + text[span[1] :]
        else:
            text = _without(text, *span)
    return text


def _place(text: str, change: Change) -> tuple[int, int]:
    """Where a word stands: at its span, or, an element of an array, alone of its kind on its line.

    Raises:
        AuditError: it is put together there from other words.
    """
    if change.span is not None:
        here = text[slice(*change.span)]
        if change.delete is None or here == change.written or bare(here) == bare(change.delete):
            return change.span
    lines = text.splitlines(keepends=True)
    if change.delete is not None and change.line is not None and change.line <= len(lines):
        word = rf"(?<![^\s(])(['\"]?){re.escape(change.delete)}\1(?![^\s)])"
        found = list(re.finditer(word, lines[change.line - 1]))
        if len(found) == 1:
            start = sum(map(len, lines[: change.line - 1]))
            return start + found[0].start(), start + found[0].end()
    where = "" if change.line is None else f"line {change.line}: "
    what = change.delete or change.behind
    raise AuditError(f"{where}{what} does not stand literally in the command, or its array")


def bare(word: str) -> str:
    """A word without its quotes."""
    return word.replace('"', "").replace("'", "").replace("\\", "")


def _without(text: str, start: int, end: int) -> str:
    """The text without a word, and without its line where nothing else stands on that."""
    begin = text.rfind("\n", 0, start) + 1
    stop = text.find("\n", end)
    stop = len(text) if stop < 0 else stop
    rest = text[end:stop].strip()
    if text[begin:start].strip() or rest not in ("", "\\"):
        while start > begin and text[start - 1] in " \t":
            start -= 1
        return text[:start] + text[end:]
    before = text[: max(begin - 1, 0)]
    if not rest and before.endswith("\\"):
        # The last word of a command: the line above it ends the command now.
        return before[:-1].rstrip(" \t") + text[stop:]
    return text[:begin] + text[stop + 1 :]


def lines(text: str) -> list[str]:
    """The lines of a script, as a shell counts them: each with its end."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _raw_lines(content: bytes) -> list[bytes]:
    return re.findall(rb"[^\n]*\n|[^\n]+", content)


def difference(path: str, before: bytes, after: bytes) -> bytes:
    """An edit as ``git diff --no-index`` has it, which ``git apply`` and ``patch -p1`` take."""
    # git marks where a name with a blank ends, and takes no slash twice.
    name = path.lstrip("/") + ("\t" if " " in path else "")
    old, new = _raw_lines(before), _raw_lines(after)
    was, now = (os.fsencode(f"{side}/{name}") for side in "ab")
    made = difflib.diff_bytes(difflib.unified_diff, old, new, was, now)
    open_end = b"\n\\ No newline at end of file\n"
    return b"".join(line if line.endswith(b"\n") else line + open_end for line in made)


def kept(content: bytes, before: str, after: str) -> bytes:
    """An edit of what was read of a file, in the file: lines that it keeps stay byte for byte.

    A line that is edited has the end that its neighbours have.

    Raises:
        AuditError: a line to edit that is no UTF-8.
    """
    raw = _raw_lines(content)
    old, new = lines(before), lines(after)
    made: list[bytes] = []
    for what, start, stop, first, last in difflib.SequenceMatcher(
        None, old, new, autojunk=False
    ).get_opcodes():
        if what == "equal":
            made += raw[start:stop]
            continue
        for number, line in enumerate(raw[start:stop], start=start + 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                raise AuditError(f"line {number} is edited, and is no UTF-8") from None
        near = raw[start] if start < len(raw) else raw[-1]
        end = "\r\n" if near.endswith(b"\r\n") else "\n"
        made += [line.replace("\n", end).encode() for line in new[first:last]]
    return b"".join(made)
