"""What a leave-one-out baseline does to the variance of a KL's gradient: exact, by enumeration.

    python -m benchmarks.variance [--out benchmarks/results]

Every group of N answers to one prompt is enumerated with its probability, so that mean and
variance of the gradient estimate carry no sampling noise.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from klplug import kl_term
from tests.core.enumeration import Problem

KL_TYPE = "k2_as_loss,horizon=sequence,cap=none"
GROUPS = (2, 3, 4)
PROBLEMS = {
    "5 outcomes, one token": Problem(vocabulary=5, length=1, seed=3),
    "3 outcomes, two tokens": Problem(vocabulary=3, length=2, seed=3),
    "3 outcomes, up to three tokens": Problem(vocabulary=3, length=3, stops=True, seed=2),
}
# The reference as a power of the policy, token by token: near it, flat, and turned around.
POWERS = (0.85, 0.0, -1.0)

HEADING = """# Baselines on the KL return

`python -m benchmarks.variance`: variance of the gradient estimate of `k2_as_loss,horizon=sequence`
with `baseline=group`, as a share of that without, exact by enumeration of all groups of N answers.
Below 1 the baseline helps: where the KL return has a large mean against its spread, and that is not
spent on tokens that hardly move. Most often it does not; measure before you set it."""


def against(made: Problem, power: float) -> Problem:
    """The problem with ``pi^power``, normalised token by token, as its reference."""
    changed = copy.copy(made)
    changed.ref_logits = power * made.policy().detach()
    return changed


def scores(made: Problem) -> Tensor:
    """grad log pi of each token of each answer, (answers, length, parameters)."""

    def log_probs(theta: Tensor) -> Tensor:
        return made.log_probs((made.features @ theta).log_softmax(-1))

    return torch.autograd.functional.jacobian(log_probs, made.theta.detach())


@dataclass(frozen=True)
class Moments:
    mean: Tensor
    variance: float  # trace of the covariance


def moments(made: Problem, size: int, baseline: str, behaviour: Tensor) -> Moments:
    """Of the mean over a group of ``size`` answers of the term's gradient."""
    answers = range(len(made.answers))
    groups = torch.tensor(list(itertools.product(answers, repeat=size)))
    probability = made.answer_probability(behaviour).detach()[groups].prod(-1)
    rows = groups.flatten()
    term = kl_term(
        f"{KL_TYPE},baseline={baseline}",
        made.log_probs(made.policy()).detach()[rows],
        made.log_probs(made.ref())[rows],
        made.mask[rows],
        old_log_probs=made.log_probs(behaviour)[rows],
        group_ids=torch.arange(len(groups)).repeat_interleave(size),
    )
    per_answer = torch.einsum("rt,rtd->rd", term.weight * term.coefficient, scores(made)[rows])
    estimate = per_answer.view(len(groups), size, -1).mean(1)
    mean = probability @ estimate
    return Moments(mean, float(probability @ (estimate - mean).square().sum(-1)))


def spread(made: Problem, behaviour: Tensor) -> float:
    """(std/mean)^2 of the whole answer's KL return."""
    log_ratio = made.log_probs(made.policy()) - made.log_probs(made.ref())
    weight = (made.log_probs(made.policy()) - made.log_probs(behaviour)).cumsum(-1).exp()
    returns = (weight * log_ratio * made.mask).sum(-1).detach()
    probability = made.answer_probability(behaviour).detach()
    mean = probability @ returns
    return float(probability @ (returns - mean).square() / mean.square())


def table() -> str:
    header = ["problem", "reference", "answers from", "(std/mean)^2", *(f"N = {n}" for n in GROUPS)]
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    for (name, drawn), power in itertools.product(PROBLEMS.items(), POWERS):
        made = against(drawn, power)
        for source, behaviour in (("pi", made.policy().detach()), ("old", made.old())):
            cells = [name, f"pi^{power:g}", source, f"{spread(made, behaviour):.2f}"]
            for size in GROUPS:
                with_it, without = (
                    moments(made, size, baseline, behaviour) for baseline in ("group", "none")
                )
                torch.testing.assert_close(with_it.mean, without.mean, rtol=1e-9, atol=1e-12)
                cells.append(f"{with_it.variance / without.variance:.2f}")
            lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    text = table()
    (out / "variance.md").write_text(f"{HEADING}\n\n{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
