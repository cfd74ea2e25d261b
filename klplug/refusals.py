"""What a ``kl_type`` can't be: a row for each refusal, with its reason and the valid form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klplug.axes import AXES
from klplug.numerics import LEAST, MOST, has_a_size

if TYPE_CHECKING:
    from klplug.spec import TermSpec

# The divergence whose form on whole answers is what an estimator without one is taken for.
_TWINS = {"k3": "forward", "abs": "tv"}
_OF_A_RATIO = ("level", "cap", "mode")
# Policies that the current one is at the start of a step.
_BEHAVIOURS = ("rollout", "old")


# What is refused as it is read, before there is a term with values to look at.
MISSPELT = (
    "unknown-name",
    "unknown-option",
    "unknown-value",
    "no-placement",
    "no-value",
    "no-number",
    "no-size",
    "no-factor",
    "weight-argument",
    "option-twice",
    "options-of-none",
    "none-in-a-sum",
    "same-term-twice",
    "posterior-in-a-sum",
    "empty-term",
)


class Refused(ValueError):
    """A ``kl_type`` that is no formulation; ``refusal`` is the id of what it is refused for."""

    def __init__(self, message: str, refusal: str = "") -> None:
        super().__init__(message)
        self.refusal = refusal


@dataclass(frozen=True)
class Refusal:
    """One reason for which a term is refused.

    Attributes:
        id: its name, which tells it from all others.
        applies: whether a term has it. Options that were left out have their defaults.
        words: what is said, with ``{option}`` for the term's own values.
    """

    id: str
    applies: Callable[[TermSpec], bool]
    words: str


def refuse(term: TermSpec, written: str) -> None:
    """Raise the first refusal that applies to ``term``, which was ``written`` under that name."""
    for refusal in REFUSALS:
        if refusal.applies(term):
            words = refusal.words.format_map(_own_words(term))
            raise Refused(f"kl_type {written}: {words}", refusal.id)


def _own_words(term: TermSpec) -> dict[str, Any]:
    words = {name: axis.shown(getattr(term, name)) for name, axis in AXES.items()}
    alpha = f",alpha={words['alpha']}" if term.estimator == "alpha" else ""
    exact = f"{term.estimator}_as_loss{alpha}" if term.exact_on_answers else "k2_as_loss"
    given = next((option for option in _OF_A_RATIO if getattr(term, option) is not None), "")
    return words | {
        "name": term.name,
        "estimator": term.estimator,
        "placement": term.placement,
        "answers": f"{exact},horizon=sequence",  # the nearest form that is exact on whole answers
        "of_the_ratio": f"{given}={words.get(given)}",
        "twin": _TWINS.get(term.estimator),
        "over": "exact_as_loss" if term.vocab == "exact" else f"k2_as_loss,vocab={words['vocab']}",
    }


def _in_reward(term: TermSpec) -> bool:
    return term.placement == "in_reward"


def _under_a_head(term: TermSpec) -> bool:
    return term.head != "separate"


def _on_answers(term: TermSpec) -> bool:
    return term.placement == "as_loss" and term.horizon == "sequence"


def _by_answer(term: TermSpec) -> bool:
    return term.horizon == "answer"


def _to_posterior(term: TermSpec) -> bool:
    return term.reference == "posterior"


def _over(term: TermSpec) -> bool:
    return term.over_vocabulary


def _weight_given(term: TermSpec) -> bool:
    return any(getattr(term, option) is not None for option in _OF_A_RATIO)


def _inexact(term: TermSpec) -> bool:
    return _on_answers(term) and not term.exact_on_answers


def _of_tokens(term: TermSpec) -> bool:
    return term.weighting is not None and not term.weighting.row.per_answer


def _positive(value: float) -> bool:
    return LEAST <= value <= MOST or value == math.inf  # nan is neither


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "alpha-of-another",
        lambda t: t.estimator != "alpha" and t.alpha is not None,
        "alpha={alpha} is refused: it is for 'alpha_{placement}'",
    ),
    Refusal(
        "alpha-infinite",
        lambda t: t.alpha is not None and t.alpha != 0 and not has_a_size(t.alpha),
        "alpha={alpha} is refused: it must be finite, and its size between 1e-15 and 1e15",
    ),
    Refusal(
        "alpha-0",
        lambda t: t.alpha == 0,
        "alpha=0 is refused: the divergence's limit there is that of 'forward_as_loss'",
    ),
    Refusal(
        "alpha-1",
        lambda t: t.alpha == 1,
        "alpha=1 is refused: the divergence's limit there is that of 'k2_as_loss'",
    ),
    Refusal(
        "posterior-in-reward",
        lambda t: _to_posterior(t) and _in_reward(t),
        "reference=posterior is refused: the posterior has the reward in it, and a reward can't "
        "have itself. Use 'k2_as_loss,reference=posterior'",
    ),
    Refusal(
        "posterior-of-tokens",
        lambda t: _to_posterior(t) and not _by_answer(t),
        "horizon={horizon} with reference=posterior is refused: the posterior is over whole "
        "answers, for a reward is of a whole answer. Leave horizon out",
    ),
    Refusal(
        "posterior-of-no-divergence",
        lambda t: _to_posterior(t) and not t.exact_on_answers,
        "reference=posterior is refused for {estimator}: it is for k2, forward, js, jeffreys, "
        "chi2, hellinger, tv and alpha. k2 has KL(pi||p), and forward KL(p||pi)",
    ),
    Refusal(
        "posterior-baseline",
        lambda t: _to_posterior(t) and t.baseline != "none",
        "baseline={baseline} with reference=posterior is refused: this answer is in the Z of the "
        "others, so their mean would bias it. Its own Z is a baseline already. Leave it out",
    ),
    Refusal(
        "answer-of-a-sum",
        lambda t: _by_answer(t) and not _to_posterior(t) and not t.definition.answer_target,
        "horizon=answer is refused: it is for js, jeffreys, chi2, hellinger, tv and alpha. The "
        "KL(pi||ref) of whole answers is 'k2_as_loss,horizon=sequence', and KL(ref||pi) "
        "'forward_as_loss,horizon=sequence'",
    ),
    Refusal(
        "answer-in-reward",
        lambda t: _by_answer(t) and _in_reward(t),
        "horizon=answer is refused: a reward has an estimator's value, and this is its derivative. "
        "Use '{estimator}_as_loss,horizon=answer'",
    ),
    Refusal(
        "answer-over-vocabulary",
        lambda t: _by_answer(t) and _over(t),
        "horizon=answer with vocab={vocab} is refused: a divergence between whole answers is no "
        "sum over tokens. Leave one of them out",
    ),
    Refusal(
        "answer-under-head",
        lambda t: _by_answer(t) and _under_a_head(t),
        "head={head} with horizon=answer is refused: a head has each token's own ratio, and c here "
        "is of the whole answer. Leave one of them out",
    ),
    Refusal(
        "head-in-reward",
        lambda t: _in_reward(t) and _under_a_head(t) and t.estimator != "k1",
        "head={head} is refused: the head takes an estimator's derivative at the current policy, "
        "and the reward has its value. Use '{estimator}_as_loss,head={head}'",
    ),
    Refusal(
        "head-in-reward-of-token",
        lambda t: _in_reward(t) and _under_a_head(t) and t.horizon == "token",
        "horizon=token is refused with head={head}, which joins whole answers' KL after group "
        "normalisation. Use 'k2_as_loss,head={head}'",
    ),
    Refusal(
        "head-in-reward-of-group",
        lambda t: _in_reward(t) and _under_a_head(t),
        "reward_norm=group is refused with head={head}, which joins whole answers' KL after group "
        "normalisation. Use 'k2_as_loss,head={head}'",
    ),
    Refusal(
        "exact-in-reward",
        lambda t: _over(t) and _in_reward(t),
        "vocab={vocab} is refused: a reward goes to the sampled tokens. A KL over the vocabulary "
        "has a gradient of its own. Use '{over},horizon=sequence'",
    ),
    Refusal(
        "exact-of-k1",
        lambda t: _over(t) and t.estimator == "k1",
        "vocab={vocab} is refused: the derivative of k1 is 1, which over the vocabulary is exactly "
        "no gradient. Use '{over}'",
    ),
    Refusal(
        "exact-of-twin",
        lambda t: _over(t) and t.estimator in _TWINS,
        "vocab={vocab} is refused: over the vocabulary the derivative of {estimator} is that of "
        "'{twin}_as_loss,vocab={vocab}'. For KL(pi||ref) use '{over}'",
    ),
    Refusal(
        "exact-of-answers",
        lambda t: _over(t) and _on_answers(t) and not t.exact_by_values,
        "horizon=sequence with vocab={vocab} is refused: KL(ref||pi) of whole answers is no sum "
        "over tokens that follow the policy. Use '{estimator}_as_loss,horizon=sequence', or "
        "horizon=token",
    ),
    Refusal(
        "exact-under-head",
        lambda t: _over(t) and _under_a_head(t),
        "head={head} with vocab={vocab} is refused: a head has the ratio of the sampled token, and "
        "there is none. Leave one of them out",
    ),
    Refusal(
        "exact-to-sampler",
        lambda t: _over(t) and t.reference in _BEHAVIOURS,
        "reference={reference} with vocab={vocab} is refused: the policy that made the samples has "
        "log-probs of the sampled tokens alone. Use 'k2_as_loss,reference={reference}'",
    ),
    Refusal(
        "exact-to-teacher",
        lambda t: _over(t) and t.reference == "teacher",
        "reference=teacher with vocab={vocab} is refused: the hosts bring the reference's hidden "
        "states to the policy, and no second model's. Use 'k2_as_loss,reference=teacher', or the "
        "teacher as the reference model",
    ),
    Refusal(
        "exact-bound",
        lambda t: _over(t) and t.bound < math.inf,
        "bound={bound} with vocab={vocab} is refused: it holds the coefficient of a sampled token, "
        "and there is none. Leave one of them out",
    ),
    Refusal(
        "exact-baseline",
        lambda t: _over(t) and t.baseline != "none",
        "baseline={baseline} with vocab={vocab} is refused: a baseline is a mean of sampled KLs. "
        "Leave one of them out",
    ),
    Refusal(
        "exact-level",
        lambda t: _over(t) and t.level in ("token", "sequence"),
        "level={level} with vocab={vocab} is refused: the own token and later ones need no ratio. "
        "Those before it need their product. Use level=prefix (the default there)",
    ),
    Refusal(
        "token-in-reward",
        lambda t: _in_reward(t) and t.horizon == "token",
        "horizon=token is refused: a reward is credited to every token before it. The own-token "
        "form is 'k2_as_loss'",
    ),
    Refusal(
        "ratio-in-reward",
        lambda t: _in_reward(t) and t.ratio != "none",
        "ratio={ratio} is refused: a reward is frozen at the start of the step. The host's policy "
        "loss has the ratio. For a KL with a weight of its own use '{answers}'",
    ),
    Refusal(
        "weight-in-reward",
        lambda t: _in_reward(t) and _weight_given(t),
        "{of_the_ratio} is refused: a KL in the reward has no ratio of its own. Leave it out, or "
        "use '{answers}'",
    ),
    Refusal(
        "sampler-in-reward",
        lambda t: _in_reward(t) and t.reference in _BEHAVIOURS,
        "reference={reference} is refused: frozen at the start of the step, where the policy is "
        "that itself, it holds nothing back. Use 'k2_as_loss,reference={reference}'",
    ),
    Refusal(
        "baseline-before-group",
        lambda t: t.baseline != "none" and t.reward_norm == "group" and _in_reward(t),
        "baseline={baseline} with reward_norm=group is refused: the group's mean is taken off "
        "already. Leave one of them out",
    ),
    Refusal(
        "reward-norm-as-loss",
        lambda t: not _in_reward(t) and t.reward_norm is not None,
        "reward_norm={reward_norm} is refused: a KL as a loss joins no reward. It is for "
        "'{estimator}_in_reward'",
    ),
    Refusal(
        "inexact-on-answers-twin",
        lambda t: _inexact(t) and t.estimator in _TWINS,
        "horizon=sequence is refused: for {estimator} the derivatives of later tokens add noise "
        "and nothing to the mean. For KL(pi||ref) of whole answers use "
        "'k2_as_loss,horizon=sequence', for its own divergence '{twin}_as_loss,horizon=sequence'",
    ),
    Refusal(
        "inexact-on-answers",
        _inexact,
        "horizon=sequence is refused: for {estimator} the derivatives of later tokens add noise "
        "and nothing to the mean. For KL(pi||ref) of whole answers use "
        "'k2_as_loss,horizon=sequence'",
    ),
    Refusal(
        "k1-under-head",
        lambda t: _under_a_head(t) and t.estimator == "k1",
        "head={head} is refused: the coefficient of k1 is 1 everywhere. A clip would drop it on "
        "one side only, and so make it a push. Use 'k2_as_loss,head={head}'",
    ),
    Refusal(
        "ratio-under-head",
        lambda t: _under_a_head(t) and t.ratio is not None,
        "ratio={ratio} is refused: head={head} has the ratio and the clip of the policy loss. "
        "Leave it out",
    ),
    Refusal(
        "weight-under-head",
        lambda t: _under_a_head(t) and _weight_given(t),
        "{of_the_ratio} is refused: head={head} has the ratio and the clip of the policy loss. "
        "Leave it out",
    ),
    Refusal(
        "sampler-under-head",
        lambda t: _under_a_head(t) and t.reference == "rollout",
        "reference=rollout with head={head} is refused: it needs ratio=rollout, and the policy "
        "loss's ratio is to old. Use '{name},reference=rollout'",
    ),
    Refusal(
        "baseline-under-head",
        lambda t: _under_a_head(t) and t.baseline != "none",
        "baseline={baseline} with head={head} is refused: under a clip it is biased. Use "
        "'{answers},baseline={baseline}'",
    ),
    Refusal(
        "sampler-under-another-ratio",
        lambda t: t.reference == "rollout" and t.ratio == "old",
        "ratio=old with reference=rollout is refused: the answers come from the sampler. Only its "
        "own ratio makes this a gradient of KL(pi||rollout). Leave ratio out, or write ratio=none",
    ),
    Refusal(
        "baseline-of-token",
        lambda t: t.baseline != "none" and t.horizon == "token",
        "baseline={baseline} with horizon=token is refused: a baseline is for the KL of a "
        "whole answer. Use '{answers},baseline={baseline}'",
    ),
    Refusal(
        "weight-without-ratio",
        lambda t: t.ratio == "none" and _weight_given(t),
        "{of_the_ratio} is refused: with ratio=none there is no weight. Leave one of them out",
    ),
    Refusal(
        "token-level-on-answers",
        lambda t: t.horizon == "sequence" and t.level == "token",
        "level=token with horizon=sequence is refused: it is biased, on tokens later than this "
        "one. Use level=prefix (the default there) or sequence",
    ),
    Refusal(
        "level-on-answer",
        lambda t: _by_answer(t) and t.level in ("token", "prefix"),
        "level={level} with horizon=answer is refused: c is of the whole answer, and so must its "
        "ratio be. Use level=sequence (the default there)",
    ),
    Refusal(
        "cap-not-positive",
        lambda t: t.cap is not None and not _positive(t.cap),
        "cap={cap} must be a positive number of float32, or none",
    ),
    Refusal(
        "cap-drops-all",
        lambda t: t.mode == "mask" and t.cap is not None and t.cap < 1,
        "cap={cap} with mode=mask would drop every token of on-policy data, whose ratio is 1. Use "
        "a cap of at least 1, or mode=truncate",
    ),
    Refusal(
        "cap-under-baseline",
        lambda t: t.baseline != "none" and t.cap is not None and t.cap < math.inf,
        "cap={cap} with baseline={baseline} is refused: under a cap the baseline is biased. Use "
        "cap=none (the default there), or baseline=none",
    ),
    Refusal(
        "bound-not-positive",
        lambda t: not _positive(t.bound),
        "bound={bound} must be a positive number of float32, or none",
    ),
    Refusal(
        "bound-on-answers",
        lambda t: _on_answers(t) and t.bound < math.inf and t.estimator != "k2",
        "bound={bound} with horizon=sequence is refused: later tokens enter by their values, which "
        "a bound on the derivative does not touch. Use 'k2_as_loss,horizon=sequence,bound={bound}'"
        ", or horizon=token",
    ),
    Refusal(
        "root-of-another",
        lambda t: (
            t.weight == "root"
            and (t.estimator, t.horizon, t.reference) != ("chi2", "answer", "ref")
        ),
        "weight=root is refused: it is for the square root of chi2 between whole answers, to the "
        "reference model. Use 'chi2_as_loss,horizon=answer,weight=root'",
    ),
    Refusal(
        "bound-under-root",
        lambda t: t.weight == "root" and t.bound < math.inf,
        "bound={bound} with weight=root is refused: the chi2 under the root has no bound. Leave "
        "one of them out",
    ),
    Refusal(
        "weight-before-advantages",
        lambda t: _in_reward(t) and t.weighting is not None and "advantages" in t.weighting.needs,
        "weight={weight} is refused: it is made of advantages, and a KL in the reward is part of "
        "them. Use 'k2_as_loss,horizon=sequence,weight={weight}'",
    ),
    Refusal(
        "weight-under-baseline",
        lambda t: t.weighting is not None and t.baseline != "none",
        "weight={weight} with baseline={baseline} is refused: other answers have other weights, so "
        "their KL is no baseline of this one's. Leave one of them out",
    ),
    Refusal(
        "weight-of-tokens-on-answers",
        lambda t: (_by_answer(t) or (_on_answers(t) and t.by_answer_so_far)) and _of_tokens(t),
        "weight={weight} with horizon={horizon} is refused: {estimator} of whole answers is no sum "
        "over tokens. So there is nothing of a token to weigh. Use "
        "'k2_as_loss,horizon=sequence,weight={weight}', or horizon=token",
    ),
)
