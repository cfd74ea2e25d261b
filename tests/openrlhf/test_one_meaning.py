"""One kl_type means one gradient: OpenRLHF's half of the proof (verl's is tests/verl)."""

from __future__ import annotations

from dataclasses import replace
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


@pytest.fixture
def lending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's object store of one process."""
    monkeypatch.setattr("ray.get", lambda x: x)


@pytest.mark.usefixtures("lending")
@pytest.mark.parametrize("kl_type", one_meaning.EXACT)
def test_over_the_vocabulary_the_loss_means_what_the_core_means(given: Given, kl_type: str) -> None:
    own = one_meaning.states()
    found = given.gradient_of_states(kl_type, own, own.batch(own.hidden))
    expected = one_meaning.exact_step_gradient(kl_type)
    assert (expected - one_meaning.exact_step_gradient("none")).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=one_meaning.TOLERANCE)


@pytest.mark.usefixtures("lending")
def test_the_exact_gradient_is_the_mean_of_the_sampled_ones(given: Given) -> None:
    """Of every token that could be sampled, in turn and weighed by its probability."""
    own = one_meaning.states()
    mean = torch.zeros_like(own.hidden)
    exact = {
        kl: given.gradient_of_states(kl, own, own.batch(own.hidden))
        for kl in ("exact_as_loss", "none")
    }
    for token in range(len(own.weight)):
        sampled = replace(own, tokens=torch.full_like(own.tokens, token))
        batch = sampled.batch(own.hidden)
        # k2's gradient is log_probs - ref_log_probs: a reference at which it is the weighed one.
        weighed = batch.log_probs.exp() * (batch.log_probs - batch.ref_log_probs)
        batch = replace(batch, ref_log_probs=batch.log_probs - weighed)
        with_kl = given.gradient_of_states("k2_as_loss,ratio=none", sampled, batch)
        mean += with_kl - given.gradient_of_states("none", sampled, batch)
    torch.testing.assert_close(
        exact["exact_as_loss"] - exact["none"], mean, rtol=1e-4, atol=one_meaning.TOLERANCE
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
    answers = SimpleNamespace(
        policy=given.old_log_probs,
        reference=given.ref_log_probs,
        teacher=given.teacher_log_probs if "teacher" in kl_type else None,
    )
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
