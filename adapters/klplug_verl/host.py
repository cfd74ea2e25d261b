"""verl's row of ``klplug.hosts``."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from klplug.hosting.host import Host, of_teacher
from klplug.spec import KLSpec

WITHOUT_PLUGINS = ("0.7.", "0.8.")
"""Releases that know no entry points, and load what ``VERL_USE_EXTERNAL_MODULES`` names."""


def served(spec: KLSpec) -> str:
    if spec.needs_ppo:
        return "with loss_mode=vanilla"
    over = any(term.over_vocabulary for term in spec.terms)
    return of_teacher(spec) or ("with strategy=fsdp or fsdp2" if over else "yes")


def problems(environment: Mapping[str, str], version: str | None) -> list[str]:
    found = []
    plugins = environment.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    if plugins != "auto" and "klplug" not in plugins.split(","):
        found.append(
            f"VERL_USE_EXTERNAL_PLUGINS={plugins} keeps klplug out of verl: unset it, or name "
            "klplug and klplug_guard in it"
        )
    if version is not None and version.startswith(WITHOUT_PLUGINS):
        if "klplug_verl" not in environment.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
            found.append(
                f"verl {version} knows no plugins: set VERL_USE_EXTERNAL_MODULES=klplug_verl in "
                "every process"
            )
    elif version is not None:
        declared = {entry.name for entry in importlib.metadata.entry_points(group="verl.plugins")}
        if missing := {"klplug", "klplug_guard"} - declared:
            found.append(
                f"verl can't find klplug: the entry points {', '.join(sorted(missing))} of group "
                "verl.plugins are not installed. Install klplug, rather than putting it on a path"
            )
    return found


_ESTIMATORS = {
    **{"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2"},
    **{"low_var_kl": "k3", "k3": "k3"},
}

HOST = Host(
    name="verl",
    title="verl",
    tested=("0.9.1", "0.8.0", "0.7.1"),
    adapter="klplug_verl",
    packages=("klplug_verl", "klplug_verl_guard"),
    trainers=(
        r"verl\.trainer\.main_ppo(?:_v0|_sync)?",
        r"(?:verl\.)?recipe\.\w+\.main_(?!eval|gen)\w+",
        r".*verl/trainer/main_ppo\.py",
        r".*recipe/\w+/main_(?!eval|gen)\w+\.py",
        r"verl\.experimental\.fully_async_policy\.fully_async_main",
        r"verl\.experimental\.one_step_off_policy\.main_ppo",
        r"(?:verl\.)?recipe\.fully_async_policy\.fully_async_main",
    ),
    other_trainers=(r"verl\.(?:trainer|experimental)\.[\w.]+",),
    marks=r"\+{0,2}(?:actor_rollout_ref|algorithm)\.[\w.]+=",
    prints=r"(?:--(?:cfg|info)|-[ci])(?:=.*)?|--(?:hydra-)?help|-h|--version|--shell-completion|-sc",
    command="python -m verl.trainer.main_ppo",
    config="a config of verl's (actor_rollout_ref, algorithm)",
    patch="klplug_verl.hooks:PATCH",
    variables=("VERL_USE_EXTERNAL_PLUGINS", "VERL_USE_EXTERNAL_MODULES"),
    served=served,
    problems=problems,
    stock={
        "in_reward": {
            name: f"{estimator}_in_reward,reward_norm=group"
            for name, estimator in _ESTIMATORS.items()
        },
        "as_loss": {
            **{name: f"{estimator}_as_loss,ratio=none" for name, estimator in _ESTIMATORS.items()},
            # '+': the value of one estimator with the gradient of k2.
            **{f"{name}+": "k2_as_loss,ratio=none" for name in _ESTIMATORS},
        },
    },
    tags={
        "reward": ("critic/score/mean", "critic/rewards/mean"),
        "kl_host": ("actor/kl_loss", "actor/reward_kl_penalty"),
        "entropy": ("actor/entropy",),
        "length": ("response_length/mean",),
        "grad_norm": ("actor/grad_norm",),
        "seconds": ("perf/time_per_step", "timing_s/step"),
        "throughput": ("perf/throughput",),
    },
)
