"""What must hold in every release that is served; test_releases.py runs this in the older ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from klplug_openrlhf import launcher
from klplug_openrlhf.keys import flag, read
from klplug_openrlhf.plan import RECORDERS, Plan

import klplug
from klplug import stored_kl
from klplug.hosting.stored import Stored
from tests import one_meaning
from tests.openrlhf.command_line import change, settled, spelled
from tests.openrlhf.trainer import VOCABULARY, Given, Unigram, arguments
from tests.stored import rows, written

KL = ("--klplug.kl_type", "k2_as_loss", "--klplug.kl_coef", "1e-3")


@pytest.fixture
def launch() -> Any:
    """Run the launcher: the newest release's words, in the spelling of the one tested."""

    def go(*words: str) -> Any:
        defaults = (
            "--actor.model_name_or_path", "hub/model", "--data.prompt_dataset", "hub/data",
            "--reward.remote_url", "reward.py", "--vllm.num_engines", "1",
            "--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "8",
            "--actor.num_gpus_per_node", "1",
        )  # fmt: skip
        return settled(launcher.main, spelled([*defaults, *words]))[0]

    return go


def test_one_key_decides(launch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    args = launch(*KL)
    assert read(args, "algo.kl.use_loss") is True
    assert read(args, "algo.kl.estimator") == "k2_as_loss"
    assert read(args, "algo.kl.init_coef") == 1e-3
    out = capsys.readouterr().out
    assert "kl_type=k2_as_loss kl_coef=0.001" in out
    assert f"{spelled(['--algo.kl.use_loss'])[0]}=True" in out
    plan = Plan.of(args)
    assert plan is not None and str(plan.spec) == "k2_as_loss" and plan.kl_coef == 1e-3
    assert not plan.divides_by_length and not plan.records_for_kl


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--algo.kl.estimator", "k3_as_loss"], ["k3_as_loss", "two formulations"]),
        (["--algo.kl.init_coef", "0.5"], ["0.5", "0.001"]),
        (["--algo.kl.target", "0.1"], ["0.1", "--klplug.kl_ctrl adaptive"]),
    ],
)
def test_mistakes_are_told_in_the_releases_own_words(
    words: list[str], told: list[str], launch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        launch(*KL, *words)
    assert status.value.code == 2
    error = capsys.readouterr().err
    for word in (*spelled(words[:1]), *told):
        assert word in error


def test_an_estimator_that_is_a_kl_type_is_enough(launch: Any) -> None:
    args = launch("--algo.kl.estimator", "k3_as_loss", "--algo.kl.init_coef", "0.02")
    plan = Plan.of(args)
    assert plan is not None and str(plan.spec) == "k3_as_loss" and plan.kl_coef == 0.02


def test_gspo_divides_by_length(launch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--klplug.kl_type", "k1_in_reward", "--klplug.kl_coef", "0.1",
             "--actor.policy_loss_type", "gspo")  # fmt: skip
    plan = Plan.of(launch(*words))
    assert plan is not None and plan.divides_by_length
    with pytest.raises(SystemExit):
        launch(*words, "--algo.advantage.estimator", "reinforce")
    assert "gspo" in capsys.readouterr().err


@pytest.fixture(scope="module")
def given() -> Given:
    return Given()


def test_ratio_rollout_records_and_leaves_the_policy_loss_alone(
    launch: Any, given: Given, patched: None
) -> None:
    args = launch("--klplug.kl_type", "k2_as_loss,ratio=rollout", "--klplug.kl_coef", "0.1")
    assert read(args, "klplug.records_for_kl") is True
    (recorder,) = (r for r in RECORDERS if read(args, r.option) is not None)
    assert read(args, recorder.option) == recorder.on
    before = read(given.args, recorder.option)
    change(given.args, recorder.option, recorder.on)
    change(given.args, "klplug.kl_type", "k2_as_loss,ratio=rollout")
    change(given.args, "klplug.kl_coef", 0.1)
    try:
        corrects = getattr(given.trainer().actor_loss_fn, recorder.attribute)
        change(given.args, "klplug.records_for_kl", True)
        records = getattr(given.trainer().actor_loss_fn, recorder.attribute)
    finally:
        change(given.args, recorder.option, before)
        del given.args.klplug
    assert corrects == recorder.on and records == recorder.off


def test_the_sampler_as_reference_loads_no_model(launch: Any) -> None:
    args = launch("--klplug.kl_type", "k2_as_loss,reference=rollout", "--klplug.kl_coef", "0.1")
    assert read(args, "algo.kl.init_coef") == 0 and read(args, "algo.kl.use_loss") is True
    assert read(args, "klplug.records_for_kl") is True
    plan = Plan.of(args)
    assert plan is not None and plan.kl_coef == 0.1 and not plan.needs_reference


def test_a_head_under_another_ratio_is_refused(
    launch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        launch(
            *("--klplug.kl_type", "k2_as_loss,head=combined", "--klplug.kl_coef", "0.1"),
            *("--actor.policy_loss_type", "gspo"),
        )
    error = capsys.readouterr().err
    assert (
        f"{spelled(['--actor.policy_loss_type'])[0]} is gspo" in error and "head=separate" in error
    )


def test_the_kl_is_aggregated_as_gspos_policy_loss_is(given: Given, patched: None) -> None:
    batch = one_meaning.batch()
    change(given.args, "actor.policy_loss_type", "gspo")
    try:
        ours = given.gradient("k3_as_loss", batch) - given.gradient("none", batch)
    finally:
        change(given.args, "actor.policy_loss_type", "ppo")
    log_probs = batch.log_probs.clone().requires_grad_()
    term = klplug.kl_term(
        "k3_as_loss",
        log_probs,
        batch.ref_log_probs,
        batch.response_mask,
        old_log_probs=batch.old_log_probs,
    )
    klplug.aggregate(term.loss, batch.response_mask, "seq-mean-token-mean").backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(ours, one_meaning.BETA * log_probs.grad, rtol=1e-5, atol=1e-6)


def test_a_kl_that_is_aggregated_otherwise_stops(
    given: Given, patched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openrlhf.trainer.ray import ppo_actor

    name = "aggregate_loss" if hasattr(ppo_actor, "aggregate_loss") else "masked_mean"
    monkeypatch.setattr(ppo_actor, name, getattr(ppo_actor, name).__wrapped__)
    with pytest.raises(RuntimeError, match="function that klplug does not know"):
        given.gradient("k2_as_loss", one_meaning.batch())


def test_a_process_that_klplug_did_not_reach_stops_at_the_first_kl(given: Given) -> None:
    with pytest.raises(ValueError, match="k2_as_loss"):
        given.gradient("k2_as_loss", one_meaning.batch())


def test_options_are_found_wherever_they_lie() -> None:
    nested = SimpleNamespace(algo=SimpleNamespace(kl=SimpleNamespace(use_loss=True)))
    parsed = SimpleNamespace(**{"algo.kl.use_loss": True})
    flat = SimpleNamespace(use_kl_loss=True)
    for args in (nested, parsed, flat):
        assert read(args, "algo.kl.use_loss") is True
        assert read(args, "algo.kl.target", "none") == "none"
    assert flag(flat, "algo.kl.use_loss") == "--use_kl_loss"
    assert flag(parsed, "algo.kl.use_loss") == "--algo.kl.use_loss"
    assert read(arguments(), "rollout.n_samples_per_prompt") == 4


@pytest.mark.parametrize(("dtype", "log_ratio"), [(torch.bfloat16, -40.0), (torch.float32, -100.0)])
def test_one_token_far_below_the_reference_does_not_decide_the_step(
    dtype: torch.dtype, log_ratio: float, given: Given, patched: None
) -> None:
    """Stock k3 does nothing about it, or is nan for the whole batch (before 0.11.2, at -100).

    Without a bound its derivative is all of the gradient; with one it is one token among others.
    """
    batch = one_meaning.batch()
    moved = batch.log_probs.clone()
    moved[0, 1] = batch.ref_log_probs[0, 1] + log_ratio
    drifted = replace(batch, log_probs=moved.to(dtype), old_log_probs=moved.to(dtype))
    without = given.gradient("none", drifted).float()

    def kl_part(kl_type: str) -> torch.Tensor:
        return given.gradient(kl_type, drifted).float() - without

    stock = kl_part("stock:k3")
    assert stock[0, 1].isnan() or stock[0, 1].abs() < 1e-6
    plain, bounded = kl_part("k3_as_loss"), kl_part("k3_as_loss,bound=1")
    assert plain[0, 1].abs() > 1e6 * plain.where(plain != plain[0, 1], 0.0).abs().max()
    tokens = batch.response_mask.sum()
    assert bounded[0, 1].item() == pytest.approx(-one_meaning.BETA / tokens.item(), rel=0.02)
    rest = torch.ones_like(bounded, dtype=torch.bool)
    rest[0, 1] = False
    torch.testing.assert_close(
        bounded[rest], kl_part("k3_as_loss")[rest].clamp(max=1), rtol=0.05, atol=1e-3
    )


def test_the_references_own_answers_have_the_kl_alone(
    given: Given, patched: None, tmp_path: Path
) -> None:
    """Each token by the file's mean length; of the rollouts the policy loss is as without a KL."""
    source = written(tmp_path / "own.jsonl", rows(vocabulary=VOCABULARY))
    batch = one_meaning.batch()
    ours = given.gradient_of_unigram("js_as_loss", batch, source)
    without = given.gradient_of_unigram("none", batch)
    stored, policy = Stored.read(str(source)), Unigram()
    count = len(batch.response_mask)
    sequences = torch.ones(count, batch.response_mask.shape[1] + 1, dtype=torch.long)
    total = torch.zeros(())
    for own in stored.drawn(sequences, count):
        log_probs = policy.logits.log_softmax(-1)[list(own.answer)][None]
        ref = torch.tensor([own.log_probs])
        total = total + stored_kl("js_as_loss", log_probs, ref, torch.ones_like(ref)).loss.sum()
    (one_meaning.BETA * total / (count * stored.mean_length)).backward()
    assert policy.logits.grad is not None and policy.logits.grad.norm() > 0
    torch.testing.assert_close(ours - without, policy.logits.grad, rtol=1e-4, atol=1e-7)
