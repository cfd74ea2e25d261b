"""A script's statements walked as bash would walk them, without running a program.

What a program would print or return is not known, and says so. A condition that hangs on it makes
a decision: both branches are walked, and where they leave a variable different, it holds a choice.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from klplug.audit.shell import conditions, syntax
from klplug.audit.shell.arithmetic import NotKnown, Reckoning
from klplug.audit.shell.conditions import UNKNOWN, Holds
from klplug.audit.shell.parser import Parser, SyntaxProblem
from klplug.audit.shell.patterns import regex
from klplug.audit.shell.values import (
    Choice,
    Decision,
    Flat,
    Piece,
    Value,
    Word,
    array,
    chosen,
    decided,
    decisions,
    elements,
    fields,
    flat,
    lifted,
    number_of_runs,
    runs,
    text,
    usual,
    word,
)

# Bounds, so that a script that calls itself or loops for ever is read in no time.
_MAX_DEPTH = 30
_MAX_ROUNDS = 64
_MAX_STEPS = 30_000
_MAX_CALLS = 2_000
_MAX_ALTERNATIVES = 64
_MAX_LISTS = 16
_MAX_PIECES = 64
_MAX_TEXT = 20_000
_MAX_FILE = 1_000_000

_DEFAULT_IFS = " \t\n"
# Programs that are asked something: whether they succeed is what the script wants to know.
_QUERIES = frozenset(
    (
        *("grep", "egrep", "fgrep", "which", "pgrep", "diff", "cmp", "nvidia-smi", "nc", "curl"),
        *("ping", "lsof", "python", "python3", "uv"),
    )
)
_SHELL = re.compile(r"(?:.*/)?(?:ba|z|da|k)?sh")


@dataclass(frozen=True)
class Scalar:
    value: Value


@dataclass(frozen=True)
class Listed:
    """An indexed array: its elements, each with an end."""

    value: Value


@dataclass(frozen=True)
class Mapped:
    items: tuple[tuple[str, Value], ...]


Variable: TypeAlias = "Scalar | Listed | Mapped | syntax.Function"


@dataclass(frozen=True)
class Command:
    """A program with its arguments.

    Attributes:
        words: the program and its arguments, if every condition that is not decided goes its
            usual way (no variable set from outside, no argument passed).
        line, last_line: the lines it covers.
        reached: ``False`` for one that is run only if a variable is set from outside, or an
            argument passed.
        sure: ``False`` for one that hangs on a condition which is not decided.
    """

    words: tuple[Word, ...]
    line: int
    last_line: int
    reached: bool = True
    sure: bool = True
    unsplit: tuple[Value, ...] = field(default=(), repr=False, compare=False)
    ifs: str = field(default=_DEFAULT_IFS, repr=False, compare=False)

    @property
    def conditions(self) -> tuple[int, ...]:
        """Lines of the conditions that it hangs on and that are not decided."""
        return tuple(sorted({decision.line for decision in decisions(*self.unsplit)}))

    def alternatives(
        self, bears: Callable[[str], bool] = lambda text: True
    ) -> list[tuple[Word, ...]]:
        """What else the command may be, where a condition is not decided; ``words`` first.

        Args:
            bears: whether a word bears on what the caller asks; commands that differ in other
                words alone count as one.

        Returns:
            At most 64; ``words`` alone, its differing words marked as unknown, if there are more.
        """
        found: dict[Decision, None] = {}
        for value in self.unsplit:
            here = list(decisions(value))
            if not here or number_of_runs(here) > _MAX_ALTERNATIVES:
                found |= dict.fromkeys(here)
                continue
            for at, decision in enumerate(here):
                others = here[:at] + here[at + 1 :]
                if any(self._differs(value, taken, decision, bears) for taken in runs(others)):
                    found[decision] = None
        hanging = list(found)
        if number_of_runs(hanging) > _MAX_ALTERNATIVES:
            return [self._marked()]
        seen: dict[tuple[str, ...], tuple[Word, ...]] = {}
        for taken in runs(hanging):
            words = tuple(self._split(taken))
            seen.setdefault(tuple(w.text for w in words if bears(w.text)), words)
        return list(seen.values())

    def _differs(
        self,
        value: Value,
        taken: dict[Decision, int],
        decision: Decision,
        bears: Callable[[str], bool],
    ) -> bool:
        made = [
            [
                w
                for pieces in fields(usual(decided(value, {**taken, decision: option})), self.ifs)
                if bears((w := word(pieces)).text)
            ]
            for option in range(decision.options)
        ]
        return any(other != made[0] for other in made[1:])

    def _split(self, taken: dict[Decision, int]) -> Iterator[Word]:
        for value in self.unsplit:
            for pieces in fields(usual(decided(value, taken)), self.ifs):
                yield word(pieces)

    def _marked(self) -> tuple[Word, ...]:
        words: list[Word] = []
        for value in self.unsplit:
            found = list(decisions(value))
            lines = ", ".join(dict.fromkeys(str(d.line) for d in found))
            why = (f"it hangs on conditions that are not decided (line {lines})",)
            for pieces in fields(usual(value), self.ifs):
                made = word(pieces)
                words.append(replace(made, unknown=made.unknown + why) if found else made)
        return tuple(words)


@dataclass(frozen=True)
class _Early:
    """A function or a round of a loop that may end early, and how variables stand then."""

    flow: str
    tree: Value
    if_true: bool
    variables: dict[str, Variable | None]


class Reader:
    """Walks a script's statements.

    Attributes:
        commands: programs met, in order.
        sourced: lines of ``source`` whose file is not there to be read.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.commands: list[Command] = []
        self.sourced: list[int] = []
        self._folder = folder
        self._variables: dict[str, Variable | None] = {}
        self._journals: list[dict[str, Variable | None]] = []
        self._exported: set[str] = set()
        self._flow = ""
        self._depth = 0
        self._steps = self._calls = 0
        self._reached = 0  # how many conditions deep that nobody makes true
        self._undecided = 0
        self._locals: list[dict[str, Variable | None]] = []
        self._early: list[_Early] = []
        self._reading: list[Path] = []
        self._fixed_line: int | None = None
        self._spans = True
        self._line_at: Callable[[int], int] = lambda offset: 0
        self._inputs: list[Value | None] = [None]
        self._silent = 0  # what is written goes to a file, or nowhere

    # Variables.

    def _get(self, name: str) -> Variable | None:
        return self._variables.get(name)

    def _set(self, name: str, variable: Variable | None) -> None:
        if self._journals and name not in self._journals[-1]:
            self._journals[-1][name] = self._variables.get(name)
        self._variables[name] = variable

    def _trial(self, walk: Callable[[], None]) -> tuple[dict[str, Variable | None], str]:
        """What a walk changes, and how it ends; the changes are taken back."""
        self._journals.append({})
        before, self._flow = self._flow, ""
        walk()
        changes = {name: self._variables.get(name) for name in self._journals[-1]}
        for name, old in self._journals.pop().items():
            self._variables[name] = old
        flow, self._flow = self._flow, before
        return changes, flow

    def _apply(self, changes: dict[str, Variable | None]) -> None:
        for name, variable in changes.items():
            self._set(name, variable)

    def _status(self, holds: Holds) -> None:
        value = "" if holds.value is None else str(int(not holds.value))
        why = "whether it holds is not known" if holds.value is None else None
        self._set("?", Scalar((Piece(value, soft=holds.soft, unknown=why),)))

    def _last_status(self) -> Value:
        variable = self._get("?")
        return variable.value if isinstance(variable, Scalar) else (Piece("0"),)

    # Statements.

    def read(self, source: str, line_at: Callable[[int], int] | None = None) -> None:
        """Walk a script.

        Raises:
            SyntaxProblem: what a shell would not read; everything before it has been walked.
        """
        parser = Parser(source, line_at)
        outer, self._line_at = self._line_at, parser.line_at
        try:
            while not self._flow and (statement := parser.next_statement()) is not None:
                self.run(statement)
        finally:
            self._line_at = outer

    def run(self, statement: syntax.Statement) -> None:
        if self._flow:
            return
        self._steps += 1
        if self._steps > _MAX_STEPS:
            self._flow = "exit"
            return
        match statement:
            case syntax.Simple():
                self._simple(statement)
            case syntax.Sequence():
                for item in statement.items:
                    self.run(item)
            case syntax.AndOr():
                self._and_or(statement)
            case syntax.Pipeline():
                self._pipeline(statement)
            case syntax.Subshell():
                self._subshell(lambda: self.run(statement.body))
            case syntax.Redirected():
                self._redirected(statement.redirects, lambda: self.run(statement.body))
            case syntax.If():
                self.run(statement.condition)
                self._branch(
                    self._last_status(),
                    lambda: self.run(statement.then),
                    lambda: self._otherwise(statement.otherwise),
                    statement.line,
                )
            case syntax.Case():
                self._case(statement)
            case syntax.For():
                self._for(statement)
            case syntax.CountingFor():
                self._arithmetic_command(statement.first)
                self._while(
                    lambda: self._arithmetic_command(statement.condition, empty=1),
                    lambda: self.run(statement.body),
                    lambda: self._arithmetic_command(statement.step),
                    statement.line,
                )
            case syntax.While():
                self._while(
                    lambda: self._loop_condition(statement),
                    lambda: self.run(statement.body),
                    lambda: None,
                    statement.line,
                )
            case syntax.Function():
                self._set(f"{statement.name}()", statement)
                self._status(Holds(True))
            case syntax.ArithmeticCommand():
                self._arithmetic_command(statement.expression)
            case syntax.Test():
                self._set("?", Scalar(self._test(statement)))

    def _otherwise(self, statement: syntax.Statement | None) -> None:
        if statement is None:
            self._status(Holds(True))
        else:
            self.run(statement)

    def _branch(
        self, status: Value, yes: Callable[[], None], no: Callable[[], None], line: int
    ) -> None:
        """Walk what follows a condition: one branch if it is decided, else both."""
        tree = _decidable(status, line)
        leaves = _leaves(tree)
        if len({leaf.text for leaf in leaves}) == 1:
            taken, other = (yes, no) if leaves[0].text == "0" else (no, yes)
            if any(leaf.soft for leaf in leaves):
                self._usually(taken, other)
            else:
                taken()
            return
        self._undecided += 1
        ends = [self._trial(yes), self._trial(no)]
        self._undecided -= 1
        self._join(tree, ends)

    def _usually(self, taken: Callable[[], None], other: Callable[[], None]) -> None:
        """A branch taken if nobody sets anything, and the other, for the commands in it."""
        begun = len(self.commands)
        changes, flow = self._trial(taken)
        if flow == "exit" and not any(c.reached for c in self.commands[begun:]):
            # Whoever runs the script gives it what it asks for.
            other()
            return
        self._reached += 1
        self._trial(other)
        self._reached -= 1
        self._apply(changes)
        self._flow = flow

    def _join(self, tree: Value, ends: list[tuple[dict[str, Variable | None], str]]) -> None:
        (left, left_flow), (right, right_flow) = ends
        if bool(left_flow) != bool(right_flow):
            gone, changes = (left, right) if left_flow else (right, left)
            flow = left_flow or right_flow
            if flow != "exit" and decisions(tree):
                state = {**self._variables, **gone}
                self._early.append(_Early(flow, tree, bool(left_flow), state))
                self._undecided += 1
            self._apply(changes)
            return
        for name in dict.fromkeys((*left, *right)):
            before = self._get(name)
            self._set(name, _merged(tree, [left.get(name, before), right.get(name, before)]))
        self._flow = left_flow if left_flow == right_flow else min(left_flow, right_flow)

    def _and_or(self, chain: syntax.AndOr) -> None:
        self.run(chain.first)
        for operator, statement in chain.rest:
            if self._flow:
                return
            status = self._last_status()
            line = status[0].line if status and isinstance(status[0], Piece) else 0
            piece = status[0] if len(status) == 1 else None
            if isinstance(piece, Piece) and piece.unknown and piece.text == "0":
                # A program that is run to do something is taken to do it.
                if operator == "&&":
                    self.run(statement)
                else:
                    self._reached += 1
                    self._trial(self._chained(statement, operator)[0])
                    self._reached -= 1
                continue
            walk, stay = self._chained(statement, operator)
            if operator == "&&":
                self._branch(status, walk, stay, line)
            else:
                self._branch(status, stay, walk, line)

    def _chained(
        self, statement: syntax.Statement, operator: str
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        return lambda: self.run(statement), lambda: self._status(Holds(operator == "||"))

    def _pipeline(self, pipeline: syntax.Pipeline) -> None:
        if len(pipeline.items) == 1:
            self.run(pipeline.items[0])
            if pipeline.negated and not self._flow:
                self._set("?", Scalar(lifted(_negated, self._last_status())))
            return
        *others, last = pipeline.items
        for item in others:
            self._silent += 1
            self._subshell(lambda: self.run(item))  # noqa: B023
            self._silent -= 1
        self._inputs.append((_output("a pipe"),))
        self._subshell(lambda: self.run(last))
        self._inputs.pop()
        self._program_status("", ())

    def _subshell(self, walk: Callable[[], None]) -> None:
        """Nothing that a subshell sets outlives it, but what it writes and how it ends."""
        changes, _ = self._trial(walk)
        self._apply({name: changes[name] for name in ("1>", "?") if name in changes})

    def _redirected(self, redirects: Sequence[syntax.Redirect], walk: Callable[[], None]) -> None:
        silent = sum(1 for r in redirects if re.fullmatch(r"1?(>>?|>\||>&|&>>?)", r.operator))
        given = self._input(redirects)
        self._silent += silent
        if given is not None:
            self._inputs.append(given)
        walk()
        if given is not None:
            self._inputs.pop()
        self._silent -= silent

    def _input(self, redirects: Sequence[syntax.Redirect]) -> Value | None:
        for redirect in reversed(redirects):
            if redirect.document is not None:
                body = redirect.document.body
                return () if body is None else self._text(body)
            if redirect.operator == "<<<":
                return (*self._scalar(redirect.target), Piece("\n"))
            if redirect.operator in ("<", "0<"):
                return (_output("a file"),)
        return None

    def _case(self, case: syntax.Case) -> None:
        subject = self._scalar(case.subject)
        walks = [lambda at=at: self._case_body(case, at) for at in range(len(case.items))]
        nothing: Callable[[], None] = lambda: self._status(Holds(True))  # noqa: E731

        def matching(pieces: Flat, patterns: Sequence[Value]) -> Value:
            found = conditions.known(pieces)
            if found is None:
                return (Piece("", case.line, unknown="not known"),)
            holds = any(conditions.matches(found[0], usual(p)) for p in patterns)
            return (Piece(str(int(not holds)), case.line, soft=found[1]),)

        if not decisions(subject) and conditions.known(flat(subject)) is None:
            exhaustive = any(p.plain() == "*" for patterns, _, _ in case.items for p in patterns)
            self._fork(case.line, walks if exhaustive else [*walks, nothing])
            return

        def walk_from(at: int) -> None:
            if at == len(case.items):
                nothing()
                return
            patterns = [self._scalar(p) for p in case.items[at][0]]
            status = lifted(lambda pieces: matching(pieces, patterns), subject)
            self._branch(status, walks[at], lambda: walk_from(at + 1), case.line)

        walk_from(0)

    def _case_body(self, case: syntax.Case, at: int) -> None:
        self._status(Holds(True))
        self.run(case.items[at][1])
        if case.items[at][2] == ";&" and at + 1 < len(case.items):
            self._case_body(case, at + 1)

    def _fork(self, line: int, walks: Sequence[Callable[[], None]]) -> None:
        """Branches of which one is taken, nobody knows which; the last is the usual one."""
        self._undecided += 1
        ends = [self._trial(walk) for walk in walks]
        self._undecided -= 1
        staying = [at for at, (_, flow) in enumerate(ends) if not flow]
        kept = staying or range(len(ends))
        decision = Decision(line, len(kept), len(kept) - 1)
        for name in dict.fromkeys(name for at in kept for name in ends[at][0]):
            before = self._get(name)
            options = [ends[at][0].get(name, before) for at in kept]
            tree: Value = (Choice(decision, tuple((Piece(str(at)),) for at in range(len(kept)))),)
            self._set(name, _merged(tree, options))
        if not staying:
            self._flow = ends[-1][1]

    # Loops.

    def _for(self, loop: syntax.For) -> None:
        listed = self._arguments() if loop.words is None else self._list(loop.words)
        self._for_over(loop, listed)

    def _for_over(self, loop: syntax.For, listed: Value) -> None:
        over = list(decisions(listed))
        if not over:
            self._for_each(loop, flat(listed))
        elif number_of_runs(over) <= _MAX_LISTS:
            self._split_on(over[0], lambda taken: self._for_over(loop, decided(listed, taken)))
        else:
            why = f"too much hangs on what is looped over (line {loop.line})"
            unknown = Scalar((Piece(f"${loop.name}", loop.line, unknown=why),))

            def body() -> None:
                self._set(loop.name, unknown)
                self.run(loop.body)

            self._some_rounds(body, lambda: None, loop.line)

    def _split_on(self, decision: Decision, walk: Callable[[dict[Decision, int]], None]) -> None:
        """The same statements, walked once for each way that a decision can go."""
        self._undecided += 1
        ends = [
            self._trial(lambda taken={decision: option}: walk(taken))  # type: ignore[misc]
            for option in range(decision.options)
        ]
        self._undecided -= 1
        tree: Value = (Choice(decision, tuple((Piece(str(n)),) for n in range(len(ends)))),)
        for name in dict.fromkeys(name for changes, _ in ends for name in changes):
            before = self._get(name)
            self._set(name, _merged(tree, [changes.get(name, before) for changes, _ in ends]))

    def _for_each(self, loop: syntax.For, listed: Flat) -> None:
        early = len(self._early)
        for element in elements(listed)[:_MAX_ROUNDS]:
            if any(
                piece.unknown or (not piece.quoted and re.search(r"[*?]", piece.text))
                for piece in element
            ):
                why = _reason(element, f"${loop.name} is a loop variable (line {loop.line})")
                element = (Piece(f"${loop.name}", loop.line, unknown=why),)
            self._set(loop.name, Scalar(_plain(element)))
            if not self._round(lambda: self.run(loop.body)):
                break
        self._rejoin(early, "break")

    def _round(self, body: Callable[[], None]) -> bool:
        """One round of a loop; ``False`` where it is the last."""
        early = len(self._early)
        body()
        if self._flow == "continue":
            self._flow = ""
        self._rejoin(early, "continue")
        if self._flow == "break":
            self._flow = ""
            return False
        return not self._flow

    def _loop_condition(self, loop: syntax.While) -> None:
        self.run(loop.condition)
        if loop.until:
            self._set("?", Scalar(lifted(_negated, self._last_status())))

    def _while(
        self,
        condition: Callable[[], None],
        body: Callable[[], None],
        step: Callable[[], None],
        line: int,
    ) -> None:
        once = len(self.commands)
        early = len(self._early)
        for round_ in range(_MAX_ROUNDS):
            condition()
            status = self._last_status()
            leaves = _leaves(status)
            if self._flow:
                return
            if any(leaf.unknown for leaf in leaves) or len({p.text for p in leaves}) > 1:
                self._some_rounds(body, step, line)
                self._rejoin(early, "break")
                return
            if leaves[0].text != "0":
                if any(leaf.soft for leaf in leaves) and not round_:
                    self._reached += 1
                    self._trial(body)
                    self._reached -= 1
                self._status(Holds(True))
                self._rejoin(early, "break")
                return
            goes_on = self._round(body)
            if round_ == 0:
                once = len(self.commands)
            if not goes_on:
                self._rejoin(early, "break")
                return
            step()
        self._rejoin(early, "break")
        # It has no end that is known here.
        del self.commands[once:]
        self._some_rounds(lambda: None, lambda: None, line)
        changed, _ = self._trial(body)
        del self.commands[once:]
        self._unknown_after(changed, line)

    def _some_rounds(self, body: Callable[[], None], step: Callable[[], None], line: int) -> None:
        """A loop that runs, nobody knows how often: what it sets is not known."""
        begun = len(self.commands)

        def once() -> None:
            early = len(self._early)
            if self._round(body):
                step()
            self._rejoin(early, "break")

        self._undecided += 1
        changed, _ = self._trial(once)
        del self.commands[begun:]
        self._unknown_after(changed, line)
        self._trial(once)
        self._undecided -= 1
        self._status(Holds(True))

    def _unknown_after(self, changed: dict[str, Variable | None], line: int) -> None:
        for name, variable in changed.items():
            if name == "?" or variable == self._get(name):
                continue
            why = f"${name} is set in a loop (line {line})"
            unknown: Value = (Piece(f"${name}", line, unknown=why),)
            if name == "1>":
                self._set(name, Scalar((_output("a loop"),)))
            elif isinstance(variable, Listed):
                self._set(name, Listed(array([unknown])))
            elif not isinstance(variable, syntax.Function):
                self._set(name, Scalar(unknown))

    # Simple commands.

    def _simple(self, command: syntax.Simple) -> None:
        if not command.words:
            self._status(Holds(True))
            for assignment in command.assignments:
                self._assign(assignment)
            return
        given = self._input(command.redirects)
        first = command.words[0]
        name = first.plain() if isinstance(first, syntax.Text) else None
        if name in _DECLARING and f"{name}()" not in self._variables:
            self._declare(command)
            return
        values: list[Value] = []
        for item in command.words:
            if isinstance(item, syntax.Text):
                values += self._words(item)
        ifs = self._ifs()
        split = [w for value in values for w in fields(usual(value), ifs)]
        if not split:
            self._status(Holds(True))
            return
        name = text(split[0]) if not any(p.unknown for p in split[0]) else ""
        redirected = any(
            re.fullmatch(r"1?(>>?|>\||>&|&>>?)", r.operator) for r in command.redirects
        )
        self._silent += redirected
        if given is not None:
            self._inputs.append(given)
        before = {a.name: self._get(a.name) for a in command.assignments}
        for assignment in command.assignments:
            self._assign(assignment)
        exported, self._exported = self._exported, self._exported | before.keys()
        self._dispatch(name, values, split, command)
        self._exported = exported if before else self._exported
        for variable, old in before.items():
            self._set(variable, old)
        if given is not None:
            self._inputs.pop()
        self._silent -= redirected

    def _dispatch(
        self, name: str, values: list[Value], split: list[Flat], command: syntax.Simple
    ) -> None:
        function = self._get(f"{name}()")
        if isinstance(function, syntax.Function) and self._depth < _MAX_DEPTH:
            self._call(function, self._fields_of(values, 1))
            return
        builtin = _BUILTINS.get(name)
        if builtin is not None and not isinstance(function, syntax.Function):
            builtin(self, values, split, command)
            return
        self._program(values, split, command)

    def _call(self, function: syntax.Function, arguments: Value) -> None:
        self._calls += 1
        if self._calls > _MAX_CALLS:
            self._flow = "exit"
            return
        outer = self._get("@")
        self._depth += 1
        self._locals.append({})
        early = len(self._early)
        self._set("@", Listed(arguments))
        self.run(function.body)
        if self._flow == "return":
            self._flow = ""
        self._rejoin(early, "return")
        for name, old in self._locals.pop().items():
            self._set(name, old)
        self._set("@", outer)
        self._depth -= 1

    def _rejoin(self, since: int, *flows: str) -> None:
        """Where a function or a round may have ended early, variables are as they were then."""
        kept = []
        for early in reversed(self._early[since:]):
            if early.flow not in flows:
                kept.append(early)
                continue
            self._undecided -= 1
            for name in dict.fromkeys((*early.variables, *self._variables)):
                now, then = self._get(name), early.variables.get(name)
                if now is not then:
                    options = [then, now] if early.if_true else [now, then]
                    self._set(name, _merged(early.tree, options))
        self._early[since:] = reversed(kept)

    def _program(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        words = tuple(word(pieces) for pieces in split)
        texts = [w.text for w in words]
        line = self._line(command.line)
        nested = self._nested_script(words)
        shell = next((at for at, t in enumerate(texts) if _SHELL.fullmatch(t)), None)
        given = self._inputs[-1]
        if nested is not None and self._depth < _MAX_DEPTH:
            self._shell(lambda: self._read_value(self._pieces_at(values, nested)), ())
        elif self._depth < _MAX_DEPTH and self._ran_a_file(words, shell):
            pass
        elif (
            given is not None
            and not any(p.unknown for p in usual(given))
            and (_SHELL.fullmatch(texts[-1]) or texts[0] in ("sbatch", "qsub"))
        ):
            self._shell(lambda: self._read_value(usual(given)), ())
        else:
            last_line = self._line(self._line_at(max(command.end - 1, 0)))
            self.commands.append(
                Command(
                    words,
                    line,
                    last_line if self._fixed_line is None else line,
                    not self._reached,
                    not self._undecided,
                    tuple(values),
                    self._ifs(),
                )
            )
        self._write((_output(" ".join(texts)[:40]),))
        self._program_status(texts[0], words)

    def _program_status(self, name: str, words: Sequence[Word]) -> None:
        asked = name in _QUERIES
        why = "how a program ends is not known"
        self._set("?", Scalar((Piece("" if asked else "0", unknown=why),)))

    def _line(self, line: int) -> int:
        return line if self._fixed_line is None else self._fixed_line

    # Scripts in scripts.

    def _nested_script(self, words: Sequence[Word]) -> int | None:
        """Which word is the script of ``bash -c SCRIPT``, also behind a launcher."""
        for at in range(len(words) - 2):
            if _SHELL.fullmatch(words[at].text) and re.fullmatch(r"-\w*c", words[at + 1].text):
                return at + 2
        return None

    def _pieces_at(self, values: Sequence[Value], index: int) -> Flat:
        split = [pieces for value in values for pieces in fields(usual(value), self._ifs())]
        return split[index]

    def _read_value(self, pieces: Flat) -> None:
        """A script in a word; each of its words stands on the line of its own text."""
        starts: list[int] = []
        offset = 0
        for piece in pieces:
            starts.append(offset)
            offset += len(piece.text)
        lines = [self._line(piece.line) for piece in pieces]

        def line_at(position: int) -> int:
            at = 0
            for number, start in enumerate(starts):
                if start > position:
                    break
                at = number
            return lines[at] if lines else 0

        self._depth += 1
        spans, self._spans = self._spans, False
        count = len(self.commands)
        try:
            self.read(text(pieces), line_at)
        except SyntaxProblem:
            del self.commands[count:]
            self.commands.append(
                Command(
                    (word(pieces),), lines[0] if lines else 0, lines[-1] if lines else 0,
                    not self._reached, not self._undecided, (pieces,),
                )
            )  # fmt: skip
        self._spans = spans
        self._depth -= 1

    def _shell(self, walk: Callable[[], None], arguments: Value | None) -> None:
        """Another shell: it sees what is exported, and its changes are its own."""
        outer, journals = self._variables, self._journals
        self._variables = {
            name: variable
            for name, variable in outer.items()
            if name in self._exported or name in ("1>", "?")
        }
        if arguments is not None:
            self._variables["@"] = Listed(arguments)
        self._journals = [{}]
        self._depth += 1
        flow = self._flow
        walk()
        written = self._variables.get("1>")
        self._flow = flow
        self._depth -= 1
        self._variables, self._journals = outer, journals
        if written is not None:
            self._set("1>", written)

    def _ran_a_file(self, words: Sequence[Word], shell: int | None) -> bool:
        if shell is not None and self._file_after(words, shell):
            return True
        return words[0].text.endswith((".sh", ".bash")) and self._run_file(words, 0)

    def _file_after(self, words: Sequence[Word], shell: int) -> bool:
        at = shell + 1
        while at < len(words) and words[at].text.startswith(("-", "+")):
            at += 1
        return at < len(words) and self._run_file(words, at)

    def _run_file(self, words: Sequence[Word], at: int) -> bool:
        """``bash FILE ARGUMENTS``, where the file is there."""
        path = self._found(words[at])
        if path is None or path in self._reading:
            return False
        arguments = array(
            [(Piece(w.text, w.line or 0, unknown="; ".join(w.unknown) or None, quoted=True),)
             for w in words[at + 1 :]]
        )  # fmt: skip
        self._shell(lambda: self._read_file(path, words[at].line or 0), arguments)
        return True

    def _found(self, name: Word) -> Path | None:
        """The file of this name, from the script's folder or one above it."""
        if self._folder is None:
            return None
        # "$DIR/common.sh": the unknown head may be the folder of the script.
        tail = (
            re.sub(r"^(\$\{?\w+\}?|\$\(.*\)|`[^`]*`)/", "", name.text)
            if name.unknown
            else (name.text)
        )
        if re.search(r"[$`\0]", tail) or not tail or len(tail) > 1000:
            return None
        here = self._folder.resolve()
        for folder in (here, *here.parents[:4]):
            path = folder / tail
            try:
                if path.is_file() and path.stat().st_size <= _MAX_FILE:
                    return path.resolve()
            except OSError:
                return None
            if Path(tail).is_absolute():
                return None
        return None

    def _read_file(self, path: Path, line: int) -> None:
        try:
            content = path.read_bytes()
        except OSError:
            return
        if b"\0" in content:
            return
        self._reading.append(path)
        fixed, self._fixed_line = self._fixed_line, self._line(line)
        spans, self._spans = self._spans, False
        self._depth += 1
        # bash says what it cannot read, and goes on with the script that asked for the file.
        with contextlib.suppress(SyntaxProblem):
            self.read(content.decode("utf-8", errors="replace").replace("\r\n", "\n"))
        self._depth -= 1
        self._spans, self._fixed_line = spans, fixed
        self._reading.pop()

    # Writing and reading.

    def _write(self, value: Value) -> None:
        out = self._get("1>")
        if isinstance(out, Scalar) and not self._silent:
            self._set("1>", Scalar((*out.value, *value)))

    def _substitution(self, part: syntax.Substitution) -> Value:
        """``$(...)``: what builtins write is known; of a program, nothing is."""
        written: list[Value] = []
        inputs, self._inputs = self._inputs, [None]
        silent, self._silent = self._silent, 0
        status = self._get("?")

        def walk() -> None:
            self._set("1>", Scalar(()))
            if isinstance(part.body, syntax.Simple) and not part.body.words:
                self._write((_output("a file"),))
            self._depth += 1
            if self._depth < _MAX_DEPTH:
                self.run(part.body)
            self._depth -= 1
            out = self._get("1>")
            assert isinstance(out, Scalar)
            written.append(out.value)

        self._trial(walk)
        self._inputs, self._silent = inputs, silent
        self._set("?", status)
        line = self._line(part.line)

        def trimmed(pieces: Flat) -> Value:
            if any(piece.unknown and not piece.unset and not piece.text for piece in pieces):
                why = f"{part.written} is the output of a command, which is not run"
                return (Piece(part.written, line, quoted=part.quoted, unknown=why),)
            kept = list(pieces)
            while kept and not kept[-1].unknown and not kept[-1].text.rstrip("\n"):
                kept.pop()
            if kept and not kept[-1].unknown:
                kept[-1] = replace(kept[-1], text=kept[-1].text.rstrip("\n"))
            return tuple(kept)

        return _expanded(lifted(trimmed, written[0]), part.quoted)

    # Expansion.

    def _ifs(self) -> str:
        variable = self._get("IFS")
        if not isinstance(variable, Scalar):
            return _DEFAULT_IFS
        held = usual(variable.value)
        return _DEFAULT_IFS if any(p.unset for p in held) else text(held)

    def _words(self, written: syntax.Text) -> list[Value]:
        """A word after brace expansion, not split yet."""
        made = [self._parts(parts) for parts in _braces(written.parts)]
        starts_here = bool(written.parts) and isinstance(written.parts[0], syntax.Literal)
        if self._spans and len(made) == 1 and starts_here:
            made = [
                tuple(
                    replace(p, span=written.span) if isinstance(p, Piece) and not p.end else p
                    for p in made[0]
                )
            ]
        return made

    def _list(self, words: Sequence[syntax.Text]) -> Value:
        """Words split into the elements of an array."""
        values = [value for written in words for value in self._words(written)]
        return self._fields_of(values)

    def _fields_of(self, values: Sequence[Value], skip: int = 0) -> Value:
        ifs = self._ifs()
        listed: Value = tuple(
            piece
            for value in values
            for piece in lifted(lambda pieces: _as_array(fields(pieces, ifs)), value)
        )
        if skip:
            return lifted(lambda pieces: _as_array(elements(pieces)[skip:]), listed)
        return listed

    def _scalar(self, written: syntax.Text) -> Value:
        """A text that is not split: a value, a pattern, the subject of a case."""
        value = self._parts(written.parts)
        if any(isinstance(p, syntax.Parameter) and _is_list(p) for p in written.parts):
            value = lifted(lambda pieces: _with_blanks(pieces, written.line), value)
        return tuple(
            replace(p, span=None, splits=False) if isinstance(p, Piece) else p for p in value
        )

    def _text(self, written: syntax.Text) -> Value:
        return self._parts(written.parts)

    def _parts(self, parts: Sequence[syntax.Part]) -> Value:
        listed = any(
            isinstance(p, syntax.Parameter) and p.quoted and _is_list(p) and not _joins(p)
            for p in parts
        )
        pieces: list[Piece | Choice] = []
        for at, part in enumerate(parts):
            match part:
                case syntax.Literal():
                    if part.text or not listed:
                        line = self._line(part.line)
                        pieces.append(Piece(part.text, line, quoted=part.quoted))
                case syntax.Parameter():
                    made = self._parameter(part)
                    if _is_list(part) and at + 1 < len(parts):
                        # What follows belongs to the last element.
                        made = lifted(lambda p: p[:-1] if p and p[-1].end else p, made)
                    pieces += made
                case syntax.Substitution():
                    pieces += self._substitution(part)
                case syntax.Arithmetic():
                    number = self._reckoned(part.expression, part.written)
                    pieces += _expanded(number, part.quoted)
                case syntax.Opaque():
                    line = self._line(part.line)
                    pieces.append(Piece(part.written, line, quoted=True, unknown=part.reason))
        return tuple(pieces)

    def _unset(self, part: syntax.Parameter, soft: bool = False) -> Value:
        why = f"{part.written} is not set in the script"
        line = self._line(part.line)
        return (Piece(part.written, line, unknown=why, unset=True, soft=soft),)

    def _arguments(self) -> Value:
        variable = self._get("@")
        return variable.value if isinstance(variable, Listed) else ()

    def _parameter(self, part: syntax.Parameter) -> Value:
        if part.indirect and not (part.index is not None and part.index.plain() in ("@", "*")):
            return self._indirect(part)
        if _is_list(part):
            return self._listing(part)
        if part.length:
            return _expanded(
                lifted(lambda p: self._length(p, part), self._looked_up(part)), part.quoted
            )
        return _expanded(self._acted(self._looked_up(part), part), part.quoted)

    def _indirect(self, part: syntax.Parameter) -> Value:
        def followed(pieces: Flat) -> Value:
            name = conditions.known(pieces)
            if name is None or not re.fullmatch(r"\w+", name[0]):
                return _not_computed(part)
            return self._parameter(replace(part, name=name[0], indirect=False))

        return lifted(followed, self._looked_up(replace(part, action="", argument=None)))

    def _length(self, pieces: Flat, part: syntax.Parameter) -> Value:
        found = conditions.known(pieces)
        if found is None:
            return _not_computed(part, pieces)
        return (Piece(str(len(found[0])), part.line),)

    def _looked_up(self, part: syntax.Parameter) -> Value:
        name = part.name
        if name.isdigit() and name != "0":
            variable = self._get("@")
            if not isinstance(variable, Listed):
                return self._unset(part, soft=True)
            at = int(name) - 1
            return lifted(lambda pieces: _element(pieces, at) or _NOTHING, variable.value)
        if name == "#":
            own = not isinstance(self._get("@"), Listed)
            return lifted(
                lambda pieces: (Piece(str(len(elements(pieces))), part.line, soft=own),),
                self._arguments(),
            )
        if name == "?":
            return tuple(
                replace(p, text=p.text or "0", unknown=None, soft=True)
                if isinstance(p, Piece) and p.unknown
                else p
                for p in self._last_status()
            )
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            why = f"{part.written} is known to a shell alone"
            return (Piece(part.written, self._line(part.line), unknown=why),)
        variable = self._get(name)
        if variable is None or isinstance(variable, syntax.Function):
            return self._unset(part)
        if isinstance(variable, Scalar):
            return variable.value if part.index is None or part.index.plain() == "0" else ()
        if isinstance(variable, Mapped):
            key = "0" if part.index is None else text(usual(self._scalar(part.index)))
            found = dict(variable.items).get(key)
            return _NOTHING if found is None else found
        index = (Piece("0"),) if part.index is None else self._reckoned(part.index, part.written)

        def element(pieces: Flat, number: Flat) -> Value:
            found = conditions.known(number)
            if found is None:
                return _not_computed(part)
            return _element(pieces, int(found[0])) or _NOTHING

        return lifted(element, variable.value, index)

    def _listing(self, part: syntax.Parameter) -> Value:
        """``$@``, ``${A[@]}`` and the same with an operator."""
        star = _joins(part)
        own = False
        if part.name in "@*":
            listed = self._arguments()
            own = not isinstance(self._get("@"), Listed)
        else:
            variable = self._get(part.name)
            match variable:
                case Listed():
                    listed = variable.value
                case Scalar():
                    listed = array([variable.value])
                case Mapped():
                    listed = array([value for _, value in variable.items])
                    if part.indirect:
                        listed = array([(Piece(key, part.line),) for key, _ in variable.items])
                case _:
                    listed, own = (), True
            if part.indirect and isinstance(variable, Listed):
                listed = lifted(
                    lambda p: array([(Piece(str(n)),) for n in range(len(elements(p)))]), listed
                )
        if part.length:
            return lifted(lambda p: (Piece(str(len(elements(p))), part.line, soft=own),), listed)
        if part.action in (":-", "-", ":+", "+", ":?", "?", ":=", "="):
            nothing = () if not own else (Piece("", unset=True, unknown="", soft=True),)

            def acted(pieces: Flat) -> Value:
                if elements(pieces):
                    if part.action.endswith("+"):
                        return self._default(part)
                    return _listed(pieces, part.quoted)
                if part.action.endswith(("+", "?")):
                    return nothing if part.quoted and not own else ()
                return self._default(part)

            return lifted(acted, listed)
        if part.action == ":":
            listed = lifted(lambda p: self._slice(p, part), listed)
        elif part.action:
            listed = lifted(lambda p: array([self._edited(e, part) for e in elements(p)]), listed)
        if star and part.quoted:
            ifs = self._ifs()
            between = ifs[:1]

            def joined(pieces: Flat) -> Value:
                made: list[Piece] = []
                for number, element in enumerate(elements(pieces)):
                    if number:
                        made.append(Piece(between, part.line))
                    made += element
                return tuple(replace(p, quoted=True, splits=False, span=None) for p in made)

            return lifted(joined, listed)
        return _listed(listed, part.quoted)

    def _slice(self, pieces: Flat, part: syntax.Parameter) -> Value:
        bounds = self._bounds(part)
        if bounds is None:
            return array([_not_computed(part)])
        items = elements(pieces)
        start, count = bounds
        if part.name in "@*":
            start = max(start - 1, 0) if start > 0 else 0
        start = start if start >= 0 else max(len(items) + start, 0)
        return _as_array(items[start : None if count is None else start + count])

    def _bounds(self, part: syntax.Parameter) -> tuple[int, int | None] | None:
        assert part.argument is not None
        written = text(usual(self._scalar(part.argument)))
        first, colon, second = written.partition(":")
        try:
            start = Reckoning(first, self._number_text).number
            return start, Reckoning(second, self._number_text).number if colon else None
        except NotKnown:
            return None

    def _acted(self, value: Value, part: syntax.Parameter) -> Value:
        """``${X:-default}`` and its kin."""
        action = part.action
        if not action:
            return value
        if action in (":-", "-", ":=", "=", ":+", "+", ":?", "?"):
            return lifted(lambda pieces: self._alternative(pieces, part), value)
        if action == ":":
            return lifted(lambda pieces: self._substring(pieces, part), value)
        return lifted(lambda pieces: self._edited(pieces, part), value)

    def _alternative(self, pieces: Flat, part: syntax.Parameter) -> Value:
        action = part.action
        unset = [piece for piece in pieces if piece.unset]
        own = bool(unset) and unset[0].text in ("", part.written)
        missing = own or (
            action.startswith(":")
            and not any(p.text for p in pieces if not p.unset)
            and not any(p.unknown for p in pieces if not p.unset)
        )
        soft = any(piece.unknown for piece in unset)
        if action.endswith("+"):
            if missing:
                return (Piece("", soft=soft),)
            return self._default(part)
        if not missing:
            return pieces
        if action.endswith("?"):
            return pieces if unset else self._unset(part)
        default = self._default(part)
        if soft:
            default = tuple(
                replace(p, soft=True) if isinstance(p, Piece) and not p.end else p for p in default
            ) or (Piece("", soft=True),)
        if action.endswith("="):
            self._set(part.name, Scalar(_plain_value(default)))
        return default

    def _default(self, part: syntax.Parameter) -> Value:
        assert part.argument is not None
        made = self._parts(part.argument.parts)
        if part.quoted:
            return made
        # Unquoted, blanks in it part words.
        return tuple(
            replace(p, splits=True)
            if isinstance(p, Piece) and not p.quoted and not p.unknown and not p.end
            else p
            for p in made
        )

    def _substring(self, pieces: Flat, part: syntax.Parameter) -> Value:
        found, bounds = conditions.known(pieces), self._bounds(part)
        if found is None or bounds is None:
            return _not_computed(part, pieces)
        start, count = bounds
        whole = found[0]
        start = start if start >= 0 else len(whole) + start
        if start < 0:
            return ()
        end = len(whole) if count is None else start + count if count >= 0 else len(whole) + count
        return (Piece(whole[start:end], self._line(part.line), soft=found[1]),)

    def _edited(self, pieces: Flat, part: syntax.Parameter) -> Value:
        """``${X%pattern}``, ``${X/pattern/text}``, ``${X^^}``."""
        found = conditions.known(pieces)
        action = part.action
        assert part.argument is not None
        pattern_pieces = self._scalar(part.argument)
        if found is None or decisions(pattern_pieces) or action == "@":
            return _not_computed(part, pieces)
        if any(p.unknown for p in flat(pattern_pieces)):
            return _not_computed(part)
        pattern = tuple((p.text, p.quoted) for p in flat(pattern_pieces))
        whole = found[0]
        made: Value
        if action in ("^", "^^", ",", ",,"):
            one = regex(pattern) if pattern else None
            turn = str.upper if action[0] == "^" else str.lower
            letters = [
                turn(c)
                if (len(action) == 2 or at == 0) and (one is None or one.fullmatch(c))
                else c
                for at, c in enumerate(whole)
            ]
            return (Piece("".join(letters), self._line(part.line), soft=found[1]),)
        if action[0] in "#%":
            whole = _without(whole, pattern, action)
            return (Piece(whole, self._line(part.line), soft=found[1]),)
        second = () if part.second is None else self._scalar(part.second)
        matcher = regex(pattern)
        if not pattern or not text(flat(pattern_pieces)):
            return pieces
        anchored = {"/#": rf"\A(?:{matcher.pattern})", "/%": rf"(?:{matcher.pattern})\Z"}
        compiled = re.compile(anchored.get(action, matcher.pattern), re.DOTALL)
        made = ()
        at = 0
        for match in compiled.finditer(whole):
            if not match[0] and action not in ("/#", "/%"):
                continue
            made = (*made, Piece(whole[at : match.start()], part.line, soft=found[1]), *second)
            at = match.end()
            if action != "//":
                break
        return (*made, Piece(whole[at:], self._line(part.line), soft=found[1]))

    # Numbers.

    def _number_text(self, name: str) -> str:
        variable = self._get(name)
        if not isinstance(variable, Scalar):
            raise NotKnown
        found = conditions.known(usual(variable.value))
        if found is None:
            raise NotKnown
        return found[0]

    def _reckoned(
        self, expression: syntax.Text, written: str, assigned: str | None = None
    ) -> Value:
        """The value of an expression, or what it assigns to a variable."""
        made = tuple(
            replace(p, span=None) if isinstance(p, Piece) else p
            for p in self._parts(expression.parts)
        )
        names = dict.fromkeys(re.findall(r"(?<![\w$])[A-Za-z_]\w*", text(usual(made))))
        values = {
            name: variable.value
            for name in names
            if isinstance(variable := self._get(name), Scalar)
        }
        line = self._line(expression.line)

        def reckoned(pieces: Flat, *numbers: Flat) -> Value:
            given = dict(zip(values, numbers, strict=True))
            soft = [piece.soft for piece in pieces]

            def value(name: str) -> str:
                if name not in given:
                    return self._number_text(name)
                found = conditions.known(given[name])
                if found is None:
                    raise NotKnown
                soft.append(found[1])
                return found[0]

            whole = conditions.known(pieces)
            try:
                if whole is None:
                    raise NotKnown
                result = Reckoning(whole[0], value)
                number = result.number if assigned is None else result.assigned[assigned]
            except (NotKnown, KeyError, RecursionError):
                why = f"{written} is arithmetic on what is not known"
                return (Piece(written, line, unknown=why),)
            return (Piece(str(number), line, soft=any(soft)),)

        return lifted(reckoned, made, *values.values())

    def _arithmetic_command(self, expression: syntax.Text, empty: int = 0) -> None:
        written = text(usual(self._parts(expression.parts)))
        if not written.strip():
            self._status(Holds(bool(empty)))
            return
        number = self._reckoned(expression, f"(({written}))")
        targets = dict.fromkeys(
            next(filter(None, match))
            for match in re.findall(
                r"([A-Za-z_]\w*)\s*(?:[-+*/%&|^]|<<|>>)?=(?!=)|([A-Za-z_]\w*)\s*(?:\+\+|--)"
                r"|(?:\+\+|--)\s*([A-Za-z_]\w*)",
                written,
            )
        )
        made = {n: self._reckoned(expression, f"(({written}))", n) for n in targets}
        for name, value in made.items():
            self._set(name, Scalar(value))

        def status(pieces: Flat) -> Value:
            found = conditions.known(pieces)
            if found is None:
                return (Piece("", expression.line, unknown="not known"),)
            return (Piece(str(int(found[0] == "0")), expression.line, soft=found[1]),)

        self._set("?", Scalar(lifted(status, number)))

    # Conditions.

    def _is_set(self, name: str) -> Holds:
        return Holds(True) if self._get(name) is not None else Holds(False, soft=True)

    def _test(self, node: syntax.Test) -> Value:
        operands = node.operands
        line = self._line(node.line)
        if node.operator in ("&&", "||", "!"):
            inner = [self._test(o) for o in operands if isinstance(o, syntax.Test)]
            joined = {"&&": conditions.both, "||": conditions.either}

            def combined(*statuses: Flat) -> Value:
                held = [_holds(s) for s in statuses]
                result = ~held[0] if node.operator == "!" else joined[node.operator](*held)
                return _as_status(result, line)

            return lifted(combined, *inner)
        values = [self._scalar(o) for o in operands if isinstance(o, syntax.Text)]
        if len(values) == 1:
            return lifted(
                lambda p: _as_status(conditions.unary(node.operator, p, self._is_set), line),
                values[0],
            )
        if node.operator.startswith("-"):
            values = [lifted(self._as_number, value) for value in values]
        return lifted(
            lambda a, b: _as_status(conditions.binary(node.operator, a, b, True), line), *values
        )

    def _as_number(self, pieces: Flat) -> Value:
        """In ``[[ a -eq b ]]`` both sides are expressions."""
        found = conditions.known(pieces)
        if found is None or re.fullmatch(r"\s*-?\d*\s*", found[0]):
            return pieces
        try:
            return (Piece(str(Reckoning(found[0], self._number_text).number), soft=found[1]),)
        except NotKnown:
            return (Piece("", unknown="not known"),)

    # Assignments.

    def _assign(self, assignment: syntax.Assignment, value: Value | None = None) -> None:
        name = assignment.name
        before = self._get(name)
        if assignment.elements is not None:
            self._assign_elements(assignment, before)
            return
        if value is None:
            value = _plain_value(self._scalar(assignment.value))
        if assignment.index is not None:
            self._assign_element(assignment, before, value)
            return
        if isinstance(before, Listed):
            old = before.value
            first = lifted(lambda p: _element(p, 0) or (), old) if assignment.appends else ()

            def replaced(pieces: Flat, new: Flat) -> Value:
                return _as_array([new, *elements(pieces)[1:]])

            self._set(name, Listed(lifted(replaced, old, (*first, *value))))
            return
        old = before.value if isinstance(before, Scalar) and assignment.appends else ()
        self._set(name, Scalar((*old, *value)))

    def _assign_elements(self, assignment: syntax.Assignment, before: Variable | None) -> None:
        assert assignment.elements is not None
        keyed = [e for e in assignment.elements if isinstance(e, syntax.Assignment)]
        if isinstance(before, Mapped) or any(
            e.key is not None and not re.fullmatch(r"\d+", e.key.plain() or "") for e in keyed
        ):
            items = dict(before.items) if isinstance(before, Mapped) and assignment.appends else {}
            for element in keyed:
                assert element.key is not None
                key = text(usual(self._scalar(element.key)))
                items[key] = _plain_value(self._scalar(element.value))
            self._set(assignment.name, Mapped(tuple(items.items())))
            return
        listed = tuple(
            piece
            for element in assignment.elements
            for piece in (
                self._list([element])
                if isinstance(element, syntax.Text)
                else array([_plain_value(self._scalar(element.value))])
            )
        )
        old: Value = ()
        if assignment.appends:
            if isinstance(before, Listed):
                old = before.value
            elif isinstance(before, Scalar):
                old = array([before.value])
        self._set(assignment.name, Listed((*old, *listed)))

    def _assign_element(
        self, assignment: syntax.Assignment, before: Variable | None, value: Value
    ) -> None:
        assert assignment.index is not None
        name = assignment.name
        if isinstance(before, Mapped):
            key = text(usual(self._scalar(assignment.index)))
            items = dict(before.items)
            old = items.get(key, ()) if assignment.appends else ()
            items[key] = (*old, *value)
            self._set(name, Mapped(tuple(items.items())))
            return
        index = self._reckoned(assignment.index, name)
        listed: Value = ()
        if isinstance(before, Listed):
            listed = before.value
        elif isinstance(before, Scalar):
            listed = array([before.value])

        def placed(pieces: Flat, number: Flat, new: Flat) -> Value:
            found = conditions.known(number)
            items = elements(pieces)
            if found is None or not -len(items) <= int(found[0]) <= len(items):
                why = f"${{{name}[@]}} is set where only a run could tell"
                unknown = (Piece(f"${{{name}[@]}}", assignment.line, unknown=why),)
                return _as_array([*items, unknown])
            at = int(found[0])
            if at == len(items):
                return _as_array([*items, new])
            items[at] = (*items[at], *new) if assignment.appends else new
            return _as_array(items)

        self._set(name, Listed(lifted(placed, listed, index, value)))

    def _declare(self, command: syntax.Simple) -> None:
        first = command.words[0]
        assert isinstance(first, syntax.Text)
        builtin = first.plain() or ""
        flags = ""
        for item in command.words[1:]:
            if isinstance(item, syntax.Assignment):
                value = _plain_value(self._scalar(item.value))  # of the variable outside
                self._make_local(builtin, item.name)
                if "A" in flags and not isinstance(self._get(item.name), Mapped):
                    self._set(item.name, Mapped(()))
                self._assign(item, value)
                self._export(builtin, flags, item.name)
                continue
            for value in self._words(item):
                for pieces in fields(usual(value), self._ifs()):
                    made = text(pieces)
                    if made.startswith("-"):
                        flags += made[1:]
                        continue
                    name, equals, _ = made.partition("=")
                    if not re.fullmatch(r"[A-Za-z_]\w*", name):
                        continue
                    self._make_local(builtin, name)
                    if equals:
                        rest = _after_equals(pieces)
                        self._set(name, Scalar(_plain_value(rest)))
                    elif "A" in flags and self._get(name) is None:
                        self._set(name, Mapped(()))
                    elif "a" in flags and self._get(name) is None:
                        self._set(name, Listed(()))
                    elif builtin == "local":
                        self._set(name, Scalar(()))
                    self._export(builtin, flags, name)
        self._status(Holds(True))

    def _make_local(self, builtin: str, name: str) -> None:
        declares = builtin == "local" or builtin in ("declare", "typeset")
        if declares and self._locals and name not in self._locals[-1]:
            self._locals[-1][name] = self._get(name)
            self._set(name, None)

    def _export(self, builtin: str, flags: str, name: str) -> None:
        if builtin == "export" or "x" in flags:
            self._exported.add(name)

    # Builtins.

    def _texts(self, split: Sequence[Flat]) -> list[str]:
        return [text(pieces) for pieces in split]

    def _b_true(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        self._status(Holds(True))

    def _b_false(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        self._status(Holds(False))

    def _b_test(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        listed = self._fields_of(values, 1)
        line = self._line(command.line)
        bracket = text(split[0]) == "["

        def tested(pieces: Flat) -> Value:
            words = elements(pieces)
            if bracket:
                words = words[:-1]
            return _as_status(conditions.test(words, self._is_set), line)

        self._set("?", Scalar(lifted(tested, listed)))

    def _b_echo(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        self._status(Holds(True))
        if not isinstance(self._get("1>"), Scalar) or self._silent:
            return

        def written(pieces: Flat) -> Value:
            words = elements(pieces)
            newline, escapes = True, False
            while words and re.fullmatch(r"-[neE]+", text(words[0])):
                newline = newline and "n" not in text(words[0])
                escapes = escapes or "e" in text(words[0])
                words = words[1:]
            made: list[Piece] = []
            for number, element in enumerate(words):
                if number:
                    made.append(Piece(" ", command.line))
                made += [
                    replace(p, text=_unescaped(p.text)) if escapes and not p.unknown else p
                    for p in element
                ]
            return (*made, *((Piece("\n", command.line),) if newline else ()))

        self._write(lifted(written, self._fields_of(values, 1)))

    def _b_printf(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        self._status(Holds(True))
        texts = self._texts(split)

        def written(pieces: Flat) -> Value:
            words = elements(pieces)
            if words and text(words[0]) == "--":
                words = words[1:]
            return _printed(words, command.line)

        if texts[1:2] == ["-v"] and len(texts) > 3:
            self._set(texts[2], Scalar(lifted(written, self._fields_of(values, 3))))
        elif isinstance(self._get("1>"), Scalar) and not self._silent:
            self._write(lifted(written, self._fields_of(values, 1)))

    def _b_cat(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        given = self._inputs[-1]
        if len(split) == 1 and given is not None:
            self._write(given)
            self._status(Holds(True))
            return
        self._program(values, split, command)

    def _b_path(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        """``basename`` and ``dirname``."""
        program = text(split[0])

        def written(pieces: Flat) -> Value:
            words = elements(pieces)
            found = [conditions.known(w) for w in words]
            if not words or any(f is None for f in found) or len(words) > 2:
                return (_output(program),)
            texts = [f[0] for f in found if f is not None]
            if any(t.startswith("-") for t in texts):
                return (_output(program),)
            path = texts[0].rstrip("/") or "/"
            if program == "dirname":
                head, slash, _ = path.rpartition("/")
                made = head.rstrip("/") or ("/" if slash else ".")
            else:
                made = path.rpartition("/")[2] or "/"
                if len(texts) == 2 and made != texts[1]:
                    made = made.removesuffix(texts[1])
            return (Piece(made + "\n", command.line, soft=any(f[1] for f in found if f)),)

        self._write(lifted(written, self._fields_of(values, 1)))
        self._status(Holds(True))

    def _b_seq(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        def written(pieces: Flat) -> Value:
            texts = [text(w) for w in elements(pieces)]
            if not all(re.fullmatch(r"-?\d+", t) for t in texts) or not 1 <= len(texts) <= 3:
                return (_output("seq"),)
            first = int(texts[0]) if len(texts) > 1 else 1
            step = int(texts[1]) if len(texts) == 3 else 1
            last = int(texts[-1])
            if step == 0:
                return (_output("seq"),)
            numbers = range(first, last + (1 if step > 0 else -1), step)[: _MAX_ROUNDS + 1]
            return (Piece("".join(f"{n}\n" for n in numbers), command.line),)

        self._write(lifted(written, self._fields_of(values, 1)))
        self._status(Holds(True))

    def _b_read(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        texts = self._texts(split)[1:]
        is_array = whole = raw = False
        names: list[str] = []
        at = 0
        while at < len(texts):
            if re.fullmatch(r"-[a-zA-Z]+", texts[at]):
                flags = texts[at][1:]
                is_array = is_array or "a" in flags
                raw = raw or "r" in flags
                takes = re.search(r"[dnNptui]$", flags)
                if takes:
                    if takes[0] == "d":
                        whole = at + 1 < len(texts) and texts[at + 1] == ""
                    at += 1
            elif texts[at] or names:
                names.append(texts[at])
            at += 1
        names = [n for n in names if re.fullmatch(r"[A-Za-z_]\w*", n)] or ["REPLY"]
        given = self._inputs[-1]
        ifs = self._ifs()
        if given is None or any(p.unknown and not p.unset for p in usual(given)):
            for name in names:
                why = f"${name} is read when the script runs"
                unknown: Value = (Piece(f"${name}", self._line(command.line), unknown=why),)
                self._set(name, Listed(array([unknown])) if is_array else Scalar(unknown))
            self._status(UNKNOWN)
            return
        line = given if whole else lifted(_first_line, given)
        if not raw:
            line = lifted(_without_backslashes, line)
        if is_array:
            split_line = lifted(
                lambda p: _as_array(fields(tuple(replace(q, splits=True) for q in p), ifs)), line
            )
            self._set(names[0], Listed(split_line))
        else:
            for at, name in enumerate(names):
                last = at == len(names) - 1
                value = lifted(lambda p: _nth_field(p, at, last, ifs), line)  # noqa: B023
                self._set(name, Scalar(_plain_value(value)))
        self._status(Holds(not whole))

    def _b_mapfile(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        texts = self._texts(split)[1:]
        name = next((t for t in reversed(texts) if re.fullmatch(r"[A-Za-z_]\w*", t)), "MAPFILE")
        given = self._inputs[-1]
        trims = any(re.fullmatch(r"-\w*t\w*", t) for t in texts)
        if given is None or any(p.unknown and not p.unset for p in usual(given)) or not trims:
            why = f"${{{name}[@]}} is read when the script runs"
            unknown: Value = (Piece(f"${{{name}[@]}}", self._line(command.line), unknown=why),)
            self._set(name, Listed(array([unknown])))
        else:
            self._set(name, Listed(lifted(_lines, given)))
        self._status(Holds(True))

    def _b_shift(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        variable = self._get("@")
        number = text(split[1]) if len(split) > 1 else "1"
        if isinstance(variable, Listed) and number.isdigit():
            shifted = lifted(lambda p: _as_array(elements(p)[int(number) :]), variable.value)
            self._set("@", Listed(shifted))
            self._status(Holds(True))
        else:
            self._status(Holds(False, soft=True))

    def _b_set(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        texts = self._texts(split)
        self._status(Holds(True))
        for at, word_text in enumerate(texts[1:], start=1):
            if word_text == "--" or not word_text.startswith(("-", "+")):
                if word_text != "--" and texts[at - 1].endswith("o"):
                    continue
                self._set("@", Listed(self._fields_of(values, at + (word_text == "--"))))
                return
            if re.fullmatch(r"-\w*a\w*", word_text):
                self._exported |= {name for name in self._variables if name.isidentifier()}

    def _b_unset(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        for name in self._texts(split)[1:]:
            if re.fullmatch(r"[A-Za-z_]\w*", name):
                self._set(name, Scalar(_NOTHING))
        self._status(Holds(True))

    def _b_let(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        for pieces in split[1:]:
            literal = syntax.Literal(text(pieces), command.line, False)
            self._arithmetic_command(syntax.Text((literal,), command.line, (0, 0)))

    def _b_eval(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        def joined(pieces: Flat) -> Value:
            made: list[Piece] = []
            for number, element in enumerate(elements(pieces)):
                if number:
                    made.append(Piece(" ", command.line))
                made += element
            return tuple(made)

        script = lifted(joined, self._fields_of(values, 1))
        self._status(Holds(True))
        self._eval(script)

    def _eval(self, script: Value) -> None:
        found = list(decisions(script))
        if self._depth >= _MAX_DEPTH:
            return
        if not found or number_of_runs(found) > _MAX_LISTS:
            self._read_value(usual(script))
            return
        self._split_on(found[0], lambda taken: self._eval(decided(script, taken)))

    def _b_source(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        line = self._line(command.line)
        self._status(Holds(True))
        named = word(split[1]) if len(split) > 1 else None
        path = self._found(named) if named is not None else None
        if path is None or path in self._reading or self._depth >= _MAX_DEPTH:
            if path is None:
                self.sourced.append(line)
            self._program_status("", ())
            return
        self._read_file(path, line)
        if self._flow == "return":
            self._flow = ""

    def _b_leave(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        name = text(split[0])
        if len(split) > 1 and name in ("return", "exit"):
            found = conditions.known(split[1])
            self._status(UNKNOWN if found is None else Holds(found[0] == "0", found[1]))
        elif name in ("break", "continue"):
            self._status(Holds(True))
        self._flow = name

    def _b_exec(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        if len(split) > 1:
            self._without_first(values, split, command)
            self._flow = "exit"

    def _without_first(
        self, values: list[Value], split: list[Flat], command: syntax.Simple
    ) -> None:
        """``exec``, ``command``, ``builtin``: the command that follows."""
        rest = (
            values[1:] if len(list(fields(usual(values[0]), self._ifs()))) == 1 else [*(split[1:])]
        )
        name = text(split[1])
        builtin = _BUILTINS.get(name)
        if builtin is not None:
            builtin(self, list(rest), split[1:], command)
        else:
            self._program(list(rest), split[1:], command)

    def _b_command(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        if len(split) > 1 and text(split[1]).startswith("-"):
            self._write((_output("command"),))
            self._status(UNKNOWN)
        elif len(split) > 1:
            self._without_first(values, split, command)

    def _b_query(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        self._write((_output(text(split[0])),))
        self._status(UNKNOWN)

    def _b_getopts(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        own = not isinstance(self._get("@"), Listed)
        self._status(Holds(False, soft=True) if own else UNKNOWN)

    def _b_nothing(self, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
        if text(split[0]) in ("pwd", "ulimit", "umask", "trap", "shopt", "jobs", "dirs"):
            self._write((_output(text(split[0])),))
        self._program_status("", ())


_DECLARING = ("export", "declare", "typeset", "local", "readonly")
_Builtin: TypeAlias = "Callable[[Reader, list[Value], list[Flat], syntax.Simple], None]"
_BUILTINS: dict[str, _Builtin] = {
    **{":": Reader._b_true, "true": Reader._b_true, "false": Reader._b_false},
    **{"[": Reader._b_test, "test": Reader._b_test},
    **{"echo": Reader._b_echo, "printf": Reader._b_printf, "cat": Reader._b_cat},
    **{"basename": Reader._b_path, "dirname": Reader._b_path, "seq": Reader._b_seq},
    **{"read": Reader._b_read, "mapfile": Reader._b_mapfile, "readarray": Reader._b_mapfile},
    **{"shift": Reader._b_shift, "set": Reader._b_set, "unset": Reader._b_unset},
    **{"let": Reader._b_let, "eval": Reader._b_eval},
    **{"source": Reader._b_source, ".": Reader._b_source},
    **dict.fromkeys(("exit", "return", "break", "continue"), Reader._b_leave),
    **{"exec": Reader._b_exec, "command": Reader._b_command, "builtin": Reader._b_command},
    **{"type": Reader._b_query, "hash": Reader._b_query, "getopts": Reader._b_getopts},
    **dict.fromkeys(
        (
            *("cd", "pushd", "popd", "pwd", "dirs", "wait", "trap", "ulimit", "umask", "shopt"),
            *("jobs", "disown", "kill", "alias", "bg", "fg", "times"),
        ),
        Reader._b_nothing,
    ),
}


# What is known not to be there.
_NOTHING: Value = (Piece("", unset=True),)


def _output(program: str) -> Piece:
    """What a program writes: without text of its own, until it is known where it is put."""
    return Piece("", unknown=f"what {program} writes is not known")


_TOO_MUCH = ("it hangs on", "too much", "it is too long")


def _reason(pieces: Flat, otherwise: str) -> str:
    """Why it is not known: where too much hangs on it, that, whatever is made of it."""
    reasons = (piece.unknown or "" for piece in pieces)
    return next((reason for reason in reasons if reason.startswith(_TOO_MUCH)), otherwise)


def _not_computed(part: syntax.Parameter, of: Flat = ()) -> Value:
    why = _reason(of, f"{part.written} is worked out from what is not known")
    return (Piece(part.written, part.line, unknown=why),)


def _is_list(part: syntax.Parameter) -> bool:
    index = None if part.index is None else part.index.plain()
    return (not part.length and (part.name in ("@", "*") or index in ("@", "*"))) or (
        part.length and index in ("@", "*")
    )


def _joins(part: syntax.Parameter) -> bool:
    """``$*`` and ``${A[*]}``, which in quotes are one word."""
    return part.name == "*" or (part.index is not None and part.index.plain() == "*")


def _as_array(items: Sequence[Flat] | Iterator[Flat]) -> Value:
    return array(
        [tuple(replace(p, splits=False, quoted=False) for p in item) or (Piece(""),)
         for item in items]
    )  # fmt: skip


def _listed(value: Value, quoted: bool) -> Value:
    """Elements as they stand in a word: each a word of its own, or to be split further."""
    return tuple(
        Choice(p.decision, tuple(_listed(option, quoted) for option in p.options))
        if isinstance(p, Choice)
        else p
        if p.end
        else replace(p, quoted=quoted, splits=not quoted)
        for p in value
    )


def _expanded(value: Value, quoted: bool) -> Value:
    return tuple(
        Choice(p.decision, tuple(_expanded(option, quoted) for option in p.options))
        if isinstance(p, Choice)
        else p
        if p.end
        else replace(p, splits=not (quoted or p.quoted), quoted=p.quoted or quoted, span=None)
        for p in value
    )


def _with_blanks(pieces: Flat, line: int) -> Value:
    """Elements where no word is split: one text, blanks between them."""
    made = [Piece(" ", line) if piece.end else piece for piece in pieces]
    return tuple(made[:-1] if pieces and pieces[-1].end else made)


def _plain(pieces: Flat) -> Value:
    return tuple(replace(p, splits=False, quoted=False, span=None) for p in pieces if not p.end)


def _plain_value(value: Value) -> Value:
    """What a variable keeps: nothing of how it was written."""
    if len(value) > _MAX_PIECES:
        value = _compact(value)
    if sum(len(piece.text) for piece in value if isinstance(piece, Piece)) > _MAX_TEXT:
        return (Piece("", unknown="it is too long to be read"),)
    return tuple(
        Choice(p.decision, tuple(_plain_value(option) for option in p.options))
        if isinstance(p, Choice)
        else replace(p, splits=False, quoted=False, span=None)
        for p in value
        if not (isinstance(p, Piece) and not (p.text or p.unknown or p.soft or p.unset))
    )


def _compact(value: Value) -> Value:
    """Neighbours on one line, as one piece."""
    made: list[Piece | Choice] = []
    for piece in value:
        last = made[-1] if made else None
        if (
            isinstance(piece, Piece)
            and isinstance(last, Piece)
            and not (piece.unknown or last.unknown or piece.end or last.end)
            and (piece.line, piece.soft, piece.unset) == (last.line, last.soft, last.unset)
        ):
            made[-1] = replace(last, text=last.text + piece.text)
        else:
            made.append(piece)
    return tuple(made)


def _element(pieces: Flat, at: int) -> Value | None:
    items = elements(pieces)
    return items[at] if -len(items) <= at < len(items) else None


def _after_equals(pieces: Flat) -> Flat:
    rest: list[Piece] = []
    passed = False
    for piece in pieces:
        if passed:
            rest.append(piece)
        elif "=" in piece.text and not piece.unknown:
            passed = True
            rest.append(replace(piece, text=piece.text.partition("=")[2]))
    return tuple(rest)


def _decidable(status: Value, line: int) -> Value:
    """A status in which every leaf is 0 or 1; what is not known becomes a decision."""
    if not status:
        return (Piece("0"),)
    (piece,) = status[:1]
    if isinstance(piece, Choice):
        return (
            Choice(piece.decision, tuple(_decidable(option, line) for option in piece.options)),
        )
    if piece.unknown:
        decision = Decision(piece.line or line, 2, usual=1)
        return (Choice(decision, ((Piece("0"),), (Piece("1"),))),)
    return (replace(piece, text="0" if piece.text in ("0", "") else "1"),)


def _leaves(tree: Value) -> list[Piece]:
    if not tree:
        return [Piece("0")]
    piece = tree[0]
    if isinstance(piece, Piece):
        return [piece]
    return [leaf for option in piece.options for leaf in _leaves(option)]


def _selected(tree: Value, values: Sequence[Value]) -> Value:
    piece = tree[0]
    if isinstance(piece, Piece):
        return values[int(piece.text)]
    return chosen(piece.decision, [_selected(option, values) for option in piece.options])


def _merged(tree: Value, options: Sequence[Variable | None]) -> Variable | None:
    """What a variable is after branches of which one was taken."""
    first = options[0]
    if all(option == first for option in options[1:]):
        return first
    if any(isinstance(option, syntax.Function) for option in options):
        return next(option for option in options if isinstance(option, syntax.Function))
    if any(isinstance(option, Mapped) for option in options):
        tables = [dict(o.items) if isinstance(o, Mapped) else {} for o in options]
        keys = dict.fromkeys(key for table in tables for key in table)
        return Mapped(
            tuple((key, _selected(tree, [t.get(key, ()) for t in tables])) for key in keys)
        )
    if any(isinstance(option, Listed) for option in options):
        lists: list[Value] = [
            o.value if isinstance(o, Listed) else array([o.value]) if isinstance(o, Scalar) else ()
            for o in options
        ]
        return Listed(_selected(tree, lists))
    unset: Value = (Piece("", unknown="it is set in a branch alone", unset=True),)
    return Scalar(_selected(tree, [o.value if isinstance(o, Scalar) else unset for o in options]))


def _holds(status: Flat) -> Holds:
    piece = status[0]
    return UNKNOWN if piece.unknown else Holds(piece.text == "0", piece.soft)


def _as_status(holds: Holds, line: int) -> Value:
    if holds.value is None:
        return (Piece("", line, unknown="whether it holds is not known"),)
    return (Piece(str(int(not holds.value)), line, soft=holds.soft),)


def _negated(status: Flat) -> Value:
    piece = status[0]
    if piece.unknown:
        return (replace(piece, text=""),)
    return (replace(piece, text="1" if piece.text == "0" else "0"),)


def _without(whole: str, pattern: tuple[tuple[str, bool], ...], action: str) -> str:
    """``${X#pattern}`` and its kin: the shortest or the longest match taken off."""
    compiled = regex(pattern)
    lengths = range(len(whole) + 1)
    longest = len(action) == 2
    for length in reversed(lengths) if longest else lengths:
        part = whole[:length] if action[0] == "#" else whole[len(whole) - length :]
        if compiled.fullmatch(part):
            return whole[length:] if action[0] == "#" else whole[: len(whole) - length]
    return whole


def _unescaped(written: str) -> str:
    return re.sub(
        r"\\([ntr\\])", lambda m: {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}[m[1]], written
    )


def _printed(words: Sequence[Flat], line: int) -> Value:
    """``printf``: its format, used again until no argument is left."""
    if not words or any(p.unknown for p in words[0]):
        return (_output("printf"),)
    form, arguments = _unescaped(text(words[0])), list(words[1:])
    made: list[Piece] = []
    while True:
        at = 0
        for match in re.finditer(r"%(?:%|([-+ 0#]*)(\d+)?(?:\.(\d+))?([a-zA-Z]))", form):
            made.append(Piece(form[at : match.start()], line))
            at = match.end()
            if match[0] == "%%":
                made.append(Piece("%", line))
                continue
            argument = arguments.pop(0) if arguments else ()
            if match[0] == "%s":
                made += argument
                continue
            found = conditions.known(argument)
            if found is None or match[4] not in "sdi":
                return (_output("printf"),)
            try:
                value = found[0] if match[4] == "s" else int(found[0] or "0")
                made.append(Piece(match[0].replace("i", "d") % value, line, soft=found[1]))
            except ValueError:
                return (_output("printf"),)
        made.append(Piece(form[at:], line))
        if not arguments or at == 0:
            return tuple(made)


def _first_line(pieces: Flat) -> Value:
    kept: list[Piece] = []
    for piece in pieces:
        if "\n" in piece.text and not piece.unknown:
            kept.append(replace(piece, text=piece.text.partition("\n")[0]))
            break
        kept.append(piece)
    return tuple(kept)


def _without_backslashes(pieces: Flat) -> Value:
    return tuple(
        p if p.unknown else replace(p, text=re.sub(r"\\(.|\n)", r"\1", p.text).replace("\\\n", ""))
        for p in pieces
    )


def _lines(pieces: Flat) -> Value:
    items: list[list[Piece]] = [[]]
    for piece in pieces:
        if piece.unknown:
            items[-1].append(piece)
            continue
        first, *rest = piece.text.split("\n")
        items[-1].append(replace(piece, text=first))
        items += [[replace(piece, text=line)] for line in rest]
    if items and not any(p.text for p in items[-1]):
        items.pop()
    return _as_array([tuple(item) for item in items])


def _nth_field(pieces: Flat, at: int, last: bool, ifs: str) -> Value:
    """What ``read`` gives its n-th name: a field, or for the last one all that is left."""
    if at == 0 and last:
        return _stripped(pieces, ifs)
    if any(piece.unknown for piece in pieces):
        return (Piece("", unknown="it is read from what is not known"),)
    blanks = "".join(c for c in ifs if c.isspace())
    rest = text(pieces).strip(blanks) if blanks else text(pieces)
    line = pieces[0].line if pieces else 0
    pattern = re.compile(
        f"[{re.escape(blanks)}]*[{re.escape(''.join(c for c in ifs if not c.isspace()))}]"
        f"[{re.escape(blanks)}]*|[{re.escape(blanks)}]+"
        if any(not c.isspace() for c in ifs) and blanks
        else f"[{re.escape(ifs)}]"
        if not blanks
        else f"[{re.escape(blanks)}]+"
    )
    for _ in range(at):
        match = pattern.search(rest)
        rest = rest[match.end() :] if match else ""
    if not last and (match := pattern.search(rest)):
        rest = rest[: match.start()]
    return (Piece(rest, line),)


def _stripped(pieces: Flat, ifs: str) -> Value:
    blanks = "".join(c for c in ifs if c.isspace())
    kept = list(pieces)
    while kept and not kept[0].unknown:
        kept[0] = replace(kept[0], text=kept[0].text.lstrip(blanks))
        if kept[0].text:
            break
        kept.pop(0)
    while kept and not kept[-1].unknown:
        kept[-1] = replace(kept[-1], text=kept[-1].text.rstrip(blanks))
        if kept[-1].text:
            break
        kept.pop()
    return tuple(kept)


def _braces(parts: Sequence[syntax.Part]) -> list[tuple[syntax.Part, ...]]:
    """Brace expansion: ``{a,b}`` and ``{1..3}`` outside of quotes."""
    if not any(
        isinstance(p, syntax.Literal) and not p.quoted and "{" in p.text for p in parts
    ) or not any(isinstance(p, syntax.Literal) and not p.quoted and "}" in p.text for p in parts):
        return [tuple(parts)]
    items: list[syntax.Part] = []
    for part in parts:
        if isinstance(part, syntax.Literal) and not part.quoted:
            items += [syntax.Literal(c, part.line, False) for c in part.text]
        else:
            items.append(part)
    return [_rejoined(made) for made in _brace_words(items)]


def _rejoined(items: Sequence[syntax.Part]) -> tuple[syntax.Part, ...]:
    made: list[syntax.Part] = []
    for item in items:
        last = made[-1] if made else None
        if (
            isinstance(item, syntax.Literal)
            and isinstance(last, syntax.Literal)
            and (item.quoted, item.line) == (last.quoted, last.line)
        ):
            made[-1] = syntax.Literal(last.text + item.text, last.line, last.quoted)
        else:
            made.append(item)
    return tuple(made)


def _brace_words(items: list[syntax.Part]) -> list[list[syntax.Part]]:
    def char(at: int) -> str:
        item = items[at]
        return item.text if isinstance(item, syntax.Literal) and not item.quoted else ""

    for start in range(len(items)):
        if char(start) != "{":
            continue
        depth, commas, close = 0, [], None
        for at in range(start, len(items)):
            here = char(at)
            depth += {"{": 1, "}": -1}.get(here, 0)
            if here == "," and depth == 1:
                commas.append(at)
            if depth == 0:
                close = at
                break
        if close is None:
            continue
        bodies: list[list[syntax.Part]] = []
        if commas:
            edges = [start, *commas, close]
            for left, right in itertools.pairwise(edges):
                bodies += _brace_words(items[left + 1 : right])
        else:
            inner = "".join(char(at) for at in range(start + 1, close))
            bodies = [[syntax.Literal(t, items[start].line, False)] for t in _brace_range(inner)]
            if len(inner) != close - start - 1:
                bodies = []
        if bodies:
            tails = _brace_words(items[close + 1 :])
            return [[*items[:start], *body, *tail] for body in bodies for tail in tails]
    return [items]


def _brace_range(inner: str) -> list[str]:
    match = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?", inner)
    if match:
        first, last = int(match[1]), int(match[2])
        step = abs(int(match[3] or 1)) or 1
        width = 0
        if any(re.match(r"-?0\d", m) for m in (match[1], match[2])):
            width = max(len(match[1]), len(match[2]))
        sign = 1 if last >= first else -1
        numbers = range(first, last + sign, sign * step)[:10_000]
        return [f"{n:0{width}d}" for n in numbers]
    if letters := re.fullmatch(r"([a-zA-Z])\.\.([a-zA-Z])", inner):
        first, last = ord(letters[1]), ord(letters[2])
        sign = 1 if last >= first else -1
        return [chr(n) for n in range(first, last + sign, sign)]
    return []
