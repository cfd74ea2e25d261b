"""What each release of a host knows: its settings and their defaults.

Read from the release that is installed, or from the table that its adapter keeps, made by
``python -m klplug.audit.tables HOST VERSION FOLDER`` from an unpacked wheel; tests run it again.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from klplug.audit.errors import AuditError
from klplug.hosting.host import hosts


@dataclass(frozen=True)
class Table:
    """The settings of one release of a host.

    Attributes:
        host: its name.
        version: the release.
        installed: read from the release installed here, not from a table.
        defaults: name of a setting to its default.
        choices: settings that take one of a list.
        switches: flags that take no value.
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
    names = [path.stem for path in hosts()[host].tables.glob("*.json")]
    return sorted(names, key=_release, reverse=True)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


@cache
def stored(host: str, version: str) -> Table:
    content = json.loads((hosts()[host].tables / f"{version}.json").read_text())
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
    content: dict[str, Any] = hosts()[host].room("reading").table(package)
    return content


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


def main() -> None:
    host, version, folder = sys.argv[1:]
    content = read(host, Path(folder))
    path = hosts()[host].tables / f"{version}.json"
    path.write_text(json.dumps(content, indent=0, sort_keys=True) + "\n")
    print(f"{path}: {len(content['defaults'])} settings")


if __name__ == "__main__":
    main()
