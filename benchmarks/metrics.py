"""What a term's metrics take beside its own forward and backward.

    python -m benchmarks.metrics [--out benchmarks/results]

Seconds of the CPU, of both in turns; the shortest of each counts, for what else a machine does
empties the caches of some rounds.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Operations, peak_bytes
from klplug import KLTerm, aggregate, kl_term

SHAPE = (64, 1024)
ROUNDS = 200
UNIT = 4 * SHAPE[0] * SHAPE[1]  # one float32 tensor of (B, T)
KL_TYPES = (
    *("k1_in_reward", "k2_in_reward", "abs_in_reward", "k1_as_loss", "k2_as_loss", "k3_as_loss"),
    *("k2_as_loss,ratio=none", "k3_as_loss,ratio=none", "k2_as_loss,horizon=sequence"),
    *("k2_as_loss,head=combined", "k2_as_loss,vocab=exact", "k3_in_reward+k3_as_loss"),
)

HEADING = f"""# What the metrics take

`python -m benchmarks.metrics`: {SHAPE[0]} answers of up to {SHAPE[1]} tokens in float32, one thread
of {os.cpu_count()} CPU cores, torch {torch.__version__.partition("+")[0]}. First the time of a
term's forward, `klplug.aggregate` and backward, then that of its metrics over it: of each the
shortest of {ROUNDS} rounds, in seconds of the CPU. Memory is the peak of the whole, without the
metrics and with them, in tensors of the size of the log-probs.

| kl_type | forward and backward, us | metrics, ratio | operations | memory | with metrics |
| --- | --- | --- | --- | --- | --- |"""


def tensors() -> dict[str, Tensor]:
    """A policy near its reference and the one that sampled, and answers of random lengths."""
    draw = torch.Generator().manual_seed(0)
    size, length = SHAPE
    log_probs = -torch.rand(SHAPE, generator=draw)
    made = {
        f"{name}_log_probs": log_probs + 0.3 * torch.randn(SHAPE, generator=draw)
        for name in ("ref", "old")
    }
    made["exact_kl"] = (log_probs - made["ref_log_probs"]).square() / 2
    made["advantages"] = torch.randn(size, 1, generator=draw).expand(SHAPE)
    lengths = torch.randint(length // 4, length + 1, (size, 1), generator=draw)
    made["response_mask"] = torch.arange(length) < lengths
    return made | {"log_probs": log_probs}


def measured(kl_type: str) -> str:
    given = tensors()
    for name in ("log_probs", "exact_kl"):
        given[name].requires_grad_()
    mask = given["response_mask"]

    def term() -> KLTerm:
        return kl_term(kl_type, **given, kl_coef=0.1, clip_range=0.2)

    def step(metrics: bool) -> tuple[float, float]:
        """Seconds of the term, and of its metrics."""
        started = time.thread_time()
        made = term()
        loss = made.loss
        between = time.thread_time()
        if metrics:
            assert made.tally.sums
        after = time.thread_time()
        torch.autograd.grad(aggregate(loss, mask), given["log_probs"])
        return time.thread_time() - after + between - started, after - between

    alone, metrics = (
        min(times) for times in zip(*(step(True) for _ in range(ROUNDS)), strict=True)
    )
    made = term()
    with Operations() as operations:
        assert made.tally.sums
    peaks = [peak_bytes(lambda on=on: step(on)) / UNIT for on in (False, True)]
    return (
        f"| {kl_type} | {alone * 1e6:.0f} | {metrics / alone:.2f} | {operations.count} | "
        f"{peaks[0]:.1f} | {peaks[1]:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n".join([HEADING, *map(measured, KL_TYPES), ""])
    if given.out is None:
        print(text)
    else:
        (given.out / "metrics.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
