"""Expansion: what a written word becomes, from parameters, substitutions and arithmetic.

Sources: POSIX.1-2017, "Shell Command Language", 2.6, and the manual of bash 5.2, 3.5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from klplug.audit.shell import conditions, syntax
from klplug.audit.shell.arithmetic import NotKnown, Reckoning
from klplug.audit.shell.braces import brace_words
from klplug.audit.shell.patterns import regex, without
from klplug.audit.shell.state import MAX_DEPTH, Alias, Listed, Mapped, Scalar, Shell, is_file
from klplug.audit.shell.values import (
    MAX_TEXT,
    NOTHING,
    TOO_LONG,
    Choice,
    Flat,
    Piece,
    Value,
    array,
    as_array,
    decisions,
    element_at,
    elements,
    fields,
    flat,
    is_counted,
    joined,
    lifted,
    output,
    plain_value,
    reason,
    text,
    usual,
)


def _substitution(shell: Shell, part: syntax.Substitution) -> Value:
    """``$(...)``: what builtins write is known; of a program, nothing is."""
    written: list[Value] = []
    status = shell.get("?")

    def run() -> None:
        if isinstance(part.body, syntax.Simple) and not part.body.words:
            shell.write((output("a file"),))
        shell.depth += 1
        if shell.depth < MAX_DEPTH:
            shell.run(part.body)
        shell.depth -= 1

    def walk() -> None:
        shell.set("0<", None)
        written.append(shell.with_stream("1>", (), run))

    changes, _ = shell.trial(walk)
    shell.apply({name: held for name, held in changes.items() if is_file(name)})
    shell.set("?", status)
    line = shell.line(part.line)

    def trimmed(pieces: Flat) -> Value:
        if any(piece.unknown and not piece.unset and not piece.text for piece in pieces):
            why = f"{part.written} is the output of a command, which is not run"
            return (Piece(part.written, line, quoted=part.quoted, unknown=why),)
        kept = list(pieces)
        while kept and not kept[-1].unknown and not kept[-1].text.rstrip("\n"):
            kept.pop()
        if kept and not kept[-1].unknown:
            kept[-1] = kept[-1].with_text(kept[-1].text.rstrip("\n"))
        return tuple(kept)

    return _expanded(lifted(trimmed, written[0]), part.quoted)


def unsplit(shell: Shell, written: syntax.Text) -> list[Value]:
    """A word after brace expansion, not split yet."""
    first = written.parts[0] if written.parts else None
    if len(written.parts) == 1 and isinstance(first, syntax.Literal) and "{" not in first.text:
        span = written.span if shell.spans else None
        return [(Piece(first.text, shell.line(first.line), quoted=first.quoted, span=span),)]
    words = brace_words(written.parts)
    stands = isinstance(first, syntax.Literal) or (
        isinstance(first, syntax.Parameter) and not first.is_list
    )
    if not (shell.spans and len(words) == 1 and stands):
        return [value_of(shell, parts) for parts in words]
    return [
        tuple(
            p.written(p.splits, p.quoted, written.span) if isinstance(p, Piece) and not p.end else p
            for p in value_of(shell, words[0], written.span)
        )
    ]


def as_elements(shell: Shell, words: Sequence[syntax.Text], quotes: bool = False) -> Value:
    """Words split into the elements of an array; with ``quotes`` told of what is quoted."""
    values = [value for written in words for value in unsplit(shell, written)]
    return fields_of(shell, values, quotes=quotes)


def fields_of(shell: Shell, values: Sequence[Value], skip: int = 0, quotes: bool = False) -> Value:
    ifs = shell.ifs()
    listed: Value = tuple(
        piece
        for value in values
        for piece in lifted(lambda pieces: as_array(fields(pieces, ifs), quotes), value)
    )
    if skip:
        return lifted(lambda pieces: as_array(elements(pieces)[skip:]), listed)
    return listed


def kept(shell: Shell, written: syntax.Text) -> Value:
    """What a variable keeps of a word."""
    if len(written.parts) > MAX_TEXT:
        return (TOO_LONG,)
    return plain_value(scalar(shell, written, keeps=True))


def scalar(shell: Shell, written: syntax.Text, keeps: bool = False) -> Value:
    """A text that is not split: a value, a pattern, the subject of a case."""
    value = value_of(shell, written.parts, keeps=keeps)
    if any(isinstance(p, syntax.Parameter) and p.is_list for p in written.parts):
        value = lifted(lambda pieces: _with_blanks(pieces, written.line), value)
    if keeps:
        return value
    return tuple(p.written(False, p.quoted) if isinstance(p, Piece) else p for p in value)


def value_of(
    shell: Shell,
    parts: Sequence[syntax.Part],
    span: tuple[int, int] | None = None,
    keeps: bool = False,
) -> Value:
    """What the parts of a word become.

    Args:
        span: where they stand, if it is one place.
        keeps: a variable keeps them: whether they are quoted is of no account.
    """
    pieces: list[Piece | Choice] = []
    for at, part in enumerate(parts):
        match part:
            case syntax.Literal():
                quoted = part.quoted and not keeps
                pieces.append(Piece(part.text, shell.line(part.line), quoted=quoted, span=span))
            case syntax.Parameter():
                made = _parameter(shell, part, keeps)
                if part.is_list and at + 1 < len(parts):
                    # What follows belongs to the last element.
                    made = lifted(lambda p: p[:-1] if p and p[-1].end else p, made)
                pieces += made
            case syntax.Substitution():
                pieces += _substitution(shell, part)
            case syntax.Arithmetic():
                number = reckoned(shell, part.expression, part.written)
                pieces += _expanded(number, part.quoted)
            case syntax.Opaque():
                line = shell.line(part.line)
                pieces.append(Piece(part.written, line, quoted=True, unknown=part.reason))
    return tuple(pieces)


def _unset(shell: Shell, part: syntax.Parameter, soft: bool = False) -> Value:
    why = f"{part.written} is not set in the script"
    line = shell.line(part.line)
    return (Piece(part.written, line, unknown=why, unset=True, soft=soft),)


def _parameter(shell: Shell, part: syntax.Parameter, keeps: bool = False) -> Value:
    if part.indirect and not (part.index is not None and part.index.plain() in ("@", "*")):
        return _indirect(shell, part)
    if part.is_list:
        return _listing(shell, part)
    if part.length:
        return _expanded(
            lifted(lambda p: _length(shell, p, part), _looked_up(shell, part)), part.quoted
        )
    return _expanded(_acted(shell, _looked_up(shell, part), part), part.quoted, keeps)


def _indirect(shell: Shell, part: syntax.Parameter) -> Value:
    alias = shell.variables.get(part.name)
    if isinstance(alias, Alias):
        return _expanded((Piece(alias.target, shell.line(part.line)),), part.quoted)

    def followed(pieces: Flat) -> Value:
        name = conditions.known(pieces)
        if name is None or not re.fullmatch(r"\w+", name[0]):
            return _not_computed(part)
        return _parameter(shell, replace(part, name=name[0], indirect=False))

    return lifted(followed, _looked_up(shell, replace(part, action="", argument=None)))


def _length(shell: Shell, pieces: Flat, part: syntax.Parameter) -> Value:
    found = conditions.known(pieces)
    if found is None:
        return _not_computed(part, pieces)
    return (Piece(str(len(found[0])), part.line),)


def _number(pieces: Flat, part: syntax.Parameter, own: bool) -> Value:
    """How many elements there are."""
    if not is_counted(pieces):
        return _not_computed(part, pieces)
    return (Piece(str(len(elements(pieces))), part.line, soft=own),)


def _looked_up(shell: Shell, part: syntax.Parameter) -> Value:
    name = part.name
    if name.isdigit() and name != "0":
        variable = shell.get("@")
        if not isinstance(variable, Listed):
            return _unset(shell, part, soft=True)
        at = int(name) - 1
        return lifted(lambda pieces: _element(pieces, at, part), variable.value)
    if name == "#":
        own = not isinstance(shell.get("@"), Listed)
        return lifted(lambda pieces: _number(pieces, part, own), shell.arguments())
    if name == "?":
        return tuple(
            replace(p, text=p.text or "0", unknown=None, soft=True)
            if isinstance(p, Piece) and p.unknown
            else p
            for p in shell.last_status()
        )
    if not re.fullmatch(syntax.NAME, name):
        why = f"{part.written} is known to a shell alone"
        return (Piece(part.written, shell.line(part.line), unknown=why),)
    variable = shell.get(name)
    if variable is None or isinstance(variable, (Alias, syntax.Function)):
        return _unset(shell, part)
    if isinstance(variable, Scalar):
        return variable.value if part.index is None or part.index.plain() == "0" else ()
    if isinstance(variable, Mapped):
        key = "0" if part.index is None else text(usual(scalar(shell, part.index)))
        found = variable.items.get(key)
        return NOTHING if found is None else found
    index = (Piece("0"),) if part.index is None else reckoned(shell, part.index, part.written)

    def element(pieces: Flat, number: Flat) -> Value:
        found = conditions.known(number)
        if found is None:
            return _not_computed(part)
        return _element(pieces, int(found[0]), part)

    return lifted(element, variable.value, index)


def _element(pieces: Flat, at: int, part: syntax.Parameter) -> Value:
    before = elements(pieces)[: at if at >= 0 else None]
    if not all(map(is_counted, before)):
        return _not_computed(part, pieces)
    return element_at(pieces, at) or NOTHING


def _listing(shell: Shell, part: syntax.Parameter) -> Value:
    """``$@``, ``${A[@]}`` and the same with an operator."""
    star = part.joins
    own = False
    if part.name in "@*":
        listed = shell.arguments()
        own = not isinstance(shell.get("@"), Listed)
    else:
        variable = shell.get(part.name)
        match variable:
            case Listed():
                listed = variable.value
            case Scalar():
                listed = () if variable.value == NOTHING else array([variable.value])
            case Mapped():
                listed = array([*variable.items.values()])
                if part.indirect:
                    listed = array([(Piece(key, part.line),) for key in variable.items])
            case _:
                listed, own = (), True
        if part.indirect and isinstance(variable, Listed):
            listed = lifted(
                lambda p: array([(Piece(str(n)),) for n in range(len(elements(p)))]), listed
            )
    if part.length:
        return lifted(lambda p: _number(p, part, own), listed)
    if part.action in (":-", "-", ":+", "+", ":?", "?", ":=", "="):
        nothing = () if not own else (Piece("", unset=True, unknown="", soft=True),)

        def acted(pieces: Flat) -> Value:
            if elements(pieces):
                if part.action.endswith("+"):
                    return _default(shell, part)
                return _listed(pieces, part.quoted)
            if part.action.endswith(("+", "?")):
                return nothing if part.quoted and not own else ()
            return _default(shell, part)

        return lifted(acted, listed)
    if part.action == ":":
        listed = lifted(lambda p: _slice(shell, p, part), listed)
    elif part.action:
        listed = lifted(lambda p: array([_edited(shell, e, part) for e in elements(p)]), listed)
    if star and part.quoted:
        ifs = shell.ifs()

        def one(pieces: Flat) -> Value:
            made = joined(elements(pieces), ifs[:1], part.line)
            return tuple(p.written(False, True) for p in made)

        return lifted(one, listed)
    return _listed(listed, part.quoted)


def _slice(shell: Shell, pieces: Flat, part: syntax.Parameter) -> Value:
    bounds = _bounds(shell, part)
    if bounds is None or not is_counted(pieces):
        return array([_not_computed(part)])
    items = elements(pieces)
    start, count = bounds
    if part.name in "@*":
        start = max(start - 1, 0) if start > 0 else 0
    start = start if start >= 0 else max(len(items) + start, 0)
    return as_array(items[start : None if count is None else start + count])


def _bounds(shell: Shell, part: syntax.Parameter) -> tuple[int, int | None] | None:
    assert part.argument is not None
    written = text(usual(scalar(shell, part.argument)))
    first, colon, second = written.partition(":")
    try:
        start = Reckoning(first, shell.number_text).number
        return start, Reckoning(second, shell.number_text).number if colon else None
    except NotKnown:
        return None


def _acted(shell: Shell, value: Value, part: syntax.Parameter) -> Value:
    """``${X:-default}`` and its kin."""
    action = part.action
    if not action:
        return value
    if action in (":-", "-", ":=", "=", ":+", "+", ":?", "?"):
        return lifted(lambda pieces: _alternative(shell, pieces, part), value)
    if action == ":":
        return lifted(lambda pieces: _substring(shell, pieces, part), value)
    return lifted(lambda pieces: _edited(shell, pieces, part), value)


def _alternative(shell: Shell, pieces: Flat, part: syntax.Parameter) -> Value:
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
        return _default(shell, part)
    if not missing:
        return pieces
    if action.endswith("?"):
        return pieces if unset else _unset(shell, part)
    default = _default(shell, part)
    if soft:
        default = tuple(
            replace(p, soft=True) if isinstance(p, Piece) and not p.end else p for p in default
        ) or (Piece("", soft=True),)
    if action.endswith("="):
        shell.set(part.name, Scalar(plain_value(default)))
    return default


def _default(shell: Shell, part: syntax.Parameter) -> Value:
    assert part.argument is not None
    made = value_of(shell, part.argument.parts)
    if part.quoted:
        return made
    # Unquoted, blanks in it part words.
    return tuple(
        p.written(True, False, p.span)
        if isinstance(p, Piece) and not p.quoted and not p.unknown and not p.end
        else p
        for p in made
    )


def _substring(shell: Shell, pieces: Flat, part: syntax.Parameter) -> Value:
    found, bounds = conditions.known(pieces), _bounds(shell, part)
    if found is None or bounds is None:
        return _not_computed(part, pieces)
    start, count = bounds
    whole = found[0]
    start = start if start >= 0 else len(whole) + start
    if start < 0:
        return ()
    end = len(whole) if count is None else start + count if count >= 0 else len(whole) + count
    return (Piece(whole[start:end], shell.line(part.line), soft=found[1]),)


def _edited(shell: Shell, pieces: Flat, part: syntax.Parameter) -> Value:
    """``${X%pattern}``, ``${X/pattern/text}``, ``${X^^}``."""
    found = conditions.known(pieces)
    action = part.action
    assert part.argument is not None
    pattern_pieces = scalar(shell, part.argument)
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
            turn(c) if (len(action) == 2 or at == 0) and (one is None or one.fullmatch(c)) else c
            for at, c in enumerate(whole)
        ]
        return (Piece("".join(letters), shell.line(part.line), soft=found[1]),)
    if action[0] in "#%":
        whole = without(whole, pattern, action)
        return (Piece(whole, shell.line(part.line), soft=found[1]),)
    second = () if part.second is None else scalar(shell, part.second)
    if "&" in text(usual(second)):  # what is matched, from bash 5.2 on
        return _not_computed(part)
    matcher = regex(pattern)
    unset = any(piece.unset for piece in pieces)
    if not text(flat(pattern_pieces)) and (unset or action not in ("/#", "/%")):
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
    return (*made, Piece(whole[at:], shell.line(part.line), soft=found[1]))


def reckoned(
    shell: Shell, expression: syntax.Text, written: str, assigned: str | None = None
) -> Value:
    """The value of an expression, or what it assigns to a variable."""
    made = tuple(
        p.written(p.splits, p.quoted) if isinstance(p, Piece) else p
        for p in value_of(shell, expression.parts)
    )
    names = dict.fromkeys(re.findall(rf"(?<![\w$]){syntax.NAME}", text(usual(made))))
    values = {
        name: variable.value for name in names if isinstance(variable := shell.get(name), Scalar)
    }
    line = shell.line(expression.line)

    def reckoned(pieces: Flat, *numbers: Flat) -> Value:
        given = dict(zip(values, numbers, strict=True))
        soft = [piece.soft for piece in pieces]

        def value(name: str) -> str:
            if name not in given:
                return shell.number_text(name)
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


def _not_computed(part: syntax.Parameter, of: Flat = ()) -> Value:
    why = reason(of, f"{part.written} is worked out from what is not known")
    return (Piece(part.written, part.line, unknown=why),)


def _listed(value: Value, quoted: bool) -> Value:
    """Elements as they stand in a word: each a word of its own, or to be split further."""
    return tuple(
        Choice(p.decision, tuple(_listed(option, quoted) for option in p.options))
        if isinstance(p, Choice)
        else p
        if p.end
        # What is not known may be more than one element in quotes, too.
        else p.written(not quoted or (p.splits and bool(p.unknown)), quoted, p.span)
        for p in value
    )


def _expanded(value: Value, quoted: bool, keeps: bool = False) -> Value:
    """A value as a part of a word. What is known not to be set is nothing there, and set."""
    return tuple(
        p
        if keeps and p.is_plain
        else _part_of_a_word(p, quoted or p.quoted, keeps)
        if isinstance(p, Piece)
        else Choice(p.decision, tuple(_expanded(option, quoted, keeps) for option in p.options))
        for p in value
    )


def _part_of_a_word(p: Piece, quoted: bool, keeps: bool) -> Piece:
    if p.end:
        return p
    known = replace(p, unset=False) if p.unset and p.unknown is None else p
    return known.written(not quoted and not keeps, quoted and not keeps)


def _with_blanks(pieces: Flat, line: int) -> Value:
    """Elements where no word is split: one text, blanks between them."""
    made = [Piece(" ", line) if piece.end else piece for piece in pieces]
    return tuple(made[:-1] if pieces and pieces[-1].end else made)
