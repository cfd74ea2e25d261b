"""Where in a script's text a parser stands: blanks, newlines, reserved words."""

from __future__ import annotations

import bisect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NoReturn

from klplug.audit.shell.syntax import HereDocument, Statement

_RESERVED = frozenset(
    (
        *("if", "then", "elif", "else", "fi", "for", "while", "until", "do", "done", "case"),
        *("esac", "in", "function", "select", "time", "{", "}", "!", "[["),
    )
)
_WORDLIKE = re.compile(r"[a-z]+(?=[\s;&|()<>]|$)|[{}!](?=[\s;&|()<>]|$)|\[\[(?=\s)")
_EXTENDED = re.compile(r"(?m)^[^#\n]*\bshopt\s+-\w*s\w*\s[^#\n;]*\bextglob\b")
_BLANK = re.compile(r"(?:[ \t]+|\\\n|#[^\n]*)+")
# "<your path>": no shell reads it, and whoever wrote it means to replace it.
PLACEHOLDER = re.compile(r"<[A-Za-z][^<>\n|&;()]*(?<=\S)>(?=[\s\"'/\\.,:;|&)_-]|$)")


def with_newlines(text: str) -> str:
    """A text whose lines end in LF; CR and LF after a backslash are as a shell takes them."""
    return re.sub(r"(?<!\\)\r\n", "\n", text)


class SyntaxProblem(Exception):
    """What a shell would not read, and the line it begins on."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line, self.what = line, what


class Scanner(ABC):
    """A place in a script's text, and the here-documents that its next newline begins."""

    def __init__(self, source: str, line_at: Callable[[int], int] | None = None) -> None:
        self.source = source
        self.at = 0
        self._documents: list[HereDocument] = []
        extended = _EXTENDED.search(source)
        self._extended = len(source) if extended is None else extended.end()
        if line_at is None:
            starts = [0, *(match.end() for match in re.finditer("\n", source))]

            def line_at(offset: int) -> int:
                return bisect.bisect_right(starts, offset)

        self.line_at = line_at

    @abstractmethod
    def _list(self, *ends: str, stops_at_newline: bool = False) -> Statement:
        """Statements, up to one of the words in ``ends`` or to what closes them."""

    @abstractmethod
    def _here_document(self, document: HereDocument) -> None:
        """The body of a here-document, which begins here."""

    def _peek(self, ahead: int = 0) -> str:
        return self.source[self.at + ahead : self.at + ahead + 1]

    def _two(self) -> str:
        """The next two characters, or what is left."""
        return self.source[self.at : self.at + 2]

    def _starts(self, text: str) -> bool:
        return self.source.startswith(text, self.at)

    def _here(self) -> str:
        match = re.compile(r"\S{1,12}").match(self.source, self.at)
        return match[0] if match else "end of the file"

    def _fail(self, at: int, what: str) -> NoReturn:
        raise SyntaxProblem(self.line_at(min(at, len(self.source))), what)

    def _blank(self) -> None:
        if self.source[self.at : self.at + 1] in " \t\\#" and (
            match := _BLANK.match(self.source, self.at)
        ):
            self.at = match.end()

    def _newline(self) -> None:
        """Past a newline, and the here-documents that begin there."""
        self.at += 1
        documents, self._documents = self._documents, []
        for document in documents:
            self._here_document(document)

    def _newlines(self) -> None:
        self._blank()
        while self._peek() == "\n":
            self._newline()
            self._blank()

    def _reserved(self) -> str | None:
        """The reserved word that stands here, if one does."""
        match = _WORDLIKE.match(self.source, self.at)
        return match[0] if match and match[0] in _RESERVED else None

    def _expect(self, word: str, opened: int, opener: str) -> None:
        self._newlines()
        if self._reserved() != word:
            if self.at >= len(self.source):
                self._fail(opened, f"{opener} has no closing {word}")
            self._fail(self.at, f"an unexpected {self._here()} where {opener} needs {word}")
        self.at += len(word)
