"""The trainers: they join an in-reward KL to the advantages, and own controller and checkpoints.

verl has two: the v1 trainer of 0.9, and ``RayPPOTrainer``, whose step is one long ``fit``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klplug import (
    KLSpec,
    KLTerm,
    kl_return_baseline,
    kl_term,
    parse,
    posterior_log_probs,
    reward_to_go,
)
from klplug.hosting import state
from klplug.hosting.controller import MeasuredController
from klplug.hosting.hidden import BYTES, exact_term
from klplug.hosting.host import announce
from klplug.hosting.moving import WHAT_TO_DO, Place
from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug.hosting.state import Reference, StateError
from klplug.samples import weights_of
from klplug.seen import in_a_key
from klplug.spec import TermSpec
from klplug.tally import PREFIX
from klplug.watch import NONFINITE, Watch
from klplug_verl import hidden, moving, samples, teacher, trainers
from klplug_verl.actor import BASELINE, POSTERIOR, STORED_SUMS, SUMS
from klplug_verl.keys import COEF_KEY, is_stock
from klplug_verl.plan import Plan

ACTIVE = "klplug/active"
STATE_FILE = "klplug.json"
SAMPLED = "klplug_sampled"
"""The mask of what was sampled, where verl masks tokens out of it: among its tensors, for verl may
draw their rows anew."""


@dataclass
class Run:
    """The trainer's plan, its controller, and what it measured at the start of this step.

    ``local`` is of each local update so far of a step that has several (separate_async).
    ``carried`` is what the workers' micro-batches can't make: a baseline, sample weights.
    """

    plan: Plan
    controller: MeasuredController
    models: dict[str, Reference] = field(default_factory=dict)  # by role
    joined: bool = False
    n_answers: int = 0
    local: list[tuple[float, int]] = field(default_factory=list)  # KL and answers of its updates
    carried: dict[str, Tensor] = field(default_factory=dict)  # for the workers, by their names
    named: dict[str, Tensor] = field(default_factory=dict)  # what sample weights read, by name
    states: int | None = None  # bytes of the reference's hidden states, or of its top tokens
    metrics: dict[str, float] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    passes_by: bool = False  # a trainer whose own fit passes by the stages below

    @property
    def is_as_loss(self) -> bool:
        return self.plan.as_loss.measures

    def reset(self) -> None:
        self.metrics, self.controller.measured, self.carried = {}, None, {}
        self.joined = False

    def report(self) -> dict[str, float]:
        """What this step logs; that a KL as loss is active is the workers' to say."""
        active = {} if self.is_as_loss else {ACTIVE: 1.0}
        own = {key: value for key, value in self.metrics.items() if key != ACTIVE}
        states = {} if self.states is None else {BYTES: float(self.states)}
        return {**own, **active, **states, "klplug/kl_coef": self.controller.value}


_RUN: ContextVar[Run | None] = ContextVar("klplug_run", default=None)


def _run(trainer: Any) -> Run | None:
    return getattr(trainer, "klplug", None)


def init(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> None:
    original(*args, **kwargs)
    config = bound(original, args, kwargs)["config"]
    plan = Plan.of(config)
    if plan is None:
        return
    stage = _of_its_own(trainer)
    if stage and trainers.stage_of(plan):
        raise RuntimeError(trainers.out_of_reach(plan, type(trainer).__name__, stage))
    announce("the trainer", plan.spec, plan.kl_coef)
    if (term := exact_term(plan.spec)) is not None:
        print(hidden.foretell(term, config), flush=True)
    controller = MeasuredController(plan.controller())
    trainer.klplug = Run(plan, controller, plan.models(), passes_by=bool(stage))
    trainer.kl_ctrl_in_reward = trainer.klplug.controller


def _of_its_own(trainer: Any) -> str:
    """What a trainer's class has in the place of verl's, so that klplug's steps are passed by: a
    recipe's a ``fit``, one that is registered with the v1 trainer an ``_update_actor``. One that
    calls ``super()``'s has verl's."""
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    if isinstance(trainer, RayPPOTrainer):
        stage, verls = "fit", RayPPOTrainer.fit
    else:
        from verl.trainer.ppo.v1.trainer_base import PPOTrainer

        stage, verls = "_update_actor", PPOTrainer._update_actor
    own = getattr(type(trainer), stage)
    if own is verls:
        return ""
    code = own.__code__
    return "" if "__class__" in code.co_freevars and stage in code.co_names else stage


def compute_advantage(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    """The advantage stage of a step of the v1 trainer."""
    run = _run(trainer)
    if run is None:
        return original(*args, **kwargs)
    run.reset()
    run.named = samples.fields_of(run.plan.spec, bound(original, args, kwargs)["batch"])
    token = _RUN.set(run)
    try:
        batch = original(*args, **kwargs)
    finally:
        _RUN.reset(token)
    if run.carried:
        batch = _with(batch, run.carried)
    bound(original, args, kwargs)["metrics"].update(run.report())
    return batch


def _with(batch: Any, carried: Mapping[str, Tensor]) -> Any:
    """The v1 trainer's batch, with more tensors where its tensors are."""
    from verl.trainer.ppo.v1.trainer_base import response_to_nested, tq
    from verl.utils import tensordict_utils as tu

    place = {"keys": batch.keys, "partition_id": batch.partition_id}
    mask = tq.kv_batch_get(**place, select_fields=["response_mask"])["response_mask"]
    fields = tu.get_tensordict({k: response_to_nested(x, mask) for k, x in carried.items()})
    return tq.kv_batch_put(**place, fields=fields)


def old_log_probs(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    """Of ``RayPPOTrainer``, which throws the entropies beside them away."""
    result = original(*args, **kwargs)
    run = _run(trainer)
    if run is not None and weights_of(run.plan.spec, "entropy"):
        found, *_ = result if isinstance(result, tuple) else (result,)
        run.named["entropy"] = found.batch["entropys"]
    return result


def fit(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    """All steps of ``RayPPOTrainer``."""
    token = _RUN.set(_run(trainer))
    try:
        return original(*args, **kwargs)
    finally:
        _RUN.reset(token)


def apply_kl_penalty(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    given = bound(original, args, kwargs)
    kl_type = given["kl_penalty"]
    if is_stock(kl_type):
        return original(*args, **kwargs)
    run = _RUN.get()
    if run is None:
        raise RuntimeError(
            f"kl_type {kl_type!r} was asked of verl's apply_kl_penalty outside of a trainer that "
            "klplug serves. There klplug can't join it to the advantages"
        )
    data, beta = given["data"], run.controller.value
    tensors, groups = _tensors(run, data), data.non_tensor_batch["uid"]
    rewards = tensors["token_level_scores"]
    in_reward = run.plan.in_reward
    weights = _in_the_reward(run, data)
    for part in filter(run.plan.before_advantages, in_reward.terms):
        rewards = rewards - beta * _term(part, tensors, groups, weights=weights).coefficient
    tensors["token_level_rewards"] = rewards
    value = _term(in_reward, tensors, groups, weights=weights).value
    lengths = tensors["response_mask"].sum(-1)
    answers = lengths > 0  # a batch may be padded with rows that are none
    of_answer = value.sum(-1)[answers] / lengths[answers]
    metrics = {
        "actor/reward_kl_penalty": float(of_answer.sum() / max(len(of_answer), 1)),
        "actor/reward_kl_penalty_coeff": beta,
    }
    return data, metrics


def _tensors(run: Run, data: Any) -> Any:
    """Of the batch, with a teacher's log-probs among them: in the v1 trainer they are beside it."""
    if teacher.LOG_PROBS in run.named:
        data.batch[teacher.LOG_PROBS] = run.named[teacher.LOG_PROBS]
    return data.batch


def _in_the_reward(run: Run, data: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The sample weights of what is in the reward."""
    spec, groups = run.plan.in_reward, data.non_tensor_batch["uid"]
    named = run.named | samples.tensors_of(spec, data)
    return samples.of_batch(spec, data.batch, groups, named, mask)


def rollout_correction(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    """verl's rejection sampling, which masks tokens out of the samples before they are joined."""
    if _RUN.get() is not None:
        tensors = bound(original, args, kwargs)["batch"].batch
        tensors[SAMPLED] = tensors["response_mask"]
    return original(*args, **kwargs)


def compute_advantage_for_trajectories(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    """The v1 trainer's advantages, of answers that may be cut into several rows."""
    run = _RUN.get()
    token = _RUN.set(None)  # it calls verl's compute_advantage, with less than the whole batch
    try:
        data = original(*args, **kwargs)
    finally:
        _RUN.reset(token)
    if run is not None:
        _join(run, data, bound(original, args, kwargs)["batch_keys"])
        _carry(run, data)
    return data


def compute_advantage_of_rows(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    """The advantages in ``RayPPOTrainer.fit``, where a row is an answer."""
    data = original(*args, **kwargs)
    run = _RUN.get()
    if run is not None:
        run.reset()
        _join(run, data, [f"{row}_0" for row in range(len(data))])
        _carry(run, data)
        for name, tensor in run.carried.items():
            data.batch[name] = tensor
    return data


def _join(run: Run, data: Any, keys: Sequence[str]) -> None:
    """Measure the KL of the whole batch, and join one in the reward to the advantages.

    The KL of an answer is that of all tokens sampled, as in verl's own order, which takes it before
    its rejection sampling masks some out; the advantages of those then reach nothing.
    """
    run.joined = True
    tensors, groups = _tensors(run, data), data.non_tensor_batch["uid"]
    mask = tensors["response_mask"]
    sampled = tensors.pop(SAMPLED, mask)
    as_loss, in_reward = run.plan.as_loss, run.plan.in_reward
    answers = _answers(keys)
    _check_answers_are_rows(run.plan, len(answers), len(keys))
    if not run.plan.needs_reference:  # to the sampler the KL is 0 here
        return
    # Samples of the policy itself: the estimates are unbiased here.
    shown = in_reward if in_reward.terms else parse("k1_in_reward")
    weights = _in_the_reward(run, data, sampled)
    tally = _term(shown, tensors, groups, sampled, weights).tally
    run.metrics = {key: float(value) for key, value in tally.metrics().items()}
    measured = run.metrics["klplug/kl"]
    run.controller.measure(measured, from_reference=run.plan.ref_model is None)
    if not run.is_as_loss:
        run.watch.tell(run.metrics)
    else:  # the workers' metrics have the plain names, and are watched
        if in_reward.terms:
            for line in run.watch.see(run.metrics):
                print(line.replace("WARNING: ", "WARNING: in the reward, "), flush=True)
        run.metrics = beside_the_workers(run.metrics, in_reward)
    run.metrics["klplug/kl_before_update"] = measured
    run.n_answers = sum(bool(sampled[rows].any()) for rows in answers)
    for term in as_loss.terms:
        if term.baseline != "none":  # of the tokens that the workers train on
            other = teacher.LOG_PROBS if term.reference == "teacher" else "ref_log_prob"
            policy, reference = tensors["old_log_probs"], tensors[other]
            run.carried[BASELINE] = kl_return_baseline(term, policy, reference, mask, groups)
    beta = run.controller.value
    for part in itertools.filterfalse(run.plan.before_advantages, in_reward.terms):
        if run.plan.divides_by_length:
            alone = dataclasses.replace(part, baseline="none")  # compared with its group anyway
            coefficient = _term(alone, tensors, groups, sampled, weights).coefficient
            force = excess_over_group(coefficient, sampled, keys, groups)
        else:
            coefficient = _term(part, tensors, groups, sampled, weights).coefficient
            force = to_go_over_answer(coefficient, keys)
        penalty = beta * force * mask
        tensors["advantages"] = tensors["advantages"] - penalty
        tensors["returns"] = tensors["returns"] - penalty


def _carry(run: Run, data: Any) -> None:
    """Sample weights, of the advantages that the policy loss has, and the posterior's log-probs."""
    tensors, groups, as_loss = _tensors(run, data), data.non_tensor_batch["uid"], run.plan.as_loss
    named = run.named | samples.tensors_of(as_loss, data)
    made = samples.of_batch(as_loss, tensors, groups, named)
    run.carried |= samples.carried(made, as_loss)
    if as_loss.has_the_reward:
        step = samples.of_step(tensors, groups, named)
        run.carried[POSTERIOR] = posterior_log_probs(step, run.controller.value)


def beside_the_workers(metrics: Mapping[str, float], in_reward: KLSpec) -> dict[str, float]:
    """What is in the reward under its own names only: plain ones are of what is as loss.

    But for the KL to ref, which the workers measure only where a term of theirs is to it, and for
    what is said of a tensor by its name.
    """
    plain = {k: v for k, v in metrics.items() if k in _TO_REF or k.startswith(NONFINITE)}
    named = {f"{PREFIX}{in_a_key(term)}/" for term in in_reward.terms}
    of_terms = {key: value for key, value in metrics.items() if key.startswith(tuple(named))}
    if len(named) == 1 and not of_terms:
        (name,) = named
        of_terms = {
            name + key.removeprefix(PREFIX): value
            for key, value in metrics.items()
            if key != ACTIVE and not key.startswith(NONFINITE)
        }
    return of_terms | plain


_TO_REF = tuple(PREFIX + name for name in ("kl", "k1", "k2", "k3", "abs"))


def _check_answers_are_rows(plan: Plan, n_answers: int, n_rows: int) -> None:
    """Where answers are looked at whole: an agent loop may cut one into several rows."""
    spec, as_loss = plan.spec, plan.as_loss.terms
    whole = [("reference=posterior", "reference=ref")] if spec.has_the_reward else []
    compared = (t.baseline for t in spec.terms if t.baseline != "none")
    whole += [(f"baseline={baseline}", "baseline=none") for baseline in compared]
    whole += [(f"weight={w.written}", "weight=none") for w in weights_of(spec, "group_ids")]
    whole += [(f"horizon={t.horizon}", "horizon=token") for t in as_loss if t.horizon != "token"]
    whole += [
        # The expectation over the vocabulary has no weight for its own token.
        (f"level={t.level}", "ratio=none" if t.over_vocabulary else "level=token")
        for t in as_loss
        if t.level not in (None, "token")
    ]
    # Of the rows of an answer verl takes the rewards of the last alone.
    in_rewards = plan.in_reward.terms if not plan.bootstraps else ()
    reordered = any(t.reward_norm == "group" for t in in_rewards)
    whole += [("reward_norm=group", "reward_norm=none")] if reordered else []
    if whole and n_answers < n_rows:
        (needs, instead), *_ = whole
        raise RuntimeError(
            f"kl_type {spec}: {needs} looks at whole answers, and this agent loop cut them into "
            f"several rows. Use {instead}"
        )


def _term(
    spec: TermSpec | KLSpec,
    tensors: Any,
    groups: Sequence[Any],
    mask: Tensor | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> KLTerm:
    """At the policy that sampled, which no update has moved yet."""
    return kl_term(
        spec,
        tensors["old_log_probs"],
        tensors["ref_log_prob"],
        tensors["response_mask"] if mask is None else mask,
        group_ids=groups,
        sample_weights=weights,
        teacher_log_probs=tensors.get(teacher.LOG_PROBS, None),
    )


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


def excess_over_group(
    coefficient: Tensor, mask: Tensor, keys: Sequence[str], groups: Sequence[Any]
) -> Tensor:
    """Each answer's whole KL less the mean of its group's other answers, (B, 1).

    Where tokens weigh 1/length, a reward-to-go tilts the optimum to long answers; one number per
    answer keeps pi* = ref exp(r/beta)/Z as fixed point. An answer alone in its group gets 0; one
    without tokens is none.
    """
    totals = coefficient.sum(-1)
    answers = _answers(keys)
    kl = torch.stack([totals[rows].sum() for rows in answers])
    members: dict[Any, list[int]] = defaultdict(list)
    for answer, rows in enumerate(answers):
        if mask[rows].any():
            members[groups[rows[0]]].append(answer)
    excess = torch.zeros_like(totals)
    for group in members.values():
        for answer in group:
            others = [other for other in group if other != answer]
            if others:
                excess[answers[answer]] = kl[answer] - kl[others].mean()
    return excess.unsqueeze(-1)


def update_actor(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    """The update of the v1 trainer, which puts its metrics among those it is given."""
    run = _run(trainer)
    if run is None:
        return original(*args, **kwargs)
    given = bound(original, args, kwargs)
    words = given["batch"].extra_info
    words[COEF_KEY] = _coefficient_for_workers(run, trainer)
    is_last = trainer.local_trigger_step == trainer.parameter_sync_step - 1
    step = _moved_after(run, trainer) if is_last else None
    words |= {} if step is None else {moving.STEP_KEY: step}
    batch = original(*args, **kwargs)
    _updated(run, ACTIVE in given["metrics"], step, is_last)
    return batch


def update_actor_in_fit(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    """The update of ``RayPPOTrainer``, whose metrics are reduced by ``fit``."""
    run = _run(trainer)
    if run is None or run.passes_by:
        return original(*args, **kwargs)
    batch = bound(original, args, kwargs)["batch"]
    batch.meta_info[COEF_KEY] = _coefficient_for_workers(run, trainer)
    step = _moved_after(run, trainer)
    batch.meta_info |= {} if step is None else {moving.STEP_KEY: step}
    output = original(*args, **kwargs)
    metrics = output.meta_info["metrics"]
    metrics.update(run.report())
    _updated(run, any(SUMS in name or STORED_SUMS in name for name in metrics), step)
    return output


def _coefficient_for_workers(run: Run, trainer: Any) -> float:
    if not run.joined and run.plan.spec.measures:
        raise RuntimeError(
            f"kl_type {run.plan.spec} is set, but no KL was measured before this update. Does "
            f"{type(trainer).__name__} have an advantage stage of its own?"
        )
    return run.controller.value


def _moved_after(run: Run, trainer: Any) -> int | None:
    """This step, where the reference follows the policy once it is done."""
    update = run.plan.moving()
    due = update is not None and update.is_due(trainer.global_steps)
    return trainer.global_steps if due else None


def _updated(run: Run, workers_report: bool, step: int | None, is_last: bool = True) -> None:
    if run.is_as_loss and not workers_report:
        raise RuntimeError(
            f"kl_type {run.plan.spec} is set, but the workers computed no KL of klplug's: was "
            "their loss replaced?"
        )
    if step is not None:
        state.moved(run.models, step)
    measured = run.controller.measured
    run.local.append((math.nan if measured is None else measured, run.n_answers))
    if not is_last:
        return
    n_answers = sum(n for _, n in run.local)
    # Those of a step, as verl logs it. Without a measured KL a schedule goes on all the same, and
    # the others stay.
    run.controller.measured = sum(kl * (n / max(n_answers, 1)) for kl, n in run.local)
    run.controller.update(math.nan, n_answers)
    run.local = []


def save_checkpoint(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    run = _run(trainer)
    if run is not None:
        # First, for verl ends by declaring the folder complete.
        folder = Path(trainer.config.trainer.default_local_dir)
        folder = folder / f"global_step_{trainer.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        state.write(folder / STATE_FILE, run.controller.saved(run.plan.spec, run.models))
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
    file = folder / STATE_FILE
    saved = state.read(file)
    try:
        run.controller.resume(saved, run.plan.spec, run.models, run.plan.kl_ctrl, "verl")
    except ValueError as error:
        raise StateError(f"{file}: {error}. {state.WHAT_TO_DO}") from None
    _resume_reference(run, saved or {}, folder / "actor")
    return result


def _resume_reference(run: Run, saved: dict[str, Any], folder: Path) -> None:
    """The workers have put in place what they found; the trainer knows what should be there."""
    step = (saved.get("reference") or {}).get("step")
    if step is None or "reference" not in run.models:
        return
    if folder.is_dir() and not any(folder.glob(Place.PATTERN)):
        raise StateError(
            f"{folder} has no {Place.PATTERN}, and the reference of this checkpoint had moved "
            f"after step {step}. {WHAT_TO_DO}"
        )
    state.moved(run.models, step)
