"""What each release of a host knows: its settings and their defaults.

Read from the release that is installed, or from the table kept here, made by
``python -m klplug.audit.tables HOST VERSION FOLDER`` from an unpacked wheel; tests run it again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from klplug.audit.errors import AuditError

DATA = Path(__file__).parent / "data"
HOSTS = ("verl", "openrlhf")


@dataclass(frozen=True)
class Table:
    """The settings of one release of a host.

    Attributes:
        host: ``verl`` or ``openrlhf``.
        version: the release.
        installed: read from the release installed here, not from a table.
        defaults: name of a setting to its default.
        choices: OpenRLHF's flags that take one of a list.
        switches: OpenRLHF's flags that take no value.
    """

    host: str
    version: str
    installed: bool
    defaults: dict[str, Any]
    choices: dict[str, list[Any]]
    switches: dict[str, bool]

    def knows(self, key: str) -> bool:
        """True for a setting, and for a group of settings."""
        return key in self.defaults or key in self._groups

    @property
    def _groups(self) -> frozenset[str]:
        return _prefixes(tuple(self.defaults))


@cache
def _prefixes(keys: tuple[str, ...]) -> frozenset[str]:
    return frozenset(key[:at] for key in keys for at, letter in enumerate(key) if letter == ".")


def versions(host: str) -> list[str]:
    """The releases that there is a table for, newest first."""
    names = [path.stem.removeprefix(f"{host}-") for path in DATA.glob(f"{host}-*.json")]
    return sorted(names, key=_release, reverse=True)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


@cache
def stored(host: str, version: str) -> Table:
    content = json.loads((DATA / f"{host}-{version}.json").read_text())
    return Table(host, version, False, **content)


@cache
def installed(host: str) -> Table | None:
    """The release installed in this environment; nothing of the host is imported."""
    try:
        version = importlib.metadata.version(host)
        spec = importlib.util.find_spec(host)
    except (importlib.metadata.PackageNotFoundError, ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        content = read(host, Path(next(iter(spec.submodule_search_locations))))
    except (OSError, SyntaxError, yaml.YAMLError):
        return None
    return Table(host, version, True, **content)


def given(host: str, version: str) -> Table:
    """The table to read a release by: its own, or that of the newest one before it.

    Raises:
        AuditError: a version older than any table, or not a version.
    """
    here = installed(host)
    if here is not None and here.version == version:
        return here
    for known in versions(host):
        if _release(version) and _release(known) <= _release(version):
            return stored(host, known)
    raise AuditError(
        f"{host} {version!r} is not known; there are tables for {', '.join(versions(host))}"
    )


def candidates(host: str) -> list[Table]:
    """What a script may be written for, the likeliest first."""
    here = installed(host)
    tables = [stored(host, v) for v in versions(host) if here is None or v != here.version]
    return [here, *tables] if here is not None else tables


def read(host: str, package: Path) -> dict[str, Any]:
    """The content of a table, from the folder of the host's package."""
    return _read_verl(package) if host == "verl" else _read_openrlhf(package)


def _read_verl(package: Path) -> dict[str, Any]:
    """verl's own flattened configs; those of other engines only add names."""
    folder = package / "trainer" / "config"
    main = folder / "_generated_ppo_trainer.yaml"
    others = sorted(path for path in folder.glob("_generated_ppo_*_trainer.yaml") if path != main)
    defaults: dict[str, Any] = {}
    for path in [main, *others]:
        for key, value in flattened(load_yaml(path.read_text())).items():
            defaults.setdefault(key, value)
    return {"defaults": defaults, "choices": {}, "switches": {}}


def load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def flattened(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names to values, lists being values."""
    if not isinstance(node, dict) or (not node and prefix):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if key == "_target_":
            continue
        flat |= flattened(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


class _Parsed(Exception):
    """Stops the host's argument section once its parser is complete."""


def openrlhf_parser(package: Path) -> argparse.ArgumentParser:
    """OpenRLHF's own parser, built by running the argument section of its script and no more."""
    path = package / "cli" / "train_ppo_ray.py"
    tree = ast.parse(path.read_text())
    section = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    )
    made: list[argparse.ArgumentParser] = []

    class Parser(argparse.ArgumentParser):
        def parse_args(self, *args: Any, **kwargs: Any) -> Any:
            if not made:
                made.append(self)
                raise _Parsed
            return super().parse_args(*args, **kwargs)

    module = argparse.Namespace(**{**vars(argparse), "ArgumentParser": Parser})
    code = compile(ast.Module(section, type_ignores=[]), str(path), "exec")
    with contextlib.suppress(_Parsed):
        exec(code, {"argparse": module, "datetime": datetime, "__name__": "__main__"})
    return made[0]


def _read_openrlhf(package: Path) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    choices: dict[str, list[Any]] = {}
    switches: dict[str, bool] = {}
    for action in openrlhf_parser(package)._actions:
        for option in action.option_strings:
            if not option.startswith("--") or option == "--help":
                continue
            name, default = option[2:], action.default
            # One holds the time, another has no end.
            unstable = name.endswith("run_name") or default == float("inf")
            defaults[name] = None if unstable else default
            if action.choices is not None:
                choices[name] = list(action.choices)
            if action.nargs == 0:
                switches[name] = bool(action.const)
    return {"defaults": defaults, "choices": choices, "switches": switches}


def main() -> None:
    host, version, folder = sys.argv[1:]
    content = read(host, Path(folder))
    path = DATA / f"{host}-{version}.json"
    path.write_text(json.dumps(content, indent=0, sort_keys=True) + "\n")
    print(f"{path.name}: {len(content['defaults'])} settings")


if __name__ == "__main__":
    main()
