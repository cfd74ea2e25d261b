"""The words of a script, and the quotes in them."""

from __future__ import annotations

import re
from collections.abc import Callable

from klplug.audit.shell.dollar import Expansions
from klplug.audit.shell.scanner import PLACEHOLDER
from klplug.audit.shell.syntax import Literal, Opaque, Parameter, Part, Text

_META = " \t\n;&|()<>"
_PLAIN = re.compile(r"[\w.=,:@%+*?^!#-]+")
# A word in which nothing means more than itself, unless braces do.
_WHOLE = re.compile(r"[\w.=,:@%+*?^!#/{}\[\]-]+(?=[ \t\n]|\Z)")
# In quotes, up to what may mean something or end them.
_QUOTED = re.compile(r"[^$`\\\"}\n]+")
_HOME = re.compile(r"~[\w.+-]*")
_IN_ANSI = re.compile(r"\$'((?:[^'\\]|\\.)*)'", re.DOTALL)
_ANSI = re.compile(
    r"\\(?:(?P<octal>[0-7]{1,3})|x(?P<hex>[0-9a-fA-F]{1,2})|u(?P<u>[0-9a-fA-F]{1,4})"
    r"|U(?P<U>[0-9a-fA-F]{1,8})|c(?P<control>.)|(?P<other>.))",
    re.DOTALL,
)
_ESCAPES = {
    **{"a": "\a", "b": "\b", "e": "\x1b", "E": "\x1b", "f": "\f", "n": "\n", "r": "\r"},
    **{"t": "\t", "v": "\v", "\\": "\\", "'": "'", '"': '"', "?": "?"},
}


class Words(Expansions):
    """Words: plain text, quotes, and expansions."""

    def _word_text(self) -> str:
        word = self._word()
        return self.source[word.span[0] : word.span[1]]

    def _word(self, pattern: bool = False, assigned: bool = False, regex: bool = False) -> Text:
        """A word; with ``assigned`` there may be none, with ``regex`` brackets are part of it."""
        start, source = self.at, self.source
        if (run := _WHOLE.match(source, start)) is not None:  # as most words are
            self.at = run.end()
            line = self.line_at(start)
            return Text((Literal(run[0], line, False),), line, (start, self.at))
        parts: list[Part] = []
        depth = 0

        def ends() -> bool:
            nonlocal depth
            here = self._peek()
            if here and here not in _META:
                return False
            if not here or here in " \t\n":
                return not (depth and here and here != "\n")
            if here in "<>" and source[self.at + 1 : self.at + 2] == "(" and not regex:
                return False
            if PLACEHOLDER.match(source, self.at):
                return False
            if regex and here in "()|<>":
                depth += {"(": 1, ")": -1}.get(here, 0)
                return depth < 0
            extended = pattern or start > self._extended
            if here == "(" and extended and self.at > start and source[self.at - 1] in "@?*+!":
                depth += 1
                return False
            if depth and here in ")|":
                depth -= here == ")"
                return False
            return here in _META

        self._parts(parts, ends, start)
        if self.at == start and not assigned:
            self._fail(self.at, f"an unexpected {self._here()}")
        return Text(tuple(parts), self.line_at(start), (start, self.at))

    def _parts(self, parts: list[Part], ends: Callable[[], bool], start: int) -> None:
        """Unquoted text and what stands in it, up to where ``ends`` says."""
        source = self.source
        plain: list[str] = []
        plain_at = self.at

        def flush() -> None:
            if plain:
                parts.append(Literal("".join(plain), self.line_at(plain_at), False))
                plain.clear()

        while not ends():
            if run := _PLAIN.match(source, self.at):
                if not plain:
                    plain_at = self.at
                plain.append(run[0])
                self.at = run.end()
                continue
            here = source[self.at]
            if here == "\\":
                if self._starts("\\\n"):
                    self.at += 2
                    continue
                flush()
                if self.at + 1 < len(source):
                    escaped = source[self.at + 1]
                    parts.append(Literal(escaped, self.line_at(self.at), True))
                self.at += 2
            elif here == "'":
                flush()
                close = source.find("'", self.at + 1)
                if close < 0:
                    self._fail(self.at, "a quote ' that is never closed")
                parts += self._literals(source[self.at + 1 : close], self.at + 1, True) or [
                    Literal("", self.line_at(self.at), True)
                ]
                self.at = close + 1
            elif here == '"' or (here == "$" and self._starts('$"')):
                flush()
                parts += self._double_quotes()
            elif here == "$" and self._starts("$'"):
                flush()
                parts.append(self._ansi())
            elif here == "$" or here == "`":
                part = self._dollar(quoted=False)
                if isinstance(part, str):
                    if not plain:
                        plain_at = self.at - len(part)
                    plain.append(part)
                else:
                    flush()
                    parts.append(part)
            elif here in "<>" and self._starts(here + "("):
                flush()
                parts.append(self._process())
            elif here == "<" and (match := PLACEHOLDER.match(source, self.at)):
                flush()
                reason = f"{match[0]} is a placeholder"
                parts.append(Opaque(match[0], self.line_at(self.at), reason))
                self.at = match.end()
            elif here == "~" and self.at == start:
                flush()
                match = _HOME.match(source, self.at)
                assert match is not None
                self.at = match.end()
                reason = f"{match[0]} is the home folder of whoever runs it"
                if self._peek() and self._peek() not in "/ \t\n:;&|()":
                    parts.append(Literal(match[0], self.line_at(start), False))
                else:
                    parts.append(Opaque(match[0], self.line_at(start), reason))
            else:
                if not plain or here == "\n":
                    flush()
                    plain_at = self.at
                plain.append(here)
                self.at += 1
        flush()

    def _until(self, close: str) -> Text:
        """Unquoted text up to a bracket, which is passed."""
        start = self.at
        parts: list[Part] = []
        depth = 0

        def ends() -> bool:
            nonlocal depth
            here = self._peek()
            if not here:
                self._fail(start, f"a bracket that is never closed with {close}")
            if here == close and depth == 0:
                return True
            if close == "]" and here in "[]":
                depth += 1 if here == "[" else -1
            return False

        self._parts(parts, ends, -1)
        end = self.at
        self.at += 1
        return Text(tuple(parts), self.line_at(start), (start, end))

    def _literals(self, text: str, offset: int, quoted: bool) -> list[Part]:
        """One part per line, so that every word knows its own."""
        parts: list[Part] = []
        for line in text.splitlines(keepends=True):
            parts.append(Literal(line, self.line_at(offset), quoted))
            offset += len(line)
        return parts

    def _double_quotes(self) -> list[Part]:
        start = self.at
        self.at += 2 if self._starts("$") else 1

        def ends() -> bool:
            if self.at >= len(self.source):
                self._fail(start, 'a quote " that is never closed')
            return self.source[self.at] == '"'

        parts = self._quoted(ends)
        self.at += 1
        if any(isinstance(p, Parameter) and p.is_list and not p.joins for p in parts):
            return parts  # no word where the list is empty
        return [Literal("", self.line_at(start), True), *parts]

    def _quoted(self, ends: Callable[[], bool], quotes: bool = True) -> list[Part]:
        """Text in which only \\, $ and ` mean something."""
        source = self.source
        parts: list[Part] = []
        plain: list[str] = []
        plain_at = self.at

        def flush() -> None:
            if plain:
                parts.append(Literal("".join(plain), self.line_at(plain_at), True))
                plain.clear()

        special = '$`\\"' if quotes else "$`\\"
        while not ends():
            here = source[self.at]
            if not plain:
                plain_at = self.at
            if here == "\\":
                after = source[self.at + 1 : self.at + 2]
                if after == "\n":
                    flush()
                elif after and after in special:
                    plain.append(after)
                else:
                    plain.append(here)
                    self.at -= 1
                self.at += 2
            elif here in "$`":
                part = self._dollar(quoted=True, quotes=quotes)
                if isinstance(part, str):
                    plain.append(part)
                else:
                    flush()
                    parts.append(part)
            else:
                run = _QUOTED.match(source, self.at)
                piece = run[0] if run else here
                plain.append(piece)
                self.at += len(piece)
                if here == "\n":
                    flush()
        flush()
        return parts

    def _ansi(self) -> Literal:
        start = self.at
        match = _IN_ANSI.match(self.source, start)
        if match is None:
            self._fail(start, "a quote ' that is never closed")
        self.at = match.end()
        return Literal(_ANSI.sub(_ansi_character, match[1]), self.line_at(start), True)

    def _process(self) -> Opaque:
        start = self.at
        self.at += 2
        self._list()
        if self._peek() != ")":
            self._fail(start, "( has no closing )")
        self.at += 1
        written = self.source[start : self.at]
        return Opaque(written, self.line_at(start), f"{written} is the output of a command")


def _ansi_character(match: re.Match[str]) -> str:
    if match["octal"]:
        return chr(int(match["octal"], 8) & 0xFF)
    if code := match["hex"] or match["u"] or match["U"]:
        return chr(int(code, 16))
    if match["control"]:
        return chr(ord(match["control"].upper()) ^ 0x40)
    return _ESCAPES.get(match["other"], match[0])
