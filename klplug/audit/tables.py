"""What each release of a host knows: its settings and their defaults.

Read from the folder of the host's package beside the script, from the release that is installed,
or from the table that its adapter keeps. ``python -m klplug.audit.tables HOST VERSION=FOLDER ...``
makes those from unpacked wheels: the newest in full, each other as what differs from the next
newer one. Tests run it again.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from klplug.audit.errors import AuditError
from klplug.hosting.host import hosts


@dataclass(frozen=True)
class Source:
    """How a package that lies beside a script applies its KL, next to the releases' code.

    Attributes:
        folder: the package.
        like: the release whose estimators it has; empty where it has no release's.
        changed: the functions whose code is no release's, by file and name, and what they bear
            on, in the adapter's words.
        facts: where it applies a KL, in the adapter's words.
        kept: the estimators that are a release's, where the function that has them is not.
        unless: settings by which code that is a release's else becomes its own, with that code.
    """

    folder: Path
    like: str = ""
    changed: tuple[tuple[str, str], ...] = ()
    facts: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    unless: tuple[tuple[str, str], ...] = ()


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
        source: how the package beside the script applies its KL; ``None`` for a release.
        unread: the package beside the script that it stands in for, and why that was not read.
    """

    host: str
    version: str
    installed: bool
    defaults: dict[str, Any]
    choices: dict[str, list[Any]]
    switches: dict[str, bool]
    source: Source | None = None
    unread: str = ""

    @property
    def like(self) -> str:
        """The release whose KL functions it has."""
        return self.version if self.source is None else self.source.like or self.version

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


def before(version: str, release: tuple[int, int]) -> bool:
    """Whether a version is of a minor before this one."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < release


@cache
def stored(host: str, version: str) -> Table:
    content = json.loads((hosts()[host].tables / f"{version}.json").read_text())
    if "after" in content:
        newer = stored(host, content["after"])
        full = {part: _merged(getattr(newer, part), content[part]) for part in _PARTS}
        return Table(host, version, False, full["defaults"], full["choices"], full["switches"])
    return Table(host, version, False, **content)


_PARTS = ("defaults", "choices", "switches")


def _merged(newer: dict[str, Any], older: dict[str, Any]) -> dict[str, Any]:
    """A part of an older table: what is new or changed in it, and what it lacks."""
    kept = {key: value for key, value in newer.items() if key not in older["lacks"]}
    return {**kept, **older["has"]}


def _difference(newer: dict[str, Any], older: dict[str, Any]) -> dict[str, Any]:
    has = {k: v for k, v in older.items() if k not in newer or not _same(newer[k], v)}
    return {"has": has, "lacks": sorted(newer.keys() - older.keys())}


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


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
    """The table to read a release by: that of its minor, or of the newest one before it.

    Raises:
        AuditError: a version older than any table, or not a version.
    """
    here = installed(host)
    if here is not None and here.version == version:
        return here
    asked = _release(version)
    older = [known for known in versions(host) if asked and _release(known) <= asked]
    minor = [known for known in versions(host) if asked and _release(known)[:2] == asked[:2]]
    if older and (not minor or older[0] in minor):
        return stored(host, older[0])
    if minor:
        return stored(host, minor[-1])
    raise AuditError(
        f"{host} {version!r} is not known; there are tables for {', '.join(versions(host))}"
    )


def candidates(host: str) -> list[Table]:
    """What a script may be written for, the likeliest first."""
    here = installed(host)
    tables = [stored(host, v) for v in versions(host) if here is None or v != here.version]
    return [here, *tables] if here is not None else tables


_HEIGHT = 6  # how many folders up from a script its host's package is looked for


def beside(host: str, folder: Path, fork: str = "") -> Table | None:
    """The package of the host that lies in a folder above the script, as a checkout has it.

    Args:
        host: its name.
        folder: of the script.
        fork: the package of another name that the script starts, which may be a copy of the host's.

    Raises:
        AuditError: it is there, and can't be read.
    """
    marks: tuple[str, ...] = getattr(hosts()[host].room("sources"), "MARKS", ())
    for name in dict.fromkeys(name for name in (host, fork) if name and marks):
        # Of another name, a package that has the host's first file may be anybody's.
        place = _above(folder, name, marks[:1] if name == host else marks)
        if place is not None:
            return _package(host, place)
    return None


def _above(folder: Path, name: str, marks: Sequence[str]) -> Path | None:
    """The folder of that name with these files in it, in a folder above the script."""
    above = folder.resolve()
    for parent in (above, *above.parents[: _HEIGHT - 1]):
        for place in (parent / name, parent / name / name, parent / "src" / name):
            try:
                there = all((place / mark).is_file() for mark in marks)
            except OSError as error:
                raise AuditError(f"{place}: {error.strerror or error}") from None
            if there:
                return place
        if (parent / ".git").exists():
            break
    return None


@cache
def _package(host: str, package: Path) -> Table:
    sources = hosts()[host].room("sources")
    try:
        content = read(host, package)
        source: Source = sources.source(package)
        version: str = sources.version(package)
    except OSError as error:
        raise AuditError(f"{error.filename or package}: {error.strerror or error}") from None
    except SyntaxError as error:
        raise AuditError(f"{package}: no Python on line {error.lineno}: {error.msg}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise AuditError(f"{package}: {str(error).splitlines()[0]}") from None
    if content["defaults"].keys() <= {""}:
        raise AuditError(f"{package}: its configuration has no settings")
    if len(_release(version)) < 2:
        version = source.like or _nearest(host, content["defaults"].keys())
    return Table(host, version, False, **content, source=source)


def _nearest(host: str, keys: Collection[str]) -> str:
    """The release whose settings are most like these."""
    return min(versions(host), key=lambda v: len(stored(host, v).defaults.keys() ^ set(keys)))


def read(host: str, package: Path) -> dict[str, Any]:
    """The content of a table, from the folder of the host's package."""
    content: dict[str, Any] = hosts()[host].room("sources").table(package)
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
    host, *pairs = sys.argv[1:]
    folders = dict(pair.split("=", 1) for pair in pairs)
    newer: tuple[str, dict[str, Any]] | None = None
    for version in sorted(folders, key=_release, reverse=True):
        # As JSON has it: no tuples.
        content = json.loads(json.dumps(read(host, Path(folders[version]))))
        kept = content
        if newer is not None:
            parts = {part: _difference(newer[1][part], content[part]) for part in _PARTS}
            kept = {"after": newer[0], **parts}
        path = hosts()[host].tables / f"{version}.json"
        path.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n")
        print(f"{path}: {len(content['defaults'])} settings")
        newer = version, content


if __name__ == "__main__":
    main()
