"""What can be wrong with the KL of a run: one rule per finding, each with a page in the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from klplug.audit import setup as aspects
from klplug.audit.settings import Setting
from klplug.audit.setup import Setup, Term
from klplug.audit.verdict import NEITHER, REVERSE, Verdict

INFO, WARNING, ERROR = SEVERITIES = ("info", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One row of a report.

    Attributes:
        id: stable name, and the name of its page.
        severity: ``info``, ``warning`` or ``error``.
        message: one sentence.
        setting: ``key=value`` that it comes from; ``None`` where it is no single one.
        line: line of the script; ``None`` for a default or a command line.
        default: nobody wrote the setting.
        docs: the page that derives it.
    """

    id: str
    severity: str
    message: str
    setting: str | None
    line: int | None
    default: bool
    docs: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Hit = tuple[str, Setting | None]
Check = Callable[[Setup, Sequence[Verdict]], Iterator[Hit]]


@dataclass(frozen=True)
class Rule:
    """One finding: when it holds, and what must be known to say so."""

    id: str
    severity: str
    title: str
    needs: tuple[str, ...]
    check: Check

    @property
    def docs(self) -> str:
        return f"docs/findings/{self.id}.md"


RULES: dict[str, Rule] = {}


def rule(id: str, severity: str, title: str, *needs: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        RULES[id] = Rule(id, severity, title, needs, check)
        return check

    return register


def findings(setup: Setup, verdicts: Sequence[Verdict]) -> tuple[Finding, ...]:
    """Every finding of a run, the gravest first."""
    found = [
        Finding(
            id=row.id,
            severity=row.severity,
            message=message,
            setting=None if setting is None or not setting.key else str(setting),
            line=None if setting is None else setting.line,
            default=setting is not None and bool(setting.key) and not setting.written,
            docs=row.docs,
        )
        for row in RULES.values()
        if setup.known(*row.needs)
        for message, setting in row.check(setup, verdicts)
    ]
    return tuple(sorted(found, key=lambda f: -SEVERITIES.index(f.severity)))


def _losses(setup: Setup, *estimators: str) -> Iterator[Term]:
    return (t for t in setup.active if t.as_loss and (not estimators or t.estimator in estimators))


def _rewards(setup: Setup, *estimators: str) -> Iterator[Term]:
    return (
        t for t in setup.active if not t.as_loss and (not estimators or t.estimator in estimators)
    )


def _off_policy(setup: Setup) -> bool:
    return setup.updates > 1


# The command itself.


@rule("command-cut", ERROR, "A broken line continuation drops settings")
def _command_cut(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    cut = setup.cut
    if cut is not None:
        count = len(cut.lost)
        yield (
            f"The command ends on line {cut.line}: {cut.reason}, so {count} "
            f"setting{'s' if count > 1 else ''} below never reach the host "
            f"(from line {cut.lost[0].line} on).",
            Setting(*_split(cut.lost[0].text), cut.lost[0].line, True),
        )


def _split(text: str) -> tuple[str, str]:
    key, _, value = text.lstrip("-+").replace(" ", "=", 1).partition("=")
    return key, value


@rule("rejected-setting", WARNING, "The host would refuse a setting")
def _rejected(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for rejected in setup.rejected:
        yield f"The host would stop here: {rejected.reason}.", rejected.setting


@rule("unknown-value", WARNING, "A value that only a run can tell")
def _unknown_value(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    seen = set()
    for reasons in setup.unknown.values():
        for setting, reason in reasons:
            if setting.key not in seen:
                seen.add(setting.key)
                yield f"The verdict depends on a value that is not known: {reason}.", setting


@rule("sourced-script", INFO, "Another script is read first")
def _sourced(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for line in setup.sourced:
        yield (
            "Another script is read here, and variables that it sets are not seen.",
            Setting("", None, line),
        )


@rule("config-not-read", WARNING, "A config file that could not be read")
def _config_not_read(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for setting in setup.unread:
        yield (
            "This config file was not found, so verl's defaults stand in for what it says.",
            setting,
        )


# Whose gradient.


@rule("k1-as-loss", ERROR, "k1 as a loss is no regulariser", aspects.KL)
def _k1_as_loss(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in _losses(setup, "k1"):
        message = (
            "k1 as a loss does not hold the policy near the reference: the reference drops out of "
            "its gradient, which averages to zero"
        )
        if _off_policy(setup) and not setup.corrected(term):
            message += ", and on reused samples pushes away from the policy that made them"
        yield message + ".", term.kind


@rule("k3-in-reward", ERROR, "k3 in the reward is next to nothing", aspects.KL)
def _k3_in_reward(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if any(term.estimator == "k3" for term in _losses(setup)) and any(
        v.gradient != REVERSE for v in verdicts
    ):
        from klplug.audit.verdict import together

        if together(verdicts) == REVERSE:
            return
    for term in _rewards(setup, "k3"):
        yield (
            "k3 in the reward has the gradient of the reverse KL minus that of the forward KL: "
            "near the reference the two cancel, and answers below it are pushed further down.",
            term.kind,
        )


@rule("k2-in-reward", ERROR, "k2 in the reward pulls the wrong way", aspects.KL)
def _k2_in_reward(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in _rewards(setup, "k2"):
        yield (
            "k2 in the reward penalises answers for being far from the reference on either side, "
            "so those it made too rare become rarer still.",
            term.kind,
        )


@rule("abs-in-reward", ERROR, "abs in the reward pulls the wrong way", aspects.KL)
def _abs_in_reward(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in _rewards(setup, "abs"):
        yield (
            "abs in the reward penalises answers that are too rare as much as those that are too "
            "frequent, so the rare ones become rarer still.",
            term.kind,
        )


@rule("forward-kl", WARNING, "k3 as a loss follows the forward KL", aspects.KL)
def _forward_kl(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if any(term.estimator == "k3" for term in _rewards(setup)):
        return  # two terms: their sum has its own finding
    for term in _losses(setup, "k3"):
        yield (
            "k3 as a loss follows the forward KL, KL(ref||pi), not KL(pi||ref): alike near the "
            "reference, but its pull fades to a constant on tokens above it and explodes on "
            "tokens below it.",
            term.kind,
        )


@rule("abs-as-loss", WARNING, "abs as a loss is twice the total variation", aspects.KL)
def _abs_as_loss(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in _losses(setup, "abs"):
        yield (
            "abs as a loss follows twice the total variation: the same pull on every token, "
            "however near the reference it is.",
            term.kind,
        )


@rule("own-token", INFO, "Each token's own KL: a myopic optimum", aspects.KL)
def _own_token(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term, v in zip(setup.active, verdicts, strict=True):
        if v.scope == "token" and v.gradient == REVERSE and term.as_loss:
            yield (
                "A KL as a loss counts each token's own KL and not what a token does to the KL of "
                "later ones, so on long answers its optimum is a myopic policy.",
                term.kind,
            )


@rule(
    "passk-in-reward",
    WARNING,
    "Pass@k drops the KL of all answers but one",
    aspects.KL,
    aspects.ADVANTAGE,
)
def _passk(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if setup.advantage.best_only and any(True for _ in _rewards(setup)):
        yield (
            "With grpo_passk only the best answer of a group has an advantage, so a KL in the "
            "reward reaches none of the others.",
            setup.advantage.setting,
        )


@rule(
    "never-reaches",
    ERROR,
    "A KL in the reward that the advantages never see",
    aspects.KL,
    aspects.ADVANTAGE,
)
def _never_reaches(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in setup.terms:
        if not term.reaches:
            yield (
                "gdpo makes advantages of the rewards under gdpo_reward_keys, not of the reward "
                "that the KL is subtracted from: the KL is computed, logged, and dropped.",
                term.where,
            )


# Whether there is a KL at all.


@rule("no-kl", INFO, "No KL to a reference", aspects.KL, aspects.COEF)
def _no_kl(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if not setup.terms and not setup.not_enabled and setup.not_loaded is None:
        yield "No KL to a reference: nothing but the clip holds the policy back.", None


@rule("kl-not-enabled", WARNING, "A KL is configured and never switched on", aspects.KL)
def _not_enabled(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if setup.not_enabled:
        yield (
            "This setting has no effect: neither use_kl_loss nor use_kl_in_reward is on, so the "
            "run has no KL at all.",
            setup.not_enabled[0],
        )


@rule("klplug-not-loaded", WARNING, "Nothing loads klplug in this release of verl", aspects.KL)
def _not_hooked(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if setup.not_hooked is not None:
        yield (
            f"verl {setup.version} knows no plugins, and nothing here sets "
            "VERL_USE_EXTERNAL_MODULES=klplug_verl in the environment: without it klplug does not "
            "run.",
            setup.not_hooked,
        )


@rule("setting-ignored", INFO, "A KL setting that nothing reads", aspects.KL)
def _ignored(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for setting in setup.idle:
        if setup.controller is not None and setting.key == setup.controller.setting.key:
            continue  # adaptive-ignored says it
        yield "This setting belongs to a KL that is switched off, and has no effect.", setting


@rule(
    "zero-coefficient", WARNING, "A KL is switched on with coefficient 0", aspects.KL, aspects.COEF
)
def _zero_coefficient(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in setup.terms:
        if term.coef == 0 and not term.from_klplug:
            yield (
                "The KL is on with coefficient 0: the reference model is loaded and run for "
                "nothing but a log line.",
                term.amount,
            )
    if setup.not_loaded is not None:
        yield (
            "With coefficient 0 the reference model is never loaded, and the other KL flags do "
            "nothing.",
            setup.not_loaded,
        )


@rule("negative-coefficient", ERROR, "A coefficient below zero", aspects.KL, aspects.COEF)
def _negative(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in setup.terms:
        if term.coef < 0:
            yield "A negative coefficient rewards distance from the reference.", term.amount


@rule("no-effect", WARNING, "A KL flag that does nothing where it stands", aspects.KL)
def _no_effect(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for setting, reason in setup.no_effect:
        yield f"This has no effect: {reason}.", setting


@rule("double-kl", WARNING, "Two KL terms at once", aspects.KL)
def _double_kl(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    terms = setup.active
    if len(terms) > 1 and not all(term.from_klplug for term in terms):
        yield (
            "The KL is counted twice, once in the reward and once as a loss, with two coefficients "
            "of different force.",
            terms[-1].where,
        )


# Off-policy.


@rule(
    "off-policy-uncorrected",
    WARNING,
    "Reused samples, and no weight on the KL",
    aspects.KL,
    aspects.UPDATES,
    aspects.POLICY_LOSS,
)
def _off_policy_uncorrected(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if not _off_policy(setup):
        return
    for term in _losses(setup):
        if not setup.corrected(term):
            yield (
                f"Each rollout is used for {setup.updates:g} updates; the policy loss is corrected "
                "for that by its ratio, the KL loss is not.",
                _written_or_first(setup),
            )
    if setup.ratio == "none":
        for _ in _rewards(setup):
            yield (
                f"Each rollout is used for {setup.updates:g} updates, and this policy loss has no "
                "ratio to correct the reward and the KL in it by.",
                setup.policy_loss,
            )


def _written_or_first(setup: Setup) -> Setting | None:
    written = [setting for setting in setup.updates_settings if setting.written]
    return written[-1] if written else None


@rule(
    "gspo-ratio",
    WARNING,
    "GSPO's ratio corrects for nothing",
    aspects.KL,
    aspects.POLICY_LOSS,
    aspects.UPDATES,
)
def _gspo_ratio(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if setup.ratio == "gspo" and _off_policy(setup) and any(True for _ in _rewards(setup)):
        yield (
            "GSPO's ratio, a geometric mean over the answer, is an importance weight for nothing, "
            "so on reused samples the KL in the reward is not corrected.",
            setup.policy_loss,
        )


@rule(
    "rollout-mismatch",
    WARNING,
    "The sampler is corrected in the policy loss alone",
    aspects.KL,
    aspects.CORRECTION,
)
def _rollout_mismatch(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if not setup.corrects_rollout:
        return
    for term in _losses(setup):
        if setup.ratio_of(term) != "rollout":
            yield (
                "The weight for the rollout engine's mismatch multiplies the policy loss and not "
                "the KL loss, so the two are taken under different policies.",
                setup.correction,
            )


@rule(
    "stale-samples",
    WARNING,
    "Samples of an older policy, and no weight on the KL",
    aspects.KL,
    aspects.CORRECTION,
)
def _stale(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if setup.stale is None:
        return
    for term in setup.active:
        covered = term.as_loss or not (setup.corrects_rollout or setup.rollout_is_old)
        if covered and setup.ratio_of(term) != "rollout":
            yield (
                "Asynchronous rollouts come from a policy some updates old, and nothing weighs the "
                "KL for that: the ratio to old starts when the update does.",
                setup.stale,
            )


# Clamps.


@rule("dead-zone", WARNING, "Beyond the clamp the KL stops pulling", aspects.KL)
def _dead_zone(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term, v in zip(setup.active, verdicts, strict=True):
        if v.dead_zone and v.gradient not in ("zero", NEITHER):
            (_, low), (high, _) = v.dead_zone
            yield (
                f"The host clamps the KL's value at 10, so its gradient is exactly zero for tokens "
                f"with log(pi/ref) below {low:.2f} or above {high:.2f}: those that drifted "
                "furthest.",
                term.kind,
            )


# Strength.


@rule(
    "before-group-norm",
    WARNING,
    "The KL is divided by the group's standard deviation",
    aspects.KL,
    aspects.ADVANTAGE,
)
def _before_group_norm(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if setup.advantage.after.std == 0:
        return
    for term in _rewards(setup):
        if not term.joins_after:
            yield (
                "The KL is subtracted before group normalisation and divided by the group's "
                "standard deviation with the reward; where all rewards of a group tie, beta "
                "cancels and the advantage is KL noise.",
                term.where,
            )


@rule(
    "after-group-norm",
    INFO,
    "Against the raw reward, beta is times the group's std",
    aspects.KL,
    aspects.COEF,
    aspects.ADVANTAGE,
)
def _after_group_norm(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term, v in zip(setup.active, verdicts, strict=True):
        if isinstance(v.beta_relative, str) and "sigma" in v.beta_relative.split():
            yield (
                f"Rewards are divided by their group's standard deviation sigma and the KL is not: "
                f"against the raw reward, beta is {v.beta_relative}, another for each prompt.",
                term.amount,
            )


@rule(
    "mean-with-self",
    INFO,
    "The group's mean includes the answer itself",
    aspects.KL,
    aspects.COEF,
    aspects.ADVANTAGE,
    aspects.GROUP,
)
def _mean_with_self(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    scale = setup.advantage
    if scale.before.mean + scale.after.mean == 0 or setup.n is None or setup.n < 2:
        return
    for term, v in zip(setup.active, verdicts, strict=True):
        if v.beta_relative != term.coef:
            yield (
                f"The group's mean includes the answer itself, which weakens the reward by "
                f"{setup.n - 1}/{setup.n} and not the KL.",
                setup.n_setting,
            )


@rule("whitened", INFO, "The KL's force changes with every batch", aspects.KL, aspects.ADVANTAGE)
def _whitened(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if not setup.advantage.whitens:
        return
    for term in setup.active:
        if term.as_loss:
            yield (
                "Advantages are divided by the batch's standard deviation and the KL loss is not: "
                "against the raw reward, beta is times that standard deviation.",
                setup.advantage.setting,
            )
        elif not term.joins_after:
            yield (
                "The KL in the reward is divided by the batch's standard deviation together with "
                "it: beta against the reward stays, its absolute force changes with every batch.",
                setup.advantage.setting,
            )


@rule("group-of-one", WARNING, "A group of one answer", aspects.ADVANTAGE, aspects.GROUP)
def _group_of_one(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if setup.advantage.groups and setup.n == 1 and setup.host == "verl":
        yield (
            "Each prompt has one answer, so this estimator has no group to compare it with: no "
            "baseline, no normalisation, and reward and KL enter as they are.",
            setup.n_setting,
        )


@rule(
    "normaliser-mismatch",
    WARNING,
    "KL and policy loss are averaged differently",
    aspects.KL,
    aspects.POLICY_LOSS,
)
def _normaliser(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if setup.policy_by_answer == setup.kl_by_answer:
        return
    for _ in _losses(setup):
        yield (
            "The policy loss is a mean over answers and the KL loss a mean over tokens, so long "
            "answers carry more KL than reward.",
            setup.loss_agg if setup.loss_agg.written else setup.policy_loss,
        )


@rule(
    "length-normalised",
    INFO,
    "Dividing by length changes whose gradient it is",
    aspects.KL,
    aspects.POLICY_LOSS,
)
def _length_normalised(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term, v in zip(setup.active, verdicts, strict=True):
        divided = setup.kl_by_answer if term.as_loss else setup.policy_by_answer
        if divided and v.gradient in (REVERSE, "forward"):
            yield (
                "Each answer is divided by its length, so a token's KL counts less in a long "
                "answer: the gradient is near that KL's, and exactly that of no KL.",
                setup.loss_agg if setup.loss_agg.written else setup.policy_loss,
            )


@rule("length-bonus", ERROR, "k1 as a loss rewards length", aspects.KL, aspects.POLICY_LOSS)
def _length_bonus(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if setup.kl_by_answer:
        for _ in _losses(setup, "k1"):
            yield (
                "k1 as a loss, divided by each answer's length, has the gradient of E[1/length]: "
                "a bonus for long answers, and no KL.",
                setup.loss_agg,
            )


@rule(
    "length-tilt",
    WARNING,
    "A KL without a baseline, divided by length",
    aspects.KL,
    aspects.POLICY_LOSS,
    aspects.ADVANTAGE,
)
def _length_tilt(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in _rewards(setup):
        joined_late = setup.host == "openrlhf" and not term.from_klplug
        if joined_late and setup.policy_by_answer:
            yield (
                "The KL joins the advantages after the group's baseline and is then divided by the "
                "answer's length: an answer pays less for its KL the longer it is.",
                setup.loss_agg if setup.loss_agg.written else setup.policy_loss,
            )


@rule(
    "discounted-kl",
    WARNING,
    "gamma below 1 discounts the KL of later tokens",
    aspects.KL,
    aspects.ADVANTAGE,
)
def _discounted(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if setup.advantage.discount == 1:
        return
    for _ in _rewards(setup):
        yield (
            f"gamma is {setup.advantage.discount:g}: a token answers for the KL of later tokens "
            "with a discount, so the gradient is that of no KL of whole answers.",
            setup.advantage.discount_setting,
        )


# Controllers.


@rule(
    "adaptive-ignored",
    WARNING,
    "An adaptive controller that drives nothing",
    aspects.KL,
    aspects.CONTROLLER,
)
def _adaptive_ignored(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if setup.controller is not None and not setup.controller.drives:
        yield (
            "The adaptive controller drives no coefficient that is in use"
            + (
                ": verl's acts on a KL in the reward only, and kl_loss_coef stays as it is."
                if setup.host == "verl"
                else "."
            ),
            setup.controller.setting,
        )


@rule(
    "adaptive-fed-wrong",
    WARNING,
    "An adaptive controller fed the wrong value",
    aspects.KL,
    aspects.CONTROLLER,
)
def _adaptive_wrong(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    controller = setup.controller
    if controller is not None and controller.drives and not controller.right:
        yield (
            f"The adaptive controller is fed {controller.fed}, which is not KL(pi||ref), so it "
            "steers to another target than the one written.",
            controller.setting,
        )


@rule("adaptive-target", ERROR, "A KL target that is not positive", aspects.CONTROLLER)
def _adaptive_target(setup: Setup, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    controller = setup.controller
    if controller is None:
        return
    value = controller.target.value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        yield (
            "The controller divides by its target, which must be a positive number.",
            controller.target,
        )
