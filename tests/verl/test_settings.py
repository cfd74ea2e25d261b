"""From what a user wrote to verl's switches, or to one clear error, on verl's own config."""

from __future__ import annotations

from pathlib import Path

import pytest
from klplug_verl.settings import Plan
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

from tests.verl.trainer import derived, quoted

COEF = "+klplug.kl_coef=0.01"
ACTOR = "actor_rollout_ref.actor"
OTHER_LOSSES = sorted(set(POLICY_LOSS_REGISTRY) - {"vanilla"})


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

    kl_type = "k2_as_loss,ratio=none,horizon=sequence+k3_in_reward,bound=2"
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


def test_what_was_written_and_agrees_is_fine() -> None:
    derived(*own("k2_as_loss"), f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_type=k2")
    derived(*own("k2_as_loss"), f"{ACTOR}.kl_loss_type=mse", f"{ACTOR}.kl_loss_coef=0.01")
    derived("+klplug.kl_type=k2_as_loss", f"{ACTOR}.kl_loss_coef=0.01")


MEAN = f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+klplug.kl_type=k4_as_loss", COEF], ["k4_as_loss", "known", "k3_as_loss"]),
        (["+klplug.kl_type=k3", COEF], ["k3_as_loss", "k3_in_reward"]),
        (["+klplug.kl_type=k2_as_loss"], ["needs a kl_coef"]),
        (["+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=0"], ["kl_coef is 0", "none"]),
        (["+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=-1"], ["positive", "-1"]),
        (["+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=much"], ["number", "much"]),
        (["+klplug.kl_type=none", COEF], ["takes no kl_coef"]),
        ([COEF], ["klplug.kl_type is missing"]),
        (["+klplug.kltype=k2_as_loss", COEF], ["klplug.kltype", "Did you mean 'kl_type'"]),
        (["+klplug=k2_as_loss"], ["one by one"]),
        (["+klplug.kl_type=3", COEF], ["not a string"]),
        (own("k2_as_loss", "+klplug.kl_ctrl=adaptive"), ["kl_target"]),
        (own("k2_as_loss", "+klplug.kl_ctrl=pid"), ["pid", "adaptive"]),
        (own("k2_as_loss", "+klplug.kl_target=0.1"), ["kl_target", "fixed"]),
        # What was written and contradicts: both are named.
        (own("k2_as_loss", f"{ACTOR}.use_kl_loss=False"), ["use_kl_loss=False", "k2_as_loss"]),
        (own("k1_in_reward", f"{ACTOR}.use_kl_loss=True"), ["use_kl_loss=True", "k1_in_reward"]),
        (own("k2_as_loss", "algorithm.use_kl_in_reward=True"), ["use_kl_in_reward", "k2_as_loss"]),
        (own("none", f"{ACTOR}.use_kl_loss=True"), ["use_kl_loss=True", "none"]),
        (own("k2_as_loss", f"{ACTOR}.kl_loss_type=k3"), ["kl_loss_type=k3", "k2_as_loss"]),
        (own("k2_as_loss", f"{ACTOR}.kl_loss_type=k3_as_loss"), ["k3_as_loss", "k2_as_loss"]),
        (own("k1_in_reward", "algorithm.kl_penalty=k3"), ["kl_penalty=k3", "k1_in_reward"]),
        (own("k2_as_loss", f"{ACTOR}.kl_loss_coef=0.5"), ["kl_loss_coef=0.5", "0.01"]),
        (own("k1_in_reward", "algorithm.kl_ctrl.kl_coef=0.5"), ["kl_coef=0.5", "0.01"]),
        (own("k1_in_reward", "algorithm.kl_ctrl.type=adaptive"), ["type=adaptive", "kl_ctrl"]),
        # kl_types in verl's own keys.
        (
            [f"{ACTOR}.kl_loss_type=k2_as_loss", f"{ACTOR}.use_kl_loss=False"],
            ["use_kl_loss=False", "kl_loss_type=k2_as_loss"],
        ),
        (
            ["algorithm.kl_penalty=k1_in_reward", "algorithm.use_kl_in_reward=False"],
            ["use_kl_in_reward=False", "kl_penalty=k1_in_reward"],
        ),
        ([f"{ACTOR}.kl_loss_type=k1_in_reward"], ["_as_loss", "+klplug.kl_type=k1_in_reward"]),
        (["algorithm.kl_penalty=k2_as_loss"], ["_in_reward", "+klplug.kl_type=k2_as_loss"]),
        ([f"{ACTOR}.kl_loss_type=k2_as_los"], ["kl_loss_type", "k2_as_loss", "low_var_kl"]),
        (
            [f"{ACTOR}.kl_loss_type=k2_as_loss", "algorithm.use_kl_in_reward=True"],
            ["both placements", "k1_in_reward+k2_as_loss"],
        ),
        (
            [f"{ACTOR}.kl_loss_type=k2_as_loss", "algorithm.kl_penalty=k3_in_reward"],
            ["both placements", "k3_in_reward+k2_as_loss"],
        ),
        *(
            (
                own(
                    f"k2_as_loss,head={head}",
                    f"actor_rollout_ref.actor.policy_loss.loss_mode={mode}",
                ),
                [f"loss_mode={mode}", f"head={head}", "vanilla"],
            )
            for head, mode in [("clipped", "gspo"), *(("combined", m) for m in OTHER_LOSSES)]
        ),
        (
            own("k2_as_loss,reference=rollout", "+klplug.kl_ctrl=adaptive", "+klplug.kl_target=1"),
            ["kl_ctrl=adaptive", "sampler"],
        ),
        (
            own("k2_as_loss,horizon=sequence,baseline=group", "actor_rollout_ref.rollout.n=1"),
            ["rollout.n=1", "baseline=none"],
        ),
        (
            own("k1_in_reward,baseline=group", "actor_rollout_ref.rollout.n=1"),
            ["rollout.n=1", "baseline=none"],
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
                "k2_as_loss,horizon=sequence,baseline=group"
                "+js_as_loss,horizon=sequence,baseline=batch"
            ),
            ["one term as loss"],
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
        (own("k1_in_reward", "algorithm.adv_estimator=gae"), ["gae", "reward_norm=group"]),
        (
            own("k1_in_reward,reward_norm=group", "algorithm.adv_estimator=gdpo"),
            ["gdpo_reward_keys", "k2_as_loss"],
        ),
        (
            own("k1_in_reward", "algorithm.adv_estimator=reinforce_plus_plus"),
            ["reinforce_plus_plus", "grpo"],
        ),
        (
            own("k1_in_reward", MEAN, "actor_rollout_ref.rollout.n=1"),
            ["rollout.n=1", "long answers"],
        ),
        (
            own(
                "k2_as_loss",
                "distillation.enabled=True",
                "distillation.distillation_loss.use_task_rewards=False",
            ),
            ["use_task_rewards=False"],
        ),
    ],
)
def test_a_mistake_is_told_with_what_is_allowed(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        derived(*overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("estimator", ["gae", "reinforce_plus_plus", "optimal_token_baseline"])
def test_a_kl_in_the_loss_goes_with_every_estimator(estimator: str) -> None:
    derived(*own("k2_as_loss"), f"algorithm.adv_estimator={estimator}")


def test_paths_and_columns_are_checked(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    from klplug_verl.settings import check_files

    from tests.verl.trainer import config

    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["1+1"]}), path)
    files = [f"data.train_files={path}", f"data.val_files={path}"]
    model = "actor_rollout_ref.model.path=owner/name"
    check_files(config(*files, model, "data.prompt_key=question"))
    with pytest.raises(ValueError, match=r"no column 'prompt'.*question.*data\.prompt_key"):
        check_files(config(*files, model))
    with pytest.raises(ValueError, match=r"data.train_files=.*no such path"):
        check_files(config(f"data.train_files={tmp_path}/none.parquet", model))
    with pytest.raises(ValueError, match=r"model.path=.*no such path"):
        check_files(config(*files, f"actor_rollout_ref.model.path={tmp_path}/no/model"))
    path.write_text("text")
    with pytest.raises(ValueError, match="not a parquet file"):
        check_files(config(*files, model))
