"""``klplug audit``: the report of ``klplug.audit`` on a terminal, or as JSON."""

from __future__ import annotations

import glob
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import typer
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import klplug
from klplug.audit import RULES, AuditError, Finding, Report
from klplug.audit import audit as report_on
from klplug.audit.command import audits, read, read_from
from klplug.audit.edits import Change, difference, edited, kept
from klplug.audit.errors import NoCommand
from klplug.audit.tables import given
from klplug.cli.output import AsJson, console, print_json
from klplug.cli.status import Status, Unreadable
from klplug.hosting.host import hosts

Format = Literal["text", "json", "github", "sarif"]
FailOn = Literal["info", "warning", "error", "never"]

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_ORIGINS = {
    "installed": "its defaults as installed here",
    "given": "as asked for",
    "beside": "its package lies beside the script",
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
            metavar="FILE... | DIR... | - | -- COMMAND...",
            help="Shell scripts, folders of them, YAML configs, - for standard input, or a command "
            "line after --. Nothing is run.",
        ),
    ],
    as_json: AsJson = False,
    form: Annotated[
        Format, typer.Option("--format", help="text, json, github (annotations) or sarif.")
    ] = "text",
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="The long form, with every number.")
    ] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Print the advice as a diff of the script.")
    ] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Edit the script by the advice.")] = False,
    fail_on: Annotated[
        FailOn,
        typer.Option(
            metavar="SEVERITY",
            help="The least that makes the exit status 1: info, warning, error or never.",
        ),
    ] = "warning",
    host: Annotated[
        str | None, typer.Option(help="Look for commands of this host only, by its package's name.")
    ] = None,
    host_version: Annotated[
        str | None, typer.Option(help="The host's release, where it is not the installed one.")
    ] = None,
    command: Annotated[
        int | None, typer.Option(help="Only this one of the training commands in a file, from 1.")
    ] = None,
) -> None:
    """Say what gradient the KL of a training command follows, how strongly, and what to change."""
    options: dict[str, Any] = {"host": host, "host_version": host_version}
    files = sources(arguments)
    if files is None and (diff or fix):
        raise Unreadable(f"{'--fix' if fix else '--diff'} is for files: a command line is none")
    runs: list[tuple[str, Report]] = []
    without = 0
    status = Status.CLEAN
    if files is None:
        try:
            runs = [("the command line", report_on(arguments, command=command or 1, **options))]
        except AuditError as error:
            here = any(Path(word).exists() for word in arguments)
            gone = next((word for word in arguments if not _names_a_file(word)), None)
            if here and gone is not None and isinstance(error, NoCommand):
                raise Unreadable(f"{gone}: No such file or directory") from None
            raise Unreadable(str(error)) from None
    for path in files or ():
        try:
            text = read_from(sys.stdin.buffer, "-") if str(path) == "-" else read(path)
            found = commands(path, text, command, options)
            if diff or fix:
                status = max(status, changed(path, text, found, fix, options))
            runs += [(str(path), report) for report in found]
        except AuditError as error:
            if files is not None and len(files) == 1:
                raise Unreadable(str(error)) from None
            if isinstance(error, NoCommand):
                without += 1
                continue
            status = Status.UNREADABLE
            print(f"klplug: error: {error}", file=sys.stderr)
    for host_name, version in sorted({(r.host, r.host_version) for _, r in runs if host_version}):
        read_by = given(host_name, version).version
        if read_by != version:
            title = hosts()[host_name].title
            say = f"{title} {version} is not known here: read by the defaults of {read_by}"
            print(f"klplug: warning: {say}", file=sys.stderr)
    if not (diff or fix):
        _print(runs, "json" if as_json else form, verbose)
        if fail_on != "never" and any(report.fails(fail_on) for _, report in runs):
            status = max(status, Status.FINDINGS)
    if without:
        print(f"{without} of {len(files or ())} files have no training command", file=sys.stderr)
    if status:
        raise typer.Exit(status)


def sources(arguments: Sequence[str]) -> list[Path] | None:
    """The files that arguments name, in order; ``None`` for the words of a command."""
    if len(arguments) == 1 and not Path(arguments[0]).exists() and " " in arguments[0]:
        raise Unreadable(f"{arguments[0]!r} is no file; a command goes after --, unquoted")
    if len(arguments) > 1 and not all(map(_names_a_file, arguments)):
        return None
    found: list[Path] = []
    for name in arguments:
        path = Path(name)
        if not name:  # a variable that is not set, which as a path would be this folder
            raise Unreadable("'': No such file or directory")
        if path.is_dir():
            # os.path: Path.is_file raises where a folder may not be opened.
            scripts = (p for p in path.rglob("*") if p.suffix in _SCRIPTS)
            named = sorted(p for p in scripts if not os.path.isdir(p))
            inside = [p for p in named if os.path.isfile(p)]
            if not inside:
                raise Unreadable(f"{name}: a folder without shell scripts")
            if odd := len(named) - len(inside):
                print(f"{name}: {odd} of {len(named)} are not regular files", file=sys.stderr)
            found += inside
        elif not path.exists() and set(name) & set("*?["):
            matching = sorted(glob.glob(name, recursive=True))
            if not matching:
                raise Unreadable(f"{name}: no file has such a name")
            found += map(Path, matching)
        else:
            found.append(path)
    return list(dict.fromkeys(found))


_SCRIPTS = (".sh", ".bash", ".slurm", ".sbatch")


def _names_a_file(word: str) -> bool:
    path = Path(word)
    named = path.suffix in (*_SCRIPTS, ".yaml", ".yml") and not word.startswith("-")
    return word == "-" or path.exists() or (named and "=" not in word)


def commands(
    path: Path, text: str, command: int | None, options: Mapping[str, Any]
) -> list[Report]:
    """The reports on every training command of a file, or on one of them."""
    if command is None:
        return audits(path, text=text, **options)
    return [report_on(path, command=command, text=text, **options)]


def changed(
    path: Path, text: str, found: Sequence[Report], fix: bool, options: Mapping[str, Any]
) -> Status:
    """Prints what the advice makes of a script, or writes it; says why where it can't."""
    status = Status.CLEAN
    # Every command, as the text stands: what is edited above moves those below.
    after, standing = text, audits(path, text=text, **options)
    for asked in found:
        if not asked.fails("warning"):
            continue
        try:
            report = standing[asked.command - 1]
            if report.after is None or report.kl_type == report.recommended:
                raise AuditError("klplug has no edit for this command")
            tried = edited(after, report.edits)
            read_again = audits(path, text=tried, **options)
            _check(standing, read_again, report)
            after, standing = tried, read_again
        except AuditError as error:
            print(f"{path}:{asked.line}: not edited: {error}", file=sys.stderr)
            status = Status.FINDINGS
    if after == text:
        return status
    before = text.encode() if str(path) == "-" else path.read_bytes()
    now = kept(before, text, after)
    if fix and str(path) != "-":
        path.write_bytes(now)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(now if fix else difference(str(path), before, now))
    return status


def _check(before: Sequence[Report], after: Sequence[Report], report: Report) -> None:
    """Raises an ``AuditError`` where an edit does not do what it should, and nothing else."""
    if len(after) != len(before):
        raise AuditError(f"the script would have {len(after)} training commands")
    for was, now in zip(before, after, strict=True):
        if was.command != report.command:
            if (now.kl_type, now.beta) != (was.kl_type, was.beta):
                raise AuditError(f"it shares these words with the command on line {was.line}")
        elif now.fails("warning"):
            raise AuditError(f"{now.findings[0].id} would stay: {now.findings[0].message}")
        elif now.kl_type != report.recommended:
            raise AuditError(f"{report.recommended} would not be what the command says")
        elif was.beta and not math.isclose(now.beta or 0.0, was.beta, rel_tol=1e-5):
            raise AuditError("the coefficient would be another")


def _print(runs: Sequence[tuple[str, Report]], form: Format, verbose: bool) -> None:
    if form == "json":
        documents = [report.to_json() for _, report in runs]
        if len(runs) == 1:
            print_json(documents[0])
        else:
            named = zip(runs, documents, strict=True)
            print_json({"runs": [{"file": name, **document} for (name, _), document in named]})
    elif form == "github":
        for name, report in runs:
            for finding in report.findings:
                print(annotation(name, report, finding))
    elif form == "sarif":
        print_json(sarif(runs))
    else:
        out = console()
        for name, report in runs:
            summary(report, out, name)
            if verbose:
                out.print()
                show(report, out, name)
        found = [finding for _, report in runs for finding in report.findings]
        if found:
            words = f"Each finding has a page: klplug explain {found[0].id}, or {found[0].docs}"
            out.print(Text(words), soft_wrap=True)


def place(report: Report, name: str, line: int | None = None) -> str:
    line = report.line if line is None else line
    return name if line is None else f"{name}:{line}"


def summary(report: Report, out: Console, name: str) -> None:
    """The verdict and the edit in one line, then a line for each finding."""
    out.print(Text(f"{place(report, name)}  {headline(report)}"), soft_wrap=True)
    for finding in report.findings:
        text = Text(f"{place(report, name, finding.line)}: ")
        text.append(finding.id, style=_STYLES[finding.severity])
        text.append(f" {finding.message}")
        out.print(text, soft_wrap=True)


def headline(report: Report) -> str:
    """The verdict, and what to delete and to add."""
    return " ".join([*_verdict(report), *_edit(report)])


def _verdict(report: Report) -> Iterator[str]:
    if report.gradient is None:
        yield f"Gradient unknown: {report.unknown['gradient'][0]}."
        return
    if report.gradient == "none":
        yield "No KL to a reference."
        return
    away = report.target is not None and report.target.startswith("away")
    gradient = "away from the reference" if away else _SHORT[report.gradient]
    words = f"{report.kl_type or 'Several terms'}: {gradient}"
    updates = report.updates_per_rollout
    if updates is not None and updates > 1 and report.corrected is not None:
        words += f", {updates:g} updates {'corrected' if report.corrected else 'uncorrected'}"
    yield f"{words}."


_SHORT = {
    "reverse": "gradient of the reverse KL",
    "forward": "gradient of the forward KL",
    "zero": "no gradient on average",
    "neither": "gradient of neither KL",
}


def _edit(report: Report) -> Iterator[str]:
    if report.kl_type == report.recommended or not report.fails("warning"):
        return
    gone = [change for change in report.edits if change.delete is not None]
    come = [change.add for change in report.edits if change.add is not None]
    if gone:
        lines = {change.line for change in gone if change.line is not None}
        word = "Line" if len(lines) == 1 else "Lines"
        where = f"{word} {', '.join(map(str, sorted(lines)))}: delete" if lines else "Delete"
        yield f"{where} {' '.join(map(_named, gone))}; add {' '.join(come)}"
    elif come:
        yield f"Add {' '.join(come)}"
    elif report.instead:
        how, write = report.instead[0]
        yield f"{how[0].upper()}{how[1:]}: {write}"


def _named(change: Change) -> str:
    """A word that goes: on a line that is named its last name is enough to find it."""
    word = change.delete or ""
    return word if change.line is None else re.sub(r"^[\w.@/+~]*\.(?=\w+=)", "", word)


_LEVELS = {"error": "error", "warning": "warning", "info": "notice"}


def annotation(name: str, report: Report, finding: Finding) -> str:
    """A finding as GitHub's runners show it beside the line."""
    line = finding.line or report.line or 1
    file = _escaped(name, "%\r\n:,")
    message = _escaped(finding.message, "%\r\n")
    return f"::{_LEVELS[finding.severity]} file={file},line={line},title={finding.id}::{message}"


def _escaped(text: str, special: str) -> str:
    return "".join(f"%{ord(c):02X}" if c in special else c for c in text)


def sarif(runs: Sequence[tuple[str, Report]]) -> dict[str, Any]:
    """The findings as one SARIF 2.1.0 document."""
    results = [
        {
            "ruleId": finding.id,
            "level": "note" if finding.severity == "info" else finding.severity,
            "message": {"text": finding.message},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": _uri(Path(name))},
                        "region": {"startLine": finding.line or report.line or 1},
                    }
                }
            ],
        }
        for name, report in runs
        for finding in report.findings
    ]
    used = dict.fromkeys(str(result["ruleId"]) for result in results)
    rules = [
        {"id": id, "shortDescription": {"text": RULES[id].title}, "helpUri": RULES[id].docs}
        for id in used
    ]
    driver = {"name": "klplug audit", "version": klplug.__version__, "rules": rules}
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _uri(path: Path) -> str:
    return path.as_uri() if path.is_absolute() else quote(os.fsencode(path))


def show(report: Report, out: Console, name: str) -> None:
    """The report for a reader who has never heard of k1, k2 and k3."""
    where = f"{name}, line {report.line}" if report.line is not None else name
    more = (
        f" (training command {report.command} of {report.commands}; others with --command)"
        if report.commands > 1
        else ""
    )
    if not report.reached:
        more += " (it runs where a variable is set, or an argument passed)"
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
    "pi is the policy in training, ref the reference it starts from. old is the policy that made "
    "the samples. sigma is the standard deviation of the rewards in a group. Log-ratios are in "
    "nats."
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
    ratios = sorted({f"pi/{term.ratio}" for term in report.terms if term.ratio != "none"})
    if not ratios:
        return "yes: over the vocabulary a token's KL needs no weight"
    return f"yes, by the ratio {' and '.join(ratios)}"


def _rollout(report: Report) -> Text | str:
    if report.rollout_corrected is None:
        return _unknown(report, "rollout_corrected")
    if report.rollout_corrected and all(term.ratio == "none" for term in report.terms):
        return "the KL needs no weight for the rollout engine's own probabilities"
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
        where.append(f"-> klplug explain {finding.id}")
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
