"""What a ``$`` or a backquote begins."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable

from klplug.audit.shell.scanner import Scanner, SyntaxProblem
from klplug.audit.shell.syntax import (
    NAME,
    Arithmetic,
    Literal,
    Opaque,
    Parameter,
    Part,
    Substitution,
    Text,
)

_VARIABLE = re.compile(rf"\$({NAME}|[0-9@*#?$!-])")
_BACKQUOTED = re.compile(r"`((?:[^`\\]|\\.)*)`", re.DOTALL)
_BRACES = re.compile(
    r"\$\{(?:(?P<length>\#)(?=[\w@*][\w]*[\[}]))?(?P<indirect>!)?"
    rf"(?P<name>{NAME}|\d+|[@*#?$!-])"
)
# In an expression, up to what may mean something else; a semicolon stands alone.
_RECKONED = re.compile(r"[\w \t.,:?!=<>+*/%&|^~#-]+")
_ACTION = re.compile(r":?[-=+?]|:|\#\#?|%%?|//|/\#|/%|/|\^\^?|,,?|@")


class Expansions(Scanner):
    """``$NAME``, ``${NAME...}``, ``$(...)``, `` `...` `` and ``$((...))``."""

    @abstractmethod
    def _parts(self, parts: list[Part], ends: Callable[[], bool], start: int) -> None:
        """Unquoted text and what stands in it, up to where ``ends`` says."""

    @abstractmethod
    def _quoted(self, ends: Callable[[], bool], quotes: bool = True) -> list[Part]:
        """Text in which only \\, $ and ` mean something."""

    @abstractmethod
    def _double_quotes(self) -> list[Part]:
        """What stands between two double quotes."""

    @abstractmethod
    def _until(self, close: str) -> Text:
        """Unquoted text up to a bracket, which is passed."""

    def _dollar(self, quoted: bool, quotes: bool = True) -> Part | str:
        """What a $ or a ` begins; the character itself where it begins nothing."""
        source, start = self.source, self.at
        line = self.line_at(start)
        if (match := _VARIABLE.match(source, start)) is not None:
            self.at = match.end()
            return Parameter(match[0], line, quoted, match[1])
        if source[start] == "`":
            close = _BACKQUOTED.match(source, start)
            if close is None:
                self._fail(start, "a ` that is never closed")
            inner = re.sub(r"\\([`\\$])", r"\1", close[1])
            self.at = close.end()
            parser = type(self)(inner, lambda offset: line)
            body = parser._list()
            if parser.at < len(inner):
                self._fail(start, "what stands between ` and ` is no command")
            return Substitution(source[start : self.at], line, quoted, body)
        if self._starts("$(("):
            self.at += 1
            expression = self._arithmetic("((")
            if expression is not None:
                return Arithmetic(source[start : self.at], line, quoted, expression)
            self.at = start
        if self._starts("$("):
            self.at += 2
            pending, self._documents = self._documents, []
            body = self._list()
            self._newlines()
            self._documents = pending
            if self._peek() != ")":
                self._fail(start, "$( has no closing )")
            self.at += 1
            return Substitution(source[start : self.at], line, quoted, body)
        if self._starts("${"):
            return self._braces(quoted, quotes)
        self.at += 1
        return "$"

    def _braces(self, quoted: bool, quotes: bool = True) -> Part:
        source, start = self.source, self.at
        line = self.line_at(start)
        match = _BRACES.match(source, start)
        if match is None:
            close = source.find("}", start)
            if close < 0:
                self._fail(start, "${ has no closing }")
            self.at = close + 1
            written = source[start : self.at]
            return Opaque(written, line, f"{written} is an expansion that only a shell computes")
        self.at = match.end()
        length, indirect, name = bool(match["length"]), bool(match["indirect"]), match["name"]
        index = None
        if self._peek() == "[":
            self.at += 1
            index = self._until("]")
        action = ""
        argument = second = None
        found = _ACTION.match(source, self.at)
        if found is not None:
            action = found[0]
            self.at = found.end()
            kept = action in ("//", "/", "/#", "/%") or action[0] in "#%^,"
            argument, closed = self._argument(
                start, quoted and not kept, "/}" if kept and "/" in action else "}"
            )
            if closed == "/":
                second, _ = self._argument(start, quoted, "}")
            elif action == ":":
                argument, second = argument, None
        elif self._peek() == "}":
            self.at += 1
        else:
            close = source.find("}", self.at)
            if close < 0:
                self._fail(start, "${ has no closing }")
            self.at = close + 1
            written = source[start : self.at]
            return Opaque(written, line, f"{written} is an expansion that only a shell computes")
        written = source[start : self.at]
        return Parameter(
            written, line, quoted, name, index, action, argument, second, length, indirect
        )

    def _argument(self, start: int, quoted: bool, closers: str) -> tuple[Text, str]:
        """What follows an operator in ${...}; blanks and newlines belong to it."""
        begin = self.at
        parts: list[Part] = []

        def ends() -> bool:
            if self.at >= len(self.source):
                self._fail(start, "${ has no closing }")
            return self.source[self.at] in closers

        if quoted:
            while not ends():
                # Quotes inside are taken off, and what stands in them is read as ever.
                parts += self._quoted(lambda: ends() or self.source[self.at] == '"')
                if self.source[self.at] == '"':
                    parts += self._double_quotes()
        else:
            self._parts(parts, ends, self.at)
        end, closed = self.at, self.source[self.at]
        self.at += 1
        return Text(tuple(parts), self.line_at(begin), (begin, end)), closed

    def _arithmetic(self, opener: str) -> Text | None:
        """What stands between (( and )); ``None`` if this is something else."""
        start = self.at
        self.at += len(opener)
        begin, depth = self.at, 0
        parts: list[Part] = []

        def ends() -> bool:
            nonlocal depth
            here = self._peek()
            if not here:
                raise SyntaxProblem(self.line_at(start), "(( has no closing ))")
            if here == "(":
                depth += 1
            elif here == ")":
                if depth == 0:
                    return True
                depth -= 1
            return False

        try:
            parts = self._arithmetic_parts(ends)
        except SyntaxProblem:
            self.at = start
            return None
        if not self._starts("))"):
            self.at = start
            return None
        end = self.at
        self.at += 2
        return Text(tuple(parts), self.line_at(begin), (begin, end))

    def _arithmetic_parts(self, ends: Callable[[], bool]) -> list[Part]:
        parts: list[Part] = []
        source = self.source
        while not ends():
            here = source[self.at]
            if here in "$`" and not self._starts('$"'):
                part = self._dollar(quoted=True)
                if isinstance(part, str):
                    part = Literal(part, self.line_at(self.at), False)
                parts.append(part)
            elif here == '"' or here == "'":
                self.at += 1
            elif self._starts("\\\n"):
                self.at += 2
            else:
                run = _RECKONED.match(source, self.at)
                text = run[0] if run else here
                parts.append(Literal(text, self.line_at(self.at), False))
                self.at += len(text)
        return parts
