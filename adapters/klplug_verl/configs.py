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
from klplug_verl.keys import BYPASS, CTRL_COEF, ESTIMATOR, RECORDS, STRATEGY, N

MAIN = "ppo_trainer"
_MEGATRON = {STRATEGY: "megatron"}
# Configs that verl brings, and what they change of what bears on the KL. Sources, in verl 0.7.1 to
# 0.9.1: trainer/config, experimental/*/config; verl-recipe */config.
STOCK: dict[str, dict[str, Any]] = {
    MAIN: {},
    "ppo_megatron_trainer": _MEGATRON,
    "dapo_trainer": {},
    "dapo_megatron_trainer": _MEGATRON,
    "fully_async_ppo_trainer": {BYPASS: True, RECORDS: True},
    "fully_async_ppo_megatron_trainer": {BYPASS: True, RECORDS: True, **_MEGATRON},
    "one_step_off_ppo_trainer": {BYPASS: True, RECORDS: True},
    "one_step_off_ppo_megatron_trainer": {BYPASS: True, RECORDS: True, **_MEGATRON},
    "entropy_trainer": {},
    "atropos_trainer": {ESTIMATOR: "grpo"},
    "prime_trainer": {N: 4, ESTIMATOR: "rloo", CTRL_COEF: 0.0},
}
# What each file of verl's group `actor` sets as the strategy.
ENGINES = {"dp_actor": "fsdp"} | {
    f"{name}_actor": name for name in ("megatron", "torchtitan", "veomni")
}
_VERLS = ("verl", "trainer", "config")
# A variable, or the output of a command, in front of a path.
_UNKNOWN_HEAD = re.compile(r"^(\$\{[^}]*\}|\$\w+|\$\(.*\)|`[^`]*`)/*", re.DOTALL)
_HEIGHT = 6
_PASSES = 6  # files that choose files that choose files
# A file that says itself where its content goes.
_PACKAGE = re.compile(r"^# *@package +(\S+)", re.MULTILINE)


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
        chosen: the words of the command that chose one of its defaults.
    """

    settings: Mapping[str, Any]
    missing: tuple[str, ...] = ()
    chosen: frozenset[str] = frozenset()


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
                path = _path(said.get("config_path"), module)
                name = _constant(said.get("config_name"))
                if path is not None and path.startswith("pkg:"):
                    return Main(_packaged(path, file.parent), name)
                return Main(file.parent / (path or "."), None if path is None else name)
    return None


def _constant(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _path(node: ast.expr | None, module: ast.Module) -> str | None:
    """A folder, from that of the file: written so, or made of ``__file__``."""
    if isinstance(node, ast.Name):
        given = (n for n in module.body if isinstance(n, ast.Assign))
        node = next((n.value for n in given if ast.unparse(n.targets[0]) == node.id), None)
    written = "" if node is None else ast.unparse(node)
    if node is None or "__file__" not in written:
        return _constant(node)
    up = len(re.findall(r"dirname\(|\.parent\b(?!\()", written))
    up += sum(int(number) + 1 for number in re.findall(r"\.parents\[(\d+)\]", written))
    texts = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    parts = [str(n.value).strip("/") for n in sorted(texts, key=lambda n: (n.lineno, n.col_offset))]
    return "/".join((*[".."] * (up - 1), *parts)) if up else None


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
    file = name.text if name.text.endswith((".yaml", ".yml")) else f"{name.text}.yaml"
    text, from_script = _from_script(place, folder)
    above = _above(folder)
    module = trainer.text.removesuffix(".py").replace(".", "/").rpartition("/")[0]
    from_trainer = [root / module for root in above] if module else []
    roots = [root / text for root in (*from_script, *from_trainer)]
    if own is not None and "path" not in flags:
        roots = [own.folder, *(roots if {"name", "dir"} & flags.keys() else ())]
    return next((path for root in roots if os.path.isfile(path := root / file)), None)


def _from_script(place: Word, folder: Path) -> tuple[str, tuple[Path, ...]]:
    """A path in a command, and the folders that it may be written from."""
    # "$PROJECT_DIR/examples/config": the unknown head may be the folder of the script.
    if place.unknown:
        return _UNKNOWN_HEAD.sub("", place.text), _above(folder)[:4]
    return place.text, (folder, Path("."))


def default(trainer: str) -> str | None:
    """The config of a trainer of verl's own, or of a recipe, whose source is not here."""
    if found := re.search(r"fully_async|one_step_off", trainer):
        return f"{found[0]}_ppo_trainer"
    recipe = re.search(r"\brecipe[./](\w+)", trainer)
    return None if recipe is None else f"{recipe[1]}_trainer"


def searched_too(
    directory: Word | None, path: object, folder: Path
) -> tuple[tuple[Path, ...], bool]:
    """The folders that a command adds to the search path, and whether all are there.

    Args:
        directory: what ``--config-dir`` names.
        path: the value of ``hydra.searchpath``.
        folder: of the script.
    """
    found: list[Path | None] = []
    if directory is not None:
        text, roots = _from_script(directory, folder)
        found.append(next((root / text for root in roots if os.path.isdir(root / text)), None))
    if path is not None:
        places = [place.strip(" '\"") for place in str(path).strip("[]").split(",")]
        found += [next(_searched([place], folder), None) for place in places]
    return tuple(filter(None, found)), None not in found


def stock(path: Path) -> Mapping[str, Any] | None:
    """What a config of verl's own changes; ``None`` for another."""
    return STOCK.get(path.stem) if is_verls(path.parent) else None


def is_verls(folder: Path) -> bool:
    """Whether it is the folder of verl's own configs."""
    return folder.resolve().parts[-3:] == _VERLS


def read(
    path: Path | None,
    folder: Path,
    choices: Mapping[str, tuple[Any, bool]] | None = None,
    more: Sequence[Path] = (),
) -> Config:
    """What a config file sets.

    Args:
        path: the file; ``None`` for one of verl's own, to which the command adds others.
        folder: of the script, from where a search path may be written.
        choices: words of the command that may choose a default: by what stands before the '=',
            what stands behind it, and whether a '+' adds it.
        more: folders that the command adds to the search path.

    Raises:
        AuditError: no readable YAML, or defaults that lead back to themselves.
    """
    roots = list(more)
    if path is not None:
        hydra = _mapping(path).get("hydra")
        searched = hydra.get("searchpath") if isinstance(hydra, dict) else ()
        roots = [path.parent, *_searched(searched or (), folder), *more]
    chosen = {
        key: (value, adds)
        for key, (value, adds) in (choices or {}).items()
        if (group := key.partition("@")[0].strip("/"))
        and any(os.path.isdir(root / group) for root in roots if not is_verls(root))
    }
    replacing = {key: value for key, (value, adds) in chosen.items() if not adds}
    overridden: dict[str, Any] = {}
    taken: set[str] = set()
    for _ in range(_PASSES):
        # A file may say what those before it choose, and is itself chosen.
        found = _Composed(roots, overridden | replacing, taken)
        if path is not None:
            found.add(path, "", "", ())
        for key, (value, adds) in chosen.items():
            if adds:
                found.bring(key, value, "", "", False, ())
        if (found.overridden, found.taken) == (overridden, taken):
            break
        overridden, taken = found.overridden, found.taken
    # Of those that replace, what replaced nothing.
    found.missing += [f"{key}={v}" for key, v in replacing.items() if key not in found.taken]
    whole: dict[str, Any] = {}
    for place, content in found.contents:
        put(whole, place, content)
    whole.pop("hydra", None)
    return Config(flattened(whole), tuple(found.missing), frozenset(chosen))


def _packaged(path: str, folder: Path) -> Path:
    """The folder that ``pkg://a.b`` means, above a folder where it lies there."""
    elsewhere = Path(path.partition("://")[2].replace(".", "/"))
    return next(_searched([path], folder), elsewhere)


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


_NAMED = re.compile(r"\$\{([^{}:]+)\}")


class _Composed:
    """A config and its defaults, in the order in which Hydra puts one over the other.

    Args:
        roots: the search path.
        choices: what is named in the place of a default, by group and package.
        replaced: those of them that there is a default for, as far as that is known.

    Attributes:
        taken: the same, as found.
        overridden: what files choose in the place of others' defaults.
        contents: where each goes, and what it sets.
        missing: what is not there, or is not read.
    """

    def __init__(self, roots: Sequence[Path], choices: dict[str, Any], replaced: set[str]) -> None:
        self.roots, self.choices, self.replaced = roots, choices, replaced
        self.taken: set[str] = set()
        self.named: dict[str, str] = {}  # by group, for ${group} in a later entry
        self.overridden: dict[str, Any] = {}
        self.contents: list[tuple[str, Any]] = []
        self.missing: list[str] = []

    def add(self, path: Path, group: str, package: str, within: tuple[Path, ...]) -> None:
        """A file, and its defaults.

        Args:
            path: the file.
            group: the folder in a root that it lies in, which its defaults are looked for from.
            package: where its content goes.
            within: the files that it is a default of; one that leads back to itself is an error.
        """
        if path in within:
            raise AuditError(f"{path}: its defaults lead back to itself")
        content = _mapping(path)
        defaults = content.pop("defaults", None)
        entries = list(defaults) if isinstance(defaults, list) else []
        for entry in entries if "_self_" in entries else [*entries, "_self_"]:
            if entry == "_self_":
                self.contents.append((package, content))
                continue
            for written, name, how in _chosen(entry):
                _, _, said = _placed(written, group, package)
                if "override" in how:
                    self.overridden[said] = name
                    if said in self.replaced:
                        continue
                elif said in self.choices:
                    self.taken.add(said)
                    name = self.choices[said]
                name = self.filled(name)
                self.named[said] = str(name)
                self.bring(written, name, group, package, "optional" in how, (*within, path))

    def filled(self, names: Any) -> Any:
        """A name in which Hydra puts those that were chosen before: ``${engine}_actor``."""
        if isinstance(names, list):
            return [self.filled(name) for name in names]
        return _NAMED.sub(lambda found: self.named.get(found[1], found[0]), str(names))

    def bring(
        self,
        written: str,
        names: Any,
        group: str,
        package: str,
        optional: bool,
        within: tuple[Path, ...],
    ) -> None:
        """Files that an entry of a defaults list names, or the command in its place."""
        below, own, _ = _placed(written, group, package)
        for name in names if isinstance(names, list) else _several(names):
            stem = str(name).removesuffix(".yaml")
            files = [root / below / f"{stem}.yaml" for root in self.roots]
            file = next((file for file in files if os.path.isfile(file)), None)
            brought = None if below else STOCK.get(stem)
            if brought is not None and (file is None or stock(file) is not None):
                self.contents += brought.items()
            elif file is not None:
                header = _PACKAGE.search(file.read_text(errors="replace"))
                goes = own
                if header is not None and "@" not in written:
                    goes = header[1].replace("_group_", below.replace("/", "."))
                    goes = _joined(package, goes.replace("_name_", stem))
                self.add(file, below, goes, within)
            elif not optional:
                self.missing.append("/".join(filter(None, (below, stem))))


def _placed(written: str, group: str, package: str) -> tuple[str, str, str]:
    """Of ``group@package`` in a file of a group: the folder, the package, and both as one word."""
    where, at, place = written.partition("@")
    below = where.strip("/") if where.startswith("/") else f"{group}/{where}".strip("/")
    own = _joined(package, place if at else where.strip("/").replace("/", "."))
    return below, own, below if own == below.replace("/", ".") else f"{below}@{own or '_global_'}"


def _joined(package: str, place: str) -> str:
    """A package within another, as Hydra has it."""
    place = ".".join(filter(None, (package, place.replace("_here_", "").strip("."))))
    return place.rpartition("_global_")[2].strip(".")


def _several(names: Any) -> list[str]:
    """What a command chooses of a group: a name, a list, or nothing."""
    if not isinstance(names, str):
        return []
    return [name.strip(" '\"") for name in names.strip("[]").split(",") if name.strip()]


def _chosen(entry: Any) -> Iterator[tuple[str, Any, str]]:
    """Of an entry of a defaults list: group and package, name, and what stands before them."""
    if isinstance(entry, str):
        path, at, place = entry.partition("@")
        group, slash, name = path.rpartition("/")
        group = group or slash  # "/name" is looked for from the root
        pairs: list[tuple[str, Any]] = [(f"{group}{at}{place}", name)]
    elif isinstance(entry, dict):
        pairs = [(str(group), name) for group, name in entry.items()]
    else:
        return
    for written, names in pairs:
        said, _, written = written.rpartition(" ")  # "optional", "override"
        if written.strip("/").startswith("hydra"):
            continue
        for name in names if isinstance(names, list) else [names]:
            if isinstance(name, str) and name != "_self_":
                yield written, name, said


def put(whole: dict[str, Any], place: str, content: Any) -> None:
    """Puts content over what is there under a dotted name."""
    if not place:
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
