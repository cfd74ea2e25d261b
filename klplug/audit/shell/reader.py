"""A script's statements walked as bash would walk them, without running a program.

What a program would print or return is not known, and says so. A condition that hangs on it makes
a decision: both branches are walked, and where they leave a variable different, it holds a choice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from klplug.audit.shell import syntax
from klplug.audit.shell.assignment import arithmetic_command, assign, declare
from klplug.audit.shell.branches import branch, rejoin
from klplug.audit.shell.builtins import BUILTINS
from klplug.audit.shell.conditions import Holds
from klplug.audit.shell.expansion import fields_of, unsplit
from klplug.audit.shell.flow import (
    given_input,
    loop_condition,
    tested,
    walk_and_or,
    walk_case,
    walk_for,
    walk_pipeline,
    walk_redirected,
    walk_subshell,
    walk_while,
)
from klplug.audit.shell.parser import Parser
from klplug.audit.shell.scripts import program
from klplug.audit.shell.state import MAX_DEPTH, Listed, Scalar, Shell
from klplug.audit.shell.syntax import DECLARING
from klplug.audit.shell.values import Flat, Value, fields, text, usual

_MAX_STEPS = 30_000
_MAX_CALLS = 2_000


class Reader(Shell):
    """A shell that walks a script's statements."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._steps = 0

    def read(self, source: str, line_at: Callable[[int], int] | None = None) -> None:
        """Walk a script.

        Raises:
            SyntaxProblem: what a shell would not read; everything before it has been walked.
        """
        parser = Parser(source, line_at)
        outer, self.line_at = self.line_at, parser.line_at
        try:
            while not self.flow and (statement := parser.next_statement()) is not None:
                self.run(statement)
        finally:
            self.line_at = outer

    def run(self, statement: syntax.Statement) -> None:
        if self.flow:
            return
        self._steps += 1
        if self._steps > _MAX_STEPS:
            self.flow = "exit"
            return
        match statement:
            case syntax.Simple():
                _simple(self, statement)
            case syntax.Sequence():
                for item in statement.items:
                    self.run(item)
            case syntax.AndOr():
                walk_and_or(self, statement)
            case syntax.Pipeline():
                walk_pipeline(self, statement)
            case syntax.Subshell():
                walk_subshell(self, lambda: self.run(statement.body))
            case syntax.Redirected():
                given = given_input(self, statement.redirects)
                walk_redirected(self, statement.redirects, given, lambda: self.run(statement.body))
            case syntax.If():
                self.run(statement.condition)
                branch(
                    self,
                    self.last_status(),
                    lambda: self.run(statement.then),
                    lambda: _otherwise(self, statement.otherwise),
                    statement.line,
                )
            case syntax.Case():
                walk_case(self, statement)
            case syntax.For():
                walk_for(self, statement)
            case syntax.CountingFor():
                arithmetic_command(self, statement.first)
                walk_while(
                    self,
                    lambda: arithmetic_command(self, statement.condition, empty=1),
                    lambda: self.run(statement.body),
                    lambda: arithmetic_command(self, statement.step),
                    statement.line,
                )
            case syntax.While():
                walk_while(
                    self,
                    lambda: loop_condition(self, statement),
                    lambda: self.run(statement.body),
                    lambda: None,
                    statement.line,
                )
            case syntax.Function():
                self.set(f"{statement.name}()", statement)
                self.ends(Holds(True))
            case syntax.ArithmeticCommand():
                arithmetic_command(self, statement.expression)
            case syntax.Test():
                self.set("?", Scalar(tested(self, statement)))


def _otherwise(shell: Shell, statement: syntax.Statement | None) -> None:
    if statement is None:
        shell.ends(Holds(True))
    else:
        shell.run(statement)


def _simple(shell: Shell, command: syntax.Simple) -> None:
    if not command.words:
        shell.ends(Holds(True))
        for assignment in command.assignments:
            assign(shell, assignment)
        return
    given = given_input(shell, command.redirects)
    first = command.words[0]
    written = first.plain() if isinstance(first, syntax.Text) else None
    if written in DECLARING and f"{written}()" not in shell.variables:
        declare(shell, command)
        return
    values: list[Value] = []
    for item in command.words:
        if isinstance(item, syntax.Text):
            values += unsplit(shell, item)
    ifs = shell.ifs()
    split = [w for value in values for w in fields(usual(value), ifs)]
    if not split:
        shell.ends(Holds(True))
        return
    name = text(split[0]) if not any(p.unknown for p in split[0]) else ""
    walk_redirected(
        shell, command.redirects, given, lambda: _assigned(shell, name, values, split, command)
    )


def _assigned(
    shell: Shell, name: str, values: list[Value], split: list[Flat], command: syntax.Simple
) -> None:
    """``A=1 COMMAND``: the assignments hold for the command."""
    if not command.assignments:
        _dispatch(shell, name, values, split, command)
        return
    before = {a.name: shell.get(a.name) for a in command.assignments}
    for assignment in command.assignments:
        assign(shell, assignment)
    exported, shell.exported = shell.exported, shell.exported | before.keys()
    _dispatch(shell, name, values, split, command)
    shell.exported = exported
    for variable, old in before.items():
        shell.set(variable, old)


def _dispatch(
    shell: Shell, name: str, values: list[Value], split: list[Flat], command: syntax.Simple
) -> None:
    function = shell.get(f"{name}()")
    if isinstance(function, syntax.Function) and shell.depth < MAX_DEPTH:
        _call(shell, function, fields_of(shell, values, 1))
        return
    builtin = BUILTINS.get(name)
    if builtin is not None and not isinstance(function, syntax.Function):
        builtin(shell, values, split, command)
        return
    program(shell, values, split, command)


def _call(shell: Shell, function: syntax.Function, arguments: Value) -> None:
    shell.calls += 1
    if shell.calls > _MAX_CALLS:
        shell.flow = "exit"
        return
    outer = shell.get("@")
    shell.depth += 1
    shell.locals.append({})
    early = len(shell.early)
    shell.set("@", Listed(arguments))
    shell.run(function.body)
    if shell.flow == "return":
        shell.flow = ""
    rejoin(shell, early, "return")
    shell.apply(shell.locals.pop())
    shell.set("@", outer)
    shell.depth -= 1
