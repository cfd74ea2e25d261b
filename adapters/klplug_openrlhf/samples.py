"""``weight=``: what OpenRLHF has of a step's answers, and their weights on the way to the policy.

The weights are made in the trainer, of all answers of a step, once there are advantages; for a KL
in the reward, before. They travel in ``Experience.info``, the one field that takes what OpenRLHF
does not know. What an agent or a reward function returns as a list in ``extra_logs``, a number for
each of the answer's ``observation_tokens``, comes in ``info`` too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from klplug import KLSpec, Samples, posterior_log_probs, sample_weights
from klplug.hosting.patching import Args, Call, Kwargs
from klplug.samples import weights_of
from klplug_openrlhf import teacher
from klplug_openrlhf.plan import Plan

INFO = "klplug/sample_weights"
ENTROPY = "klplug/entropy"
REWARDS = "klplug/rewards"
POSTERIOR = "posterior_log_probs"


@dataclass(frozen=True)
class Carried:
    """Of one answer the numbers of its counted tokens: by ``weight=``, and the posterior's."""

    numbers: dict[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """What the policy's actor returns of a micro-batch in place of its log-probs alone."""

    log_probs: Tensor
    entropy: Tensor


# ── The policy's actor, where experience is made ────────────────────────────────────────────────


def with_entropy(original: Call, actor: Any, args: Args, kwargs: Kwargs) -> list[Measured]:
    """OpenRLHF's forwards of the policy over some micro-batches, with each token's entropy."""
    entropies: list[Tensor] = []
    model, forward = actor.actor, actor.actor.forward

    def measured(sequences: Tensor, action_mask: Tensor, *rest: Any, **named: Any) -> Tensor:
        given = {**named, "return_output": True, "return_entropy": True}
        log_probs, output = forward(sequences, action_mask, *rest, **given)
        entropies.append(output.entropy[:, -action_mask.shape[1] :].float().cpu())
        return log_probs  # type: ignore[no-any-return]

    model.forward = measured
    try:
        results = original(*args, **kwargs)
    finally:
        del model.forward
    return [Measured(*pair) for pair in zip(results, entropies, strict=True)]


# ── The trainer ─────────────────────────────────────────────────────────────────────────────────


def flattened(maker: Any, results: list[Any]) -> list[Any]:
    """The log-probs of what the models answered; the entropies are kept for the experience."""
    if not any(isinstance(result, Measured) for result in results):
        return results
    maker.klplug_entropies = [measured.entropy for measured in results]
    return [measured.log_probs for measured in results]


def attach(plan: Plan, maker: Any, experiences: list[Any]) -> None:
    """What weights see and OpenRLHF drops, or changes, before there are advantages."""
    if not makes(plan.spec):
        return
    entropies = vars(maker).pop("klplug_entropies", None)
    if weights_of(plan.spec, "entropy") and entropies is None:
        raise RuntimeError(
            f"kl_type {plan.spec}: the policy sent no entropies: is klplug active in its process?"
        )
    for i, experience in enumerate(experiences):
        experience.info[REWARDS] = experience.rewards.clone()
        if entropies is not None:
            experience.info[ENTROPY] = entropies[i]


def joined(tensors: list[Tensor]) -> Tensor:
    """All answers of experiences, (B, A) each, as wide as the widest."""
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])


def cut(whole: Tensor, experiences: list[Any]) -> list[Tensor]:
    """What was joined, by experience, as wide as each is."""
    parts = torch.split(whole, [len(e.action_mask) for e in experiences])
    return [x[:, : e.action_mask.shape[1]] for x, e in zip(parts, experiences, strict=True)]


def makes(spec: KLSpec) -> bool:
    """Whether anything is made of a whole step's answers, to travel with them."""
    return bool(weights_of(spec)) or spec.has_the_reward


def carries(spec: KLSpec) -> bool:
    """Whether any number per token travels with the answers."""
    return makes(spec) or teacher.LOG_PROBS in spec.requires


def of_rollout(spec: KLSpec, experiences: list[Any], group_ids: list[int]) -> dict[str, Tensor]:
    """By ``weight=``, of all answers at once, as wide as the widest."""
    return sample_weights(spec, of_step(spec, experiences, group_ids)) if weights_of(spec) else {}


def of_step(spec: KLSpec, experiences: list[Any], group_ids: list[int]) -> Samples:
    """All answers of a step, as wide as the widest."""
    weights = weights_of(spec)

    def of_all(name: str) -> Tensor | None:
        tensors = [getattr(e, name) for e in experiences]
        return None if any(tensor is None for tensor in tensors) else joined(tensors)

    def of_info(name: str) -> Tensor | None:
        tensors = [e.info.get(name) for e in experiences]
        if any(not isinstance(tensor, Tensor) for tensor in tensors):
            return None
        if any(tensor.dim() == 1 for tensor in tensors):
            return torch.cat([tensor.flatten() for tensor in tensors])
        both = zip(tensors, experiences, strict=True)
        return joined([_of_actions(name, tensor, e) for tensor, e in both])

    tensors = {own.tensor: of_info(own.tensor) for own in weights if own.tensor is not None}
    entropies = [e.info.get(ENTROPY) for e in experiences]
    return Samples(
        mask=joined([e.action_mask for e in experiences]) != 0,
        log_probs=of_all("action_log_probs"),
        ref_log_probs=of_all("base_action_log_probs"),
        advantages=of_all("advantages"),
        rewards=torch.cat([e.info[REWARDS] for e in experiences]),
        group_ids=group_ids,
        entropy=None if entropies[0] is None else joined(entropies),
        tensors={name: tensor for name, tensor in tensors.items() if tensor is not None},
    )


def _of_actions(name: str, tensor: Tensor, experience: Any) -> Tensor:
    """Of numbers for every token of prompt and answer, those under the action mask, (B, A)."""
    length, actions = experience.sequences.shape[1], experience.action_mask.shape[1]
    if tensor.shape[1] < length:  # all answers of a micro-batch are as wide as the longest
        raise ValueError(
            f"{name!r} has {tensor.shape[1]} numbers where there are {length} tokens of prompt and "
            "answer. It needs one for each of the observation_tokens"
        )
    return tensor[:, length - actions : length]


def by_experience(weights: dict[str, Tensor], experiences: list[Any]) -> list[dict[str, Tensor]]:
    """Of each experience, as wide as it is."""
    parts = {name: cut(weight, experiences) for name, weight in weights.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(experiences))]


def carry(plan: Plan, experiences: list[Any], group_ids: list[int], beta: float) -> None:
    """Each answer's weights, its posterior's and its teacher's log-probs into its experience; what
    they were made of out of it."""
    weights = weights_of(plan.spec)
    if not carries(plan.spec):
        return
    whole: dict[str, Tensor] = {}
    if makes(plan.spec):
        samples = of_step(plan.spec, experiences, group_ids)
        whole = sample_weights(plan.spec, samples)
        if plan.spec.has_the_reward:
            # As OpenRLHF has changed them since ``attach``, by its penalties on an answer's length.
            rewards = torch.cat([e.rewards for e in experiences])
            whole[POSTERIOR] = posterior_log_probs(replace(samples, rewards=rewards), beta)
    made = by_experience(whole, experiences)
    for experience, own in zip(experiences, made, strict=True):
        info, mask = experience.info, experience.action_mask != 0
        if (taught := info.pop(teacher.INFO, None)) is not None:
            own[teacher.LOG_PROBS] = taught
        info[INFO] = [
            Carried({name: numbers[i][row] for name, numbers in own.items()})
            for i, row in enumerate(mask)
        ]
        read_of = [own.tensor for own in weights if own.tensor is not None]
        for name in (ENTROPY, REWARDS, *read_of):
            if name in (ENTROPY, REWARDS) or info[name].dim() > 1:
                info.pop(name, None)  # OpenRLHF logs all of info, a number per answer


# ── The policy's actor, where it trains ─────────────────────────────────────────────────────────


def taken(plan: Plan, experience: Any) -> dict[str, Tensor]:
    """What was carried of a micro-batch, (B, A) each, out of what OpenRLHF would log."""
    if not carries(plan.spec):
        return {}
    if INFO not in experience.info:
        raise RuntimeError(
            f"kl_type {plan.spec}: this experience carries nothing of klplug's: it was not active "
            "in the process that made it"
        )
    experience.info = dict(experience.info)
    carried: list[Carried] = experience.info.pop(INFO)
    mask = experience.action_mask != 0
    taken = {}
    for name in carried[0].numbers:
        numbers = torch.cat([own.numbers[name] for own in carried]).to(mask.device)
        place = mask.nonzero(as_tuple=True)
        taken[name] = numbers.new_zeros(mask.shape).index_put(place, numbers)
    return taken
