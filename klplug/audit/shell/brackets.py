"""The conditions in ``[[ ... ]]``."""

from __future__ import annotations

import re

from klplug.audit.shell.syntax import Test
from klplug.audit.shell.words import Words

_TESTS = re.compile(r"(==|=~|=|!=|<|>|-(?:eq|ne|lt|le|gt|ge|nt|ot|ef))(?=[\s(\"'$])")


class Brackets(Words):
    """``[[ ... ]]``, from the weakest operator to the strongest."""

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
