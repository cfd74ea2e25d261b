"""Integers as a shell reckons with them: 64 bits, division towards zero."""

from __future__ import annotations

import re
from collections.abc import Callable

from klplug.audit.shell.syntax import NAME

_TOKEN = re.compile(
    r"\s*(?:(?P<number>0[xX][0-9a-fA-F]+|\d+\#\w+|\d+)"
    rf"|(?P<name>{NAME})"
    r"|(?P<sign>\*\*|<<=|>>=|<<|>>|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^]=|[-+*/%<>=!~&|^?:(),]))"
)
_LEVELS = (
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<=", ">=", "<", ">"),
    ("<<", ">>"), ("+", "-"), ("*", "/", "%"),
)  # fmt: skip


class NotKnown(Exception):
    """A number that only a run could tell, or no expression at all."""


class Reckoning:
    """The value of an expression, and what it assigns.

    Args:
        value: the text of a variable; raises ``NotKnown`` where nobody knows it.
    """

    def __init__(self, expression: str, value: Callable[[str], str]) -> None:
        self._value = value
        self.assigned: dict[str, int] = {}
        self._tokens = _tokens(expression)
        self._at = 0
        self.number = self._comma() if self._tokens else 0
        if self._at != len(self._tokens):
            raise NotKnown

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *signs: str) -> str | None:
        if self._peek() in signs and self._peek():
            self._at += 1
            return self._tokens[self._at - 1]
        return None

    def _comma(self) -> int:
        number = self._assignment()
        while self._take(","):
            number = self._assignment()
        return number

    def _assignment(self) -> int:
        name, sign = self._peek(), "".join(self._tokens[self._at + 1 : self._at + 2])
        if re.fullmatch(NAME, name) and re.fullmatch(r"([-+*/%&|^]|<<|>>)?=", sign):
            self._at += 2
            number = self._assignment()
            if sign != "=":
                number = _applied(sign[:-1], self._variable(name), number)
            self.assigned[name] = number
            return number
        return self._conditional()

    def _conditional(self) -> int:
        condition = self._binary(0)
        if not self._take("?"):
            return condition
        yes = self._assignment()
        if not self._take(":"):
            raise NotKnown
        no = self._assignment()
        return yes if condition else no

    def _binary(self, level: int) -> int:
        if level == len(_LEVELS):
            return self._power()
        number = self._binary(level + 1)
        while sign := self._take(*_LEVELS[level]):
            number = _applied(sign, number, self._binary(level + 1))
        return number

    def _power(self) -> int:
        number = self._unary()
        if self._take("**"):
            exponent = self._power()
            if not 0 <= exponent <= 64:
                raise NotKnown
            return _wrapped(number**exponent)
        return number

    def _unary(self) -> int:
        if sign := self._take("-", "+", "!", "~"):
            number = self._unary()
            return {"-": -number, "+": number, "!": int(not number), "~": ~number}[sign]
        if step := self._take("++", "--"):
            name = self._peek()
            self._at += 1
            self.assigned[name] = self._variable(name) + (1 if step == "++" else -1)
            return self.assigned[name]
        return self._atom()

    def _atom(self) -> int:
        if self._take("("):
            number = self._comma()
            if not self._take(")"):
                raise NotKnown
            return number
        token = self._peek()
        self._at += 1
        if re.fullmatch(NAME, token):
            number = self._variable(token)
            if step := self._take("++", "--"):
                self.assigned[token] = number + (1 if step == "++" else -1)
            return number
        return _number(token)

    def _variable(self, name: str) -> int:
        if name in self.assigned:
            return self.assigned[name]
        text = self._value(name).strip()
        if not text:
            return 0
        if re.fullmatch(r"-?\w+(\#\w+)?", text) and not re.match(r"[A-Za-z_]", text):
            return -_number(text[1:]) if text.startswith("-") else _number(text)
        if text == name:
            raise NotKnown
        return Reckoning(text, self._value).number


def _tokens(expression: str) -> list[str]:
    tokens, at = [], 0
    while expression[at:].strip():
        match = _TOKEN.match(expression, at)
        if match is None:
            raise NotKnown
        tokens.append(match[0].strip())
        at = match.end()
    return tokens


def _number(token: str) -> int:
    try:
        if "#" in token:
            base, _, digits = token.partition("#")
            return int(digits, int(base))
        if re.fullmatch(r"0[xX][0-9a-fA-F]+", token):
            return int(token, 16)
        return int(token, 8) if token.startswith("0") and len(token) > 1 else int(token)
    except ValueError:
        raise NotKnown from None


def _wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _applied(sign: str, left: int, right: int) -> int:
    if sign in ("/", "%"):
        if right == 0:
            raise NotKnown
        quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
        return quotient if sign == "/" else left - right * quotient
    if sign in ("<<", ">>") and not 0 <= right < 64:
        raise NotKnown
    operations: dict[str, Callable[[], int]] = {
        "+": lambda: left + right,
        "-": lambda: left - right,
        "*": lambda: left * right,
        "<<": lambda: left << right,
        ">>": lambda: left >> right,
        "&": lambda: left & right,
        "|": lambda: left | right,
        "^": lambda: left ^ right,
        "&&": lambda: int(bool(left) and bool(right)),
        "||": lambda: int(bool(left) or bool(right)),
        "==": lambda: int(left == right),
        "!=": lambda: int(left != right),
        "<": lambda: int(left < right),
        "<=": lambda: int(left <= right),
        ">": lambda: int(left > right),
        ">=": lambda: int(left >= right),
    }
    return _wrapped(operations[sign]())
