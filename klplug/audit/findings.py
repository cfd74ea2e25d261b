"""What can be wrong with the KL of a run: one rule per finding, each with a page in the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from klplug.audit import run as aspects
from klplug.audit.pages import address
from klplug.audit.run import Run, Term
from klplug.audit.settings import Setting
from klplug.audit.verdict import NEITHER, REVERSE, Verdict
from klplug.hosting.notes import STALE

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
        docs: the address of the page that derives it.
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
Check = Callable[[Run, Sequence[Verdict]], Iterator[Hit]]


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
        return address(self.id)


RULES: dict[str, Rule] = {}


def rule(id: str, severity: str, title: str, *needs: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        RULES[id] = Rule(id, severity, title, needs, check)
        return check

    return register


def findings(run: Run, verdicts: Sequence[Verdict]) -> tuple[Finding, ...]:
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
        if run.known(*row.needs)
        for message, setting in row.check(run, verdicts)
    ]
    return tuple(sorted(found, key=lambda f: -SEVERITIES.index(f.severity)))


def _losses(run: Run, *estimators: str) -> Iterator[Term]:
    return (t for t in run.active if t.as_loss and (not estimators or t.estimator in estimators))


def _rewards(run: Run, *estimators: str) -> Iterator[Term]:
    return (
        t for t in run.active if not t.as_loss and (not estimators or t.estimator in estimators)
    )


def _off_policy(run: Run) -> bool:
    return run.updates > 1


# The command itself.


@rule("command-cut", ERROR, "A broken line continuation drops settings")
def _command_cut(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    cut = run.cut
    if cut is not None:
        count = len(cut.lost)
        yield (
            f"The command ends on line {cut.line}: {cut.reason}, so {count} "
            f"setting{'s' if count > 1 else ''} below never reach the host "
            f"(from line {cut.lost[0].line} on).",
            Setting(*_split(cut.lost[0].text), cut.lost[0].line, True),
        )


@rule("script-not-read", WARNING, "A script that is not read to its end")
def _broken(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.broken is not None:
        yield (
            f"The script is not read past this line ({run.broken.reason}), so a command below "
            "has no verdict.",
            Setting("", None, run.broken.line),
        )


def _split(text: str) -> tuple[str, str]:
    key, _, value = text.lstrip("-+").replace(" ", "=", 1).partition("=")
    return key, value


@rule("rejected-setting", WARNING, "The host would refuse a setting")
def _rejected(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for rejected in run.rejected:
        yield f"The host would stop here: {rejected.reason}.", rejected.setting


@rule("klplug-refuses", ERROR, "klplug would not start this run")
def _refused(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for refused in run.refused:
        yield f"klplug refuses to start: {_sentence(refused.reason)}", refused.setting


def _sentence(words: str) -> str:
    return words if words.endswith(".") else f"{words}."


@rule("unknown-value", WARNING, "A value that only a run can tell")
def _unknown_value(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    seen = set()
    for reasons in run.unknown.values():
        for setting, reason in reasons:
            if setting.key not in seen:
                seen.add(setting.key)
                yield f"The verdict depends on a value that is not known: {reason}.", setting


@rule("sourced-script", INFO, "Variables are set from outside of the script")
def _sourced(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for line in run.sourced:
        yield (
            "What is read here stands outside of this script, and variables that it sets are not "
            "seen.",
            Setting("", None, line),
        )


@rule("unreached-setting", INFO, "A setting that reaches no command")
def _unreached(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.unreached:
        first, count = run.unreached[0], len(run.unreached)
        more = f" and {count - 1} more" if count > 1 else ""
        yield (
            f"{first.text}{more}: in this file, and in no command of it. A branch is not taken, a "
            "variable is not used, or a command is read wrongly.",
            Setting("", None, first.line),
        )


@rule("another-trainer", INFO, "A trainer of its own")
def _another_trainer(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    yield from run.notes


@rule("package-beside", INFO, "The host's package lies beside the script")
def _package_beside(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.beside:
        yield (
            f"{run.beside} is the package that this script starts, {run.version}. Its settings are "
            "read. Its KL's code is compared with the releases'.",
            Setting("", None, run.line),
        )


@rule("package-not-read", WARNING, "The host's package beside the script could not be read")
def _package_not_read(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.unread_package:
        yield (
            f"The package beside this script can't be read: {run.unread_package}. The rules are "
            f"those of {run.version}, which may not be its own.",
            Setting("", None, run.line),
        )


@rule("config-not-read", WARNING, "A config file that could not be read")
def _config_not_read(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for setting in run.unread:
        yield (
            "This config file was not found, so what the command leaves to it is unknown.",
            setting,
        )


# Whose gradient.


@rule("k1-as-loss", ERROR, "k1 as a loss is no regulariser", aspects.KL)
def _k1_as_loss(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in _losses(run, "k1"):
        message = (
            "k1 as a loss does not hold the policy near the reference. The reference drops out of "
            "its gradient, which averages to zero"
        )
        if _off_policy(run) and not run.corrected(term):
            message += ". On reused samples it pushes away from the policy that made them"
        yield message + ".", term.kind


@rule("k3-in-reward", ERROR, "k3 in the reward is next to nothing", aspects.KL)
def _k3_in_reward(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if any(term.estimator == "k3" for term in _losses(run)) and any(
        v.gradient != REVERSE for v in verdicts
    ):
        from klplug.audit.verdict import together

        if together(verdicts) == REVERSE:
            return
    for term in _rewards(run, "k3"):
        yield (
            "k3 in the reward has the gradient of the reverse KL minus that of the forward KL. "
            "Near the reference the two cancel. Answers below it are pushed further down.",
            term.kind,
        )


@rule("k2-in-reward", ERROR, "k2 in the reward pulls the wrong way", aspects.KL)
def _k2_in_reward(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in _rewards(run, "k2"):
        yield (
            "k2 in the reward penalises answers for being far from the reference on either side. "
            "So those it made too rare become rarer still.",
            term.kind,
        )


@rule("abs-in-reward", ERROR, "abs in the reward pulls the wrong way", aspects.KL)
def _abs_in_reward(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in _rewards(run, "abs"):
        yield (
            "abs in the reward penalises answers that are too rare as much as those that are too "
            "frequent. So the rare ones become rarer still.",
            term.kind,
        )


@rule("forward-kl", WARNING, "k3 as a loss follows the forward KL", aspects.KL)
def _forward_kl(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if any(term.estimator == "k3" for term in _rewards(run)):
        return  # two terms: their sum has its own finding
    for term in _losses(run, "k3"):
        yield (
            "k3 as a loss follows the forward KL, KL(ref||pi), not KL(pi||ref). Near the reference "
            "the two are alike. The pull fades to a constant on tokens above it, and explodes on "
            "tokens below it.",
            term.kind,
        )


@rule("abs-as-loss", WARNING, "abs as a loss is twice the total variation", aspects.KL)
def _abs_as_loss(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in _losses(run, "abs"):
        yield (
            "abs as a loss follows twice the total variation. Its pull is the same on every token, "
            "however near the reference.",
            term.kind,
        )


@rule("own-token", INFO, "Each token's own KL: a myopic optimum", aspects.KL)
def _own_token(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term, v in zip(run.active, verdicts, strict=True):
        if v.scope == "token" and v.gradient == REVERSE and term.as_loss:
            yield (
                "A KL as a loss counts each token's own KL. It leaves out what a token does to the "
                "KL of later ones. So on long answers its optimum is a myopic policy.",
                term.kind,
            )


@rule(
    "passk-in-reward",
    WARNING,
    "Pass@k drops the KL of all answers but one",
    aspects.KL,
    aspects.ADVANTAGE,
)
def _passk(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.advantage.best_only and any(True for _ in _rewards(run)):
        yield (
            "With grpo_passk only the best answer of a group has an advantage. So a KL in the "
            "reward reaches none of the others.",
            run.advantage.setting,
        )


@rule(
    "never-reaches",
    ERROR,
    "A KL that is asked for and never applied",
    aspects.KL,
    aspects.ADVANTAGE,
)
def _never_reaches(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in run.terms:
        if not term.reaches:
            yield f"The KL is asked for and dropped: {term.dropped}.", term.where


# Whether there is a KL at all.


@rule("no-kl", INFO, "No KL to a reference", aspects.KL, aspects.COEF)
def _no_kl(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if not run.terms and not run.not_enabled and run.not_loaded is None:
        yield "No KL to a reference: nothing but the clip holds the policy back.", None


@rule("kl-not-enabled", WARNING, "A KL is configured and never switched on", aspects.KL)
def _not_enabled(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.not_enabled:
        yield (
            "This setting has no effect: neither use_kl_loss nor use_kl_in_reward is on, so the "
            "run has no KL at all.",
            run.not_enabled[0],
        )


@rule("klplug-not-loaded", WARNING, "Nothing loads klplug in this release of the host", aspects.KL)
def _not_hooked(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.not_hooked is not None:
        yield run.not_hooked


@rule("setting-ignored", INFO, "A KL setting that nothing reads", aspects.KL)
def _ignored(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for setting in run.idle:
        if run.controller is not None and setting.key == run.controller.setting.key:
            continue  # adaptive-ignored says it
        yield "This setting belongs to a KL that is switched off, and has no effect.", setting


@rule(
    "zero-coefficient", WARNING, "A KL is switched on with coefficient 0", aspects.KL, aspects.COEF
)
def _zero_coefficient(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in run.terms:
        if term.coef == 0 and not term.from_klplug:
            yield (
                "The KL is on with coefficient 0: the reference model is loaded and run for "
                "nothing but a log line.",
                term.amount,
            )
    if run.not_loaded is not None:
        yield (
            "With coefficient 0 the reference model is never loaded, and the other KL flags do "
            "nothing.",
            run.not_loaded,
        )


@rule("negative-coefficient", ERROR, "A coefficient below zero", aspects.KL, aspects.COEF)
def _negative(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in run.terms:
        if term.coef < 0 and not term.from_klplug:
            yield "A negative coefficient rewards distance from the reference.", term.amount
        elif term.subtracted and term.coef > 0:
            yield (
                "This release subtracts the KL loss where it should add it: it rewards distance "
                "from the reference.",
                term.where,
            )


@rule("extrapolation", WARNING, "A coefficient below zero in a sum", aspects.KL)
def _extrapolation(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    yield from _noted(run, "extrapolation")


@rule("no-effect", WARNING, "A KL flag that does nothing where it stands", aspects.KL)
def _no_effect(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for setting, reason in run.no_effect:
        yield f"This has no effect: {reason}.", setting
    yield from _noted(run, "one_update")


@rule("double-kl", WARNING, "Two KL terms at once", aspects.KL)
def _double_kl(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    terms = run.active
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
def _off_policy_uncorrected(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if not _off_policy(run):
        return
    for term in _losses(run):
        if not run.corrected(term):
            yield (
                f"Each rollout is used for {run.updates:g} updates. The policy loss is corrected "
                "for that by its ratio, the KL loss is not.",
                _written_or_first(run),
            )
    if run.ratio == "none":
        for _ in _rewards(run):
            yield (
                f"Each rollout is used for {run.updates:g} updates. This policy loss has no ratio "
                "to correct the reward and the KL in it by.",
                run.policy_loss,
            )


def _written_or_first(run: Run) -> Setting | None:
    written = [setting for setting in run.updates_settings if setting.written]
    return written[-1] if written else None


@rule(
    "gspo-ratio",
    WARNING,
    "GSPO's ratio corrects for nothing",
    aspects.KL,
    aspects.POLICY_LOSS,
    aspects.UPDATES,
)
def _gspo_ratio(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.ratio == "gspo" and _off_policy(run) and any(True for _ in _rewards(run)):
        yield (
            "GSPO's ratio, a geometric mean over the answer, is an importance weight for nothing. "
            "So on reused samples the KL in the reward is not corrected.",
            run.policy_loss,
        )


@rule(
    "rollout-mismatch",
    WARNING,
    "The sampler is corrected in the policy loss alone",
    aspects.KL,
    aspects.CORRECTION,
)
def _rollout_mismatch(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if not run.corrects_rollout:
        return
    for term in _losses(run):
        if not run.rollout_corrected(term):
            yield (
                "The weight for the rollout engine's mismatch multiplies the policy loss and not "
                "the KL loss. So the two are taken under different policies.",
                run.correction,
            )


@rule(
    "stale-samples",
    WARNING,
    "Samples of an older policy, and no weight on the KL",
    aspects.KL,
    aspects.CORRECTION,
)
def _stale(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    yield from _noted(run, "stale_samples")
    if run.stale is None:
        return
    for term in run.active:
        if not (term.from_klplug or run.rollout_corrected(term)):
            yield f"{STALE}.", run.stale


@rule(
    "truncated-sampler",
    WARNING,
    "The sampler's log-probs are not the policy's",
    aspects.KL,
)
def _truncated_sampler(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    yield from _noted(run, "truncated_sampler")


@rule("lora-reference", WARNING, "The reference lacks the adapter that the policy has", aspects.KL)
def _lora_reference(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    yield from _noted(run, "lora_reference")


@rule("reference-dtype", WARNING, "The reference computes in another dtype", aspects.KL)
def _reference_dtype(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    yield from _noted(run, "reference_dtype")


def _noted(run: Run, row: str) -> Iterator[Hit]:
    """What the host's own list says of a run with a KL, each once."""
    said = {note.reason: note.setting for id, note in run.noted if id == row}
    if run.active:
        yield from ((_sentence(reason), setting) for reason, setting in said.items())


# Clamps.


@rule("dead-zone", WARNING, "Beyond the clamp the KL stops pulling", aspects.KL)
def _dead_zone(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term, v in zip(run.active, verdicts, strict=True):
        if v.dead_zone and v.gradient not in ("zero", NEITHER):
            (_, low), (high, _) = v.dead_zone
            yield (
                "The host clamps the KL's value at 10. So its gradient is exactly zero for tokens "
                f"with log(pi/ref) below {low:.2f} or above {high:.2f}. Those are the tokens that "
                "drifted furthest.",
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
def _before_group_norm(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.advantage.after.std == 0:
        return
    for term in _rewards(run):
        if not term.joins_after:
            yield (
                "The KL is subtracted before group normalisation, and divided by the group's "
                "standard deviation with the reward. Where all rewards of a group tie, beta "
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
def _after_group_norm(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term, v in zip(run.active, verdicts, strict=True):
        if isinstance(v.beta_relative, str) and "sigma" in v.beta_relative.split():
            yield (
                "Rewards are divided by their group's standard deviation sigma, and the KL is "
                f"not. Against the raw reward, beta is {v.beta_relative}, another for each prompt.",
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
def _mean_with_self(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    scale = run.advantage
    if scale.before.mean + scale.after.mean == 0 or run.n is None or run.n < 2:
        return
    for term, v in zip(run.active, verdicts, strict=True):
        if v.beta_relative != term.coef:
            yield (
                f"The group's mean includes the answer itself, which weakens the reward by "
                f"{run.n - 1}/{run.n} and not the KL.",
                run.n_setting,
            )


@rule("whitened", INFO, "The KL's force changes with every batch", aspects.KL, aspects.ADVANTAGE)
def _whitened(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if not run.advantage.whitens:
        return
    for term in run.active:
        if term.as_loss:
            yield (
                "Advantages are divided by the batch's standard deviation, and the KL loss is not. "
                "Against the raw reward, beta is times that standard deviation.",
                run.advantage.setting,
            )
        elif not term.joins_after:
            yield (
                "The KL in the reward is divided by the batch's standard deviation together with "
                "it. Against the reward beta stays. Its absolute force changes with every batch.",
                run.advantage.setting,
            )


@rule("group-of-one", WARNING, "A group of one answer", aspects.ADVANTAGE, aspects.GROUP)
def _group_of_one(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.advantage.groups and run.advantage.takes_one and run.n == 1:
        yield (
            "Each prompt has one answer, so this estimator has no group to compare it with. There "
            "is no baseline and no normalisation. Reward and KL enter as they are.",
            run.n_setting,
        )


@rule(
    "normaliser-mismatch",
    WARNING,
    "KL and policy loss are averaged differently",
    aspects.KL,
    aspects.POLICY_LOSS,
)
def _normaliser(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.policy_by_answer == run.kl_by_answer:
        return
    for _ in _losses(run):
        yield (
            "The policy loss is a mean over answers, and the KL loss one over tokens. So long "
            "answers carry more KL than reward.",
            run.loss_agg if run.loss_agg.written else run.policy_loss,
        )


@rule(
    "length-normalised",
    INFO,
    "Dividing by length changes whose gradient it is",
    aspects.KL,
    aspects.POLICY_LOSS,
)
def _length_normalised(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term, v in zip(run.active, verdicts, strict=True):
        divided = run.kl_by_answer if term.as_loss else run.policy_by_answer
        if divided and v.gradient in (REVERSE, "forward"):
            yield (
                "Each answer is divided by its length, so a token's KL counts less in a long "
                "answer. The gradient is near that KL's, and exactly that of no KL.",
                run.loss_agg if run.loss_agg.written else run.policy_loss,
            )


@rule("length-bonus", ERROR, "k1 as a loss rewards length", aspects.KL, aspects.POLICY_LOSS)
def _length_bonus(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.kl_by_answer:
        for _ in _losses(run, "k1"):
            yield (
                "k1 as a loss, divided by each answer's length, has the gradient of E[1/length]. "
                "That is a bonus for long answers, and no KL.",
                run.loss_agg,
            )


@rule(
    "length-tilt",
    WARNING,
    "A KL without a baseline, divided by length",
    aspects.KL,
    aspects.POLICY_LOSS,
    aspects.ADVANTAGE,
)
def _length_tilt(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    for term in _rewards(run):
        if term.without_baseline and run.policy_by_answer:
            yield (
                "The KL joins the advantages after the group's baseline, and is then divided by "
                "the answer's length. An answer pays less for its KL the longer it is.",
                run.loss_agg if run.loss_agg.written else run.policy_loss,
            )


@rule(
    "discounted-kl",
    WARNING,
    "gamma below 1 discounts the KL of later tokens",
    aspects.KL,
    aspects.ADVANTAGE,
)
def _discounted(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.advantage.discount == 1:
        return
    for _ in _rewards(run):
        yield (
            f"gamma is {run.advantage.discount:g}: a token answers for the KL of later tokens with "
            "a discount. So the gradient is that of no KL of whole answers.",
            run.advantage.discount_setting,
        )


# Controllers.


@rule(
    "adaptive-ignored",
    WARNING,
    "An adaptive controller that drives nothing",
    aspects.KL,
    aspects.CONTROLLER,
)
def _adaptive_ignored(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.controller is not None and not run.controller.drives:
        yield (
            f"The adaptive controller drives no coefficient that is in use{run.controller.only}.",
            run.controller.setting,
        )


@rule(
    "adaptive-fed-wrong",
    WARNING,
    "An adaptive controller fed the wrong value",
    aspects.KL,
    aspects.CONTROLLER,
)
def _adaptive_wrong(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    controller = run.controller
    if controller is not None and controller.drives and not controller.right:
        yield (
            f"The adaptive controller is fed {controller.fed}, which is not KL(pi||ref), so it "
            "steers to another target than the one written.",
            controller.setting,
        )


@rule(
    "adaptive-forgotten",
    INFO,
    "An adaptive coefficient that no checkpoint has",
    aspects.KL,
    aspects.CONTROLLER,
)
def _adaptive_forgotten(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    controller = run.controller
    if controller is not None and controller.drives and not controller.kept:
        yield (
            "The host saves no state of its adaptive controller. A run that resumes starts again "
            "from the coefficient that is written.",
            controller.setting,
        )


@rule("adaptive-target", ERROR, "A KL target that is not positive", aspects.CONTROLLER)
def _adaptive_target(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    controller = run.controller
    if controller is None:
        return
    value = controller.target.value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        yield (
            "The controller divides by its target, which must be a positive number.",
            controller.target,
        )


@rule(
    "short-horizon",
    WARNING,
    "A KL horizon shorter than a step",
    aspects.KL,
    aspects.CONTROLLER,
    aspects.GROUP,
)
def _short_horizon(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    if run.controller is not None and run.controller.drives:
        yield from _noted(run, "short_horizon")


# Settings of a fork, last.


@rule("unknown-setting", INFO, "A setting that no known release has")
def _unknown_setting(run: Run, verdicts: Sequence[Verdict]) -> Iterator[Hit]:
    yield from run.nobodys
