"""The typer application: one line per command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

import klplug
from klplug.cli.audit import audit
from klplug.cli.catalogue import list_kl_types
from klplug.cli.doctor import doctor_command
from klplug.cli.explain import explain_command
from klplug.cli.report import report_command
from klplug.cli.soup import soup_command

app = typer.Typer(
    name="klplug",
    help="What gradient does my KL follow? Exit status: 0 clean, 1 findings, 2 could not read.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: klplug audit train.sh",
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


COMMANDS: dict[str, Callable[..., None]] = {
    "audit": audit,
    "list": list_kl_types,
    "explain": explain_command,
    "report": report_command,
    "doctor": doctor_command,
    "soup": soup_command,
}
EXAMPLES = {
    "audit": (
        "klplug audit train.sh",
        "klplug audit --diff train.sh",
        "klplug audit scripts --format github",
    ),
    "list": ("klplug list", "klplug list low_var_kl", "klplug list k2_as_loss --json"),
    "explain": (
        "klplug explain k2_as_loss k3_as_loss",
        "klplug explain 'k2_as_loss,horizon=sequence' --png c.svg",
        "klplug explain stock:k3",
        "klplug explain --paper frpo",
        "klplug explain dead-zone",
    ),
    "report": ("klplug report runs --out picture", "klplug report train.log --json"),
    "doctor": ("klplug doctor --no-ray", "klplug doctor --json"),
    "soup": (
        "klplug soup sft-1 sft-2 --out reference",
        "klplug soup base sft --weights 0.3,0.7 --out reference",
    ),
}

for name, command in COMMANDS.items():
    # A line of its own for each: an empty line is how the epilog keeps them apart.
    app.command(name, epilog="\n\n".join(["Examples:", *EXAMPLES[name]]))(command)
