"""Hydra's config files: which one a command's trainer takes, and what it sets.

A trainer's own is named where it is declared, ``@hydra.main(config_path=..., config_name=...)``:
that is read from its source, as a syntax tree, where the source lies beside the script.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from klplug.audit.errors import AuditError
from klplug.audit.shell import Word
from klplug.audit.tables import flattened, load_yaml
from klplug_verl.keys import BYPASS, RECORDS, STRATEGY

MAIN = "ppo_trainer"
_MEGATRON = {STRATEGY: "megatron"}
# Configs that verl brings, and what they change of what bears on the KL. Sources, in verl 0.7.1 to
# 0.9.1: trainer/config, experimental/*/config; verl-recipe dapo/config.
STOCK: dict[str, dict[str, Any]] = {
    MAIN: {},
    "ppo_megatron_trainer": _MEGATRON,
    "dapo_trainer": {},
    "dapo_megatron_trainer": _MEGATRON,
    "fully_async_ppo_trainer": {BYPASS: True, RECORDS: True},
    "fully_async_ppo_megatron_trainer": {BYPASS: True, RECORDS: True, **_MEGATRON},
    "one_step_off_ppo_trainer": {BYPASS: True, RECORDS: True},
    "one_step_off_ppo_megatron_trainer": {BYPASS: True, RECORDS: True, **_MEGATRON},
}
_VERLS = ("verl", "trainer", "config")
# A variable, or the output of a command, in front of a path.
_UNKNOWN_HEAD = re.compile(r"^(\$\{?\w+\}?|\$\([^)]*\)|`[^`]*`)/*")
_HEIGHT = 6
# A file that says itself where its content goes: left unread.
_PACKAGE = re.compile(r"^# *@package\b", re.MULTILINE)


@dataclass(frozen=True)
class Main:
    """What ``hydra.main`` says in the source of a trainer.

    Attributes:
        folder: that its config files lie in.
        name: of the one it takes by default; ``None`` where it names none, or not as a constant.
    """

    folder: Path
    name: str | None


@dataclass(frozen=True)
class Config:
    """What a config file sets, its defaults included.

    Attributes:
        settings: dotted names to values.
        missing: those of its defaults that are not there.
    """

    settings: Mapping[str, Any]
    missing: tuple[str, ...] = ()


def _above(folder: Path) -> tuple[Path, ...]:
    return (folder.resolve(), *folder.resolve().parents[:_HEIGHT])


def entry(trainer: Word, folder: Path) -> Path | None:
    """The file of a trainer, where it lies in a folder above the script."""
    text = _UNKNOWN_HEAD.sub("", trainer.text) if trainer.unknown else trainer.text
    file = Path(text if text.endswith(".py") else f"{text.replace('.', '/')}.py")
    head, rest = file.parts[0], Path(*file.parts[1:])
    for root in _above(folder):
        # verl/verl/trainer, src/verl/trainer; a checkout that is the package itself.
        # os.path: Path.is_file raises where a folder may not be opened.
        itself = [root / rest] if len(rest.parts) > 1 else []
        for place in (root / file, root / head / file, root / "src" / file, *itself):
            if os.path.isfile(place):
                return place
    return None


def main(file: Path) -> Main | None:
    """What the ``hydra.main`` in a file says; ``None`` where it has none."""
    try:
        module = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in ast.walk(module):
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("hydra.main"):
                said = dict(zip(("config_path", "config_name"), call.args, strict=False))
                said |= {word.arg: word.value for word in call.keywords if word.arg}
                path = _constant(said.get("config_path"))
                name = _constant(said.get("config_name"))
                return Main(file.parent / (path or "."), None if path is None else name)
    return None


def _constant(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def named(flags: Mapping[str, Word], folder: Path, trainer: Word, own: Main | None) -> Path | None:
    """The file that a command names: from the folder of the script, or of the trainer.

    Args:
        flags: ``--config-name``, ``--config-path`` and ``--config-dir``, as far as given.
        folder: of the script.
        trainer: what starts it.
        own: what its ``hydra.main`` says.
    """
    if not {"name", "path"} & flags.keys() and (own is None or own.name is None):
        return None
    name = flags.get("name", Word((own and own.name) or MAIN))
    place = flags.get("path") or flags.get("dir") or Word(".")
    if name.unknown:
        return None
    # "$PROJECT_DIR/examples/config": the unknown head may be the folder of the script.
    text = _UNKNOWN_HEAD.sub("", place.text) if place.unknown else place.text
    file = name.text if name.text.endswith((".yaml", ".yml")) else f"{name.text}.yaml"
    above = _above(folder)
    module = trainer.text.removesuffix(".py").replace(".", "/").rpartition("/")[0]
    from_trainer = [root / module for root in above] if module else []
    from_script = above[:4] if place.unknown else (folder, Path("."))
    roots = [root / text for root in (*from_script, *from_trainer)]
    if own is not None and "path" not in flags:
        roots = [own.folder, *(roots if {"name", "dir"} & flags.keys() else ())]
    return next((path for root in roots if os.path.isfile(path := root / file)), None)


def stock(path: Path) -> Mapping[str, Any] | None:
    """What a config of verl's own changes; ``None`` for another."""
    return STOCK.get(path.stem) if is_verls(path.parent) else None


def is_verls(folder: Path) -> bool:
    """Whether it is the folder of verl's own configs."""
    return folder.resolve().parts[-3:] == _VERLS


def read(path: Path, folder: Path) -> Config:
    """What a config file sets.

    Args:
        path: the file.
        folder: of the script, from where a search path may be written.

    Raises:
        AuditError: no readable YAML, or defaults that lead back to themselves.
    """
    content = _mapping(path)
    hydra = content.get("hydra")
    searched = hydra.get("searchpath") if isinstance(hydra, dict) else ()
    roots = [path.parent, *_searched(searched or (), folder)]
    missing: list[str] = []
    whole = _composed(path, "", roots, (), missing)
    whole.pop("hydra", None)
    return Config(flattened(whole), tuple(missing))


def _searched(places: Sequence[Any], folder: Path) -> Iterator[Path]:
    for place in places:
        kind, _, text = str(place).partition(":")
        text = text.removeprefix("//")
        path = text.replace(".", "/") if kind == "pkg" else text
        yield from [root / path for root in _above(folder) if os.path.isdir(root / path)][:1]


def _mapping(path: Path) -> dict[Any, Any]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AuditError(f"{path}: not a readable YAML file ({error})") from None
    return content if isinstance(content, dict) else {}


def _composed(
    path: Path, group: str, roots: Sequence[Path], within: tuple[Path, ...], missing: list[str]
) -> dict[str, Any]:
    """A config over those of its defaults list, as Hydra composes them.

    Args:
        path: the file.
        group: the folder in a root that it lies in, which its defaults are looked for from.
        roots: the search path.
        within: the files that it is a default of; one that leads back to itself is an error.
        missing: gets what is not there, or is not read.
    """
    if path in within:
        raise AuditError(f"{path}: its defaults lead back to itself")
    content = _mapping(path)
    defaults = content.pop("defaults", None)
    entries = list(defaults) if isinstance(defaults, list) else []
    whole: dict[str, Any] = {}
    for entry in entries if "_self_" in entries else [*entries, "_self_"]:
        if entry == "_self_":
            whole = over(whole, content)
            continue
        for where, name, place, optional in _chosen(entry):
            below = where.removeprefix("/") if where.startswith("/") else f"{group}/{where}"
            below = below.strip("/")
            files = [root / below / f"{name.removesuffix('.yaml')}.yaml" for root in roots]
            file = next((file for file in files if os.path.isfile(file)), None)
            brought = None if below else STOCK.get(name)
            if brought is not None and (file is None or stock(file) is not None):
                for key, value in brought.items():
                    put(whole, key, value)
            elif file is not None and not _PACKAGE.search(file.read_text(errors="replace")):
                put(whole, place, _composed(file, below, roots, (*within, path), missing))
            elif not optional:
                missing.append("/".join(filter(None, (below, name))))
    return whole


def _chosen(entry: Any) -> Iterator[tuple[str, str, str, bool]]:
    """Of an entry of a defaults list: group, name, where it is put, whether it may lack."""
    if isinstance(entry, str):
        path, _, place = entry.partition("@")
        group, _, name = path.rpartition("/")
        pairs: list[tuple[str, Any]] = [(f"{group}@{place}" if place else group, name)]
    elif isinstance(entry, dict):
        pairs = [(str(group), name) for group, name in entry.items()]
    else:
        return
    for written, names in pairs:
        said, _, written = written.rpartition(" ")  # "optional", "override"
        group, _, place = written.partition("@")
        if group.strip("/").startswith("hydra"):
            continue
        place = place or group.strip("/").replace("/", ".") or "_here_"
        for name in names if isinstance(names, list) else [names]:
            if isinstance(name, str) and name != "_self_":
                yield group, name, place, "optional" in said


def put(whole: dict[str, Any], place: str, content: Any) -> None:
    """Puts content over what is there under a dotted name."""
    if place in ("_here_", "_global_"):
        whole |= over(whole, content)
        return
    *parents, last = place.split(".")
    for parent in parents:
        whole = whole.setdefault(parent, {})
    whole[last] = over(whole.get(last), content)


def over(below: Any, above: Any) -> Any:
    """One mapping over another."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: over(below.get(key), value) for key, value in above.items()}
