"""What a host's settings come down to: the KL terms of a run and what surrounds them.

The gradient follows from here on without a word about hosts; each host's ``reading`` fills it in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

from klplug.audit.settings import Rejected, Setting
from klplug.audit.shell import Broken, Cut, Word
from klplug.spec import TermSpec

# What a setting bears on. An unknown one makes everything unknown that needs its aspect.
KL = "kl"  # which terms there are, and their estimators
COEF = "coef"
UPDATES = "updates"
ADVANTAGE = "advantage"
GROUP = "group"
POLICY_LOSS = "policy_loss"
CORRECTION = "correction"
CONTROLLER = "controller"


@dataclass(frozen=True)
class Scale:
    """A factor of the host's advantages: ((N-1)/N)^mean sigma^std sigma_batch^batch alpha^alpha.

    sigma is the standard deviation of the rewards of a group, sigma_batch that of the advantages
    of a batch; ``mean=1`` is what subtracting a mean that includes the answer itself costs.
    alpha is how many answers a batch has for each whose reward is not 0.
    """

    mean: int = 0
    std: int = 0
    batch: int = 0
    alpha: int = 0

    def __mul__(self, other: Scale) -> Scale:
        return Scale(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __truediv__(self, other: Scale) -> Scale:
        return Scale(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def of(self, beta: float, n: int | None) -> float | str:
        """``beta`` times this factor: a number, or a formula in what only the run knows."""
        number = beta
        parts: list[str] = []
        over: list[str] = []
        if self.mean and n is None:
            parts.append("(N-1)/N" if self.mean > 0 else "N/(N-1)")
        elif self.mean and n is not None and n > 1:
            number *= ((n - 1) / n) ** self.mean
        powers = (("sigma", self.std), ("sigma_batch", self.batch), ("alpha", self.alpha))
        for name, power in powers:
            if power:
                (parts if power > 0 else over).append(name)
        if not parts and not over:
            return number
        return " * ".join([f"{number:.6g}", *parts]) + "".join(f" / {name}" for name in over)


NO_SCALE = Scale()
NO_SETTING = Setting("", None)


@dataclass(frozen=True)
class Term:
    """One KL term as the host has it.

    Attributes:
        spec: the kl_type with the same gradient; ``None`` where the host has no such estimator.
        coef: beta as written, times the term's own factor in a kl_type.
        where: the setting that turns the term on.
        kind: the setting that names its estimator.
        amount: the setting that holds beta.
        straight_through: the value of one estimator with the gradient of k2.
        clamped: the host clamps the value at 10.
        dropped: why the host never applies the term; empty where it does.
        joins_after: in the reward, joined after everything the host does to it.
        without_baseline: in the reward, joined after the baseline of the group and with none.
        from_klplug: a kl_type, not a stock estimator.
        subtracted: the host takes the loss away from the policy's, in the place of adding it.
    """

    spec: TermSpec | None
    coef: float
    where: Setting
    kind: Setting
    amount: Setting
    straight_through: bool = False
    clamped: bool = False
    dropped: str = ""
    joins_after: bool = False
    without_baseline: bool = False
    from_klplug: bool = False
    subtracted: bool = False

    @property
    def written(self) -> float:
        """beta beside the kl_type, which says the factor itself."""
        return self.coef / self.spec.factor if self.spec is not None else self.coef

    @property
    def away(self) -> bool:
        """It pays for leaving the reference."""
        return self.coef < 0 or self.subtracted

    @property
    def reaches(self) -> bool:
        return not self.dropped

    @property
    def as_loss(self) -> bool:
        return self.spec is not None and self.spec.placement == "as_loss"

    @property
    def estimator(self) -> str | None:
        return None if self.spec is None else self.spec.estimator

    def dead_zone(self) -> list[tuple[float, float]]:
        """Log-ratios at which the clamped value has gradient zero; as a loss only."""
        if not self.as_loss or not self.clamped:
            return []
        assert self.spec is not None
        return dead_zone(str(self.spec.estimator))


# The clamp that hosts have on the value of an estimator.
CLAMP = 10.0


def dead_zone(estimator: str) -> list[tuple[float, float]]:
    """Where the gradient of ``clamp(value, -10, 10)`` vanishes, in log(pi/ref), nats."""
    if estimator in ("k1", "abs"):
        return [(-math.inf, -CLAMP), (CLAMP, math.inf)]
    if estimator == "k2":
        edge = math.sqrt(2 * CLAMP)
        return [(-math.inf, -edge), (edge, math.inf)]
    if estimator == "k3":
        # k3(x) = exp(-x) - 1 + x grows away from 0 on both sides.
        return [(-math.inf, _root(-CLAMP, 0.0)), (_root(2 * CLAMP, 0.0), math.inf)]
    return []


def _root(outside: float, inside: float) -> float:
    """The log-ratio between the two at which k3 reaches the clamp, by bisection."""
    for _ in range(200):
        middle = (outside + inside) / 2
        if math.exp(-middle) - 1 + middle > CLAMP:
            outside = middle
        else:
            inside = middle
    return inside


@dataclass(frozen=True)
class Advantage:
    """How the host turns rewards into advantages.

    Attributes:
        setting: the setting that names the estimator.
        before: factor on the reward before a KL joins it.
        after: factor on reward and KL together.
        groups: it compares the answers of one prompt.
        takes_one: it goes on where a prompt has one answer.
        mean_with_self: the group's mean includes the answer itself.
        discount: gamma, where it discounts a KL in the reward; else 1.
        whitens: it divides by the batch's standard deviation after a KL has joined.
        best_only: only the best answer of a group has an advantage.
    """

    setting: Setting
    before: Scale = NO_SCALE
    after: Scale = NO_SCALE
    groups: bool = False
    takes_one: bool = False
    discount: float = 1.0
    discount_setting: Setting | None = None
    whitens: bool = False
    best_only: bool = False


@dataclass(frozen=True)
class Controller:
    """The adaptive controller of beta, where one is asked for."""

    setting: Setting
    target: Setting
    drives: bool  # it changes a coefficient that is in use
    fed: str  # the value it is fed
    right: bool  # that value estimates KL(pi||ref)
    kept: bool = False  # checkpoints have the coefficient
    only: str = ""  # where it drives nothing: what it would drive


@dataclass(frozen=True)
class Run:
    """One run, as far as its KL goes.

    Attributes:
        host, version, version_from: ``installed``, ``given`` or ``guessed``.
        terms: the KL terms in force, coefficient zero included.
        n: answers per prompt.
        updates: optimizer steps per rollout.
        updates_settings: those that make it more than one.
        ratio: what the policy loss corrects samples by: ``token``, ``gspo`` or ``none``.
        policy_by_answer, kl_by_answer: the loss is a mean of answers' means.
        loss_agg: the setting that says how losses are aggregated.
        corrects_rollout: a weight for the sampler's mismatch is on the policy loss.
        rollout_is_old: the ratio is to the sampler itself.
        stale: rollouts come from a policy some updates old.
        notes: what its trainer does otherwise than the host's usual one, a sentence each.
        beside: the folder of the host's package that lies beside the script; empty for a release.
        unread_package: why that package was not read, and a release is taken in its place.
        served: klplug has hooks for this trainer and release.
        nearest: where it has none, what the host itself has that comes near, a label and settings.
        unknown: aspects that hang on something only a run could tell, with the reasons.
    """

    host: str
    version: str
    version_from: str
    advantage: Advantage
    terms: tuple[Term, ...] = ()
    n: int | None = 1
    n_setting: Setting = NO_SETTING
    updates: float = 1.0
    updates_settings: tuple[Setting, ...] = ()
    ratio: str = "token"
    policy_loss: Setting = NO_SETTING
    policy_by_answer: bool = False
    kl_by_answer: bool = False
    loss_agg: Setting = NO_SETTING
    corrects_rollout: bool = False
    correction: Setting = NO_SETTING
    rollout_is_old: bool = False
    stale: Setting | None = None
    controller: Controller | None = None
    idle: tuple[Setting, ...] = ()  # KL settings that nothing reads, another KL being meant
    not_enabled: tuple[Setting, ...] = ()  # those of a KL that nobody switched on or off
    not_loaded: Setting | None = None  # KL asked for, with a coefficient of zero
    not_hooked: tuple[str, Setting] | None = None  # a kl_type, and why klplug is not loaded
    no_effect: tuple[tuple[Setting, str], ...] = ()
    rejected: tuple[Rejected, ...] = ()
    refused: tuple[Rejected, ...] = ()  # what klplug would say in place of starting
    noted: tuple[tuple[str, Rejected], ...] = ()  # what is said of a run that starts, by row
    notes: tuple[tuple[str, Setting], ...] = ()
    nobodys: tuple[tuple[str, Setting], ...] = ()  # settings that no known release has
    beside: str = ""
    unread_package: str = ""
    served: bool = True
    nearest: tuple[tuple[str, str], ...] = ()
    cut: Cut | None = None
    broken: Broken | None = None
    unread: tuple[Setting, ...] = ()  # config files that could not be read
    unknown: dict[str, tuple[tuple[Setting, str], ...]] = field(default_factory=dict)
    commands: int = 1
    line: int | None = None
    sourced: tuple[int, ...] = ()
    unreached: tuple[Word, ...] = ()

    def known(self, *aspects: str) -> bool:
        return not any(aspect in self.unknown for aspect in aspects)

    @property
    def active(self) -> Sequence[Term]:
        """Terms with a coefficient and an estimator that reach the gradient."""
        return [t for t in self.terms if t.coef != 0 and t.spec is not None and t.reaches]

    def ratio_of(self, term: Term) -> str:
        """The importance weight on this term: ``none``, ``gspo``, or the policy it is to."""
        assert term.spec is not None
        if term.spec.head in ("combined", "clipped"):
            ratio = "old"
        elif term.as_loss:
            ratio = str(term.spec.ratio)
        else:
            ratio = "old" if self.ratio == "token" else self.ratio
        return "rollout" if ratio == "old" and self.rollout_is_old else ratio

    def corrected(self, term: Term) -> bool:
        """Samples of an older policy are weighted to the current one, or need no weight."""
        assert term.spec is not None
        return term.spec.needs_no_weight or self.ratio_of(term) in ("old", "rollout")

    def rollout_corrected(self, term: Term) -> bool:
        """Samples are weighted from the rollout engine's own probabilities, or need no weight."""
        assert term.spec is not None
        if term.as_loss and term.spec.head != "combined":
            return term.spec.needs_no_weight or self.ratio_of(term) == "rollout"
        return self.corrects_rollout or self.rollout_is_old

    def absolute(self, term: Term) -> float | str:
        """The factor on the KL's gradient, as the policy loss has factor 1."""
        if term.as_loss or term.joins_after:
            return term.coef
        return self.advantage.after.of(term.coef, self.n)

    def relative(self, term: Term) -> float | str:
        """beta against the raw reward: the one of ref exp(r/beta)/Z."""
        scale = self.advantage
        if term.spec is not None and term.spec.has_the_reward:
            return term.coef
        if term.as_loss or term.joins_after:
            return (NO_SCALE / (scale.before * scale.after)).of(term.coef, self.n)
        return (NO_SCALE / scale.before).of(term.coef, self.n)
