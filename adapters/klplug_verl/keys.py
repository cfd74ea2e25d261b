"""verl's own keys and names, as klplug reads and writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klplug.controllers import SETTINGS as CONTROLLER_SETTINGS
from klplug.hosting.references import SETTINGS as REFERENCE_SETTINGS
from klplug.hosting.settings import started
from klplug.hosting.stored import SETTINGS as SOURCE_SETTINGS

STOCK = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "full")
STOCK_NAMES = (*STOCK, *(f"{name}+" for name in STOCK))
"""What verl's ``kl_penalty`` knows."""

OTHERS = (*CONTROLLER_SETTINGS, *REFERENCE_SETTINGS, *SOURCE_SETTINGS)
KEYS = ("kl_type", "kl_coef", "kl_ctrl", *OTHERS)
KL_TYPE, KL_COEF, KL_CTRL, KL_TARGET, KL_HORIZON, *_ = (f"klplug.{key}" for key in KEYS)
REF_MODEL, REF_UPDATE, TEACHER = (f"klplug.{key}" for key in REFERENCE_SETTINGS)
(SOURCE,) = (f"klplug.{key}" for key in SOURCE_SETTINGS)

ACTOR = "actor_rollout_ref.actor."
REF = "actor_rollout_ref.ref."
USE_LOSS = ACTOR + "use_kl_loss"
LOSS_TYPE = ACTOR + "kl_loss_type"
LOSS_COEF = ACTOR + "kl_loss_coef"
LOSS_AGG = ACTOR + "loss_agg_mode"
LOSS_MODE = ACTOR + "policy_loss.loss_mode"
MINI_BATCH = ACTOR + "ppo_mini_batch_size"
EPOCHS = ACTOR + "ppo_epochs"
DYNAMIC = ACTOR + "use_dynamic_bsz"
STRATEGY = ACTOR + "strategy"
SEQUENCE_PARALLEL = tuple(
    f"{side}{inner}ulysses_sequence_parallel_size"
    for side in (ACTOR, REF)
    for inner in ("", "fsdp_config.")
)
MODEL = "actor_rollout_ref.model.path"
ADAPTERS = (
    "actor_rollout_ref.model.lora_adapter_path",
    "actor_rollout_ref.model.lora.adapter_path",
)
LORA = ("actor_rollout_ref.model.lora_rank", "actor_rollout_ref.model.lora.rank")
TRUST = "actor_rollout_ref.model.trust_remote_code"
TOKENIZER = "actor_rollout_ref.model.tokenizer_path"
TEMPLATE = "actor_rollout_ref.model.custom_chat_template"
WORKERS_REFERENCE = "actor_rollout_ref.klplug_ref_model"
WORKERS_UPDATE = "actor_rollout_ref.klplug_ref_update"
WORKERS_SOURCE = "actor_rollout_ref.klplug_source"
WORKERS_TEACHER = "actor_rollout_ref.klplug_teacher"
"""Workers see this node only."""
STILL = "none"
"""An update of the reference by which workers know a run of klplug's that has none: what a
checkpoint's reference had moved to is theirs, and not a stock run's."""
COEF_KEY = "klplug_kl_coef"
"""The controller's value, in a batch's meta information."""
N = "actor_rollout_ref.rollout.n"
TEMPERATURE = "actor_rollout_ref.rollout.temperature"
TOP_P, TOP_K = "actor_rollout_ref.rollout.top_p", "actor_rollout_ref.rollout.top_k"
LOGPROBS_MODE = "actor_rollout_ref.rollout.logprobs_mode"
RECORDS = "actor_rollout_ref.rollout.calculate_log_probs"
TRAIN_BATCH = "data.train_batch_size"
MAX_ANSWER = "data.max_response_length"
FETCHED = "async_training.require_batches"
USE_REWARD = "algorithm.use_kl_in_reward"
PENALTY = "algorithm.kl_penalty"
CTRL_TYPE = "algorithm.kl_ctrl.type"
CTRL_COEF = "algorithm.kl_ctrl.kl_coef"
CTRL_TARGET = "algorithm.kl_ctrl.target_kl"
CTRL_HORIZON = "algorithm.kl_ctrl.horizon"
ESTIMATOR = "algorithm.adv_estimator"
NORM_BY_STD = "algorithm.norm_adv_by_std_in_grpo"
GAMMA = "algorithm.gamma"
RESAMPLES = "algorithm.use_pf_ppo"
GDPO_KEYS = "algorithm.gdpo_reward_keys"
ROLLOUT_IS = "algorithm.rollout_correction.rollout_is"
REJECTS = "algorithm.rollout_correction.rollout_rs"
BYPASS = "algorithm.rollout_correction.bypass_mode"
USE_V1 = "trainer.use_v1"
TRAINER_MODE = "trainer.v1.trainer_mode"
CHECKPOINTS, SAVES = "trainer.default_local_dir", "trainer.save_freq"
VALIDATES_ONLY = "trainer.val_only"
ENGINE = "model_engine"
ACTOR_FILE = "actor@actor_rollout_ref.actor"
"""Hydra's choices of files, which are no settings."""
LEGACY = "trainer.use_legacy_worker_impl"
DISTILLS = "distillation.enabled"
DISTIL_MODE = "distillation.distillation_loss.loss_mode"
DISTIL_POLICY = "distillation.distillation_loss.use_policy_gradient"
DISTIL_COEF = "distillation.distillation_loss.distillation_loss_coef"
DISTILLS_BESIDE = "distillation.distillation_loss.use_task_rewards"

PLACES = (
    ("as_loss", USE_LOSS, LOSS_TYPE, LOSS_COEF),
    ("in_reward", USE_REWARD, PENALTY, CTRL_COEF),
)
"""By placement: the switch, the estimator's name, and the coefficient."""

DECIDED = (
    *(key for _, *keys in PLACES for key in keys),
    *(CTRL_TYPE, CTRL_TARGET, CTRL_HORIZON),
)
"""What ``kl_type`` and klplug's other keys decide, whatever verl's own say."""


def is_stock(name: str) -> bool:
    return name in STOCK_NAMES


def read(config: Any, path: str, default: Any = None) -> Any:
    for part in path.split("."):
        if config is None or part not in config:
            return default
        config = config[part]
    return default if config is None else config


class Config:
    """A live config of verl's as ``klplug.hosting.settings.Settings``.

    Args:
        config: defaults filled in.
        written: dotted key to value, only what the user wrote on the command line.
    """

    def __init__(self, config: Any, written: Mapping[str, Any] | None = None) -> None:
        self._config, self._written = config, {} if written is None else written

    @property
    def trainer(self) -> str:
        return started()

    def get(self, key: str, default: Any = None) -> Any:
        return read(self._config, key, default)

    def has(self, key: str) -> bool:
        parent, _, name = key.rpartition(".")
        node = read(self._config, parent) if parent else self._config
        return node is not None and name in node

    def wrote(self, key: str) -> bool:
        return key in self._written

    def named(self, key: str) -> str:
        return key

    def below(self, key: str) -> Any:
        return read(self._config, key)
