"""The KL term, forward and backward, beside OpenRLHF's own function: same process, same tensors.

`make bench`. Timings on a noisy machine mean little; the ratio of two that take turns does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from klplug import aggregate, kl_term

SHAPES = [(8, 512), (16, 2048), (64, 4096)]
DTYPES = [torch.float32, torch.bfloat16]
ROUNDS = 15


def tensors(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def draw() -> Tensor:
        return -torch.rand(shape, generator=generator).to(device, dtype)

    log_probs = draw().requires_grad_()
    mask = (torch.rand(shape, generator=generator) > 0.2).to(device)
    return {"log_probs": log_probs, "ref": draw(), "old": draw(), "mask": mask}


def seconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def stock(t: dict[str, Tensor], **kwargs: object) -> None:
    from openrlhf.models.utils import compute_approx_kl

    kl = compute_approx_kl(t["log_probs"], t["ref"], **kwargs)
    ((kl * t["mask"]).sum() / t["mask"].sum()).backward()


def ours(t: dict[str, Tensor], kl_type: str, metrics: bool = False) -> None:
    term = kl_term(kl_type, t["log_probs"], t["ref"], t["mask"], old_log_probs=t["old"])
    if metrics:
        _ = term.metrics
    aggregate(term.loss, t["mask"]).backward()


PAIRS = {
    "k2": ("k2_as_loss,ratio=none", {"kl_estimator": "k2"}),
    "k3": ("k3_as_loss,ratio=none", {"kl_estimator": "k3"}),
    "k2 with ratio": ("k2_as_loss", {"kl_estimator": "k2", "unbiased_gradient": True}),
}


@pytest.mark.parametrize("metrics", [False, True], ids=["plain", "metrics"])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=["8x512", "16x2048", "64x4096"])
def test_ratio_to_openrlhf(
    benchmark: object, shape: tuple[int, int], dtype: torch.dtype, name: str, metrics: bool
) -> None:
    kl_type, kwargs = PAIRS[name]
    t = tensors(shape, dtype)
    if "unbiased_gradient" in kwargs:
        kwargs = {**kwargs, "log_probs_old": t["old"]}
    ratios = []
    for _ in range(ROUNDS):
        theirs = seconds(lambda: stock(t, **kwargs))
        mine = seconds(lambda: ours(t, kl_type, metrics))
        ratios.append(mine / theirs)
    benchmark.extra_info["klplug / stock"] = round(statistics.median(ratios), 2)  # type: ignore[attr-defined]
    benchmark.pedantic(lambda: ours(t, kl_type, metrics), rounds=5)  # type: ignore[attr-defined]
    print(f"  klplug / stock: {statistics.median(ratios):.2f}")
