"""Sampled GRPO where everything can be enumerated: how far from ref exp(r/beta)/Z does it stay?

A policy is a table: one row of logits for each prefix of an answer. An answer has `tokens` tokens
over `symbols` symbols. It is trained as a language model is, on sampled groups of answers. It has
PPO's clip and several updates per rollout, through klplug's own `kl_term` and `policy_loss`. What
is *measured* is exact: every answer's probability is known.

A batch of seeds is one tensor. Each seed has its own reference, its own good answers and its own
samples. Nothing couples them but the learning rate.

    python -m recipes.reproduce.enumerable [--only closed] [--seeds 100]

The hypotheses are in `HYPOTHESES-enumerable.md`; the results, a line for each cell
of `GRID`, in `results/enumerable.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import klplug
from klplug import kl_term, parse, policy_loss, reward_to_go
from recipes.reproduce.stock_kl import STOCK

RESULTS = Path(__file__).parent / "results" / "enumerable.jsonl"
GROUP = 16  # answers to one prompt that are compared with each other
GROUPS = 4  # of them in a rollout
NO_CLIP = 1e6
DRAWN = ("reward", "kl", "to_optimum", "to_myopic", "to_forward")
SPREAD = 1.0  # standard deviation of the reference's logits

Levels = list[Tensor]
"""Conditional log-probabilities by depth t: (seeds, symbols^t prefixes, symbols)."""


@dataclass(frozen=True)
class Cell:
    """One formulation under one setting, trained with every seed."""

    study: str
    kl_type: str  # klplug's, or a name of STOCK
    beta: float
    updates: int = 4  # per rollout
    tokens: int = 4
    symbols: int = 4
    share: float = 0.1  # of the reference's mass that the good answers have
    advantage: str = "leave-one-out"  # r less the others' mean, or "std": GRPO's own
    start: float = 0.0  # how far, in logits, the start is from the reference
    spike: float = 1.0  # what the first rollout's learning rate is multiplied by
    clip: float = 0.2  # of the policy loss; NO_CLIP for none
    reward: bool = True  # without one only the KL pulls
    total_updates: int = 2048
    rate: float = 2.0
    decay: bool = False  # the learning rate, linearly to 0

    @property
    def rollouts(self) -> int:
        return self.total_updates // self.updates


def joint(levels: Levels) -> Tensor:
    """Log-probability of every answer: (seeds, symbols^tokens), first token most significant."""
    total = levels[0].new_zeros(levels[0].shape[0], 1)
    for level in levels:
        total = (total.unsqueeze(-1) + level).flatten(1)
    return total


def token_log_probs(levels: Levels, answers: Tensor) -> Tensor:
    """Of sampled answers, by their number: (seeds, answers) to (seeds, answers, tokens)."""
    tokens, symbols = len(levels), levels[0].shape[-1]
    return torch.stack(
        [
            level.flatten(1).gather(1, answers // symbols ** (tokens - 1 - t))
            for t, level in enumerate(levels)
        ],
        -1,
    )


@dataclass(frozen=True)
class Task:
    """References and rewards of all seeds, and where each formulation should end."""

    ref: Levels
    reward: Tensor  # (seeds, symbols^tokens), 0 or 1

    @classmethod
    def drawn(cls, cell: Cell, seeds: int) -> Task:
        """References from random logits; good answers drawn until they have ``share`` of the mass.

        The draw knows the size of the answers and the share, and nothing of the formulation.
        """
        generator = torch.Generator().manual_seed(cell.tokens * 1000 + cell.symbols)
        ref = [
            (
                SPREAD
                * torch.randn(
                    seeds, cell.symbols**t, cell.symbols, generator=generator, dtype=torch.float64
                )
            ).log_softmax(-1)
            for t in range(cell.tokens)
        ]
        mass = joint(ref).exp()
        order = torch.rand(mass.shape, generator=generator, dtype=torch.float64).argsort(-1)
        drawn = mass.gather(1, order).cumsum(-1)
        # The first that reaches the share is in: at least one answer is good.
        good = (drawn - mass.gather(1, order) < cell.share).double()
        return cls(ref, torch.zeros_like(mass).scatter(1, order, good))

    def optimum(self, beta: float | Tensor) -> Tensor:
        """log ref exp(r/beta)/Z over answers."""
        return (joint(self.ref) + self.reward / beta).log_softmax(-1)

    def myopic(self, step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Where an own-token penalty leads: each token's best reply to the tokens after it.

        ``step(log_ref, value)`` is one token's fixed point, its actions worth ``value``.
        """
        value, levels = self.reward, []
        for ref in reversed(self.ref):
            level = step(ref, value.view_as(ref))
            value = (level.exp() * value.view_as(ref)).sum(-1)
            levels.append(level)
        return joint(levels[::-1])


def reverse_step(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ref, value: (ref + value / beta).log_softmax(-1)


def forward_step(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``beta ref / (x - r)``, x above the largest r so that it sums to 1: by bisection."""

    def step(ref: Tensor, value: Tensor) -> Tensor:
        top = value.amax(-1, keepdim=True)
        low, high = top.clone(), top + beta
        for _ in range(80):
            middle = (low + high) / 2
            above = (beta * ref.exp() / (middle - value)).sum(-1, keepdim=True) > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (beta * ref.exp() / (high - value)).log().log_softmax(-1)

    return step


def advantages(reward: Tensor, kind: str) -> Tensor:
    """GRPO's, per answer: (seeds, answers), the answers in groups of ``GROUP``.

    ``leave-one-out``: less the mean of the *others*, so that the optimum is exactly that of beta.
    ``std``: less the group's mean, over its standard deviation, as both hosts have it.
    """
    groups = reward.unflatten(1, (-1, GROUP))
    centred = groups - groups.mean(-1, keepdim=True)
    if kind == "std":
        return (centred / (groups.std(-1, keepdim=True) + 1e-6)).flatten(1)
    return (centred * GROUP / (GROUP - 1)).flatten(1)


def train(cell: Cell, seeds: int) -> Iterator[tuple[int, int, Levels]]:
    """Yields (rollout, update within it, policy) before each update, and once at the end."""
    task = Task.drawn(cell, seeds)
    generator = torch.Generator().manual_seed(1)
    logits = [ref.clone() for ref in task.ref]
    if cell.start:
        for level in logits:
            level += cell.start * torch.randn(level.shape, generator=generator, dtype=torch.float64)
    stock = STOCK.get(cell.kl_type)
    spec = parse("none" if stock else cell.kl_type)
    in_reward, as_loss = spec.placed("in_reward"), spec.placed("as_loss")
    inside_norm = any(term.reward_norm == "group" for term in in_reward.terms)
    size = GROUP * GROUPS
    mask = torch.ones(seeds * size, cell.tokens)

    def flat(levels: Levels, answers: Tensor) -> Tensor:
        return token_log_probs(levels, answers).flatten(0, 1)

    for rollout in range(cell.rollouts):
        old_levels = [level.log_softmax(-1) for level in logits]
        answers = torch.multinomial(
            joint(old_levels).exp(), size, replacement=True, generator=generator
        )
        old, ref = flat(old_levels, answers), flat(task.ref, answers)
        reward = task.reward.gather(1, answers) * float(cell.reward)
        penalty = torch.zeros_like(old)
        if in_reward.terms:
            penalty = cell.beta * kl_term(in_reward, old, ref, mask).coefficient
        if inside_norm:
            # verl's order: the KL is subtracted first, and divided by the group's spread with it.
            reward = reward - penalty.sum(-1).view_as(reward)
        advantage = advantages(reward, cell.advantage).view(-1, 1).expand_as(old)
        if not inside_norm:
            advantage = advantage - reward_to_go(penalty)
        rate = cell.rate * (cell.spike if rollout == 0 else 1.0)
        if cell.decay:
            rate *= 1 - rollout / cell.rollouts
        for update in range(cell.updates):
            for level in logits:
                level.requires_grad_()
            current = [level.log_softmax(-1) for level in logits]
            yield rollout, update, [level.detach() for level in current]
            log_probs = flat(current, answers)
            loss = policy_loss(
                as_loss,
                log_probs,
                ref,
                mask,
                old_log_probs=old,
                advantages=advantage,
                kl_coef=cell.beta,
                clip_range=cell.clip,
            )
            if stock is not None:
                loss = loss + cell.beta * stock(log_probs, ref)
            # Tokens are summed, answers averaged; the sum over seeds couples nothing.
            gradients = torch.autograd.grad(loss.sum() / size, logits)
            with torch.no_grad():
                logits = [
                    level - rate * gradient
                    for level, gradient in zip(logits, gradients, strict=True)
                ]
                # A constant moves no policy; without it a run that diverges stays a number.
                logits = [level - level.amax(-1, keepdim=True) for level in logits]
    yield cell.rollouts, 0, [level.log_softmax(-1) for level in logits]


def ends(task: Task, beta: float) -> dict[str, Tensor]:
    """log-probabilities of answers under the policies that theory names, by what is measured."""
    return {
        "to_optimum": task.optimum(beta),
        "to_myopic": task.myopic(reverse_step(beta)),
        "to_forward": task.myopic(forward_step(beta)),
    }


def measured(task: Task, levels: Levels, others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Exact, one number for each seed; KLs and the entropy in nats per answer."""
    log_p, log_ref = joint(levels), joint(task.ref)
    p = log_p.exp()
    # 1 - (1 - p)^16, with the digits of a small p.
    found = -torch.expm1(16 * torch.log1p(-p.clamp(max=1 - 1e-15)))
    return {
        "reward": (p * task.reward).sum(-1),
        "kl": (p * (log_p - log_ref)).sum(-1),
        "kl_forward": (log_ref.exp() * (log_ref - log_p)).sum(-1),
        "entropy": -(p * log_p).sum(-1),
        **{name: (p * (log_p - other)).sum(-1) for name, other in others.items()},
        "good_in_16": (task.reward * found).sum(-1),
        "lowest": log_p.amin(-1),
    }


def run(cell: Cell, seeds: int) -> dict[str, object]:
    """The cell's line: curves over updates as quartiles of seeds, the end as one number a seed.

    The end is the mean over the last eighth of the updates, where noise and cycles are averaged.
    """
    started = time.process_time()
    task = Task.drawn(cell, seeds)
    others = ends(task, cell.beta)
    every = max(1, cell.total_updates // 64)
    tail = cell.total_updates - cell.total_updates // 8
    curve: dict[str, list[list[float]]] = {}
    at: list[int] = []
    kept: list[dict[str, Tensor]] = []
    starts, spans, within = [], [], []
    for rollout, update, levels in train(cell, seeds):
        step = rollout * cell.updates + update
        last = step == cell.total_updates
        if step % every == 0 or last or step <= 8:
            values = measured(task, levels, others)
            at.append(step)
            for name, value in values.items():
                quartiles = value.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=value.dtype))
                curve.setdefault(name, []).append([_rounded(x) for x in quartiles.tolist()])
            if step >= tail:
                kept.append(values)
        if step >= tail and not last:
            p = joint(levels)
            kl = (p.exp() * (p - joint(task.ref))).sum(-1)
            if update == 0:
                starts.append(kl)
                if within:
                    spans.append(torch.stack(within).amax(0) - torch.stack(within).amin(0))
                within = []
            within.append(kl)
    end = {name: torch.stack([k[name] for k in kept]).mean(0) for name in kept[0]}
    end["swing_between"] = torch.stack(starts).std(0) if len(starts) > 1 else torch.zeros(seeds)
    end["swing_within"] = torch.stack(spans).mean(0) if spans else torch.zeros(seeds)
    return {
        **dataclasses.asdict(cell),
        "seeds": seeds,
        "klplug": klplug.__version__,
        "torch": torch.__version__.partition("+")[0],
        "process_seconds": round(time.process_time() - started, 1),
        # What is drawn, of the study that is drawn: all curves would be most of the file.
        "at": at if cell.study == "closed" else [],
        "curve": {name: curve[name] for name in DRAWN} if cell.study == "closed" else {},
        "end": {name: [_rounded(x) for x in value.tolist()] for name, value in end.items()},
    }


def _rounded(x: float) -> float | str:
    # JSON has no inf and no nan: a seed that diverged says so in words.
    return float(f"{x:.4g}") if math.isfinite(x) else str(x)


K1 = "k1_as_loss,ratio=none"
OWN, UNCORRECTED, WHOLE = "k2_as_loss", "k2_as_loss,ratio=none", "k2_as_loss,horizon=sequence"
BOUNDED, CLAMPED = "k2_as_loss,bound=2", ("stock:verl:k3", "stock:openrlhf:k2")

SHORT = {"total_updates": 1024, "rate": 4.0}


def cells() -> Iterator[Cell]:
    in_reward = ("k3_in_reward", "k2_in_reward", "k1_in_reward")
    for form in ("none", K1, "stock:verl:k3", *in_reward, OWN, WHOLE, "k3_as_loss"):
        yield Cell("closed", form, 0.3, total_updates=4096, rate=4.0, decay=True)
    for n in (1, 4, 16):
        for form in ("none", K1, "k1_as_loss", OWN):
            yield Cell("a", form, 0.3, updates=n)
    for beta in (0.1, 0.3):
        for form in ("none", *in_reward):
            yield Cell("b", form, beta, **SHORT)
    for tokens, symbols in ((1, 32), (4, 4)):
        for share in (0.02, 0.8):
            for beta in (0.1, 0.3, 0.6):
                for form in (OWN, "k3_as_loss", *(["stock:verl:k3"] if beta == 0.3 else [])):
                    yield Cell(
                        "c", form, beta, share=share, tokens=tokens, symbols=symbols, **SHORT
                    )
    for tokens in (2, 4, 8):
        for beta in (0.1, 0.3):
            for form in (OWN, WHOLE, *(["k1_in_reward"] if beta == 0.3 else [])):
                yield Cell("d", form, beta, symbols=2, tokens=tokens, **SHORT)
    for n in (1, 4, 16, 64):
        for form in (OWN, UNCORRECTED, "k1_in_reward"):
            yield Cell("e", form, 0.3, updates=n)
    for form in (*CLAMPED, "stock:openrlhf:k3", OWN, BOUNDED, "k3_as_loss"):
        yield Cell("f", form, 0.3, start=3.0, reward=False, **SHORT)
    for form in (*CLAMPED, OWN, BOUNDED):
        yield Cell("f", form, 0.3, spike=100.0, **SHORT)
    for beta in (0.1, 0.2, 0.4):
        for form in (OWN, WHOLE, "k1_in_reward", "stock:verl:k3", "k3_in_reward"):
            yield Cell("g", form, beta, **SHORT)
    for share in (0.05, 0.5):
        for beta in (0.1, 0.3):
            for form in ("k1_in_reward", "k1_in_reward,reward_norm=group"):
                yield Cell("h", form, beta, share=share, advantage="std", **SHORT)
    for clip in (0.2, NO_CLIP):
        for form in (OWN, f"{OWN},head=combined", WHOLE, f"{WHOLE},head=combined", "k1_in_reward"):
            for tokens in (2, 4):
                yield Cell("clip", form, 0.3, symbols=2, tokens=tokens, clip=clip, **SHORT)


GRID = list(cells())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    studies = list(dict.fromkeys(cell.study for cell in GRID))
    parser.add_argument("--only", choices=studies, action="append", help="a study; all by default")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    if given.seeds < 1:
        parser.error(f"--seeds is {given.seeds}; at least 1 is needed")
    torch.set_num_threads(1)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    done = {key(json.loads(line)) for line in whole_lines(given.out)}
    wanted = [cell for cell in GRID if given.only is None or cell.study in given.only]
    for i, cell in enumerate(wanted):
        if key({**dataclasses.asdict(cell), "seeds": given.seeds}) in done:
            continue
        line = run(cell, given.seeds)
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        done.add(key(line))
        done_in = f"{line['process_seconds']} s"
        print(f"{i + 1}/{len(wanted)} {cell.study} {cell.kl_type}: {done_in}", flush=True)


def whole_lines(path: Path) -> list[str]:
    """A last line that was not finished is cut off: what comes next would follow it."""
    if not path.exists():
        return []
    *lines, torn = path.read_text("utf-8").split("\n")
    if torn:
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return lines


def key(line: dict[str, object]) -> tuple[object, ...]:
    """What a run depends on: a cell of two studies is run once."""
    fields = [field for field in dataclasses.fields(Cell) if field.name != "study"]
    # A field that came later has its default in earlier lines.
    return (*(line.get(field.name, field.default) for field in fields), line["seeds"])


if __name__ == "__main__":
    main()
