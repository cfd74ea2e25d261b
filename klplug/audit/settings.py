"""What a run was told: settings as written, over the defaults of one release of its host."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from klplug.audit.shell import Broken, Cut, Word
from klplug.audit.tables import Table
from klplug.hosting.settings import Edit, Unknown


@dataclass(frozen=True)
class Setting:
    """One setting of a run.

    Attributes:
        key: its name in the host, dotted where the host has it so.
        value: as the host reads it; the default where nobody wrote it.
        line: line of the script it was written on; ``None`` for a command line or a default.
        written: somebody wrote it.
        unknown: why the value can't be known without running something; empty where it is.
    """

    key: str
    value: Any
    line: int | None = None
    written: bool = False
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.key}={_shown(self.value)}"


@dataclass(frozen=True)
class Rejected:
    """A setting that the host would refuse, and why."""

    setting: Setting
    reason: str


@dataclass(frozen=True)
class Launch:
    """One training command of a script, or a command line.

    Attributes:
        words: all of it, the launcher before the trainer included.
        main: which of them starts the trainer.
        folder: where files that it names are looked for from.
        line: where it begins; ``None`` for a command line.
        cut: what a broken line continuation keeps from it.
        broken: where the script is not read any further.
        around: the text of the script, or of the command line.
        sourced: lines on which other scripts are read first, which may set anything.
        unreached: settings that stand in the script and reach no command of it.
        conditions: lines of conditions that it hangs on and that only a run decides.
        foreign: it starts a trainer of a fork, which takes the host's settings.
    """

    words: tuple[Word, ...]
    main: int
    folder: Path
    line: int | None = None
    cut: Cut | None = None
    broken: Broken | None = None
    around: str = ""
    sourced: tuple[int, ...] = ()
    unreached: tuple[Word, ...] = ()
    conditions: tuple[int, ...] = ()
    foreign: bool = False

    @property
    def trainer(self) -> str:
        return self.words[self.main].text

    @property
    def package(self) -> str:
        """The package that a fork's trainer lies in; empty for the host's own."""
        return re.split(r"[./]", self.trainer)[0] if self.foreign else ""

    @property
    def args(self) -> tuple[Word, ...]:
        return self.words[self.main + 1 :]


MAIN = "the trainer"
"""The key of an edit that starts another trainer."""


@dataclass(frozen=True)
class Settings:
    """The settings of one run; what was not written has the table's default.

    Attributes:
        table: what the release knows.
        version_from: ``installed``, ``given`` or ``guessed``.
        written: by key, what command and config files say.
        spelled: by key, the words of the command that say it; nothing for a config file.
        launch: the command; ``None`` for a config file on its own.
        behind: the word of the command that added ones must come behind; ``None``: any.
        names: by key, what the release calls it, where that is another name.
        prefix: what stands before a name on a command line.
        rejected: settings that the host would not take.
        nobodys: what to say of settings that no known release has.
        unread: config files that could not be read.
        holes: whole arguments that can't be known, with the reasons.
    """

    table: Table
    version_from: str
    written: Mapping[str, Setting]
    spelled: Mapping[str, tuple[Word, ...]] = field(default_factory=dict)
    launch: Launch | None = None
    behind: Word | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    rejected: tuple[Rejected, ...] = ()
    nobodys: tuple[tuple[str, Setting], ...] = ()
    unread: tuple[Setting, ...] = ()
    holes: tuple[tuple[Setting, str], ...] = ()

    def __getitem__(self, key: str) -> Setting:
        if key in self.written:
            return self.written[key]
        return Setting(key, self.table.defaults.get(key))

    # As klplug.hosting.settings.Settings.

    @property
    def trainer(self) -> str:
        return "" if self.launch is None else self.launch.trainer

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or ``default`` for none; ``Unknown`` where only a run could tell."""
        setting = self[key]
        if setting.unknown or self.holes:
            raise Unknown(key)
        return default if setting.value is None else setting.value

    def has(self, key: str) -> bool:
        inside = f"{key}."
        return (
            key in self.written
            or self.table.knows(key)
            or any(known.startswith(inside) for known in self.written)
        )

    def wrote(self, key: str) -> bool:
        return key in self.spelled

    def named(self, key: str) -> str:
        return self.prefix + self.names.get(key, key)

    def below(self, key: str) -> Any:
        inside = f"{key}."
        found = {
            known[len(inside) :]: setting.value
            for known, setting in self.written.items()
            if known.startswith(inside)
        }
        return found or self[key].value

    # What edits make of them.

    def edited(self, edits: Iterable[Edit]) -> Settings:
        """The settings once the edits are made."""
        written, spelled = dict(self.written), dict(self.spelled)
        for edit in edits:
            if edit.key in spelled or edit.words:
                written.pop(edit.key, None)
            spelled.pop(edit.key, None)
            if edit.words:
                written[edit.key] = Setting(edit.key, edit.value, written=True)
                spelled[edit.key] = tuple(Word(word) for word in edit.words)
        return replace(self, written=written, spelled=spelled)

    def after(self, edits: Iterable[Edit]) -> tuple[str, ...] | None:
        """The words of the command once the edits are made; ``None`` where there is no command."""
        if self.launch is None:
            return None
        edits = list(edits)
        gone = {id(word) for edit in edits for word in self.spelled.get(edit.key, ())}
        words: list[str] = []
        place: int | None = None
        for index, word in enumerate(self.launch.words):
            if index == self.launch.main:
                trainer = [w for edit in edits if edit.key == MAIN for w in edit.words]
                words += trainer or [word.text]
            elif id(word) not in gone:
                words.append(word.text)
            if word is self.behind:
                place = len(words)
        added = (w for edit in edits if edit.key != MAIN for w in edit.words)
        return (*words[:place], *added, *words[len(words) if place is None else place :])

    def on(self, key: str) -> bool:
        """Whether the host takes the value for a true one, as any text is that is not empty."""
        setting = self[key]
        return not setting.unknown and bool(setting.value)

    def text(self, key: str) -> str:
        value = self[key].value
        return "" if value is None else str(value)

    def number(self, key: str, default: float = 0.0) -> float:
        """The value as a number; ``default`` for what is none, or is not known."""
        value = self[key].value
        try:
            number = default if value is None else float(value)
        except (TypeError, ValueError):
            return default
        return number if math.isfinite(number) else default

    def coefficient(self, key: str) -> float:
        """The value as a coefficient: nan, and so not zero, where it is not known."""
        return math.nan if self[key].unknown else self.number(key)

    def not_numbers(self, amounts: Iterable[str], counts: Iterable[str]) -> list[Rejected]:
        """Settings that must be numbers, or whole positive ones, and were written as others."""
        rejected = []
        for key in (*amounts, *counts):
            setting = self[key]
            if not setting.written or setting.unknown:
                continue
            value = setting.value
            if key in counts and not (type(value) is int and value > 0):
                reason = f"{setting.key} takes a whole number of at least 1, not {value!r}"
            elif type(value) not in (int, float):
                reason = f"{setting.key} takes a number, not {value!r}"
            else:
                continue
            rejected.append(Rejected(setting, reason))
        return rejected


def unknown_settings(host: str, table: Table, misses: list[Setting]) -> list[Rejected]:
    """What a release that is installed, or was asked for, says of settings that it lacks."""
    return [
        Rejected(setting, f"{host} {table.version} has no setting {setting.key}")
        for setting in misses
    ]


def nobodys(host: str, misses: list[Setting], version_from: str) -> tuple[tuple[str, Setting], ...]:
    """The one sentence on settings that no known release has, or the package beside lacks."""
    if not misses or version_from not in ("guessed", "beside"):
        return ()
    names = ", ".join(setting.key for setting in misses[:4])
    more = f" and {len(misses) - 4} more" if len(misses) > 4 else ""
    if version_from == "beside":
        return ((f"The {host} beside this script has no {names}{more}.", misses[0]),)
    return (
        (f"No release of {host} known here has {names}{more}: a fork's, or misspelt.", misses[0]),
    )


def scalar(text: str) -> Any:
    """A value as Hydra and OmegaConf read it from a command line."""
    stripped = text.strip()
    if len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\"":
        return stripped[1:-1]
    lower = stripped.lower()
    if lower in ("true", "false"):
        return lower == "true"
    if lower in ("null", "~"):
        return None
    if re.fullmatch(r"[+-]?\d+", stripped):
        return int(stripped)
    try:
        return float(stripped) if re.fullmatch(r"[+-]?[\d.]+([eE][+-]?\d+)?", stripped) else text
    except ValueError:
        return text


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
