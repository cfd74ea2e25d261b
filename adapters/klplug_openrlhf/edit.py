"""How a command of OpenRLHF's is made to follow a ``kl_type``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from klplug.audit.advice import advised
from klplug.audit.settings import MAIN, Settings
from klplug.hosting.settings import Edit
from klplug_openrlhf.host import HOST
from klplug_openrlhf.keys import (
    COEF,
    DECIDED,
    KIND,
    TARGET,
    UNBIASED,
    USE_LOSS,
)


def edit(kl_type: str, kl_coef: str, settings: Settings) -> list[Edit]:
    """klplug's launcher and options in the place of all that they decide.

    OpenRLHF's own controller, where it moved the coefficient, becomes klplug's.
    """
    target = settings[TARGET].value if settings.wrote(TARGET) else None
    trainer = Edit(MAIN, _launcher(settings))
    return [trainer, *advised(kl_type, kl_coef, target, DECIDED, _option, settings)]


def _option(key: str, text: str) -> tuple[str, ...]:
    return f"--{key}", text


def _launcher(settings: Settings) -> tuple[str, ...]:
    """A word for a module; for a script, which stands without ``-m``, two."""
    launch = settings.launch
    assert HOST.launcher is not None
    is_file = launch is not None and launch.trainer.endswith(".py")
    return ("-m", HOST.launcher) if is_file else (HOST.launcher,)


def written(words: Iterable[str]) -> str:
    """Words as they are typed into a shell."""
    return " ".join(["python", "-m", *(word for word in words if word != "-m")])


def how(settings: Settings) -> str:
    return "with klplug"


def without_klplug(kl_type: str, kl_coef: str, settings: Settings) -> Iterator[tuple[str, str]]:
    """What OpenRLHF itself has that comes near."""
    if kl_type == "k2_as_loss" and settings.has(UNBIASED):
        names = (settings.named(USE_LOSS), settings.named(UNBIASED), settings.named(COEF))
        yield "without klplug", f"{' '.join(names)} {kl_coef}"
    if kl_type == "k1_in_reward":
        yield "without klplug, clamped at 10 nats per token", f"{settings.named(KIND)} k1"
