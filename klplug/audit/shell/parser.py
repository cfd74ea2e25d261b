"""Bash's grammar: a script's text to its statements. Nothing is expanded here.

One pass over the characters, as bash itself reads: what a character means hangs on what it stands
in. Sources: the grammar in POSIX.1-2017, "Shell Command Language", 2.3 and 2.10, and the manual of
bash 5.2 for what it adds ([[ ]], (( )), arrays, <<<, $'...').
"""

from __future__ import annotations

from collections.abc import Callable

from klplug.audit.shell.brackets import Brackets
from klplug.audit.shell.simple import SimpleCommands
from klplug.audit.shell.syntax import (
    AndOr,
    ArithmeticCommand,
    Case,
    CountingFor,
    For,
    Function,
    If,
    Literal,
    Part,
    Pipeline,
    Redirected,
    Sequence,
    Statement,
    Subshell,
    Text,
    While,
)


class Parser(SimpleCommands, Brackets):
    """Statements of a script, one complete command at a time."""

    def __init__(self, source: str, line_at: Callable[[int], int] | None = None) -> None:
        super().__init__(source, line_at)
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

    # Lists and pipelines.

    def _list(self, *ends: str, stops_at_newline: bool = False) -> Statement:
        items: list[Statement] = []
        while True:
            if stops_at_newline:
                self._blank()
            else:
                self._newlines()
            here = self._peek()
            if not here or here == ")" or self._two() in (";;", ";&"):
                break
            if stops_at_newline and here == "\n":
                break
            if ends and self._reserved() in ends:
                break
            items.append(self._and_or())
            self._blank()
            after = self._two()
            if after in (";;", ";&"):
                break
            if after[:1] in (";", "&"):
                self.at += 1
            elif after[:1] != "\n":
                break
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def _and_or(self) -> Statement:
        first = self._pipeline()
        rest: list[tuple[str, Statement]] = []
        while True:
            self._blank()
            operator = self._two()
            if operator not in ("&&", "||"):
                break
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
            here = self._two()
            if here[:1] != "|" or here == "||":
                break
            self.at += 2 if here == "|&" else 1
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

    # Compound commands.

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
        self._newlines()
        if opener == "for" and self._reserved() == "{":  # as bash has it, undocumented
            self.at += 1
            body = self._list("}")
            self._expect("}", start, "{")
            return body
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
