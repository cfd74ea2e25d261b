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

from klplug import KLSpec, KLTerm, Tally, kl_term, parse
from klplug.host import announce
from klplug.patching import Args, Call, Kwargs, bound
from klplug_verl.settings import LOSS_TYPE, is_stock

COEF_KEY = "klplug_kl_coef"  # the controller's value, in the batch's meta information
SUMS, MAXIMA = "klplug/sum/", "klplug/max/"


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


def term_of(spec: KLSpec, log_probs: Tensor, tensors: Mapping[str, Tensor]) -> KLTerm:
    """The term of one micro-batch, from verl's names for its tensors."""
    return kl_term(
        spec,
        log_probs,
        tensors.get("ref_log_prob"),
        tensors["response_mask"],
        old_log_probs=tensors.get("old_log_probs"),
        rollout_log_probs=tensors.get("rollout_log_probs"),
    )


def numbers(tally: Tally) -> dict[str, float]:
    """A tally as entries of verl's metrics, with one transfer from the device for all of them."""
    parts = {SUMS + name: value for name, value in tally.sums.items()}
    parts |= {MAXIMA + name: value for name, value in tally.maxima.items()}
    values = torch.stack([value.double() for value in parts.values()]).tolist()
    return dict(zip(parts, values, strict=True))


# ── Every engine, verl >= 0.8, and 0.7 with trainer.use_legacy_worker_impl=disable ──────────────


def ppo_loss(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    given = bound(original, args, kwargs)
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
    tensors = dict(data.select(*(name for name in names if name in data)).to_padded_tensor())
    mask = tensors["response_mask"] = tensors["response_mask"].to(bool)
    term = term_of(spec, no_padding_2_padding(model_output["log_probs"], data), tensors)
    kl_loss = agg_loss(
        loss_mat=term.loss,
        loss_mask=mask,
        loss_agg_mode=config.loss_agg_mode,
        **config.global_batch_info,
    )
    coef = tu.get_non_tensor_data(data=data, key=COEF_KEY, default=None)
    coef = config.kl_loss_coef if coef is None else coef
    # Added up as verl's own loss of the same micro-batch is.
    metrics["kl_loss"] = Metric(metrics["actor/pg_loss"].aggregation, kl_loss)
    metrics["kl_coef"] = coef
    # verl adds up a SUM over micro-batches, then takes means over ranks and mini-batches: one
    # common factor, which reduce_metrics below divides out again.
    for name, number in numbers(term.tally).items():
        kind = AggregationType.SUM if name.startswith(SUMS) else AggregationType.MAX
        metrics[name] = Metric(kind, number)
    return policy_loss + coef * kl_loss, metrics


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


# ── verl 0.7's own FSDP worker, whose loss is one long method ───────────────────────────────────


@dataclass
class _Update:
    """One call of ``DataParallelPPOActor.update_policy``: its micro-batch, and all tallies."""

    micro_batch: Mapping[str, Any] = field(default_factory=dict)
    tallies: list[Tally] = field(default_factory=list)


_UPDATE: ContextVar[_Update | None] = ContextVar("klplug_update", default=None)


def update_policy(original: Call, actor: Any, args: Args, kwargs: Kwargs) -> Any:
    config = actor.config
    if not config.use_kl_loss or loss_spec(config.kl_loss_type) is None:
        return original(*args, **kwargs)
    (data,) = (*args, *kwargs.values())
    update = _Update()
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
    term = term_of(spec, given["logprob"], update.micro_batch)
    update.tallies.append(term.tally)
    return term.loss
