"""reference=teacher: a second frozen model in the reference's actors, and its log-probs from there.

It is loaded by the actors' own code, with the reference's settings, once the reference is there. Of
each micro-batch it answers after the reference, and its log-probs travel as sample weights do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug_openrlhf.plan import Plan

LOG_PROBS = "teacher_log_probs"
INFO = "klplug/teacher_log_probs"


@dataclass(frozen=True)
class Taught:
    """What the reference's actor returns of a micro-batch, and the teacher's log-probs beside."""

    reference: Any
    log_probs: Tensor


# ── The reference's actor ───────────────────────────────────────────────────────────────────────


def load(actor: Any, path: str) -> None:
    """Build the teacher as the reference was built, in the processes that are connected already."""
    reference = actor.model
    actor._setup_distributed = lambda strategy: None
    try:
        actor.init_model_from_pretrained(actor.strategy, path)
        actor.klplug_teacher = actor.model
    finally:
        del actor._setup_distributed
        actor.model = reference


def beside(results: Any, original: Call, actor: Any, args: Args, kwargs: Kwargs) -> Any:
    """What an actor answered; the reference's with the teacher's log-probs of the same tokens."""
    method = bound(original, args, kwargs)["method_name"]
    if method != "forward" or not hasattr(actor, "klplug_teacher"):
        return results
    reference, actor.model = actor.model, actor.klplug_teacher
    try:
        log_probs = original(*args, **kwargs)
    finally:
        actor.model = reference
    return [Taught(*pair) for pair in zip(results, log_probs, strict=True)]


# ── The trainer ─────────────────────────────────────────────────────────────────────────────────


def flattened(maker: Any, results: list[Any]) -> list[Any]:
    """What the reference answered; the teacher's log-probs are kept for the experience."""
    if not any(isinstance(result, Taught) for result in results):
        return results
    maker.klplug_taught = [taught.log_probs for taught in results]
    return [taught.reference for taught in results]


def attach(plan: Plan, maker: Any, experiences: list[Any]) -> None:
    """The teacher's log-probs into the experience, until they travel with the answers."""
    if not plan.needs_teacher:
        return
    log_probs = vars(maker).pop("klplug_taught", None)
    if log_probs is None:
        raise RuntimeError(
            f"kl_type {plan.spec}: the reference's actors sent no log-probs of a teacher: is "
            "klplug active in their processes?"
        )
    for experience, own in zip(experiences, log_probs, strict=True):
        experience.info[INFO] = own


def of(experience: Any) -> Tensor | None:
    """The teacher's log-probs, (B, A); ``None`` where there is no teacher."""
    found: Tensor | None = experience.info.get(INFO)
    return found
