"""One report on a command that is one of several, by conditions that only a run decides."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from klplug.audit.report import Report

# What may differ between two ways of one command; the rest is the same for all.
_FIELDS = (
    *("gradient", "scope", "updates_per_rollout", "corrected", "rollout_corrected", "beta"),
    *("beta_absolute", "beta_relative", "dead_zone", "terms", "kl_type", "recommended"),
)


def bears(keys: Collection[str]) -> Callable[[str], bool]:
    """Whether a word may change a report: every word but the override of another key than these."""

    def may(text: str) -> bool:
        match = re.match(r"\+{0,2}(\w[\w.@/-]*)=", text)
        return match is None or match[1] in keys or "klplug" in match[1]

    return may


def together(reports: Sequence[Report], lines: Sequence[int]) -> Report:
    """What all ways of a command have in common; of the rest, each way's value.

    Args:
        reports: one per way, the usual one first.
        lines: where the conditions stand.
    """
    first = reports[0]
    unknown = dict(first.unknown)
    values: dict[str, Any] = {}
    where = ", ".join(str(line) for line in lines)
    for name in _FIELDS:
        told = [getattr(report, name) for report in reports]
        if any(value != told[0] for value in told[1:]):
            ways = " or ".join(dict.fromkeys(_shown(value) for value in told))
            values[name] = () if name in ("dead_zone", "terms") else None
            unknown[name] = (f"{ways}, by the condition on line {where}",)
    if "gradient" in values:
        values["target"] = None
    if "recommended" in values:
        values |= {"instead": (), "after": None, "edits": ()}
    found = {(f.id, f.message): f for report in reports for f in report.findings}
    by_gravity = sorted(found.values(), key=lambda f: _GRAVITY.index(f.severity))
    return replace(first, findings=tuple(by_gravity), unknown=unknown, **values)


_GRAVITY = ("error", "warning", "info")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} of them"
    return f"{value:g}" if isinstance(value, float) else str(value)
