"""OpenRLHF: the flags of a command or a config file, as argparse reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klplug.audit.settings import Launch, Setting
from klplug.audit.shell import Word
from klplug.audit.tables import Table, before, candidates, flattened
from klplug_openrlhf.host import HOST
from klplug_openrlhf.keys import FLAT, KL_TYPE, OWN


@dataclass(frozen=True)
class Parsed:
    """The flags of one command, under the names they were written by."""

    flags: tuple[tuple[str, tuple[Word, ...], Word], ...]
    holes: tuple[tuple[Setting, str], ...]
    through_klplug: bool
    bare: tuple[Setting, ...] = ()  # words that belong to no flag
    launch: Launch | None = None  # the command; of a config file on its own there is none


def parsed(launch: Launch) -> Parsed:
    """What a command says."""
    return replace(arguments(launch.args, launch.trainer == HOST.launcher), launch=launch)


def arguments(args: Iterable[Word], through_klplug: bool) -> Parsed:
    """argparse's view of a command line."""
    flags: list[tuple[str, list[Word], Word]] = []
    holes, bare = [], []
    for word in args:
        if match := re.match(r"--([\w.-]+)(?:=(.*))?$", word.text, re.DOTALL):
            values = [] if match[2] is None else [_part(word, match[2])]
            flags.append((match[1], values, word))
        elif word.unknown and re.fullmatch(r"\$\{?[\w@*\[\]]+\}?|\$\(.*\)|`.*`", word.text):
            if flags and not flags[-1][1]:
                flags[-1][1].append(word)
            else:
                holes.append((Setting(word.text, None, word.line, True), word.unknown[0]))
        elif flags:
            flags[-1][1].append(word)
        else:
            bare.append(Setting(word.text, None, word.line, True))
    return Parsed(
        tuple((name, tuple(values), word) for name, values, word in flags),
        tuple(holes),
        through_klplug,
        tuple(bare),
    )


def _part(word: Word, text: str) -> Word:
    return Word(text, word.line, word.unknown)


# What other trainers' files have too, under the same names, does not tell whose a file is.
_SHARED = {"gamma", "use_kl_loss", "rollout.temperature", "temperature", "rollout.top_p", "top_p"}
_TELLING = {
    name
    for dotted, flat in FLAT.items()
    for name in (dotted, flat)
    if dotted.startswith(("algo.", "rollout.")) and name not in _SHARED
}


def is_config(content: Mapping[str, Any]) -> bool:
    """Whether a file has OpenRLHF's flags: some that tell, and no fewer than others."""
    keys = flattened(dict(content)).keys()
    heads = {key.partition(".")[0] for key in keys}
    if "klplug" in heads and heads & {"actor", "rollout", "train", "algo"}:
        return True
    tables = candidates("openrlhf") if keys & _TELLING else ()
    return any(2 * len(keys & table.defaults.keys()) >= len(keys) for table in tables)


def parsed_yaml(content: Mapping[str, Any], lines: Mapping[str, int], path: Path) -> Parsed:
    """Flags kept in a file, nested or flat."""
    flags: list[tuple[str, tuple[Word, ...], Word]] = []
    holes = []
    for key, value in flattened(dict(content)).items():
        if any(_runs(value)):
            setting = Setting(key, None, lines.get(key), True)
            holes.append((setting, f"{key} has settings of several runs"))
            continue
        values = value if isinstance(value, list) else [value]
        word = Word(f"--{key}", lines.get(key))
        if value is True:
            flags.append((key, (), word))
        elif value is not False and value is not None:
            flags.append((key, tuple(Word(str(v), lines.get(key)) for v in values), word))
    return Parsed(tuple(flags), tuple(holes), any(key == KL_TYPE for key, _, _ in flags))


def _runs(value: Any) -> Iterable[Mapping[str, Any]]:
    """The items of a list that have flags: a sweep, say."""
    items = value if isinstance(value, list) else ()
    known = {*FLAT, *FLAT.values()}
    return (item for item in items if isinstance(item, dict) and known & flattened(item).keys())


_ALONE = r"(?:.*/)?openrlhf[./]cli[./]train_ppo(?:\.py)?"
# Up to 0.5 there is a trainer without Ray, with the same KL: trainer/ppo_trainer.py and
# NaiveExperienceMaker.


def is_alone(launch: Launch | None) -> bool:
    return launch is not None and re.fullmatch(_ALONE, launch.trainer) is not None


def without_trainer(table: Table, launch: Launch | None) -> list[Setting]:
    """The trainer of a command, where a release lacks it."""
    if launch is None or not is_alone(launch):
        return []
    if table.source is not None:
        there = (table.source.folder / "cli" / "train_ppo.py").is_file()
    else:
        there = before(table.version, (0, 6))
    return [] if there else [Setting("", None, launch.words[launch.main].line, True)]


def misses(table: Table, launched: Parsed) -> list[Setting]:
    """What a release would refuse of a command: flags, and a trainer that it does not have."""
    return [*without_trainer(table, launched.launch), *lacking(table, launched)]


def lacking(table: Table, launched: Parsed) -> list[Setting]:
    """Flags that argparse would refuse: unknown, or an ambiguous abbreviation."""
    return [
        Setting(name, " ".join(v.text for v in values) or True, word.line, True)
        for name, values, word in launched.flags
        if full_name(table, name, launched.through_klplug) is None
    ]


def full_name(table: Table, name: str, through_klplug: bool) -> str | None:
    if through_klplug and name in OWN:
        return name
    if name in table.defaults:
        return name
    near = [known for known in table.defaults if known.startswith(name)]
    return near[0] if len(near) == 1 else None
