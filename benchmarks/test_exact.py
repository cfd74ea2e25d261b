"""The exact KL beside what else computes it: the same tensors, one process, taking turns.

    KLPLUG_TEST_HOSTS= .venv-openrlhf/bin/python -m pytest -q -s benchmarks/test_exact.py

Peers (TRL, Liger) are in no lock: `pip download --no-deps trl==1.16.0 liger-kernel==0.8.5`, unpack,
and name the folder in KLPLUG_PEERS. Without it they are left out. Time is what the thread itself
spent, on a CPU; a step is forward, per-token weights and backward. SMALL=1 is a rehearsal.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import DEVICE, peak_bytes, seconds
from klplug import exact, exact_kl

PEERS = os.environ.get("KLPLUG_PEERS")
if PEERS:
    sys.path.append(PEERS)

Results = tuple[Tensor, Tensor, Tensor]


@dataclass
class Problem:
    """Hidden states of a policy that has drifted a little, over the reference's output matrix."""

    tokens: int
    vocabulary: int
    width: int
    dtype: torch.dtype
    trained: bool
    results: int  # kl alone, or kl, entropy and log_probs
    tensors: list[Tensor] = field(init=False)
    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn((self.tokens, self.width), generator=draw)
        ref_hidden = hidden + 0.1 * torch.randn((self.tokens, self.width), generator=draw)
        matrix = torch.randn((self.vocabulary, self.width), generator=draw).mul_(
            2 / self.width**0.5
        )
        targets = torch.randint(self.vocabulary, (self.tokens,), generator=draw)
        hidden, ref_hidden, matrix = (
            x.to(DEVICE, self.dtype) for x in (hidden, ref_hidden, matrix)
        )
        hidden.requires_grad_()
        # The reference shares the matrix: it is the initial policy, and memory is for logits.
        trained = matrix.clone().requires_grad_() if self.trained else matrix
        self.tensors = [hidden, trained, ref_hidden, matrix, targets.to(DEVICE)]
        self.weights = torch.rand((3, self.tokens), generator=draw).to(DEVICE)

    def step(self, function: Callable[..., Any]) -> Callable[[], tuple[Tensor, ...]]:
        """A step of it, which gives the gradients: they must agree."""
        leaves = [x for x in self.tensors if x.requires_grad]

        def run() -> tuple[Tensor, ...]:
            found = function(*self.tensors)
            if isinstance(found, Tensor):
                loss = found
            else:
                used = zip(self.weights[: self.results], found, strict=False)
                loss = sum(((w * x).sum() for w, x in used), start=torch.zeros((), device=DEVICE))
            return torch.autograd.grad(loss, leaves)

        return run


def naive(h: Tensor, weight: Tensor, ref_h: Tensor, ref_weight: Tensor, y: Tensor) -> Results:
    """Both matrices of logits, in float32 as every host makes them."""
    log_p = (h @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (ref_h @ ref_weight.T).float().log_softmax(-1)
    p = log_p.exp()
    kl, entropy = (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)
    return kl, entropy, log_p.gather(-1, y[:, None])[:, 0]


def trl(h: Tensor, weight: Tensor, ref_h: Tensor, ref_weight: Tensor, y: Tensor) -> Results:
    """TRL's divergence, whose entropy has no gradient, and its log-probs with their entropy."""
    from trl.kernels import chunked_divergence, chunked_logprob

    kl, _ = chunked_divergence.ChunkedDivergenceFunction.apply(
        h, weight, None, ref_h, ref_weight, None, 1.0
    )
    log_probs, entropy, *_ = chunked_logprob.ChunkedLogProbFunction.apply(
        h, weight, None, y, 1.0, chunked_divergence.VOCAB_CHUNK_SIZE, None, 1.0, ("entropy",)
    )
    return kl, entropy, log_probs


def trl_kl(h: Tensor, weight: Tensor, ref_h: Tensor, ref_weight: Tensor, y: Tensor) -> Any:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(h, weight, None, ref_h, ref_weight, None, 1.0)


def liger_mean(h: Tensor, weight: Tensor, ref_h: Tensor, ref_weight: Tensor, y: Tensor) -> Tensor:
    """Liger's plain-torch fused linear JSD at beta 1: a mean of KL(pi||ref) and nothing else."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=False)
    return loss(h, weight, ref_h, ref_weight, y)


def klplug_mean(h: Tensor, weight: Tensor, ref_h: Tensor, ref_weight: Tensor, y: Tensor) -> Tensor:
    return exact_kl(h, weight, ref_h, ref_weight, y).kl.mean()


def naive_mean(h: Tensor, weight: Tensor, ref_h: Tensor, ref_weight: Tensor, y: Tensor) -> Tensor:
    return naive(h, weight, ref_h, ref_weight, y)[0].mean()


# What is asked for: whether the output matrix is trained, how many results, and who can do it.
TASKS: dict[str, tuple[bool, int, dict[str, Callable[..., Any]]]] = {
    "all three, matrix trained": (True, 3, {"naive": naive, "klplug": exact_kl, "TRL": trl}),
    "kl alone, matrix trained": (True, 1, {"naive": naive, "klplug": exact_kl, "TRL": trl_kl}),
    "all three, matrix frozen": (False, 3, {"naive": naive, "klplug": exact_kl, "TRL": trl}),
    "kl alone, matrix frozen": (False, 1, {"naive": naive, "klplug": exact_kl, "TRL": trl_kl}),
    "mean of kl, matrix trained": (
        True,
        1,
        {"naive": naive_mean, "klplug": klplug_mean, "Liger": liger_mean},
    ),
}
# Tokens, vocabulary, hidden size, dtype, rounds. Time is linear in tokens: a wide matrix gets few.
SHAPES = [
    (1024, 32_000, 512, torch.float32, 3),
    (1024, 32_000, 512, torch.bfloat16, 3),
    (1024, 152_064, 512, torch.float32, 1),
    (8192, 32_000, 512, torch.float32, 1),
    (256, 152_064, 2048, torch.float32, 1),
    (1024, 32_000, 2048, torch.float32, 1),
]
if DEVICE == "cuda":
    SHAPES = [
        (1024, 152_064, 2048, torch.bfloat16, 5),
        (8192, 32_000, 2048, torch.bfloat16, 5),
        (8192, 152_064, 2048, torch.bfloat16, 3),  # of which naive takes 31 GB
    ]
if os.environ.get("SMALL"):
    SHAPES = [(512, 8000, 64, torch.float32, 1)]
TASKS_OF_LARGE = ("all three, matrix trained", "kl alone, matrix frozen")


def wide_copy(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.detach().float().requires_grad_(x.requires_grad)


def spent(function: Callable[[], object]) -> float:
    if DEVICE == "cuda":
        return seconds(function)
    started = time.thread_time()
    function()
    return time.thread_time() - started


@pytest.fixture(scope="module")
def lines() -> Any:
    found: list[str] = []
    yield found
    print("\n".join(["", HEADING, *found]))


HEADING = """\
| task | N, V, H, dtype | who | seconds | over naive | products | peak MiB | over naive | error |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def products(who: str, trained: bool, results: int) -> int | None:
    """Of N V H multiplications each, in a step: two in the forward, the others in the backward."""
    if who == "naive":
        return 4 if trained else 3
    if who != "klplug":
        return None
    if trained:
        return 6  # both logits again
    return 3 if results == 1 else 5  # nothing again, or the policy's logits


CASES = [
    (task, *shape) for shape in SHAPES for task in (TASKS if shape[-1] > 1 else TASKS_OF_LARGE)
]


@pytest.mark.parametrize(("task", "tokens", "vocabulary", "width", "dtype", "rounds"), CASES)
def test_exact(
    lines: list[str],
    task: str,
    tokens: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    rounds: int,
) -> None:
    trained, results, functions = TASKS[task]
    problem = Problem(tokens, vocabulary, width, dtype, trained, results)
    steps = {
        who: problem.step(function)
        for who, function in functions.items()
        if PEERS or who in ("naive", "klplug")
    }
    times: dict[str, list[float]] = {who: [] for who in steps}
    memory: dict[str, int] = {}
    errors: dict[str, float] = {}
    expected: tuple[Tensor, ...] = ()
    if dtype != torch.float32:
        # Of the same numbers, with no rounding on the way.
        wide = replace(problem, dtype=torch.float32)
        wide.tensors = [wide_copy(x) for x in problem.tensors]
        expected = wide.step(functions["naive"])()

    def run(who: str, found: list[tuple[Tensor, ...]]) -> None:
        times[who].append(spent(lambda: found.append(steps[who]())))

    if DEVICE == "cuda":  # kernels are compiled, and matrix products choose theirs
        for step in steps.values():
            step()
    for _ in range(rounds):
        for who in steps:
            found: list[tuple[Tensor, ...]] = []
            if who in memory:
                run(who, found)
            else:
                memory[who] = peak_bytes(lambda who=who, found=found: run(who, found))
            expected = expected or found[0]
            pairs = zip(found[0], expected, strict=True)
            errors[who] = max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
            # Halves are summed up in more: what is left is the rounding of the gradient itself.
            limit = 1e-4 if dtype == torch.float32 else 0.01
            assert who != "klplug" or errors[who] < limit, errors
    h, matrix = (x.detach() for x in problem.tensors[:2])
    product = min(spent(lambda: h @ matrix.T) for _ in range(3))
    shape = f"{tokens}, {vocabulary}, {width}, {str(dtype).removeprefix('torch.')}"
    for who, seen in times.items():
        ratios = [mine / theirs for mine, theirs in zip(seen, times["naive"], strict=True)]
        count, middle = products(who, trained, results), statistics.median(seen)
        share = "" if count is None else f"{count}, {count * product / middle:.0%}"
        lines.append(
            f"| {task} | {shape} | {who} "
            f"| {middle:.3g} | {statistics.median(ratios):.2f} | {share} "
            f"| {memory[who] / 2**20:.0f} | {memory[who] / memory['naive']:.3f} "
            f"| {errors[who]:.0e} |"
        )
        print(lines[-1], flush=True)
    assert memory["klplug"] < memory["naive"]


# Sizes of `exact_kl`'s chunks: what its constants were chosen by. The first are those in use.
SIZES: list[dict[str, int]] = [
    {"_LEAST_HELD": held, "_HELD": held, "_TILE": tile, "_ROWS": rows}
    for held, tile, rows in (
        (2**22, 2**20, 1024),
        (2**24, 2**18, 1024),
        (2**24, 2**20, 256),
        (2**24, 2**20, 1024),
        (2**24, 2**22, 1024),
        (2**26, 2**20, 1024),
    )
]
if DEVICE == "cuda":
    SIZES = [
        {"_HELD_ON_GPU": held, "_TILE_ON_GPU": 2**25, "_ROWS_ON_GPU": rows, "_HAS_TRITON": fused}
        for held, rows, fused in (
            (2**27, 8192, True),
            (2**26, 8192, True),
            (2**28, 8192, True),
            (2**27, 1024, True),
            (2**27, 8192, False),
        )
    ]


@pytest.mark.parametrize("task", TASKS_OF_LARGE)
def test_the_chunks_that_are_in_use(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, results, _ = TASKS[task]
    shape = SHAPES[-1] if DEVICE == "cuda" else SHAPES[0]
    step = Problem(*shape[:4], trained, results).step(exact_kl)
    times: list[list[float]] = [[] for _ in SIZES]
    for _ in range(4):
        for sizes, seen in zip(SIZES, times, strict=True):
            for name, value in sizes.items():
                monkeypatch.setattr(exact, name, value)
            seen.append(spent(step))
    for sizes, seen in zip(SIZES, times, strict=True):
        print(f"{task}: {sizes}: {min(seen):.4g} s", flush=True)  # of the first, some compile
