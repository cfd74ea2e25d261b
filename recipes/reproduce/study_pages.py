"""docs/closed-form.md and docs/gradient-study.md, with their figures, from the committed results.

    python -m recipes.reproduce.study_pages

Nothing is measured here. Every number on the pages comes from a line of `results/`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.reproduce import gradient_study
from recipes.reproduce.enumerable import GRID, OWN, UNCORRECTED
from recipes.reproduce.enumerable_verdicts import (
    MEASURES,
    STUDIES,
    Compared,
    Results,
    Study,
    comparisons,
)
from recipes.reproduce.figures import closed_form_figure, gradient_figure
from recipes.shared.markdown import filled, table

DOCS = Path(__file__).parents[2] / "docs"
SHOWN = {
    "closed": ("reward", "kl", "kl_forward", "to_optimum", "to_myopic", "to_forward"),
    "a": ("reward", "kl", "kl_forward"),
    "b": ("reward", "kl", "kl_forward", "to_optimum"),
    "c": ("reward", "kl"),
    "d": ("reward", "kl", "entropy", "good_in_16", "to_optimum"),
    "e": ("reward", "kl", "swing_between", "swing_within"),
    "f": ("reward", "kl", "kl_forward"),
    "g": ("reward", "kl", "to_optimum"),
    "h": ("reward", "kl"),
    "clip": ("reward", "kl", "to_optimum", "to_myopic"),
}
SETTINGS = ("beta", "updates", "tokens", "share", "start", "spike", "clip")
NOT_RUN = "Not run yet."


def comparison_table(found: Sequence[Compared]) -> str:
    headings = ["predicted", "difference, mean and interval", "verdict"]
    return table(headings, [[c.what, str(c.interval), c.verdict] for c in found])


def means(results: Results, study: str) -> str:
    """A row for each cell of a study: means over seeds, and the standard deviation of seeds."""
    grid = [c for c in GRID if c.study == study]
    varied = [name for name in SETTINGS if len({getattr(c, name) for c in grid}) > 1]
    rows = []
    for c in grid:
        ends = [results.end(c, name) for name in SHOWN[study]]
        told = (f"{float(end.mean()):.3g} ± {float(end.std()):.2g}" for end in ends)
        rows.append([f"`{c.kl_type}`", *(f"{getattr(c, name):g}" for name in varied), *told])
    return table(["kl_type", *varied, *(MEASURES[name] for name in SHOWN[study])], rows)


def breaks(results: Results) -> str:
    """E[r] - beta KL against that of one update a rollout, as a share."""
    rows = []
    for form in (OWN, UNCORRECTED, "k1_in_reward"):
        one, *others = (
            float(Study("e", results).end("objective", form, updates=n).mean())
            for n in (1, 4, 16, 64)
        )
        rows.append([f"`{form}`", *(f"{other / one:.3f}" for other in others)])
    return table(["kl_type", "4 updates", "16", "64"], rows)


def gradient_lines(path: Path = gradient_study.RESULTS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def gradient_table(lines: Sequence[dict[str, Any]]) -> str:
    """Cosine and norm ratio that every formulation tends to, and the answers for a cosine of 0.9.

    A cosine of 0.9 at once needs one answer; one above 1, by noise, is shown as 1.
    """
    policies = list(dict.fromkeys(line["policy"] for line in lines))
    rows = []
    for form in dict.fromkeys(line["form"] for line in lines):
        whole = "horizon=sequence" in form or "in_reward" in form or "whole" in form
        target = "FULL" if whole else "LOC"
        cells = [f"`{form}`" if not form.startswith(gradient_study.EXACT) else form, target]
        for policy in policies:
            (line,) = (x for x in lines if x["policy"] == policy and x["form"] == form)
            limit, measured = line[target]["limit"], line[target]["norm"]
            _, largest, _ = measured[max(measured, key=int)]
            # Of the square of the largest estimate less than a quarter is its mean's.
            if limit["cosine"] is None or limit["norm"] < largest / 2:
                cells.append("no mean, never")
                continue
            needed = limit["answers_for_0.9"]
            answers = "never" if needed is None else f"{math.ceil(needed)}"
            cells.append(f"{min(limit['cosine'], 1):.2f}, {limit['norm']:.2f}, {answers}")
        rows.append(cells)
    told = (f"{policy}: cosine, norm, answers" for policy in policies)
    return table(["formulation", "against", *told], rows)


def pages(docs: Path = DOCS) -> dict[Path, str]:
    results, closed = Results(), {}
    for study in STUDIES:
        found = comparisons(results, study)
        closed[f"verdicts {study}"] = comparison_table(found) if found else NOT_RUN
        closed[f"means {study}"] = means(results, study) if found else NOT_RUN
    closed["breaks"] = breaks(results) if results.has("e") else NOT_RUN
    gradients = {"gradients": gradient_table(gradient_lines())}
    made = {docs / "closed-form.md": closed, docs / "gradient-study.md": gradients}
    return {page: filled(page, parts) for page, parts in made.items()}


def main() -> None:
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
    closed_form_figure(Results(), DOCS / "img" / "closed-form.svg")
    gradient_figure(gradient_lines(), DOCS / "img" / "gradient-study.svg")


if __name__ == "__main__":
    main()
