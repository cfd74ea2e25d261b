"""verl: what a command or a config file sets, as Hydra reads it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from klplug.audit.settings import Launch, Setting, scalar
from klplug.audit.shell import Word
from klplug.audit.tables import Table, flattened, load_yaml
from klplug_verl import configs, trainers
from klplug_verl.keys import ACTOR_FILE, ENGINE

_OPENED = ("ray_kwargs", "hydra", "klplug")


@dataclass(frozen=True)
class Parsed:
    """The arguments of one ``main_ppo``, taken apart: settings, and config files they name."""

    written: dict[str, Setting]
    spelled: dict[str, tuple[Word, ...]]  # by key, the words of the command that set it
    added: frozenset[str]  # written with '+' or '++': they need not exist
    bare: tuple[Setting, ...]  # arguments that Hydra would not take
    unread: tuple[Setting, ...]
    holes: tuple[tuple[Setting, str], ...]  # whole arguments that can't be known
    appended: frozenset[str] = frozenset()  # written with one '+': they must not exist
    flags: Mapping[str, Word] = field(default_factory=dict)  # --config-name, -path and -dir
    behind: Word | None = None  # where there are flags: the word that overrides come behind
    parted: tuple[Setting, ...] = ()  # overrides that a flag keeps from those before it
    removed: tuple[Setting, ...] = ()  # with their '~'
    own_config: bool = False  # settings beyond verl's, of a recipe or of a config file
    launch: Launch | None = None  # the command; of a config file on its own there is none


def parsed(launch: Launch) -> Parsed:
    """What a command sets, over the config file that it, or its trainer, names."""
    given = replace(arguments(launch.args), launch=launch)
    if given.flags and given.behind is None:
        given = replace(given, behind=launch.words[launch.main])
    if launch.foreign or trainers.row(launch.trainer) is not None:
        given = replace(given, own_config=True)
    return _over_config(given, launch)


def arguments(args: Iterable[Word]) -> Parsed:
    """Hydra's view of a command line."""
    written: dict[str, Setting] = {}
    spelled: dict[str, tuple[Word, ...]] = {}
    added: set[str] = set()
    appended: set[str] = set()
    bare, holes = [], []
    flags: dict[str, Word] = {}
    removed: dict[str, Setting] = {}
    standing: list[int] = []  # where overrides are, and flags
    flagged: list[int] = []
    args = tuple(args)
    multirun = any(word.text in ("-m", "--multirun") for word in args)
    words = iter(enumerate(args))
    for at, word in words:
        text = word.text
        if re.match(r"--?[a-zA-Z]", text):
            name, equals, given = text.partition("=")
            if (flag := _flag(name)) and not equals:
                at, word = next(words, (at, Word("")))
                given = word.text
            flags[flag or name] = replace(word, text=given.strip("'\""))
            flagged.append(at)
            continue
        if not word.unknown or re.match(r"~|[\w@./+-]+=", text):
            standing.append(at)
        if text.startswith("~"):
            gone = Setting(text.partition("=")[0], None, word.line, True)
            removed[gone.key[1:]] = gone
            continue
        if match := re.match(r"(\+{0,2})([\w@./-]+)=(.*)$", text, re.DOTALL):
            settings = _values(match[2], match[3], word)
            written |= settings
            for key in settings:
                removed.pop(key, None)
                spelled[key] = (*spelled.get(key, ()), word)
            if match[1]:
                added |= settings.keys()
            if match[1] == "+":
                appended |= settings.keys()
            if _sweeps(match[3]) and not (multirun or word.unknown):
                bare.append(Setting(match[2], match[3], word.line, True))
        elif word.unknown:
            holes.append((Setting(text, None, word.line, True), word.unknown[0]))
        else:
            bare.append(Setting(text, None, word.line, True))
    first = next(iter(standing), flagged[-1] + 1 if flagged else 0)
    parted = [args[at] for at in standing if any(first < flag < at for flag in flagged)]
    return Parsed(
        written,
        spelled,
        frozenset(added),
        tuple(bare),
        (),
        tuple(holes),
        frozenset(appended),
        flags,
        args[first - 1] if flagged and first else None,
        tuple(Setting(word.text, None, word.line, True) for word in parted),
        tuple(removed.values()),
    )


def _flag(name: str) -> str:
    """What a flag of Hydra's that takes a value is called here; its parser takes a beginning."""
    if name in _SHORT:
        return _SHORT[name]
    long = [flag for flag in _LONG if name.startswith("--") and flag.startswith(name)]
    return _LONG[long[0]] if len(long) == 1 or name in long else ""


def _values(key: str, text: str, word: Word) -> dict[str, Setting]:
    """What one override sets: a mapping sets each of its keys."""
    if text.startswith("{") and not word.unknown:
        with contextlib.suppress(yaml.YAMLError):
            content = load_yaml(text.replace(":", ": "))
            if isinstance(content, dict) and content:
                return {
                    name: Setting(name, value, word.line, True)
                    for name, value in flattened(content, key).items()
                }
    return {key: Setting(key, scalar(text), word.line, True, word.unknown)}


def _sweeps(text: str) -> bool:
    """True for a value that Hydra takes for several: a comma outside of quotes and brackets."""
    return "," in text and not re.match(r"\s*['\"\[{]", text)


_LONG = {
    **{"--config-path": "path", "--config-name": "name", "--config-dir": "dir"},
    **{"--cfg": "cfg", "--package": "package", "--experimental-rerun": "rerun", "--info": "info"},
}
_SHORT = {"-cp": "path", "-cn": "name", "-cd": "dir", "-c": "cfg", "-p": "package", "-i": "info"}


def is_config(content: Mapping[str, Any]) -> bool:
    """Whether a file has verl's settings; an ``algorithm`` is of others, too."""
    keys = flattened(dict(content)).keys()
    return any(key.startswith(("actor_rollout_ref.", *_ALGORITHM)) for key in keys) or (
        "algorithm" in content and _over_verls(content.get("defaults"))
    )


_ALGORITHM = tuple(
    f"algorithm.{name}"
    for name in ("adv_estimator", "kl_ctrl", "kl_penalty", "use_kl_in_reward", "norm_adv_by_std")
)


def _over_verls(defaults: object) -> bool:
    """Whether one of a config's defaults is verl's own."""
    listed = defaults if isinstance(defaults, list) else ()
    return any(isinstance(item, str) and item.endswith("_trainer") for item in listed)


def parsed_yaml(content: Mapping[str, Any], lines: Mapping[str, int], path: Path) -> Parsed:
    """What a config file on its own sets, over those that its defaults name."""
    written = _from_yaml(content, lines)
    unread: tuple[Setting, ...] = ()
    if "defaults" in content:
        config = configs.read(path, path.parent)
        below = _values_of(config.settings, True)
        # What stands in the file itself has a line.
        own = {k: s for k, s in written.items() if k in below and s.value == below[k].value}
        written, unread = below | own, _unread_defaults(path, config)
    return Parsed(written, {}, frozenset(written), (), unread, (), own_config=True)


def _from_yaml(content: Mapping[str, Any], lines: Mapping[str, int]) -> dict[str, Setting]:
    """The settings in a config file, with the line of each."""
    body = {key: value for key, value in content.items() if key not in ("defaults", "hydra")}
    return {
        key: Setting(key, scalar(value) if isinstance(value, str) else value, lines.get(key), True)
        for key, value in flattened(body).items()
    }


def _over_config(given: Parsed, launch: Launch) -> Parsed:
    """The settings of the config file that is taken, under those of the command itself.

    Where neither the command names one nor the trainer's source lies beside the script, it is one
    of verl's own, as far as the trainer is known.
    """
    trainer, flags = launch.words[launch.main], given.flags
    source = configs.entry(trainer, launch.folder)
    own = None if source is None else configs.main(source)
    asked = "name" in flags or "path" in flags
    path: Path | None = None
    brought: Mapping[str, Any] | None = configs.STOCK[configs.MAIN]
    if own is not None or asked:
        path = configs.named(flags, launch.folder, trainer, own)
        brought = None if path is None else configs.stock(path)
    name = flags.get("name", Word((own and own.name) or configs.MAIN)).text
    if own is None and not launch.foreign:
        name = name if asked else configs.default(trainer.text) or configs.MAIN
    if path is None and (own is None or asked or configs.is_verls(own.folder)):
        brought = configs.STOCK.get(name.removesuffix(".yaml"))
    if path is None and brought is None:
        return replace(given, unread=(_unread(flags, own, name, trainer),), own_config=True)
    return _composed(given, launch, path, brought, asked)


def _composed(
    given: Parsed,
    launch: Launch,
    path: Path | None,
    brought: Mapping[str, Any] | None,
    asked: bool,
) -> Parsed:
    """The settings of a command over those of its config, with the files that it chooses.

    Args:
        path: the config.
        brought: what it changes, where it is one of verl's own.
    """
    directory, searched = given.flags.get("dir"), given.written.get("hydra.searchpath")
    more, there = configs.searched_too(directory, searched and searched.value, launch.folder)
    choices = {
        key: (setting.value, key in given.added)
        for key, setting in given.written.items()
        if "." not in key.partition("@")[0]
    }
    choices |= {setting.key[1:]: (None, False) for setting in given.removed}
    path = path if brought is None else None
    config = configs.read(path, launch.folder, choices, more)
    unread = list(_unread_defaults(path, config))
    written = {key: s for key, s in given.written.items() if key not in config.chosen}
    for key, setting in written.items():
        if key.startswith("hydra/"):
            continue
        # What chooses a file that is not here, as far as that can be told.
        lost = not there and key in given.added and "." not in key
        known = key == ACTOR_FILE and setting.value in configs.ENGINES
        if lost or (("@" in key or "/" in key) and not known):
            unread.append(setting)
    return replace(
        given,
        written=_values_of(brought or {}, asked)
        | _values_of(config.settings, asked or bool(config.chosen))
        | written,
        unread=tuple(unread),
        own_config=given.own_config or path is not None or bool(config.chosen),
    )


def _values_of(config: Mapping[str, Any], asked: bool) -> dict[str, Setting]:
    """Settings of a config file: written by whoever asked for it, or defaults of the trainer."""
    return {
        key: Setting(key, scalar(value) if isinstance(value, str) else value, None, asked)
        for key, value in config.items()
    }


def _unread_defaults(path: Path | None, config: configs.Config) -> tuple[Setting, ...]:
    whose = "the command" if path is None else path.name
    return tuple(Setting(f"{whose}'s default", name) for name in config.missing)


def _unread(
    flags: Mapping[str, Word], own: configs.Main | None, default: str, trainer: Word
) -> Setting:
    """What names a config file that is not there."""
    for flag in ("name", "path"):
        if flag in flags:
            word = flags[flag]
            return Setting(f"--config-{flag}", word.text, word.line, True, word.unknown)
    name = default if own is None else own.name
    return Setting("hydra.main's config_name", name, trainer.line, True)


def misses(table: Table, launched: Parsed) -> list[Setting]:
    """Overrides that Hydra would refuse: of keys that are not there, or that '+' adds again."""
    return [*lacking(table, launched), *appended(table, launched)]


def appended(table: Table, launched: Parsed) -> list[Setting]:
    """Overrides with one '+', of keys that have a value already: Hydra refuses them."""
    if launched.own_config:
        return []
    return [
        launched.written[key] for key in launched.appended if table.defaults.get(key) is not None
    ]


def lacking(table: Table, launched: Parsed) -> list[Setting]:
    """Overrides of no key of the release, with no '+' before it."""
    if launched.own_config:
        return []
    return [
        setting
        for key, setting in launched.written.items()
        if key not in launched.added
        and not table.knows(key)
        and key.partition(".")[0] not in _OPENED
        and not _inside_open(table, key)
        and not _config_group(key)
    ]


def _config_group(key: str) -> bool:
    """True for Hydra's choice of a file of a group (``group@package=``), which is no setting."""
    return key == ENGINE or "/" in key or "@" in key


def _inside_open(table: Table, key: str) -> bool:
    """True inside a setting whose default is a mapping without keys of its own, which is open."""
    parts = key.split(".")
    heads = (".".join(parts[:at]) for at in range(1, len(parts)))
    return any(isinstance(table.defaults.get(head), dict) for head in heads)
