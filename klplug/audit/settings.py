"""What a run was told: settings as written, over the defaults of one release of its host."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from klplug.audit.tables import Table
from klplug.spec import KLSpec, check_kl_coef


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


class Settings:
    """The settings of one run; what was not written has the table's default."""

    def __init__(self, table: Table, written: Mapping[str, Setting]) -> None:
        self.table = table
        self.written = dict(written)

    def __getitem__(self, key: str) -> Setting:
        if key in self.written:
            return self.written[key]
        return Setting(key, self.table.defaults.get(key))

    def has(self, key: str) -> bool:
        return key in self.written or key in self.table.defaults

    def on(self, key: str) -> bool:
        value = self[key].value
        return value is True or str(value).lower() in ("true", "1", "yes", "on")

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


def unknown_settings(
    host: str, table: Table, misses: list[Setting], version_from: str
) -> list[Rejected]:
    """What to say of settings that the table lacks: of a guessed release, only once."""
    if version_from != "guessed":
        return [
            Rejected(setting, f"{host} {table.version} has no setting {setting.key}")
            for setting in misses
        ]
    names = ", ".join(setting.key for setting in misses[:4])
    more = f" and {len(misses) - 4} more" if len(misses) > 4 else ""
    return [
        Rejected(
            misses[0],
            f"no release of {host} known here has all settings of this command; {table.version}, "
            f"the nearest, lacks {names}{more}",
        )
    ]


def refused_coefficient(spec: KLSpec, own: Setting, amount: Setting) -> list[Rejected]:
    """What klplug says to the coefficient of a kl_type, if it refuses it."""
    if amount.unknown:
        return []
    try:
        check_kl_coef(spec, amount.value)
    except ValueError as error:
        return [Rejected(amount if amount.written else own, f"klplug refuses it: {error}")]
    return []


def scalar(text: str) -> Any:
    """A value as Hydra and OmegaConf read it from a command line."""
    stripped = text.strip()
    if len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\"":
        return stripped[1:-1]
    lower = stripped.lower()
    if lower in ("true", "false"):
        return lower == "true"
    if lower in ("null", "none", "~", ""):
        return None if lower != "none" else stripped
    if re.fullmatch(r"[+-]?\d+", stripped):
        return int(stripped)
    try:
        return float(stripped) if re.fullmatch(r"[+-]?[\d.]+([eE][+-]?\d+)?", stripped) else text
    except ValueError:
        return text


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
