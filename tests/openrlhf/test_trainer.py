"""Controller and checkpoints, through the real BasePPOTrainer's methods."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from klplug_openrlhf import trainer as of_trainer

from klplug import AdaptiveKL
from tests.openrlhf.command_line import change
from tests.openrlhf.trainer import arguments, configure

pytestmark = pytest.mark.usefixtures("patched")


class Group:
    """A model group that keeps what it is told to save."""

    def __init__(self, states: dict[str, Any] | None = None) -> None:
        self.saved: dict[str, Any] = {}
        self.states = states

    def async_run_method(self, method_name: str, **kwargs: Any) -> list[Any]:
        if method_name == "save_checkpoint":
            self.saved = kwargs["client_states"]
            return []
        assert method_name == "get_checkpoint_states"
        return [self.states]


def trainer(
    monkeypatch: pytest.MonkeyPatch,
    kl_type: str = "k2_as_loss",
    group: Group | None = None,
    model: str = "hub/model",
    **own: Any,
) -> Any:
    from openrlhf.trainer import ppo_trainer

    args = arguments()
    configure(args, kl_type)
    if hasattr(args, "klplug"):
        vars(args.klplug).update(own)
    change(args, "ckpt.save_steps", 1)
    change(args, "actor.model_name_or_path", model)
    change(args, "ckpt.load_enable", True)
    monkeypatch.setattr(ppo_trainer.ray, "get", lambda refs: refs)
    monkeypatch.setattr(ppo_trainer.os.path, "exists", lambda path: True)
    return ppo_trainer.BasePPOTrainer(
        SimpleNamespace(args=args), group or Group(), None, None, None, None, None
    )


def test_every_process_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(monkeypatch, "k3_as_loss,cap=5")
    line = capsys.readouterr().out
    assert "active in the trainer" in line
    assert "kl_type=k3_as_loss,cap=5 kl_coef=0.1" in line
    trainer(monkeypatch, "stock:k2")
    assert "klplug" not in capsys.readouterr().out


def test_the_state_of_the_controller_survives_save_and_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"kl_ctrl": "adaptive", "kl_target": 0.05, "kl_horizon": 100}
    group = Group()
    first = trainer(monkeypatch, group=group, **own)
    assert first.experience_maker.kl_ctl is first.kl_ctl
    first.kl_ctl.measured = 1.0
    first.kl_ctl.update(0.0, 50)
    moved = first.kl_ctl.value
    assert moved == pytest.approx(0.1 * math.exp(0.2 * 50 / 100))
    first.save_logs_and_checkpoints(3, {}, {"global_step": 3})
    assert group.saved["global_step"] == 3
    assert group.saved["klplug"] == {
        "kl_type": "k2_as_loss",
        "reference": {"path": "hub/model", "weights": None},
        "kl_ctrl": "adaptive",
        "value": moved,
    }

    resumed = trainer(monkeypatch, group=Group(group.saved), **own)
    capsys.readouterr()
    resumed.init_checkpoint_states()
    assert resumed.kl_ctl.value == moved
    assert isinstance(resumed.kl_ctl.controller, AdaptiveKL)
    assert "WARNING" not in capsys.readouterr().out


def test_the_best_checkpoint_has_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group()
    made = trainer(monkeypatch, group=group)
    made.save_best_checkpoint({"eval_words_pass1": 0.5}, 3, {"global_step": 3})
    assert group.saved["klplug"]["kl_type"] == "k2_as_loss"
    assert group.saved["best_eval_metric_value"] == 0.5


def test_resuming_with_another_reference_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = Group()
    trainer(monkeypatch, group=group).save_logs_and_checkpoints(3, {}, {"global_step": 3})
    trainer(monkeypatch, group=Group(group.saved)).init_checkpoint_states()
    assert "WARNING" not in capsys.readouterr().out
    trainer(monkeypatch, group=Group(group.saved), model="ckpt/step_3").init_checkpoint_states()
    said = capsys.readouterr().out
    assert "with the reference ckpt/step_3 a run that was trained with hub/model." in said


def test_a_kl_to_the_sampler_keeps_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group()
    made = trainer(monkeypatch, "k2_as_loss,reference=rollout", group=group)
    made.save_logs_and_checkpoints(3, {}, {"global_step": 3})
    assert "reference" not in group.saved["klplug"]


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"kl_type": "k3_as_loss", "kl_ctrl": "fixed", "value": 0.1}, "kl_type=k3_as_loss"),
        (None, "OpenRLHF's own KL"),
    ],
)
def test_resuming_under_another_kl_type_warns(
    saved: dict[str, Any] | None,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    states = {"global_step": 3, **({"klplug": saved} if saved else {})}
    trainer(monkeypatch, group=Group(states)).init_checkpoint_states()
    out = capsys.readouterr().out
    assert "WARNING" in out and words in out


def test_stock_runs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController

    group = Group()
    made = trainer(monkeypatch, "stock:k2", group=group)
    assert type(made.kl_ctl) is FixedKLController
    made.save_logs_and_checkpoints(3, {}, {"global_step": 3})
    assert "klplug" not in group.saved


def test_a_gradient_that_stays_away_from_the_principled_one_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(monkeypatch, "k3_as_loss")
    for _ in range(50):
        of_trainer.ppo_train(lambda: {"klplug/gradient_cosine": 0.5}, made, (), {})
    said = capsys.readouterr().out
    assert said.count("klplug/gradient_cosine is 0.5, below 0.9 for 20 steps") == 1


MOVING: dict[str, dict[str, Any]] = {
    "linear": {"kl_end": 0.0, "kl_steps": 4.0},
    "cosine": {"kl_end": 0.0, "kl_steps": 4.0},
    "pid": {"kl_target": 0.01},
}


@pytest.mark.parametrize("kl_ctrl", MOVING)
def test_every_controller_moves_and_goes_on_from_a_checkpoint(
    kl_ctrl: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"kl_ctrl": kl_ctrl, **MOVING[kl_ctrl]}
    group = Group()
    first = trainer(monkeypatch, group=group, **own)
    for kl in (0.02, 0.05):
        first.kl_ctl.measured = kl
        first.kl_ctl.update(99.0, 50)  # what OpenRLHF says it is
    # An error of 0.8, then of 1: it rises by 0.2.
    moved = {"linear": 0.5, "cosine": 0.5, "pid": math.exp(0.03 * 1.8 + 0.3 * 0.2)}
    assert first.experience_maker.kl_ctl.value == pytest.approx(0.1 * moved[kl_ctrl])
    first.save_logs_and_checkpoints(3, {}, {"global_step": 3})
    second = trainer(monkeypatch, group=Group(group.saved), **own)
    capsys.readouterr()
    second.init_checkpoint_states()
    assert "WARNING" not in capsys.readouterr().out
    for made in (first, second):
        made.kl_ctl.measured = 0.01
        made.kl_ctl.update(99.0, 50)
    assert second.kl_ctl.value == first.kl_ctl.value != 0.1 * moved[kl_ctrl]
