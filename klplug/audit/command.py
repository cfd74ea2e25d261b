"""From a file or a command line to the report on it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from klplug.audit.alternatives import bears, together
from klplug.audit.errors import AuditError, NoCommand
from klplug.audit.frameworks import configured_by, started_by
from klplug.audit.jobs import Block, blocks
from klplug.audit.report import Report, report
from klplug.audit.settings import Launch
from klplug.audit.shell import Command, Script, Word, with_newlines
from klplug.audit.tables import Table, beside, candidates, flattened, given
from klplug.hosting.host import Host, hosts

# Larger than any script; a data file given by mistake is not read to its end.
_MAX_BYTES = 10_000_000
# Where a shell's <(...) lies.
_OPENED = Path("/dev/fd")


def _accepted() -> str:
    *rest, last = [
        command
        for host in hosts().values()
        for command in (host.command, *([f"python -m {host.launcher}"] if host.launcher else []))
    ]
    return f"{', '.join(rest)}, or {last}" if rest else last


def audit(
    source: str | os.PathLike[str] | Sequence[str],
    *,
    host: str | None = None,
    host_version: str | None = None,
    command: int = 1,
    text: str | None = None,
) -> Report:
    """The report on a training command, which is read and never run.

    Args:
        source: a file (shell script, or YAML), or a command line as a sequence of words.
        host: a name in ``klplug.hosting.host.hosts()``; where it is given, other commands in the
            file are passed over.
        host_version: the release whose defaults and rules hold. By default the installed one, or
            the newest known one that has all settings of the command.
        command: which of several training commands in a file, counted from 1.
        text: what stands in the file, where somebody has read it already.

    Raises:
        AuditError: not a training command of any host, an unreadable file, an unknown release.
    """
    judged = _read(source, host, host_version, text)
    if not 1 <= command <= len(judged):
        name = _name(source)
        raise AuditError(f"{name}: command {command} of {len(judged)} does not exist")
    return judged[command - 1]()


def audits(
    source: str | os.PathLike[str] | Sequence[str],
    *,
    host: str | None = None,
    host_version: str | None = None,
    text: str | None = None,
) -> list[Report]:
    """The reports on every training command of a file, which is read once.

    Raises:
        AuditError: as ``audit``.
    """
    return [report() for report in _read(source, host, host_version, text)]


def _name(source: str | os.PathLike[str] | Sequence[str]) -> str:
    return str(Path(source)) if isinstance(source, (str, os.PathLike)) else "the command"


@dataclass(frozen=True)
class _Found:
    """One training command, in each way that it may come out."""

    host: Host
    ways: list[Launch]
    reached: bool = True
    script: Script | None = None
    block: Block | None = None


def _read(
    source: str | os.PathLike[str] | Sequence[str],
    host: str | None,
    host_version: str | None,
    text: str | None,
) -> list[Callable[[], Report]]:
    """For every training command, what makes its report."""
    if host is not None and host not in hosts():
        raise AuditError(f"host {host!r} is not known; there is {', '.join(hosts())}")
    found: list[_Found] = []
    commands: list[tuple[Word, ...]] = []
    name = _name(source)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.suffix == ".py":
            raise NoCommand(f"{name}: Python is not read; give the command that it starts after --")
        text = read(path) if text is None else text
        inside = [Block(text, None)]
        if path.suffix in (".yaml", ".yml"):
            inside = _job(text, host)
            if not inside:
                of_yaml = _of_yaml(path, text, host, host_version)
                return [lambda: of_yaml]
        for block in inside:
            script = _script(block.text, path)
            here = []
            # Commands that somebody must ask for come last.
            for at in sorted(script.commands, key=lambda command: not command.reached):
                launched = _launch(at.words, at, script, path.parent, block.text)
                if launched is not None:
                    ways = _ways(*launched, at)
                    here.append(_Found(launched[0], ways, at.reached, script, block))
                commands.append(at.words)
            if script.broken is not None and not here:
                raise AuditError(f"{name}: {script.broken}")
            found += here
    else:
        words = tuple(Word(str(word)) for word in source)
        text = " ".join(word.text for word in words)
        one = _launch(words, None, None, Path("."), text)
        found = [_Found(one[0], [one[1]])] if one is not None else []
        commands.append(words)
    found = [f for f in found if host is None or f.host.name == host]
    if not found:
        raise _why_none(name, commands)

    def report_on(number: int) -> Report:
        one = found[number]
        reading, command, ways = one.host.room("reading"), one.host.room("command"), one.ways
        script = one.script
        if script is not None and all(before.script is not script for before in found[:number]):
            lost = _unreached(script, ways, {key.partition(".")[0] for key in reading.ASPECTS})
            ways = [replace(way, unreached=lost, broken=script.broken) for way in ways]
        reports = [
            _report(one.host, command.parsed(way), host_version, way.folder, way.package)
            for way in ways
        ]
        done = together(reports, ways[0].conditions) if len(ways) > 1 else reports[0]
        if one.block is not None:
            done = replace(done, edits=one.block.in_file(done.edits))
        return replace(done, command=number + 1, commands=len(found), reached=one.reached)

    return [functools.partial(report_on, number) for number in range(len(found))]


def _job(text: str, name: str | None) -> list[Block]:
    """The scripts in a job's YAML that start a trainer; of a config file there are none."""
    starters = [host for host in hosts().values() if name in (None, host.name)]

    def starts(word: str) -> bool:
        return any(host.starts(word) for host in starters)

    if not any(map(starts, set(re.split(r"[\s\"';&|(),\[\]]+", text)))):
        return []
    configs = [host.room("command").is_config for host in starters if host.config]
    try:
        documents = list(yaml.safe_load_all(text))
        content = documents[0] if len(documents) == 1 else None
        if isinstance(content, dict) and any(is_config(content) for is_config in configs):
            return []
        return blocks(text, starts)
    except (yaml.YAMLError, RecursionError):
        return []  # said by who reads it as a config


def _script(text: str, path: Path) -> Script:
    try:
        return Script(text, path.parent)
    except AuditError as error:
        raise AuditError(f"{path}: {error}") from None


def _why_none(name: str, commands: Sequence[Sequence[Word]]) -> AuditError:
    """What a file has in the place of a command that is audited."""
    frameworks = (started_by(word.text for word in words) for words in commands)
    if (framework := next(filter(None, frameworks), None)) is not None:
        return AuditError(f"{name}: {framework}")
    if (other := next((word for words in commands for word in _others(words)), None)) is not None:
        return NoCommand(
            f"{name}: {other} is not audited: it has a trainer of its own; "
            f"klplug audits {_accepted()}"
        )
    return NoCommand(f"{name}: no training command; klplug audits {_accepted()}")


def read(path: Path) -> str:
    """The text of a script or a config file.

    Raises:
        AuditError: no file, or none with text.
    """
    try:
        # Nobody knows whether a pipe or a device ends; a shell's <(...) does.
        if path.exists() and not (path.is_file() or path.is_dir() or path.parent == _OPENED):
            raise AuditError(f"{path}: not a regular file; - reads standard input")
        with path.open("rb") as file:
            return read_from(file, str(path))
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror or error}") from None


def read_from(file: BinaryIO, name: str) -> str:
    """The text of an open file.

    Raises:
        AuditError: it has no text, or more than any script.
    """
    content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise AuditError(f"{name}: more than {_MAX_BYTES} bytes are no training script")
    if b"\0" in content:
        raise AuditError(f"{name}: not a text file")
    return with_newlines(content.decode("utf-8", errors="replace"))


def _launch(
    words: Sequence[Word], at: Command | None, script: Script | None, folder: Path, text: str
) -> tuple[Host, Launch] | None:
    """The training command among these words, behind whatever launcher, and whose it is."""
    found = _trainer(words)
    if found is None:
        return None
    host, index, foreign = found
    if not foreign and any(re.fullmatch(host.prints, w.text) for w in words[index + 1 :]):
        return None
    launch = Launch(
        tuple(words),
        index,
        folder,
        line=None if at is None else at.line,
        cut=None if script is None or at is None else script.cut_after(at),
        around=text,
        sourced=() if script is None else tuple(script.sourced),
        foreign=foreign,
    )
    return host, launch


def _trainer(words: Sequence[Word]) -> tuple[Host, int, bool] | None:
    """A host, which word starts the trainer, and whether that is a fork's."""
    for index, word in enumerate(words):
        host = _started_by(word.text)
        if host is not None:
            return None if _only_named(words[:index]) else (host, index, False)
    starts = [
        at
        for at, word in enumerate(words)
        if word.text.endswith(".py") or (at > 0 and words[at - 1].text in _MODULE)
    ]
    for host in hosts().values() if starts else ():
        first = next((at for at, word in enumerate(words) if host.marked(word.text)), 0)
        before = [at for at in starts if at < first and _STARTS.fullmatch(words[at].text)]
        # A file behind a flag is the flag's, unless there is no other.
        sure = [at for at in before if at == 0 or not _TAKES.fullmatch(words[at - 1].text)]
        if before:
            index = sure[-1] if sure else before[0]
            framework = started_by(word.text for word in words)
            no_trainer = framework or _NO_TRAINER.search(words[index].text)
            return None if no_trainer else (host, index, True)
    return None


def _only_named(before: Sequence[Word]) -> bool:
    """Whether a program before the trainer looks for it, or copies its file, and starts nothing."""
    for word in reversed(before):
        program = word.text.rpartition("/")[2]
        if _PYTHON.fullmatch(program):
            return False
        if program in _NO_LAUNCHERS:
            return True
    return False


_PYTHON = re.compile(r"(?:python|torchrun|deepspeed|accelerate)[\d.]*")
_NO_LAUNCHERS = frozenset(
    (
        *("pkill", "pgrep", "killall", "kill", "ps", "grep", "egrep", "fgrep", "rg", "ag", "find"),
        *("awk", "sed", "cat", "head", "tail", "less", "more", "wc", "ls", "diff", "cmp", "test"),
        *("cp", "mv", "rm", "ln", "touch", "chmod", "chown", "scp", "rsync", "tar", "zip", "git"),
        *("curl", "wget", "patch", "install", "dos2unix", "vi", "vim", "nano", "ruff", "black"),
    )
)
_MODULE = ("-m", "--module")
_TAKES = re.compile(r"--(?!module$)[^=]+")  # what may take the next word


@functools.lru_cache(maxsize=1000)
def _started_by(word: str) -> Host | None:
    """Whose trainer a word starts; the same few words stand in a thousand commands."""
    return next((host for host in hosts().values() if host.starts(word)), None)


_STARTS = re.compile(r"[\w./${}-]*[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?:\.py)?")
_NO_TRAINER = re.compile(r"(?:^|[._/])(?:main_)?(?:eval|gen|infer|serve|test)\w*(?:\.py)?$")


def _others(words: Sequence[Word]) -> list[str]:
    """What starts a trainer, or another program, of a host that klplug does not serve."""
    return [
        word.text
        for word in words
        if any(host.has_another(word.text) for host in hosts().values())
        and not _NO_TRAINER.search(word.text)
    ]


def _ways(host: Host, launch: Launch, at: Command) -> list[Launch]:
    """The command in each way that it may come out, as far as that bears on the report."""
    ways = []
    for words in at.alternatives(bears(host.room("reading").ASPECTS)):
        found = _trainer(words)
        if found is not None:
            ways.append(replace(launch, words=words, main=found[1], conditions=at.conditions))
    return ways or [launch]


def _unreached(
    script: Script, ways: Sequence[Launch], sections: Collection[str]
) -> tuple[Word, ...]:
    """Settings of these sections that reach no command of the script, as far as that is known."""
    if any(word.unknown and "=" not in word.text for way in ways for word in way.words):
        return ()
    cut = {word.line for way in ways if way.cut is not None for word in way.cut.lost}
    return tuple(
        word
        for word in script.unreached()
        if word.text.lstrip("+-").partition(".")[0] in sections and word.line not in cut
    )


def _report(
    host: Host, parsed: Any, version: str | None, folder: Path, package: str = ""
) -> Report:
    """The report on what a host's ``command`` took from a command or a file in a folder."""
    command, reading = host.room("command"), host.room("reading")

    def misses(table: Table) -> int:
        return len(command.misses(table, parsed))

    table, origin = _table(host.name, version, folder, package, misses)
    settings = reading.settings(table, parsed, origin)
    return report(reading.run(settings), settings)


def _table(
    host: str, version: str | None, folder: Path, package: str, misses: Any
) -> tuple[Table, str]:
    """The release to read a command by: asked for, beside it, or the first that fits it best."""
    if version is not None:
        table = given(host, version)
        return replace(table, version=version), "given"
    unread = ""
    try:
        own = beside(host, folder, package)
    except AuditError as error:
        own, unread = None, str(error)
    if own is not None:
        return own, "beside"
    table = replace(min(candidates(host), key=misses), unread=unread)
    return table, "installed" if table.installed else "guessed"


def _of_yaml(path: Path, text: str, name: str | None, version: str | None) -> Report:
    """The report on a config file on its own."""
    try:
        content = yaml.safe_load(text)
        lines = _key_lines(yaml.compose(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" on line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise AuditError(f"{path}: not valid YAML{where}: {problem}") from None
    except RecursionError:  # an anchor within itself, or brackets without end
        raise AuditError(f"{path}: settings that are nested without end") from None
    configs = [host.config for host in hosts().values() if host.config]
    if not isinstance(content, dict):
        raise AuditError(f"{path}: no settings: {' or '.join(configs)} is a mapping")
    host = None if name is None else hosts()[name]
    if host is None and (named := configured_by(flattened(content))):
        raise AuditError(f"{path}: {named}")
    if host is None:
        readable = [host for host in hosts().values() if host.config]
        host = next((h for h in readable if h.room("command").is_config(content)), None)
    if host is None:
        heads = sorted({str(key).partition(".")[0] for key in content})
        raise AuditError(
            f"{path}: neither {' nor '.join(configs)}; its keys are {', '.join(heads[:8])}"
        )
    parsed = host.room("command").parsed_yaml(content, lines, path)
    return _report(host, parsed, version, path.parent)


def _key_lines(node: Any, prefix: str = "") -> dict[str, int]:
    """Dotted names to the lines they stand on."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}.{key.value}" if prefix else str(key.value)
            lines[name] = key.start_mark.line + 1
            lines |= _key_lines(value, name)
    return lines
