"""What a command of the toy trainer says."""

from __future__ import annotations

from klplug.audit.settings import Launch, Setting
from klplug.audit.tables import Table

OWN = ("klplug.kl_type", "klplug.kl_coef")


def parsed(launch: Launch) -> Launch:
    return launch


def misses(table: Table, launch: Launch) -> list[Setting]:
    flags = (word for word in launch.args if word.text.startswith("--"))
    return [
        Setting(w.text, True, w.line, True)
        for w in flags
        if w.text[2:] not in (*table.defaults, *OWN)
    ]
