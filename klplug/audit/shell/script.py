"""A shell script, read: its commands as bash would pass them, and what reaches none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from klplug.audit.errors import AuditError
from klplug.audit.shell.command import Command
from klplug.audit.shell.reader import Reader
from klplug.audit.shell.scanner import SyntaxProblem
from klplug.audit.shell.values import Word

_SETTING = re.compile(r"""["']?(?:(\+{0,2}|~)[\w@]+\.[\w@./]+=|--[a-z]\w*[._][\w.]*)""")


@dataclass(frozen=True)
class Broken:
    """Where a shell would read no further, and why."""

    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return (
            f"a shell would not read this script past line {self.line} ({self.reason}): {self.text}"
        )


@dataclass(frozen=True)
class Cut:
    """Settings that a broken line continuation keeps from the command above them."""

    line: int
    reason: str
    lost: tuple[Word, ...]


class Script:
    """A script, read: its simple commands in order, expanded.

    Nothing is executed. Files that it sources or hands to a shell are read too, if ``folder`` is
    given and they are there.

    Attributes:
        commands: every program with its arguments, in order.
        sourced: lines that source a file which is not there.
        broken: what a shell would stop at, if all before it could be read.

    Args:
        source: the script's text.
        folder: where it lies.

    Raises:
        AuditError: quotes, brackets or keywords that are never closed, and no command before.
    """

    def __init__(self, source: str, folder: Path | None = None) -> None:
        self._source = source
        self._lines = source.split("\n")
        reader = Reader(folder)
        self.broken: Broken | None = None
        try:
            reader.read(source)
        except SyntaxProblem as problem:
            line = min(problem.line, len(self._lines))
            self.broken = Broken(line, problem.what, self._lines[line - 1].strip()[:60])
        self.commands: list[Command] = reader.commands
        self.sourced = list(dict.fromkeys(reader.sourced))
        if self.broken is not None and not self.commands:
            raise AuditError(str(self.broken))

    def cut_after(self, command: Command) -> Cut | None:
        """What a comment, an empty line, a blank after the backslash or a missing one cut off."""
        last = self._lines[command.last_line - 1]
        below = command.last_line  # index of the next line
        following = self._lines[below].strip() if below < len(self._lines) else ""
        after = "" if command.end is None else self._source[command.end :].partition("\n")[0]
        if re.match(r"[ \t]*#.*\\[ \t]*$", after):
            reason = "the backslash belongs to a comment, which ends the command there"
        elif cut := re.search(r"\\[ \t\r]+(#.*)?$", last):
            what = "a comment" if cut[1] else "a blank"
            what = "a carriage return" if last.endswith("\r") else what
            reason = f"{what} follows the backslash, which ends the command there"
        elif last.endswith("\\"):
            if following.startswith("#"):
                reason = "a comment line follows the backslash, which ends the command there"
            elif not following:
                reason = "an empty line follows the backslash, which ends the command there"
            else:
                return None
        elif _SETTING.match(following):
            reason = "the line has no backslash at its end, which ends the command there"
        else:
            return None
        lost = []
        for number, line in enumerate(self._lines[below:], start=below + 1):
            text = line.strip().rstrip("\\").strip()
            if not text or text.startswith("#"):
                continue
            if not _SETTING.match(text):
                break
            lost.append(Word(re.sub(r"""^(["'])(.*?)\1""", r"\2", text), number))
        return Cut(command.last_line, reason, tuple(lost)) if lost else None

    def unreached(self) -> list[Word]:
        """Settings that stand in the script, outside of comments, and reach no command."""
        passed = {
            match[0]
            for command in self.commands
            for words in command.alternatives()
            for word in words[1:]
            for match in _STANDING.finditer(word.text)
        }
        lost = []
        for number, line in enumerate(self._lines, start=1):
            code = re.sub(r"(^|\s)#.*$", "", line)
            for match in _STANDING.finditer(code):
                if match[0] not in passed:
                    lost.append(Word(match[0], number))
        return lost


_STANDING = re.compile(
    r"(?<![\w.$/{-])(?:\+{0,2}[A-Za-z_]\w*(?:\.[\w@]+)+(?==)|--[a-z]\w*(?:\.\w+)+)"
)
