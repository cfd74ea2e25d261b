"""``klplug audit``: the report of ``klplug.audit`` on a terminal, or as JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from klplug.audit import AuditError, Finding, Report
from klplug.audit import audit as report_on
from klplug.cli.output import AsJson, console, print_json
from klplug.cli.status import Status, Unreadable
from klplug.hosting.host import hosts

FailOn = Literal["info", "warning", "error", "never"]

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_ORIGINS = {
    "installed": "its defaults as installed here",
    "given": "as asked for",
    "guessed": "the newest known release with these settings; say another with --host-version",
}
_GRADIENTS = {
    "reverse": ("reverse KL, KL(pi||ref): what RLHF means by a KL penalty", "green"),
    "forward": ("forward KL, KL(ref||pi): not the KL that RLHF means", "yellow"),
    "zero": ("zero on average: nothing holds the policy near the reference", "bold red"),
    "neither": ("neither the reverse nor the forward KL", "bold red"),
    "none": ("none: this run has no KL to a reference", "cyan"),
}
_SCOPES = {
    "token": "each token on its own; what it does to later tokens is left out",
    "sequence": "whole answers; a token answers for the KL of those after it",
}
_REASONS = {
    "k2_as_loss": "the reverse KL of each token, with a weight for reused samples and no clamp",
    "k1_in_reward": "the reverse KL of whole answers, with force beta whatever the group",
    "k1_in_reward,reward_norm=group": "the reverse KL of whole answers, in the host's own order",
}


def audit(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE | -- COMMAND...",
            help="A shell script, a YAML config, or a command line after --. Nothing is run.",
        ),
    ],
    as_json: AsJson = False,
    fail_on: Annotated[
        FailOn, typer.Option(help="The least severity that makes the exit status 1.")
    ] = "warning",
    host: Annotated[
        str | None, typer.Option(help="Look for commands of this host only, by its package's name.")
    ] = None,
    host_version: Annotated[
        str | None, typer.Option(help="The host's release, where it is not the installed one.")
    ] = None,
    command: Annotated[
        int, typer.Option(help="Which of several training commands in a file, from 1.")
    ] = 1,
) -> None:
    """Say what gradient the KL of a training command follows, how strongly, and what to change."""
    source: str | list[str] = arguments
    if len(arguments) == 1:
        if not Path(arguments[0]).exists() and " " in arguments[0]:
            raise Unreadable(f"{arguments[0]!r} is no file; a command goes after --, unquoted")
        source = arguments[0]
    try:
        report = report_on(source, host=host, host_version=host_version, command=command)
    except AuditError as error:
        raise Unreadable(str(error)) from None
    if as_json:
        print_json(report.to_json())
    else:
        show(report, console(), source if isinstance(source, str) else "the command line")
    if fail_on != "never" and report.fails(fail_on):
        raise typer.Exit(Status.FINDINGS)


def show(report: Report, out: Console, name: str) -> None:
    """The report for a reader who has never heard of k1, k2 and k3."""
    where = f"{name}, line {report.line}" if report.line is not None else name
    more = (
        f" (training command {report.command} of {report.commands}; others with --command)"
        if report.commands > 1
        else ""
    )
    version = f"{hosts()[report.host].title} {report.host_version}"
    out.print(Text(f"{where}: {version} ({_ORIGINS[report.version_from]}){more}"))
    out.print()
    out.print(Padding(_facts(report), (0, 0, 0, 2), expand=False))
    out.print()
    if report.findings:
        out.print(Padding(_findings(report.findings), (0, 0, 0, 2), expand=False))
        out.print(Text(_summary(report.findings)))
    else:
        out.print(Text("No findings.", style="green"))
    if report.instead and report.kl_type != report.recommended:
        out.print()
        out.print(Text(f"What to write instead, for {report.recommended}:"))
        for how, write in report.instead:
            out.print(Text(f"  {how}:"))
            out.print(Text(f"    {write}", style="bold"), soft_wrap=True)
    out.print()
    out.print(Text(_LEGEND, style="dim"))


_LEGEND = (
    "pi is the policy in training, ref the reference it starts from, old the policy that made the "
    "samples; sigma is the standard deviation of the rewards in a group. Log-ratios are in nats."
)


def _facts(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    if report.gradient is None:
        table.add_row("gradient", _unknown(report, "gradient"))
    else:
        words, style = _GRADIENTS[report.gradient]
        text = Text(words, style=style)
        if report.gradient == "neither" and report.target:
            text.append(f" ({report.target})")
        table.add_row("gradient", text)
    if report.gradient == "none":
        _add_updates(table, report)
        return table
    if report.scope is not None:
        table.add_row("scope", _SCOPES[report.scope])
    for term in report.terms if len(report.terms) > 1 else ():
        table.add_row(
            "one term",
            f"{term.kl_type}: {term.gradient}, beta {_amount(term.beta_absolute)} in the update, "
            f"{_amount(term.beta_relative)} against the raw reward",
        )
    _add_updates(table, report)
    table.add_row("corrected", _corrected(report))
    table.add_row("rollout", _rollout(report))
    if len(report.terms) < 2:
        table.add_row("beta", _beta(report))
    table.add_row("dead zone", _dead_zone(report))
    table.add_row("as a kl_type", _or_unknown(report, "kl_type", report.kl_type or "no single one"))
    recommended = report.recommended or ""
    if report.recommended == report.kl_type:
        recommended += ": what you have"
    elif report.recommended in _REASONS:
        recommended += f": {_REASONS[report.recommended]}"
    table.add_row("recommended", _or_unknown(report, "recommended", recommended))
    return table


def _add_updates(table: Table, report: Report) -> None:
    updates = report.updates_per_rollout
    if updates is None:
        words: Text | str = _unknown(report, "updates_per_rollout")
    elif updates == 1:
        words = "1 per rollout: on-policy"
    elif updates < 1:
        words = f"one for every {1 / updates:g} rollouts: on-policy"
    else:
        words = f"{updates:g} per rollout: all but the first on samples of an older policy"
    table.add_row("updates", words)


def _corrected(report: Report) -> Text | str:
    if report.corrected is None:
        return _unknown(report, "corrected")
    updates = report.updates_per_rollout
    if not report.corrected:
        if updates is not None and updates <= 1:
            return "no weight on the KL, and none needed for on-policy samples"
        return "no: the KL has no weight for samples of an older policy"
    ratios = sorted({f"pi/{term.ratio}" for term in report.terms})
    return f"yes, by the ratio {' and '.join(ratios)}"


def _rollout(report: Report) -> Text | str:
    if report.rollout_corrected is None:
        return _unknown(report, "rollout_corrected")
    if report.rollout_corrected:
        return "the KL is weighted for the rollout engine's own probabilities"
    return "the KL has no weight for the rollout engine's own probabilities"


def _beta(report: Report) -> Text | str:
    if report.beta is None:
        return _unknown(report, "beta")
    if report.beta_absolute is None:
        return f"{report.beta:g} as written; its force: {_unknown(report, 'beta_absolute')}"
    return (
        f"{report.beta:g} as written; {_amount(report.beta_absolute)} in the update, where the "
        f"policy loss has 1; {_amount(report.beta_relative)} against the raw reward"
    )


def _amount(value: float | str | None) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _dead_zone(report: Report) -> Text | str:
    if "dead_zone" in report.unknown:
        return _unknown(report, "dead_zone")
    if not report.dead_zone:
        return "none"
    ranges = []
    for low, high in report.dead_zone:
        if math.isinf(low):
            ranges.append(f"below {high:.2f}")
        elif math.isinf(high):
            ranges.append(f"above {low:.2f}")
        else:
            ranges.append(f"{low:.2f} to {high:.2f}")
    return f"no gradient at log(pi/ref) {' or '.join(ranges)}"


def _or_unknown(report: Report, field: str, text: str) -> Text | str:
    return _unknown(report, field) if field in report.unknown else text


def _unknown(report: Report, field: str) -> Text:
    return Text(f"unknown: {report.unknown[field][0]}", style="yellow")


def _findings(findings: tuple[Finding, ...]) -> Table:
    table = Table.grid(padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        where = Text(style="dim")
        if finding.line is not None:
            where.append(f"line {finding.line}: ")
        if finding.setting is not None:
            where.append(f"{'the default ' if finding.default else ''}{finding.setting}  ")
        where.append(f"-> {finding.docs}")
        table.add_row(
            Text(f"{finding.severity}", style=_STYLES[finding.severity]),
            Group(Text(finding.message), where),
        )
    return table


def _summary(findings: tuple[Finding, ...]) -> str:
    counts = {name: sum(f.severity == name for f in findings) for name in _STYLES}
    return ", ".join(
        f"{count} {name}{'s' if count > 1 and name != 'info' else ''}"
        for name, count in counts.items()
        if count
    )
