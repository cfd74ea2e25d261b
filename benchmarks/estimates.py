"""How well a batch tells its KL: k1, k3 and ``klplug/kl``, near the reference and far from it.

``python -m benchmarks.estimates`` writes ``benchmarks/results/estimates.md``. One token drawn from
a policy whose every probability is known; the error is against the exact KL(pi||ref).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from klplug.numerics import HUGE
from klplug.tally import estimate

RESULT = Path(__file__).parent / "results" / "estimates.md"
SIZES = (256, 4096)
BATCHES = 4000
ESTIMATORS = ("k1", "k3", "kl")


def logits(size: int = 1000) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=draw, dtype=torch.float64) * 2


def moved(scale: float) -> tuple[Tensor, Tensor]:
    """A policy whose logits have moved by normal noise of this size from the reference's."""
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(1000, generator=draw, dtype=torch.float64)
    return (logits() + scale * noise).log_softmax(-1), logits().log_softmax(-1)


def sharpened(temperature: float) -> tuple[Tensor, Tensor]:
    return (logits() / temperature).log_softmax(-1), logits().log_softmax(-1)


def sure(policy: float, reference: float) -> tuple[Tensor, Tensor]:
    pair = torch.tensor([[policy, 1 - policy], [reference, 1 - reference]], dtype=torch.float64)
    log_pi, log_ref = pair.log()
    return log_pi, log_ref


def mixed() -> tuple[Tensor, Tensor]:
    """Four tokens of five where the policy has become sure, the fifth where it has hardly moved."""
    pairs = zip(sure(0.9998, 0.85), moved(0.3), strict=True)
    log_pi, log_ref = (torch.cat([a + math.log(0.8), b + math.log(0.2)]) for a, b in pairs)
    return log_pi, log_ref


# Each case: log pi and log ref over the vocabulary.
CASES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "logits moved by 0.01": lambda: moved(0.01),
    "logits moved by 0.1": lambda: moved(0.1),
    "logits moved by 0.5": lambda: moved(0.5),
    "logits moved by 1": lambda: moved(1.0),
    "flatter, T = 1.5": lambda: sharpened(1.5),
    "flatter, T = 2": lambda: sharpened(2.0),
    "sharpened, T = 0.7": lambda: sharpened(0.7),
    "sharpened, T = 0.5": lambda: sharpened(0.5),
    "sharpened, T = 0.3": lambda: sharpened(0.3),
    "0.999 where ref has 0.7": lambda: sure(0.999, 0.7),
    "0.7 where ref has 0.3": lambda: sure(0.7, 0.3),
    "sure at 4 tokens of 5": mixed,
}


def errors(case: str, size: int, batches: int = BATCHES) -> dict[str, float]:
    """Root mean square error of each estimate over batches of ``size`` tokens, in nats."""
    log_pi, log_ref = CASES[case]()
    exact = (log_pi.exp() * (log_pi - log_ref)).sum()
    draw = torch.Generator().manual_seed(2)
    squares = dict.fromkeys(ESTIMATORS, 0.0)
    for part in torch.ones(batches).split(250):
        sampled = torch.multinomial(
            log_pi.exp(), len(part) * size, replacement=True, generator=draw
        ).view(len(part), size)
        found = estimates((log_pi - log_ref)[sampled])
        for name, values in found.items():
            squares[name] += float((values - exact).square().sum())
    return {name: (total / batches) ** 0.5 for name, total in squares.items()}


def estimates(log_ratio: Tensor) -> dict[str, Tensor]:
    """Of (batches, n) log-ratios, each batch's estimates."""
    growth = torch.expm1(-log_ratio).clamp(max=HUGE)
    k3 = growth + log_ratio
    means = {
        "k1": log_ratio.mean(-1),
        "k3": k3.mean(-1),
        "growth_square": growth.square().mean(-1),
        "k3_growth": (k3 * growth).mean(-1),
        "n": torch.full_like(log_ratio[..., 0], log_ratio.shape[-1]),
    }
    return {"k1": means["k1"], "k3": means["k3"], "kl": estimate(means)}


def table() -> str:
    lines = [
        "# How well a batch tells its KL",
        "",
        f"`python -m benchmarks.estimates`: root mean square error over {BATCHES} batches, nats",
        "per token, against the exact KL(pi‖ref) of one token. The last column is the error of",
        "`klplug/kl` over the smaller of the other two.",
        "",
        "| policy and reference | exact KL | tokens | k1 | k3 | klplug/kl | over the better |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, make in CASES.items():
        log_pi, log_ref = make()
        exact = float((log_pi.exp() * (log_pi - log_ref)).sum())
        for size in SIZES:
            e = errors(case, size)
            ratio = e["kl"] / min(e["k1"], e["k3"])
            lines.append(
                f"| {case} | {exact:.3g} | {size} | {e['k1']:.2e} | {e['k3']:.2e} | "
                f"{e['kl']:.2e} | {ratio:.2f} |"
            )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    RESULT.write_text(table(), encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))
