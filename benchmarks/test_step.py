"""A whole training step with klplug and with verl's own KL, on the quickstart's policy.

verl's real worker, as its tests drive it: forward, policy loss, KL, metrics, backward; no rollout,
which would only dilute the difference. Steps take turns, in pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.measure import interleaved, median_interval
from tests.conftest import NAMED

PAIRS = 60
KL_TYPES = {"k2_as_loss,ratio=none": "k2", "k3_as_loss,ratio=none": "k3"}
Step = Callable[[str], object]


def verl_step(monkeypatch: pytest.MonkeyPatch) -> Step:
    """Of TrainingWorker on FSDP2, its optimiser left out: 16 answers of 36 to 51 tokens."""
    import klplug_verl

    from tests.verl import engine

    klplug_verl.apply()
    monkeypatch.setattr(engine, "PROMPTS", (40,) * 16)
    monkeypatch.setattr(engine, "ANSWERS", tuple(range(36, 52)))
    bench = engine.Bench()
    data = bench.batch()
    return lambda kl: bench.step(data, kl, micro_batch=16)


@pytest.mark.skipif("verl" not in NAMED, reason="of verl")
def test_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step = verl_step(monkeypatch)
    try:
        for kl_type, stock in KL_TYPES.items():
            theirs, mine = interleaved(lambda s=stock: step(s), lambda k=kl_type: step(k), PAIRS)
            ratios = [b / a for a, b in zip(theirs, mine, strict=True)]
            low, middle, high = median_interval(ratios)
            milliseconds = median_interval(theirs)[1] * 1e3
            print(
                f"\n| verl, {kl_type} | {milliseconds:.1f} | {middle:.3f} | "
                f"{low:.3f} to {high:.3f} |"
            )
            assert 0.5 < middle < 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
