"""Why a run is not started, each reason once: what asks the rows of a host, and the rows of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from klplug.hosting.notes import Cut, truncated
from klplug.hosting.settings import Asked, Said, Settings, Unknown, number
from klplug.samples import weights_of
from klplug.stored import reasons


@dataclass(frozen=True)
class Refusal:
    """One reason why a run is not started, or what is said of one that is.

    Attributes:
        id: the row that says so.
        key: the setting that it is about; ``None`` for the ``kl_type`` itself.
        words: one line that names the setting, its value and what is allowed.
    """

    id: str
    key: str | None
    words: str


Row = Callable[[Any, Settings], Said]


def refusals(rows: Iterable[Row], plan: Asked | None, settings: Settings) -> Iterator[Refusal]:
    """All that is certain; a row yields the setting that it is about, and its words."""
    for row in rows:
        try:
            for key, words in row(plan, settings):
                yield Refusal(row.__name__, key, words)
        except Unknown:
            continue


# Rows of every host.


def two_baselines(plan: Asked, settings: Settings) -> Said:
    """A sample carries one."""
    count = sum(term.baseline != "none" for term in plan.as_loss.terms)
    if count > 1:
        yield (
            None,
            f"kl_type {plan.spec}: one term as loss may have a baseline, not {count}. Leave it out "
            "of the others",
        )


def two_divergences_over_the_vocabulary(plan: Asked, settings: Settings) -> Said:
    """One pass makes one."""
    terms = (term for term in plan.spec.terms if term.over_vocabulary)
    count = len({(term.estimator, term.alpha, term.vocab) for term in terms})
    if count > 1:
        yield (
            None,
            f"kl_type {plan.spec}: {count} divergences over the vocabulary are refused: a run has "
            "one. Use vocab=sample for the others",
        )


def baseline_of_nothing(plan: Asked, settings: Settings) -> Said:
    compared = (term.reference for term in plan.spec.terms if term.baseline != "none")
    reference = next((name for name in compared if name not in ("ref", "teacher")), None)
    if reference is not None:
        yield (
            None,
            f"kl_type {plan.spec}: baseline with reference={reference} is refused: a baseline is "
            "of a KL to ref or to a teacher alone. It is measured at the start of a step. Leave "
            "it out",
        )


def controller_of_nothing(plan: Asked, settings: Settings) -> Said:
    if plan.source is not None:
        return  # said of the source
    if plan.spec.terms and not plan.needs_reference and plan.is_driven:
        key = "klplug.kl_ctrl"
        yield (
            key,
            f"kl_type {plan.spec}: {settings.named(key)} is {plan.kl_ctrl}, and it is fed the KL "
            "to the reference model, which there is none of. Leave it out, or use reference=ref",
        )


def path_of_nothing(plan: Asked, settings: Settings) -> Said:
    """As of a shell variable that is not set."""
    for name in ("ref_model", "teacher", "source"):
        value = getattr(plan, name)
        if value is not None and not value.strip():
            key = f"klplug.{name}"
            yield key, f"{settings.named(key)} is empty: write a path, or leave it out"


def reference_of_nothing(plan: Asked, settings: Settings) -> Said:
    """A model that nothing compares with would not even be loaded."""
    if plan.ref_model is not None and plan.source is None and not plan.needs_reference:
        key = "klplug.ref_model"
        yield (
            key,
            f"{settings.named(key)} is {plan.ref_model}, and kl_type {plan.spec} has no KL to a "
            "reference model, so none is loaded. Leave it out, or use reference=ref",
        )


def update_of_nothing(plan: Asked, settings: Settings) -> Said:
    """What is not loaded can't follow."""
    if plan.ref_update is not None and plan.source is None and not plan.needs_reference:
        key = "klplug.ref_update"
        yield (
            key,
            f"{settings.named(key)} is {plan.ref_update}, and kl_type {plan.spec} has no KL to a "
            "reference model, so there is none to move. Leave it out, or use reference=ref",
        )


def update_to_nothing(plan: Asked, settings: Settings) -> Said:
    """Where the reference is the policy that a step starts from, what is measured there is 0."""
    update = plan.moving()
    if update is None or not update.keeps_nothing:
        return
    said = (
        f"kl_type {plan.spec}: {settings.named('klplug.ref_update')} is {plan.ref_update}. So from "
        "the second step on the reference is the policy that the step starts from"
    )
    if any(term.reference == "ref" for term in plan.in_reward.terms):
        yield (
            "klplug.ref_update",
            f"{said}. A KL in the reward is measured there, and is 0. Reset less often, or use "
            "'k2_as_loss'",
        )
    if plan.needs_reference and plan.is_driven:
        key = "klplug.kl_ctrl"
        yield (
            key,
            f"{said}. {settings.named(key)} is {plan.kl_ctrl}, and is fed the KL there, "
            "which is 0. Reset less often, or leave it out",
        )


def source_of_another_kind(plan: Asked, settings: Settings) -> Said:
    """What acts on the reference's own answers, which no policy of the run gave."""
    if plan.source is None:
        return
    key = "klplug.source"
    said = f"{settings.named(key)} is {plan.source}"
    for reason in reasons(plan.spec):
        yield key, f"kl_type {plan.spec}: {said}, the reference's own answers, and {reason}"
    if plan.is_driven:
        yield (
            "klplug.kl_ctrl",
            f"{said}, and {settings.named('klplug.kl_ctrl')} is {plan.kl_ctrl}: it is fed the KL "
            "of the policy's own answers, which nothing measures there. Use linear or cosine, or "
            "leave it out",
        )
    for other, value in (("ref_model", plan.ref_model), ("ref_update", plan.ref_update)):
        if value is not None:
            name = settings.named(f"klplug.{other}")
            yield (
                f"klplug.{other}",
                f"{said}, and {name} is {value}: no reference model is loaded beside its stored "
                "answers. Leave one out",
            )


def teacher_without_a_name(plan: Asked, settings: Settings) -> Said:
    if plan.needs_teacher and plan.teacher is None:
        key = "klplug.teacher"
        yield (
            key,
            f"kl_type {plan.spec}: reference=teacher needs {settings.named(key)}, the path of a "
            "second frozen model",
        )


def teacher_of_nothing(plan: Asked, settings: Settings) -> Said:
    """A model that nothing compares with would not even be loaded."""
    if plan.teacher is not None and not plan.needs_teacher:
        key = "klplug.teacher"
        yield (
            key,
            f"{settings.named(key)} is {plan.teacher}, and kl_type {plan.spec} has no term with "
            "reference=teacher, so none is loaded. Leave it out, or add such a term",
        )


def teacher_alone(plan: Asked, settings: Settings) -> Said:
    """It is loaded beside the reference model, and one of them is enough."""
    if plan.needs_teacher and not plan.needs_reference:
        key = "klplug.teacher"
        yield (
            key,
            f"kl_type {plan.spec} has no KL to the reference model beside that to the teacher. "
            f"Name the teacher as {settings.named('klplug.ref_model')} and leave reference=teacher "
            "out: that is the same KL with one model less",
        )


def posterior_without_a_coefficient(plan: Asked, settings: Settings) -> Said:
    """A schedule may end at 0, and there is no exp(r/0)."""
    if plan.spec.has_the_reward and plan.kl_end == 0:
        key = "klplug.kl_end"
        yield (
            key,
            f"kl_type {plan.spec}: {settings.named(key)} is 0, and reference=posterior is "
            "ref exp(r/kl_coef)/Z, which has no value there. End above 0",
        )


# Rows of every host, once it says which settings of its own they are about.


def no_other_answers(plan: Asked, settings: Settings, samples: str, prompts: str) -> Said:
    """A baseline is a mean of the other answers: of a prompt, or of all that are sampled at once.

    Args:
        samples: the setting of the answers to each prompt.
        prompts: the setting of the prompts that are answered at once.
    """
    baselines = {term.baseline for term in plan.spec.terms} - {"none"}
    if not baselines:
        return
    n = int(number(settings, samples, 1))
    baseline = "group" if "group" in baselines else "batch"
    answers = n if baseline == "group" else n * int(number(settings, prompts, 2))
    if answers < 2:
        yield (
            samples,
            f"kl_type {plan.spec}: {settings.named(samples)} is {n}, so baseline={baseline} "
            "has no other answers to compare with. Sample at least 2, or use baseline=none",
        )


def weight_of_no_group(plan: Asked, settings: Settings, samples: str) -> Said:
    """A weight that compares the answers to one prompt, where there is one.

    Args:
        samples: the setting of the answers to each prompt.
    """
    n = int(number(settings, samples, 1))
    for own in weights_of(plan.spec, "group_ids"):
        if n < 2:
            yield (
                samples,
                f"kl_type {plan.spec}: {settings.named(samples)} is {n}, so weight={own.written} "
                "has no other answers to compare with. Sample at least 2, or leave weight out",
            )


def posterior_of_no_group(plan: Asked, settings: Settings, samples: str) -> Said:
    """Z of a prompt is estimated from the other answers to it.

    Args:
        samples: the setting of the answers to each prompt.
    """
    if not plan.spec.has_the_reward:
        return
    n = int(number(settings, samples, 1))
    if n < 2:
        yield (
            samples,
            f"kl_type {plan.spec}: {settings.named(samples)} is {n}, so reference=posterior has no "
            "other answers to estimate Z from. Sample at least 2, or use 'k1_in_reward'",
        )


def posterior_beside_another_loss(plan: Asked, settings: Settings, loss: str, ppo: str) -> Said:
    """With advantages of 0 PPO's policy loss is 0; of another one klplug doesn't know that.

    Args:
        loss: the setting of the policy loss.
        ppo: its value for PPO's.
    """
    if not plan.spec.has_the_reward:
        return
    value = str(settings.get(loss, ppo))
    if value != ppo:
        yield (
            loss,
            f"kl_type {plan.spec}: {settings.named(loss)} is {value}, and reference=posterior has "
            f"no policy loss beside it, which is so where that is PPO's. Use {ppo}",
        )


def head_of_another_loss(plan: Asked, settings: Settings, loss: str, ppo: str) -> Said:
    """A head is inside the policy loss, and there is that of PPO only.

    Args:
        loss: the setting of the policy loss.
        ppo: its value for PPO's.
    """
    head = next((term.head for term in plan.as_loss.terms if term.head != "separate"), None)
    if head is None:
        return
    value = str(settings.get(loss, ppo))
    if value != ppo:
        yield (
            loss,
            f"kl_type {plan.spec}: {settings.named(loss)} is {value}, and head={head} has the "
            f"ratio and the clip of PPO's policy loss, one per token. Use {ppo}, or head=separate",
        )


def truncated_sampler(plan: Asked, found: Cut, bypass: str = "") -> Said:
    """A KL to a sampler, or a product of ratios to it, where sampling is cut or bent.

    Args:
        bypass: the setting by which old's log-probs are the sampler's; empty where they are not.
    """
    if found is None:
        return
    key, how = found
    instead = f"leave {bypass} out, with" if bypass else "use"
    for words in truncated(plan, how, bypass):
        yield (
            key,
            f"{words}. Sample from the whole distribution, or {instead} ratio=old and "
            "reference=ref",
        )
