"""What a command of the toy trainer says, and what the trainer makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from klplug import parse
from klplug.audit.run import Advantage, Run, Term
from klplug.audit.settings import Launch, Rejected, Setting, Settings, scalar
from klplug.audit.tables import Table
from klplug_toy.host import HOST

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


def settings(table: Table, launch: Launch, version_from: str) -> Settings:
    written, spelled = {}, {}
    pairs = zip(launch.args[::2], launch.args[1::2], strict=True)
    for flag, value in pairs:
        key = flag.text.removeprefix("--")
        written[key] = Setting(key, scalar(value.text), flag.line, True, value.unknown)
        spelled[key] = (flag, value)
    rejected = tuple(Rejected(s, f"there is no flag {s.key}") for s in misses(table, launch))
    return Settings(table, version_from, written, spelled, launch, prefix="--", rejected=rejected)


def run(settings: Settings) -> Run:
    assert settings.launch is not None
    through_klplug = settings.launch.trainer == HOST.launcher
    kind, amount = settings["kl-kind"], settings["kl-coef"]
    kl_type = HOST.stock["as_loss"].get(str(kind.value))
    refused = list(HOST.refused(settings)) if through_klplug else []
    if through_klplug:
        kind, amount = settings["klplug.kl_type"], settings["klplug.kl_coef"]
        kl_type = str(kind.value)
    coef = settings.coefficient(amount.key)
    terms = [] if refused or kl_type is None else parse(kl_type).terms
    return Run(
        host=HOST.name,
        version=settings.table.version,
        version_from=settings.version_from,
        advantage=Advantage(setting=Setting("", None)),
        terms=tuple(
            Term(term, coef, kind, kind, amount, from_klplug=through_klplug) for term in terms
        ),
        rejected=settings.rejected,
        refused=tuple(Rejected(settings[r.key or "klplug.kl_type"], r.words) for r in refused),
    )


def table(package: Path) -> dict[str, Any]:
    from toyrl.train import parser

    flags = [action for action in parser()._actions if action.option_strings != ["-h", "--help"]]
    defaults = {action.option_strings[0][2:]: action.default for action in flags}
    return {"defaults": defaults, "choices": {}, "switches": {}}
