"""Conditions that are not decided: each branch is walked on trial, and what they leave is joined.

A *tree* is a status whose leaves are numbers of branches; a variable that branches leave different
holds a choice of the tree's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from klplug.audit.shell import syntax
from klplug.audit.shell.state import Alias, Changes, Early, Listed, Mapped, Scalar, Shell, Variable
from klplug.audit.shell.values import Choice, Decision, Piece, Value, array, chosen, decisions


def branch(
    shell: Shell, status: Value, yes: Callable[[], None], no: Callable[[], None], line: int
) -> None:
    """Walk what follows a condition: one branch if it is decided, else both."""
    tree = _decidable(status, line)
    leaves = leaves_of(tree)
    if len({leaf.text for leaf in leaves}) == 1:
        taken, other = (yes, no) if leaves[0].text == "0" else (no, yes)
        if any(leaf.soft for leaf in leaves):
            _usually(shell, taken, other)
        else:
            taken()
        return
    shell.undecided += 1
    ends = [shell.trial(yes), shell.trial(no)]
    shell.undecided -= 1
    _join(shell, tree, ends)


def _usually(shell: Shell, taken: Callable[[], None], other: Callable[[], None]) -> None:
    """A branch taken if nobody sets anything, and the other, for the commands in it."""
    begun = len(shell.commands)
    changes, flow = shell.trial(taken)
    if flow == "exit" and not any(c.reached for c in shell.commands[begun:]):
        # Whoever runs the script gives it what it asks for.
        other()
        return
    shell.unreached += 1
    shell.trial(other)
    shell.unreached -= 1
    shell.apply(changes)
    shell.flow = flow


def _join(shell: Shell, tree: Value, ends: list[tuple[Changes, str]]) -> None:
    (left, left_flow), (right, right_flow) = ends
    if bool(left_flow) != bool(right_flow):
        gone, changes = (left, right) if left_flow else (right, left)
        flow = left_flow or right_flow
        if flow != "exit" and decisions(tree):
            state = {**shell.variables, **gone}
            shell.early.append(Early(flow, tree, bool(left_flow), state))
            shell.undecided += 1
        shell.apply(changes)
        return
    _settle(shell, tree, [left, right])
    shell.flow = left_flow if left_flow == right_flow else min(left_flow, right_flow)


def fork(shell: Shell, line: int, walks: Sequence[Callable[[], None]]) -> None:
    """Branches of which one is taken, nobody knows which; the last is the usual one."""
    shell.undecided += 1
    ends = [shell.trial(walk) for walk in walks]
    shell.undecided -= 1
    staying = [at for at, (_, flow) in enumerate(ends) if not flow]
    kept = staying or range(len(ends))
    decision = Decision(line, len(kept), len(kept) - 1)
    _settle(shell, _tree(decision), [ends[at][0] for at in kept])
    if not staying:
        shell.flow = ends[-1][1]


def split_on(shell: Shell, decision: Decision, walk: Callable[[dict[Decision, int]], None]) -> None:
    """The same statements, walked once for each way that a decision can go."""
    shell.undecided += 1
    ends = [
        shell.trial(lambda taken={decision: option}: walk(taken))  # type: ignore[misc]
        for option in range(decision.options)
    ]
    shell.undecided -= 1
    _settle(shell, _tree(decision), [changes for changes, _ in ends])


def _tree(decision: Decision) -> Value:
    """The branch that is taken, by its number."""
    return (Choice(decision, tuple((Piece(str(at)),) for at in range(decision.options))),)


def _settle(shell: Shell, tree: Value, branches: Sequence[Changes]) -> None:
    """Each variable holds what it may hold after branches of which one was taken."""
    for name in dict.fromkeys(name for changes in branches for name in changes):
        before = shell.variables.get(name)
        shell.put(name, _merged(tree, [changes.get(name, before) for changes in branches]))


def rejoin(shell: Shell, since: int, *flows: str) -> None:
    """Where a function or a round may have ended early, variables are as they were then."""
    kept = []
    for early in reversed(shell.early[since:]):
        if early.flow not in flows:
            kept.append(early)
            continue
        shell.undecided -= 1
        for name in dict.fromkeys((*early.variables, *shell.variables)):
            now, then = shell.variables.get(name), early.variables.get(name)
            if now is not then:
                options = [then, now] if early.if_true else [now, then]
                shell.put(name, _merged(early.tree, options))
    shell.early[since:] = reversed(kept)


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
        return _tree(Decision(piece.line or line, 2, usual=1))
    if piece.text in ("0", "1"):
        return (piece,)
    return (piece.with_text("1" if piece.text else "0"),)


def leaves_of(tree: Value) -> list[Piece]:
    if not tree:
        return [Piece("0")]
    piece = tree[0]
    if isinstance(piece, Piece):
        return [piece]
    return [leaf for option in piece.options for leaf in leaves_of(option)]


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
    kinds = set(map(type, options))
    if Alias in kinds:
        return next(option for option in options if isinstance(option, Alias))
    if syntax.Function in kinds:
        return next(option for option in options if isinstance(option, syntax.Function))
    if Mapped in kinds:
        tables = [o.items if isinstance(o, Mapped) else {} for o in options]
        keys = dict.fromkeys(key for table in tables for key in table)
        return Mapped({key: _selected(tree, [t.get(key, ()) for t in tables]) for key in keys})
    if Listed in kinds:
        lists: list[Value] = [
            o.value if isinstance(o, Listed) else array([o.value]) if isinstance(o, Scalar) else ()
            for o in options
        ]
        return Listed(_selected(tree, lists))
    unset: Value = (Piece("", unknown="it is set in a branch alone", unset=True),)
    return Scalar(_selected(tree, [o.value if isinstance(o, Scalar) else unset for o in options]))
