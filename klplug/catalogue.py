"""The table of kl_types that README, documentation and command line read."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from klplug.estimators import ESTIMATORS, Estimator
from klplug.spec import PLACEMENTS, KLSpec, TermSpec, parse


@dataclass(frozen=True)
class KLType:
    """One row: what a ``kl_type`` computes and whose gradient that is.

    Attributes:
        name: canonical ``kl_type``, with its default options.
        formula: the estimate of KL(pi||ref), ``x = log pi - log ref`` of a token, nats.
        coefficient: c, the number that multiplies ``grad log pi`` of the token.
        target: whose gradient the expectation is, on-policy, with tokens summed per answer.
        value_bias: bias of the estimate, under samples from pi.
        gradient_bias: bias of the gradient, as one of KL(pi||ref).
        off_policy: what becomes of the target on samples from an older policy.
        requires: what ``kl_term`` needs from a batch beside ``log_probs`` and the mask.
        source: where it comes from.
        test: the test in ``tests/core/test_oracle.py`` that holds it to its target.
        served: by host, whether its adapter serves it, or under what setting of the host.
    """

    name: str
    formula: str
    coefficient: str
    target: str
    value_bias: str
    gradient_bias: str
    off_policy: str
    requires: tuple[str, ...]
    source: str
    test: str
    served: Mapping[str, str] = field(default_factory=dict)

    def __getattr__(self, name: str) -> str:
        """A host by its name, as this class had one before ``served``."""
        served: Mapping[str, str] = self.__dict__.get("served", {})
        if name not in served:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(
            f"KLType.{name} will go: use KLType.served[{name!r}]", DeprecationWarning, stacklevel=2
        )
        return served[name]


_LOSS_TEST = "test_on_policy_loss_has_its_documented_gradient"
_REWARD_TEST = "test_on_policy_reward_has_its_documented_gradient"
_HEAD_TEST = "test_on_policy_the_heads_agree"


def _row(name: str, **changed: Any) -> KLType:
    """The registry's row of a single term; an option's row names what it changes."""
    (spec,) = parse(name).terms
    estimator, role = spec.definition, spec.definition.role(spec.placement)
    row = KLType(
        name=str(spec),
        formula=estimator.formula,
        coefficient=role.formula,
        target=role.target,
        value_bias=estimator.value_bias,
        gradient_bias=role.gradient_bias,
        off_policy=role.off_policy,
        requires=spec.requires,
        source=estimator.source,
        test=_LOSS_TEST if spec.placement == "as_loss" else _REWARD_TEST,
    )
    return replace(row, **changed)


def _over_answers(estimator: Estimator) -> KLType:
    coefficient = "x of this token and all later ones"
    if estimator.of_answer is not None:
        coefficient = "1 - the product of exp(-x) up to this token"
    elif estimator.name != "k2":
        coefficient = f"{estimator.as_loss.formula}, and the values of all later tokens"
    of_kl = "unbiased" if estimator.name == "k2" else "another divergence: unbiased for that"
    return _row(
        f"{estimator.name}_as_loss,horizon=sequence",
        coefficient=coefficient,
        target=estimator.sequence_target,
        gradient_bias=of_kl,
        off_policy="the same (weights of prefixes, inside the sum), exact below the cap",
        source=f"{estimator.source}; per-decision weights: Precup et al. 2000",
    )


def _between_answers(estimator: Estimator) -> KLType:
    return _row(
        f"{estimator.name}_as_loss,horizon=answer",
        coefficient=f"{estimator.as_loss.formula}, x and u of the whole answer",
        target=estimator.answer_target,
        gradient_bias="another divergence: unbiased for that",
        off_policy="the same (weight of the whole answer), exact below the cap",
    )


def _to_posterior(estimator: Estimator) -> KLType:
    """p is the posterior; x and u are those of the whole answer to it."""
    divergence = estimator.answer_target or estimator.sequence_target
    words = {"k2": "grad KL(pi||p)", "forward": "grad KL(p||pi)"}.get(
        estimator.name, divergence.replace("ref", "p").removesuffix(" between whole answers")
    )
    same = "; times kl_coef that is minus grad (E[r] - kl_coef KL(pi||ref))"
    unbiased = "another reference: unbiased for that, with Z from the other answers"
    # c is a power of u, less a constant: an error of Z multiplies it, whatever the answer.
    direction = "another reference: unbiased for that, but for a factor of each prompt, from Z"
    bias = dict.fromkeys(("k2", "chi2"), unbiased)
    bias |= dict.fromkeys(("forward", "hellinger", "alpha"), direction)
    return _row(
        f"{estimator.name}_as_loss,reference=posterior",
        coefficient=f"{estimator.as_loss.formula}, x and u of the whole answer to p",
        target=f"{words} between whole answers, p = ref exp(r/kl_coef)/Z"
        + (same if estimator.name == "k2" else ""),
        value_bias="biased, by a log Z from samples",
        gradient_bias=bias.get(
            estimator.name, "another reference: biased for that, by Z from the other answers"
        ),
        off_policy="the same (weight of the whole answer), exact below the cap",
        source="f-DPG, arXiv 2302.08215",
        test="test_the_posterior_as_reference",
    )


def _head(options: str, **changed: Any) -> KLType:
    if "horizon=sequence" in options:
        changed = {
            "target": "FULL: grad KL(pi||ref) over whole answers",
            "gradient_bias": "unbiased",
            "off_policy": "biased by the later tokens' ratios, and without what PPO's clip drops",
        } | changed
    return _row(
        f"k2_as_loss,{options}",
        source="arXiv 2510.01555, section 5",
        test=_HEAD_TEST,
        **changed,
    )


_CLIPPED = "OLDPREF, without the tokens that PPO's clip drops"
_HEADS = (
    _head("head=combined", coefficient="x, inside the policy loss", off_policy=_CLIPPED),
    _head("head=clipped", off_policy=_CLIPPED),
    _head(
        "head=combined,horizon=sequence",
        coefficient="x of this token and all later ones, inside the policy loss",
        target="FULL: grad KL(pi||ref) over whole answers; also k1_in_reward,head=combined",
    ),
    _head(
        "head=clipped,horizon=sequence",
        coefficient="x of this token and all later ones",
    ),
)


def _over_the_vocabulary(options: str, **changed: Any) -> KLType:
    return _row(
        f"k2_as_loss,vocab=exact{options}",
        formula="sum_v pi (log pi - log ref)",
        value_bias="exact, never negative",
        source="Rao-Blackwell form, arXiv 2504.10637",
        test="test_off_policy_the_exact_kl_needs_a_ratio_of_the_tokens_before_alone",
        **changed,
    )


_EXACT = (
    _over_the_vocabulary(
        "",
        coefficient="none: sum_v pi x is differentiated itself; also called exact_as_loss",
        gradient_bias="unbiased for LOC, without noise of the own token",
        off_policy="OLDPREF, without a ratio; LOC with ratio=old, that of the tokens before",
    ),
    _over_the_vocabulary(
        ",horizon=sequence",
        coefficient="the exact KLs of all later tokens, beside the gradient of the own one",
        target="FULL: grad KL(pi||ref) over whole answers",
        gradient_bias="unbiased",
        off_policy="the same (weights of the tokens before, inside the sum), exact below the cap",
    ),
)
_TOP = _row(
    "k2_as_loss,vocab=topk:64",
    formula="sum pi (log pi - log ref) over the reference's top K tokens and all others as one",
    coefficient="none: the gradient of that sum itself",
    target="LOC of the KL between K + 1 categories, a lower bound of KL(pi||ref) of each token",
    value_bias="at most KL(pi||ref), never negative",
    gradient_bias="that of a lower bound: unbiased for it, without noise of the own token",
    off_policy="OLDPREF of it, without a ratio; LOC with ratio=old, that of the tokens before",
    source="klplug; the data-processing inequality",
    test="test_the_top_tokens_have_the_gradient_of_their_categories",
)
_SAMPLER = _row(
    "k2_as_loss,reference=rollout",
    coefficient="log pi - log rollout",
    target="grad KL(pi||rollout): zero on-policy, a trust region from then on",
    value_bias="biased for KL(pi||rollout), second order near it",
    gradient_bias="another reference: unbiased for KL(pi||rollout) of each token",
    off_policy="OLDPREF of KL(pi||rollout), exact below the cap",
    source="klplug; the sampler as the proximal policy",
    test="test_the_sampler_as_reference",
)
_SAMPLER_WITHOUT_RATIO = _row(
    "k2_as_loss,ratio=none,reference=rollout",
    coefficient="log pi - log rollout",
    target="grad E_rollout[k2 to the sampler]: zero on-policy, a trust region from then on",
    value_bias="biased for KL(pi||rollout), second order near it",
    gradient_bias="another reference: near the sampler KL(pi||rollout), to second order",
    off_policy="exact: the sampler's own tokens are what it is an expectation over",
    source="Kimi K2.5, arXiv 2602.02276; prime-rl's default",
    test="test_the_sampler_as_reference_without_a_ratio",
)
_OLD = _row(
    "k2_as_loss,reference=old",
    coefficient="log pi - log old",
    target="grad KL(pi||old): zero on-policy, a trust region from then on",
    value_bias="biased for KL(pi||old), second order near it",
    gradient_bias="another reference: unbiased for KL(pi||old) of each token",
    off_policy="OLDPREF of KL(pi||old), exact below the cap",
    source="klplug; the policy at the start of the step as the proximal policy",
    test="test_the_policy_at_the_start_of_the_step_as_reference",
)
_MIXTURE = KLType(
    name="0.7*k2_as_loss+0.3*k2_as_loss,reference=old",
    formula="0.7 x^2 / 2 + 0.3 (log pi - log old)^2 / 2",
    coefficient="0.7 x + 0.3 (log pi - log old)",
    target="LOC of 0.7 KL(pi||ref) + 0.3 KL(pi||old): of the KL to ref^0.7 old^0.3, unnormalised",
    value_bias="for each KL that of k2",
    gradient_bias="another reference: unbiased for LOC of that sum",
    off_policy="OLDPREF of that sum, exact below the cap",
    requires=parse("k2_as_loss+k2_as_loss,reference=old").requires,
    source="klplug; the references of DAR, arXiv 2602.11523, with any coefficients",
    test="test_a_sum_of_two_references_is_a_kl_to_their_geometric_mixture",
)
_TEACHER = _row(
    "k2_as_loss,reference=teacher",
    coefficient="log pi - log teacher",
    target="LOC: grad KL(pi||teacher) of each token, the KL to a second frozen model",
    value_bias="biased for KL(pi||teacher), second order near it",
    gradient_bias="another reference: unbiased for LOC of KL(pi||teacher)",
    off_policy="OLDPREF of KL(pi||teacher), exact below the cap",
    source="on-policy distillation; KDRL, arXiv 2506.02208",
    test="test_a_teacher_as_reference",
)
_TWO_MODELS = KLType(
    name="1.25*k2_as_loss,reference=teacher+-0.25*k2_as_loss",
    formula="1.25 (log pi - log teacher)^2 / 2 - 0.25 x^2 / 2",
    coefficient="1.25 (log pi - log teacher) - 0.25 x",
    target="LOC of 1.25 KL(pi||teacher) - 0.25 KL(pi||ref): of the KL to teacher^1.25 / ref^0.25, "
    "unnormalised",
    value_bias="for each KL that of k2",
    gradient_bias="another reference: unbiased for LOC of that sum",
    off_policy="OLDPREF of that sum, exact below the cap",
    requires=parse("k2_as_loss+k2_as_loss,reference=teacher").requires,
    source="G-OPD, arXiv 2602.12125, with lambda = 1.25",
    test="test_a_sum_of_two_references_is_a_kl_to_their_geometric_mixture",
)
_SUM = KLType(
    name="k3_in_reward+k3_as_loss",
    formula=f"2 ({ESTIMATORS['k3'].formula})",
    coefficient="x (of one token)",
    target="FULL: grad KL(pi||ref) over whole answers",
    value_bias="twice KL(pi||ref): both terms count",
    gradient_bias="unbiased",
    off_policy="that of each term",
    requires=parse("k3_in_reward+k3_as_loss").requires,
    source="klplug: the two biases cancel",
    test="test_the_sum_of_two_wrongs_is_right",
)
_NONE = KLType(
    name="none",
    formula="0",
    coefficient="0",
    target="zero: no KL, no reference model",
    value_bias="none",
    gradient_bias="none",
    off_policy="zero",
    requires=(),
    source="",
    test="",
)

_MONITOR = replace(
    _NONE,
    name="monitor",
    target="zero: the reference model is loaded, and the KL to it is measured",
    value_bias="none; the metric klplug/kl has the KL",
    requires=parse("monitor").requires,
    test="test_monitor_measures_the_kl_and_moves_nothing",
)


_UNWEIGHED = "no weight: the mean over samples of old, biased from a rollout's second update on"
_BEFORE = "LOC with ratio=old, that of the tokens before"


def refined(spec: TermSpec, row: KLType) -> KLType:
    """``row`` with what the options of ``spec`` that its name does not write make of its words."""
    (own,) = parse(row.name).terms
    if spec.over_vocabulary:
        row = row if own.over_vocabulary else _summed(spec, row)
        if spec.ratio == "none" and spec.horizon == "sequence":
            row = replace(row, off_policy=_UNWEIGHED)
    elif spec.head != own.head:
        dropped = "without the tokens that PPO's clip drops"
        row = replace(row, off_policy=f"the same at the prefixes of old, {dropped}")
        if spec.horizon == "sequence":
            row = replace(row, off_policy=f"biased by the later tokens' ratios, and {dropped}")
    elif spec.ratio == "none" != own.ratio and spec.estimator != "k1":
        row = replace(row, off_policy=_UNWEIGHED)
    elif spec.level != own.level and spec.estimator != "k1":
        of = "weights of prefixes" if spec.level == "prefix" else "weight of the whole answer"
        row = replace(row, off_policy=f"the same ({of}), exact below the cap")
    if spec.ratio == "rollout" and own.ratio == "old" and not spec.over_vocabulary:
        at = row.off_policy.removeprefix("OLDPREF: ")
        row = replace(row, off_policy=at.replace("prefixes of old", "prefixes of the sampler"))
    if spec.cap == math.inf:
        row = replace(row, off_policy=row.off_policy.replace("exact below the cap", "exact"))
    if spec.reference != own.reference:
        row = _to_another(spec, row)
    if spec.bound != own.bound:
        row = replace(
            row,
            coefficient=f"{row.coefficient}, held between -{spec.bound:g} and {spec.bound:g}",
            gradient_bias=f"{row.gradient_bias}, where no bound acts",
        )
    if spec.reward_norm != own.reward_norm:
        row = replace(
            row,
            gradient_bias=f"{row.gradient_bias}, each prompt's over its rewards' deviation",
        )
    return replace(weighed(spec, row), requires=spec.requires, served=_served(spec))


def _served(spec: KLSpec) -> dict[str, str]:
    from klplug.hosting.host import hosts  # the floor above: it knows the hosts

    return {host.name: host.served(spec) for host in hosts().values()}


def _summed(spec: TermSpec, row: KLType) -> KLType:
    """The words of a sampled form for the same over the vocabulary."""
    value = "log pi - log ref" if spec.estimator == "k2" else row.formula
    of = "whole vocabulary" if spec.top is None else f"top {spec.top} tokens and all others as one"
    later = spec.horizon == "sequence"
    row = replace(
        row,
        formula=f"sum_v pi ({value}), over the {of}",
        coefficient="the exact values of all later tokens, beside the gradient of the own one"
        if later
        else "none: that sum is differentiated itself",
        value_bias="exact, never negative",
        gradient_bias=f"{row.gradient_bias}, without noise of the own token",
        off_policy="the same (weights of the tokens before, inside the sum), exact below the cap"
        if later
        else f"the same at the prefixes of old, without a ratio; {_BEFORE}",
        source="Rao-Blackwell form, arXiv 2504.10637",
        test="test_off_policy_the_exact_kl_needs_a_ratio_of_the_tokens_before_alone",
    )
    if spec.top is None:
        return row
    return replace(
        row,
        target=f"{row.target}, of K + 1 categories alone: a lower bound",
        value_bias="at most the whole divergence, never negative",
        gradient_bias="that of a lower bound: unbiased for it, without noise of the own token",
        test="test_the_top_tokens_have_the_gradient_of_their_categories",
    )


def _to_another(spec: TermSpec, row: KLType) -> KLType:
    """The words of a KL to the reference model for another reference."""

    def said(words: str) -> str:
        return re.sub(r"\bref\b", spec.reference, words)

    if row.target == "zero":
        return row
    at_rest = "; zero on-policy" if spec.reference in ("old", "rollout") else ""
    bias = said(row.gradient_bias.removeprefix("another divergence: "))
    return replace(
        row,
        formula=f"{said(row.formula)}, x to {spec.reference}",
        coefficient=f"{said(row.coefficient)}, x to {spec.reference}",
        target=f"{said(row.target)}{at_rest}",
        value_bias=said(row.value_bias),
        gradient_bias=f"another reference: {bias}",
    )


def weighed(spec: TermSpec, row: KLType) -> KLType:
    """``row``, which has no weight, with what that of ``spec`` makes of its target."""
    own = spec.weighting
    if own is None or row.target == "zero":
        return row
    return replace(
        row,
        target=f"{row.target}; each token's part of it times weight={own.written}",
        gradient_bias=f"biased for the whole KL, by what weight={own.written} takes away",
    )


def kl_types() -> dict[str, KLType]:
    """Every registered ``kl_type`` by name, with formula, target gradient, bias and source.

    Options that change whose gradient it is (``horizon=sequence``, ``head``, ``reference``) or what
    it is made of (``vocab``) have rows of their own, and the one useful sum; the others refine a
    row.
    """
    rows = [_row(f"{e}_{p}") for e in ESTIMATORS for p in PLACEMENTS]
    rows += [_over_answers(e) for e in ESTIMATORS.values() if e.sequence_target]
    rows += [_between_answers(e) for e in ESTIMATORS.values() if e.answer_target]
    rows += [_to_posterior(e) for e in ESTIMATORS.values() if e.sequence_target]
    rows += [
        *_HEADS,
        *_EXACT,
        _TOP,
        _SAMPLER,
        _SAMPLER_WITHOUT_RATIO,
        _OLD,
        _MIXTURE,
        _TEACHER,
        _TWO_MODELS,
        _SUM,
        _MONITOR,
        _NONE,
    ]
    return {row.name: replace(row, served=_served(parse(row.name))) for row in rows}
