"""One kl_type, one gradient: the tensors that both hosts' tests are fed, and what must come out.

The hosts live in environments of their own, so neither test can call the other's path. Each feeds
these tensors through its own host and compares with the numbers given here, which come from the
core alone: equal to the same numbers, the two are equal to each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import klplug

BETA = 0.25
CLIP_RANGE = (0.08, 0.1)  # of the policy loss; narrow, so that it acts on this batch
TOLERANCE = 1e-6

AS_LOSS = (
    "k1_as_loss",
    "k2_as_loss",
    "k3_as_loss",
    "abs_as_loss",
    "k2_as_loss,ratio=none",
    "k3_as_loss,ratio=none",
    "k2_as_loss,ratio=rollout",
    "k2_as_loss,level=prefix",
    "k2_as_loss,level=sequence",
    "k2_as_loss,cap=1.1",
    "k2_as_loss,cap=1.1,mode=mask",
    "k2_as_loss,cap=none",
    "k2_as_loss,bound=0.3",
    "k2_as_loss,horizon=sequence",
    "k2_as_loss,level=sequence,horizon=sequence",
    "k2_as_loss,ratio=none,horizon=sequence",
    "k2_as_loss,ratio=rollout,cap=2,horizon=sequence,bound=0.5",
)
IN_REWARD = (
    "k1_in_reward",
    "k2_in_reward",
    "k3_in_reward",
    "abs_in_reward",
    "k1_in_reward,bound=1",
)
SUMS = (
    "k3_in_reward+k3_as_loss",
    "k2_as_loss+k3_as_loss,ratio=none",
    "0.7*k2_as_loss+0.3*k2_as_loss,reference=old",
    "1.5*k2_as_loss,horizon=sequence+-0.5*k2_as_loss,horizon=sequence,reference=old",
    "0.5*k3_in_reward+2*k3_as_loss",
    "1.25*k2_as_loss,reference=teacher+-0.25*k2_as_loss",
    "0.5*k1_in_reward+0.5*k1_in_reward,reference=teacher",
)
DIVERGENCES = (
    "forward_as_loss",
    "js_as_loss",
    "jeffreys_as_loss",
    "chi2_as_loss,ratio=rollout",
    "hellinger_as_loss",
    "tv_as_loss",
    "alpha_as_loss,alpha=2",
    "forward_as_loss,horizon=sequence",
    "js_as_loss,horizon=sequence",
    "alpha_as_loss,alpha=-1,level=sequence,horizon=sequence",
    "chi2_as_loss,horizon=answer",
    "js_as_loss,ratio=rollout,cap=1.1,horizon=answer",
    "js_as_loss,reference=posterior",
    "forward_as_loss,ratio=rollout,bound=0.5,reference=posterior",
    "js_in_reward",
    "chi2_in_reward",
)
HEADS = (
    "k2_as_loss,head=clipped",
    "k2_as_loss,head=clipped,horizon=sequence",
    "k3_as_loss,head=combined",
    "k2_as_loss,head=combined",
    "k1_in_reward,head=combined",
    "js_as_loss,head=combined,horizon=sequence",
    "k2_as_loss,head=combined+k3_as_loss",
    "k2_as_loss,head=combined+k3_in_reward",
)
BASELINES = (
    "k2_as_loss,horizon=sequence,baseline=group",
    "k2_as_loss,horizon=sequence,baseline=batch",
    "js_as_loss,ratio=rollout,horizon=sequence,baseline=group",
    "k1_in_reward,baseline=group",
    "k1_in_reward,baseline=batch",
    "0.5*k2_as_loss+0.5*k2_as_loss,horizon=sequence,baseline=group,reference=teacher",
    "k1_in_reward+k1_in_reward,baseline=group,reference=teacher",
)
SAMPLER = (
    "k2_as_loss,reference=rollout",
    "k2_as_loss,reference=rollout,horizon=sequence",
    "k2_as_loss,ratio=none,reference=rollout",
    "k2_as_loss+k3_as_loss,reference=rollout",
    "k2_as_loss,reference=old",
)
STEPS = (
    "k1_as_loss",
    "k3_as_loss,ratio=none",
    "abs_as_loss,ratio=rollout,cap=none",
    "forward_as_loss,horizon=sequence",
    "js_as_loss,cap=1.1",
    "jeffreys_as_loss,level=prefix",
    "chi2_as_loss,bound=2",
    "hellinger_as_loss,level=sequence,horizon=sequence",
    "tv_as_loss",
    "alpha_as_loss,alpha=2,horizon=sequence",
    "chi2_as_loss,horizon=answer",
    "k2_as_loss,level=sequence,cap=2,mode=mask",
    "k2_as_loss,bound=0.3",
    "k2_as_loss,head=clipped",
    "k2_as_loss,head=combined",
    "k1_in_reward,head=combined",
    "k2_as_loss,head=combined+k3_as_loss,reference=rollout",
    "k2_as_loss,horizon=sequence,baseline=group",
    "k2_as_loss,horizon=sequence,baseline=batch",
    "k2_as_loss,reference=rollout",
    "0.7*k2_as_loss+0.3*k2_as_loss,reference=old",
    "1.25*k2_as_loss,reference=teacher+-0.25*k2_as_loss",
    "k2_as_loss,reference=posterior",
)
"""Every estimator and every value of every option of a KL in the loss, in few: what is trained on
by each host's own trainer, engine and model."""

EXACT = (
    "exact_as_loss",
    "exact_as_loss,ratio=old",
    "exact_as_loss,horizon=sequence",
    "js_as_loss,vocab=exact",
    "exact_as_loss+k3_in_reward",
)
"""Over the vocabulary: trained on by hidden states instead of log-probs, with ``states``."""

KL_TYPES = (*AS_LOSS, *IN_REWARD, *SUMS, *DIVERGENCES, *HEADS, *BASELINES, *SAMPLER)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, float32, (4, 6); answers of 6, 4, 1 and 5 tokens, one with a gap."""

    log_probs: Tensor
    ref_log_probs: Tensor
    old_log_probs: Tensor
    rollout_log_probs: Tensor
    posterior_log_probs: Tensor
    teacher_log_probs: Tensor
    response_mask: Tensor
    advantages: Tensor
    group_ids: tuple[int, ...] = (0, 0, 1, 1)


def batch() -> Batch:
    """The tensors, the same on every machine; what is masked holds zeros, as hosts pad."""
    b, t = torch.arange(4.0)[:, None], torch.arange(6.0)[None, :]
    mask = (t < torch.tensor([6.0, 4.0, 1.0, 5.0])[:, None]).float()
    mask[3, 2] = 0  # a tool's output inside an answer
    log_probs = -1.2 - 0.9 * torch.sin(1.7 * b + 0.8 * t)
    old = log_probs + 0.15 * torch.cos(2.3 * b + 1.1 * t)
    return Batch(
        log_probs=log_probs * mask,
        ref_log_probs=(log_probs + 0.7 * torch.sin(0.9 * b - 1.3 * t + 0.4)) * mask,
        old_log_probs=old * mask,
        rollout_log_probs=(old + 0.05 * torch.sin(3.1 * b + 0.7 * t)) * mask,
        posterior_log_probs=(log_probs + 0.4 * torch.cos(1.3 * b - 0.6 * t)) * mask,
        teacher_log_probs=(log_probs - 0.6 * torch.cos(0.7 * b + 1.9 * t)) * mask,
        response_mask=mask,
        advantages=torch.tensor([0.8, -0.4, 1.1, -1.5])[:, None] * mask,
    )


TEMPERATURE = 0.8


@dataclass(frozen=True)
class States:
    """One micro-batch of hidden states, float32: of 7 tokens in 5 and 6 dimensions.

    Attributes:
        hidden: (4, 6, 5), those that predict the tokens of a ``Batch``'s answers.
        weight: (7, 5), the policy's output matrix.
        ref_hidden: (4, 6, 6), of a reference that is wider.
        ref_weight: (7, 6).
        tokens: (4, 6), the answers.
    """

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    tokens: Tensor

    def log_softmax(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Of all tokens, from whole logits: (4, 6, 7)."""
        return (hidden @ weight.T / TEMPERATURE).log_softmax(-1)

    def batch(self, hidden: Tensor) -> Batch:
        """The log-probs of ``hidden``; everything else of the batch moved to where they are."""
        given, index = batch(), self.tokens[..., None]
        mask = given.response_mask
        log_probs = self.log_softmax(hidden, self.weight).gather(-1, index)[..., 0] * mask
        reference = self.log_softmax(self.ref_hidden, self.ref_weight).gather(-1, index)[..., 0]
        here = log_probs.detach()
        return replace(
            given,
            log_probs=log_probs,
            ref_log_probs=reference * mask,
            old_log_probs=here + given.old_log_probs - given.log_probs,
            rollout_log_probs=here + given.rollout_log_probs - given.log_probs,
        )


def states() -> States:
    """The same on every machine."""

    def waves(*shape: int, pace: float) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.sin(pace * torch.arange(1.0, 1.0 + size)).reshape(shape)

    return States(
        hidden=1.5 * waves(4, 6, 5, pace=1.1),
        weight=waves(7, 5, pace=2.3),
        ref_hidden=1.3 * waves(4, 6, 6, pace=0.7),
        ref_weight=waves(7, 6, pace=1.9),
        tokens=torch.arange(24).reshape(4, 6) * 5 % 7,
    )


def exact_step_gradient(kl_type: str) -> Tensor:
    """The gradient of the policy's hidden states in a whole step, (4, 6, 5); as step_gradient."""
    own = states()
    hidden = own.hidden.clone().requires_grad_(True)
    given = own.batch(hidden)
    log_p = own.log_softmax(hidden, own.weight)
    log_q = own.log_softmax(own.ref_hidden, own.ref_weight)
    if kl_type.startswith("js"):  # 2 JS
        middle = torch.logaddexp(log_p, log_q) - math.log(2)
        parts = log_p.exp() * (log_p - middle) + log_q.exp() * (log_q - middle)
    else:
        parts = log_p.exp() * (log_p - log_q)
    in_the_loss = klplug.parse(kl_type).placed("as_loss")
    loss = klplug.policy_loss(
        in_the_loss,
        given.log_probs,
        given.ref_log_probs,
        given.response_mask,
        old_log_probs=given.old_log_probs,
        rollout_log_probs=given.rollout_log_probs,
        advantages=given.advantages,
        kl_coef=BETA,
        clip_range=CLIP_RANGE,
        exact_kl=parts.sum(-1) if in_the_loss.terms else None,
    )
    klplug.aggregate(loss, given.response_mask, "token-mean").backward()
    assert hidden.grad is not None
    return hidden.grad


def return_baseline(kl_type: str, given: Batch | None = None) -> Tensor | None:
    """What the samples carry for a term as_loss with a baseline, (4, 6): measured on ``old``."""
    given = batch() if given is None else given
    for term in klplug.parse(kl_type).placed("as_loss").terms:
        if term.baseline in ("batch", "group"):
            return klplug.kl_return_baseline(
                term,
                given.old_log_probs,
                getattr(given, f"{term.reference}_log_probs"),
                given.response_mask,
                given.group_ids,
            )
    return None


def step_gradient(kl_type: str, given: Batch | None = None) -> Tensor:
    """The gradient of ``log_probs`` in a whole step, (4, 6), under ``token-mean`` aggregation.

    Of the policy loss with ``BETA`` times what of the kl_type is in the loss.
    """
    given = batch() if given is None else given
    log_probs = given.log_probs.clone().requires_grad_(True)
    loss = klplug.policy_loss(
        klplug.parse(kl_type).placed("as_loss"),
        log_probs,
        given.ref_log_probs,
        given.response_mask,
        old_log_probs=given.old_log_probs,
        rollout_log_probs=given.rollout_log_probs,
        posterior_log_probs=given.posterior_log_probs,
        teacher_log_probs=given.teacher_log_probs,
        advantages=given.advantages,
        kl_coef=BETA,
        clip_range=CLIP_RANGE,
        return_baseline=return_baseline(kl_type, given),
    )
    klplug.aggregate(loss, given.response_mask, "token-mean").backward()
    assert log_probs.grad is not None
    return log_probs.grad


def loss_gradient(kl_type: str, given: Batch | None = None) -> Tensor:
    """What the kl_type's part in the loss adds to the gradient of ``log_probs``.

    (4, 6), under ``token-mean`` aggregation; zero for a kl_type that is in the reward only.
    """
    return step_gradient(kl_type, given) - step_gradient("none", given)


def reward_advantages(kl_type: str, given: Batch | None = None) -> Tensor:
    """What the term's part in the reward adds to each token's advantage, (4, 6).

    The coefficient is measured on the policy that the answers came from, ``old``, and credited to
    every counted token at or before its own; zero for a kl_type that is in the loss only.
    """
    given = batch() if given is None else given
    term = klplug.kl_term(
        klplug.parse(kl_type).placed("in_reward"),
        given.old_log_probs,
        given.ref_log_probs,
        given.response_mask,
        group_ids=given.group_ids,
        teacher_log_probs=given.teacher_log_probs,
    )
    return -BETA * klplug.reward_to_go(term.coefficient) * given.response_mask
