"""Assignments to variables, arrays and their elements; declarations; ``(( ))``."""

from __future__ import annotations

import re

from klplug.audit.shell import conditions, syntax
from klplug.audit.shell.conditions import Holds
from klplug.audit.shell.expansion import as_elements, kept, reckoned, scalar, unsplit, value_of
from klplug.audit.shell.state import Alias, Listed, Mapped, Scalar, Shell, Variable
from klplug.audit.shell.syntax import NAME
from klplug.audit.shell.values import (
    NOTHING,
    Flat,
    Piece,
    Value,
    after_equals,
    array,
    as_array,
    element_at,
    elements,
    fields,
    lifted,
    plain_value,
    text,
    usual,
)


def arithmetic_command(shell: Shell, expression: syntax.Text, empty: int = 0) -> None:
    written = text(usual(value_of(shell, expression.parts)))
    if not written.strip():
        shell.ends(Holds(bool(empty)))
        return
    number = reckoned(shell, expression, f"(({written}))")
    targets = dict.fromkeys(
        next(filter(None, match))
        for match in re.findall(
            rf"({NAME})\s*(?:[-+*/%&|^]|<<|>>)?=(?!=)|({NAME})\s*(?:\+\+|--)"
            rf"|(?:\+\+|--)\s*({NAME})",
            written,
        )
    )
    made = {n: reckoned(shell, expression, f"(({written}))", n) for n in targets}
    for name, value in made.items():
        shell.set(name, Scalar(value))

    def status(pieces: Flat) -> Value:
        found = conditions.known(pieces)
        if found is None:
            return (Piece("", expression.line, unknown="not known"),)
        return (Piece(str(int(found[0] == "0")), expression.line, soft=found[1]),)

    shell.set("?", Scalar(lifted(status, number)))


def assign(shell: Shell, assignment: syntax.Assignment, value: Value | None = None) -> None:
    name = assignment.name
    before = shell.get(name)
    if assignment.elements is not None:
        _assign_elements(shell, assignment, before)
        return
    if value is None:
        value = kept(shell, assignment.value)
    if assignment.index is not None:
        _assign_element(shell, assignment, before, value)
        return
    if isinstance(before, Listed):
        old = before.value
        first = lifted(lambda p: element_at(p, 0) or (), old) if assignment.appends else ()

        def replaced(pieces: Flat, new: Flat) -> Value:
            return as_array([new, *elements(pieces)[1:]])

        shell.set(name, Listed(lifted(replaced, old, (*first, *value))))
        return
    old = before.value if isinstance(before, Scalar) and assignment.appends else ()
    shell.set(name, Scalar((*old, *value)))


def _assign_elements(shell: Shell, assignment: syntax.Assignment, before: Variable | None) -> None:
    assert assignment.elements is not None
    keyed = [e for e in assignment.elements if isinstance(e, syntax.Assignment)]
    if isinstance(before, Mapped) or any(
        e.key is not None and not re.fullmatch(r"\d+", e.key.plain() or "") for e in keyed
    ):
        items = {**before.items} if isinstance(before, Mapped) and assignment.appends else {}
        for element in keyed:
            assert element.key is not None
            key = text(usual(scalar(shell, element.key)))
            items[key] = kept(shell, element.value)
        shell.set(assignment.name, Mapped(items))
        return
    listed = tuple(
        piece
        for element in assignment.elements
        for piece in (
            as_elements(shell, [element])
            if isinstance(element, syntax.Text)
            else array([kept(shell, element.value)])
        )
    )
    old: Value = ()
    if assignment.appends:
        if isinstance(before, Listed):
            old = before.value
        elif isinstance(before, Scalar) and before.value != NOTHING:
            old = array([before.value])
    shell.set(assignment.name, Listed((*old, *listed)))


def _assign_element(
    shell: Shell, assignment: syntax.Assignment, before: Variable | None, value: Value
) -> None:
    assert assignment.index is not None
    name = assignment.name
    if isinstance(before, Mapped):
        key = text(usual(scalar(shell, assignment.index)))
        old = before.items.get(key, ()) if assignment.appends else ()
        shell.set(name, Mapped({**before.items, key: (*old, *value)}))
        return
    index = reckoned(shell, assignment.index, name)
    listed: Value = ()
    if isinstance(before, Listed):
        listed = before.value
    elif isinstance(before, Scalar) and before.value != NOTHING:
        listed = array([before.value])

    def placed(pieces: Flat, number: Flat, new: Flat) -> Value:
        found = conditions.known(number)
        items = elements(pieces)
        if found is None or not -len(items) <= int(found[0]) <= len(items):
            why = f"${{{name}[@]}} is set where only a run could tell"
            unknown = (Piece(f"${{{name}[@]}}", assignment.line, unknown=why),)
            return as_array([*items, unknown])
        at = int(found[0])
        if at == len(items):
            return as_array([*items, new])
        items[at] = (*items[at], *new) if assignment.appends else new
        return as_array(items)

    shell.set(name, Listed(lifted(placed, listed, index, value)))


def declare(shell: Shell, command: syntax.Simple) -> None:
    first = command.words[0]
    assert isinstance(first, syntax.Text)
    builtin = first.plain() or ""
    flags = ""
    for item in command.words[1:]:
        if isinstance(item, syntax.Assignment):
            value = kept(shell, item.value)  # of the variable outside
            _make_local(shell, builtin, item.name)
            if "n" in flags and builtin not in ("export", "readonly"):
                shell.put(item.name, _alias(value, item))
                continue
            if "A" in flags and not isinstance(shell.get(item.name), Mapped):
                shell.set(item.name, Mapped({}))
            assign(shell, item, value)
            _export(shell, builtin, flags, item.name)
            continue
        for value in unsplit(shell, item):
            for pieces in fields(usual(value), shell.ifs()):
                made = text(pieces)
                if made.startswith("-"):
                    flags += made[1:]
                    continue
                name, equals, _ = made.partition("=")
                if not re.fullmatch(NAME, name):
                    if any(p.unknown and not p.unset for p in pieces):  # export $(xargs < .env)
                        shell.sourced.append(shell.line(command.line))
                    continue
                _make_local(shell, builtin, name)
                if "n" in flags and not equals:
                    shell.put(name, Alias(""))
                elif equals:
                    rest = after_equals(pieces)
                    shell.set(name, Scalar(plain_value(rest)))
                elif "A" in flags and shell.get(name) is None:
                    shell.set(name, Mapped({}))
                elif "a" in flags and shell.get(name) is None:
                    shell.set(name, Listed(()))
                elif builtin == "local":
                    shell.set(name, Scalar(()))
                _export(shell, builtin, flags, name)
    shell.ends(Holds(True))


def _alias(value: Value, assignment: syntax.Assignment) -> Variable:
    """``local -n NAME=OTHER``; of what is not known, or an element, it is no name that is read."""
    target = text(usual(value))
    if not any(piece.unknown for piece in usual(value)) and re.fullmatch(NAME, target):
        return Alias(target)
    why = f"${assignment.name} is another name of what is not known"
    return Scalar((Piece(f"${assignment.name}", assignment.line, unknown=why),))


def _make_local(shell: Shell, builtin: str, name: str) -> None:
    declares = builtin == "local" or builtin in ("declare", "typeset")
    if declares and shell.locals and name not in shell.locals[-1]:
        shell.locals[-1][name] = shell.variables.get(name)
        shell.put(name, None)


def _export(shell: Shell, builtin: str, flags: str, name: str) -> None:
    if builtin == "export" or "x" in flags:
        shell.exported.add(f"{name}()" if "f" in flags else name)
