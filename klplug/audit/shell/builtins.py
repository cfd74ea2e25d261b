"""Bash's builtins, and the few programs whose output is known from their arguments.

Each takes its words twice: as they were written, and split as they are if every condition goes its
usual way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from klplug.audit.shell import conditions, syntax
from klplug.audit.shell.assignment import arithmetic_command
from klplug.audit.shell.conditions import UNKNOWN, Holds, as_status
from klplug.audit.shell.expansion import fields_of, reckoned
from klplug.audit.shell.scripts import evaluate, file_named, is_script, program, read_file
from klplug.audit.shell.state import MAX_DEPTH, MAX_ROUNDS, Listed, Mapped, Scalar, Shell
from klplug.audit.shell.syntax import NAME
from klplug.audit.shell.values import (
    NOTHING,
    Flat,
    Piece,
    Value,
    array,
    as_array,
    decisions,
    elements,
    fields,
    is_counted,
    joined,
    lifted,
    output,
    plain_value,
    separator,
    text,
    usual,
    word,
)


def _true(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    shell.ends(Holds(True))


def _false(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    shell.ends(Holds(False))


def _test(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    line = shell.line(command.line)
    end = -1 if text(split[0]) == "[" else None

    def tested(words: Sequence[Flat]) -> Value:
        return as_status(conditions.test(words[:end], shell.is_set), line)

    if decisions(*values):
        listed = fields_of(shell, values, 1)
        shell.set("?", Scalar(lifted(lambda pieces: tested(elements(pieces)), listed)))
    else:
        shell.set("?", Scalar(tested(split[1:])))


def _echo(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    shell.ends(Holds(True))
    if not isinstance(shell.get("1>"), Scalar) or shell.silent:
        return

    def written(pieces: Flat) -> Value:
        words = elements(pieces)
        newline, escapes = True, False
        while words and re.fullmatch(r"-[neE]+", text(words[0])):
            newline = newline and "n" not in text(words[0])
            escapes = escapes or "e" in text(words[0])
            words = words[1:]
        if escapes:
            words = [
                tuple(p if p.unknown else p.with_text(_unescaped(p.text)) for p in element)
                for element in words
            ]
        made = joined(words, " ", command.line)
        return (*made, Piece("\n", command.line)) if newline else made

    shell.write(lifted(written, fields_of(shell, values, 1)))


def _printf(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    shell.ends(Holds(True))
    texts = _texts(split)

    def written(pieces: Flat) -> Value:
        words = elements(pieces)
        if words and text(words[0]) == "--":
            words = words[1:]
        return _printed(words, command.line)

    if texts[1:2] == ["-v"] and len(texts) > 3:
        shell.set(texts[2], Scalar(lifted(written, fields_of(shell, values, 3))))
    elif isinstance(shell.get("1>"), Scalar) and not shell.silent:
        shell.write(lifted(written, fields_of(shell, values, 1)))


def _cat(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    given = shell.given()
    if len(split) == 1 and given is not None:
        shell.set("0<", Scalar(()))
        shell.write(lifted(lambda p: tuple(q.written(False, False) for q in p), given))
        shell.ends(Holds(True))
        return
    program(shell, values, split, command)


def _path(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    """``basename`` and ``dirname``."""
    name = text(split[0])

    def written(pieces: Flat) -> Value:
        words = elements(pieces)
        found = [conditions.known(w) for w in words]
        if not words or any(f is None for f in found) or len(words) > 2:
            return (output(name),)
        texts = [f[0] for f in found if f is not None]
        if any(t.startswith("-") for t in texts):
            return (output(name),)
        path = texts[0].rstrip("/") or "/"
        if name == "dirname":
            head, slash, _ = path.rpartition("/")
            made = head.rstrip("/") or ("/" if slash else ".")
        else:
            made = path.rpartition("/")[2] or "/"
            if len(texts) == 2 and made != texts[1]:
                made = made.removesuffix(texts[1])
        return (Piece(made + "\n", command.line, soft=any(f[1] for f in found if f)),)

    shell.write(lifted(written, fields_of(shell, values, 1)))
    shell.ends(Holds(True))


def _seq(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    def written(pieces: Flat) -> Value:
        texts = [text(w) for w in elements(pieces)]
        if not all(re.fullmatch(r"-?\d+", t) for t in texts) or not 1 <= len(texts) <= 3:
            return (output("seq"),)
        first = int(texts[0]) if len(texts) > 1 else 1
        step = int(texts[1]) if len(texts) == 3 else 1
        last = int(texts[-1])
        if step == 0:
            return (output("seq"),)
        numbers = range(first, last + (1 if step > 0 else -1), step)[: MAX_ROUNDS + 1]
        return (Piece("".join(f"{n}\n" for n in numbers), command.line),)

    shell.write(lifted(written, fields_of(shell, values, 1)))
    shell.ends(Holds(True))


def _read(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    texts = _texts(split)[1:]
    is_array = raw = elsewhere = False
    end = "\n"
    names: list[str] = []
    at = 0
    while at < len(texts):
        if option := re.fullmatch(r"-([aers]*)(?:([dnNptui])(.*))?", texts[at], re.DOTALL):
            flags, takes, of = option.groups("")
            is_array = is_array or "a" in flags
            raw = raw or "r" in flags
            elsewhere = elsewhere or takes in [*"nNu"]
            if takes and not of:
                at += 1
                of = texts[at] if at < len(texts) else ""
            end = of[:1] if takes == "d" else end
        elif texts[at] or names:
            names.append(texts[at])
        at += 1
    names = [n for n in names if re.fullmatch(NAME, n)] or ["REPLY"]
    given = None if elsewhere else shell.given()
    ifs = shell.ifs()
    # Of a whole text what is not known stays where it is; of its lines and fields it may be many.
    whole = not end and (is_array or len(names) == 1)
    hidden = given is None or any(p.unknown and not p.unset for p in usual(given))
    if given is None or (hidden and not whole):
        for name in names:
            why = f"${name} is read when the script runs"
            read = Piece(f"${name}", shell.line(command.line), splits=is_array, unknown=why)
            unknown: Value = (read,)
            shell.set(name, Listed(array([unknown])) if is_array else Scalar(unknown))
        shell.ends(UNKNOWN)
        return
    line, rest, status = (
        lifted(lambda p: _line(p, end, raw)[part], given)  # noqa: B023
        for part in range(3)
    )
    shell.set("0<", Scalar(rest))
    if not raw:
        line = lifted(_without_backslashes, line)
    if is_array:
        split_line = lifted(
            lambda p: as_array(fields(tuple(q.written(True, q.quoted) for q in p), ifs)), line
        )
        shell.set(names[0], Listed(split_line))
    else:
        for at, name in enumerate(names):
            last = at == len(names) - 1
            value = lifted(lambda p: _nth_field(p, at, last, ifs), line)  # noqa: B023
            shell.set(name, Scalar(plain_value(value)))
    shell.set("?", Scalar(status))


def _mapfile(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    texts = _texts(split)[1:]
    name = next((t for t in reversed(texts) if re.fullmatch(NAME, t)), "MAPFILE")
    given = shell.given()
    if given is not None:
        shell.set("0<", Scalar(()))
    trims = any(re.fullmatch(r"-\w*t\w*", t) for t in texts)
    if given is None or any(p.unknown and not p.unset for p in usual(given)) or not trims:
        listed = f"${{{name}[@]}}"
        why = f"{listed} is read when the script runs"
        unknown: Value = (Piece(listed, shell.line(command.line), splits=True, unknown=why),)
        shell.set(name, Listed(array([unknown])))
    else:
        shell.set(name, Listed(lifted(_lines, given)))
    shell.ends(Holds(True))


def _shift(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    variable = shell.get("@")
    number = text(split[1]) if len(split) > 1 else "1"
    if isinstance(variable, Listed) and number.isdigit():
        by = int(number)

        def shifted(pieces: Flat) -> Value:
            return as_array(elements(pieces)[by:]) if by <= len(elements(pieces)) else pieces

        def status(pieces: Flat) -> Value:
            return as_status(Holds(by <= len(elements(pieces)) or not is_counted(pieces)))

        shell.set("?", Scalar(lifted(status, variable.value)))
        shell.set("@", Listed(lifted(shifted, variable.value)))
    else:
        shell.ends(Holds(False, soft=True))


def _set(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    texts = _texts(split)
    shell.ends(Holds(True))
    for at, word_text in enumerate(texts[1:], start=1):
        if word_text == "--" or not word_text.startswith(("-", "+")):
            if word_text != "--" and texts[at - 1].endswith("o"):
                continue
            shell.set("@", Listed(fields_of(shell, values, at + (word_text == "--"))))
            return
        if re.fullmatch(r"-\w*a\w*", word_text):
            shell.exported |= {name for name in shell.variables if name.isidentifier()}


def _unset(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    texts = _texts(split)[1:]
    for name in texts:
        element = re.fullmatch(rf"({NAME})\[(.+)\]", name)
        if element is not None and element[2] not in "@*":
            _unset_element(shell, element[1], element[2], command.line)
        elif element is not None:
            shell.set(element[1], Scalar(NOTHING))
        elif re.fullmatch(NAME, name) and "-n" in texts:
            shell.put(name, Scalar(NOTHING))
        elif re.fullmatch(NAME, name):
            is_function = shell.get(name) is None or "-f" in texts
            if is_function and shell.get(f"{name}()") is not None:
                shell.set(f"{name}()", None)
            else:
                shell.set(name, Scalar(NOTHING))
    shell.ends(Holds(True))


def _unset_element(shell: Shell, name: str, index: str, line: int) -> None:
    variable = shell.get(name)
    if isinstance(variable, Mapped):
        key = index.strip("\"'")
        shell.set(name, Mapped({k: v for k, v in variable.items.items() if k != key}))
        return
    literal = syntax.Text((syntax.Literal(index, line, False),), line, (0, 0))
    number = reckoned(shell, literal, f"{name}[{index}]")

    def kept(pieces: Flat, number: Flat) -> Value:
        found, items = conditions.known(number), elements(pieces)
        last = len(items) - 1
        if found is not None and is_counted(pieces):
            at = int(found[0]) + (len(items) if int(found[0]) < 0 else 0)
            if not 0 <= at < last:
                return as_array(items[:last]) if at == last else pieces
        written = f"${{{name}[@]}}"
        why = f"an element of {written} is unset (line {line})"
        return array([(Piece(written, line, splits=True, unknown=why),)])

    if isinstance(variable, Listed):
        shell.set(name, Listed(lifted(kept, variable.value, number)))
    elif isinstance(variable, Scalar) and text(usual(number)) == "0":
        shell.set(name, Scalar(NOTHING))


def _let(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    for pieces in split[1:]:
        literal = syntax.Literal(text(pieces), command.line, False)
        arithmetic_command(shell, syntax.Text((literal,), command.line, (0, 0)))


def _eval(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    arguments = fields_of(shell, values, 1)
    script = lifted(lambda pieces: joined(elements(pieces), " ", command.line), arguments)
    shell.ends(Holds(True))
    evaluate(shell, script)


def _source(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    line = shell.line(command.line)
    shell.ends(Holds(True))
    named = word(split[1]) if len(split) > 1 else None
    held = None if named is None else shell.file(named.text)
    path = file_named(shell, named) if named is not None and held is None else None
    known = path is not None or (held is not None and is_script(held))
    if not known or path in shell.reading or shell.depth >= MAX_DEPTH:
        if not known:
            shell.sourced.append(line)
        shell.program_ends()
        return
    outer = shell.get("@")
    if len(split) > 2:
        shell.set("@", Listed(fields_of(shell, values, 2)))
    if held is not None:
        evaluate(shell, held)
    elif path is not None:
        read_file(shell, path, line)
    if len(split) > 2:
        shell.set("@", outer)
    if shell.flow == "return":
        shell.flow = ""


def _leave(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    name = text(split[0])
    if len(split) > 1 and name in ("return", "exit"):
        found = conditions.known(split[1])
        shell.ends(UNKNOWN if found is None else Holds(found[0] == "0", found[1]))
    elif name in ("break", "continue"):
        shell.ends(Holds(True))
    shell.flow = name


def _exec(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    if len(split) > 1:
        _without_first(shell, values, split, command)
        shell.flow = "exit"


def _without_first(
    shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple
) -> None:
    """``exec``, ``command``, ``builtin``: the command that follows."""
    rest = values[1:] if len(list(fields(usual(values[0]), shell.ifs()))) == 1 else [*(split[1:])]
    name = text(split[1])
    builtin = BUILTINS.get(name)
    if builtin is not None:
        builtin(shell, list(rest), split[1:], command)
    else:
        program(shell, list(rest), split[1:], command)


def _command(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    if len(split) > 1 and text(split[1]).startswith("-"):
        shell.write((output("command"),))
        shell.ends(UNKNOWN)
    elif len(split) > 1:
        _without_first(shell, values, split, command)


def _query(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    shell.write((output(text(split[0])),))
    shell.ends(UNKNOWN)


def _getopts(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    own = not isinstance(shell.get("@"), Listed)
    shell.ends(Holds(False, soft=True) if own else UNKNOWN)


def _nothing(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    if text(split[0]) in ("pwd", "ulimit", "umask", "trap", "shopt", "jobs", "dirs"):
        shell.write((output(text(split[0])),))
    shell.program_ends()


_Builtin: TypeAlias = "Callable[[Shell, list[Value], list[Flat], syntax.Simple], None]"
BUILTINS: dict[str, _Builtin] = {
    **{":": _true, "true": _true, "false": _false},
    **{"[": _test, "test": _test},
    **{"echo": _echo, "printf": _printf, "cat": _cat},
    **{"basename": _path, "dirname": _path, "seq": _seq},
    **{"read": _read, "mapfile": _mapfile, "readarray": _mapfile},
    **{"shift": _shift, "set": _set, "unset": _unset},
    **{"let": _let, "eval": _eval},
    **{"source": _source, ".": _source},
    **dict.fromkeys(("exit", "return", "break", "continue"), _leave),
    **{"exec": _exec, "command": _command, "builtin": _command},
    **{"type": _query, "hash": _query, "getopts": _getopts},
    **dict.fromkeys(
        (
            *("cd", "pushd", "popd", "pwd", "dirs", "wait", "trap", "ulimit", "umask", "shopt"),
            *("jobs", "disown", "kill", "alias", "bg", "fg", "times"),
        ),
        _nothing,
    ),
}


def _texts(split: Sequence[Flat]) -> list[str]:
    return [text(pieces) for pieces in split]


def _unescaped(written: str) -> str:
    return re.sub(
        r"\\([ntr\\])", lambda m: {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}[m[1]], written
    )


def _printed(words: Sequence[Flat], line: int) -> Value:
    """``printf``: its format, used again until no argument is left."""
    if not words or any(p.unknown for p in words[0]):
        return (output("printf"),)
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
                return (output("printf"),)
            try:
                value = found[0] if match[4] == "s" else int(found[0] or "0")
                made.append(Piece(match[0].replace("i", "d") % value, line, soft=found[1]))
            except ValueError:
                return (output("printf"),)
        made.append(Piece(form[at:], line))
        if not arguments or at == 0:
            return tuple(made)


def _line(pieces: Flat, end: str, raw: bool) -> tuple[Value, Value, Value]:
    """A line, what is left after it, and whether it has an end."""
    escaped = False
    for number, piece in enumerate(pieces):
        for at, character in enumerate("" if piece.unknown else piece.text):
            if character == end and not escaped:
                line = (*pieces[:number], piece.with_text(piece.text[:at]))
                rest = (piece.with_text(piece.text[at + 1 :]), *pieces[number + 1 :])
                return line, rest, as_status(Holds(True))
            escaped = not raw and character == "\\" and not escaped
    return pieces, (), as_status(Holds(False))


def _without_backslashes(pieces: Flat) -> Value:
    return tuple(
        p if p.unknown else p.with_text(re.sub(r"\\(?:\n|(.))", r"\1", p.text)) for p in pieces
    )


def _lines(pieces: Flat) -> Value:
    items: list[list[Piece]] = [[]]
    for piece in pieces:
        if piece.unknown:
            items[-1].append(piece)
            continue
        first, *rest = piece.text.split("\n")
        items[-1].append(piece.with_text(first))
        items += [[piece.with_text(line)] for line in rest]
    if items and not any(p.text for p in items[-1]):
        items.pop()
    return as_array([tuple(item) for item in items])


def _nth_field(pieces: Flat, at: int, last: bool, ifs: str) -> Value:
    """What ``read`` gives its n-th name: a field, or for the last one all that is left."""
    if at == 0 and last:
        return _stripped(pieces, ifs)
    if any(piece.unknown for piece in pieces):
        return (Piece("", unknown="it is read from what is not known"),)
    blanks = "".join(c for c in ifs if c.isspace())
    rest = text(pieces).strip(blanks) if blanks else text(pieces)
    line = pieces[0].line if pieces else 0
    pattern = separator(ifs)
    for _ in range(at):
        match = pattern.search(rest) if pattern else None
        rest = rest[match.end() :] if match else ""
    if not last and pattern and (match := pattern.search(rest)):
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
        kept[-1] = kept[-1].with_text(kept[-1].text.rstrip(blanks))
        if kept[-1].text:
            break
        kept.pop()
    return tuple(kept)
