"""The parts of a shell script, as ``parser`` finds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

# A variable's name, as a pattern: ASCII whatever the locale.
NAME = r"(?a:[A-Za-z_]\w*)"
# Builtins whose arguments are assignments.
DECLARING = ("export", "declare", "typeset", "local", "readonly")


# Nothing changes a Literal or a Text either. They are not frozen because most of a script is them.
@dataclass(slots=True, unsafe_hash=True)
class Literal:
    text: str
    line: int
    quoted: bool


@dataclass(frozen=True)
class Parameter:
    """``$NAME``, ``${NAME[index]op arg}``; ``length`` is ``${#NAME}``, ``keys`` ``${!NAME}``."""

    written: str
    line: int
    quoted: bool
    name: str
    index: Text | None = None
    action: str = ""
    argument: Text | None = None
    second: Text | None = None
    length: bool = False
    indirect: bool = False

    @property
    def is_list(self) -> bool:
        """``$@``, ``${A[*]}`` and their kin, and the number of an array's elements."""
        index = None if self.index is None else self.index.plain()
        return index in ("@", "*") or (self.name in ("@", "*") and not self.length)

    @property
    def joins(self) -> bool:
        """``$*`` and ``${A[*]}``, which in quotes are one word."""
        return self.name == "*" or (self.index is not None and self.index.plain() == "*")


@dataclass(frozen=True)
class Substitution:
    written: str
    line: int
    quoted: bool
    body: Statement


@dataclass(frozen=True)
class Arithmetic:
    written: str
    line: int
    quoted: bool
    expression: Text


@dataclass(frozen=True)
class Opaque:
    """What only a run could tell, and why."""

    written: str
    line: int
    reason: str


Part: TypeAlias = "Literal | Parameter | Substitution | Arithmetic | Opaque"


@dataclass(slots=True, unsafe_hash=True)
class Text:
    """A word as written."""

    parts: tuple[Part, ...]
    line: int
    span: tuple[int, int]

    def literal(self) -> str | None:
        """Its text, if nothing in it is quoted or expanded."""
        if len(self.parts) == 1 and isinstance(self.parts[0], Literal) and not self.parts[0].quoted:
            return self.parts[0].text
        return None

    def plain(self) -> str | None:
        """Its text, if nothing in it is expanded."""
        if all(isinstance(part, Literal) for part in self.parts):
            return "".join(part.text for part in self.parts if isinstance(part, Literal))
        return None


@dataclass(frozen=True)
class Assignment:
    """``NAME=value``, ``NAME[index]+=value``, ``NAME=(elements)``."""

    name: str
    line: int
    appends: bool
    value: Text
    index: Text | None = None
    elements: tuple[Text | Assignment, ...] | None = None
    key: Text | None = None  # of an element: [key]=value


@dataclass(frozen=True)
class Redirect:
    """A redirection; the operator has its file descriptor before it, if one is written."""

    operator: str
    target: Text
    document: HereDocument | None = None


@dataclass(frozen=True)
class Simple:
    assignments: tuple[Assignment, ...]
    words: tuple[Text | Assignment, ...]
    redirects: tuple[Redirect, ...]
    line: int
    end: int  # offset after its last word


@dataclass(frozen=True)
class Sequence:
    items: tuple[Statement, ...]


@dataclass(frozen=True)
class AndOr:
    """A chain: the first statement, then ``&&`` or ``||`` with the next, and so on."""

    first: Statement
    rest: tuple[tuple[str, Statement], ...]


@dataclass(frozen=True)
class Pipeline:
    items: tuple[Statement, ...]
    negated: bool = False


@dataclass(frozen=True)
class Subshell:
    body: Statement


@dataclass(frozen=True)
class Redirected:
    body: Statement
    redirects: tuple[Redirect, ...]


@dataclass(frozen=True)
class If:
    condition: Statement
    then: Statement
    otherwise: Statement | None
    line: int


@dataclass(frozen=True)
class Case:
    subject: Text
    items: tuple[tuple[tuple[Text, ...], Statement, str], ...]
    line: int


@dataclass(frozen=True)
class For:
    name: str
    words: tuple[Text, ...] | None  # None: over the arguments
    body: Statement
    line: int


@dataclass(frozen=True)
class CountingFor:
    first: Text
    condition: Text
    step: Text
    body: Statement
    line: int


@dataclass(frozen=True)
class While:
    condition: Statement
    body: Statement
    until: bool
    line: int


@dataclass(frozen=True)
class Function:
    name: str
    body: Statement


@dataclass(frozen=True)
class ArithmeticCommand:
    expression: Text
    line: int


@dataclass(frozen=True)
class Test:
    """``[[ ... ]]``, or a part of it: an operator, and what it is applied to."""

    operator: str
    operands: tuple[Text | Test, ...]
    line: int


@dataclass
class HereDocument:
    """A here-document whose body is on the lines to come."""

    delimiter: str
    literal: bool
    strips_tabs: bool
    body: Text | None = None


Statement: TypeAlias = (
    "Simple | Sequence | AndOr | Pipeline | Subshell | Redirected | If | Case | For | CountingFor"
    " | While | Function | ArithmeticCommand | Test"
)
