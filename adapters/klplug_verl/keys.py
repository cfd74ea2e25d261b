"""verl's own keys and names, as klplug reads and writes them."""

from __future__ import annotations

from typing import Any

STOCK = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "full")
STOCK_NAMES = (*STOCK, *(f"{name}+" for name in STOCK))
"""What verl's ``kl_penalty`` knows."""

KEYS = ("kl_type", "kl_coef", "kl_ctrl", "kl_target", "kl_horizon")

USE_LOSS = "actor_rollout_ref.actor.use_kl_loss"
LOSS_TYPE = "actor_rollout_ref.actor.kl_loss_type"
LOSS_COEF = "actor_rollout_ref.actor.kl_loss_coef"
USE_REWARD = "algorithm.use_kl_in_reward"
PENALTY = "algorithm.kl_penalty"
CTRL_COEF = "algorithm.kl_ctrl.kl_coef"
RECORDS = "actor_rollout_ref.rollout.calculate_log_probs"


def is_stock(name: str) -> bool:
    return name in STOCK_NAMES


def read(config: Any, path: str, default: Any = None) -> Any:
    for part in path.split("."):
        if config is None or part not in config:
            return default
        config = config[part]
    return default if config is None else config
