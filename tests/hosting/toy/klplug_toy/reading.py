"""What the toy trainer makes of its settings."""

from __future__ import annotations

from klplug import parse
from klplug.audit.run import Advantage, Run, Term
from klplug.audit.settings import Launch, Rejected, Setting, Settings, scalar
from klplug.audit.tables import Table
from klplug_toy.command import misses
from klplug_toy.host import HOST


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
