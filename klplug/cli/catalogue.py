"""``klplug list``: the table of kl_types."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

import klplug
from klplug.cli.output import AsJson, console, print_json

WORDS = "x = log pi - log ref of one token, nats; u = exp(x)"


def list_kl_types(as_json: AsJson = False) -> None:
    """List every kl_type: its coefficient, whose gradient it follows, and its bias."""
    rows = klplug.kl_types().values()
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    table = Table(caption=WORDS)
    table.add_column("kl_type", no_wrap=True)
    for heading in ("coefficient c", "whose gradient, on-policy", "bias as one of KL(pi||ref)"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.name, row.coefficient, row.target, row.gradient_bias)
    console().print(table)
