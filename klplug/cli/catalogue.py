"""``klplug list``: the table of kl_types, and the hosts' own names for some of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import klplug
from klplug.cli.output import AsJson, console, print_json
from klplug.cli.status import Unreadable
from klplug.estimators import ALIASES, ESTIMATORS
from klplug.hosting.host import hosts
from klplug.spec import EXACT, MONITOR, PLACEMENTS

WORDS = "x = log pi - log ref of one token, nats; u = exp(x)"
HEADINGS = ("coefficient c", "whose gradient, on-policy", "bias as one of KL(pi||ref)")
NARROW = 140  # columns, below which a table of four has no room for sentences

_PLACES = {"as_loss": "as a loss", "in_reward": "in the reward"}


def stock(name: str) -> dict[str, list[str]]:
    """What the hosts mean by a name of their own, as ``low_var_kl``, ``k3+`` or ``stock:k3``.

    Returns:
        By ``kl_type`` with the same gradient, where it is called that. Empty: nobody's name.

    Raises:
        Unreadable: ``stock:`` before a name that no host has.
    """
    found: dict[str, list[str]] = {}
    for host in hosts().values():
        for placement in PLACEMENTS:
            kl_type = host.stock.get(placement, {}).get(name.removeprefix("stock:"))
            if kl_type is not None:
                found.setdefault(kl_type, []).append(f"{host.title} {_PLACES[placement]}")
    if name.startswith("stock:") and not found:
        raise Unreadable(f"{name}: no host has that name; there are {', '.join(_stock_names())}")
    return found


def _stock_names() -> list[str]:
    named = (n for host in hosts().values() for names in host.stock.values() for n in names)
    return list(dict.fromkeys(named))


def names() -> list[str]:
    """Every name that ``explain`` takes: klplug's own, then the hosts'."""
    own = [f"{name}_{place}" for name in (*ESTIMATORS, *ALIASES) for place in PLACEMENTS]
    return list(dict.fromkeys([*own, EXACT, "none", MONITOR, *_stock_names()]))


def completed(incomplete: str) -> list[str]:
    """The names that begin as the word under the cursor does."""
    return [name for name in names() if name.startswith(incomplete)]


def list_kl_types(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Only these: an estimator, a kl_type, or a host's name.",
            autocompletion=completed,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every kl_type: its coefficient, whose gradient it follows, and its bias."""
    rows = list(klplug.kl_types().values())
    meant = [stock(name) for name in names or ()]
    if names:
        wanted = set().union(*map(_meant, names, meant))
        rows = [row for row in rows if row.name in names or wanted & _terms(row.name)]
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    out = console()
    for name, of in zip(names or (), meant, strict=True):
        if of:
            out.print(stock_text(name, of))
    if out.width < NARROW:
        for row in rows:
            out.print(Text(row.name, style="bold"))
            facts = Table.grid(padding=(0, 2))
            for heading, cell in zip(HEADINGS, _cells(row), strict=True):
                facts.add_row(heading.partition(",")[0].partition(" as")[0], cell)
            out.print(Padding(facts, (0, 0, 0, 2), expand=False))
        out.print(Text(WORDS))
        return
    table = Table(caption=WORDS)
    table.add_column("kl_type", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.name, *_cells(row))
    out.print(table)


def stock_text(name: str, meant: dict[str, list[str]]) -> str:
    """A line for each meaning that a host's name has."""
    lines = [f"{name} is a name of the hosts. The same gradient, but for clamps of theirs:"]
    lines += [f"  {', '.join(where)}: {kl_type}" for kl_type, where in meant.items()]
    return "\n".join(lines)


def _cells(row: klplug.KLType) -> tuple[str, str, str]:
    return row.coefficient, row.target, row.gradient_bias


def _terms(kl_type: str) -> set[tuple[str, str]]:
    return {(term.estimator, term.placement) for term in klplug.parse(kl_type).terms}


def _meant(name: str, stock: dict[str, list[str]]) -> set[tuple[str, str]]:
    """The estimators, each with a placement, that a name stands for."""
    if stock:
        return set().union(*map(_terms, stock))
    if ALIASES.get(name, name) in ESTIMATORS:
        return {(ALIASES.get(name, name), placement) for placement in PLACEMENTS}
    try:
        return _terms(name)
    except ValueError as error:
        raise Unreadable(str(error)) from error
