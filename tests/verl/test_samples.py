"""``weight=`` through verl's own advantage stage and actor loss."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from klplug_verl.actor import POSTERIOR
from klplug_verl.trainer import old_log_probs
from torch import Tensor

import klplug
from klplug.samples import named
from tests.one_meaning import BETA, CLIP_RANGE, Batch, batch
from tests.verl.tensors import IS_LEGACY, KEYS, LAYOUTS, LENGTHS, experience, loss
from tests.verl.trainer import TRAINERS, joined, quoted, trainer

SCORES = torch.tensor([1.0, 0.0, 0.0, 1.0])  # of two groups of two: half of each is right
BETTER = SCORES[:, None] == 1
TOOL = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
ENTROPY = torch.rand(4, 6, generator=torch.Generator().manual_seed(2))
pytestmark = pytest.mark.skipif(IS_LEGACY, reason="verl 0.7's engine has them as later ones do")


def expected(weight: str) -> Tensor:
    """What each token counts, (4, 6), by hand."""
    if weight == "positive":
        return BETTER.float().expand(4, 6)
    if weight == "difficulty":
        return torch.where(BETTER, 1 - math.exp(-math.e * 0.5), 1.0).expand(4, 6)
    if weight == "mask:tool":
        return TOOL
    mask = batch().response_mask.bool()
    if weight == "root":
        given = batch()
        u = ((given.old_log_probs - given.ref_log_probs) * mask).sum(-1).exp()
        return (1 / (2 * (u + 1 / u - 2).mean().sqrt())).expand(4, 6)
    if weight == "entropy_floor:0.5":
        return (0.5 / (ENTROPY[mask].mean() + 0.1)).clamp(min=0.5).expand(4, 6)
    least = ENTROPY[mask].sort().values[: math.ceil(0.5 * int(mask.sum()))]
    return ENTROPY.le(least[-1]).float()


def given_to(made: Any, data: Any, weight: str) -> None:
    """What else the batch carries, where each trainer has it."""
    rows = [row[:n].tolist() for row, n in zip(TOOL, LENGTHS, strict=True)]
    if hasattr(made, "_compute_advantage"):
        data.batch["entropy"], data.batch["tool"] = ENTROPY.clone(), TOOL.clone()
        return
    of_an_agent_loop(made, data, rows)
    if "entropy" in weight:
        found = type(data).from_dict(tensors={"entropys": ENTROPY.clone()})
        old_log_probs(lambda *_: (found, 0.0), made, (data,), {})


def of_an_agent_loop(made: Any, data: Any, rows: list[Any]) -> None:
    """What stands in its extra_fields, where each trainer has it."""
    import numpy as np

    cell = np.empty(4, dtype=object)
    if hasattr(made, "_compute_advantage"):
        cell[:] = [{"tool": row} for row in rows]
        data.non_tensor_batch["extra_fields"] = cell
    else:
        cell[:] = rows
        data.non_tensor_batch["tool"] = cell


@pytest.mark.parametrize(
    "weight", ["positive", "difficulty", "mask:tool", "entropy:0.5", "entropy_floor:0.5", "root"]
)
@pytest.mark.parametrize("kind", TRAINERS)
def test_the_weights_go_with_the_samples(weight: str, kind: str) -> None:
    term = "chi2_as_loss,horizon=answer" if weight == "root" else "k2_as_loss"
    kl_type = f"{term},weight={weight}"
    made = trainer(f"+klplug.kl_type={quoted(kl_type)}", f"+klplug.kl_coef={BETA}", kind=kind)
    data = experience(batch(), SCORES)
    given_to(made, data, weight)
    data, _ = joined(made, data, KEYS)
    mask = batch().response_mask
    found = data.batch[named(weight).key] * mask
    torch.testing.assert_close(found, expected(weight) * mask)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_advantage_that_a_weight_sees_has_the_kl_in_the_reward(kind: str) -> None:
    """As on OpenRLHF: the advantage is that of the policy loss."""
    kl_type = "k1_in_reward+k2_as_loss,weight=positive"
    made = trainer(f"+klplug.kl_type={quoted(kl_type)}", "+klplug.kl_coef=4.0", kind=kind)
    data, _ = joined(made, experience(batch(), SCORES), KEYS)
    mask = batch().response_mask.bool()
    advantages = data.batch["advantages"][mask]
    assert ((advantages > 0) != BETTER.expand(4, 6)[mask]).any()  # the KL turns some
    found = data.batch[named("positive").key][mask]
    assert torch.equal(found, (advantages > 0).to(found.dtype))


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_agent_loop_has_a_number_for_each_token(kind: str) -> None:
    own = ("+klplug.kl_type='k2_as_loss,weight=mask:tool'", f"+klplug.kl_coef={BETA}")
    made, mask = trainer(*own, kind=kind), batch().response_mask
    rows: list[Any] = [row[:n].tolist() for row, n in zip(TOOL, LENGTHS, strict=True)]
    data = experience(batch(), SCORES)
    of_an_agent_loop(made, data, rows)
    found = joined(made, data, KEYS)[0].batch[named("mask:tool").key]
    torch.testing.assert_close(found * mask, TOOL * mask)
    for wrong, words in (
        (rows[0][:5], "'tool' of answer 0 has 5 numbers, and its response 6 tokens"),
        ([*rows[0], 1.0], "'tool' of answer 0 has 7 numbers, and its response 6 tokens"),
        (0.5, "'tool' of answer 0 has 1 numbers"),
        (["a"] * 6, "'tool' of answer 0 is ['a', 'a', 'a', 'a', 'a', 'a'], and no list of numbers"),
    ):
        data = experience(batch(), SCORES)
        of_an_agent_loop(made, data, [wrong, *rows[1:]])
        with pytest.raises(ValueError, match=re.escape(words)):
            joined(made, data, KEYS)


@pytest.mark.parametrize("wrong", [[0.5] * 6, None, "none"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_a_row_without_counted_tokens_needs_no_numbers(kind: str, wrong: Any) -> None:
    """verl's v1 trainer pads a batch with rows of one such token and another's extra_fields."""
    own = ("+klplug.kl_type='k2_as_loss,weight=mask:tool'", f"+klplug.kl_coef={BETA}")
    made, mask = trainer(*own, kind=kind), batch().response_mask
    mask[2] = 0
    rows: list[Any] = [row[:n].tolist() for row, n in zip(TOOL, LENGTHS, strict=True)]
    rows[2] = wrong
    data = experience(batch(), SCORES, groups=("a", "a", "pad", "b"))
    data.batch["response_mask"] = mask.clone()
    of_an_agent_loop(made, data, rows)
    found = joined(made, data, ("a_0_0", "a_1_0", "pad_0_0", "b_1_0"))[0].batch
    torch.testing.assert_close(found[named("mask:tool").key] * mask, TOOL * mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_has_the_weighted_kl(layout: str) -> None:
    given, kl_type = batch(), "k2_as_loss,weight=mask:tool"
    low, high = CLIP_RANGE
    log_probs = given.log_probs.clone().requires_grad_(True)
    value, _ = loss(
        given,
        log_probs,
        kl_type,
        BETA,
        layout=layout,
        more={named("mask:tool").key: TOOL},
        clip_ratio_low=low,
        clip_ratio_high=high,
    )
    value.backward()
    ratio = (given.log_probs - given.old_log_probs).exp()
    by_hand = TOOL * ratio * (given.log_probs - given.ref_log_probs) * given.response_mask
    by_hand = BETA * by_hand / given.response_mask.sum()
    torch.testing.assert_close(log_probs.grad, by_hand, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="the micro-batch has no klplug_weight_mask_tool"):
        loss(given, log_probs, kl_type, BETA, layout=layout)


def posterior_of_pairs(given: Batch, rewards: Tensor, beta: float) -> Tensor:
    """log of ref exp(r/beta)/Z of each answer, (4,): Z by the other answer of its pair."""
    mask = given.response_mask
    tilted = (given.ref_log_probs * mask).sum(-1) + rewards / beta
    log_weight = tilted - (given.old_log_probs * mask).sum(-1)
    return tilted - log_weight[[1, 0, 3, 2]]


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_posterior_goes_with_the_samples(kind: str) -> None:
    own = ("+klplug.kl_type='js_as_loss,reference=posterior'", f"+klplug.kl_coef={BETA}")
    made, given = trainer(*own, kind=kind), batch()
    data, metrics = joined(made, experience(given, SCORES), KEYS)
    mask = given.response_mask
    found = data.batch[POSTERIOR] * mask
    expected = posterior_of_pairs(given, SCORES, BETA)
    torch.testing.assert_close(found.sum(-1), expected, rtol=1e-5, atol=1e-5)
    share = (found - given.ref_log_probs)[mask.bool()]
    first = (found - given.ref_log_probs)[:, :1].expand(4, 6)[mask.bool()]
    torch.testing.assert_close(share, first, rtol=1e-4, atol=1e-5)
    assert metrics["klplug/kl_coef"] == BETA


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_posterior_that_did_not_come_is_an_error(layout: str) -> None:
    given = batch()
    with pytest.raises(ValueError, match="needs posterior_log_probs, which is missing"):
        loss(
            replace(given, posterior_log_probs=None),
            given.log_probs.clone().requires_grad_(True),
            "js_as_loss,reference=posterior",
            BETA,
            layout=layout,
        )


@pytest.mark.parametrize("kl_type", ["k1_in_reward", "k1_in_reward,reward_norm=group"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_in_the_reward_each_token_has_its_own_weight(kl_type: str, kind: str) -> None:
    def stage(*own: str) -> Any:
        made = trainer(*own, kind=kind)
        data = experience(batch(), SCORES)
        given_to(made, data, "mask:tool")
        return joined(made, data, KEYS)[0].batch

    own = (f"+klplug.kl_type={quoted(kl_type + ',weight=mask:tool')}", f"+klplug.kl_coef={BETA}")
    given, found = batch(), stage(*own)
    weighed = TOOL * (given.old_log_probs - given.ref_log_probs) * given.response_mask
    if "group" in kl_type:
        rewards = found["token_level_rewards"] * given.response_mask
        assert rewards.sum().item() == pytest.approx(
            float(SCORES.sum() - BETA * weighed.sum()), rel=1e-5
        )
        return
    force = klplug.reward_to_go(weighed) * given.response_mask
    torch.testing.assert_close(
        found["advantages"] - stage()["advantages"], -BETA * force, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", TRAINERS)
def test_what_the_batch_does_not_carry_is_named(kind: str) -> None:
    own = ("+klplug.kl_type='k2_as_loss,weight=mask:code'", f"+klplug.kl_coef={BETA}")
    with pytest.raises(ValueError, match="weight=mask:code: the batch carries no tensor 'code'"):
        joined(trainer(*own, kind=kind), experience(batch(), SCORES), KEYS)
