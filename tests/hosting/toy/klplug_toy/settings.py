"""From klplug's flags to the toy trainer's."""

from __future__ import annotations

import argparse
from typing import Any

from klplug.hosting.settings import SettingsError
from klplug_toy.plan import asked
from klplug_toy.refusals import refusals


class Arguments:
    """A parsed command line as ``klplug.hosting.settings.Settings``."""

    trainer = "toyrl"

    def __init__(self, args: argparse.Namespace) -> None:
        self._values = {key.replace("_", "-"): value for key, value in vars(args).items()}
        self._values |= {k: v for k, v in vars(args).items() if k.startswith("klplug.")}

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def has(self, key: str) -> bool:
        return key in self._values

    def wrote(self, key: str) -> bool:
        return key in self._values

    def named(self, key: str) -> str:
        return f"--{key}"

    def below(self, key: str) -> Any:
        return {k: v for k, v in self._values.items() if k.startswith(f"{key}.")}


def derive(args: argparse.Namespace) -> None:
    """Set the toy trainer's flags in ``args``."""
    own = Arguments(args)
    plan = asked(own)
    for refusal in refusals(plan, own):
        raise SettingsError(refusal.words)
    args.kl_kind, args.kl_coef = str(plan.spec), plan.kl_coef
