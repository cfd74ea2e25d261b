"""docs/evidence.md, its figures and README's table: `python -m recipes.reproduce.page`.

Nothing in the page is written by hand but its sentences, in `words.py`. Each number is of
`results/GRID*.jsonl` or of `results/enumerable.jsonl`; `GRIDS` has the grids. What is missing is
said to be missing.
"""

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from recipes.reproduce import words
from recipes.reproduce.drive import DriveError, Row, is_of, missing, read_rows, seconds_of, shown
from recipes.reproduce.enumerable_verdicts import Results, comparisons
from recipes.reproduce.figures import frontier_figure, runs_figure
from recipes.reproduce.grid import HERE, load
from recipes.reproduce.measures import (
    ACCURACY,
    BOUNDED,
    COEFFICIENTS,
    CPU_SECONDS,
    DIVIDED,
    ENTROPY,
    EXACT,
    FORWARD_KL,
    FROZEN,
    GRADIENT_NORM,
    GREEDY,
    K1,
    K2,
    KL,
    KL_ERROR,
    ORDER,
    PASS_16,
    ROLLOUTS_LOST,
    SWING,
    TOKENS,
    UNWEIGHTED,
    Measure,
    Runs,
    pass_at,
    seeds,
)
from recipes.reproduce.verdicts import (
    VERDICTS,
    Finding,
    exact_findings,
    findings,
    language_findings,
    spike_findings,
    strength_findings,
    updates_findings,
)
from recipes.shared import markdown
from recipes.shared.settings import REPOSITORY

RESULTS = HERE / "results"
PAGE = REPOSITORY / "docs" / "evidence.md"
README = REPOSITORY / "README.md"
IMAGES = REPOSITORY / "docs" / "img"

GRIDS = ("tier1", "updates", "spike", "strength", "exact", "verl-exact", "smollm2")

CORRECT = (ACCURACY, GREEDY, pass_at(8), PASS_16)
ABLE = (*CORRECT, ROLLOUTS_LOST)
MOVED = (KL, FORWARD_KL, ENTROPY, TOKENS, GRADIENT_NORM)
MOVED_FURTHER = (*(m for m in MOVED if m != TOKENS), SWING, CPU_SECONDS)
ABLE_LANGUAGE = (ACCURACY, GREEDY, pass_at(4))


def page(grids: Mapping[str, Sequence[Row]], enumerated: Results | None = None) -> str:
    """The page's text.

    Args:
        grids: By the name of a grid its rows, any number. Of a grid without rows there is no
            section, but for tier 1.
        enumerated: Of the enumerable task.
    """
    of = {name: grids.get(name, ()) for name in GRIDS}
    rows, exact, language = of["tier1"], of["exact"], of["smollm2"]
    runs, spike, strength = Runs(rows), Runs(of["spike"]), Runs(of["strength"])
    many = Runs([*of["updates"], *exact])
    found = findings(runs)
    of_updates = updates_findings(many) if of["updates"] else []
    of_spike = spike_findings(spike) if of["spike"] else []
    of_strength = strength_findings(strength) if of["strength"] else []
    blocks = [
        "<!-- Made by `python -m recipes.reproduce.page` from recipes/reproduce/results. -->",
        "# Evidence",
        words.INTRODUCTION,
        words.FORMULATIONS,
        words.READ,
        "## Verdicts on the host",
        tally_line(found),
        verdict_table(found),
        words.RULE,
        "## Verdicts on the enumerable task",
        words.ENUMERATED,
        enumerable_table(enumerated) if enumerated else "",
        "## What came out, in words",
        *paragraphs([*found, *of_updates, *of_spike, *of_strength]),
        "## Tier 1: seven formulations, kl_coef 0.5, 4 updates per rollout",
        *(tier1_blocks(runs) if rows else ["No run was made yet."]),
        *(updates_blocks(of["updates"], many, of_updates) if of["updates"] else []),
        *(spike_blocks(spike, of_spike) if of["spike"] else []),
        *(strength_blocks(strength, of_strength) if of["strength"] else []),
        *(exact_blocks(exact, runs, of["verl-exact"]) if exact else []),
        *(language_blocks(language) if language else []),
    ]
    if rows and (absent := missing_blocks("tier1", rows)):
        blocks += ["## Missing", *absent]
    if rows:
        blocks += ["## Made with", "Tier 1:", provenance(rows)]
    if enumerated and enumerated.lines:
        blocks += ["The enumerable task:", made_with(list(enumerated.lines.values()))]
    return "\n\n".join(block.strip("\n") for block in [*blocks, words.HOW] if block) + "\n"


# Verdicts


def tally_line(found: Sequence[Finding]) -> str:
    """How often each verdict was reached, a negative one as plainly as a positive one."""
    counts = Counter(finding.verdict for finding in found if finding.verdict != "no verdict")
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return f"Of {counts.total()} predictions on this grid of runs, written before it: {told}."


def verdict_table(found: Sequence[Finding]) -> str:
    rows = [[f.part, f.asked, f.measured, f"**{f.verdict}**"] for f in found]
    return markdown.table(["", "hypothesis", "measured", "verdict"], rows)


def enumerable_table(results: Results) -> str:
    """How many comparisons hold, fail and are not decided."""
    verdicts, rows = ("holds", "fails", "not decided"), []
    for letter, told in words.TOLD.items():
        found = Counter(compared.verdict for compared in comparisons(results, letter))
        counts = [str(found[verdict]) for verdict in verdicts] if found else ["not run yet", "", ""]
        rows.append([letter, f"[{told.title}](closed-form.md#{told.anchor})", *counts])
    return markdown.table(["", "hypothesis", *verdicts], rows)


def paragraphs(found: Sequence[Finding]) -> list[str]:
    """A paragraph for each hypothesis: what was asked, and what came out on both tasks."""
    parts, made = {finding.part: finding for finding in found}, []
    for letter, told in words.TOLD.items():
        said = {part: how for part, how in told.parts.items() if part in parts}
        host = " ".join(sentence(parts[part], *how) for part, how in said.items())
        if not host and letter != "c":
            host = words.NOT_TRIED
        text = f"**({letter}) {told.title}.** {told.asked}"
        text += f" *On the host*: {host}" if host else ""
        text += f" *On the enumerable task*: {told.enumerable}"
        made.append(textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False))
    return made


def sentence(found: Finding, reproduced: str, opposite: str, undecided: str) -> str:
    if found.verdict == "not decided yet":
        return f"{found.part} has too few runs yet."
    said = {"reproduced": reproduced, "not reproduced": opposite}.get(found.verdict, undecided)
    return said.format(found.measured.partition(",")[0])


# Sections


def tier1_blocks(runs: Runs) -> list[str]:
    """The tables of `grids/tier1.yaml`, and its two figures."""
    blocks = [
        start_line(runs.rows, CORRECT),
        *tables(runs, ORDER),
        words.COLUMNS,
        "![Reward of the rollouts; accuracy and KL of the saved policies](img/evidence-runs.svg)",
        "![Accuracy against KL at the end of each run](img/evidence-frontier.svg)",
    ]
    if any(row["settings"]["updates"] == 1 for row in runs.rows):
        blocks += ["## One update per rollout", *tables(runs, ("none", K1), 1)]
    for coef in COEFFICIENTS:
        if coef != 0.5 and (runs.of(K2, 4, coef) or runs.of("stock:k3", 4, coef)):
            blocks += [f"## kl_coef {coef:g}, 4 updates per rollout"]
            blocks += tables(runs, ("stock:k3", K2), 4, coef)
    return blocks


def grid_blocks(
    name: str, title: str, told: str, found: Sequence[Finding], made: list[str], rows: Sequence[Row]
) -> list[str]:
    """The section on a grid that has its own findings."""
    heading = [f"## {title}", told, verdict_table(found)]
    return [*heading, *made, provenance(rows), *missing_blocks(name, rows)]


def updates_blocks(rows: Sequence[Row], runs: Runs, found: Sequence[Finding]) -> list[str]:
    """The section on `grids/updates.yaml`, whose k2 is that of `grids/exact.yaml`."""
    made = tables(runs, (K2, UNWEIGHTED, FROZEN), 64, moved=MOVED_FURTHER)
    title = "Many updates per rollout"
    return grid_blocks("updates", title, words.ON_UPDATES, found, made, rows)


def spike_blocks(runs: Runs, found: Sequence[Finding]) -> list[str]:
    """The section on `grids/spike.yaml`."""
    made = tables(runs, (BOUNDED, "stock:k2", "stock:k3"))
    title = "A spike of the learning rate"
    return grid_blocks("spike", title, words.ON_SPIKE, found, made, runs.rows)


def strength_blocks(runs: Runs, found: Sequence[Finding]) -> list[str]:
    """The section on `grids/strength.yaml`."""
    made = tables(runs, (FROZEN, DIVIDED))
    title = "The strength of a coefficient"
    return grid_blocks("strength", title, words.ON_STRENGTH, found, made, runs.rows)


def exact_blocks(rows: Sequence[Row], beside: Runs, verl: Sequence[Row]) -> list[str]:
    """The section on `grids/exact.yaml`, whose k2 with 4 updates is tier 1's, and on
    `grids/verl-exact.yaml`."""
    runs, other = Runs([*rows, *beside.of(K2).values()]), Runs(verl)
    blocks = [
        "## The exact KL beside the sampled one",
        words.ON_EXACT,
        verdict_table(exact_findings(runs, other)),
    ]
    for updates in sorted({row["settings"]["updates"] for row in rows}):
        blocks.append(f"With {updates} updates per rollout:")
        blocks += tables(runs, (K2, EXACT), updates, moved=MOVED_FURTHER)
    if verl:
        blocks += ["On verl, with 4 updates per rollout:"]
        blocks += tables(other, (K2, EXACT), moved=MOVED_FURTHER)
    blocks += [provenance([*rows, *verl])]
    return [*blocks, *missing_blocks("exact", rows), *missing_blocks("verl-exact", verl)]


def language_blocks(rows: Sequence[Row]) -> list[str]:
    """The section on `grids/smollm2.yaml`."""
    runs = Runs(rows)
    return [
        "## A language model",
        words.ON_LANGUAGE,
        start_line(rows, ABLE_LANGUAGE),
        verdict_table(language_findings(runs)),
        *tables(runs, ("none", K1, K2), able=ABLE_LANGUAGE, moved=(KL, KL_ERROR, *MOVED[1:])),
        provenance(rows),
        *missing_blocks("smollm2", rows),
    ]


def tables(
    runs: Runs,
    kl_types: Sequence[str],
    updates: int = 4,
    kl_coef: float = 0.5,
    *,
    able: Sequence[Measure] = ABLE,
    moved: Sequence[Measure] = MOVED,
) -> list[str]:
    """What each formulation's policy is able to do, and below how far it has moved."""
    return [table(runs, kl_types, measures, updates, kl_coef) for measures in (able, moved)]


def table(
    runs: Runs,
    kl_types: Sequence[str],
    measures: Sequence[Measure],
    updates: int = 4,
    kl_coef: float = 0.5,
) -> str:
    """A line a formulation: seeds, then each measure's mean with its lowest and highest seed."""
    rows = []
    for kl_type in kl_types:
        there = runs.of(kl_type, updates, kl_coef).values()
        rows.append([f"`{kl_type}`", seeds(there), *(m.over(there) for m in measures)])
    return markdown.table(["kl_type", "seeds", *(m.heading for m in measures)], rows)


def start_line(rows: Sequence[Row], able: Sequence[Measure]) -> str:
    """What all runs start from."""
    start = {**rows[0], "status": "done", "evaluations": rows[0]["evaluations"][:1]}
    measured = (f"{m.heading} {m.form.format(m.of(start))}" for m in (*able, ENTROPY, TOKENS))
    return f"The policy before training: {', '.join(measured)}."


def missing_blocks(name: str, rows: Sequence[Row]) -> list[str]:
    """The seeds of a grid that are not there, a line a formulation; empty where all are."""
    lacking: dict[str, list[int]] = {}
    for run in missing(load(name), rows):
        coef = "" if run.kl_coef is None else f", kl_coef {run.kl_coef:g}"
        asked = f"`{run.kl_type}`{coef}, {run.updates} update{'s' * (run.updates > 1)}"
        lacking.setdefault(asked, []).append(run.seed)
    lines = (
        f"- {asked}: seed{'s' * (len(of) > 1)} {', '.join(map(str, of))}"
        for asked, of in lacking.items()
    )
    told = f"Runs of the grid `{name}` that were not made yet:"
    return [told, "\n".join(lines)] if lacking else []


# What the rows were made with


def counted(told: Iterable[str]) -> list[str]:
    """The most frequent first."""
    return [f"- {count} {text}" for text, count in Counter(told).most_common()]


def provenance(rows: Sequence[Row]) -> str:
    """Commits, versions, machines and hours of the rows."""

    def commit(row: Row) -> str:
        changed = ", with changes that were not committed" * row["changed"]
        return f"runs of commit `{(row['commit'] or 'unknown')[:12]}`{changed}"

    def versions(row: Row) -> str:
        return f"runs with {', '.join(f'{k} {v}' for k, v in sorted(row['versions'].items()))}"

    def machine(row: Row) -> str:
        held = row["machine"]
        size = f"{held['cores']} cores, {held['memory_gib']:g} GiB"
        return f"runs on {held['cpu']}, {size}, {', '.join(held['gpus'] or ['no GPU'])}"

    hours = sum(map(seconds_of, rows)) / 3600
    cpu = sum(row["cpu_seconds"] for row in rows) / 3600
    load = [row["load"]["before"] for row in rows]
    return "\n".join(
        [
            *(line for of in (commit, versions, machine) for line in counted(map(of, rows))),
            f"- {cpu:.1f} CPU-hours, {hours:.1f} hours of runs; the machine's load was "
            f"{min(load):.1f} to {max(load):.1f} (other work beside it)",
        ]
    )


def made_with(cells: Sequence[Row]) -> str:
    """Versions and hours of the enumerable task's settings."""
    settings = (
        f"settings of {cell['seeds']} seeds with klplug {cell['klplug']}, torch {cell['torch']}"
        for cell in cells
    )
    hours = sum(cell["process_seconds"] for cell in cells) / 3600
    return "\n".join([*counted(settings), f"- {hours:.1f} CPU-hours"])


# The command


def rows_of(name: str, folder: Path) -> list[Row]:
    """Of a grid's results, `NAME.jsonl` and files that begin so; each a run of the grid, once.

    Raises:
        DriveError: A row is of another form, of no run of the grid, or of one that is there.
    """
    grid, rows = load(name), []
    for path in sorted(folder.glob(f"{name}*.jsonl")):
        for place, row in enumerate(read_rows(path), start=1):
            run = next((run for run in grid.runs if is_of(row, run, grid)), None)
            if run is None:
                raise DriveError(f"{path}, line {place}: the grid {name} has no such run")
            if any(is_of(other, run, grid) for other in rows):
                raise DriveError(f"{path}, line {place}: a second row of {shown(run)}")
            rows.append(row)
    return rows


def short_table(runs: Runs) -> str:
    """README's: accuracy and KL of each formulation, and how verdicts fell."""
    kl = replace(KL, heading="KL(pi‖ref), nats per answer")
    return f"{table(runs, ORDER, (ACCURACY, kl))}\n\n{tally_line(findings(runs))}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="docs/evidence.md from the committed rows.")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of tier1*.jsonl and so on"
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args(argv)
    if not arguments.results.is_dir():
        parser.error(f"--results {arguments.results}: no such folder")
    try:
        grids = {name: rows_of(name, arguments.results) for name in GRIDS}
    except DriveError as error:
        print(f"page: error: {error}", file=sys.stderr)
        return 2
    enumerated = Results(arguments.results / "enumerable.jsonl")
    arguments.page.write_text(page(grids, enumerated), "utf-8")
    rows = grids["tier1"]
    if rows:
        runs = Runs(rows)
        arguments.images.mkdir(parents=True, exist_ok=True)
        runs_figure(runs, arguments.images / "evidence-runs.svg")
        frontier_figure(runs, arguments.images / "evidence-frontier.svg")
        readme = markdown.filled(arguments.readme, {"evidence": short_table(runs)})
        arguments.readme.write_text(readme, "utf-8")
    print(f"{arguments.page}: {sum(map(len, grids.values()))} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
