"""What is said of a run that starts, in the same words at its launch and by its audit.

Sentences that hold on any host; a host's ``notes.py`` knows when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from klplug.controllers import AdaptiveKL
from klplug.hosting.settings import Asked, Said, Settings, number
from klplug.spec import TermSpec

STALE = (
    "Asynchronous rollouts come from a policy some updates old, and nothing weighs the KL for "
    "that. The ratio to old starts when the update does"
)


def weighs_the_sampler(term: TermSpec, bypass: bool) -> bool:
    """Whether samples are weighted from the sampler's own probabilities, for a term as loss.

    Args:
        bypass: whether old's log-probs are the sampler's.
    """
    ratio = _ratio(term)
    return term.placement == "as_loss" and (ratio == "rollout" or (bypass and ratio == "old"))


def _ratio(term: TermSpec) -> str | None:
    """The policy that its weight is to; a head has the ratio of the policy loss."""
    inside = term.placement == "as_loss" and term.head != "separate"
    return "old" if inside else term.ratio


def truncated(plan: Asked, how: str, bypass: str = "") -> Iterator[str]:
    """Why the sampler's log-probs are not those of a policy, whose sampling ``how`` cuts or bends.

    A sampler that keeps a share S of the mass gives log pi - log S: pi/rollout is S, and not 1.

    Args:
        bypass: the setting by which old's log-probs are the sampler's; empty where they are not.
    """
    for term in plan.spec.terms:
        if own := _cut(term.reference, how, bypass):
            yield (
                f"kl_type {term} with {own}: the sampler's log-probs are then of another "
                "distribution than the policy's. So this KL pulls where the two policies are one"
            )
        elif (own := _cut(_ratio(term), how, bypass)) and term.level in ("prefix", "sequence"):
            yield (
                f"kl_type {term} with {own}: the sampler's log-probs are then of another "
                "distribution than the policy's. A product of ratios to it fades with the "
                "answer's length"
            )


def _cut(policy: str | None, how: str, bypass: str) -> str:
    """What cuts a policy's log-probs; empty where they are whole."""
    if policy == "rollout":
        return how
    return f"{how} and {bypass}" if policy == "old" and bypass else ""


Cut = tuple[str, str] | None
"""The setting by which a sampler's log-probs are not the policy's, and it in words."""


# Rows of every host, once it says which settings of its own they are about.


def truncated_sampler(plan: Asked | None, found: Cut, sampled: Cut, bypass: str = "") -> Said:
    """Of weights per token, each of which is off by its own S, and no more; and of what is measured
    at the start of a step, where those are the policy's log-probs, or where it drives anything.

    Args:
        sampled: as ``found``, of the samples themselves, whatever their log-probs are.
        bypass: as in ``truncated``.
    """
    if plan is not None and plan.is_driven and sampled is not None and not bypass:
        key, how = sampled
        yield (
            key,
            f"kl_ctrl={plan.kl_ctrl} with {how}: what drives it is klplug/kl, a mean over the "
            "tokens that the sampler keeps. That is not the KL, and the less so the more is cut",
        )
    if plan is None or found is None:
        return
    key, how = found
    for term in plan.spec.terms:
        own = _cut(_ratio(term), how, bypass)
        per_token = term.level in (None, "token")
        if own and not _cut(term.reference, how, bypass) and per_token:
            yield (
                key,
                f"ratio={_ratio(term)} with {own}: the sampler's log-probs are then of another "
                "distribution than the policy's. So the weights are not 1 on its own samples "
                "(klplug/weight_mean)",
            )
    if bypass and plan.needs_reference:
        yield (
            key,
            f"{bypass} with {how}: the policy's log-probs at the start of a step are then the "
            "sampler's. A KL in the reward, klplug/kl_before_update and what drives a controller "
            "are taken from these. Where the sampler keeps the share S of the probability, that "
            "is k1 - log S",
        )


def divided_by_length(plan: Asked | None, setting: str, dividing: str) -> Said:
    """Of losses of whole answers.

    Args:
        setting: of the losses' aggregation.
        dividing: what divides them, in words; empty where nothing does.
    """
    if plan is None or not dividing:
        return
    if any(term.horizon != "token" for term in plan.as_loss.terms):
        yield (
            setting,
            f"{dividing} divides by the answer's length. The gradient of whole answers is exact "
            "for sums over tokens only. Here it is tilted to long answers",
        )


def one_update(plan: Asked | None, setting: str, updates: str) -> Said:
    """Of a KL to the policy that a step starts from, which is the policy itself until it moves.

    Args:
        setting: of the answers in an update.
        updates: what makes one update of a rollout at most, in words; else empty.
    """
    if plan is None or not updates:
        return
    update = plan.moving()
    for term in plan.as_loss.terms:
        resets = term.reference == "ref" and update is not None and update.keeps_nothing
        if (term.reference == "old" or resets) and term.estimator != "k1":  # whose c is 1
            by = f" by klplug.ref_update={plan.ref_update}" if resets else ""
            yield (
                setting,
                f"kl_type {term}: {updates} is one update of a rollout at most. The KL is to the "
                f"policy that this starts from{by}. So it is 0, and its gradient is rounding "
                "alone. Make more updates, or leave the term out",
            )


def stale_samples(plan: Asked, setting: str, in_policy_loss: bool, bypass: bool = False) -> Said:
    """Of asynchronous rollouts, which stored answers are none of.

    Args:
        setting: by which they are asynchronous.
        in_policy_loss: whether the host itself weighs its policy loss, with the KL that is in it.
        bypass: as in ``weighs_the_sampler``.
    """
    for term in plan.spec.terms if plan.source is None else ():
        inside = term.placement == "in_reward" or term.head == "combined"
        weighed = term.needs_no_weight or weighs_the_sampler(term, bypass)
        if not (in_policy_loss if inside else weighed):
            yield setting, STALE
            return


def whitened(plan: Asked | None, settings: Settings, setting: str, whitens: Sequence[str]) -> Said:
    """Of advantage estimators that divide by a standard deviation once the KL is in.

    Args:
        setting: of the advantage estimator.
        whitens: its values that do.
    """
    estimator = settings.get(setting)
    if plan is not None and plan.in_reward.terms and estimator in whitens:
        yield (
            setting,
            f"{estimator} whitens advantages after the KL has joined them. So its strength is "
            "kl_coef over their standard deviation in each batch",
        )


def discounted(
    plan: Asked | None, settings: Settings, gamma: str, estimator: str, discounts: Sequence[str]
) -> Said:
    """Of advantage estimators by which later rewards count less, a KL among them.

    Args:
        gamma: the setting of the discount.
        estimator: of the advantage estimator.
        discounts: its values that do.
    """
    if plan is None or not plan.in_reward.terms or settings.get(estimator) not in discounts:
        return
    if (factor := number(settings, gamma, 1)) != 1:
        yield (
            gamma,
            f"{settings.named(gamma)} is {factor:g}: a token answers for the KL of later tokens "
            "with a discount. So the gradient is that of no KL of whole answers",
        )


_REFERENCES = {
    "ref": "the reference model",
    "rollout": "the sampler",
    "old": "the policy at the start of the step",
    "teacher": "the teacher",
    "posterior": "the posterior",
}


def extrapolation(plan: Asked | None, setting: str) -> Said:
    """Of a term with a negative coefficient.

    ``a KL(pi||p) - b KL(pi||q)`` is the KL to ``(p^a / q^b)^(1/(a-b))``, times a - b: so it is held
    where a > b, and has no least value where a < b.

    Args:
        setting: of the kl_type.
    """
    terms = () if plan is None else plan.spec.terms
    away = [term for term in terms if term.factor < 0]
    if not away:
        return
    total = sum(term.factor for term in terms)
    held = (
        "extrapolation, for the positive ones outweigh it"
        if total > 0
        else f"and nothing holds it, for the coefficients sum to {total:g}"
    )
    yield (
        setting,
        f"The coefficient of {away[0]} is negative, which drives the policy away from "
        f"{_REFERENCES[away[0].reference]}: {held}",
    )


def short_horizon(plan: Asked, answers: int) -> Iterator[str]:
    """Of klplug's adaptive controller, ``exp(error n / horizon)`` with an error of 0.2 at most."""
    controller = plan.controller()
    if isinstance(controller, AdaptiveKL) and controller.horizon < answers:
        yield (
            f"kl_horizon is counted in answers, and {controller.horizon:g} is less than the "
            f"{answers} of a step. kl_coef can change by a factor of "
            f"e^{0.2 * answers / controller.horizon:.3g} in one"
        )


def negative_horizon(horizon: float, answers: int) -> str:
    """Of the hosts' own, ``1 + error * n / horizon``."""
    return (
        f"The horizon is counted in answers, and {horizon:g} is less than a fifth of the {answers} "
        "of a step. The controller multiplies by 1 - 0.2 n / horizon, so its coefficient turns "
        "negative"
    )
