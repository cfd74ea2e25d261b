"""Frameworks that klplug does not read: named, with what their KL is by default, and no verdict."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Framework:
    """One row of ``data/frameworks.json``.

    Attributes:
        title: its name as people write it.
        command: pattern of a part of its training command.
        keys: dotted names that its config file has, all of them; empty where it has none.
        kl: what its KL is by default.
        source: where that stands in its repository.
    """

    title: str
    command: str
    keys: tuple[str, ...]
    kl: str
    source: str

    def __str__(self) -> str:
        return (
            f"a run of {self.title}, which klplug does not audit; its KL by default: {self.kl} "
            f"({self.source})"
        )


@cache
def frameworks() -> tuple[Framework, ...]:
    text = (files("klplug.audit") / "data" / "frameworks.json").read_text(encoding="utf-8")
    return tuple(Framework(**{**row, "keys": tuple(row["keys"])}) for row in json.loads(text))


def started_by(words: Iterable[str]) -> Framework | None:
    """Whose training command this is."""
    line = " ".join(words)
    return next((row for row in frameworks() if re.search(row.command, line)), None)


def configured_by(keys: Collection[str]) -> Framework | None:
    """Whose config file has these dotted keys."""

    def has(name: str) -> bool:
        return any(key == name or key.startswith(f"{name}.") for key in keys)

    return next((row for row in frameworks() if row.keys and all(map(has, row.keys))), None)
