"""A whole training step with klplug and with the host's own KL, on the quickstart's policy.

The host's real worker, as its tests drive it: forward, policy loss, KL, metrics, backward; no
rollout, which would only dilute the difference, and no update. Steps take turns, in pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.measure import interleaved, median_interval
from recipes.quickstart import settings
from tests.conftest import NAMED

PAIRS = 60
KL_TYPES = {"k2_as_loss,ratio=none": "k2", "k3_as_loss,ratio=none": "k3"}
Step = Callable[[str], object]


def verl_step(monkeypatch: pytest.MonkeyPatch) -> Step:
    """Of TrainingWorker on FSDP2: 16 answers of 36 to 51 tokens."""
    import klplug_verl

    from tests.verl import engine

    klplug_verl.apply()
    monkeypatch.setattr(engine, "PROMPTS", (40,) * 16)
    monkeypatch.setattr(engine, "ANSWERS", tuple(range(36, 52)))
    bench = engine.Bench()
    data = bench.batch()
    return lambda kl: bench.step(data, kl.removeprefix("stock:"), micro_batch=16)


def openrlhf_step(monkeypatch: pytest.MonkeyPatch) -> Step:
    """Of ActorPPOTrainer on DeepSpeed, ZeRO-2: 16 answers of 4 to 64 tokens."""
    import klplug_openrlhf

    from tests.openrlhf import trainer

    klplug_openrlhf.apply()
    for name, value in {"BATCH": 16, "PROMPT": 40, "ANSWER": 66, "LENGTH": 106}.items():
        monkeypatch.setattr(trainer, name, value)
    bench = trainer.Bench(settings.HERE / "policy", zero_stage=2)
    experience = bench.experience()
    return lambda kl: bench.step(experience, kl)


STEPS = {"openrlhf": openrlhf_step, "verl": verl_step}


@pytest.mark.parametrize("host", [host for host in STEPS if host in NAMED])
def test_whole_step(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = STEPS[host](monkeypatch)
    try:
        for kl_type, stock in KL_TYPES.items():
            theirs, mine = interleaved(
                lambda s=stock: step(f"stock:{s}"), lambda k=kl_type: step(k), PAIRS
            )
            ratios = [b / a for a, b in zip(theirs, mine, strict=True)]
            low, middle, high = median_interval(ratios)
            milliseconds = median_interval(theirs)[1] * 1e3
            print(
                f"\n| {host}, {kl_type} | {milliseconds:.1f} | {middle:.3f} | "
                f"{low:.3f} to {high:.3f} |"
            )
            assert 0.5 < middle < 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
