"""Control flow: lists, pipelines, redirections, ``case``, loops and ``[[ ]]``.

A loop whose rounds are known is walked round by round; of another, what it sets is not known.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from klplug.audit.shell import conditions, syntax
from klplug.audit.shell.branches import branch, fork, leaves_of, rejoin, split_on
from klplug.audit.shell.conditions import UNKNOWN, Holds, as_status
from klplug.audit.shell.expansion import as_elements, reckoned, scalar, value_of
from klplug.audit.shell.state import (
    MAX_LISTS,
    MAX_ROUNDS,
    Changes,
    Listed,
    Scalar,
    Shell,
    file_key,
    outlives,
)
from klplug.audit.shell.values import (
    Flat,
    Piece,
    Value,
    array,
    decided,
    decisions,
    elements,
    flat,
    lifted,
    number_of_runs,
    output,
    reason,
    text,
    usual,
)


def walk_and_or(shell: Shell, chain: syntax.AndOr) -> None:
    shell.run(chain.first)
    soft = False  # what comes next hangs on what nobody sets
    for operator, statement in chain.rest:
        if shell.flow:
            return
        status = shell.last_status()
        line = status[0].line if status and isinstance(status[0], Piece) else 0
        piece = status[0] if len(status) == 1 else None
        soft = soft or (isinstance(piece, Piece) and piece.soft)
        if isinstance(piece, Piece) and piece.unknown and piece.text == "0" and soft:
            status = as_status(Holds(True, soft), piece.line)
        elif isinstance(piece, Piece) and piece.unknown and piece.text == "0":
            # A program that is run to do something is taken to do it.
            if operator == "&&":
                shell.run(statement)
            else:
                shell.unreached += 1
                shell.trial(_chained(shell, statement, operator, soft)[0])
                shell.unreached -= 1
            continue
        walk, stay = _chained(shell, statement, operator, soft)
        if operator == "&&":
            branch(shell, status, walk, stay, line)
        else:
            branch(shell, status, stay, walk, line)


def _chained(
    shell: Shell, statement: syntax.Statement, operator: str, soft: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    def walk() -> None:
        shell.run(statement)
        status = shell.last_status()
        if soft and len(status) == 1 and isinstance(status[0], Piece):
            shell.set("?", Scalar((replace(status[0], soft=True),)))

    return walk, lambda: shell.ends(Holds(operator == "||", soft))


def walk_pipeline(shell: Shell, pipeline: syntax.Pipeline) -> None:
    if len(pipeline.items) == 1:
        shell.run(pipeline.items[0])
        if pipeline.negated and not shell.flow:
            shell.set("?", Scalar(lifted(_negated, shell.last_status())))
        return
    *others, last = pipeline.items
    given = shell.given()
    for item in others:
        part = functools.partial(_part, shell, item, given)
        given = shell.with_stream("1>", (), part)
    _part(shell, last, given)
    shell.program_ends()


def _part(shell: Shell, item: syntax.Statement, given: Value | None) -> None:
    """A part of a pipeline, which reads what the part before it writes."""
    walk = functools.partial(shell.run, item)
    walk_subshell(shell, lambda: _reading(shell, given, walk))


def _reading(shell: Shell, given: Value | None, walk: Callable[[], None]) -> None:
    shell.with_stream("0<", given, walk)


def walk_subshell(shell: Shell, walk: Callable[[], None]) -> None:
    """Nothing that a subshell sets outlives it, but what it reads and writes and how it ends."""
    changes, _ = shell.trial(walk)
    shell.apply({name: held for name, held in changes.items() if outlives(name)})


def walk_redirected(
    shell: Shell,
    redirects: Sequence[syntax.Redirect],
    given: Value | None,
    walk: Callable[[], None],
) -> None:
    """A walk whose input is ``given``, where it is known that something is."""
    inner = walk if given is None else functools.partial(_reading, shell, given, walk)
    into = next((r for r in reversed(redirects) if _WRITES.fullmatch(r.operator)), None)
    if into is None or into.operator.endswith(">&"):
        shell.silent += into is not None
        inner()
        shell.silent -= into is not None
        return
    name = text(usual(scalar(shell, into.target)))
    before: Value | None = ()
    if into.operator.endswith(">>"):
        before = shell.file(name)
    held = shell.with_stream("1>", (output("a file"),) if before is None else before, inner)
    if not name.startswith("/dev/"):
        shell.set(file_key(name), Scalar(held))


_WRITES = re.compile(r"1?(>>?|>\||>&|&>>?)")


def given_input(shell: Shell, redirects: Sequence[syntax.Redirect]) -> Value | None:
    for redirect in reversed(redirects):
        if redirect.document is not None:
            body = redirect.document.body
            return () if body is None else value_of(shell, body.parts)
        if redirect.operator == "<<<":
            return (*scalar(shell, redirect.target), Piece("\n"))
        if redirect.operator in ("<", "0<"):
            held = shell.file(text(usual(scalar(shell, redirect.target))))
            return (output("a file"),) if held is None else held
    return None


def walk_case(shell: Shell, case: syntax.Case) -> None:
    subject = scalar(shell, case.subject)
    walks = [lambda at=at: _case_body(shell, case, at) for at in range(len(case.items))]
    nothing: Callable[[], None] = lambda: shell.ends(Holds(True))  # noqa: E731

    def matching(pieces: Flat, patterns: Sequence[Value]) -> Value:
        found = conditions.known(pieces)
        if found is None:
            return (Piece("", case.line, unknown="not known"),)
        holds = any(conditions.matches(found[0], usual(p)) for p in patterns)
        return (Piece(str(int(not holds)), case.line, soft=found[1]),)

    if not decisions(subject) and conditions.known(flat(subject)) is None:
        exhaustive = any(p.plain() == "*" for patterns, _, _ in case.items for p in patterns)
        fork(shell, case.line, walks if exhaustive else [*walks, nothing])
        return

    def walk_from(at: int) -> None:
        if at == len(case.items):
            nothing()
            return
        patterns = [scalar(shell, p) for p in case.items[at][0]]
        status = lifted(lambda pieces: matching(pieces, patterns), subject)
        branch(shell, status, walks[at], lambda: walk_from(at + 1), case.line)

    walk_from(0)


def _case_body(shell: Shell, case: syntax.Case, at: int) -> None:
    shell.ends(Holds(True))
    shell.run(case.items[at][1])
    if case.items[at][2] == ";&" and at + 1 < len(case.items):
        _case_body(shell, case, at + 1)


def walk_for(shell: Shell, loop: syntax.For) -> None:
    listed = shell.arguments() if loop.words is None else as_elements(shell, loop.words, True)
    _for_over(shell, loop, listed)


def _for_over(shell: Shell, loop: syntax.For, listed: Value) -> None:
    over = list(decisions(listed))
    if not over and len(elements(flat(listed))) <= MAX_ROUNDS:
        _for_each(shell, loop, flat(listed))
    elif over and number_of_runs(over) <= MAX_LISTS:
        split_on(shell, over[0], lambda taken: _for_over(shell, loop, decided(listed, taken)))
    else:
        why = f"too much hangs on what is looped over (line {loop.line})"
        _for_some(shell, loop, why)


def _for_some(shell: Shell, loop: syntax.For, why: str) -> None:
    """Rounds over words of which it is not known what, or how many they are."""
    unknown = Scalar((Piece(f"${loop.name}", loop.line, unknown=why),))

    def body() -> None:
        shell.set(loop.name, unknown)
        shell.run(loop.body)

    _some_rounds(shell, body, lambda: None, loop.line)


def _for_each(shell: Shell, loop: syntax.For, listed: Flat) -> None:
    early = len(shell.early)
    for element in elements(listed):
        hidden = [piece for piece in element if piece.unknown]
        names_files = any(not p.quoted and re.search(r"[*?]", p.text) for p in element)
        if hidden or names_files:
            why = f"${loop.name} is a loop variable (line {loop.line})"
            if not hidden:
                why = f"which files {text(element)} names is not known"
            why = reason(element, why)
            if names_files or any(piece.splits for piece in hidden):
                _for_some(shell, loop, why)
                continue
            element = (Piece(f"${loop.name}", loop.line, unknown=why),)
        shell.set(loop.name, Scalar(_plain(element)))
        if not _round(shell, lambda: shell.run(loop.body)):
            break
    rejoin(shell, early, "break")


def _round(shell: Shell, body: Callable[[], None]) -> bool:
    """One round of a loop; ``False`` where it is the last."""
    early = len(shell.early)
    body()
    if shell.flow == "continue":
        shell.flow = ""
    rejoin(shell, early, "continue")
    if shell.flow == "break":
        shell.flow = ""
        return False
    return not shell.flow


def loop_condition(shell: Shell, loop: syntax.While) -> None:
    shell.run(loop.condition)
    if loop.until:
        shell.set("?", Scalar(lifted(_negated, shell.last_status())))


def walk_while(
    shell: Shell,
    condition: Callable[[], None],
    body: Callable[[], None],
    step: Callable[[], None],
    line: int,
) -> None:
    begun, before = len(shell.commands), dict(shell.variables)
    early = len(shell.early)
    for round_ in range(MAX_ROUNDS):
        condition()
        status = shell.last_status()
        leaves = leaves_of(status)
        if shell.flow:
            return
        if any(leaf.unknown for leaf in leaves) or len({p.text for p in leaves}) > 1:
            _some_rounds(shell, body, step, line, condition)
            rejoin(shell, early, "break")
            return
        if leaves[0].text != "0":
            if any(leaf.soft for leaf in leaves) and not round_:
                shell.unreached += 1
                shell.trial(body)
                shell.unreached -= 1
            shell.ends(Holds(True))
            rejoin(shell, early, "break")
            return
        goes_on = _round(shell, body)
        if not goes_on:
            rejoin(shell, early, "break")
            return
        step()
    rejoin(shell, early, "break")
    # It has no end that is known here.
    del shell.commands[begun:]
    changed = {n: held for n, held in shell.variables.items() if held is not before.get(n)}
    shell.apply({name: before.get(name) for name in changed})
    _unknown_after(shell, changed, line)

    def round_once() -> None:
        condition()
        body()

    _some_rounds(shell, round_once, step, line)


def _some_rounds(
    shell: Shell,
    body: Callable[[], None],
    step: Callable[[], None],
    line: int,
    condition: Callable[[], None] = lambda: None,
) -> None:
    """A loop that runs, nobody knows how often: what it sets is not known."""
    begun = len(shell.commands)

    def once() -> None:
        early = len(shell.early)
        if _round(shell, body):
            step()
        rejoin(shell, early, "break")

    shell.undecided += 1

    def again() -> None:
        once()
        condition()

    changed, _ = shell.trial(again)
    del shell.commands[begun:]
    _unknown_after(shell, changed, line)
    shell.trial(once)
    shell.undecided -= 1
    shell.ends(Holds(True))


def _unknown_after(shell: Shell, changed: Changes, line: int) -> None:
    for name, variable in changed.items():
        if name == "?" or variable == shell.variables.get(name):
            continue
        why = f"${name} is set in a loop (line {line})"
        unknown = Piece(f"${name}", line, unknown=why)
        if outlives(name):
            shell.put(name, Scalar((output("a loop"),)))
        elif isinstance(variable, Listed):
            # Nor how many elements there are.
            shell.put(name, Listed(array([(unknown.written(True, False),)])))
        elif not isinstance(variable, syntax.Function):
            shell.put(name, Scalar((unknown,)))


def tested(shell: Shell, node: syntax.Test) -> Value:
    operands = node.operands
    line = shell.line(node.line)
    if node.operator in ("&&", "||", "!"):
        inner = [tested(shell, o) for o in operands if isinstance(o, syntax.Test)]
        joined = {"&&": conditions.both, "||": conditions.either}

        def combined(*statuses: Flat) -> Value:
            held = [_holds(s) for s in statuses]
            result = ~held[0] if node.operator == "!" else joined[node.operator](*held)
            return as_status(result, line)

        return lifted(combined, *inner)
    values = [scalar(shell, o) for o in operands if isinstance(o, syntax.Text)]
    if len(values) == 1:
        return lifted(
            lambda p: as_status(conditions.unary(node.operator, p, shell.is_set), line),
            values[0],
        )
    if node.operator.startswith("-"):
        values = [
            value if _is_number(value) else reckoned(shell, operand, "[[ ]]")
            for value, operand in zip(values, operands, strict=True)
            if isinstance(operand, syntax.Text)
        ]
    return lifted(
        lambda a, b: as_status(conditions.binary(node.operator, a, b, True), line), *values
    )


def _is_number(value: Value) -> bool:
    """Whether it is a number as it stands: in ``[[ a -eq b ]]`` both sides are expressions."""
    return re.fullmatch(r"\s*-?\d*\s*", text(usual(value))) is not None


def _plain(pieces: Flat) -> Value:
    return tuple(p.written(False, False) for p in pieces if not p.end)


def _holds(status: Flat) -> Holds:
    piece = status[0]
    return UNKNOWN if piece.unknown else Holds(piece.text == "0", piece.soft)


def _negated(status: Flat) -> Value:
    piece = status[0]
    if piece.unknown:
        return (piece.with_text(""),)
    return (piece.with_text("1" if piece.text == "0" else "0"),)
