"""Bash's grammar: a script's text to its statements. Nothing is expanded here.

One pass over the characters, as bash itself reads: what a character means hangs on what it stands
in. Sources: the grammar in POSIX.1-2017, "Shell Command Language", 2.3 and 2.10, and the manual of
bash 5.2 for what it adds ([[ ]], (( )), arrays, <<<, $'...').
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable
from typing import NoReturn

from klplug.audit.shell.syntax import (
    DECLARING,
    AndOr,
    Arithmetic,
    ArithmeticCommand,
    Assignment,
    Case,
    CountingFor,
    For,
    Function,
    HereDocument,
    If,
    Literal,
    Opaque,
    Parameter,
    Part,
    Pipeline,
    Redirect,
    Redirected,
    Sequence,
    Simple,
    Statement,
    Subshell,
    Substitution,
    Test,
    Text,
    While,
)

_META = " \t\n;&|()<>"
_RESERVED = frozenset(
    (
        *("if", "then", "elif", "else", "fi", "for", "while", "until", "do", "done", "case"),
        *("esac", "in", "function", "select", "time", "{", "}", "!", "[["),
    )
)
_WORDLIKE = re.compile(r"[a-z]+(?=[\s;&|()<>]|$)|[{}!](?=[\s;&|()<>]|$)|\[\[(?=\s)")
_NAME = re.compile(r"[A-Za-z_]\w*")
_REDIRECT = re.compile(r"(\d+|\{\w+\})?(<<<|<<-|<<|<&|<>|<|>>|>&|>\||>|&>>|&>)")
# "<your path>": no shell reads it, and whoever wrote it means to replace it.
_PLACEHOLDER = re.compile(r"<[A-Za-z][^<>\n|&;()]*(?<=\S)>(?=[\s\"'/\\.,:;|&)_-]|$)")
_ASSIGNS = re.compile(r"([A-Za-z_]\w*)(\[|\+?=)")
_TESTS = re.compile(r"(==|=~|=|!=|<|>|-(?:eq|ne|lt|le|gt|ge|nt|ot|ef))(?=[\s(\"'$])")


class SyntaxProblem(Exception):
    """What a shell would not read, and the line it begins on."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line, self.what = line, what


class Parser:
    """Statements of a script, one complete command at a time."""

    def __init__(self, source: str, line_at: Callable[[int], int] | None = None) -> None:
        self.source = source
        self.at = 0
        self._documents: list[HereDocument] = []
        if line_at is None:
            starts = [0, *(match.end() for match in re.finditer("\n", source))]

            def line_at(offset: int) -> int:
                return bisect.bisect_right(starts, offset)

        self.line_at = line_at
        self._depth = 0

    def next_statement(self) -> Statement | None:
        """The next line of commands; ``None`` at the end."""
        self._newlines()
        if self.at >= len(self.source):
            return None
        statement = self._list(stops_at_newline=True)
        self._blank()
        if self.at < len(self.source) and self._peek() not in "\n;":
            self._fail(self.at, f"an unexpected {self._here()}")
        if self._peek() == ";":
            self._fail(self.at, f"an unexpected {self._here()}")
        if self._documents:
            self._newline()  # their bodies belong to this statement
        return statement

    # Blanks, newlines and words that are not words.

    def _peek(self, ahead: int = 0) -> str:
        return self.source[self.at + ahead : self.at + ahead + 1]

    def _starts(self, text: str) -> bool:
        return self.source.startswith(text, self.at)

    def _here(self) -> str:
        match = re.compile(r"\S{1,12}").match(self.source, self.at)
        return match[0] if match else "end of the file"

    def _fail(self, at: int, what: str) -> NoReturn:
        raise SyntaxProblem(self.line_at(min(at, len(self.source))), what)

    def _blank(self) -> None:
        source = self.source
        while self.at < len(source):
            if source[self.at] in " \t":
                self.at += 1
            elif source.startswith("\\\n", self.at):
                self.at += 2
            elif source[self.at] == "#":
                end = source.find("\n", self.at)
                self.at = len(source) if end < 0 else end
            else:
                return

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

    # Statements.

    def _list(self, *ends: str, stops_at_newline: bool = False) -> Statement:
        items: list[Statement] = []
        while True:
            if stops_at_newline:
                self._blank()
            else:
                self._newlines()
            here = self._peek()
            if not here or here == ")" or self._starts(";;") or self._starts(";&"):
                break
            if stops_at_newline and here == "\n":
                break
            if (word := self._reserved()) is not None and word in ends:
                break
            items.append(self._and_or())
            self._blank()
            if self._starts(";;") or self._starts(";&"):
                break
            if self._peek() in (";", "&") and self._peek():
                self.at += 1
            elif self._peek() != "\n":
                break
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def _and_or(self) -> Statement:
        first = self._pipeline()
        rest: list[tuple[str, Statement]] = []
        while True:
            self._blank()
            if not (self._starts("&&") or self._starts("||")):
                break
            operator = self.source[self.at : self.at + 2]
            self.at += 2
            self._newlines()
            rest.append((operator, self._pipeline()))
        return AndOr(first, tuple(rest)) if rest else first

    def _pipeline(self) -> Statement:
        negated = False
        self._blank()
        while (word := self._reserved()) in ("!", "time"):
            assert word is not None
            self.at += len(word)
            negated ^= word == "!"
            self._blank()
            if word == "time" and self._starts("-p"):
                self.at += 2
                self._blank()
        items = [self._command()]
        while True:
            self._blank()
            if self._peek() != "|" or self._starts("||"):
                break
            self.at += 2 if self._starts("|&") else 1
            self._newlines()
            items.append(self._command())
        return Pipeline(tuple(items), negated) if negated or len(items) > 1 else items[0]

    def _command(self) -> Statement:
        self._blank()
        start, word = self.at, self._reserved()
        self._depth += 1
        if self._depth > 150:
            self._fail(start, "blocks nested too deep to be read")
        compound = self._compound(word)
        self._depth -= 1
        if compound is None:
            return self._simple()
        redirects = []
        while (redirect := self._redirect()) is not None:
            redirects.append(redirect)
        return Redirected(compound, tuple(redirects)) if redirects else compound

    def _compound(self, word: str | None) -> Statement | None:
        start, line = self.at, self.line_at(self.at)
        if self._starts("((") and (expression := self._arithmetic("((")) is not None:
            return ArithmeticCommand(expression, line)
        if self._peek() == "(":
            self.at += 1
            body = self._list()
            if self._peek() != ")":
                self._fail(start, "( has no closing )")
            self.at += 1
            return Subshell(body)
        if word is None:
            return None
        self.at += len(word)
        if word == "{":
            body = self._list("}")
            self._expect("}", start, "{")
            return body
        if word == "if":
            return self._if(start)
        if word in ("while", "until"):
            condition = self._list("do")
            return While(condition, self._do(start, word), word == "until", line)
        if word in ("for", "select"):
            return self._for(start)
        if word == "case":
            return self._case(start)
        if word == "function":
            self._blank()
            name = self._word_text()
            self._blank()
            if self._starts("("):
                self.at += 1
                self._blank()
                self.at += 1
            self._newlines()
            return Function(name, self._command())
        if word == "[[":
            test = self._test_or(start)
            self._newlines()
            if not self._starts("]]"):
                self._fail(start, "[[ has no closing ]]")
            self.at += 2
            return test
        self._fail(start, f"an unexpected {word}")

    def _if(self, start: int) -> Statement:
        line = self.line_at(self.at)
        condition = self._list("then")
        self._expect("then", start, "if")
        then = self._list("elif", "else", "fi")
        self._newlines()
        word = self._reserved()
        otherwise: Statement | None = None
        if word == "elif":
            self.at += 4
            return If(condition, then, self._if(start), line)
        if word == "else":
            self.at += 4
            otherwise = self._list("fi")
        self._expect("fi", start, "if")
        return If(condition, then, otherwise, line)

    def _do(self, start: int, opener: str) -> Statement:
        self._expect("do", start, opener)
        body = self._list("done")
        self._expect("done", start, opener)
        return body

    def _for(self, start: int) -> Statement:
        line = self.line_at(start)
        self._blank()
        if self._starts("(("):
            expression = self._arithmetic("((")
            if expression is None:
                self._fail(start, "(( has no closing ))")
            first, condition, step = _split_at_semicolons(expression)
            self._blank()
            if self._peek() == ";":
                self.at += 1
            return CountingFor(first, condition, step, self._do(start, "for"), line)
        name = self._word_text()
        self._newlines()
        words: tuple[Text, ...] | None = None
        if self._reserved() == "in":
            self.at += 2
            listed: list[Text] = []
            self._blank()
            while self._peek() and self._peek() not in "\n;&|()":
                listed.append(self._word())
                self._blank()
            words = tuple(listed)
        if self._peek() == ";":
            self.at += 1
        return For(name, words, self._do(start, "for"), line)

    def _case(self, start: int) -> Statement:
        line = self.line_at(start)
        self._blank()
        subject = self._word()
        self._expect("in", start, "case")
        items: list[tuple[tuple[Text, ...], Statement, str]] = []
        while True:
            self._newlines()
            if self._reserved() == "esac":
                self.at += 4
                return Case(subject, tuple(items), line)
            if self.at >= len(self.source):
                self._fail(start, "case has no closing esac")
            if self._peek() == "(":
                self.at += 1
            patterns: list[Text] = []
            while True:
                self._blank()
                patterns.append(self._word(pattern=True))
                self._blank()
                if self._peek() != "|":
                    break
                self.at += 1
            if self._peek() != ")":
                self._fail(self.at, f"an unexpected {self._here()} where a pattern needs )")
            self.at += 1
            body = self._list("esac")
            end = next((e for e in (";;&", ";&", ";;") if self._starts(e)), "")
            self.at += len(end)
            items.append((tuple(patterns), body, end))

    # [[ ... ]]

    def _test_or(self, start: int) -> Test:
        left = self._test_and(start)
        while self._skip_to("||"):
            left = Test("||", (left, self._test_and(start)), left.line)
        return left

    def _test_and(self, start: int) -> Test:
        left = self._test(start)
        while self._skip_to("&&"):
            left = Test("&&", (left, self._test(start)), left.line)
        return left

    def _skip_to(self, operator: str) -> bool:
        self._newlines()
        if self._starts(operator):
            self.at += len(operator)
            return True
        return False

    def _test(self, start: int) -> Test:
        self._newlines()
        line = self.line_at(self.at)
        if self.at >= len(self.source) or self._starts("]]"):
            self._fail(start, "[[ has no closing ]]" if not self._peek() else "an empty [[ ]]")
        if re.compile(r"!\s").match(self.source, self.at):
            self.at += 1
            return Test("!", (self._test(start),), line)
        if self._peek() == "(":
            self.at += 1
            inner = self._test_or(start)
            self._newlines()
            if self._peek() != ")":
                self._fail(start, "( has no closing )")
            self.at += 1
            return inner
        if unary := re.compile(r"-[a-zA-Z](?=\s+[^\s=!<>&|\]])").match(self.source, self.at):
            self.at = unary.end()
            self._blank()
            return Test(unary[0], (self._word(),), line)
        left = self._word()
        self._blank()
        match = _TESTS.match(self.source, self.at)
        if match is None:
            return Test("-n", (left,), line)
        self.at = match.end()
        self._blank()
        operator = "==" if match[0] == "=" else match[0]
        right = self._word(pattern=True, regex=operator == "=~")
        return Test(operator, (left, right), line)

    # Simple commands.

    def _simple(self) -> Statement:
        line = self.line_at(self.at)
        start = self.at
        assignments: list[Assignment] = []
        words: list[Text | Assignment] = []
        redirects: list[Redirect] = []
        end = self.at
        while True:
            self._blank()
            here = self._peek()
            if not here or here in "\n;|)":
                break
            redirect = self._redirect()
            if redirect is not None:
                redirects.append(redirect)
                end = self.at
                continue
            if here == "&" or (here == "(" and not words):
                break
            if here == "(":
                name = words[0].plain() if len(words) == 1 and isinstance(words[0], Text) else None
                match = re.compile(r"\(\s*\)").match(self.source, self.at)
                if name is None or match is None or assignments:
                    self._fail(self.at, "an unexpected (")
                self.at = match.end()
                self._newlines()
                return Function(name, self._command())
            declares = (
                bool(words) and isinstance(words[0], Text) and (words[0].literal() in DECLARING)
            )
            if (not words or declares) and (assignment := self._assignment()) is not None:
                (words if words else assignments).append(assignment)
            else:
                words.append(self._word())
            end = self.at
        if end == start:
            self._fail(self.at, f"an unexpected {self._here()}")
        return Simple(tuple(assignments), tuple(words), tuple(redirects), line, end)

    def _redirect(self) -> Redirect | None:
        self._blank()
        match = _REDIRECT.match(self.source, self.at)
        if match is None or _PLACEHOLDER.match(self.source, self.at):
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
            if close is None or not re.compile(r"\+?=").match(self.source, close + 1):
                return None
            self.at = match.end()
            index = self._until("]")
            operator = re.compile(r"\+?=").match(self.source, self.at)
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
                operator = re.compile(r"\+?=").match(self.source, close + 1)
                if operator is not None:
                    line = self.line_at(self.at)
                    self.at += 1
                    key = self._until("]")
                    self.at = operator.end()
                    value = self._word(assigned=True)
                    elements.append(Assignment("", line, False, value, key=key))
                    continue
            if self._peek() in "|&;<>(" and not (
                _PLACEHOLDER.match(self.source, self.at) or self.source[self.at + 1 :][:1] == "("
            ):
                self._fail(self.at, f"an unexpected {self._here()} in an array")
            elements.append(self._word())

    # Words.

    def _word_text(self) -> str:
        word = self._word()
        return self.source[word.span[0] : word.span[1]]

    def _word(self, pattern: bool = False, assigned: bool = False, regex: bool = False) -> Text:
        """A word; with ``assigned`` there may be none, with ``regex`` brackets are part of it."""
        start, source = self.at, self.source
        parts: list[Part] = []
        depth = 0

        def ends() -> bool:
            nonlocal depth
            here = self._peek()
            if not here or here in " \t\n":
                return not (regex and depth and here and here != "\n")
            if here in "<>" and source[self.at + 1 : self.at + 2] == "(" and not regex:
                return False
            if _PLACEHOLDER.match(source, self.at):
                return False
            if regex and here in "()|<>":
                depth += {"(": 1, ")": -1}.get(here, 0)
                return depth < 0
            if here == "(" and pattern and self.at > start and source[self.at - 1] in "@?*+!":
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
            elif here == '"' or self._starts('$"'):
                flush()
                parts += self._double_quotes()
            elif self._starts("$'"):
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
            elif here == "<" and (match := _PLACEHOLDER.match(source, self.at)):
                flush()
                reason = f"{match[0]} is a placeholder"
                parts.append(Opaque(match[0], self.line_at(self.at), reason))
                self.at = match.end()
            elif here == "~" and self.at == start:
                flush()
                match = re.compile(r"~[\w.+-]*").match(source, self.at)
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
                run = _PLAIN.match(source, self.at)
                piece = run[0] if run else here
                plain.append(piece)
                self.at += len(piece)
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
                plain.append(here)
                self.at += 1
                if here == "\n":
                    flush()
        flush()
        return parts

    def _ansi(self) -> Literal:
        start = self.at
        match = re.compile(r"\$'((?:[^'\\]|\\.)*)'", re.DOTALL).match(self.source, start)
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

    def _dollar(self, quoted: bool, quotes: bool = True) -> Part | str:
        """What a $ or a ` begins; the character itself where it begins nothing."""
        source, start = self.source, self.at
        line = self.line_at(start)
        if source[start] == "`":
            close = re.compile(r"`((?:[^`\\]|\\.)*)`", re.DOTALL).match(source, start)
            if close is None:
                self._fail(start, "a ` that is never closed")
            inner = re.sub(r"\\([`\\$])", r"\1", close[1])
            self.at = close.end()
            parser = Parser(inner, lambda offset: line)
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
        match = re.compile(r"\$(\w|[@*#?$!-])").match(source, start)
        if match is None:
            self.at += 1
            return "$"
        name = match[1]
        if name.isalpha() or name == "_":
            whole = _NAME.match(source, start + 1)
            assert whole is not None
            name = whole[0]
        self.at = start + 1 + len(name)
        return Parameter(f"${name}", line, quoted, name)

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
                parts.append(Literal(here, self.line_at(self.at), False))
                self.at += 1
        return parts


_PLAIN = re.compile(r"[\w.=,:@%+*?^!#-]+")
_BRACES = re.compile(
    r"\$\{(?:(?P<length>\#)(?=[\w@*][\w]*[\[}]))?(?P<indirect>!)?(?P<name>[A-Za-z_]\w*|\d+|[@*#?$!-])"
)
_ACTION = re.compile(r":?[-=+?]|:|\#\#?|%%?|//|/\#|/%|/|\^\^?|,,?|@")
_ANSI = re.compile(
    r"\\(?:(?P<octal>[0-7]{1,3})|x(?P<hex>[0-9a-fA-F]{1,2})|u(?P<u>[0-9a-fA-F]{1,4})"
    r"|U(?P<U>[0-9a-fA-F]{1,8})|c(?P<control>.)|(?P<other>.))",
    re.DOTALL,
)
_ESCAPES = {
    **{"a": "\a", "b": "\b", "e": "\x1b", "E": "\x1b", "f": "\f", "n": "\n", "r": "\r"},
    **{"t": "\t", "v": "\v", "\\": "\\", "'": "'", '"': '"', "?": "?"},
}


def _ansi_character(match: re.Match[str]) -> str:
    if match["octal"]:
        return chr(int(match["octal"], 8) & 0xFF)
    if code := match["hex"] or match["u"] or match["U"]:
        return chr(int(code, 16))
    if match["control"]:
        return chr(ord(match["control"].upper()) ^ 0x40)
    return _ESCAPES.get(match["other"], match[0])


def _split_at_semicolons(expression: Text) -> tuple[Text, Text, Text]:
    groups: list[list[Part]] = [[]]
    for part in expression.parts:
        if isinstance(part, Literal) and part.text == ";":
            groups.append([])
        else:
            groups[-1].append(part)
    groups += [[], []]
    first, condition, step = (
        Text(tuple(group), expression.line, expression.span) for group in groups[:3]
    )
    return first, condition, step


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
