"""What is said of a run that starts: the launch and the audit say it in the same words."""

from __future__ import annotations

import pytest
from klplug_verl.notes import ROWS

from klplug.hosting.host import hosts
from tests.verl.test_refusals import _settings, report
from tests.verl.test_settings import BYPASS, MEAN, RAW, ROLLOUT, TOP_K, TOP_P, own
from tests.verl.trainer import derived

MODEL = "actor_rollout_ref.model."
DTYPE = "fsdp_config.mixed_precision.param_dtype"
ADAPTIVE = ("+klplug.kl_ctrl=adaptive", "+klplug.kl_target=0.1")
CORRECTED = "algorithm.rollout_correction.rollout_is=token"
BY_THE_SAMPLER = "k2_as_loss,ratio=rollout"
MINI = "actor_rollout_ref.actor.ppo_mini_batch_size"
ONE = ("data.train_batch_size=64", f"{MINI}=64")
GEO_MEAN = "actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean"
REJECTS = "algorithm.rollout_correction.rollout_rs="
BY_TOKEN = f"{REJECTS}token_k1"
SAPO = "actor_rollout_ref.actor.policy_loss.loss_mode=sapo"

# finding: what has it, with a word of it.
SAID = {
    "truncated-sampler": [
        (own(BY_THE_SAMPLER, TOP_P), "top_p=0.9"),
        (own(BY_THE_SAMPLER, TOP_K), "top_k=50"),
        (own(BY_THE_SAMPLER, RAW, f"{ROLLOUT}temperature=0.7"), "temperature=0.7"),
        (own("k2_as_loss,ratio=none", TOP_P, BYPASS), "that is k1 - log S"),
        (own("k1_in_reward", TOP_K, BYPASS), f"{BYPASS} with {TOP_K}: the policy's log-probs"),
        (own("k2_as_loss", TOP_P, *ADAPTIVE), f"kl_ctrl=adaptive with {TOP_P}: what drives it"),
        (own("k1_in_reward", TOP_K, RAW, *ADAPTIVE), f"kl_ctrl=adaptive with {TOP_K}: what"),
    ],
    "stale-samples": [
        (own("k2_as_loss", "trainer.v1.trainer_mode=separate_async"), "some updates old"),
        (own("k1_in_reward", "trainer.v1.trainer_mode=colocate_async"), "some updates old"),
        *(
            (
                own(f"k2_as_loss,head={head}", "trainer.v1.trainer_mode=separate_async", *more),
                "some updates old",
            )
            for head, *more in (("combined",), ("clipped",), ("clipped", CORRECTED))
        ),
    ],
    "lora-reference": [
        (own("k2_as_loss", f"{MODEL}lora_adapter_path=ckpt/sft"), "lora_adapter_path=ckpt/sft"),
        (own("k1_in_reward", f"{MODEL}lora.adapter_path=ckpt/sft"), "lora.adapter_path=ckpt/sft"),
    ],
    "reference-dtype": [
        (own("k2_as_loss", f"+actor_rollout_ref.actor.{DTYPE}=fp32"), "in fp32 and the reference"),
        (own("k1_in_reward", f"+actor_rollout_ref.ref.{DTYPE}=float32"), "the reference in fp32"),
    ],
    "extrapolation": [
        (
            own("1.5*k2_as_loss+-0.5*k2_as_loss,reference=old"),
            "the policy at the start of the step: extrapolation, for",
        ),
        (own("k3_as_loss+-2*k2_as_loss"), "the reference model: and nothing holds it, for"),
    ],
    "no-effect": [
        (own("k2_as_loss,reference=old", *ONE), f"{MINI}=64 with data.train_batch_size=64 is"),
        (own("k2_as_loss", "+klplug.ref_update=reset:1", *ONE), "ref_update=reset:1. So it is 0"),
    ],
    "short-horizon": [
        # Of two answers to each of 1024 prompts, verl's default.
        (own("k2_as_loss", *ADAPTIVE, "+klplug.kl_horizon=1000"), "factor of e^0.41 in one"),
        # klplug's own default is 10000.
        (own("k2_as_loss", *ADAPTIVE, "data.train_batch_size=8192"), "less than the 16384"),
    ],
}
# Its own finding says it of stock runs too, and otherwise.
LAUNCH = {
    "whitened": own("k1_in_reward", "algorithm.adv_estimator=gae"),
    "discounted": own("k1_in_reward", "algorithm.adv_estimator=gae", "algorithm.gamma=0.9"),
    "divided_by_length": own("k2_as_loss,horizon=sequence", MEAN),
    "averaged_apart": own("k2_as_loss", SAPO),
    "rejected_tokens": own("k2_as_loss,horizon=sequence", BY_TOKEN),
}
UNSAID = [
    own("0.7*k2_as_loss+0.3*k2_as_loss,reference=old"),
    own("k2_as_loss,reference=old", *ONE, "actor_rollout_ref.actor.ppo_epochs=2"),
    own("k2_as_loss,reference=old", *ONE[:1], f"{MINI}=32"),
    own("k2_as_loss", "+klplug.ref_update=reset:2", *ONE),
    own("k2_as_loss,reference=rollout", *ONE),
    own("k2_as_loss,reference=old", *ONE, BYPASS),  # old is the sampler there
    own("k2_as_loss", TOP_P),
    own("k2_as_loss", RAW, f"{ROLLOUT}temperature=0.7", *ADAPTIVE),
    own("k2_as_loss", TOP_P, "+klplug.kl_ctrl=linear", "+klplug.kl_end=0", "+klplug.kl_steps=9"),
    own("k2_as_loss", BYPASS),
    own("k2_as_loss", MEAN),
    own("k2_as_loss", MEAN, SAPO),
    own("k1_in_reward", "algorithm.adv_estimator=grpo", "algorithm.gamma=0.9"),
    own("k2_as_loss", "algorithm.adv_estimator=gae", "algorithm.gamma=0.9"),
    own("k2_as_loss,horizon=sequence"),
    own("k2_as_loss", BY_TOKEN),
    own("k1_in_reward", BY_TOKEN),
    own("k2_as_loss,horizon=sequence", f"{REJECTS}seq_mean_k1"),
    own("k2_as_loss,horizon=sequence", BY_TOKEN, BYPASS),
    own("k2_as_loss,horizon=sequence", BY_TOKEN, f"{ROLLOUT}calculate_log_probs=False"),
    own(BY_THE_SAMPLER, f"{ROLLOUT}temperature=0.7"),
    own(BY_THE_SAMPLER, RAW, TOP_P),
    own(BY_THE_SAMPLER, "trainer.v1.trainer_mode=separate_async"),
    *(
        own(kl_type, "trainer.v1.trainer_mode=separate_async", CORRECTED)
        for kl_type in ("k1_in_reward", "k2_as_loss,head=combined")
    ),
    own("k2_as_loss,reference=rollout", f"{MODEL}lora_adapter_path=ckpt/sft"),
    own("k2_as_loss,reference=rollout", f"+actor_rollout_ref.ref.{DTYPE}=fp32"),
    own("k2_as_loss", f"{MODEL}lora_rank=8", f"+actor_rollout_ref.ref.{DTYPE}=fp32"),
    own("k2_as_loss", f"+actor_rollout_ref.ref.{DTYPE}=bfloat16"),
    own("k2_as_loss", *ADAPTIVE, "+klplug.kl_horizon=2048"),
    own("k2_as_loss", *ADAPTIVE),
    # Old is the sampler there, so a weight or a ratio to it weighs what is stale.
    own("k2_as_loss", "trainer.v1.trainer_mode=separate_async", BYPASS),
    own("k2_as_loss,head=clipped", "trainer.v1.trainer_mode=separate_async", BYPASS),
]


def notes(overrides: list[str]) -> list[str]:
    """As the command's own process says them."""
    _, line = derived(*overrides)
    assert line is not None
    return [said.removeprefix("klplug: note: ") for said in line.splitlines()[1:]]


@pytest.mark.parametrize(
    ("finding", "overrides", "word"), [(f, *case) for f, cases in SAID.items() for case in cases]
)
def test_the_launch_and_the_audit_say_the_same(
    finding: str, overrides: list[str], word: str
) -> None:
    (said,) = notes(overrides)
    assert word in said and "\n" not in said
    found = {f.id: f.message for f in report(overrides).findings}
    assert found[finding] == f"{said}."
    assert "klplug-refuses" not in found


@pytest.mark.parametrize(
    "kl_type", ["k2_as_loss", "k2_as_loss,head=combined", "k3_as_loss,head=clipped"]
)
def test_weights_to_old_are_to_the_sampler_where_verl_bypasses_it(kl_type: str) -> None:
    overrides = own(kl_type, TOP_P, BYPASS)
    weights, measured = notes(overrides)
    assert weights.startswith(f"ratio=old with {TOP_P} and {BYPASS}: the sampler's log-probs")
    assert "k1 - log S" in measured
    found = [f.message for f in report(overrides).findings if f.id == "truncated-sampler"]
    assert found == [f"{weights}.", f"{measured}."]


def test_whole_answers_divided_by_length_are_said() -> None:
    (said,) = notes(LAUNCH["divided_by_length"])
    assert said.startswith(f"{MEAN} divides by the answer's length") and "tilted" in said


def test_a_discount_of_a_kl_in_the_reward_is_said() -> None:
    _, said = notes(LAUNCH["discounted"])
    assert said.startswith("algorithm.gamma is 0.9: a token answers") and "whole answers" in said
    group = "k1_in_reward,reward_norm=group"
    (said,) = notes(own(group, "algorithm.adv_estimator=reinforce_plus_plus", "algorithm.gamma=0"))
    assert said.startswith("algorithm.gamma is 0: ")


def test_a_policy_loss_that_is_averaged_otherwise_is_said() -> None:
    (said,) = notes(LAUNCH["averaged_apart"])
    assert said.startswith(SAPO) and "loss_agg_mode=token-mean" in said
    assert "normaliser-mismatch" in {f.id for f in report(LAUNCH["averaged_apart"]).findings}


@pytest.mark.parametrize("aggregation", [[], [MEAN]])
def test_a_policy_loss_that_is_averaged_in_each_micro_batch_is_said(aggregation: list[str]) -> None:
    (said,) = notes(own("k2_as_loss", GEO_MEAN, *aggregation))
    assert said.startswith(f"{GEO_MEAN} is the mean of one micro-batch") and "the less KL" in said
    assert notes(own("k1_in_reward", GEO_MEAN, *aggregation)) == []


@pytest.mark.parametrize(
    "kl_type",
    [
        "k2_as_loss,horizon=sequence",
        "chi2_as_loss,horizon=answer",
        "k2_as_loss,level=prefix",
        "exact_as_loss,ratio=old",
        "k2_as_loss,reference=posterior",
        "k3_as_loss+k2_as_loss,level=sequence",
    ],
)
def test_tokens_masked_out_of_whole_answers_are_said(kl_type: str) -> None:
    """verl's own mask, of its option by token: trainer/ppo/rollout_corr_helper.py."""
    (said,) = notes(own(kl_type, f"{REJECTS}'seq_max_k2,token_k3'"))
    assert said.startswith(f"{REJECTS}seq_max_k2,token_k3 masks sampled tokens out")


def test_stored_answers_lose_no_tokens() -> None:
    overrides = own("js_as_loss,horizon=answer", BY_TOKEN, "+klplug.source=own.jsonl")
    assert not list(hosts()["verl"].noted(_settings(overrides), True))


@pytest.mark.parametrize("overrides", UNSAID)
def test_nothing_is_said_where_there_is_nothing_to_say(overrides: list[str]) -> None:
    assert notes(overrides) == []
    assert not {*SAID} & {f.id for f in report(overrides).findings}


def test_every_row_is_among_them() -> None:
    cases = [overrides for cases in SAID.values() for overrides, _ in cases]
    said = {
        note.id
        for overrides in [*cases, *LAUNCH.values()]
        for note in hosts()["verl"].noted(_settings(overrides), True)
    }
    assert said == {row.__name__ for row in ROWS}


def test_stored_answers_are_no_rollouts() -> None:
    asynchronous = "trainer.v1.trainer_mode=separate_async"
    overrides = own("js_as_loss", asynchronous, "+klplug.source=own.jsonl")
    assert not list(hosts()["verl"].noted(_settings(overrides), True))
    assert "stale-samples" not in {f.id for f in report(overrides).findings}


STOCK_LOSS = [
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.kl_loss_type=low_var_kl",
]


@pytest.mark.parametrize(
    ("overrides", "finding"),
    [
        ([*STOCK_LOSS, f"{MODEL}lora_adapter_path=ckpt/sft"], "lora-reference"),
        ([*STOCK_LOSS, f"+actor_rollout_ref.ref.{DTYPE}=fp32"], "reference-dtype"),
    ],
)
def test_the_audit_says_it_of_verls_own_kl_and_not_of_none(
    overrides: list[str], finding: str
) -> None:
    assert finding in {f.id for f in report(overrides).findings}
    assert finding not in {f.id for f in report(overrides[2:]).findings}
