"""Programs, and scripts in scripts: ``bash -c``, ``eval``, files that are sourced or run.

A program that is a shell with a script at hand is walked in its own variables; any other becomes
a command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from klplug.audit.shell import syntax
from klplug.audit.shell.branches import split_on
from klplug.audit.shell.command import Command
from klplug.audit.shell.expansion import fields_of
from klplug.audit.shell.scanner import SyntaxProblem, with_newlines
from klplug.audit.shell.state import MAX_DEPTH, MAX_LISTS, Changes, Listed, Scalar, Shell, outlives
from klplug.audit.shell.syntax import NAME
from klplug.audit.shell.values import (
    Flat,
    Piece,
    Value,
    Word,
    after_equals,
    array,
    decided,
    decisions,
    fields,
    number_of_runs,
    output,
    text,
    usual,
    word,
)

_MAX_FILE = 1_000_000
_HEIGHT = 6  # how many folders up from a script the files that it starts are looked for
# Programs that are asked something: whether they succeed is what the script wants to know.
_QUERIES = frozenset(
    (
        *("grep", "egrep", "fgrep", "which", "pgrep", "diff", "cmp", "nvidia-smi", "nc", "curl"),
        *("ping", "lsof", "python", "python3", "uv"),
    )
)
# What no program is called: "python train.py" in quotes, say, which is not taken to succeed.
_NO_NAME = re.compile(r"[\s{}=]")
_SHELL = re.compile(r"(?:.*/)?(?:ba|z|da|k)?sh")
_ENV = re.compile(r"(?:.*/)?(?:env|sudo)")
_SSH = re.compile(r"(?:.*/)?ssh")
_SSH_TAKES = re.compile(r"-\w*[BbcDEeFIiJLlmOopQRSWw]")  # an option whose value is the next word
_BATCH = ("sbatch", "qsub")
_BATCH_FILE = re.compile(r"[^-].*\.(?:sh|bash|sbatch|slurm|sub|pbs|job)")


def program(shell: Shell, values: list[Value], split: list[Flat], command: syntax.Simple) -> None:
    words = tuple(word(pieces) for pieces in split)
    texts = [w.text for w in words]
    line = shell.line(command.line)
    nested = _nested_script(shell, values, words)
    passed = _environment(words)
    before = {name: shell.get(name) for name in passed}
    for name, value in passed.items():
        shell.set(name, value)
    exported, shell.exported = shell.exported, shell.exported | passed.keys()
    if _remote(words):  # which has none of this shell's variables
        shell.exported = type(exported)()
    if nested is not None and shell.depth < MAX_DEPTH:
        _another_shell(shell, lambda: _read_value(shell, nested[0]), nested[1])
    elif shell.depth < MAX_DEPTH and (_ran_a_file(shell, words) or _ran_its_input(shell, words)):
        pass
    else:
        last_line = shell.line(shell.line_at(max(command.end - 1, 0)))
        shell.commands.append(
            Command(
                words,
                line,
                last_line if shell.fixed_line is None else line,
                not shell.unreached,
                not shell.undecided,
                command.end if shell.spans else None,
                tuple(values),
                shell.ifs(),
            )
        )
    shell.exported = exported
    for name, held in before.items():
        shell.set(name, held)
    shell.write((output(" ".join(texts)[:40]),))
    nameless = not words[0].unknown and _NO_NAME.search(texts[0]) is not None
    shell.program_ends(asked=nameless or texts[0] in _QUERIES)


def _nested_script(
    shell: Shell, values: Sequence[Value], words: Sequence[Word]
) -> tuple[Flat, Value] | None:
    """The script of ``bash -c SCRIPT NAME ARGUMENTS``, also behind a launcher, and its arguments.

    And that of ``sbatch --wrap SCRIPT``, and of ``ssh HOST SCRIPT``.
    """
    for at in range(len(words)):
        first, letters = _after_options(words, at)
        if "c" in letters and first < len(words):
            return _pieces_at(shell, values, first), fields_of(shell, values, first + 2)
    if words[0].text == "sbatch":
        for at in range(1, len(words)):
            if words[at].text.startswith("--wrap="):
                return after_equals(_pieces_at(shell, values, at)), ()
            if words[at - 1].text == "--wrap":
                return _pieces_at(shell, values, at), ()
    if 0 < _remote(words) == len(words) - 1:
        return _pieces_at(shell, values, len(words) - 1), ()
    return None


def _remote(words: Sequence[Word]) -> int:
    """Where the command of ``ssh OPTIONS HOST COMMAND`` begins; 0 where no ssh is started."""
    if not _SSH.fullmatch(words[0].text):
        return 0
    at = 1
    while at < len(words) and words[at].text.startswith("-"):
        at += 2 if _SSH_TAKES.fullmatch(words[at].text) else 1
    return at + 1


def _after_options(words: Sequence[Word], at: int) -> tuple[int, str]:
    """Where the options of a shell end, and their letters; nowhere where it is no shell."""
    if not _SHELL.fullmatch(words[at].text):
        return len(words) + 1, ""
    letters = ""
    at += 1
    while at < len(words):
        option = words[at].text
        if option in ("--", "-"):
            return at + 1, letters
        if not re.match(r"[-+]\w|--\w", option):
            break
        at += 1
        if option.startswith("--"):
            at += option in ("--rcfile", "--init-file")
        else:
            letters += option.strip("-+")
            at += option.count("o") + option.count("O")  # each takes the name of an option
    return at, letters


def _environment(words: Sequence[Word]) -> Changes:
    """What ``env NAME=VALUE PROGRAM`` gives its program."""
    found: Changes = {}
    at = next((at for at, w in enumerate(words) if _ENV.fullmatch(w.text)), len(words))
    for given in words[at + 1 :]:
        name, equals, value = given.text.partition("=")
        if equals and re.fullmatch(NAME, name):
            why = "; ".join(given.unknown) or None
            found[name] = Scalar((Piece(value, given.line or 0, unknown=why),))
        elif not given.text.startswith("-"):
            break
    return found


def _pieces_at(shell: Shell, values: Sequence[Value], index: int) -> Flat:
    split = [pieces for value in values for pieces in fields(usual(value), shell.ifs())]
    return split[index]


def _read_value(shell: Shell, pieces: Flat) -> None:
    """A script in a word; each of its words stands on the line of its own text."""
    # Arguments that nobody passes are empty, and not those of the other shell.
    pieces = tuple(p.with_text("") if p.unset and p.soft else p for p in pieces)
    pieces = _out_of_quotes(pieces)
    starts: list[int] = []
    offset = 0
    for piece in pieces:
        starts.append(offset)
        offset += len(piece.text)
    lines = [shell.line(piece.line) for piece in pieces]

    def line_at(position: int) -> int:
        at = 0
        for number, start in enumerate(starts):
            if start > position:
                break
            at = number
        return lines[at] if lines else 0

    shell.depth += 1
    spans, shell.spans = shell.spans, False
    count = len(shell.commands)
    try:
        shell.read(text(pieces), line_at)
    except SyntaxProblem as problem:
        shell.sourced.append(problem.line)
        del shell.commands[count:]
        shell.commands.append(
            Command(
                (word(pieces),), lines[0] if lines else 0, lines[-1] if lines else 0,
                not shell.unreached, not shell.undecided, None, (pieces,),
            )
        )  # fmt: skip
    shell.spans = spans
    shell.depth -= 1


# What stands in single quotes in a script, beside all else in which a quote means another thing.
_QUOTED = re.compile(r"""'(?P<single>[^']*)'|"(?:\\.|[^"\\])*"|\\.|(?<=\s)#[^\n]*""", re.DOTALL)


def _out_of_quotes(pieces: Flat) -> Flat:
    """The pieces of a script, in which single quotes hide nothing that is not known.

    The other shell finds there what the first one put in, and no ``$``.
    """
    if not any(piece.unknown for piece in pieces):
        return pieces
    script = "".join("x" * len(p.text) if p.unknown else p.text for p in pieces)
    hidden = [m.span() for m in _QUOTED.finditer(script) if m["single"] is not None]
    told = []
    at = 0
    for piece in pieces:
        within = piece.unknown and any(start < at < end for start, end in hidden)
        told.append(piece.with_text(f"'\"{piece.text}\"'") if within else piece)
        at += len(piece.text)
    return tuple(told)


def _another_shell(shell: Shell, walk: Callable[[], None], arguments: Value | None) -> None:
    """Another shell: it sees what is exported, and its changes are its own."""
    outer, journals = shell.variables, shell.journals
    shell.variables = {
        name: variable
        for name, variable in outer.items()
        if name in shell.exported or outlives(name)
    }
    if arguments is not None:
        shell.variables["@"] = Listed(arguments)
    shell.journals = [{}]
    shell.depth += 1
    flow = shell.flow
    walk()
    left = {name: held for name, held in shell.variables.items() if outlives(name)}
    shell.flow = flow
    shell.depth -= 1
    shell.variables, shell.journals = outer, journals
    shell.apply({name: held for name, held in left.items() if held is not outer.get(name)})


def _ran_a_file(shell: Shell, words: Sequence[Word]) -> bool:
    at_shell = next((at for at, w in enumerate(words) if _SHELL.fullmatch(w.text)), None)
    if at_shell is not None:
        first, letters = _after_options(words, at_shell)
        if "s" not in letters and first < len(words) and _run_file(shell, words, first):
            return True
    if words[0].text in _BATCH:
        # Of the files beside a script, which is submitted is not told from an option's.
        written = (at for at, w in enumerate(words) if shell.file(w.text) is not None)
        return any(_run_file(shell, words, at) for at in written)
    return words[0].text.endswith((".sh", ".bash")) and _run_file(shell, words, 0)


def _ran_its_input(shell: Shell, words: Sequence[Word]) -> bool:
    """``bash <<EOF``, ``echo SCRIPT | sbatch``, ``ssh HOST <<EOF``."""
    given = shell.given()
    if given is None or not is_script(given):
        return False
    arguments: Sequence[Word] = ()
    if words[0].text in _BATCH:
        if any(_BATCH_FILE.fullmatch(word.text) for word in words):
            return False
    elif _remote(words) != len(words):
        ends = (_after_options(words, at) for at in range(len(words)))
        reads = [first for first, letters in ends if first == len(words) or "s" in letters]
        if not reads:
            return False
        arguments = words[reads[0] :]
    shell.set("0<", Scalar(()))
    _another_shell(shell, lambda: evaluate(shell, given), _arguments(arguments))
    return True


def is_script(value: Value) -> bool:
    """Whether enough of a text is known to be read as a script."""
    return not any(p.unknown and not (p.text or p.unset) for p in usual(value))


def _run_file(shell: Shell, words: Sequence[Word], at: int) -> bool:
    """``bash FILE ARGUMENTS``, where the file is there, or is written by the script."""
    arguments = _arguments(words[at + 1 :])
    held = shell.file(words[at].text)
    if held is not None:
        if not is_script(held):
            return False
        _another_shell(shell, lambda: evaluate(shell, held), arguments)
        return True
    path = file_named(shell, words[at])
    if path is None or path in shell.reading:
        return False
    _another_shell(shell, lambda: read_file(shell, path, words[at].line or 0), arguments)
    return True


def _arguments(words: Sequence[Word]) -> Value:
    return array(
        [(Piece(w.text, w.line or 0, unknown="; ".join(w.unknown) or None, quoted=True),)
         for w in words]
    )  # fmt: skip


def file_named(shell: Shell, name: Word) -> Path | None:
    """The file of this name, from the script's folder or one above it."""
    if shell.folder is None:
        return None
    # "$DIR/common.sh": the unknown head may be the folder of the script.
    tail = re.sub(r"^(\$\{?\w+\}?|\$\(.*\)|`[^`]*`)/", "", name.text) if name.unknown else name.text
    if re.search(r"[$`\0]", tail) or not tail or len(tail) > 1000:
        return None
    here = shell.folder.resolve()
    folders = (here, *here.parents[:_HEIGHT])
    parts = Path(tail).parts
    places = [folder / tail for folder in folders]
    if Path(tail).is_absolute():
        # "/workspace/project/scripts/x.sh", where the author's checkout lies: it is here, too.
        ends = (parts[-number:] for number in range(len(parts) - 1, 1, -1))
        places = [Path(tail), *(folder.joinpath(*end) for end in ends for folder in folders)]
    for path in places:
        try:
            if path.is_file() and path.stat().st_size <= _MAX_FILE:
                return path.resolve()
        except OSError:
            return None
    return None


def read_file(shell: Shell, path: Path, line: int) -> None:
    try:
        content = path.read_bytes()
    except OSError:
        return
    if b"\0" in content:
        return
    shell.reading.append(path)
    fixed, shell.fixed_line = shell.fixed_line, shell.line(line)
    spans, shell.spans = shell.spans, False
    shell.depth += 1
    # bash says what it cannot read, and goes on with the script that asked for the file.
    try:
        shell.read(with_newlines(content.decode("utf-8", errors="replace")))
    except SyntaxProblem:
        shell.sourced.append(shell.line(line))
    shell.depth -= 1
    shell.spans, shell.fixed_line = spans, fixed
    shell.reading.pop()


def evaluate(shell: Shell, script: Value) -> None:
    found = list(decisions(script))
    if shell.depth >= MAX_DEPTH:
        return
    if not found or number_of_runs(found) > MAX_LISTS:
        pieces = usual(script)
        first = next((p for p in pieces if p.text or p.unknown), None)
        if first is not None and first.unknown and not first.unset:  # eval "$(...)"
            shell.sourced.append(shell.line(first.line))
        _read_value(shell, pieces)
        return
    split_on(shell, found[0], lambda taken: evaluate(shell, decided(script, taken)))
