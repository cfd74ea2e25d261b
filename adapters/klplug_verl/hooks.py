"""Where verl computes a KL, and what klplug does there instead.

Three processes matter. The command's own resolves the settings before anything is shipped. The
trainer (a Ray actor) joins an in-reward KL to the advantages and owns the controller. The workers
compute the KL loss of each micro-batch; of the settings they see only ``kl_loss_type``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import klplug
from klplug import KLSpec, Tally, kl_term, parse, reward_to_go
from klplug.host import MeasuredController, announce
from klplug.patching import Hook, HookError, Patch
from klplug_verl.settings import LOSS_TYPE, Plan, derive, is_stock

Call = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

ACTIVE = "klplug/active"
COEF_KEY = "klplug_kl_coef"  # the controller's value, in the batch's meta information
SUMS, MAXIMA = "klplug/sum/", "klplug/max/"
STATE_FILE = "klplug.json"


def _bound(original: Call, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


# ── The command's own process: settings ─────────────────────────────────────────────────────────


def auto_set_device(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    """The first function of verl's main that sees the config; the config is klplug's to resolve."""
    config = _bound(original, args, kwargs)["config"]
    result = original(*args, **kwargs)
    try:
        line = derive(config, written_overrides())
        if line is not None:
            _check(config)
    except (ValueError, HookError) as error:
        # As argparse does; Hydra would print a page of traceback.
        print(f"klplug: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    unused = (
        f"klplug {klplug.__version__} inactive: no klplug.kl_type, so verl's own KL is as it is"
    )
    print(unused if line is None else line, flush=True)
    return result


def written_overrides() -> dict[str, Any]:
    """What stands on the command line: a default of verl's can't contradict a kl_type."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not HydraConfig.initialized():
        return {}
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return {o.key_or_group: o.value() for o in overrides if not o.is_delete()}


# ── The workers: the KL of one micro-batch ──────────────────────────────────────────────────────


@functools.lru_cache
def loss_spec(kl_loss_type: str) -> KLSpec | None:
    """The formulation that ``kl_loss_type`` names, or ``None`` for one of verl's own."""
    if is_stock(kl_loss_type):
        return None
    spec = parse(kl_loss_type)
    if spec.placed("as_loss") != spec:
        raise ValueError(f"{LOSS_TYPE}={spec}: this key takes kl_types that end in _as_loss")
    return spec


def init_model(original: Call, worker: Any, args: Args, kwargs: Kwargs) -> Any:
    result = original(*args, **kwargs)
    actor = worker.config.actor
    if "actor" in worker.role and actor.use_kl_loss:
        spec = loss_spec(actor.kl_loss_type)
        if spec is not None:
            announce("a worker", spec, actor.kl_loss_coef)
    return result


def ppo_loss(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    given = _bound(original, args, kwargs)
    config, data = given["config"], given["data"]
    spec = loss_spec(config.kl_loss_type) if config.use_kl_loss else None
    if spec is None:
        return original(*args, **kwargs)
    # verl's own loss without its KL; the config is frozen, and global_batch_info stays shared.
    given["config"] = without_kl = copy.copy(config)
    object.__setattr__(without_kl, "use_kl_loss", False)
    policy_loss, metrics = original(**given)
    return _with_kl(spec, config, given["model_output"], data, policy_loss, metrics)


def _with_kl(
    spec: KLSpec,
    config: Any,
    model_output: Any,
    data: Any,
    policy_loss: Tensor,
    metrics: dict[str, Any],
) -> tuple[Tensor, dict[str, Any]]:
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils import tensordict_utils as tu
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    names = ("response_mask", "ref_log_prob", "old_log_probs", "rollout_log_probs")
    tensors = data.select(*(name for name in names if name in data)).to_padded_tensor()
    mask = tensors["response_mask"].to(bool)
    term = kl_term(
        spec,
        no_padding_2_padding(model_output["log_probs"], data),
        tensors.get("ref_log_prob", None),
        mask,
        old_log_probs=tensors.get("old_log_probs", None),
        rollout_log_probs=tensors.get("rollout_log_probs", None),
    )
    kl_loss = agg_loss(
        loss_mat=term.loss,
        loss_mask=mask,
        loss_agg_mode=config.loss_agg_mode,
        **config.global_batch_info,
    )
    coef = tu.get_non_tensor_data(data=data, key=COEF_KEY, default=None)
    coef = config.kl_loss_coef if coef is None else coef
    metrics["kl_loss"] = Metric(kl_aggregation(metrics), kl_loss)
    metrics["kl_coef"] = coef
    # verl adds up a SUM over micro-batches, then takes means over ranks and mini-batches: one
    # common factor, which reduce_metrics below divides out again.
    tally = term.tally
    parts = {SUMS + name: value for name, value in tally.sums.items()}
    parts |= {MAXIMA + name: value for name, value in tally.maxima.items()}
    # A Metric holds numbers: one transfer from the device for all of them.
    numbers = torch.stack([value.double() for value in parts.values()]).tolist()
    for name, number in zip(parts, numbers, strict=True):
        kind = AggregationType.SUM if name.startswith(SUMS) else AggregationType.MAX
        metrics[name] = Metric(kind, number)
    return policy_loss + coef * kl_loss, metrics


def kl_aggregation(metrics: dict[str, Any]) -> Any:
    """As verl's own loss of the same micro-batch is added up."""
    return metrics["actor/pg_loss"].aggregation


def reduce_metrics(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    """verl's reduction, then klplug's metrics from the reduced sums and maxima."""
    metrics = original(*args, **kwargs)
    parts: dict[str, dict[str, Tensor]] = {SUMS: {}, MAXIMA: {}}
    for key in [key for key in metrics if SUMS in key or MAXIMA in key]:
        prefix = SUMS if SUMS in key else MAXIMA
        name = key.partition(prefix)[2]
        parts[prefix][name] = torch.tensor(float(metrics.pop(key)), dtype=torch.float64)
    if parts[SUMS]:
        tally = Tally(parts[SUMS], parts[MAXIMA])
        metrics.update({key: float(value) for key, value in tally.metrics().items()})
    return metrics


# ── The trainer: advantages, controller, checkpoints ────────────────────────────────────────────


@dataclass
class Run:
    """The trainer's plan, its controller, and what it measured at the start of this step."""

    plan: Plan
    controller: MeasuredController
    n_samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def is_as_loss(self) -> bool:
        return self.plan.spec.placed("as_loss").estimator != "none"


_RUN: ContextVar[Run | None] = ContextVar("klplug_run", default=None)


def _run(trainer: Any) -> Run | None:
    return getattr(trainer, "klplug", None)


def init_trainer(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> None:
    config = _bound(original, args, kwargs)["config"]
    if derive(config, {}) is not None:
        _check(config)
    original(*args, **kwargs)
    plan = Plan.of(config)
    if plan is None:
        return
    announce("the trainer", plan.spec, plan.kl_coef)
    trainer.klplug = Run(plan, MeasuredController(plan.controller()))
    trainer.kl_ctrl_in_reward = trainer.klplug.controller


def compute_advantage(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    run = _run(trainer)
    if run is None:
        return original(*args, **kwargs)
    run.metrics, run.controller.measured = {}, None
    token = _RUN.set(run)
    try:
        batch = original(*args, **kwargs)
    finally:
        _RUN.reset(token)
    report = {**run.metrics, ACTIVE: 1.0, "klplug/kl_coef": run.controller.value}
    if run.is_as_loss:
        del report[ACTIVE]  # the workers' to say
    _bound(original, args, kwargs)["metrics"].update(report)
    return batch


def apply_kl_penalty(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    given = _bound(original, args, kwargs)
    kl_type = given["kl_penalty"]
    if is_stock(kl_type):
        return original(*args, **kwargs)
    run = _RUN.get()
    if run is None:
        raise RuntimeError(
            f"kl_type {kl_type!r} was asked of verl's apply_kl_penalty outside of the v1 trainer's "
            "_compute_advantage, where klplug can't join it to the advantages"
        )
    data, beta = given["data"], run.controller.value
    tensors = data.batch
    rewards = tensors["token_level_scores"]
    in_reward = run.plan.spec.placed("in_reward")
    for part in _joined(in_reward, "group"):
        rewards = rewards - beta * _coefficient(part, tensors)
    tensors["token_level_rewards"] = rewards
    value = kl_term(
        in_reward, tensors["old_log_probs"], tensors["ref_log_prob"], tensors["response_mask"]
    ).value
    lengths = tensors["response_mask"].sum(-1).clamp(min=1)
    metrics = {
        "actor/reward_kl_penalty": float((value.sum(-1) / lengths).mean()),
        "actor/reward_kl_penalty_coeff": beta,
    }
    return data, metrics


def compute_advantage_for_trajectories(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    data = original(*args, **kwargs)
    run = _RUN.get()
    if run is None or run.plan.spec.estimator == "none":
        return data
    tensors, keys = data.batch, _bound(original, args, kwargs)["batch_keys"]
    # Samples of the policy itself: the plain means of k1 and k3 are unbiased here.
    policy, reference, mask = (
        tensors[name] for name in ("old_log_probs", "ref_log_prob", "response_mask")
    )
    in_reward = run.plan.spec.placed("in_reward")
    shown = in_reward if in_reward.estimator != "none" else "k1_in_reward"
    tally = kl_term(shown, policy, reference, mask).tally
    run.metrics = {key: float(value) for key, value in tally.metrics().items()}
    run.controller.measured = run.metrics["klplug/k3"]
    run.metrics["klplug/kl_before_update"] = run.controller.measured
    run.n_samples = len(data)
    beta = run.controller.value
    for part in _joined(in_reward, "none"):
        coefficient = _coefficient(part, tensors)
        if run.plan.divides_by_length:
            force = excess_over_group(coefficient, keys, data.non_tensor_batch["uid"])
        else:
            force = to_go_over_answer(coefficient, keys)
        penalty = beta * force * mask
        tensors["advantages"] = tensors["advantages"] - penalty
        tensors["returns"] = tensors["returns"] - penalty
    return data


def _joined(in_reward: KLSpec, reward_norm: str) -> list[KLSpec]:
    return [term for term in in_reward.terms if term.reward_norm == reward_norm]


def _coefficient(part: KLSpec, tensors: Any) -> Tensor:
    return kl_term(
        part, tensors["old_log_probs"], tensors["ref_log_prob"], tensors["response_mask"]
    ).coefficient


def _answers(keys: Sequence[str]) -> list[list[int]]:
    """Rows by answer, in order: an agent loop may cut one answer into several rows.

    verl's keys are ``{uid}_{session}_{index}``; the rows of one session are one answer.
    """
    answers: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row, key in enumerate(keys):
        session, _, index = key.rpartition("_")
        answers[session].append((int(index), row))
    return [[row for _, row in sorted(rows)] for rows in answers.values()]


def to_go_over_answer(coefficient: Tensor, keys: Sequence[str]) -> Tensor:
    """Each token's coefficient and all later ones of its answer, (B, T)."""
    to_go = reward_to_go(coefficient)
    for rows in _answers(keys):
        for earlier, later in zip(rows[-2::-1], rows[:0:-1], strict=True):
            to_go[earlier] += to_go[later, 0]
    return to_go


def excess_over_group(coefficient: Tensor, keys: Sequence[str], groups: Sequence[Any]) -> Tensor:
    """Each answer's whole KL less the mean of its group's other answers, (B, 1).

    Where tokens weigh 1/length, a reward-to-go tilts the optimum to long answers; one number per
    answer keeps pi* = ref exp(r/beta)/Z as fixed point. An answer alone in its group gets 0.
    """
    totals = coefficient.sum(-1)
    answers = _answers(keys)
    kl = torch.stack([totals[rows].sum() for rows in answers])
    members: dict[Any, list[int]] = defaultdict(list)
    for answer, rows in enumerate(answers):
        members[groups[rows[0]]].append(answer)
    excess = torch.zeros_like(totals)
    for group in members.values():
        for answer in group:
            others = [other for other in group if other != answer]
            if others:
                excess[answers[answer]] = kl[answer] - kl[others].mean()
    return excess.unsqueeze(-1)


def update_actor(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    run = _run(trainer)
    if run is None:
        return original(*args, **kwargs)
    measured, given = run.controller.measured, _bound(original, args, kwargs)
    if measured is None and run.plan.spec.estimator != "none":
        raise RuntimeError(
            f"kl_type {run.plan.spec} is set, but no KL was measured before this update: does "
            f"{type(trainer).__name__} have a _compute_advantage of its own?"
        )
    given["batch"].extra_info[COEF_KEY] = run.controller.value
    batch = original(*args, **kwargs)
    if run.is_as_loss and ACTIVE not in given["metrics"]:
        raise RuntimeError(
            f"kl_type {run.plan.spec} is set, but the workers computed no KL of klplug's: was "
            "their loss replaced?"
        )
    if measured is not None:
        run.controller.update(measured, run.n_samples)
    return batch


def save_checkpoint(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    run = _run(trainer)
    if run is not None:
        # First, for verl ends by declaring the folder complete.
        folder = Path(trainer.config.trainer.default_local_dir)
        folder = folder / f"global_step_{trainer.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE_FILE).write_text(json.dumps(run.controller.saved(run.plan.spec)) + "\n")
    return original(*args, **kwargs)


def load_checkpoint(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    result = original(*args, **kwargs)
    run = _run(trainer)
    if run is None or not trainer.global_steps:
        return result
    settings = trainer.config.trainer
    if settings.resume_mode == "resume_path":
        folder = Path(settings.resume_from_path)
    else:
        folder = Path(settings.default_local_dir) / f"global_step_{trainer.global_steps}"
    path = folder / STATE_FILE
    saved = json.loads(path.read_text()) if path.exists() else None
    run.controller.resume(saved, run.plan.spec, run.plan.kl_ctrl, "verl")
    return result


_TRAINER = "verl.trainer.ppo.v1.trainer_base"

PATCH = Patch(
    host="verl",
    tested="0.9.1",
    hooks=(
        Hook("verl.utils.device", "auto_set_device", ("config",), auto_set_device),
        Hook("verl.utils.metric.utils", "reduce_metrics", ("metrics",), reduce_metrics),
        Hook(
            "verl.workers.utils.losses",
            "ppo_loss",
            ("config", "model_output", "data", "dp_group"),
            ppo_loss,
            supplies=(
                "log_probs",
                "ref_log_probs",
                "old_log_probs",
                "rollout_log_probs",
                "response_mask",
            ),
        ),
        Hook(
            "verl.workers.engine_workers", "ActorRolloutRefWorker.init_model", ("self",), init_model
        ),
        Hook(
            "verl.trainer.ppo.ray_trainer",
            "apply_kl_penalty",
            ("data", "kl_ctrl", "kl_penalty"),
            apply_kl_penalty,
            supplies=("log_probs", "ref_log_probs", "response_mask"),
        ),
        Hook(
            "verl.trainer.ppo.v1.utils",
            "compute_advantage_for_multi_trajectories",
            ("data", "batch_keys", "adv_estimator", "config"),
            compute_advantage_for_trajectories,
            supplies=("log_probs", "ref_log_probs", "response_mask"),
        ),
        Hook(_TRAINER, "PPOTrainer.__init__", ("config",), init_trainer),
        Hook(_TRAINER, "PPOTrainer._compute_advantage", ("batch", "metrics"), compute_advantage),
        Hook(_TRAINER, "PPOTrainer._update_actor", ("batch", "metrics"), update_actor),
        Hook(_TRAINER, "PPOTrainer._save_checkpoint", ("self",), save_checkpoint),
        Hook(_TRAINER, "PPOTrainer._load_checkpoint", ("self",), load_checkpoint),
    ),
)

_FAILURES: list[HookError] = []


def apply_to(module: ModuleType) -> None:
    """Post-import hook of ``klplug_verl.plugin``: a moved function is said at once, and a run that
    asks for klplug stops at ``auto_set_device`` or at the trainer."""
    try:
        PATCH.apply_to(module)
    except HookError as error:
        _FAILURES.append(error)
        print(f"klplug: WARNING: {error}", file=sys.stderr, flush=True)


def _check(config: Any) -> None:
    if _FAILURES:
        raise _FAILURES[0]
    PATCH.check(parse(config.klplug.kl_type).requires)
