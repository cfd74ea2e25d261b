"""The table of public scripts, the page made of it, and the rules that say what is right."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from tests.audit.corpus import PAGE, digest, page, settings, written_facts
from tests.audit.right import of_openrlhf, of_verl, updates

_HEAD = {
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.kl_loss_coef": 0.001,
    "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
    "actor_rollout_ref.actor.ppo_mini_batch_size": 256,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_penalty": "kl",
    "algorithm.kl_ctrl.kl_coef": 0.001,
    "data.train_batch_size": 1024,
    "distillation.enabled": False,
    "distillation.distillation_loss.loss_mode": "k3",
    "distillation.distillation_loss.use_policy_gradient": False,
    "distillation.distillation_loss.use_task_rewards": True,
}
_DISTILS, _D = "distillation.enabled=True", "distillation.distillation_loss"
_LOSS = "actor_rollout_ref.actor.use_kl_loss=True"
_TYPE = "actor_rollout_ref.actor.kl_loss_type="


def test_the_table_has_what_it_promises() -> None:
    rows = written_facts()
    assert len(rows) >= 300
    assert len({(row["repository"], row["path"]) for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(r"[0-9a-f]{40}", row["commit"])
        assert len(row["kl"]) == len(row["right"]) == len(row["updates"]) > 0


def test_the_page_is_made_of_the_table() -> None:
    # python -m tests.audit.corpus makes it again.
    assert PAGE.read_text() == page(written_facts())


# verl: trainer/ppo/core_algos.py, kl_penalty; workers/utils/losses.py, ppo_loss.
@pytest.mark.parametrize(
    ("words", "switched", "gradient"),
    [
        ([], True, "none"),
        ([], False, "reverse"),  # before 0.3.1 k1 in the reward is the default
        ([_LOSS], True, "forward"),
        ([_LOSS], False, "forward"),
        ([_LOSS, f"{_TYPE}kl"], True, "zero"),
        ([_LOSS, f"{_TYPE}k3+"], True, "reverse"),
        ([_LOSS, f"{_TYPE}mse"], True, "reverse"),
        ([_LOSS, "actor_rollout_ref.actor.kl_loss_coef=0.0"], True, "none"),
        (["algorithm.use_kl_in_reward=True"], True, "reverse"),
        (["algorithm.use_kl_in_reward=True", "algorithm.kl_penalty=k3"], True, "neither"),
        ([_LOSS, "algorithm.use_kl_in_reward=True"], True, "neither"),
        ([_LOSS, "--config-name=mine"], True, None),
        # Distillation's defaults: k3 to the teacher, backpropagated, beside the task's rewards.
        ([_DISTILS], True, "forward"),
        ([_DISTILS, _LOSS], True, "forward"),
        ([_DISTILS, f"{_D}.loss_mode=forward_kl_topk"], True, "forward"),
        ([_DISTILS, f"{_D}.loss_mode=k2"], True, "reverse"),
        ([_DISTILS, _LOSS, f"{_D}.loss_mode=k2"], True, "neither"),
        ([_DISTILS, _LOSS, f"{_D}.loss_mode=k2", f"{_D}.use_task_rewards=False"], True, "reverse"),
        ([_DISTILS, f"{_D}.loss_mode=k1", f"{_D}.use_policy_gradient=True"], True, "reverse"),
        ([_DISTILS, f"{_D}.loss_mode=k3", f"{_D}.use_policy_gradient=True"], True, "neither"),
        ([_DISTILS, f"{_D}.loss_mode=nobodys"], True, None),
    ],
)
def test_right_on_verl(words: Sequence[str], switched: bool, gradient: str | None) -> None:
    assert of_verl(words, _HEAD, switched) == gradient


def test_a_loss_that_is_subtracted() -> None:
    assert of_verl([_LOSS], _HEAD, False, subtracted=True) == "away"
    assert of_verl([], _HEAD, False, subtracted=True) == "reverse"


def test_a_trainer_whose_call_is_a_comment() -> None:
    assert of_verl([], _HEAD, False, applied=False) == "none"
    assert of_verl([_LOSS], _HEAD, False, applied=False) == "forward"


# OpenRLHF: trainer/ppo_utils/experience_maker.py and models/utils.py, compute_approx_kl.
@pytest.mark.parametrize(
    ("words", "gradient"),
    [
        ([], "reverse"),
        (["--init_kl_coef", "0"], "none"),
        (["--use_kl_loss", "--kl_estimator", "k3"], "forward"),
        (["--algo.kl.use_loss", "--algo.kl.estimator", "k2"], "reverse"),
        (["--algo.kl.use_loss"], "zero"),
        (["--kl_estimator=k3"], "neither"),
    ],
)
def test_right_on_openrlhf(words: Sequence[str], gradient: str) -> None:
    assert of_openrlhf(words) == gradient


def test_a_reward_that_leaves_its_kl_out() -> None:
    assert of_openrlhf([], rewards=False) == "none"
    assert of_openrlhf(["--use_kl_loss", "--kl_estimator", "k2"], rewards=False) == "reverse"


def test_updates_are_counted_as_verl_makes_them() -> None:
    assert updates([], _HEAD) == 4
    assert updates(["data.train_batch_size=300"], _HEAD) == 2
    assert updates(["actor_rollout_ref.actor.ppo_epochs=3"], _HEAD) == 12


def test_a_digest_is_of_what_bears_on_the_kl() -> None:
    words = ["python3", _LOSS, "trainer.nnodes=1", "--algo.kl.init_coef", "0.1"]
    assert settings(words) == ["--algo.kl.init_coef 0.1", _LOSS]
    assert digest(words) == digest([*words, "data.seed=3"]) != digest(words[2:])
