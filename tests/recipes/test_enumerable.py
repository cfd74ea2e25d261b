"""The enumerable task: its exact quantities against loops, its fixed points against autograd."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recipes.reproduce import enumerable
from recipes.reproduce.enumerable import (
    GRID,
    GROUP,
    Cell,
    Task,
    advantages,
    forward_step,
    joint,
    reverse_step,
    run,
    token_log_probs,
)

SMALL = Cell("test", "none", 0.4, tokens=3, symbols=3)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.drawn(SMALL, seeds=2)


def test_answers_are_numbered_first_token_first(task: Task) -> None:
    log_p = joint(task.ref)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2).double())
    for number, tokens in enumerate(itertools.product(range(3), repeat=3)):
        per_token = token_log_probs(task.ref, torch.full((2, 1), number))[:, 0]
        for seed in range(2):
            prefix, expected = 0, []
            for level, token in zip(task.ref, tokens, strict=True):
                expected.append(float(level[seed, prefix, token]))
                prefix = 3 * prefix + token
            assert per_token[seed].tolist() == pytest.approx(expected, rel=1e-12)
            assert float(log_p[seed, number]) == pytest.approx(sum(expected), rel=1e-12)


def test_good_answers_have_the_share(task: Task) -> None:
    mass = joint(task.ref).exp()
    good = (mass * task.reward).sum(-1)
    assert set(task.reward.unique().tolist()) == {0.0, 1.0}
    assert (good >= SMALL.share).all()
    # Without the last one drawn they had less; the largest answer bounds how much too many it is.
    assert (good < SMALL.share + mass.amax(-1)).all()


def test_leave_one_out_compares_with_the_others() -> None:
    reward = torch.arange(2.0 * GROUP).double()[None] ** 2
    found = advantages(reward, "leave-one-out")[0]
    for i in range(2 * GROUP):
        group = range(i // GROUP * GROUP, (i // GROUP + 1) * GROUP)
        others = [float(reward[0, j]) for j in group if j != i]
        assert float(found[i]) == pytest.approx(float(reward[0, i]) - sum(others) / len(others))
    by_std = advantages(reward, "std").view(2, GROUP)
    torch.testing.assert_close(by_std.mean(-1), torch.zeros(2).double())
    torch.testing.assert_close(by_std.std(-1), torch.ones(2).double(), rtol=1e-6, atol=0)


def tangent(log_p: Tensor, objective: Tensor) -> Tensor:
    """The gradient of ``objective(p)`` along the simplex, at a softmax of ``log_p``."""
    (gradient,) = torch.autograd.grad(objective, log_p)
    return gradient - log_p.exp() * gradient.sum(-1, keepdim=True)


@pytest.mark.parametrize(("step", "forward"), [(reverse_step, False), (forward_step, True)])
def test_own_token_fixed_points_are_stationary(task: Task, step: object, forward: bool) -> None:
    """At every prefix: no gradient of E[r of what follows] - beta KL, tokens after it as they are.

    The value of what follows is summed here over whole answers, not by the recursion.
    """
    beta = SMALL.beta
    found = task.myopic(step(beta))  # type: ignore[operator]
    p = found.exp()
    tokens = torch.tensor(list(itertools.product(range(3), repeat=3)))
    for depth in range(3):
        for prefix in itertools.product(range(3), repeat=depth):
            inside = (tokens[:, :depth] == torch.tensor(prefix)).all(-1)
            mass = torch.stack(
                [p[:, inside & (tokens[:, depth] == v)].sum(-1) for v in range(3)], 1
            )
            earned = torch.stack(
                [(p * task.reward)[:, inside & (tokens[:, depth] == v)].sum(-1) for v in range(3)],
                1,
            )
            log_p = (mass / mass.sum(-1, keepdim=True)).log().requires_grad_()
            number = sum(token * 3 ** (depth - 1 - i) for i, token in enumerate(prefix))
            ref = task.ref[depth][:, number]
            q = log_p.softmax(-1)
            kl = (ref.exp() * (ref - q.log())) if forward else q * (q.log() - ref)
            objective = (q * (earned / mass) - beta * kl).sum()
            (gradient,) = torch.autograd.grad(objective, log_p)
            assert gradient.abs().max() < 1e-9


def test_whole_answers_fixed_point_is_the_best(task: Task) -> None:
    """No policy nearby, and not the myopic one, has more of E[r] - beta KL."""
    log_ref = joint(task.ref)

    def objective(log_p: Tensor) -> Tensor:
        p = log_p.exp()
        return (p * (task.reward - SMALL.beta * (log_p - log_ref))).sum(-1)

    best = task.optimum(SMALL.beta)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = 0.1 * torch.randn(best.shape, generator=generator, dtype=torch.float64)
        assert (objective((best + noise).log_softmax(-1)) < objective(best)).all()
    assert (objective(task.myopic(reverse_step(SMALL.beta))) < objective(best) - 1e-3).all()


def test_training_goes_where_the_formulation_says() -> None:
    """Two formulations on one task end at their own fixed points, and at no other's."""
    end, size = {}, {"tokens": 3, "symbols": 3}
    for kl_type in ("k2_as_loss,horizon=sequence", "k3_as_loss", "none"):
        cell = Cell("test", kl_type, 0.4, total_updates=512, rate=4.0, decay=True, **size)
        values = run(cell, seeds=4)["end"]
        assert isinstance(values, dict)
        end[kl_type] = {name: sum(map(float, x)) / 4 for name, x in values.items()}
    whole, forward, free = end.values()
    assert whole["to_optimum"] < forward["to_optimum"] / 3
    assert forward["to_forward"] < whole["to_forward"] / 3
    assert free["reward"] > 0.98 and free["to_optimum"] > 10 * whole["to_optimum"]


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "results.jsonl"
    small = [
        Cell("a", kl_type, 0.3, tokens=2, symbols=2, total_updates=8)
        for kl_type in ("none", "k2_as_loss")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enumerable, "GRID", small)
        enumerable.main(["--seeds", "2", "--out", str(out)])
        first, second = out.read_text().splitlines()
        out.write_text(first + "\n" + second[:40])  # killed while it wrote
        enumerable.main(["--seeds", "2", "--out", str(out)])
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(again) == 2
    expected = json.loads(second)
    assert {**again[1], "process_seconds": 0} == {**expected, "process_seconds": 0}
    assert again[1]["end"]["kl"] != again[0]["end"]["kl"]


def test_a_seed_that_diverged_is_in_its_line() -> None:
    assert enumerable._rounded(math.inf) == "inf"
    assert enumerable._rounded(math.nan) == "nan"


def test_every_cell_is_there_once() -> None:
    assert len(set(GRID)) == len(GRID)
    assert all(cell.total_updates % cell.updates == 0 for cell in GRID)
