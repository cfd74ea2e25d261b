"""The toy trainer's row of ``klplug.hosts``."""

from __future__ import annotations

from collections.abc import Mapping

from klplug.hosting.host import Host
from klplug.spec import KLSpec


def served(spec: KLSpec) -> str:
    return "yes" if all(term.placement == "as_loss" for term in spec.terms) else "no"


def problems(environment: Mapping[str, str], version: str | None) -> list[str]:
    return ["TOY_OFF=1 keeps klplug out"] if environment.get("TOY_OFF") == "1" else []


HOST = Host(
    name="toyrl",
    title="Toy RL",
    tested=("1.0",),
    adapter="klplug_toy",
    packages=("klplug_toy",),
    trainers=(r"toyrl\.train", r".*toyrl/train\.py"),
    other_trainers=(r"toyrl\.\w+",),
    launcher="klplug_toy",
    command="python -m toyrl.train",
    patch="klplug_toy.hooks:PATCH",
    setup="klplug_toy.hooks.install",
    variables=("TOY_OFF",),
    served=served,
    problems=problems,
    stock={"as_loss": {"k1": "k1_as_loss,ratio=none", "k3": "k3_as_loss,ratio=none"}},
    tags={"reward": ("toy/score",)},
)
