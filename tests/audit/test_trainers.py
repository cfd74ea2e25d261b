"""Trainers with estimators of their own, whose gradients are kl_types'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from klplug_verl import sources
from klplug_verl.trainers import ITERATIVE, RPG
from torch import Tensor

import klplug
from klplug.audit import Report, audit
from klplug.audit.source import digest, function, taken, tree

_A = "actor_rollout_ref.actor"
_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    # Of x = log pi/old, as the RPG paper has them; the gradient is taken at samples of old.
    "rpg_fkl": lambda x: -x,
    "rpg_ufkl": lambda x: x.exp() - 1 - x,
    "rpg_urkl": lambda x: x.exp() * (x - 1) + 1,
    "rpg_rkl": lambda x: x.exp() * x,
}


@pytest.mark.parametrize("name", _KINDS)
def test_the_gradient_of_rpgs_value_is_that_of_a_kl_type(name: str) -> None:
    torch.manual_seed(0)
    old = torch.randn(3, 5, dtype=torch.float64)
    mask = torch.ones(3, 5)

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        log_probs = (old + 0.3 * torch.sin(7 * old)).requires_grad_()
        (of,) = torch.autograd.grad(loss(log_probs).sum(), log_probs)
        return of

    theirs = gradient(lambda log_probs: _KINDS[name](log_probs - old))
    ours = gradient(
        lambda log_probs: klplug.kl_term(RPG[name], log_probs, old, mask, old_log_probs=old).loss
    )
    # But for k1's gradient with its weight, which is zero on average.
    zero = gradient(lambda log_probs: (log_probs - old).exp())
    ours = ours + {"rpg_fkl": -zero, "rpg_rkl": zero}.get(name, 0 * zero)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


_CONFIG = """\
data: {train_batch_size: 64}
actor_rollout_ref:
  actor: {use_kl_loss: true, kl_loss_coef: 0.5, ppo_mini_batch_size: 8, ppo_epochs: 1,
          kl_loss_type: low_var_kl, use_iterative_ref_model: false}
  rollout: {n: 4}
algorithm: {adv_estimator: grpo, use_kl_in_reward: false, kl_penalty: kl,
            kl_ctrl: {type: fixed, kl_coef: 0.25}}
"""
_OWN = """\
def kl_penalty(logprob, ref_logprob, kl_penalty):
    if kl_penalty == "kl":
        return logprob - ref_logprob
    if kl_penalty == "rpg_ufkl":
        return mine(logprob, ref_logprob)
    raise NotImplementedError
"""
_ITERATES = f"{ITERATIVE}=True"


@pytest.fixture
def rpg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Report]:
    """The audit beside a package whose ``rpg_ufkl`` stands for code that was read."""
    for name, text in {
        "trainer/config/ppo_trainer.yaml": _CONFIG,
        "trainer/ppo/core_algos.py": _OWN,
    }.items():
        path = tmp_path / "verl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    module = tree(tmp_path / "verl/trainer/ppo/core_algos.py")
    assert module is not None
    whole = function(module, "kl_penalty")
    assert whole is not None
    read = digest(taken(whole, "kl_penalty", "rpg_ufkl"))
    monkeypatch.setitem(sources._BRANCHES, read, ("rpg_ufkl",))

    def of(settings: str) -> Report:
        script = tmp_path / "run.sh"
        script.write_text(f"python3 -m recipe.rpg.src.main_rpg {settings}\n")
        return audit(script)

    return of


def test_rpgs_kl_is_to_the_policy_that_made_the_samples(rpg: Callable[[str], Report]) -> None:
    report = rpg(f"{_A}.kl_loss_type=rpg_ufkl {_ITERATES}")
    assert report.gradient == "neither" and report.target is not None
    assert "KL(old||pi)" in report.target and report.corrected
    assert report.kl_type == "k3_as_loss,cap=none,reference=old" and report.after is None
    # klplug has no hooks for it, so it refuses nothing there.
    assert "klplug-refuses" not in {finding.id for finding in report.findings}


@pytest.mark.parametrize(
    "settings",
    [
        f"{_A}.kl_loss_type=rpg_ufkl",  # with another reference its samples are not of that
        f"{_A}.kl_loss_type=rpg_urkl {_ITERATES}",  # not the code that was read
        # Its trainer takes the KL in the reward from kl_loss_type.
        f"{_A}.use_kl_loss=False {_A}.kl_loss_type=rpg_rf_rkl algorithm.use_kl_in_reward=True",
    ],
)
def test_what_was_not_read_of_rpg_is_unknown(rpg: Callable[[str], Report], settings: str) -> None:
    report = rpg(settings)
    assert report.gradient is None and "kl_loss_type" in report.unknown["gradient"][0]


def test_rpg_with_a_coefficient_of_zero_has_no_kl(rpg: Callable[[str], Report]) -> None:
    off = f"{_A}.use_kl_loss=False {_A}.kl_loss_type=rpg_rf_rkl"
    on = f"{off} algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=0.0"
    assert rpg(off).gradient == rpg(on).gradient == "none"
