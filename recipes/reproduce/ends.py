"""What a grid's runs came to: a line a formulation, beside it what the committed runs did."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from rich.table import Table

from recipes.reproduce.drive import Row, is_of
from recipes.reproduce.grid import Grid
from recipes.reproduce.measures import ACCURACY, KL, seeds

Formulation = tuple[str, float | None, int]
NOTES = """\
accuracy: of the held-out problems, answers sampled at temperature 1
KL: KL(pi||ref) of whole answers to the policy before training, nats
each is the mean of the seeds, with their lowest and highest
committed: the same on another machine, any seed, in recipes/reproduce/results\
"""


def table(grid: Grid, rows: Sequence[Row], known: Sequence[Row]) -> Table:
    """The ends of the runs of a grid that there are.

    Args:
        grid: Whose runs.
        rows: Of this folder.
        known: The committed rows.
    """
    here, there = by_formulation(grid, rows), by_formulation(grid, known, any_seed=True)
    made = Table(box=None, pad_edge=False)
    columns = ["kl_type", "kl_coef", "updates", "seeds", "accuracy", "KL"]
    for name in columns + (["committed", "accuracy", "KL"] if there else []):
        made.add_column(name, justify="left" if name == "kl_type" else "right")
    if start := next((row["evaluations"][0] for row in rows if has_start(row)), None):
        made.add_row("before training", "", "", "", f"{start['sampled_accuracy']:.1%}", "0")
    for formulation, found in here.items():
        kl_type, coef, updates = formulation
        known_of = ended(there.get(formulation, [])) if there else ()
        shown = ("" if coef is None else f"{coef:g}", str(updates))
        made.add_row(kl_type, *shown, *ended(found), *known_of)
    return made


def by_formulation(
    grid: Grid, rows: Sequence[Row], any_seed: bool = False
) -> dict[Formulation, list[Row]]:
    """The rows that are runs of the grid, or would be with its seeds, in the grid's order."""
    found: dict[Formulation, list[Row]] = {}
    for run in grid.runs:
        there = found.setdefault((run.kl_type, run.kl_coef, run.updates), [])
        for row in rows:
            asked = replace(run, seed=row["settings"]["seed"]) if any_seed else run
            if is_of(row, asked, grid) and not any(row is other for other in there):
                there.append(row)
    return {formulation: there for formulation, there in found.items() if there}


def has_start(row: Row) -> bool:
    return any(found["step"] == 0 for found in row["evaluations"][:1])


def ended(rows: Collection[Row]) -> tuple[str, str, str]:
    return seeds(rows), ACCURACY.over(rows), KL.over(rows)
