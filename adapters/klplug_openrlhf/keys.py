"""OpenRLHF's options by one name each, whatever a release calls them and wherever they lie.

The names are the newest release's. On ``args`` such a name is one attribute, dots and all, while
the command line is parsed, and a path of nested namespaces afterwards. Before 0.10.2 the names had
no dots and nothing was nested.
"""

from __future__ import annotations

from typing import Any

from klplug.controllers import SETTINGS as CONTROLLER_SETTINGS
from klplug.hosting.references import SETTINGS as REFERENCE_SETTINGS
from klplug.hosting.settings import started
from klplug.hosting.stored import SETTINGS as SOURCE_SETTINGS

FLAT = {
    "actor.dual_clip": "dual_clip",
    "actor.gradient_checkpointing_enable": "gradient_checkpointing",
    "actor.loss_agg_mode": "loss_agg_mode",
    "actor.policy_loss_type": "policy_loss_type",
    "actor.model_name_or_path": "pretrain",
    "algo.advantage.estimator": "advantage_estimator",
    "algo.advantage.gamma": "gamma",
    "algo.advantage.is_correction_enable": "enable_vllm_is_correction",
    "algo.advantage.is_correction_level": "vllm_is_correction_level",
    "algo.advantage.no_std_norm": "no_advantage_std_norm",
    "algo.kl.estimator": "kl_estimator",
    "algo.kl.horizon": "kl_horizon",
    "algo.kl.init_coef": "init_kl_coef",
    "algo.kl.target": "kl_target",
    "algo.kl.unbiased_gradient": "unbiased_kl_gradient",
    "algo.kl.use_loss": "use_kl_loss",
    "ckpt.disable_ds": "disable_ds_ckpt",
    "ckpt.path": "ckpt_path",
    "ckpt.save_steps": "save_steps",
    "data.apply_chat_template": "apply_chat_template",
    "data.max_len": "max_len",
    "ds.load_in_4bit": "load_in_4bit",
    "ds.lora.rank": "lora_rank",
    "ds.packing_samples": "packing_samples",
    "ds.ring_attn_size": "ring_attn_size",
    "ds.tensor_parallel_size": "ds_tensor_parallel_size",
    "eval.steps": "eval_steps",
    "reward.clip_range": "reward_clip_range",
    "rollout.batch_size": "rollout_batch_size",
    "rollout.max_new_tokens": "max_new_tokens",
    "rollout.n_samples_per_prompt": "n_samples_per_prompt",
    "rollout.temperature": "temperature",
    "rollout.top_p": "top_p",
    "train.async_enable": "async_train",
    "train.batch_size": "train_batch_size",
    "train.max_epochs": "max_epochs",
    "vllm.num_engines": "vllm_num_engines",
}

USE_LOSS, KIND, COEF = "algo.kl.use_loss", "algo.kl.estimator", "algo.kl.init_coef"
TARGET, HORIZON = "algo.kl.target", "algo.kl.horizon"
UNBIASED = "algo.kl.unbiased_gradient"
ESTIMATOR, GAMMA = "algo.advantage.estimator", "algo.advantage.gamma"
NO_STD = "algo.advantage.no_std_norm"
IS_LEVEL, IS_ENABLE = "algo.advantage.is_correction_level", "algo.advantage.is_correction_enable"
POLICY_LOSS, LOSS_AGG = "actor.policy_loss_type", "actor.loss_agg_mode"
DUAL_CLIP = "actor.dual_clip"
CLIPS_REWARD = "reward.clip_range"
RECOMPUTES = "actor.gradient_checkpointing_enable"
ROLLOUT_BATCH, N = "rollout.batch_size", "rollout.n_samples_per_prompt"
TRAIN_BATCH, EPOCHS = "train.batch_size", "train.max_epochs"
ASYNC = "train.async_enable"
TOP_P, TEMPERATURE = "rollout.top_p", "rollout.temperature"
ENGINES = "vllm.num_engines"
PRETRAIN = "actor.model_name_or_path"
CHAT = "data.apply_chat_template"
MAX_LEN, MAX_NEW_TOKENS = "data.max_len", "rollout.max_new_tokens"
RING, TENSOR_PARALLEL = "ds.ring_attn_size", "ds.tensor_parallel_size"
LORA, IN_4_BITS = "ds.lora.rank", "ds.load_in_4bit"
CHECKPOINTS, NO_CHECKPOINTS = "ckpt.path", "ckpt.disable_ds"
SAVES = ("ckpt.save_steps", "eval.steps")  # each so many steps, the best at an evaluation; or -1
PACKING = "ds.packing_samples"

KL_TYPE, KL_COEF = "klplug.kl_type", "klplug.kl_coef"
KL_CTRL, KL_TARGET, KL_HORIZON = "klplug.kl_ctrl", "klplug.kl_target", "klplug.kl_horizon"
CONTROL = tuple(f"klplug.{name}" for name in CONTROLLER_SETTINGS)
REFERENCE = tuple(f"klplug.{name}" for name in REFERENCE_SETTINGS)
REF_MODEL, REF_UPDATE, TEACHER = REFERENCE
(SOURCE,) = (f"klplug.{name}" for name in SOURCE_SETTINGS)
OWN = (KL_TYPE, KL_COEF, KL_CTRL, *CONTROL, *REFERENCE, SOURCE)

DECIDED = (USE_LOSS, KIND, COEF, TARGET, HORIZON, UNBIASED)
"""What ``kl_type`` and klplug's other options decide, whatever OpenRLHF's own say."""

STOCK_ESTIMATORS = ("k1", "k2", "k3")


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


class Arguments:
    """A parsed command line of OpenRLHF's as ``klplug.hosting.settings.Settings``.

    Args:
        args: dotted names, defaults filled in.
        written: the same, holding only what the user wrote.
    """

    def __init__(self, args: Any, written: Any = None) -> None:
        self._args, self._written = args, written

    @property
    def trainer(self) -> str:
        return started()

    def get(self, key: str, default: Any = None) -> Any:
        return read(self._args, key, default)

    def has(self, key: str) -> bool:
        return spelled(self._args, key) is not None or read(self._args, key, _NOTHING) != _NOTHING

    def wrote(self, key: str) -> bool:
        return self._written is not None and spelled(self._written, key) is not None

    def named(self, key: str) -> str:
        return flag(self._args, key)

    def below(self, key: str) -> Any:
        return {k: v for k, v in vars(self._args).items() if k.startswith(f"{key}.")}


_NOTHING = object()
