"""What a shell holds while a script is walked: variables, how a statement ended, how deep it is.

Every walk takes the one ``Shell``, changes it, and may do so on trial: ``Shell.trial`` says what
changed and takes it back.
"""

from __future__ import annotations

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from klplug.audit.shell import conditions, syntax
from klplug.audit.shell.arithmetic import NotKnown
from klplug.audit.shell.command import Command
from klplug.audit.shell.conditions import Holds
from klplug.audit.shell.values import DEFAULT_IFS, Piece, Value, bounded, plain_array, text, usual

# Bounds, so that a script that calls itself or loops for ever is read in no time.
MAX_DEPTH = 30
MAX_ROUNDS = 64
MAX_LISTS = 16


def file_key(name: str) -> str:
    return f"file:{posixpath.normpath(name)}"


def is_file(name: str) -> bool:
    return name.startswith("file:")


def outlives(name: str) -> bool:
    """Whether a name is of something that lies outside of a shell's own variables."""
    return name in ("1>", "0<", "?") or is_file(name)


@dataclass(frozen=True)
class Scalar:
    value: Value


@dataclass(frozen=True)
class Listed:
    """An indexed array: its elements, each with an end."""

    value: Value


@dataclass(frozen=True)
class Mapped:
    """An associative array. Nothing changes its items: a copy with one more takes their place."""

    items: dict[str, Value]


@dataclass(frozen=True)
class Alias:
    """Another name of a variable (``declare -n``); of none, as long as the target is empty."""

    target: str


Variable: TypeAlias = "Scalar | Listed | Mapped | Alias | syntax.Function"
Changes: TypeAlias = "dict[str, Variable | None]"


@dataclass(frozen=True)
class Early:
    """A function or a round of a loop that may end early, and how variables stand then."""

    flow: str
    tree: Value
    if_true: bool
    variables: Changes


class Shell(ABC):
    """The state of a walk.

    Attributes:
        commands: programs met, in order.
        sourced: lines of ``source`` whose file is not there to be read.
        variables: by name; a function's has ``()`` after it, ``@`` are the arguments, ``?`` is the
            status. ``1>`` is what is written, where somebody reads it, ``0<`` what is left to be
            read, where that is known, and ``file:NAME`` what the script wrote to a file.
        exported: names that another shell sees.
        flow: what ends the statements that follow: ``exit``, ``return``, ``break``, ``continue``.
        unreached: how many conditions deep that nobody makes true.
        undecided: how many conditions deep that are not decided.
        locals: what a function's own variables held before, the innermost call last.
        early: where functions and rounds, begun and not ended, may end early.
        silent: how many redirections deep that take what is written to a file, or nowhere.
        depth: how many calls, files and scripts deep.
        calls: how many functions were called.
        folder: where the script lies.
        reading: files that are being read, the innermost last.
        fixed_line: in a file that the script reads, the script's line that asks for it.
        spans: whether a word's place in the text is its place in the script.
        line_at: the line of an offset in the text that is being read.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.commands: list[Command] = []
        self.sourced: list[int] = []
        self.variables: Changes = {}
        self.exported: set[str] = set()
        self.flow = ""
        self.unreached = self.undecided = 0
        self.locals: list[Changes] = []
        self.early: list[Early] = []
        self.silent = 0
        self.depth = self.calls = 0
        self.folder = folder
        self.reading: list[Path] = []
        self.fixed_line: int | None = None
        self.spans = True
        self.line_at: Callable[[int], int] = lambda offset: 0
        self.journals: list[Changes] = []  # per trial, what variables held before

    @abstractmethod
    def read(self, source: str, line_at: Callable[[int], int] | None = None) -> None:
        """Walk a script."""

    @abstractmethod
    def run(self, statement: syntax.Statement) -> None:
        """Walk a statement."""

    def get(self, name: str) -> Variable | None:
        return self.variables.get(self._followed(name))

    def set(self, name: str, variable: Variable | None) -> None:
        name = self._followed(name)
        if isinstance(self.variables.get(name), Alias) and isinstance(variable, Scalar):
            variable = Alias(text(usual(variable.value)))
        self.put(name, variable)

    def _followed(self, name: str) -> str:
        """The variable that a name means, whatever other names it has."""
        for _ in range(MAX_DEPTH):
            variable = self.variables.get(name)
            if not isinstance(variable, Alias) or not variable.target:
                break
            name = variable.target
        return name

    def put(self, name: str, variable: Variable | None) -> None:
        """Set a name itself, though it be another's."""
        if self.journals and name not in self.journals[-1]:
            self.journals[-1][name] = self.variables.get(name)
        if isinstance(variable, Listed):
            variable = Listed(plain_array(variable.value))
        elif isinstance(variable, Scalar):
            variable = Scalar(bounded(variable.value))
        self.variables[name] = variable

    def trial(self, walk: Callable[[], None]) -> tuple[Changes, str]:
        """What a walk changes, and how it ends; the changes are taken back."""
        self.journals.append({})
        before, self.flow = self.flow, ""
        walk()
        changes = {name: self.variables.get(name) for name in self.journals[-1]}
        for name, old in self.journals.pop().items():
            self.variables[name] = old
        flow, self.flow = self.flow, before
        return changes, flow

    def apply(self, changes: Changes) -> None:
        for name, variable in changes.items():
            self.put(name, variable)

    def ends(self, holds: Holds) -> None:
        self.set("?", Scalar(conditions.as_status(holds)))

    def last_status(self) -> Value:
        variable = self.get("?")
        return variable.value if isinstance(variable, Scalar) else (Piece("0"),)

    def line(self, line: int) -> int:
        return line if self.fixed_line is None else self.fixed_line

    def with_stream(self, name: str, held: Value | None, walk: Callable[[], None]) -> Value:
        """What ``1>`` or ``0<`` holds after a walk that begins with another one."""
        outer, early, silent = self.get(name), len(self.early), self.silent
        self.set(name, None if held is None else Scalar(held))
        if name == "1>":
            self.silent = 0
        walk()
        inner = self.get(name)
        self.set(name, outer)
        self.silent = silent
        for left in self.early[early:]:
            left.variables[name] = outer
        return inner.value if isinstance(inner, Scalar) else ()

    def given(self) -> Value | None:
        """What is left to be read; ``None`` where nobody knows."""
        variable = self.get("0<")
        return variable.value if isinstance(variable, Scalar) else None

    def file(self, name: str) -> Value | None:
        """What the script wrote to a file, if it did."""
        variable = self.get(file_key(name))
        return variable.value if isinstance(variable, Scalar) else None

    def write(self, value: Value) -> None:
        out = self.get("1>")
        if isinstance(out, Scalar) and not self.silent:
            self.set("1>", Scalar((*out.value, *value)))

    def ifs(self) -> str:
        variable = self.get("IFS")
        if not isinstance(variable, Scalar):
            return DEFAULT_IFS
        held = usual(variable.value)
        return DEFAULT_IFS if any(p.unset for p in held) else text(held)

    def arguments(self) -> Value:
        variable = self.get("@")
        return variable.value if isinstance(variable, Listed) else ()

    def number_text(self, name: str) -> str:
        variable = self.get(name)
        if not isinstance(variable, Scalar):
            raise NotKnown
        found = conditions.known(usual(variable.value))
        if found is None:
            raise NotKnown
        return found[0]

    def is_set(self, name: str) -> Holds:
        return Holds(True) if self.get(name) is not None else Holds(False, soft=True)

    def program_ends(self, asked: bool = False) -> None:
        """A program is taken to succeed, unless whether it does is what the script asks."""
        why = "how a program ends is not known"
        self.set("?", Scalar((Piece("" if asked else "0", unknown=why),)))
