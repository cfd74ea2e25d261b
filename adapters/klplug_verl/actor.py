"""The workers: the KL of one micro-batch. Of the settings they see only ``kl_loss_type``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from klplug import KLSpec, KLStep, KLTerm, Tally, kl_term, parse, stored_metrics
from klplug.hosting.host import announce
from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug.hosting.stored import Stored
from klplug.samples import weights_of
from klplug.watch import Watch
from klplug_verl import hidden, moving, reference, samples, stored, teacher
from klplug_verl.keys import COEF_KEY, LOSS_TYPE, is_stock

BASELINE = "klplug_return_baseline"  # of the whole batch, one of its tensors
POSTERIOR = "klplug_posterior_log_probs"  # likewise
# klplug's word for a tensor, and verl's.
_TENSORS = {
    "ref_log_probs": "ref_log_prob",
    "old_log_probs": "old_log_probs",
    "rollout_log_probs": "rollout_log_probs",
    "posterior_log_probs": POSTERIOR,
    "teacher_log_probs": teacher.LOG_PROBS,
    "advantages": "advantages",
}
SUMS, MAXIMA = "klplug/sum/", "klplug/max/"
STORED_SUMS, STORED_MAXIMA = "klplug/stored_sum/", "klplug/stored_max/"


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
    with reference.built(worker):
        result = original(*args, **kwargs)
    moving.connect(worker)
    stored.connect(worker)
    actor = worker.config.actor
    if "actor" in worker.role and actor.use_kl_loss:
        spec = loss_spec(actor.kl_loss_type)
        if spec is not None:
            announce("a worker", spec, actor.kl_loss_coef)
            hidden.connect(spec, worker)
    return result


def term_of(
    spec: KLSpec,
    log_probs: Tensor,
    tensors: Mapping[str, Tensor],
    config: Any,
    coef: float,
    exact_kl: Tensor | None = None,
) -> KLTerm:
    """The term of one micro-batch, from verl's names for its tensors."""
    if BASELINE not in tensors and any(term.baseline != "none" for term in spec.terms):
        raise RuntimeError(
            f"kl_type {spec}: the micro-batch has no {BASELINE}, which the trainer computes from "
            "the whole batch. Did another advantage stage than verl's own run?"
        )
    return kl_term(
        spec,
        log_probs,
        response_mask=tensors["response_mask"],
        **{name: tensors.get(own) for name, own in _TENSORS.items()},
        kl_coef=coef,
        clip_range=clip_range(config),
        return_baseline=tensors.get(BASELINE),
        sample_weights=samples.found_in(spec, tensors),
        exact_kl=exact_kl,
    )


def clip_range(config: Any) -> tuple[float, float]:
    """Of verl's own policy loss."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (
        config.clip_ratio if low is None else low,
        config.clip_ratio if high is None else high,
    )


def numbers(tally: Tally, sums: str = SUMS, maxima: str = MAXIMA) -> dict[str, float]:
    """A tally as entries of verl's metrics, with one transfer from the device for all of them."""
    parts = {sums + _of_no_extremum(name): value for name, value in tally.sums.items()}
    parts |= {maxima + name: value for name, value in tally.maxima.items()}
    values = torch.stack([value.double() for value in parts.values()]).tolist()
    return dict(zip(parts, values, strict=True))


def _of_no_extremum(name: str) -> str:
    """Without a min or max in it, of which verl would take the extremum over ranks."""
    return name.replace("m", "m_")


def _as_it_was(name: str) -> str:
    return name.replace("m_", "m")


# ── Every engine, verl >= 0.8, and 0.7 with trainer.use_legacy_worker_impl=disable ──────────────


def ppo_loss(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    given = bound(original, args, kwargs)
    config, data = given["config"], given["data"]
    spec = loss_spec(config.kl_loss_type) if config.use_kl_loss else None
    if spec is None:
        return original(*args, **kwargs)
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import no_padding_2_padding

    coef = tu.get_non_tensor_data(data=data, key=COEF_KEY, default=None)
    coef = config.kl_loss_coef if coef is None else coef
    own = stored.apart()
    if own is not None and stored.LOG_PROBS in data:
        return _of_stored(own, spec, given["model_output"], data, config, coef)
    # verl's own loss without its KL; the config is frozen, and global_batch_info stays shared.
    given["config"] = without_kl = copy.copy(config)
    object.__setattr__(without_kl, "use_kl_loss", False)
    if own is not None:
        return original(**given)
    log_probs = no_padding_2_padding(given["model_output"]["log_probs"], data)
    # No others: to pad one costs more than the KL itself.
    acting = {"advantages"} if spec.has_the_reward else set()  # they are 0 beside it
    needed = (own for name, own in _TENSORS.items() if name in {*spec.requires, *acting})
    weights = (own.key for own in weights_of(spec))
    named = (name for name in ("response_mask", *needed, BASELINE, *weights) if name in data)
    tensors = dict(data.select(*named).to_padded_tensor())
    tensors["response_mask"] = tensors["response_mask"].to(bool)
    exact_kl = hidden.exact(spec, log_probs, tensors)
    step = KLStep(term_of(spec, log_probs, tensors, config, coef, exact_kl))
    if step.changes_advantages:
        advantages = step.advantages(tensors["advantages"], coef)
        given["data"] = _with_advantages(data, advantages)
    policy_loss, metrics = original(**given)
    if step.beside:
        # verl evaluates the loss under no_grad too, where only its value is meant.
        kl = step.loss if torch.is_grad_enabled() else step.value
        policy_loss = policy_loss + coef * _aggregated(kl, tensors, config)
    _report(metrics, step.tally, _aggregated(step.term.value, tensors, config), coef)
    return policy_loss, metrics


def _of_stored(
    own: Stored, spec: KLSpec, model_output: Any, data: Any, config: Any, coef: float
) -> tuple[Tensor, dict[str, Any]]:
    """The KL of a micro-batch of stored answers, which have no policy loss."""
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.metric import AggregationType, Metric

    kl, mask = stored.kl_of(spec, model_output, data)
    info = stored.batch_info(own, data, config)
    loss = agg_loss(loss_mat=kl.loss, loss_mask=mask, loss_agg_mode=config.loss_agg_mode, **info)
    metrics: dict[str, Any] = {
        "kl_loss": Metric(AggregationType.SUM, loss.detach()),
        "kl_coef": coef,
    }
    _add(metrics, numbers(kl.tally, STORED_SUMS, STORED_MAXIMA))
    return coef * loss, metrics


def _with_advantages(data: Any, advantages: Tensor) -> Any:
    """The micro-batch with other advantages, padded or jagged as its own are."""
    changed = data.copy()
    if data["advantages"].is_nested:
        from verl.workers.utils.padding import response_to_nested

        advantages = response_to_nested(advantages, data["advantages"])
    changed["advantages"] = advantages
    return changed


def _aggregated(loss: Tensor, tensors: Mapping[str, Tensor], config: Any) -> Tensor:
    from verl.trainer.ppo.core_algos import agg_loss

    result: Tensor = agg_loss(
        loss_mat=loss,
        loss_mask=tensors["response_mask"],
        loss_agg_mode=config.loss_agg_mode,
        **config.global_batch_info,
    )
    return result


def _report(metrics: dict[str, Any], tally: Tally, kl_loss: Tensor, coef: float) -> None:
    from verl.utils.metric import Metric

    # Added up as verl's own loss of the same micro-batch is.
    metrics["kl_loss"] = Metric(metrics["actor/pg_loss"].aggregation, kl_loss)
    metrics["kl_coef"] = coef
    _add(metrics, numbers(tally))


def _add(metrics: dict[str, Any], parts: dict[str, float]) -> None:
    """A tally's parts, where verl gathers metrics.

    verl adds up a SUM over micro-batches, then takes means over ranks and mini-batches: one common
    factor, which reduce_metrics below divides out again.
    """
    from verl.utils.metric import AggregationType, Metric

    for name, number in parts.items():
        is_sum = name.startswith((SUMS, STORED_SUMS))
        metrics[name] = Metric(AggregationType.SUM if is_sum else AggregationType.MAX, number)


_WATCH = Watch()


def reduce_metrics(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    """verl's reduction, then klplug's metrics from the reduced sums and maxima."""
    metrics = original(*args, **kwargs)
    for sums, maxima, named in (
        (SUMS, MAXIMA, Tally.metrics),
        (STORED_SUMS, STORED_MAXIMA, stored_metrics),
    ):
        parts: dict[str, dict[str, Tensor]] = {sums: {}, maxima: {}}
        for key in [key for key in metrics if sums in key or maxima in key]:
            prefix = sums if sums in key else maxima
            name = key.partition(prefix)[2]
            name = _as_it_was(name) if prefix == sums else name
            parts[prefix][name] = torch.tensor(float(metrics.pop(key)), dtype=torch.float64)
        if parts[sums]:
            own = {k: float(v) for k, v in named(Tally(parts[sums], parts[maxima])).items()}
            _WATCH.tell(own)
            metrics.update(own)
    return metrics


# ── verl 0.7's own FSDP worker, whose loss is one long method ───────────────────────────────────


@dataclass
class _Update:
    """One call of ``DataParallelPPOActor.update_policy``: its micro-batch, and all tallies."""

    actor: Any
    micro_batch: Mapping[str, Any] = field(default_factory=dict)
    tallies: list[Tally] = field(default_factory=list)


_UPDATE: ContextVar[_Update | None] = ContextVar("klplug_update", default=None)


def update_policy(original: Call, actor: Any, args: Args, kwargs: Kwargs) -> Any:
    config = actor.config
    if not config.use_kl_loss or loss_spec(config.kl_loss_type) is None:
        return original(*args, **kwargs)
    (data,) = (*args, *kwargs.values())
    update = _Update(actor)
    token = _UPDATE.set(update)
    try:
        with _coefficient_of(data, actor):
            metrics = original(*args, **kwargs)
    finally:
        _UPDATE.reset(token)
    if update.tallies:
        metrics.update(numbers(Tally.merged(update.tallies)))
    return metrics


@contextmanager
def _coefficient_of(data: Any, actor: Any) -> Iterator[None]:
    """The controller's coefficient in place of the (frozen) config's."""
    config = actor.config
    coef = data.meta_info.get(COEF_KEY)
    if coef is not None:
        actor.config = copy.copy(config)
        object.__setattr__(actor.config, "kl_loss_coef", coef)
    try:
        yield
    finally:
        actor.config = config


def forward_micro_batch(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    update = _UPDATE.get()
    if update is not None:
        update.micro_batch = bound(original, args, kwargs)["micro_batch"]
    return original(*args, **kwargs)


def kl_penalty(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    """Per token, aggregated by the caller; stock names there keep their stock meaning."""
    given = bound(original, args, kwargs)
    if is_stock(given["kl_penalty"]):
        return original(*args, **kwargs)
    spec, update = loss_spec(given["kl_penalty"]), _UPDATE.get()
    if update is None or spec is None:
        raise NotImplementedError(
            f"kl_type {given['kl_penalty']} was asked of verl's kl_penalty outside of the worker "
            "that klplug serves there, DataParallelPPOActor"
        )
    config = update.actor.config
    term = term_of(spec, given["logprob"], update.micro_batch, config, config.kl_loss_coef)
    update.tallies.append(term.tally)
    return term.loss
