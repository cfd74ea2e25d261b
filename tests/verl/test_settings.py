"""From what a user wrote to verl's switches, or to one clear error, on verl's own config."""

from __future__ import annotations

import pytest
import torch
from klplug_verl.plan import Plan
from klplug_verl.settings import derive
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

from tests.verl.tensors import actor_config
from tests.verl.trainer import derived, quoted

COEF = "+klplug.kl_coef=0.01"
ACTOR = "actor_rollout_ref.actor"
OTHER_LOSSES = sorted(set(POLICY_LOSS_REGISTRY) - {"vanilla"})


ROLLOUT = "actor_rollout_ref.rollout."
TAUGHT = "k2_as_loss+k2_as_loss,reference=teacher"
TOP_P, TOP_K = f"{ROLLOUT}top_p=0.9", f"{ROLLOUT}top_k=50"
RAW = f"{ROLLOUT}logprobs_mode=raw_logprobs"
BYPASS = "algorithm.rollout_correction.bypass_mode=True"


def own(kl_type: str, *more: str) -> list[str]:
    return [f"+klplug.kl_type={quoted(kl_type)}", *([COEF] if kl_type != "none" else []), *more]


def test_a_kl_in_the_loss_sets_what_verl_needs() -> None:
    config, line = derived(*own("k2_as_loss,cap=5"))
    assert config.actor_rollout_ref.actor.use_kl_loss is True
    assert config.actor_rollout_ref.actor.kl_loss_type == "k2_as_loss,cap=5"
    assert config.actor_rollout_ref.actor.kl_loss_coef == 0.01
    assert config.algorithm.use_kl_in_reward is False
    assert line is not None and "kl_type=k2_as_loss,cap=5 kl_coef=0.01" in line
    plan = Plan.of(config)
    assert plan is not None and str(plan.spec) == "k2_as_loss,cap=5" and plan.kl_coef == 0.01


def test_a_kl_in_the_reward_sets_what_verl_needs() -> None:
    config, _ = derived(*own("k1_in_reward"))
    assert config.algorithm.use_kl_in_reward is True
    assert config.algorithm.kl_penalty == "k1_in_reward"
    assert config.algorithm.kl_ctrl.kl_coef == 0.01
    assert config.actor_rollout_ref.actor.use_kl_loss is False


def test_a_sum_sets_both() -> None:
    config, _ = derived(*own("k3_in_reward+k3_as_loss"))
    assert config.algorithm.kl_penalty == "k3_in_reward"
    assert config.actor_rollout_ref.actor.kl_loss_type == "k3_as_loss"


def test_none_needs_no_reference_worker() -> None:
    from verl.trainer.ppo.utils import need_reference_policy

    config, line = derived(*own("none"))
    assert not need_reference_policy(config)
    assert line is not None and "kl_type=none" in line
    assert need_reference_policy(derived(*own("k2_as_loss"))[0])
    assert need_reference_policy(derived(*own("k1_in_reward"))[0])


def test_monitor_loads_a_reference_and_has_no_strength() -> None:
    config, line = derived("+klplug.kl_type=monitor")
    assert config.actor_rollout_ref.actor.use_kl_loss is True
    assert config.actor_rollout_ref.actor.kl_loss_type == "monitor"
    assert config.actor_rollout_ref.actor.kl_loss_coef == 0
    assert config.algorithm.use_kl_in_reward is False
    assert line is not None and "kl_type=monitor; sets" in line
    again = derive(config, {})  # as the trainer does
    assert again is not None and config.klplug == {"kl_type": "monitor", "kl_ctrl": "fixed"}


def test_an_alias_is_reported_under_its_true_name() -> None:
    config, line = derived(*own("low_var_kl_as_loss"))
    assert config.klplug.kl_type == "k3_as_loss"
    assert line is not None and "low_var" not in line


def test_nothing_asked_leaves_the_config_as_it_is() -> None:
    from tests.verl.trainer import config

    stock = config("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2")
    found, line = derived()
    assert line is None and found.actor_rollout_ref.actor == stock.actor_rollout_ref.actor
    assert found.algorithm == stock.algorithm and "klplug" not in found


@pytest.mark.parametrize("name", ["k1", "k3+", "low_var_kl", "mse+", "full"])
def test_stock_names_stay_stock(name: str) -> None:
    _, line = derived(f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_type={name}")
    assert line is None
    _, line = derived("algorithm.use_kl_in_reward=True", f"algorithm.kl_penalty={name}")
    assert line is None


def test_verls_own_keys_take_kl_types() -> None:
    config, _ = derived(f"{ACTOR}.kl_loss_type=k2_as_loss", f"{ACTOR}.kl_loss_coef=0.02")
    assert config.actor_rollout_ref.actor.use_kl_loss is True
    assert dict(config.klplug) == {"kl_type": "k2_as_loss", "kl_coef": 0.02, "kl_ctrl": "fixed"}

    config, _ = derived(
        "algorithm.kl_penalty=k1_in_reward",
        "algorithm.kl_ctrl.type=adaptive",
        "algorithm.kl_ctrl.kl_coef=0.3",
        "algorithm.kl_ctrl.target_kl=0.05",
        "algorithm.kl_ctrl.horizon=500",
    )
    plan = Plan.of(config)
    assert plan is not None and config.algorithm.use_kl_in_reward is True
    assert (plan.kl_coef, plan.kl_ctrl, plan.kl_target, plan.kl_horizon) == (
        0.3,
        "adaptive",
        0.05,
        500,
    )


def test_hydra_reads_what_the_recipe_writes() -> None:
    from recipes.quickstart.verl import quoted as written

    kl_type = "k3_in_reward,bound=2+k2_as_loss,ratio=none,horizon=sequence"
    config, _ = derived(f"+klplug.kl_type={written(kl_type)}", COEF)
    assert config.klplug.kl_type == kl_type


def test_a_ratio_to_the_rollout_records_its_log_probs() -> None:
    off = "actor_rollout_ref.rollout.calculate_log_probs=False"
    config, line = derived(*own("k2_as_loss,ratio=rollout"))
    assert config.actor_rollout_ref.rollout.calculate_log_probs is True
    assert line is not None and "calculate_log_probs=True" in line
    with pytest.raises(ValueError, match="calculate_log_probs=False"):
        derived(*own("k2_as_loss,ratio=rollout"), off)
    derived(*own("k2_as_loss"), off)


def overrides(line: str | None) -> list[str]:
    assert line is not None
    return line.partition("and overrides ")[2].split(", ")


def test_what_was_written_and_agrees_is_not_named() -> None:
    _, line = derived(*own("k2_as_loss"), f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=0.01")
    assert line is not None and "overrides" not in line


STOCK = (
    f"{ACTOR}.use_kl_loss=False",
    f"{ACTOR}.kl_loss_type=low_var_kl",
    "algorithm.use_kl_in_reward=True",
    "algorithm.kl_penalty=k3",
)


@pytest.mark.parametrize("key", STOCK)
def test_a_stock_key_is_overridden_and_named(key: str) -> None:
    config, line = derived(*own("k2_as_loss"), key)
    plain, _ = derived(*own("k2_as_loss"))
    assert overrides(line) == [key]
    if "penalty" not in key:  # which nobody reads
        assert config == plain
    assert config.actor_rollout_ref.actor.use_kl_loss and not config.algorithm.use_kl_in_reward


def test_stock_keys_are_overridden_by_a_kl_type_in_verls_own_key() -> None:
    kl_type = f"{ACTOR}.kl_loss_type=k2_as_loss"
    for key in (f"{ACTOR}.use_kl_loss=False", "algorithm.use_kl_in_reward=True"):
        config, line = derived(kl_type, f"{ACTOR}.kl_loss_coef=0.02", key)
        assert overrides(line) == [key]
        assert config.actor_rollout_ref.actor.use_kl_loss and not config.algorithm.use_kl_in_reward
    _, line = derived("algorithm.kl_penalty=k1_in_reward", "algorithm.use_kl_in_reward=False")
    assert overrides(line) == ["algorithm.use_kl_in_reward=False"]


@pytest.mark.parametrize(
    ("kl_type", "key"),
    [
        ("k2_as_loss", f"{ACTOR}.kl_loss_coef"),
        ("k1_in_reward", "algorithm.kl_ctrl.kl_coef"),
        ("k3_in_reward+k3_as_loss", f"{ACTOR}.kl_loss_coef"),
    ],
)
def test_a_stock_coefficient_in_the_same_place_is_taken(kl_type: str, key: str) -> None:
    config, line = derived(f"+klplug.kl_type={quoted(kl_type)}", f"{key}=0.02")
    assert config.klplug.kl_coef == 0.02
    assert line is not None and "overrides" not in line
    same, _ = derived(*own(kl_type), f"{key}=0.01")
    assert same.klplug.kl_coef == 0.01


def test_a_coefficient_of_another_place_or_of_zero_is_overridden() -> None:
    for key in ("algorithm.kl_ctrl.kl_coef=0.5", f"{ACTOR}.kl_loss_coef=0.0"):
        config, line = derived(*own("k2_as_loss"), key)
        assert config.klplug.kl_coef == 0.01 and overrides(line) == [key]
    config, line = derived(*own("none"), f"{ACTOR}.kl_loss_coef=0.5")
    assert "kl_coef" not in config.klplug and overrides(line) == [f"{ACTOR}.kl_loss_coef=0.5"]
    # Nor is a coefficient of the other place one for this.
    with pytest.raises(ValueError, match="needs a kl_coef"):
        derived("+klplug.kl_type=k2_as_loss", "algorithm.kl_ctrl.kl_coef=0.5")


def test_a_controller_of_verls_that_does_not_move_is_overridden() -> None:
    _, line = derived(*own("k1_in_reward"), "algorithm.kl_ctrl.target_kl=0.1")
    assert overrides(line) == ["algorithm.kl_ctrl.target_kl=0.1"]
    _, line = derived(*own("k1_in_reward"), "algorithm.kl_ctrl.type=fixed")
    assert line is not None and "overrides" not in line


MEAN = f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"

MODEL = "actor_rollout_ref.model"

THROWN = (
    "distillation.enabled=True",
    "distillation.distillation_loss.use_task_rewards=False",
)
DRAWN = ("algorithm.adv_estimator=gae", "algorithm.use_pf_ppo=True")
"""Answers drawn anew once they have advantages, which verl does of a value function's alone."""

MISTAKES: list[tuple[list[str], list[str]]] = [
    (own("k2_as_loss,reference=rollout", TOP_P), [f"{TOP_P}: the sampler's", "whole distribution"]),
    (
        own("k2_as_loss,horizon=sequence", TOP_P, BYPASS),
        [f"{TOP_P} and {BYPASS}: the", "fades with the answer's", f"or leave {BYPASS} out, with"],
    ),
    (
        own("k2_as_loss,level=prefix", TOP_K, BYPASS),
        [f"{TOP_K} and {BYPASS}: the", "fades with the answer's"],
    ),
    (
        own("k2_as_loss,reference=old", TOP_P, BYPASS),
        [f"{TOP_P} and {BYPASS}: the", "pulls where the two policies are one"],
    ),
    (own("k2_as_loss,ratio=none,reference=rollout", TOP_K), [f"{TOP_K}: the sampler's"]),
    *(
        (own(kl_type, f"{ROLLOUT}logprobs_mode={mode}"), [f"logprobs_mode={mode}: the sampler's"])
        for kl_type, mode in (
            ("k2_as_loss,reference=rollout", "raw_logits"),
            ("k2_as_loss,ratio=rollout,horizon=sequence", "processed_logits"),
        )
    ),
    (own("k2_as_loss,ratio=rollout,horizon=sequence", TOP_P), [TOP_P, "fades with the answer's"]),
    (
        own("k2_as_loss,reference=rollout", f"{ROLLOUT}temperature=0.7", RAW),
        ["logprobs_mode=raw_logprobs and", "temperature=0.7: the sampler's"],
    ),
    (
        own("k2_as_loss,weight=difficulty", f"{ROLLOUT}n=1"),
        [f"{ROLLOUT}n is 1", "weight=difficulty has no other answers"],
    ),
    (
        own("js_as_loss,reference=posterior", f"{ROLLOUT}n=1"),
        [f"{ROLLOUT}n is 1", "no other answers to estimate Z from"],
    ),
    (
        own("js_as_loss,reference=posterior", f"{ACTOR}.policy_loss.loss_mode=gspo"),
        ["loss_mode is gspo", "no policy loss beside it", "Use vanilla"],
    ),
    *(
        (
            own(
                "js_as_loss,reference=posterior",
                f"+klplug.kl_ctrl={schedule}",
                f"+klplug.kl_end={end}",
                "+klplug.kl_steps=9",
            ),
            ["klplug.kl_end is 0", "kl_type js_as_loss,reference=posterior", "End above 0"],
        )
        for schedule, end in (("linear", "0"), ("cosine", "0.0"))
    ),
    (
        own("k2_as_loss,weight=entropy", "algorithm.rollout_correction.bypass_mode=True"),
        ["algorithm.rollout_correction.bypass_mode=True", "weight=entropy needs"],
    ),
    (
        own("exact_as_loss", f"{ACTOR}.strategy=megatron"),
        ["vocab=exact", "strategy=megatron", "Use fsdp or fsdp2"],
    ),
    (
        own("exact_as_loss", f"{ACTOR}.ulysses_sequence_parallel_size=2"),
        ["vocab=exact", f"{ACTOR}.ulysses_sequence_parallel_size=2", "cut over ranks"],
    ),
    (
        own("exact_as_loss", "trainer.v1.trainer_mode=separate_async"),
        ["vocab=exact", "separate_async", "colocate_async"],
    ),
    (["+klplug.kl_type=k4_as_loss", COEF], ["k4_as_loss", "Known", "k3_as_loss"]),
    (["+klplug.kl_type=k3", COEF], ["k3_as_loss", "k3_in_reward"]),
    (["+klplug.kl_type=k2_as_loss"], ["needs a kl_coef"]),
    (["+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=0"], ["kl_coef is 0", "none"]),
    (["+klplug.kl_type=monitor", COEF], ["'monitor' takes no kl_coef"]),
    (
        ["+klplug.kl_type=monitor", "+klplug.kl_ctrl=adaptive"],
        ["kl_ctrl=adaptive", "monitor", "no coefficient to move"],
    ),
    ([f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_type=monitor"], ["+klplug.kl_type=monitor"]),
    (["+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=-1"], ["positive", "-1"]),
    (["+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=much"], ["number", "much"]),
    (["+klplug.kl_type=none", COEF], ["takes no kl_coef"]),
    ([COEF], ["klplug.kl_type is missing"]),
    (["+klplug.kltype=k2_as_loss", COEF], ["klplug.kltype", "Did you mean 'kl_type'"]),
    (["+klplug=k2_as_loss"], ["one by one"]),
    (["+klplug.kl_type=3", COEF], ["not a string"]),
    (own("k2_as_loss", "+klplug.kl_ctrl=adaptive"), ["kl_target"]),
    (own("k2_as_loss", "+klplug.kl_ctrl=sine"), ["sine", "adaptive", "pid"]),
    (own("k2_as_loss", "+klplug.kl_ctrl=pid"), ["pid needs a kl_target"]),
    (own("k2_as_loss", "+klplug.kl_ctrl="), ["kl_ctrl='' is unknown; allowed: fixed"]),
    (
        own("k2_as_loss", "+klplug.kl_ctrl=pid", "+klplug.kl_target=much"),
        ["kl_target must be a number, got 'much'"],
    ),
    (own("k2_as_loss", "+klplug.kl_ctrl=linear", "+klplug.kl_end=0"), ["needs a kl_steps"]),
    (
        own("k2_as_loss", "+klplug.kl_ctrl=pid", "+klplug.kl_target=1", "+klplug.kl_steps=9"),
        ["kl_steps=9 has no meaning with kl_ctrl=pid", "linear, cosine"],
    ),
    (own("k2_as_loss", "+klplug.kl_target=0.1"), ["kl_target", "fixed"]),
    # What was written and contradicts: both are named.
    (own("k2_as_loss", f"{ACTOR}.kl_loss_type=k3_as_loss"), ["k3_as_loss", "k2_as_loss"]),
    (own("k2_as_loss", f"{ACTOR}.kl_loss_coef=0.5"), ["kl_loss_coef=0.5", "0.01"]),
    (own("k1_in_reward", "algorithm.kl_ctrl.kl_coef=0.5"), ["kl_coef=0.5", "0.01"]),
    (
        own("k1_in_reward", "algorithm.kl_ctrl.type=adaptive"),
        ["type=adaptive", "+klplug.kl_ctrl=adaptive"],
    ),
    # kl_types in verl's own keys.
    ([f"{ACTOR}.kl_loss_type=k1_in_reward"], ["_as_loss", "+klplug.kl_type=k1_in_reward"]),
    (["algorithm.kl_penalty=k2_as_loss"], ["_in_reward", "+klplug.kl_type=k2_as_loss"]),
    ([f"{ACTOR}.kl_loss_type=k2_as_los"], ["kl_loss_type", "k2_as_loss", "low_var_kl"]),
    (
        [f"{ACTOR}.kl_loss_type=k2_as_loss", "algorithm.kl_penalty=k3_in_reward"],
        ["one place", "k3_in_reward+k2_as_loss"],
    ),
    *(
        (
            own(
                f"k2_as_loss,head={head}",
                f"actor_rollout_ref.actor.policy_loss.loss_mode={mode}",
            ),
            [f"loss_mode is {mode}", f"head={head}", "vanilla"],
        )
        for head, mode in [("clipped", "gspo"), *(("combined", m) for m in OTHER_LOSSES)]
    ),
    (
        own("k2_as_loss,reference=rollout", "+klplug.kl_ctrl=adaptive", "+klplug.kl_target=1"),
        ["kl_ctrl is adaptive", "the KL to the reference model"],
    ),
    (
        own("k2_as_loss,horizon=sequence,baseline=group", "actor_rollout_ref.rollout.n=1"),
        ["rollout.n is 1", "baseline=none"],
    ),
    (
        own("k1_in_reward,baseline=group", "actor_rollout_ref.rollout.n=1"),
        ["rollout.n is 1", "baseline=none"],
    ),
    (
        own(
            "k1_in_reward,baseline=batch",
            "actor_rollout_ref.rollout.n=1",
            "data.train_batch_size=1",
        ),
        ["no other answers"],
    ),
    (
        own("k2_as_loss,reference=rollout,horizon=sequence,baseline=group"),
        ["baseline with reference=rollout"],
    ),
    (
        own(
            "k2_as_loss,horizon=sequence,baseline=group+js_as_loss,horizon=sequence,baseline=batch"
        ),
        ["one term as loss"],
    ),
    (
        own("js_as_loss,vocab=exact+exact_as_loss"),
        ["2 divergences over the vocabulary", "vocab=sample"],
    ),
    (
        own(
            "k2_as_loss,reference=rollout",
            "actor_rollout_ref.rollout.calculate_log_probs=False",
        ),
        ["rollout log-probs", "calculate_log_probs=False"],
    ),
    # What is not served, by name.
    (own("k2_as_loss", "+async_training.x=1"), ["asynchronous", "separate_async"]),
    (
        own("k1_in_reward,baseline=batch", "algorithm.adv_estimator=gae"),
        ["adv_estimator=gae", "baseline=batch"],
    ),
    (own("k1_in_reward", MEAN, "algorithm.adv_estimator=gae"), ["=gae there is no group"]),
    (
        own("k1_in_reward,reward_norm=group", "algorithm.adv_estimator=gdpo"),
        ["gdpo_reward_keys", "k2_as_loss"],
    ),
    (
        own("k1_in_reward", "algorithm.adv_estimator=reinforce_plus_plus"),
        ["reinforce_plus_plus", "grpo"],
    ),
    (
        own(
            "alpha_in_reward,alpha=0.3,baseline=batch,bound=2",
            "algorithm.adv_estimator=reinforce_plus_plus",
        ),
        ["or verl's own order: alpha_in_reward,alpha=0.3,bound=2,reward_norm=group"],
    ),
    (
        own("k1_in_reward", MEAN, "actor_rollout_ref.rollout.n=1"),
        ["rollout.n=1", "long answers", "Use actor_rollout_ref.actor.loss_agg_mode=token-mean"],
    ),
    (
        own("k1_in_reward", f"{ACTOR}.policy_loss.loss_mode=sapo", "algorithm.adv_estimator=gae"),
        ["long answers", "policy_loss.loss_mode=vanilla"],
    ),
    (own("k2_as_loss", *THROWN), ["use_task_rewards=False"]),
    *(
        ([*asked, *THROWN], ["use_task_rewards=False", "Every KL in it or in its advantages"])
        for asked in (own("k1_in_reward"), ["+klplug.kl_type=monitor"])
    ),
    (
        own("k1_in_reward", *DRAWN, "++trainer.use_v1=True"),
        ["algorithm.use_pf_ppo=True", "beside the tokens of others", "trainer.use_v1=False"],
    ),
    *(
        (own(kl_type, *DRAWN, "++trainer.use_v1=False"), [f"some of them twice. {option}"])
        for kl_type, option in (
            ("k2_as_loss,horizon=sequence,baseline=group", "baseline=group"),
            ("k2_as_loss,weight=entropy:0.5", "weight=entropy:0.5"),
            ("js_as_loss,reference=posterior", "reference=posterior"),
        )
    ),
    (
        own("k2_as_loss", "++trainer.use_legacy_worker_impl=auto", f"{ACTOR}.strategy=megatron"),
        ["strategy=megatron", "use_legacy_worker_impl=disable"],
    ),
    # A reference of the user's own.
    (own("k2_as_loss", "+klplug.ref_model="), ["klplug.ref_model is empty: write a path"]),
    (own(TAUGHT, "+klplug.teacher="), ["klplug.teacher is empty: write a path"]),
    (own("js_as_loss", "+klplug.source="), ["klplug.source is empty: write a path"]),
    (own("k2_as_loss", "+klplug.ref_model=7"), ["klplug.ref_model=7 is not a string"]),
    (
        ["+klplug.kl_type=none", "+klplug.ref_model=teacher"],
        ["klplug.ref_model is teacher", "kl_type none has no KL to a reference model"],
    ),
    (
        own("k2_as_loss,reference=rollout", "+klplug.ref_model=teacher"),
        ["klplug.ref_model is teacher", "kl_type k2_as_loss,reference=rollout"],
    ),
    (
        own("k2_as_loss,reference=old", "+klplug.ref_model=teacher"),
        ["klplug.ref_model is teacher", "kl_type k2_as_loss,reference=old"],
    ),
    (
        own("k2_as_loss", "+klplug.ref_model=teacher", f"{MODEL}.lora_rank=8"),
        ["klplug.ref_model=teacher", "lora_rank=8", "Leave one out"],
    ),
    (
        own("k2_as_loss", "+klplug.ref_model=teacher", f"{MODEL}.lora_adapter_path=adapter"),
        ["klplug.ref_model=teacher", "lora_adapter_path=adapter"],
    ),
    (
        own("k2_as_loss", "+klplug.ref_model=teacher", "++trainer.use_legacy_worker_impl=auto"),
        ["klplug.ref_model=teacher", "use_legacy_worker_impl=disable"],
    ),
    *(
        (
            own(kl_type, f"{ACTOR}.strategy=torchtitan", f"{MODEL}.{adapter}"),
            ["strategy=torchtitan", adapter, "the policy itself", "always 0. Leave one out"],
        )
        for kl_type, adapter in (
            ("k2_as_loss", "lora_rank=8"),
            ("k1_in_reward", "lora_adapter_path=adapter"),
        )
    ),
    # A reference that moves.
    (own("k2_as_loss", "+klplug.ref_update=200"), ["klplug.ref_update=200 is not a string"]),
    (own("k2_as_loss", "+klplug.ref_update=reset:0"), ["ref_update=reset:0: N is '0'", "from 1"]),
    (own("k2_as_loss", "+klplug.ref_update=mean:3"), ["'mean' is unknown", "reset:200"]),
    (
        own("k2_as_loss,reference=old", "+klplug.ref_update=reset:2"),
        ["klplug.ref_update is reset:2", "kl_type k2_as_loss,reference=old", "none to move"],
    ),
    (
        own("k1_in_reward", "+klplug.ref_update=reset:1"),
        ["klplug.ref_update is reset:1", "A KL in the reward is measured there, and is 0"],
    ),
    (
        own(
            *("k2_as_loss", "+klplug.ref_update=reset:1"),
            *("+klplug.kl_ctrl=adaptive", "+klplug.kl_target=0.1"),
        ),
        ["klplug.ref_update is reset:1", "klplug.kl_ctrl is adaptive, and is fed the KL there"],
    ),
    (
        own("k2_as_loss", "+klplug.ref_update=reset:2", f"{MODEL}.lora_rank=8"),
        ["klplug.ref_update=reset:2", "lora_rank=8", "the policy's own base", "Leave one out"],
    ),
    (
        own("k2_as_loss", "+klplug.ref_update=reset:2", f"{ACTOR}.strategy=megatron"),
        ["klplug.ref_update=reset:2", "strategy=megatron", "Use fsdp or fsdp2"],
    ),
    (
        own("k2_as_loss", "+klplug.ref_update=reset:2", "++trainer.use_legacy_worker_impl=auto"),
        ["klplug.ref_update=reset:2", "use_legacy_worker_impl=disable"],
    ),
    (
        own("k2_as_loss", "+klplug.ref_update=reset:2", "++trainer.v1.trainer_mode=separate_async"),
        ["klplug.ref_update=reset:2", "separate_async", "sync or colocate_async"],
    ),
    # The reference's own answers.
    (own("js_as_loss", "+klplug.source=7"), ["klplug.source=7 is not a string"]),
    (
        own("k2_as_loss", "+klplug.source=own.jsonl"),
        ["klplug.source is own.jsonl", "k2 is refused", "forward, js, hellinger, tv"],
    ),
    (
        own("k1_in_reward", "+klplug.source=own.jsonl"),
        ["klplug.source is own.jsonl", "a reward is of the policy's own answers"],
    ),
    (
        own("js_as_loss", "+klplug.source=own.jsonl", "+klplug.ref_update=reset:2"),
        ["klplug.source is own.jsonl, and klplug.ref_update is reset:2", "Leave one out"],
    ),
    (
        own("js_as_loss", "+klplug.source=own.jsonl", f"{ACTOR}.strategy=megatron"),
        ["klplug.source=own.jsonl", "strategy=megatron", "Use fsdp or fsdp2"],
    ),
    (
        own("js_as_loss", "+klplug.source=own.jsonl", "++trainer.use_legacy_worker_impl=auto"),
        ["klplug.source=own.jsonl", "use_legacy_worker_impl=disable"],
    ),
    (
        own("js_as_loss", "+klplug.source=own.jsonl", "distillation.enabled=True"),
        ["klplug.source=own.jsonl", "distillation.enabled=True", "Leave one out"],
    ),
    # A second frozen model.
    (
        own(TAUGHT),
        ["reference=teacher needs klplug.teacher, the path of a second frozen model"],
    ),
    (
        own("k2_as_loss", "+klplug.teacher=hub/teacher"),
        ["klplug.teacher is hub/teacher", "no term with reference=teacher", "none is loaded"],
    ),
    (
        own("k2_as_loss,reference=teacher", "+klplug.teacher=hub/teacher"),
        ["no KL to the reference model beside", "Name the teacher as klplug.ref_model"],
    ),
    (own(TAUGHT, "+klplug.teacher=7"), ["klplug.teacher=7 is not a string"]),
    (
        ["+klplug.kl_type=monitor", "+klplug.teacher=hub/teacher"],
        ["klplug.teacher is hub/teacher", "kl_type monitor has no term with"],
    ),
    (
        [f"+klplug.kl_type='{TAUGHT}'", "+klplug.kl_coef=0", "+klplug.teacher=hub/teacher"],
        [f"kl_coef is 0, so kl_type '{TAUGHT}' would do nothing"],
    ),
    (
        own("js_as_loss", "+klplug.source=own.jsonl", "+klplug.teacher=hub/teacher"),
        ["klplug.teacher is hub/teacher", "no term with reference=teacher"],
    ),
    (
        own(TAUGHT, "+klplug.teacher=hub/teacher", f"{MODEL}.lora_rank=8"),
        ["klplug.teacher=hub/teacher", "lora_rank=8", "no reference worker", "Leave one out"],
    ),
    (
        own(TAUGHT, "+klplug.teacher=hub/teacher", f"{ACTOR}.strategy=megatron"),
        ["klplug.teacher=hub/teacher", "strategy=megatron", "Use fsdp or fsdp2"],
    ),
    (
        own(TAUGHT, "+klplug.teacher=hub/teacher", "++trainer.use_legacy_worker_impl=auto"),
        ["klplug.teacher=hub/teacher", "use_legacy_worker_impl=disable"],
    ),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES)
def test_a_mistake_is_told_with_what_is_allowed(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        derived(*overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "gpg", "sapo", "geo_mean"])
def test_a_policy_loss_divides_by_length_where_verls_own_does(mode: str) -> None:
    """By the gradient of verl's own, of two answers of 1 and of 4 tokens."""
    loss = POLICY_LOSS_REGISTRY.get(mode)
    if loss is None:
        return  # this verl has none
    mask = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    log_probs = torch.full_like(mask, -1.0, requires_grad=True)
    config = actor_config(None, 0.0)
    loss(log_probs.detach(), log_probs, mask, mask, "token-mean", config)[0].backward()
    assert log_probs.grad is not None and log_probs.grad[0, 0] != 0
    divides = not torch.isclose(log_probs.grad[0, 0], log_probs.grad[1, 0])
    asked = own("k1_in_reward", f"{ACTOR}.policy_loss.loss_mode={mode}")
    plan = Plan.of(derived(*asked, f"{ACTOR}.loss_agg_mode=token-mean")[0])
    assert plan is not None and plan.divides_by_length is divides


@pytest.mark.parametrize(("mode", "times"), [("vanilla", 1), ("sapo", 1), ("geo_mean", 2)])
def test_geo_mean_is_as_strong_as_there_are_micro_batches(mode: str, times: int) -> None:
    """verl's own of two answers, in one micro-batch and in two, which its engine adds up."""
    loss = POLICY_LOSS_REGISTRY.get(mode)
    if loss is None:
        return  # this verl has none
    whole = {"dp_size": 1, "batch_num_tokens": 4, "global_batch_size": 2, "loss_scale_factor": None}

    def gradient(*rows: slice) -> torch.Tensor:
        log_probs = torch.full((2, 2), -1.0, requires_grad=True)
        ones = torch.ones(2, 2)
        for of in rows:
            config = actor_config(None, 0.0)
            config.global_batch_info.update(whole)
            own = log_probs[of]
            found, *_ = loss(own.detach(), own, ones[of], ones[of], "token-mean", config)
            found.backward()
        assert log_probs.grad is not None and log_probs.grad.all()
        return log_probs.grad

    torch.testing.assert_close(gradient(slice(1), slice(1, 2)), times * gradient(slice(2)))


@pytest.mark.parametrize("estimator", ["gae", "reinforce_plus_plus", "optimal_token_baseline"])
def test_a_kl_in_the_loss_goes_with_every_estimator(estimator: str) -> None:
    derived(*own("k2_as_loss"), f"algorithm.adv_estimator={estimator}")


def test_monitor_measures_beside_a_distillation_by_policy_gradient() -> None:
    """verl's loss there is 0, and its metrics are kept (trainer/distillation/losses.py)."""
    by_policy = "distillation.distillation_loss.use_policy_gradient=True"
    _, line = derived("+klplug.kl_type=monitor", *THROWN, by_policy)
    assert line is not None and "kl_type=monitor" in line
