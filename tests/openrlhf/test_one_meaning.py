"""One kl_type means one gradient: OpenRLHF's half of the proof (verl's is tests/verl)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests import one_meaning
from tests.openrlhf.command_line import change
from tests.openrlhf.test_experience import maker
from tests.openrlhf.trainer import Given, arguments, configure

pytestmark = pytest.mark.usefixtures("patched")


@pytest.fixture(scope="module")
def given() -> Given:
    return Given()


@pytest.mark.parametrize("kl_type", one_meaning.KL_TYPES)
def test_the_loss_means_what_the_core_means(given: Given, kl_type: str) -> None:
    batch = one_meaning.batch()
    ours = given.gradient(kl_type, batch) - given.gradient("none", batch)
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
    change(args, "rollout.micro_batch_size", 3)  # cuts a group
    change(args, "rollout.n_samples_per_prompt", 2)
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
