"""The KL term beside the host's own function: same process, same tensors, the host's aggregation.

`make bench`. Timings on a noisy machine mean little; the ratio of two that take turns does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import DEVICE, Row, interleaved, peak_bytes
from klplug import kl_term, parse
from tests.conftest import NAMED

SHAPES = [(8, 512), (16, 2048), (64, 4096), (64, 16384)]
DTYPES = [torch.float32, torch.bfloat16]
TOKENS = 2**22  # in all rounds of one side together

# klplug's name, and what each host calls the same; None where it has no such thing.
FORMULATIONS = {
    "k1_in_reward": {"openrlhf": {"kl_estimator": "k1"}, "verl": {"kl_penalty": "k1"}},
    "k2_as_loss,ratio=none": {"openrlhf": {"kl_estimator": "k2"}, "verl": {"kl_penalty": "k2"}},
    "k3_as_loss,ratio=none": {"openrlhf": {"kl_estimator": "k3"}, "verl": {"kl_penalty": "k3"}},
    "k2_as_loss": {"openrlhf": {"kl_estimator": "k2", "unbiased_gradient": True}},
}
Tensors = dict[str, Tensor]
CASES = [(host, name) for host in NAMED for name, known in FORMULATIONS.items() if host in known]


def tensors(host: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensors:
    """Log-probs, and a mask of answers of random lengths, in the host's own dtype of a mask."""
    draw = torch.Generator().manual_seed(0)
    size, length = shape
    lengths = torch.randint(length // 4, length, (size, 1), generator=draw)
    mask = torch.arange(length) < lengths
    made = {
        name: -torch.rand(shape, generator=draw).to(dtype)
        for name in ("log_probs", "ref_log_probs", "old_log_probs")
    }
    made["response_mask"] = mask if host == "verl" else mask.long()
    made = {name: tensor.to(DEVICE) for name, tensor in made.items()}
    made["log_probs"].requires_grad_()
    return made


def aggregation(host: str) -> Callable[[Tensor, Tensor], Tensor]:
    if host == "openrlhf":
        from openrlhf.models.loss import aggregate_loss

        return aggregate_loss
    from verl.trainer.ppo.core_algos import agg_loss

    return lambda loss, mask: agg_loss(loss, mask, "token-mean")


def stock(host: str, words: dict[str, Any], t: Tensors) -> Tensor:
    if host == "openrlhf":
        from openrlhf.models.utils import compute_approx_kl

        old = {"log_probs_old": t["old_log_probs"]} if "unbiased_gradient" in words else {}
        return compute_approx_kl(t["log_probs"], t["ref_log_probs"], **old, **words)
    from verl.trainer.ppo.core_algos import kl_penalty

    kl = kl_penalty(t["log_probs"], t["ref_log_probs"], **words)
    # klplug's is masked: so is verl's, by the next line of its apply_kl_penalty.
    return kl * t["response_mask"] if words["kl_penalty"] == "k1" else kl


@pytest.mark.parametrize("metrics", [False, True], ids=["", "metrics"])
@pytest.mark.parametrize(("host", "kl_type"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_kl_term(
    benchmark: Any,
    rows: list[Row],
    shape: tuple[int, int],
    dtype: torch.dtype,
    host: str,
    kl_type: str,
    metrics: bool,
) -> None:
    t, spec, aggregate = tensors(host, shape, dtype), parse(kl_type), aggregation(host)
    words = FORMULATIONS[kl_type][host]
    in_reward = spec.placement == "in_reward"

    def step(kl: Callable[[], Tensor]) -> None:
        t["log_probs"].grad = None
        if not in_reward:
            aggregate(kl(), t["response_mask"]).backward()
            return
        with torch.no_grad():
            kl()

    def ours() -> Tensor:
        term = kl_term(spec, **t)
        if metrics:
            assert term.tally.sums
        return term.coefficient if in_reward else term.loss

    def theirs() -> Tensor:
        return stock(host, words, t)

    rounds = min(201, max(9, TOKENS // (shape[0] * shape[1])))
    timed = interleaved(lambda: step(theirs), lambda: step(ours), rounds)
    t["log_probs"].grad = None
    peaks = peak_bytes(lambda: step(theirs)), peak_bytes(lambda: step(ours))
    case = f"{host}, {kl_type}{', metrics' if metrics else ''}"
    size = f"{shape[0]}x{shape[1]}, {str(dtype).removeprefix('torch.')}"
    row = Row(f"{case}, {size}", *timed, *peaks)
    rows.append(row)
    benchmark.extra_info["klplug / stock"] = row.ratios[len(row.ratios) // 2]
    benchmark.pedantic(lambda: step(ours), rounds=3)
