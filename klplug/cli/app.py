"""The typer application: one line per command."""

from __future__ import annotations

from typing import Annotated

import typer

import klplug
from klplug.cli.audit import audit
from klplug.cli.catalogue import list_kl_types
from klplug.cli.doctor import doctor_command
from klplug.cli.explain import explain_command
from klplug.cli.report import report_command

app = typer.Typer(
    name="klplug",
    help="What gradient does my KL follow? Exit status: 0 clean, 1 findings, 2 could not read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"klplug {klplug.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    pass


app.command("audit")(audit)
app.command("list")(list_kl_types)
app.command("explain")(explain_command)
app.command("report")(report_command)
app.command("doctor")(doctor_command)
