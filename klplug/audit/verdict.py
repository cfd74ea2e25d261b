"""Whose gradient a run follows: from its terms and the table of kl_types, and nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import klplug
from klplug.audit.run import ADVANTAGE, COEF, Run, Term
from klplug.catalogue import KLType, refined, weighed
from klplug.spec import TermSpec, parse

REVERSE, FORWARD, ZERO, NEITHER, NONE = "reverse", "forward", "zero", "neither", "none"

# The table of kl_types says in words whose gradient a row follows; these two are a KL's own.
_OWN = re.compile(
    r"(?:FULL: |LOC: |LOC of the forward KL: )?grad KL\((pi\|\|ref|ref\|\|pi)\)"
    r" (?:of each token|over whole answers)"
)


@dataclass(frozen=True)
class Verdict:
    """What one term does.

    Attributes:
        kl_type: the equivalent ``kl_type``.
        gradient: ``reverse``, ``forward``, ``zero``, ``neither`` or ``none``.
        target: the same in words, from the table of kl_types.
        scope: ``token`` or ``sequence``; ``None`` where there is no gradient.
        corrected: samples of an older policy are weighted to the current one, or need no weight.
        ratio: by which ratio: to ``old``, to ``rollout``, ``gspo``'s, or ``none``.
        rollout_corrected: likewise from the rollout engine's own probabilities.
        beta: as written; ``None``, like the two below, where only a run could tell.
        beta_absolute: its factor in the update, in which the policy loss has factor 1.
        beta_relative: its factor against the raw reward.
        dead_zone: intervals of log(pi/ref) in which the gradient is zero.
    """

    kl_type: str
    gradient: str
    target: str
    scope: str | None
    corrected: bool
    ratio: str
    rollout_corrected: bool
    beta: float | None
    beta_absolute: float | str | None
    beta_relative: float | str | None
    dead_zone: tuple[tuple[float, float], ...]


def verdict(run: Run, term: Term) -> Verdict:
    """The verdict on one term of a run."""
    spec = term.spec
    assert spec is not None
    gradient, target = gradient_of(spec)
    if not term.as_loss and run.advantage.best_only:
        gradient, target = NEITHER, "the KL of the best answer of each group alone"
    if gradient in (REVERSE, FORWARD) and term.away:
        gradient, target = NEITHER, f"away from the reference: minus {target}"
    scaled = run.known(COEF, ADVANTAGE)
    own_token = spec.horizon == "token" or run.advantage.discount == 0
    return Verdict(
        kl_type=str(spec),
        gradient=gradient,
        target=target,
        scope="token" if own_token else "sequence",
        corrected=run.corrected(term),
        ratio=run.ratio_of(term),
        rollout_corrected=run.rollout_corrected(term),
        beta=term.written if run.known(COEF) else None,
        beta_absolute=run.absolute(term) if scaled else None,
        beta_relative=run.relative(term) if scaled else None,
        dead_zone=tuple(term.dead_zone()),
    )


def gradient_of(spec: TermSpec) -> tuple[str, str]:
    """The gradient of a single kl_type, and the words for it in the table of kl_types."""
    target = weighed(spec, _row(spec)).target
    # A trust region, whose direction is no regulariser's; or another model than ref.
    if spec.reference in ("old", "rollout", "teacher") and target != "zero":
        return NEITHER, re.sub(r"\bref\b", spec.reference, target)
    if spec.top is not None:
        return NEITHER, refined(spec, _row(spec)).target
    if spec.bound < math.inf and target != "zero":
        return NEITHER, f"{target}, whose c is held between -{spec.bound:g} and {spec.bound:g}"
    match = _OWN.match(target)
    if match is not None and spec.weight == "none":
        return (REVERSE if match[1] == "pi||ref" else FORWARD), target
    return (ZERO if target == "zero" else NEITHER), target


def _row(spec: TermSpec) -> KLType:
    """The row of the table with the most options of ``spec`` that change whose gradient it is."""
    rows = klplug.kl_types()
    plain = parse(f"{spec.estimator}_{spec.placement}")
    deciding = [o for o in ("reference", "head", "horizon") if getattr(spec, o) is not None]
    for kept in (deciding, deciding[:1], deciding[1:2], deciding[2:], []):
        options = {o: getattr(spec, o) for o in kept if getattr(spec, o) != getattr(plain, o)}
        name = ",".join([str(plain), *(f"{o}={v}" for o, v in options.items())])
        if name in rows:
            return rows[name]
    raise KeyError(name)


def together(verdicts: Sequence[Verdict]) -> str:
    """The gradient of all terms at once."""
    acting = [v for v in verdicts if v.gradient != ZERO]
    if not verdicts:
        return NONE
    if not acting:
        return ZERO
    if len({v.gradient for v in acting}) == 1 and acting[0].gradient != NEITHER:
        return acting[0].gradient
    names = {parse(v.kl_type).estimator for v in acting}
    placements = {parse(v.kl_type).placement for v in acting}
    if (
        len(acting) == 2
        and names == {"k3"}
        and placements == {"in_reward", "as_loss"}
        and acting[0].beta_absolute == acting[1].beta_absolute
        and isinstance(acting[0].beta_absolute, float)
    ):
        return REVERSE  # the two biases cancel
    return NEITHER


def equivalent(verdicts: Sequence[Verdict]) -> str | None:
    """The one kl_type for all terms; ``None`` where their coefficients differ."""
    if not verdicts:
        return "none"
    if len({v.beta for v in verdicts}) > 1:
        return None
    return "+".join(v.kl_type for v in verdicts)


def recommended(run: Run, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """What klplug would suggest for what this run seems to want, the best first.

    A host may not serve the best of them.
    """
    if not verdicts:
        return ("none",)
    terms = run.active
    # Somebody who names js or forward to klplug means it; k1, k3 and abs have findings.
    chosen = all(t.as_loss and t.estimator not in ("k1", "k3", "abs") for t in terms)
    if all(t.from_klplug for t in terms):
        own = "+".join(v.kl_type for v in verdicts)
        # Of a KL to another model there is none that comes near.
        if any(t.spec is not None and t.spec.reference == "teacher" for t in terms):
            return (own,)
        if chosen or together(verdicts) == REVERSE:
            return (own, "k2_as_loss")
    if any(term.as_loss for term in terms):
        return ("k2_as_loss",)
    return ("k1_in_reward", "k1_in_reward,reward_norm=group", "k2_as_loss")
