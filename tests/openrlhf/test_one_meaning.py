"""One kl_type means one gradient: OpenRLHF's half of the proof (verl's is tests/verl)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import one_meaning
from tests.openrlhf.test_experience import maker
from tests.openrlhf.trainer import Bench, arguments, change, configure, tiny_model

pytestmark = pytest.mark.usefixtures("patched")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tiny_model(tmp_path_factory.mktemp("model")), zero_stage=2)


class Policy:
    """An actor whose log-probs of the answers are given."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs

    def train(self) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.log_probs, None


def gradient(bench: Bench, kl_type: str) -> Tensor:
    """Of the whole training step, at the given log-probs."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    given = one_meaning.batch()
    configure(bench.args, kl_type, one_meaning.BETA)
    trainer = bench.make()
    log_probs = given.log_probs.clone().requires_grad_()
    trainer.actor = Policy(log_probs)
    experience = Experience(
        sequences=torch.ones(4, 7, dtype=torch.long),
        attention_mask=torch.ones(4, 7, dtype=torch.long),
        action_mask=given.response_mask.long(),
        action_log_probs=given.old_log_probs,
        base_action_log_probs=given.ref_log_probs,
        rollout_log_probs=given.rollout_log_probs,
        advantages=given.advantages,
        info={"klplug/active": torch.ones(4)},
    )
    bench.strategy.backward = lambda loss, *_: loss.backward()
    bench.strategy.optimizer_step = lambda *args, **kwargs: None
    bench.strategy.get_grad_norm = lambda model: 0.0
    try:
        trainer.training_step(experience, one_meaning.BETA, 0)
    finally:
        for name in ("backward", "optimizer_step", "get_grad_norm"):
            delattr(bench.strategy, name)
    assert log_probs.grad is not None
    return log_probs.grad


@pytest.mark.parametrize("kl_type", one_meaning.KL_TYPES)
def test_the_loss_means_what_the_core_means(bench: Bench, kl_type: str) -> None:
    ours = gradient(bench, kl_type) - gradient(bench, "none")
    torch.testing.assert_close(
        ours, one_meaning.loss_gradient(kl_type), rtol=1e-5, atol=one_meaning.TOLERANCE
    )


@pytest.mark.parametrize("kl_type", one_meaning.KL_TYPES)
def test_the_reward_means_what_the_core_means(
    kl_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openrlhf.trainer.ppo_utils.experience import Experience

    given = one_meaning.batch()
    args = arguments()
    configure(args, kl_type, one_meaning.BETA)
    change(args, "rollout.micro_batch_size", 2)
    answers = SimpleNamespace(policy=given.old_log_probs, reference=given.ref_log_probs)
    made = maker(args, answers, monkeypatch)  # type: ignore[arg-type]
    experiences = made.make_experience_batch(
        [
            Experience(
                sequences=torch.ones(1, 7, dtype=torch.long),
                attention_mask=torch.ones(1, 7, dtype=torch.long),
                action_mask=given.response_mask[i : i + 1].long(),
                rewards=torch.ones(1),  # all alike: what is left is the KL's
                info={"reward": torch.ones(1)},
            )
            for i in range(4)
        ]
    )
    found = torch.cat([e.advantages * e.action_mask for e in experiences])
    torch.testing.assert_close(
        found, one_meaning.reward_advantages(kl_type), rtol=1e-5, atol=one_meaning.TOLERANCE
    )
