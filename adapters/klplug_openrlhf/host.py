"""OpenRLHF's row of ``klplug.hosts``."""

from __future__ import annotations

import json
from collections.abc import Mapping

from klplug.hosting.host import Host, of_teacher
from klplug.spec import KLSpec

SETUP_HOOK = "klplug_openrlhf.install.install"
"""Ray's ``worker_process_setup_hook``, by which every worker of a run installs klplug."""

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def served(spec: KLSpec) -> str:
    if any(term.reward_norm == "group" for term in spec.terms):
        return "no: reward_norm=group is verl's own order"
    if spec.needs_ppo:
        return "with policy_loss_type=ppo"
    return of_teacher(spec) or "yes"


def problems(environment: Mapping[str, str], version: str | None) -> list[str]:
    try:
        job = json.loads(environment.get(_JOB, "{}"))
        hook = (job.get("runtime_env") or {}).get("worker_process_setup_hook")
    except (ValueError, AttributeError):
        return [f"{_JOB} is no JSON object"]
    if hook in (None, SETUP_HOOK):
        return []
    return [
        f"the Ray job has worker_process_setup_hook={hook!r}, whose place klplug needs on "
        f"OpenRLHF: call {SETUP_HOOK}() from it"
    ]


HOST = Host(
    name="openrlhf",
    title="OpenRLHF",
    tested=("0.11.2", "0.10.4", "0.9.10"),
    adapter="klplug_openrlhf",
    packages=("klplug_openrlhf",),
    trainers=(r"openrlhf\.cli\.train_ppo(?:_ray)?", r".*openrlhf/cli/train_ppo(?:_ray)?\.py"),
    other_trainers=(r"openrlhf\.cli\.\w+",),
    marks=(
        r"--(?:micro_rollout_batch_size|(?:actor|ref)_num_gpus_per_node|rollout\.micro_batch_size"
        r"|(?:actor|ref)\.num_gpus_per_node|algo\.(?:kl|advantage)\.\w+)(?:=|$)"
    ),
    launcher="klplug_openrlhf",
    command="python -m openrlhf.cli.train_ppo_ray",
    config="OpenRLHF's flags (algo.kl.init_coef, ...)",
    patch="klplug_openrlhf.hooks:PATCH",
    setup=SETUP_HOOK,
    variables=(_JOB,),
    served=served,
    problems=problems,
    stock={
        "in_reward": {name: f"{name}_in_reward" for name in ("k1", "k2", "k3")},
        "as_loss": {name: f"{name}_as_loss,ratio=none" for name in ("k1", "k2", "k3")},
    },
    tags={
        "reward": ("reward",),
        "kl_host": ("kl",),
        "entropy": ("entropy", "entropy_loss"),
        "length": ("response_length",),
        "grad_norm": ("actor_grad_norm",),
        "seconds": ("timing/step_total",),
    },
)
