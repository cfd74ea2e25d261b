"""Where verl computes a KL, and what klplug does there instead.

Three processes matter. The command's own resolves the settings before anything is shipped. The
trainer (a Ray actor) joins an in-reward KL to the advantages and owns the controller. The workers
compute the KL loss of each micro-batch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import klplug
from klplug import parse
from klplug.hosting.cluster import after_ray_init, check_nodes
from klplug.hosting.folder import claim
from klplug.hosting.patching import Args, Call, Hook, HookError, Kwargs, Patch, bound
from klplug.hosting.settings import SettingsError
from klplug_verl import actor, hidden, moving, reference, stored, teacher, trainer
from klplug_verl.host import HOST
from klplug_verl.keys import CHECKPOINTS, SAVES, VALIDATES_ONLY, read
from klplug_verl.plan import Plan
from klplug_verl.settings import derive

TESTED = HOST.tested_text

# ── The command's own process: settings ─────────────────────────────────────────────────────────


def auto_set_device(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    """The first function of verl's main that sees the config; the config is klplug's to resolve."""
    config = bound(original, args, kwargs)["config"]
    result = original(*args, **kwargs)
    try:
        line = resolve(config, written_overrides())
        if line is not None:
            # A folder that is not there is made when Ray is up: verl has yet to check the config.
            claim_checkpoints(config, make=False)
            after_ray_init(partial(connected, config))
    except (ValueError, HookError) as error:
        fail(error)
    unused = (
        f"klplug {klplug.__version__} inactive: no klplug.kl_type, so verl's own KL is as it is"
    )
    print(unused if line is None else line, flush=True)
    return result


def fail(error: Exception) -> NoReturn:
    """As argparse does; Hydra would print a page of traceback."""
    print(f"klplug: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def claim_checkpoints(config: Any, make: bool) -> None:
    """The folder of a run that saves any."""
    if read(config, SAVES, -1) > 0 and not read(config, VALIDATES_ONLY):
        folder = read(config, CHECKPOINTS)
        claim(folder, f"{CHECKPOINTS}={folder}", config.klplug.kl_type, make)


def connected(config: Any) -> None:
    """To the cluster: its nodes are asked for klplug, and the folder is made."""
    check_cluster()
    try:
        claim_checkpoints(config, make=True)
    except SettingsError as error:
        fail(error)


_BEFORE_PLUGINS = (
    ". This verl knows no plugins: it loads klplug where VERL_USE_EXTERNAL_MODULES=klplug_verl is "
    "in the environment. +ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES="
    "klplug_verl sends it to every worker"
)


def check_cluster() -> None:
    """Stop unless verl finds klplug on every node of the cluster that it has just connected to."""
    try:
        check_nodes("verl", __name__, "" if _is_there(_V1) else _BEFORE_PLUGINS)
    except SettingsError as error:
        fail(error)


def written_overrides() -> dict[str, Any]:
    """What stands on the command line: a default of verl's can't contradict a kl_type."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not HydraConfig.initialized():
        return {}
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return {o.key_or_group: o.value() for o in overrides if not o.is_delete()}


def resolve(config: Any, written: Mapping[str, Any]) -> str | None:
    """``derive``, and the hooks of a run that asks for klplug are as expected."""
    line = derive(config, written)
    if line is not None:
        if _FAILURES:
            raise _FAILURES[0]
        hooks = of_run(config)
        Patch("verl", TESTED, hooks).check(parse(config.klplug.kl_type).requires)
    return line


def need_reference_policy(original: Call, _: Any, args: Args, kwargs: Kwargs) -> bool:
    """Whether verl loads a reference model: not for a KL to the sampler."""
    if not original(*args, **kwargs):
        return False
    plan = Plan.of(bound(original, args, kwargs)["config"])
    return plan is None or plan.needs_reference


def init_trainer(original: Call, own: Any, args: Args, kwargs: Kwargs) -> None:
    resolve(bound(original, args, kwargs)["config"], {})  # others than main may have made it
    trainer.init(original, own, args, kwargs)


def forward_step(original: Call, engine: Any, args: Args, kwargs: Kwargs) -> Any:
    """One micro-batch of FSDP's engine, for what its loss alone can't do."""
    room = stored if hasattr(engine, "klplug_stored") else hidden
    return room.forward_step(original, engine, args, kwargs)


# ── The table ───────────────────────────────────────────────────────────────────────────────────

_IN_TRAINER = (
    *("log_probs", "ref_log_probs", "response_mask"),
    *("group_ids", "sample_weights", "posterior_log_probs", "teacher_log_probs"),
)
_IN_WORKER = (
    "log_probs",
    "ref_log_probs",
    "old_log_probs",
    "rollout_log_probs",
    "response_mask",
    "advantages",
)

_ANY = (
    Hook("verl.utils.device", "auto_set_device", ("config",), auto_set_device),
    Hook("verl.trainer.ppo.utils", "need_reference_policy", ("config",), need_reference_policy),
    Hook("verl.utils.metric.utils", "reduce_metrics", ("metrics",), actor.reduce_metrics),
    Hook(
        "verl.trainer.ppo.ray_trainer",
        "apply_kl_penalty",
        ("data", "kl_ctrl", "kl_penalty"),
        trainer.apply_kl_penalty,
        supplies=_IN_TRAINER,
    ),
    Hook(
        "verl.trainer.ppo.rollout_corr_helper",
        "compute_rollout_correction_and_add_to_batch",
        ("batch",),
        trainer.rollout_correction,
    ),
)

# How workers compute a loss: through one function for all engines, since 0.8 the only way; in 0.7
# by default in a method of the FSDP worker.
_WORKER = "verl.workers.engine_workers"
_ENGINE_WORKER = (
    Hook(
        "verl.workers.utils.losses",
        "ppo_loss",
        ("config", "model_output", "data", "dp_group"),
        actor.ppo_loss,
        supplies=_IN_WORKER,
    ),
    Hook(
        _WORKER,
        "ActorRolloutRefWorker.init_model",
        ("self",),
        actor.init_model,
    ),
    Hook(
        _WORKER,
        "TrainingWorker.__init__",
        ("config",),
        reference.init_training_worker,
    ),
    Hook(_WORKER, "TrainingWorker.infer_batch", ("data",), teacher.infer_batch),
    Hook(_WORKER, "TrainingWorker.train_mini_batch", ("data",), moving.train_mini_batch),
    Hook(_WORKER, "TrainingWorker.save_checkpoint", ("local_path",), moving.save_checkpoint),
    Hook(_WORKER, "TrainingWorker.load_checkpoint", ("local_path",), moving.load_checkpoint),
)
_ACTOR = "verl.workers.actor.dp_actor"
_LEGACY_WORKER = (
    Hook(
        "verl.trainer.ppo.core_algos",
        "kl_penalty",
        ("logprob", "ref_logprob", "kl_penalty"),
        actor.kl_penalty,
    ),
    Hook(
        _ACTOR,
        "DataParallelPPOActor._forward_micro_batch",
        ("micro_batch",),
        actor.forward_micro_batch,
        supplies=_IN_WORKER,
    ),
    # A decorator hides its parameters.
    Hook(_ACTOR, "DataParallelPPOActor.update_policy", (), actor.update_policy),
    Hook(
        "verl.workers.fsdp_workers",
        "ActorRolloutRefWorker.init_model",
        ("self",),
        actor.init_model,
    ),
)

# vocab=exact and klplug.source, by FSDP's engine.
_FSDP = "verl.workers.engine.fsdp.transformer_impl"
_FORWARD = (
    Hook(
        _FSDP,
        "FSDPEngineWithLMHead.forward_step",
        ("micro_batch", "loss_function", "forward_only"),
        forward_step,
        supplies=("exact_kl",),
    ),
)
_HIDDEN = (
    *_FORWARD,
    Hook(_FSDP, "FSDPEngine.disable_adapter", ("self",), hidden.disable_adapter),
)

# The trainers: since 0.9 v1, and before, or with trainer.use_v1=False, RayPPOTrainer.
_V1 = "verl.trainer.ppo.v1.trainer_base"
_V1_TRAINER = (
    Hook(
        "verl.trainer.ppo.v1.utils",
        "compute_advantage_for_multi_trajectories",
        ("data", "batch_keys", "adv_estimator", "config"),
        trainer.compute_advantage_for_trajectories,
        supplies=_IN_TRAINER,
    ),
    Hook(_V1, "PPOTrainer.__init__", ("config",), init_trainer),
    Hook(
        _V1,
        "PPOTrainer._compute_ref_log_prob",
        ("batch", "metrics"),
        teacher.compute_ref_log_prob,
    ),
    Hook(_V1, "PPOTrainer._compute_advantage", ("batch", "metrics"), trainer.compute_advantage),
    Hook(_V1, "PPOTrainer._update_actor", ("batch", "metrics"), trainer.update_actor),
    Hook(_V1, "PPOTrainer._save_checkpoint", ("self",), trainer.save_checkpoint),
    Hook(_V1, "PPOTrainer._load_checkpoint", ("self",), trainer.load_checkpoint),
)
_RAY = "verl.trainer.ppo.ray_trainer"
_RAY_TRAINER = (
    Hook(
        _RAY,
        "compute_advantage",
        ("data", "adv_estimator", "config"),
        trainer.compute_advantage_of_rows,
        supplies=_IN_TRAINER,
    ),
    Hook(_RAY, "RayPPOTrainer.__init__", ("config",), init_trainer),
    Hook(_RAY, "RayPPOTrainer.fit", ("self",), trainer.fit),
    Hook(_RAY, "RayPPOTrainer._compute_old_log_prob", ("batch",), trainer.old_log_probs),
    Hook(
        _RAY,
        "RayPPOTrainer._compute_ref_log_prob",
        ("batch",),
        teacher.compute_ref_log_prob_in_fit,
    ),
    Hook(_RAY, "RayPPOTrainer._update_actor", ("batch",), trainer.update_actor_in_fit),
    Hook(_RAY, "RayPPOTrainer._save_checkpoint", ("self",), trainer.save_checkpoint),
    Hook(_RAY, "RayPPOTrainer._load_checkpoint", ("self",), trainer.load_checkpoint),
)


def _is_there(module: str) -> bool:
    """Whether the installed verl has a module, without importing any of it."""
    verl = find_spec("verl")
    places = (verl and verl.submodule_search_locations) or ()
    path = f"{module.partition('.')[2].replace('.', '/')}.py"
    return any(Path(place, path).exists() for place in places)


def of_run(config: Any) -> tuple[Hook, ...]:
    """The rows that a run passes through."""
    settings, plan = config.trainer, Plan.of(config)
    is_legacy = settings.get("use_legacy_worker_impl", "disable") != "disable"
    return (
        *_ANY,
        *(_LEGACY_WORKER if is_legacy else _ENGINE_WORKER),
        *(_V1_TRAINER if settings.get("use_v1", False) else _RAY_TRAINER),
        *(_HIDDEN if plan is not None and plan.over_vocabulary else ()),
        *(_FORWARD if plan is not None and plan.source is not None else ()),
    )


PATCH = Patch(
    host="verl",
    tested=TESTED,
    hooks=(
        *_ANY,
        *_ENGINE_WORKER,
        *_HIDDEN,
        *_RAY_TRAINER,
        *(_V1_TRAINER if _is_there(_V1) else ()),
        *(_LEGACY_WORKER if _is_there(_ACTOR) else ()),
    ),
)

_FAILURES: list[HookError] = []


def apply_to(module: ModuleType) -> None:
    """Post-import hook of ``klplug_verl.install``: a moved function is said at once, and a run that
    asks for klplug stops at ``auto_set_device`` or at the trainer."""
    try:
        PATCH.apply_to(module)
    except HookError as error:
        _FAILURES.append(error)
        print(f"klplug: WARNING: {error}", file=sys.stderr, flush=True)
