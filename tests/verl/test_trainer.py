"""The trainer's side: advantages, controller, checkpoints, in verl's own trainer classes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
from klplug_verl.actor import BASELINE, numbers
from klplug_verl.keys import COEF_KEY
from klplug_verl.plan import Plan
from klplug_verl.refusals import REWARD_ESTIMATORS
from klplug_verl.trainer import (
    _check_answers_are_rows,
    excess_over_group,
    to_go_over_answer,
    update_actor_in_fit,
)
from omegaconf import open_dict
from torch import Tensor

from klplug import kl_term, parse
from klplug.hosting.state import Reference, StateError
from tests.one_meaning import BASELINES, BETA, batch, return_baseline, reward_advantages
from tests.one_meaning import batch as batch_of_one_meaning
from tests.verl.tensors import KEYS, experience
from tests.verl.trainer import (
    TRAINERS,
    config,
    joined,
    quoted,
    ray_trainer,
    trainer,
    v1_trainer,
)

SCORES = torch.tensor([1.0, 0.0, 0.25, 0.5])
COEF = f"+klplug.kl_coef={BETA}"


@pytest.fixture(params=TRAINERS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which of verl's trainers."""
    return str(request.param)


def klplug(kl_type: str) -> tuple[str, ...]:
    return f"+klplug.kl_type={quoted(kl_type)}", COEF


def staged(*overrides: str, scores: Tensor = SCORES) -> tuple[Any, dict[str, Any]]:
    return joined(trainer(*overrides), experience(batch(), scores), KEYS)


# Strength: verl's own in-reward KL is divided by the group's std together with the reward.


def test_the_force_is_beta_whatever_the_groups_std() -> None:
    for scores in (SCORES, 10 * SCORES, torch.ones(4)):
        stock, _ = staged(scores=scores)
        ours, _ = staged(*klplug("k1_in_reward"), scores=scores)
        extra = ours.batch["advantages"] - stock.batch["advantages"]
        torch.testing.assert_close(extra, reward_advantages("k1_in_reward"), rtol=1e-4, atol=1e-5)


def served() -> list[str]:
    """Those of klplug's list that the installed verl has."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    return [name for name in REWARD_ESTIMATORS if name in ADV_ESTIMATOR_REGISTRY]


@pytest.mark.parametrize("estimator", served())
def test_the_force_is_beta_under_every_estimator_that_is_served(estimator: str) -> None:
    # The v1 trainer makes the same call, but hands ReMax no baselines.
    kind = "ray" if estimator == "remax" else TRAINERS[0]
    algorithm = f"algorithm.adv_estimator={estimator}"
    expected = reward_advantages("k1_in_reward")
    for scale in (1.0, 10.0):
        found = []
        for own in ((), klplug("k1_in_reward")):
            data = experience(batch(), scale * SCORES)
            if estimator == "remax":
                data.batch["reward_baselines"] = scale * torch.tensor([0.5, 0.5, 0.3, 0.3])
            found.append(joined(trainer(algorithm, *own, kind=kind), data, KEYS)[0].batch)
        stock, ours = found
        assert stock["advantages"].norm() > 0.1
        for name in ("advantages", "returns"):
            torch.testing.assert_close(ours[name] - stock[name], expected, rtol=1e-4, atol=1e-5)


def test_the_estimators_of_the_list_are_verls() -> None:
    assert len(served()) >= 8


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "gae", "reinforce_plus_plus"])
def test_reward_norm_group_is_verls_own_order(estimator: str) -> None:
    algorithm = f"algorithm.adv_estimator={estimator}"
    stock = trainer(
        algorithm,
        "algorithm.use_kl_in_reward=True",
        "algorithm.kl_penalty=k1",
        f"algorithm.kl_ctrl.kl_coef={BETA}",
    )
    ours = trainer(algorithm, *klplug("k1_in_reward,reward_norm=group"))
    given = [experience(batch(), SCORES) for _ in range(2)]
    for data in given:
        data.batch["values"] = torch.zeros_like(data.batch["old_log_probs"])
    theirs, _ = joined(stock, given[0], KEYS)
    found, metrics = joined(ours, given[1], KEYS)
    for name in ("token_level_rewards", "advantages", "returns"):
        torch.testing.assert_close(found.batch[name], theirs.batch[name], rtol=1e-6, atol=1e-7)
    assert metrics["actor/reward_kl_penalty_coeff"] == BETA


def test_under_gae_a_kl_is_in_the_rewards_that_the_values_are_of(kind: str) -> None:
    """As on OpenRLHF, and as verl's own; the two orders are one where there is no group."""
    algorithm = "algorithm.adv_estimator=gae"
    own = (
        "algorithm.use_kl_in_reward=True",
        "algorithm.kl_penalty=k1",
        f"algorithm.kl_ctrl.kl_coef={BETA}",
    )
    found = []
    for settings in ((), own, klplug("k1_in_reward"), klplug("k1_in_reward,reward_norm=group")):
        data = experience(batch(), SCORES)
        data.batch["values"] = 0.3 * batch().old_log_probs
        found.append(joined(trainer(algorithm, *settings, kind=kind), data, KEYS)[0].batch)
    without, stock, ours, group = found
    assert (stock["returns"] - without["returns"]).norm() > 0.1
    for name in ("token_level_rewards", "advantages", "returns"):
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(ours[name], group[name])


def test_reward_norm_group_has_another_force_than_none() -> None:
    none, _ = staged(*klplug("k1_in_reward"))
    group, _ = staged(*klplug("k1_in_reward,reward_norm=group"))
    difference = none.batch["advantages"] - group.batch["advantages"]
    assert difference.norm() > 0.01 * none.batch["advantages"].norm()


def test_both_orders_can_be_summed() -> None:
    both, _ = staged(*klplug("k1_in_reward,reward_norm=group+k2_in_reward"))
    group, _ = staged(*klplug("k1_in_reward,reward_norm=group"))
    extra = both.batch["advantages"] - group.batch["advantages"]
    torch.testing.assert_close(extra, reward_advantages("k2_in_reward"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kl_type", ["k2_as_loss", "none", "monitor"])
def test_without_a_kl_in_the_reward_advantages_are_stock(kl_type: str) -> None:
    own = [f"+klplug.kl_type={kl_type}", *([COEF] if kl_type == "k2_as_loss" else [])]
    ours, metrics = staged(*own)
    stock, stock_metrics = staged()
    assert torch.equal(ours.batch["advantages"], stock.batch["advantages"])
    assert metrics.get("klplug/active") == (1.0 if kl_type == "none" else None)
    assert not any("klplug" in name for name in stock_metrics)


def test_where_the_loss_divides_by_length_each_answer_is_compared_with_its_group() -> None:
    mean = "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"
    given = batch()
    stock, _ = staged(mean)
    ours, _ = staged(mean, *klplug("k1_in_reward"))
    term = kl_term("k1_in_reward", given.old_log_probs, given.ref_log_probs, given.response_mask)
    answers = term.coefficient.sum(-1)
    others = answers[torch.tensor([1, 0, 3, 2])]
    expected = -BETA * (answers - others)[:, None] * given.response_mask
    found = ours.batch["advantages"] - stock.batch["advantages"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("other", [0.5, -0.75])
def test_terms_that_differ_in_their_baseline_alone_add_up(other: float, aggregation: str) -> None:
    divides = f"actor_rollout_ref.actor.loss_agg_mode={aggregation}"
    baseline = "k1_in_reward,baseline=group"
    both, plain, compared = (
        staged(divides, *klplug(kl))[0].batch["advantages"] - staged(divides)[0].batch["advantages"]
        for kl in (f"0.75*k1_in_reward+{other}*{baseline}", "k1_in_reward", baseline)
    )
    torch.testing.assert_close(both, 0.75 * plain + other * compared, rtol=1e-4, atol=1e-5)
    if aggregation == "token-mean":
        assert both.abs().max() > 1e-3


# What is measured on the whole batch, and what needs no reference model.


@pytest.mark.parametrize("kl_type", [k for k in BASELINES if "as_loss" in k])
def test_the_baseline_of_the_whole_batch_goes_with_the_samples(
    kl_type: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = klplug(kl_type)
    if "teacher" in kl_type:
        own = (*own, "+klplug.teacher=hub/teacher")
        monkeypatch.setattr("klplug.hosting.references.check", lambda *_, **__: None)
    data, _ = joined(trainer(*own, kind=kind), experience(batch(), SCORES), KEYS)
    expected = return_baseline(kl_type)
    assert expected is not None
    found = data.batch[BASELINE] * batch().response_mask
    torch.testing.assert_close(found, expected * batch().response_mask)


def test_without_a_baseline_nothing_goes_with_them(kind: str) -> None:
    data, _ = joined(trainer(*klplug("k2_as_loss"), kind=kind), experience(batch(), SCORES), KEYS)
    assert BASELINE not in data.batch


@pytest.mark.parametrize(
    ("kl_type", "said"),
    [
        ("k1_in_reward,baseline=group", "baseline=group looks at.*Use baseline=none"),
        ("chi2_as_loss,horizon=answer", "horizon=answer looks at.*Use horizon=token"),
        ("k2_as_loss,horizon=sequence", "horizon=sequence looks at.*Use horizon=token"),
        ("k2_as_loss,level=prefix", "level=prefix looks at.*Use level=token"),
        ("k3_as_loss,level=sequence", "level=sequence looks at.*Use level=token"),
        ("k1_in_reward,reward_norm=group", "reward_norm=group looks at.*Use reward_norm=none"),
    ],
)
def test_what_is_of_whole_answers_is_not_of_rows(kl_type: str, said: str) -> None:
    made = trainer(*klplug(kl_type))
    if not hasattr(made, "_compute_advantage"):
        return  # a row is an answer there
    with pytest.raises(RuntimeError, match=said):
        joined(made, experience(batch(), SCORES), ROWS_OF_ONE)


def test_over_the_vocabulary_no_weight_is_the_advice() -> None:
    plan = Plan(spec=parse("k2_as_loss,vocab=exact,ratio=old"), kl_coef=BETA)
    with pytest.raises(RuntimeError, match=r"level=prefix looks at.*Use ratio=none"):
        _check_answers_are_rows(plan, n_answers=3, n_rows=4)


ROWS_OF_ONE = ("a_0_0", "a_0_1", "b_0_0", "b_1_0")


@pytest.mark.parametrize(
    "settings",
    [
        klplug("k2_as_loss+k1_in_reward"),
        klplug("k3_as_loss,head=clipped"),
        # Values, and not a group's last rows, have the rewards there, in either order.
        (*klplug("k1_in_reward,reward_norm=group"), "algorithm.adv_estimator=gae"),
    ],
)
def test_what_is_of_tokens_may_be_of_rows(settings: tuple[str, ...]) -> None:
    made = trainer(*settings)
    if not hasattr(made, "_compute_advantage"):
        return
    data = experience(batch(), SCORES)
    data.batch["values"] = torch.zeros_like(data.batch["old_log_probs"])
    _, metrics = joined(made, data, ROWS_OF_ONE)
    assert metrics["klplug/kl_before_update"] > 0


@pytest.mark.parametrize(
    ("kl_type", "is_needed"),
    [
        ("k2_as_loss,reference=rollout", False),
        ("k2_as_loss,reference=rollout+k3_as_loss", True),
        ("k2_as_loss", True),
        ("none", False),
    ],
)
def test_the_sampler_as_the_reference_loads_no_model(
    kl_type: str, is_needed: bool, kind: str
) -> None:
    from verl.trainer.ppo import ray_trainer

    own = klplug(kl_type) if kl_type != "none" else ("+klplug.kl_type=none",)
    made = trainer(*own, kind=kind)
    assert made.use_reference_policy is is_needed
    assert ray_trainer.need_reference_policy(made.config) is is_needed
    assert made.config.actor_rollout_ref.actor.use_kl_loss is (kl_type != "none")
    data = experience(batch(), SCORES)
    if not is_needed:
        del data.batch["ref_log_prob"]
    _, metrics = joined(made, data, KEYS)
    # On the sampler's own samples its KL is 0, and no KL to a reference is to be had.
    assert ("klplug/k1" in metrics) is ("klplug/kl_before_update" in metrics) is is_needed
    if kl_type != "none":
        made.actor_rollout_wg = Workers()
        update(made, metrics)
        assert made.actor_rollout_wg.sent == [BETA]


def test_stock_kls_need_their_reference_model(kind: str) -> None:
    assert trainer("actor_rollout_ref.actor.use_kl_loss=True", kind=kind).use_reference_policy
    assert not trainer(kind=kind).use_reference_policy


# Answers that an agent loop cut into several rows.


def test_what_comes_later_in_the_answer_counts_across_its_rows() -> None:
    coefficient = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])
    to_go = to_go_over_answer(coefficient, ["u_0_1", "u_1_0", "u_0_0"])
    expected = torch.tensor([[3.0, 2.0], [12.0, 8.0], [51.0, 35.0]])
    assert torch.equal(to_go, expected)
    three = to_go_over_answer(coefficient, ["u_0_0", "u_0_1", "u_0_2"])
    assert torch.equal(three, torch.tensor([[63.0, 62.0], [60.0, 56.0], [48.0, 32.0]]))


def test_a_group_compares_answers_not_rows() -> None:
    coefficient = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    keys, groups = ["u_0_0", "u_1_0", "u_0_1", "w_0_0"], ["u", "u", "u", "w"]
    excess = excess_over_group(coefficient, torch.ones(4, 1), keys, groups)
    assert torch.equal(excess, torch.tensor([[3.0], [-3.0], [3.0], [0.0]]))
    without = excess_over_group(coefficient, torch.tensor([[1], [0], [1], [1]]), keys, groups)
    assert torch.equal(without, torch.zeros(4, 1))  # one without tokens is none


# Rows without tokens: verl pads its batches, filters and rejection sampling empty them.

PADDED_KEYS = ("a_0_0", "a_1_0", "b_0_0", "pad_0_0")


def padded() -> tuple[Any, Tensor]:
    """Two answers of one prompt, one alone, and a row of padding; log(pi/ref) of their tokens."""
    given = batch()
    data = experience(given, SCORES, groups=("a", "a", "b", "pad"))
    data.batch["response_mask"][3] = 0
    data.batch["token_level_scores"][3] = 0
    return data, (given.old_log_probs - given.ref_log_probs) * data.batch["response_mask"]


def to_go(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


@pytest.mark.parametrize(
    "division", ["", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"]
)
def test_an_answer_alone_and_a_row_of_padding_stop_no_run(kind: str, division: str) -> None:
    own = [division] if division else []
    data, lr = padded()
    found, _ = joined(
        trainer(*klplug("k1_in_reward,baseline=group"), *own, kind=kind), data, PADDED_KEYS
    )
    stock, _ = joined(trainer(*own, kind=kind), padded()[0], PADDED_KEYS)
    extra = found.batch["advantages"] - stock.batch["advantages"]
    kl = lr.sum(-1, keepdim=True).expand_as(lr) if division else to_go(lr)
    alone = torch.zeros_like(kl[2]) if division else kl[2]
    force = torch.stack([kl[0] - kl[1], kl[1] - kl[0], alone, torch.zeros_like(kl[3])])
    expected = -BETA * force * data.batch["response_mask"]
    torch.testing.assert_close(extra, expected, rtol=1e-4, atol=1e-5)


def test_n_of_the_controller_counts_answers(kind: str) -> None:
    data, _ = padded()
    made = trainer(*klplug("k2_as_loss"), *ADAPTIVE, kind=kind)
    made.actor_rollout_wg = Workers()
    joined(made, data, PADDED_KEYS)
    update(made, {})
    assert made.klplug.controller.value == pytest.approx(BETA * math.exp(0.2 * 3 / 40))


def test_n_counts_an_answer_of_several_rows_once() -> None:
    made = trainer(*klplug("k2_as_loss"), *ADAPTIVE)
    if not hasattr(made, "_compute_advantage"):
        return  # a row is an answer there
    joined(made, padded()[0], ("a_0_0", "a_0_1", "b_0_0", "pad_0_0"))
    assert made.klplug.n_answers == 2


def test_a_row_of_padding_does_not_dilute_the_penalty_that_is_logged(kind: str) -> None:
    data, lr = padded()
    own = klplug("k1_in_reward,reward_norm=group")
    _, metrics = joined(trainer(*own, kind=kind), data, PADDED_KEYS)
    lengths = torch.tensor([6.0, 4.0, 1.0])
    expected = (lr.sum(-1)[:3] / lengths).mean().item()
    assert metrics["actor/reward_kl_penalty"] == pytest.approx(expected, rel=1e-5)


def test_rejection_sampling_leaves_the_kl_of_an_answer_whole(kind: str) -> None:
    """verl's own KL in the reward is taken before its rejection sampling masks tokens out."""
    rejects = (
        "algorithm.rollout_correction.rollout_rs=token_k1",
        "algorithm.rollout_correction.rollout_rs_threshold='0.95_1.05'",
    )
    found, _ = joined(
        trainer(*klplug("k1_in_reward"), *rejects, kind=kind), experience(batch(), SCORES), KEYS
    )
    stock, _ = joined(trainer(*rejects, kind=kind), experience(batch(), SCORES), KEYS)
    given, kept = batch(), found.batch["response_mask"]
    assert 0 < kept.sum() < given.response_mask.sum()
    assert torch.equal(kept, stock.batch["response_mask"])
    lr = (given.old_log_probs - given.ref_log_probs) * given.response_mask
    expected = -BETA * to_go(lr) * kept
    extra = (found.batch["advantages"] - stock.batch["advantages"]) * kept
    torch.testing.assert_close(extra, expected, rtol=1e-4, atol=1e-5)
    assert (to_go(lr) - to_go(lr * kept)).abs().max() > 0.01  # and that is another


def test_of_local_updates_verl_takes_the_largest_where_klplug_does() -> None:
    """By substrings of a metric's name, as separate_async makes one number of them."""
    if "v1" not in TRAINERS:
        return
    from verl.trainer.ppo.v1.utils import MetricsAggregator

    zero = torch.zeros(1, 1)
    kl_types = ("k2_as_loss", "k3_in_reward+js_as_loss,horizon=sequence,mode=mask", "monitor")
    terms = (kl_term(kl_type, *[zero] * 3, old_log_probs=zero) for kl_type in kl_types)
    names = {name for term in terms for name in term.metrics} | {"klplug/kl_before_update"}
    taken = {name: MetricsAggregator()._get_aggregation_type(name) for name in names}
    assert len(names) > 40
    for name, how in taken.items():
        assert how == ("max" if name.endswith("coef_max") else "weighted_avg"), name


def test_where_verl_draws_answers_anew_the_kl_is_of_those_drawn() -> None:
    """algorithm.use_pf_ppo, which RayPPOTrainer goes on with; core_algos.py."""
    own = (*klplug("k2_as_loss"), "algorithm.adv_estimator=gae", "algorithm.use_pf_ppo=True")
    drawn = torch.tensor([2, 2, 0, 1])
    given = batch()
    data = experience(given, SCORES)
    data.batch["values"] = torch.zeros_like(given.old_log_probs)
    with mock.patch.object(torch, "multinomial", return_value=drawn):
        _, metrics = joined(trainer(*own, kind="ray"), data, KEYS)
    mask = given.response_mask[drawn]
    lr = (given.old_log_probs - given.ref_log_probs)[drawn] * mask
    assert metrics["klplug/k1"] == pytest.approx((lr.sum() / mask.sum()).item(), rel=1e-5)


# The controller.


ADAPTIVE = ("+klplug.kl_ctrl=adaptive", "+klplug.kl_target=0.01", "+klplug.kl_horizon=40")


class Workers:
    """In place of verl's worker group: what it was sent, and no update."""

    def __init__(self, computes_kl: bool = True) -> None:
        self.sent: list[float] = []
        self.computes_kl = computes_kl

    def update_actor(self, batch: Any) -> Any:
        from verl import DataProto
        from verl.utils import tensordict_utils as tu

        metrics: dict[str, Any] = {"mfu": [0.0]}
        if self.computes_kl:
            given = batch_of_one_meaning()
            tally = kl_term(
                "k1_in_reward", given.old_log_probs, given.ref_log_probs, given.response_mask
            ).tally
            metrics |= {name: [number] for name, number in numbers(tally).items()}
        if isinstance(batch, DataProto):  # verl 0.7's own workers
            self.sent.append(batch.meta_info[COEF_KEY])
            return DataProto(meta_info={"metrics": metrics})
        is_v1 = hasattr(batch, "extra_info")
        self.sent.append(batch.extra_info[COEF_KEY] if is_v1 else tu.get(batch, COEF_KEY))
        return tu.get_tensordict({}, {"metrics": metrics})


class KVBatch:
    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}


def update(made: Any, metrics: dict[str, Any]) -> None:
    """The trainer's own update, after which ``metrics`` hold what it would log."""
    from verl.trainer.ppo.ray_trainer import reduce_metrics

    if hasattr(made, "_compute_advantage"):
        made._update_actor(KVBatch(), metrics)
        return
    data = experience(batch(), SCORES)
    tokens = torch.ones(len(SCORES), 2 + data.batch["response_mask"].shape[1], dtype=torch.long)
    names = ("input_ids", "attention_mask", "position_ids")
    data.batch.update({name: tokens.clone() for name in names})
    data.meta_info["global_token_num"] = [0]
    metrics.update(reduce_metrics(made._update_actor(data).meta_info["metrics"]))


@pytest.mark.parametrize("kl_type", ["k2_as_loss", "k1_in_reward", "k3_in_reward+k3_as_loss"])
def test_the_coefficient_follows_the_measured_kl_in_every_placement(
    kl_type: str, kind: str
) -> None:
    made = trainer(*klplug(kl_type), *ADAPTIVE, kind=kind)
    made.actor_rollout_wg = Workers()
    given = batch()
    term = kl_term("k1_in_reward", given.old_log_probs, given.ref_log_probs, given.response_mask)
    measured = float(term.metrics["klplug/kl"])  # held to its definition by the core's tests
    assert measured > 0.012
    for step in range(3):
        _, metrics = joined(made, experience(given, SCORES), KEYS)
        before = BETA * math.exp(0.02 * step)  # 0.2 * 4 answers / 40
        assert metrics["klplug/kl_coef"] == pytest.approx(before)
        assert metrics["klplug/kl_before_update"] == pytest.approx(measured, rel=1e-5)
        logged: dict[str, Any] = dict(metrics)
        update(made, logged)
        assert logged["klplug/active"] == 1.0
        assert logged["klplug/kl_coef"] == pytest.approx(before)
        assert logged["klplug/kl"] == pytest.approx(measured, rel=1e-5)
        assert not any("klplug/sum" in name for name in logged)
    assert made.actor_rollout_wg.sent == pytest.approx(
        [BETA * math.exp(0.02 * n) for n in range(3)]
    )


OF_BOTH = {
    "k3_in_reward,bound=2+k2_as_loss": ["k3_in_reward,bound=2"],
    "k1_in_reward+k3_in_reward+k2_as_loss": ["k1_in_reward", "k3_in_reward"],
}


@pytest.mark.parametrize("kl_type", OF_BOTH)
def test_beside_a_loss_the_rewards_terms_are_under_their_own_names(kl_type: str, kind: str) -> None:
    made = trainer(*klplug(kl_type), kind=kind)
    made.actor_rollout_wg = Workers()
    data, given = experience(batch(), SCORES), batch()
    data.batch["old_log_probs"] += 0.3  # not what the workers see
    _, logged = joined(made, data, KEYS)
    update(made, logged)
    names = ("coef_mean", "gradient_cosine", "kl", "nonfinite_share")
    workers = kl_term(
        "k1_in_reward", given.old_log_probs, given.ref_log_probs, given.response_mask
    ).metrics
    policy = given.old_log_probs + 0.3
    for written in OF_BOTH[kl_type]:
        term = kl_term(written, policy, given.ref_log_probs, given.response_mask).metrics
        key = written.replace(",", ".").replace("=", "-")
        for name in names:
            expected = float(term[f"klplug/{name}"])
            assert logged[f"klplug/{key}/{name}"] == pytest.approx(expected, rel=1e-4)
        assert not {f"klplug/{key}/active", f"klplug/{key}/nonfinite/log_probs"} & logged.keys()
    for name in names:
        assert logged[f"klplug/{name}"] == pytest.approx(float(workers[f"klplug/{name}"]), rel=1e-5)
    start = kl_term("k1_in_reward", policy, given.ref_log_probs, given.response_mask).metrics
    measured = float(start["klplug/kl"])
    assert logged["klplug/kl_before_update"] == pytest.approx(measured, rel=1e-5)


def test_beside_a_loss_that_is_to_another_the_kl_to_ref_is_the_starts(kind: str) -> None:
    made = trainer(*klplug("k2_as_loss,reference=old+k1_in_reward"), kind=kind)
    _, logged = joined(made, experience(batch(), SCORES), KEYS)
    assert logged["klplug/kl"] == logged["klplug/kl_before_update"] > 0
    assert logged["klplug/kl"] == logged["klplug/k1_in_reward/kl"]


def test_beside_a_loss_the_reward_is_warned_of(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(*klplug("k2_in_reward+k2_as_loss"), kind=kind)
    for _ in range(20):
        joined(made, experience(batch(), SCORES), KEYS)
    said = [line for line in capsys.readouterr().out.splitlines() if "in the reward" in line]
    assert [line.partition(" is ")[0] for line in said] == [
        "klplug: WARNING: in the reward, klplug/gradient_cosine"
    ]


@pytest.mark.parametrize("kl_type", ["k2_as_loss", "k1_in_reward", "monitor"])
def test_a_run_that_begins_away_from_its_reference_says_so(
    kl_type: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, and not where another model is the reference."""
    own = klplug(kl_type)[: 1 if kl_type == "monitor" else 2]
    for ref_model, far, count in ((None, True, 1), ("hub/other", True, 0), (None, False, 0)):
        made = trainer(*own, kind=kind)
        made.klplug.plan = dataclasses.replace(made.klplug.plan, ref_model=ref_model)
        data = experience(batch(), SCORES)
        if not far:
            data.batch["ref_log_prob"] = data.batch["old_log_probs"].clone()
        for _ in range(2):
            _, logged = joined(made, data, KEYS)
        assert (abs(logged["klplug/kl_before_update"]) > 0.02) is far
        assert capsys.readouterr().out.count("before the first update the KL is") == count


def test_a_loss_without_klplugs_kl_stops_the_run(kind: str) -> None:
    made = trainer(*klplug("k2_as_loss"), kind=kind)
    made.actor_rollout_wg = Workers(computes_kl=False)
    _, metrics = joined(made, experience(batch(), SCORES), KEYS)
    assert "klplug/active" not in metrics
    with pytest.raises(RuntimeError, match="workers computed no KL"):
        update(made, metrics)


def test_an_update_without_a_measured_kl_stops_the_run(kind: str) -> None:
    made = trainer(*klplug("k2_as_loss"), kind=kind)
    made.actor_rollout_wg = Workers()
    with pytest.raises(RuntimeError, match=r"no KL was measured.*advantage stage of its own"):
        update(made, {})


def test_a_fixed_coefficient_stays(kind: str) -> None:
    made = trainer(*klplug("k2_as_loss"), kind=kind)
    made.actor_rollout_wg = Workers()
    for _ in range(2):
        joined(made, experience(batch(), SCORES), KEYS)
        update(made, {})
    assert made.actor_rollout_wg.sent == [BETA, BETA]


# Checkpoints.


class Saving:
    """A worker group and a dataloader that write nothing."""

    def save_checkpoint(self, *_: Any, **__: Any) -> None: ...

    def load_checkpoint(self, *_: Any, **__: Any) -> None: ...

    def __len__(self) -> int:
        return 2

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def saving(kind: str, folder: Path, *overrides: str) -> Any:
    made = trainer(*overrides, "trainer.resume_mode=auto", kind=kind, folder=folder)
    made.actor_rollout_wg = made.train_dataloader = Saving()
    return made


def test_state_is_saved_and_restored(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = saving(kind, tmp_path, *klplug("k2_as_loss"), *ADAPTIVE)
    first.global_steps = 7
    first.klplug.controller.controller.value = 0.123
    first._save_checkpoint()
    state = json.loads((tmp_path / "global_step_7" / "klplug.json").read_text())
    reference = {"path": "hub/model", "weights": None}
    own = {"kl_ctrl": "adaptive", "value": 0.123}
    assert state == {"kl_type": "k2_as_loss", "reference": reference, **own}

    second = saving(kind, tmp_path, *klplug("k2_as_loss"), *ADAPTIVE)
    second._load_checkpoint()
    assert second.global_steps == 7 and second.klplug.controller.value == 0.123
    assert "WARNING" not in capsys.readouterr().out

    fixed = saving(kind, tmp_path, *klplug("k2_as_loss"))
    fixed._load_checkpoint()
    assert fixed.klplug.controller.value == BETA  # what this run's command line says


def test_resuming_under_another_kl_type_warns(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = saving(kind, tmp_path, *klplug("k2_as_loss"))
    first.global_steps = 3
    first._save_checkpoint()
    path = tmp_path / "global_step_3"
    by_path = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={path}")
    other = trainer(*klplug("k3_as_loss"), *by_path, kind=kind, folder=tmp_path)
    other.actor_rollout_wg = other.train_dataloader = Saving()
    other._load_checkpoint()
    said = capsys.readouterr().out
    assert "WARNING" in said and "kl_type=k3_as_loss" in said and "kl_type=k2_as_loss" in said

    (path / "klplug.json").unlink()
    saving(kind, tmp_path, *klplug("k2_as_loss"))._load_checkpoint()
    assert "verl's own KL" in capsys.readouterr().out


def test_resuming_with_another_reference_warns(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = saving(kind, tmp_path, *klplug("k2_as_loss"))
    first.global_steps = 3
    first._save_checkpoint()
    resumed = saving(kind, tmp_path, *klplug("k2_as_loss"))
    resumed._load_checkpoint()
    assert "WARNING" not in capsys.readouterr().out
    resumed.klplug.models["reference"] = Reference.of("hub/model-step-3")
    resumed._load_checkpoint()
    said = capsys.readouterr().out
    assert "with the reference hub/model-step-3 a run that was trained with hub/model." in said


def test_a_state_file_cut_in_half_stops_the_resume(kind: str, tmp_path: Path) -> None:
    first = saving(kind, tmp_path, *klplug("k2_as_loss"))
    first.global_steps = 3
    first._save_checkpoint()
    path = tmp_path / "global_step_3" / "klplug.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(StateError, match=r"global_step_3/klplug.json.*delete the file"):
        saving(kind, tmp_path, *klplug("k2_as_loss"))._load_checkpoint()


@pytest.mark.parametrize("state", ["[]", '{"kl_type": "k2_as_loss"}', "NaN", "null value"])
def test_a_state_file_of_another_shape_is_named(state: str, kind: str, tmp_path: Path) -> None:
    first = saving(kind, tmp_path, *klplug("k2_as_loss"), *ADAPTIVE)
    first.global_steps = 3
    first._save_checkpoint()
    path = tmp_path / "global_step_3" / "klplug.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"value": None}) if state == "null value" else state)
    with pytest.raises(StateError, match=r"global_step_3/klplug.json: .*delete the file"):
        saving(kind, tmp_path, *klplug("k2_as_loss"), *ADAPTIVE)._load_checkpoint()


def test_a_stock_run_writes_no_state(kind: str, tmp_path: Path) -> None:
    made = saving(kind, tmp_path)
    made.global_steps = 1
    made._save_checkpoint()
    assert not (tmp_path / "global_step_1" / "klplug.json").exists()


# Doors.


def test_the_trainer_resolves_a_config_that_no_command_did(kind: str) -> None:
    made = config("algorithm.adv_estimator=grpo", *klplug("k2_as_loss"))
    with open_dict(made):
        made.data.train_files = made.data.val_files = "hub/data"
        made.actor_rollout_ref.model.path = "hub/model"
    built = v1_trainer(made) if kind == "v1" else ray_trainer(made)
    assert built.use_reference_policy
    assert built.config.actor_rollout_ref.actor.kl_loss_type == "k2_as_loss"


class OfARecipe:
    """As RayDAPOTrainer's: its own fit calls workers and compute_advantage itself."""

    def fit(self) -> None: ...


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (klplug("k1_in_reward"), "k1_in_reward is in the reward"),
        ((*klplug("k2_as_loss"), *ADAPTIVE), "kl_ctrl=adaptive moves the coefficient"),
        ((*klplug("k2_as_loss"), "+klplug.ref_update=reset:2"), "ref_update=reset:2"),
        (klplug("k2_as_loss,horizon=sequence,baseline=group"), "baseline=group"),
        (klplug("k2_as_loss,weight=positive"), "weight=positive"),
        (klplug("js_as_loss,reference=posterior"), "reference=posterior"),
        (klplug("exact_as_loss"), "vocab=exact"),
    ],
)
def test_a_trainer_with_a_fit_of_its_own_stops_where_its_stages_are_needed(
    settings: tuple[str, ...], said: str
) -> None:
    with pytest.raises(RuntimeError, match=f": {said}, and Trainer has a fit of its own"):
        trainer(*settings, kind="ray", base=OfARecipe)


@pytest.mark.parametrize("kl_type", ["k2_as_loss", "k3_as_loss,horizon=token", "monitor", "none"])
def test_a_trainer_with_a_fit_of_its_own_has_a_kl_as_loss_all_the_same(kl_type: str) -> None:
    asked = klplug(kl_type) if "loss" in kl_type else (f"+klplug.kl_type={kl_type}",)
    made = trainer(*asked, kind="ray", base=OfARecipe)
    assert str(made.klplug.plan.spec).startswith(kl_type[:4])
    # Its own steps measured nothing, and verl's update is as it is.
    original, given = Mock(return_value="verl's"), Mock(meta_info={})
    assert update_actor_in_fit(original, made, (given,), {}) == "verl's"
    assert given.meta_info == {} and original.call_args.args == (given,)


class Wraps:
    """Sets something up, and has verl's own steps."""

    def fit(self) -> None:
        super().fit()  # type: ignore[misc]


def test_a_fit_that_calls_verls_has_its_stages() -> None:
    made = trainer(*klplug("k1_in_reward"), *ADAPTIVE, kind="ray", base=Wraps)
    assert not made.klplug.passes_by


class Registered:
    """As a trainer of ``register_trainer`` may be: its own update asks the workers itself."""

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any: ...


class Timed:
    """Measures something, and has verl's own update."""

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        return super()._update_actor(batch, metrics)  # type: ignore[misc]


@pytest.mark.skipif("v1" not in TRAINERS, reason="verl before 0.9 has no v1 trainer")
def test_a_registered_trainer_with_an_update_of_its_own_stops_where_that_is_needed() -> None:
    moving = (*klplug("k2_as_loss"), *ADAPTIVE)
    with pytest.raises(
        RuntimeError, match="moves the coefficient, and Trainer has a _update_actor"
    ):
        trainer(*moving, kind="v1", base=Registered)
    assert trainer(*klplug("k2_as_loss"), kind="v1", base=Registered).klplug.passes_by
    assert not trainer(*moving, kind="v1", base=Timed).klplug.passes_by


def test_a_kl_type_outside_of_a_trainer_is_an_error() -> None:
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty

    with pytest.raises(RuntimeError, match=r"k1_in_reward.*outside of a trainer"):
        apply_kl_penalty(experience(batch(), SCORES), kl_ctrl=None, kl_penalty="k1_in_reward")


def test_a_trainer_without_klplug_stops_at_a_kl_in_the_reward(unpatched: None) -> None:
    from verl.trainer.ppo.core_algos import FixedKLController
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty

    with pytest.raises(NotImplementedError):
        apply_kl_penalty(
            experience(batch(), SCORES), kl_ctrl=FixedKLController(1.0), kl_penalty="k1_in_reward"
        )


def test_each_process_says_once_that_klplug_is_active(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(*klplug("k2_as_loss"), kind=kind)
    said = capsys.readouterr().out
    assert said.count("active in the trainer") == 1 and "kl_type=k2_as_loss" in said
    trainer(kind=kind)
    assert "klplug" not in capsys.readouterr().out


MOVING = {
    "linear": ("+klplug.kl_ctrl=linear", "+klplug.kl_end=0", "+klplug.kl_steps=4"),
    "cosine": ("+klplug.kl_ctrl=cosine", "+klplug.kl_end=0", "+klplug.kl_steps=4"),
    "pid": ("+klplug.kl_ctrl=pid", "+klplug.kl_target=0.01"),
}
HALF = math.sqrt(0.5) / 2
OF_ITS_START = {
    "linear": (1, 0.75, 0.5),
    "cosine": (1, 0.5 + HALF, 0.5),
    # Far above its band, the same each time: no rise, and the integral's gain.
    "pid": (1, math.exp(0.03), math.exp(0.06)),
}


@pytest.mark.parametrize("kl_ctrl", MOVING)
@pytest.mark.parametrize("kl_type", ["k2_as_loss", "k1_in_reward"])
def test_every_controller_moves_the_coefficient_once_a_step(
    kl_type: str, kl_ctrl: str, kind: str
) -> None:
    made = trainer(*klplug(kl_type), *MOVING[kl_ctrl], kind=kind)
    made.actor_rollout_wg = Workers()
    for share in OF_ITS_START[kl_ctrl]:
        data, metrics = joined(made, experience(batch(), SCORES), KEYS)
        assert metrics["klplug/kl_coef"] == pytest.approx(BETA * share)
        if kl_type == "k1_in_reward":
            stock, _ = staged()
            extra = data.batch["advantages"] - stock.batch["advantages"]
            expected = share * reward_advantages("k1_in_reward")
            torch.testing.assert_close(extra, expected, rtol=1e-4, atol=1e-5)
        update(made, metrics)
    sent = [BETA * share for share in OF_ITS_START[kl_ctrl]]
    assert made.actor_rollout_wg.sent == pytest.approx(sent)


@pytest.mark.parametrize("kl_ctrl", ["adaptive", *MOVING])
def test_a_step_of_several_updates_moves_the_coefficient_once(kl_ctrl: str) -> None:
    """separate_async: a step is several updates, each on answers of its own."""
    settings = ADAPTIVE if kl_ctrl == "adaptive" else MOVING[kl_ctrl]
    made = trainer(*klplug("k2_as_loss"), *settings)
    if not hasattr(made, "parameter_sync_step"):
        return  # this verl has no such step
    made.actor_rollout_wg, made.parameter_sync_step = Workers(), 2
    shares = OF_ITS_START.get(kl_ctrl, [math.exp(0.04 * step) for step in range(3)])
    for share in shares:  # adaptive: 0.2 * 8 answers / 40
        for made.local_trigger_step in range(2):
            _, metrics = joined(made, experience(batch(), SCORES), KEYS)
            assert metrics["klplug/kl_coef"] == pytest.approx(BETA * share)
            update(made, metrics)
    sent = [BETA * share for share in shares for _ in range(2)]
    assert made.actor_rollout_wg.sent == pytest.approx(sent)


def test_the_controller_of_several_updates_is_fed_the_kl_of_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = trainer(*klplug("k2_as_loss"), *ADAPTIVE)
    if not hasattr(made, "parameter_sync_step"):
        return
    made.actor_rollout_wg, made.parameter_sync_step = Workers(), 2
    fed, measured = [], []
    own = made.klplug.controller.controller
    monkeypatch.setattr(type(own), "update", lambda _, *given: fed.append(given))
    for made.local_trigger_step, data in enumerate([experience(batch(), SCORES), padded()[0]]):
        _, metrics = joined(made, data, (KEYS, PADDED_KEYS)[made.local_trigger_step])
        measured.append(metrics["klplug/kl_before_update"])
        update(made, metrics)
    assert measured[0] != pytest.approx(measured[1], rel=0.01)
    ((kl, answers),) = fed
    assert answers == 7 and kl == pytest.approx((4 * measured[0] + 3 * measured[1]) / 7)


def test_a_schedule_goes_with_a_kl_to_the_sampler(kind: str) -> None:
    made = trainer(*klplug("k2_as_loss,reference=rollout"), *MOVING["linear"], kind=kind)
    made.actor_rollout_wg = Workers()
    for _ in range(3):
        data = experience(batch(), SCORES)
        del data.batch["ref_log_prob"]
        joined(made, data, KEYS)
        update(made, {})
    assert made.actor_rollout_wg.sent == pytest.approx([BETA, 0.75 * BETA, 0.5 * BETA])


@pytest.mark.parametrize("kl_ctrl", MOVING)
def test_every_controller_goes_on_from_a_checkpoint(
    kl_ctrl: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (
        saving(kind, tmp_path, *klplug("k2_as_loss"), *MOVING[kl_ctrl]) for _ in range(2)
    )
    for kl in (0.02, 0.005):
        first.klplug.controller.controller.update(kl, 4)
    first.global_steps = 2
    first._save_checkpoint()
    second._load_checkpoint()
    assert second.klplug.controller.value == first.klplug.controller.value != BETA
    for made in (first, second):
        made.klplug.controller.controller.update(0.05, 4)
    assert second.klplug.controller.value == first.klplug.controller.value
    assert "WARNING" not in capsys.readouterr().out
