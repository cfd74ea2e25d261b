"""How a command of the toy trainer is made to follow a ``kl_type``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from klplug.audit.settings import MAIN, Settings, scalar
from klplug.hosting.settings import Edit


def edit(kl_type: str, kl_coef: str, settings: Settings) -> list[Edit]:
    return [
        Edit(MAIN, ("klplug_toy",)),
        *(Edit(key) for key in ("kl-kind", "kl-coef") if settings.wrote(key)),
        Edit("klplug.kl_type", ("--klplug.kl_type", kl_type), kl_type),
        Edit("klplug.kl_coef", ("--klplug.kl_coef", kl_coef), scalar(kl_coef)),
    ]


def written(words: Iterable[str]) -> str:
    return f"python -m {' '.join(words)}"


def how(settings: Settings) -> str:
    return "with klplug"


def without_klplug(kl_type: str, kl_coef: str, settings: Settings) -> Iterator[tuple[str, str]]:
    return iter(())
