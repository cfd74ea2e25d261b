"""``weight=``: what verl has of a step's answers, and their weights on the way to the workers.

The weights are made in the trainer, of all answers of a step, once there are advantages; for a KL
in the reward, before. They travel as tensors of the batch. What an agent loop returns in its
``extra_fields``, a number for each token of the response, is a tensor that a weight can read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from klplug import KLSpec, Samples, sample_weights
from klplug.samples import weights_of
from klplug_verl import teacher


def tensors_named(spec: KLSpec) -> list[str]:
    """The tensors of the batch that are read by name: by its weights, and a teacher's."""
    taught = [teacher.LOG_PROBS] if "teacher_log_probs" in spec.requires else []
    return [*taught, *(own.tensor for own in weights_of(spec) if own.tensor is not None)]


def fields_of(spec: KLSpec, batch: Any) -> dict[str, Tensor]:
    """What weights read of the v1 trainer's queue, padded as its other tensors are."""
    entropy = ["entropy"] if weights_of(spec, "entropy") else []
    names = [*tensors_named(spec), *entropy]
    if not names:
        return {}
    from verl.trainer.ppo.v1.trainer_base import tq

    wanted = ["response_mask", "extra_fields", *names]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=wanted)
    masks = list(data["response_mask"].unbind())
    found: dict[str, Tensor] = {}
    for name in names:
        if name in data:
            rows = list(data[name].unbind())
        else:
            extra = data.get("extra_fields", None)
            rows = [] if extra is None else [own.get(name) for own in extra.tolist()]
        padded = _padded(name, rows, masks)
        if padded is not None:
            found[name] = padded
    return found


def tensors_of(spec: KLSpec, data: Any) -> dict[str, Tensor]:
    """The same of a batch of ``RayPPOTrainer``'s: its tensors, or its lists."""
    masks = list(data.batch["response_mask"])
    found: dict[str, Tensor] = {}
    for name in tensors_named(spec):
        padded = (
            data.batch[name]
            if name in data.batch
            else _padded(name, list(data.non_tensor_batch.get(name, ())), masks)
        )
        if padded is not None:
            found[name] = padded
    return found


def _padded(name: str, rows: list[Any], masks: list[Tensor]) -> Tensor | None:
    """(B, T) of rows of numbers, a number for each token; ``None`` where an answer has none.

    A row without counted tokens needs none: verl pads a batch with such rows.

    Raises:
        ValueError: names the answer that has fewer or more, or no numbers.
    """
    counts = [bool(mask.any()) for mask in masks]
    if not rows or any(row is None and own for row, own in zip(rows, counts, strict=True)):
        return None
    whole = torch.zeros(len(masks), max(map(len, masks)), device=masks[0].device)
    for answer, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        if not counts[answer]:
            continue
        try:
            numbers = torch.as_tensor(row).float().flatten()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{name!r} of answer {answer} is {row!r}, and no list of numbers"
            ) from None
        if not int(mask.nonzero()[-1]) + 1 <= len(numbers) <= len(mask):
            raise ValueError(
                f"{name!r} of answer {answer} has {len(numbers)} numbers, and its response "
                f"{len(mask)} tokens: one for each is needed"
            )
        whole[answer, : len(numbers)] = numbers
    return whole


def of_batch(
    spec: KLSpec,
    tensors: Any,
    groups: Sequence[Any],
    named: Mapping[str, Tensor],
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """By ``weight=``, of all answers of a step."""
    if not weights_of(spec):
        return {}
    return sample_weights(spec, of_step(tensors, groups, named, mask))


def of_step(
    tensors: Any,
    groups: Sequence[Any],
    named: Mapping[str, Tensor],
    mask: Tensor | None = None,
) -> Samples:
    """All answers of a step."""
    return Samples(
        mask=(tensors["response_mask"] if mask is None else mask) != 0,
        log_probs=tensors.get("old_log_probs"),
        ref_log_probs=tensors.get("ref_log_prob"),
        advantages=tensors.get("advantages"),
        rewards=tensors["token_level_scores"].sum(-1),
        group_ids=groups,
        entropy=named.get("entropy"),
        tensors=named,
    )


def carried(weights: Mapping[str, Tensor], spec: KLSpec) -> dict[str, Tensor]:
    """By the names that they have in a batch."""
    return {own.key: weights[own.written] for own in weights_of(spec)}


def found_in(spec: KLSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By ``weight=``, of what a micro-batch carries."""
    weights = weights_of(spec)
    missing = next((own for own in weights if own.key not in tensors), None)
    if missing is not None:
        raise RuntimeError(
            f"kl_type {spec}: the micro-batch has no {missing.key}, which the trainer makes of the "
            "whole batch. Did another advantage stage than verl's own run?"
        )
    return {own.written: tensors[own.key] for own in weights}
