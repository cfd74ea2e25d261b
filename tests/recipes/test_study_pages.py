"""Verdicts and exact quantities of the study pages; and the pages are what the results make."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from recipes.reproduce import enumerable, enumerable_verdicts, study_pages
from recipes.reproduce.enumerable import Cell, Task, joint
from recipes.reproduce.enumerable_verdicts import (
    SEEDS,
    STUDIES,
    Interval,
    Results,
    Study,
    alike,
    beta_at,
    more,
)
from recipes.shared.markdown import filled

# 100 numbers of mean 2 and standard deviation 10 sqrt(100/99): half are -8, half 12.
VALUES = torch.tensor([-8.0, 12.0] * 50, dtype=torch.float64)


def test_the_interval_is_students() -> None:
    half = 1.9842 * 10 * math.sqrt(100 / 99) / 10
    found = Interval.of(VALUES)
    assert (found.low, found.mean, found.high) == pytest.approx((2 - half, 2, 2 + half), rel=1e-9)


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.0, "holds"), (-2.0, "not decided"), (-4.0, "fails")]
)
def test_a_side_is_decided_by_the_whole_interval(shift: float, verdict: str) -> None:
    # The interval is 2 +- 1.99.
    found = more("", VALUES + shift + 0.0 * VALUES, torch.zeros(100, dtype=torch.float64))
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("difference", "verdict"), [(0.0, "holds"), (10.0, "not decided"), (20.0, "fails")]
)
def test_alike_is_a_tenth_of_the_larger(difference: float, verdict: str) -> None:
    noise = torch.tensor([-1.0, 1.0] * 50, dtype=torch.float64)
    one = torch.full((100,), 100.0, dtype=torch.float64)
    # Against a mean of 90 to 100: a tenth of the larger is 10.
    assert alike("", one, one - difference + noise).verdict == verdict


def test_beta_is_found_from_the_kl_of_its_optimum() -> None:
    task = Task.drawn(Cell("test", "none", 0.3, tokens=3, symbols=3), seeds=4)
    for beta in (0.05, 0.3, 2.0):
        log_p = task.optimum(beta)
        kl = (log_p.exp() * (log_p - joint(task.ref))).sum(-1)
        expected = torch.full((4,), beta, dtype=torch.float64)
        torch.testing.assert_close(beta_at(task, kl), expected, rtol=1e-6, atol=0)


def test_more_kl_than_any_optimum_has_is_a_beta_of_zero() -> None:
    task = Task.drawn(Cell("test", "none", 0.3, tokens=3, symbols=3), seeds=4)
    most = -(joint(task.ref).exp() * task.reward).sum(-1).log()
    assert (beta_at(task, most + 0.1) == 0).all()
    assert (beta_at(task, most - 0.1) > 0).all()


def test_a_page_without_the_place_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- end -->\nafter\n")
    assert filled(page, {"one": "new"}) == ("before\n<!-- one -->\n\nnew\n\n<!-- end -->\nafter\n")
    with pytest.raises(LookupError, match=r"page\.md has no place for 'two'"):
        filled(page, {"two": "new"})


def test_every_comparison_names_cells_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up ends for every cell each study's comparisons can be made."""
    made = torch.linspace(0.4, 0.6, SEEDS, dtype=torch.float64)
    monkeypatch.setattr(Results, "end", lambda self, cell, name: made)
    monkeypatch.setattr(enumerable_verdicts, "start_of", lambda cell: made)
    monkeypatch.setattr(enumerable.Task, "drawn", classmethod(lambda cls, c, n: small(c)))
    for study, predicted in STUDIES.items():
        found = list(predicted(Study(study, Results())))
        assert found, study
        assert len({c.what for c in found}) == len(found)


def small(cell: Cell) -> Task:
    generator = torch.Generator().manual_seed(0)
    ref = [torch.randn(SEEDS, 2**t, 2, generator=generator, dtype=torch.float64) for t in range(2)]
    reward = torch.zeros(SEEDS, 4, dtype=torch.float64)
    reward[:, 0] = 1
    return Task([level.log_softmax(-1) for level in ref], reward)


def test_the_committed_pages_are_what_the_results_make() -> None:
    for page, text in study_pages.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"run python -m {study_pages.__name__}"
