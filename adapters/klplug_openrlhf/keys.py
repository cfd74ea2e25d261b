"""OpenRLHF's options by one name each, whatever a release calls them and wherever they lie.

The names are the newest release's. On ``args`` such a name is one attribute, dots and all, while
the command line is parsed, and a path of nested namespaces afterwards. Before 0.10.2 the names had
no dots and nothing was nested.
"""

from __future__ import annotations

from typing import Any

FLAT = {
    "actor.model_name_or_path": "pretrain",
    "actor.policy_loss_type": "policy_loss_type",
    "actor.dual_clip": "dual_clip",
    "algo.advantage.estimator": "advantage_estimator",
    "algo.advantage.gamma": "gamma",
    "algo.advantage.is_correction_enable": "enable_vllm_is_correction",
    "algo.kl.estimator": "kl_estimator",
    "algo.kl.horizon": "kl_horizon",
    "algo.kl.init_coef": "init_kl_coef",
    "algo.kl.target": "kl_target",
    "algo.kl.use_loss": "use_kl_loss",
    "data.input_key": "input_key",
    "data.label_key": "label_key",
    "data.prompt_dataset": "prompt_data",
    "eval.dataset": "eval_dataset",
    "reward.model_name_or_path": "reward_pretrain",
    "rollout.n_samples_per_prompt": "n_samples_per_prompt",
    "vllm.num_engines": "vllm_num_engines",
}


def spelled(args: Any, name: str) -> str | None:
    """What this release calls an option, as parsed; ``None`` where it has none of that name."""
    return next((s for s in (name, FLAT.get(name)) if s in vars(args)), None)


def read(args: Any, name: str, default: Any = None) -> Any:
    """The value of an option, or ``default`` where the release does not have it."""
    own = spelled(args, name)
    if own is not None:
        return vars(args)[own]
    for part in name.split("."):
        if not hasattr(args, part):
            return default
        args = getattr(args, part)
    return args


def write(args: Any, name: str, value: Any) -> None:
    """Set an option that the release has, wherever it lies."""
    own = spelled(args, name)
    if own is None:
        parent, _, own = name.rpartition(".")
        args = read(args, parent)
    setattr(args, own, value)


def flag(args: Any, name: str) -> str:
    """An option as a user of this release writes it."""
    return f"--{spelled(args, name) or name}"
