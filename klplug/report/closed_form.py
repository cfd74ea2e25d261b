"""What the best policies get at each KL, from answers of the reference with their rewards.

``ref exp(r/beta) / Z`` has the highest reward there is at its KL to ref. As beta falls it draws the
frontier. Best of N is what sampling alone gets, its KL at most ``log N - (N-1)/N``.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BETAS = tuple(2.0 ** (-k / 2) for k in range(-10, 15))
"""From 32 down to 1/128, in units of the largest difference between rewards."""


class NoSamples(ValueError):
    """A file that has no answers with rewards, and why."""


@dataclass(frozen=True)
class Point:
    """One policy.

    Attributes:
        kl: to the reference, nats per token; of best of N a bound from above.
        reward: its mean.
        n: of best of N; 0 of a policy on the frontier.
    """

    kl: float
    reward: float
    n: int = 0


@dataclass(frozen=True)
class ClosedForm:
    """The frontier, from the reference on, and best of N.

    Attributes:
        prompts: how many the mean is over.
        answers: to each, the fewest.
    """

    frontier: tuple[Point, ...]
    best_of: tuple[Point, ...]
    prompts: int
    answers: int


@dataclass(frozen=True)
class Answer:
    reward: float
    tokens: float


def closed_form(path: Path) -> ClosedForm:
    """Both, from JSON lines of ``prompt``, ``reward`` and ``tokens``, an answer of the reference.

    A KL per token is the mean KL of an answer over its mean length, both under the policy meant,
    as a token mean over a batch has it.

    Raises:
        NoSamples: a line is none of these, or a prompt has one answer.
        OSError: the file can't be read.
    """
    prompts = list(_answers(path).values())
    rewards = [answer.reward for answers in prompts for answer in answers]
    scale = max(rewards) - min(rewards) or 1.0
    fewest = min(map(len, prompts))
    frontier = [_tilted(prompts, math.inf), *(_tilted(prompts, scale * beta) for beta in BETAS)]
    sizes = [2**k for k in range(fewest.bit_length()) if 2**k <= fewest]
    best_of = tuple(_best_of(prompts, n) for n in sizes)
    return ClosedForm(tuple(frontier), best_of, len(prompts), fewest)


def _answers(path: Path) -> dict[str, list[Answer]]:
    prompts: dict[str, list[Answer]] = defaultdict(list)
    for number, data in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = data.decode()
        except UnicodeDecodeError:
            raise NoSamples(f"{path}, line {number}: not UTF-8") from None
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answer = Answer(float(row["reward"]), float(row["tokens"]))
            prompt = json.dumps(row["prompt"])
        except (ValueError, OverflowError, KeyError, TypeError):
            raise NoSamples(
                f"{path}, line {number}: no answer with prompt, reward and tokens: {line[:80]}"
            ) from None
        if not (math.isfinite(answer.reward) and 0 < answer.tokens < math.inf):
            raise NoSamples(
                f"{path}, line {number}: reward must be finite, and tokens above 0: {line[:80]}"
            )
        prompts[prompt].append(answer)
    if not prompts:
        raise NoSamples(f"{path}: no answers in it")
    alone = next((prompt for prompt, answers in prompts.items() if len(answers) < 2), None)
    if alone is not None:
        raise NoSamples(f"{path}: prompt {alone[:80]} has one answer, and two are the least")
    return prompts


def _tilted(prompts: Sequence[Sequence[Answer]], beta: float) -> Point:
    """Of ``ref exp(r/beta)/Z``: each answer of the reference by its self-normalised weight."""
    kl = reward = tokens = 0.0
    for answers in prompts:
        best = max(answer.reward for answer in answers)
        weights = [math.exp((answer.reward - best) / beta) for answer in answers]
        total = math.fsum(weights)
        for answer, weight in zip(answers, weights, strict=True):
            share = weight / total
            reward += share * answer.reward
            tokens += share * answer.tokens
            kl += share * math.log(share * len(answers)) if share else 0.0
    return Point(kl / tokens, reward / len(prompts))


def _best_of(prompts: Sequence[Sequence[Answer]], n: int) -> Point:
    """The mean over every choice of n of a prompt's answers: of those sorted by reward the i-th is
    the best of ``comb(i, n-1)`` of them."""
    reward = tokens = 0.0
    for answers in prompts:
        ordered = sorted(answers, key=lambda answer: answer.reward)
        choices = math.comb(len(ordered), n)
        for i, answer in enumerate(ordered):
            share = math.comb(i, n - 1) / choices
            reward += share * answer.reward
            tokens += share * answer.tokens
    kl = len(prompts) * (math.log(n) - (n - 1) / n)
    return Point(kl / tokens, reward / len(prompts), n)
