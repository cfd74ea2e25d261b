"""Simple commands: assignments, words, redirections and here-documents."""

from __future__ import annotations

import re
from abc import abstractmethod

from klplug.audit.shell.scanner import PLACEHOLDER
from klplug.audit.shell.syntax import (
    DECLARING,
    NAME,
    Assignment,
    Function,
    HereDocument,
    Literal,
    Part,
    Redirect,
    Simple,
    Statement,
    Text,
)
from klplug.audit.shell.words import Words

_REDIRECT = re.compile(r"(\d+|\{\w+\})?(<<<|<<-|<<|<&|<>|<|>>|>&|>\||>|&>>|&>)")
_REDIRECTS = "<>&{0123456789"  # what it may begin with
_EQUALS = re.compile(r"\+?=")
_CALLED = re.compile(r"\(\s*\)")
_ASSIGNS = re.compile(rf"({NAME})(\[|\+?=)")


class SimpleCommands(Words):
    """Words with assignments before them and redirections anywhere."""

    @abstractmethod
    def _command(self) -> Statement:
        """Any command, a compound one too."""

    def _simple(self) -> Statement:
        line = self.line_at(self.at)
        start = self.at
        assignments: list[Assignment] = []
        words: list[Text | Assignment] = []
        redirects: list[Redirect] = []
        end = self.at
        declares = False
        while True:
            self._blank()
            here = self._peek()
            if not here or here in "\n;|)":
                break
            if here in _REDIRECTS and (redirect := self._redirect()) is not None:
                redirects.append(redirect)
                end = self.at
                continue
            if here == "&" or (here == "(" and not words):
                break
            if here == "(":
                name = words[0].plain() if len(words) == 1 and isinstance(words[0], Text) else None
                match = _CALLED.match(self.source, self.at)
                if name is None or match is None or assignments:
                    self._fail(self.at, "an unexpected (")
                self.at = match.end()
                self._newlines()
                return Function(name, self._command())
            if (not words or declares) and (assignment := self._assignment()) is not None:
                (words if words else assignments).append(assignment)
            else:
                word = self._word()
                declares = declares or (not words and word.literal() in DECLARING)
                words.append(word)
            end = self.at
        if end == start:
            self._fail(self.at, f"an unexpected {self._here()}")
        return Simple(tuple(assignments), tuple(words), tuple(redirects), line, end)

    def _redirect(self) -> Redirect | None:
        self._blank()
        if self._peek() not in _REDIRECTS:
            return None
        match = _REDIRECT.match(self.source, self.at)
        if match is None or PLACEHOLDER.match(self.source, self.at):
            return None
        operator = match[2]
        if operator in ("<", ">") and self.source.startswith("(", match.end()):
            return None  # a process substitution, which is a word
        self.at = match.end()
        self._blank()
        if operator in ("<<", "<<-"):
            target = self._word()
            raw = self.source[target.span[0] : target.span[1]]
            delimiter = target.plain() if target.plain() is not None else raw
            assert delimiter is not None
            quoted = any(c in raw for c in "'\"\\")
            document = HereDocument(delimiter, quoted, operator == "<<-")
            self._documents.append(document)
            return Redirect((match[1] or "") + operator, target, document)
        substitutes = self._starts("<(") or self._starts(">(")
        if self._peek() in ("", *"\n;&|()<>") and not substitutes:
            self._fail(self.at, f"nothing to redirect to after {match[0]}")
        return Redirect((match[1] or "") + operator, self._word())

    def _here_document(self, document: HereDocument) -> None:
        start = end = self.at
        joined = False  # a backslash at the end of a line makes the next one a part of it
        while True:
            if self.at >= len(self.source):
                end = self.at  # bash warns, and takes what there is
                break
            stop = self.source.find("\n", self.at)
            stop = len(self.source) if stop < 0 else stop
            line = self.source[self.at : stop]
            if document.strips_tabs:
                line = line.lstrip("\t")
            continues = joined
            joined = not document.literal and (len(line) - len(line.rstrip("\\"))) % 2 == 1
            if line == document.delimiter and not continues:
                end = self.at
                self.at = min(stop + 1, len(self.source))
                # The caller stands on what follows a newline.
                break
            self.at = stop + 1
        after = min(self.at, len(self.source))
        if document.literal:
            parts = self._literals(self.source[start:end], start, True)
        else:
            self.at = start
            parts = self._quoted(lambda: self.at >= end, quotes=False)
        if document.strips_tabs:
            parts = _without_tabs(parts)
        document.body = Text(tuple(parts), self.line_at(start), (start, end))
        self.at = after

    def _assignment(self) -> Assignment | None:
        match = _ASSIGNS.match(self.source, self.at)
        if match is None:
            return None
        start, line = self.at, self.line_at(self.at)
        index: Text | None = None
        if match[2] == "[":
            close = self._closing_bracket(match.end())
            if close is None or not _EQUALS.match(self.source, close + 1):
                return None
            self.at = match.end()
            index = self._until("]")
            operator = _EQUALS.match(self.source, self.at)
            assert operator is not None
            self.at = operator.end()
            appends = operator[0] == "+="
        else:
            self.at = match.end()
            appends = match[2] == "+="
        if self._peek() == "(":
            elements = self._elements()
            nothing = Text((), line, (start, self.at))
            return Assignment(match[1], line, appends, nothing, index, elements)
        return Assignment(match[1], line, appends, self._word(assigned=True), index)

    def _closing_bracket(self, at: int) -> int | None:
        depth = 1
        while at < len(self.source) and self.source[at] != "\n":
            depth += {"[": 1, "]": -1}.get(self.source[at], 0)
            if depth == 0:
                return at
            at += 1
        return None

    def _elements(self) -> tuple[Text | Assignment, ...]:
        start = self.at
        self.at += 1
        elements: list[Text | Assignment] = []
        while True:
            self._newlines()
            if self._peek() == ")":
                self.at += 1
                return tuple(elements)
            if self.at >= len(self.source):
                self._fail(start, "( has no closing )")
            if self._peek() == "[" and (close := self._closing_bracket(self.at + 1)) is not None:
                operator = _EQUALS.match(self.source, close + 1)
                if operator is not None:
                    line = self.line_at(self.at)
                    self.at += 1
                    key = self._until("]")
                    self.at = operator.end()
                    value = self._word(assigned=True)
                    elements.append(Assignment("", line, False, value, key=key))
                    continue
            if self._peek() in "|&;<>(" and not (
                PLACEHOLDER.match(self.source, self.at) or self.source[self.at + 1 :][:1] == "("
            ):
                self._fail(self.at, f"an unexpected {self._here()} in an array")
            elements.append(self._word())


def _without_tabs(parts: list[Part]) -> list[Part]:
    """<<- takes the tabs at the start of each line off."""
    stripped: list[Part] = []
    fresh = True
    for part in parts:
        if isinstance(part, Literal):
            text = part.text.lstrip("\t") if fresh else part.text
            fresh = text.endswith("\n") or (fresh and not text)
            stripped.append(Literal(text, part.line, part.quoted))
        else:
            fresh = False
            stripped.append(part)
    return stripped
