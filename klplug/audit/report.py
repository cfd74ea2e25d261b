"""The audit of one command: a verdict, findings, and what to write instead."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from klplug.audit import run as aspects
from klplug.audit.edits import Change, bare
from klplug.audit.findings import SEVERITIES, Finding, findings
from klplug.audit.run import Run
from klplug.audit.settings import MAIN, Launch, Setting, Settings
from klplug.audit.shell import Word
from klplug.audit.verdict import Verdict, equivalent, recommended, together, verdict
from klplug.hosting.host import hosts
from klplug.hosting.settings import Edit

Interval = tuple[float, float]

# What each field of a report hangs on.
_NEEDS = {
    "gradient": (aspects.KL, aspects.ADVANTAGE),
    "scope": (aspects.KL, aspects.ADVANTAGE),
    "updates_per_rollout": (aspects.UPDATES,),
    "corrected": (aspects.KL, aspects.POLICY_LOSS),
    "rollout_corrected": (aspects.KL, aspects.CORRECTION),
    "beta": (aspects.KL, aspects.COEF),
    "beta_absolute": (aspects.KL, aspects.COEF, aspects.ADVANTAGE),
    "beta_relative": (aspects.KL, aspects.COEF, aspects.ADVANTAGE),
    "dead_zone": (aspects.KL,),
    "terms": (aspects.KL, aspects.ADVANTAGE),
    "kl_type": (aspects.KL,),
    "recommended": (aspects.KL, aspects.ADVANTAGE),
}


@dataclass(frozen=True)
class Report:
    """What ``klplug audit`` says of one command.

    A field that hangs on a value which only a run could tell is ``None``, and ``unknown`` says
    why; ``dead_zone`` and ``terms`` are then empty.

    Attributes:
        host, host_version: its name, and the release whose defaults were used.
        version_from: ``installed``, ``given``, or ``guessed`` from the settings' names.
        gradient: ``reverse``, ``forward``, ``zero``, ``neither`` or ``none``.
        target: the same in words.
        scope: ``token`` (each token's own KL) or ``sequence`` (whole answers).
        updates_per_rollout: optimizer steps on one rollout.
        corrected: every KL term has an importance weight for samples of an older policy.
        rollout_corrected: every KL term is weighted for what the rollout engine's probabilities
            differ by from the trainer's.
        beta: as written; ``None``, as the two below, where two terms differ.
        beta_absolute: its factor in the update, in which the policy loss has factor 1: a number,
            or a formula in ``sigma`` (the group's standard deviation), ``sigma_batch`` and
            ``alpha`` (answers of a batch for each whose reward is not 0).
        beta_relative: its factor against the raw reward, likewise.
        dead_zone: intervals of log(pi/ref) in which a host's clamp makes the gradient zero.
        terms: one verdict per KL term.
        kl_type: the equivalent kl_type; ``None`` where two coefficients differ.
        recommended: the kl_type to use instead.
        instead: how to write that, a label and the settings each.
        after: the command's words once the first of these is taken; ``None`` where there is
            nothing to change, no command, or nothing that klplug serves.
        edits: the same, word by word.
        findings: the gravest first.
        unknown: name of a field that is not known, to the reasons.
        line: where the command begins; ``None`` for a command line.
        command, commands: which of the training commands found this is.
        reached: ``False`` for one that runs only where a variable is set from outside, or an
            argument passed.
    """

    host: str
    host_version: str
    version_from: str
    gradient: str | None
    target: str | None
    scope: str | None
    updates_per_rollout: float | None
    corrected: bool | None
    rollout_corrected: bool | None
    beta: float | None
    beta_absolute: float | str | None
    beta_relative: float | str | None
    dead_zone: tuple[Interval, ...]
    terms: tuple[Verdict, ...]
    kl_type: str | None
    recommended: str | None
    instead: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]
    unknown: dict[str, tuple[str, ...]]
    after: tuple[str, ...] | None = None
    edits: tuple[Change, ...] = ()
    line: int | None = None
    command: int = 1
    commands: int = 1
    reached: bool = True

    def worst(self) -> str | None:
        """The gravest severity found."""
        return self.findings[0].severity if self.findings else None

    def fails(self, threshold: str = "warning") -> bool:
        """True where a finding is at least as grave as ``threshold``."""
        worst = self.worst()
        return worst is not None and SEVERITIES.index(worst) >= SEVERITIES.index(threshold)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``; an interval without end has ``null`` there."""
        return {
            "host": self.host,
            "host_version": self.host_version,
            "version_from": self.version_from,
            "gradient": self.gradient,
            "target": self.target,
            "scope": self.scope,
            "updates_per_rollout": self.updates_per_rollout,
            "corrected": self.corrected,
            "rollout_corrected": self.rollout_corrected,
            "beta": self.beta,
            "beta_absolute": self.beta_absolute,
            "beta_relative": self.beta_relative,
            "dead_zone": _intervals(self.dead_zone),
            "terms": [
                {**vars(term), "dead_zone": _intervals(term.dead_zone)} for term in self.terms
            ],
            "kl_type": self.kl_type,
            "recommended": self.recommended,
            "instead": [{"how": how, "write": write} for how, write in self.instead],
            "after": None if self.after is None else list(self.after),
            "edits": [change.to_json() for change in self.edits],
            "findings": [finding.to_json() for finding in self.findings],
            "unknown": {name: list(reasons) for name, reasons in self.unknown.items()},
            "line": self.line,
            "command": self.command,
            "commands": self.commands,
            "reached": self.reached,
        }


def _intervals(zone: Sequence[Interval]) -> list[list[float | None]]:
    return [[edge if math.isfinite(edge) else None for edge in interval] for interval in zone]


def report(run: Run, settings: Settings) -> Report:
    """The report on one run, and on what its settings might be instead."""
    verdicts = tuple(verdict(run, term) for term in run.active)
    unknown = {
        name: tuple(
            dict.fromkeys(reason for aspect in needs for _, reason in run.unknown.get(aspect, ()))
        )
        for name, needs in _needs(run).items()
        if not run.known(*needs)
    }
    advice = _advice(run, verdicts, settings)
    betas = [(v.beta, v.beta_absolute, v.beta_relative) for v in verdicts] or [(0.0, 0.0, 0.0)]
    beta, absolute, relative = (
        same[0] if len(set(same)) == 1 else None for same in zip(*betas, strict=True)
    )
    values: dict[str, Any] = {
        "gradient": together(verdicts),
        "scope": _scope(verdicts),
        "updates_per_rollout": run.updates,
        "corrected": bool(verdicts) and all(v.corrected for v in verdicts),
        "rollout_corrected": bool(verdicts) and all(v.rollout_corrected for v in verdicts),
        "beta": beta,
        "beta_absolute": absolute,
        "beta_relative": relative,
        "dead_zone": tuple(dict.fromkeys(i for v in verdicts for i in v.dead_zone)),
        "terms": verdicts,
        "kl_type": equivalent(verdicts),
        "recommended": advice.kl_type,
    }
    for name in unknown:
        values[name] = () if name in ("dead_zone", "terms") else None
    return Report(
        host=run.host,
        host_version=run.version,
        version_from=run.version_from,
        target=None if "gradient" in unknown else _target(verdicts, values["gradient"]),
        instead=() if "recommended" in unknown else advice.ways,
        after=None if "recommended" in unknown else advice.after,
        edits=() if "recommended" in unknown else advice.changes,
        findings=findings(run, verdicts),
        unknown=unknown,
        line=run.line,
        commands=run.commands,
        **values,
    )


def _needs(run: Run) -> dict[str, tuple[str, ...]]:
    """The aspects that each field hangs on: how advantages are made bears on a reward alone."""
    if any(not term.as_loss for term in run.active):
        return _NEEDS
    return _NEEDS | dict.fromkeys(("gradient", "scope"), (aspects.KL,))


def _scope(verdicts: Sequence[Verdict]) -> str | None:
    """Of the terms that act; whole answers where any is."""
    scopes = {v.scope for v in verdicts if v.gradient != "zero"} or {v.scope for v in verdicts}
    if not scopes:
        return None
    return "sequence" if "sequence" in scopes else "token"


def _target(verdicts: Sequence[Verdict], gradient: str) -> str:
    if len(verdicts) == 1:
        return verdicts[0].target
    if not verdicts:
        return "zero: no KL, no reference model"
    if gradient == "reverse" and {v.gradient for v in verdicts} != {"reverse"}:
        return "FULL: grad KL(pi||ref) over whole answers; the two biases cancel"
    return "; and ".join(f"{v.kl_type}: {v.target}" for v in verdicts)


@dataclass(frozen=True)
class _Advice:
    kl_type: str
    ways: tuple[tuple[str, str], ...] = ()
    after: tuple[str, ...] | None = None
    changes: tuple[Change, ...] = ()


def _changes(
    edits: Sequence[Edit], settings: Settings, coef: str, amount: Setting
) -> Iterator[Change]:
    """The words that edits delete and add.

    A coefficient that a variable holds stays that variable: ``kl_loss_coef=${x}`` becomes
    ``+klplug.kl_coef=${x}``.
    """
    launch = settings.launch
    if launch is None:
        return
    main = launch.words[launch.main]
    behind = settings.behind or main
    end = None
    # Of words that one place is split into, the last.
    sharing = [word for word in launch.words if word.span == behind.span]
    if behind.span is not None and sharing[-1] is behind:
        end = (behind.span[1], behind.span[1])
    key = next((k for k, s in settings.written.items() if s == amount), "")
    shell = _made_of(settings.spelled.get(key, ())[-1:], launch)
    for edit in edits:
        if edit.key == MAIN:
            text = " ".join(_typed(word) for word in edit.words)
            yield Change(main.line, main.text, text, main.span)
            continue
        value = settings[edit.key].value
        counts = edit.key == key or (type(value) in (int, float) and not settings[edit.key].unknown)
        for word in settings.spelled.get(edit.key, ()):
            written = _made_of((word,), launch) if counts else None
            yield Change(word.line, word.text, None, word.span, written)
        for text in edit.words:
            typed = _typed(text)
            if edit.key == "klplug.kl_coef" and shell is not None and text.endswith(coef):
                typed = _valued(text.removesuffix(coef), shell) or typed
            yield Change(behind.line, None, typed, end, behind=behind.text)


def _alone(word: Word, launch: Launch) -> bool:
    """Whether a word is all that stands at its place."""
    return sum(other.span == word.span for other in launch.words) == 1


def _made_of(words: Sequence[Word], launch: Launch) -> str | None:
    """What stands in the script for a word that the shell makes of a variable.

    ``None`` for a word that stands there itself; and for one whose value is not known and that is
    not in the command, where the variable may hold another.
    """
    main = launch.words[launch.main]
    for word in words:
        if word.span is None or main.span is None or not _alone(word, launch):
            return None
        text = launch.around[slice(*word.span)]
        between = launch.around[main.span[1] : word.span[0]]
        inside = main.span[1] <= word.span[0] and not re.search(r"(?<!\\)\n", between)
        if bare(text) != bare(word.text) and (inside or not word.unknown):
            return text
    return None


_VALUE = re.compile(r"(?P<quote>[\"']?)(?:[+\w.@/-]*=)?(?P<value>.*?)(?P=quote)", re.DOTALL)


def _valued(name: str, written: str) -> str | None:
    """A word with the value of another, as the shell reads that: its quotes stay around it."""
    match = _VALUE.fullmatch(written)
    if match is None or (match["quote"] and match["quote"] in match["value"]):
        return None
    return f"{match['quote']}{name}{match['value']}{match['quote']}"


def _typed(word: str) -> str:
    """A word as it is typed into a shell."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def _advice(run: Run, verdicts: Sequence[Verdict], settings: Settings) -> _Advice:
    """The best kl_type that the host serves, and how to write it."""
    host = hosts()[run.host]
    choices = recommended(run, verdicts)
    if not verdicts:
        return _Advice(choices[0])
    if not run.served:
        return _Advice(choices[0], run.nearest)
    own = host.room("edit")
    for kl_type in choices:
        amount, coef = _coefficient(run, kl_type)
        edits = host.edit(kl_type, coef, settings)
        edited = settings.edited(edits)
        if any(host.refused(edited)):
            continue
        added = (word for edit in edits for word in edit.words)
        with_klplug = (own.how(edited), own.written(added))
        ways = (with_klplug, *own.without_klplug(kl_type, coef, settings))
        after = settings.after(edits)
        return _Advice(kl_type, ways, after, tuple(_changes(edits, settings, coef, amount)))
    if all(term.from_klplug for term in run.active):
        return _Advice(choices[0])  # what klplug refuses it for says what to write
    return _Advice(kl_type, tuple(own.without_klplug(kl_type, coef, settings)))


def _coefficient(run: Run, kl_type: str) -> tuple[Setting, str]:
    """The setting of beta, of the term that stands where ``kl_type`` will, and beta as written."""
    placed = [t for t in run.active if t.spec is not None and t.spec.placement in kl_type]
    term = (placed or list(run.active))[0]
    coef = term.written
    return term.amount, f"{coef:g}" if coef == coef else str(term.amount.value)
