"""``weight=`` on the real thing: policy's actor, maker, replay buffer and training step."""
# ruff: noqa: F811

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from klplug_openrlhf.samples import ENTROPY, INFO, REWARDS
from torch import Tensor

from tests.openrlhf import test_exact
from tests.openrlhf.command_line import change
from tests.openrlhf.test_exact import COEF, experience, lending, models, shipped  # noqa: F401
from tests.openrlhf.trainer import LENGTH, Bench

pytestmark = pytest.mark.usefixtures("patched", "lending")

REWARDS_GIVEN = [1.0, 0.0, 0.0, 1.0]  # of two groups of two: half of each is right
TOOL = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(1))  # of prompt and answer


@pytest.fixture(params=[2, 3], ids=["zero2", "zero3"])
def bench(request: pytest.FixtureRequest, models: list[Path]) -> Bench:
    return Bench(models[0], zero_stage=request.param)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples with those rewards, and what an agent's extra_logs became in their info."""
    plain = test_exact.samples

    def samples(seed: int = 0) -> list[Any]:
        made = plain(seed)
        for half, each in enumerate(made):
            here = slice(2 * half, 2 * half + 2)
            each.rewards = torch.tensor(REWARDS_GIVEN[here])
            each.info = {"reward": each.rewards.clone(), "tool": TOOL[here].clone()}
        return made

    monkeypatch.setattr(test_exact, "samples", samples)


def tool_of_actions(given: Any) -> Tensor:
    """Of a token that is predicted: the first is not, and the buffer took padding off the end."""
    return TOOL[:, 1 : 1 + given.action_mask.shape[1]]


def expected(weight: str, given: Any, bench: Bench) -> Tensor:
    """What each token counts, (B, A), by hand."""
    if weight == "mask:tool":
        return tool_of_actions(given)
    better = torch.tensor(REWARDS_GIVEN)[:, None] == 1
    if weight == "positive":
        return better.float().expand(given.action_mask.shape)
    if weight == "difficulty":
        share = 1 - math.exp(-math.e * 0.5)
        return torch.where(better, share, 1.0).expand(given.action_mask.shape)
    mask = given.action_mask.bool()
    if weight == "root":
        u = ((given.action_log_probs - given.base_action_log_probs) * mask).sum(-1).exp()
        return (1 / (2 * (u + 1 / u - 2).mean().sqrt())).expand(mask.shape)
    _, output = bench.actor(
        given.sequences, mask, given.attention_mask, return_output=True, return_entropy=True
    )
    entropy = output.entropy[:, -mask.shape[1] :].float()
    if weight == "entropy_floor:0.5":
        return (0.5 / (entropy[mask].mean() + 0.1)).clamp(min=0.5).expand(mask.shape)
    least = entropy[mask].sort().values[: math.ceil(0.5 * int(mask.sum()))]
    return (entropy <= least[-1]).float()


@pytest.mark.parametrize(
    "weight", ["positive", "difficulty", "mask:tool", "entropy:0.5", "entropy_floor:0.5", "root"]
)
def test_the_engine_is_given_the_weighted_kl(
    bench: Bench,
    models: list[Path],
    weight: str,
) -> None:
    term = "chi2_as_loss,horizon=answer" if weight == "root" else "k2_as_loss"
    kl_type = f"{term},weight={weight}"
    given = experience(bench, models[1], kl_type)
    assert (given.advantages > 0).any() and (given.advantages < 0).any()
    given.advantages = torch.zeros_like(given.advantages)
    # What a weight read is gone; OpenRLHF's own step can't log the rest, a number per token.
    assert ("tool" in given.info) is (weight != "mask:tool")
    given.info.pop("tool", None)
    with torch.no_grad():
        weights = expected(weight, given, bench) * given.action_mask
    step = bench.step(copy.deepcopy(given), kl_type, COEF)
    mask = given.action_mask
    ratio = (step.log_probs - given.action_log_probs) * mask
    c = (step.log_probs - given.base_action_log_probs) * mask
    if weight == "root":  # of whole answers
        ratio, c = ratio.sum(-1, keepdim=True), 2 * c.sum(-1, keepdim=True).expm1()
    by_hand = weights * ratio.exp() * c
    by_hand = COEF * by_hand * given.action_mask / given.action_mask.sum()
    assert by_hand.abs().max() > 1e-3
    torch.testing.assert_close(step.at_log_probs.float(), by_hand.float(), rtol=1e-3, atol=1e-6)
    mean = weights.sum() / given.action_mask.sum()
    assert float(step.metrics["klplug/sample_weight_mean"]) == pytest.approx(float(mean), rel=1e-4)
    assert not {INFO, ENTROPY, REWARDS} & set(step.metrics)


def penalised(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """OpenRLHF's two penalties on length, and the rewards by its ``apply_length_penalties``."""
    plain = test_exact.samples

    def samples(seed: int = 0) -> list[Any]:
        made = plain(seed)
        for each, truncated in zip(made, ([True, False], [False, False]), strict=True):
            each.truncated = torch.tensor(truncated)
        assert [int(n) for each in made for n in each.response_length] == [13, 11, 7, 5]
        return made

    monkeypatch.setattr(test_exact, "samples", samples)
    change(bench.args, "rollout.max_new_tokens", 16)
    change(bench.args, "reward.overlong_buffer_len", 8.0)
    change(bench.args, "reward.overlong_penalty_factor", 1.0)
    change(bench.args, "reward.stop_properly_penalty_coef", -0.5)
    return [-0.5, REWARDS_GIVEN[1] - (11 - (16 - 8)) / 8, *REWARDS_GIVEN[2:]]


@pytest.mark.parametrize("penalties", [False, True], ids=["as given", "penalised"])
def test_the_engine_is_given_the_kl_to_the_posterior(
    bench: Bench, models: list[Path], penalties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JS between whole answers, Z by the other answer of each pair, and no policy loss."""
    kl_type = "js_as_loss,reference=posterior"
    rewards = torch.tensor(penalised(bench, monkeypatch) if penalties else REWARDS_GIVEN)
    given = experience(bench, models[1], kl_type)
    assert (given.advantages != 0).any()
    mask = given.action_mask
    tilted = (given.base_action_log_probs * mask).sum(-1) + rewards / COEF
    log_weight = tilted - (given.action_log_probs * mask).sum(-1)
    posterior = tilted - log_weight[[1, 0, 3, 2]]
    given.info.pop("tool", None)
    step = bench.step(copy.deepcopy(given), kl_type, COEF)
    ratio = ((step.log_probs - given.action_log_probs) * mask).sum(-1)
    x = (step.log_probs * mask).sum(-1) - posterior
    c = math.log(2) + x - torch.nn.functional.softplus(x)  # log(2u / (1 + u))
    by_hand = COEF * (ratio.exp() * c).unsqueeze(-1) * mask / mask.sum()
    assert by_hand.abs().max() > 1e-3
    torch.testing.assert_close(step.at_log_probs.float(), by_hand.float(), rtol=1e-3, atol=1e-6)
    assert not {INFO, REWARDS} & set(step.metrics)
    del given.info[INFO]
    with pytest.raises(RuntimeError, match="it was not active"):
        bench.step(given, kl_type, COEF)


def test_in_the_reward_each_token_has_its_own_weight(
    bench: Bench,
    models: list[Path],
) -> None:
    given = experience(bench, models[1], "k1_in_reward,weight=mask:tool")
    without = experience(bench, models[1], "none")
    mask = given.action_mask
    log_ratio = given.action_log_probs - given.base_action_log_probs
    weighed = log_ratio * tool_of_actions(given) * mask
    to_go = weighed.flip(-1).cumsum(-1).flip(-1)
    found = (given.advantages - without.advantages) * mask
    torch.testing.assert_close(found, -COEF * to_go * mask, rtol=1e-4, atol=1e-5)


def test_what_the_batch_does_not_carry_is_named(
    bench: Bench,
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="weight=mask:code: the batch carries no tensor 'code'"):
        experience(bench, models[1], "k2_as_loss,weight=mask:code")
    whole = test_exact.samples

    def shorter(seed: int = 0) -> list[Any]:
        made = whole(seed)
        for each in made:
            each.info["tool"] = each.info["tool"][:, :-1]
        return made

    monkeypatch.setattr(test_exact, "samples", shorter)
    words = f"'tool' has {LENGTH - 1} numbers where there are {LENGTH} tokens of prompt and answer"
    with pytest.raises(ValueError, match=words):
        experience(bench, models[1], "k2_as_loss,weight=mask:tool")
    given = experience(bench, models[1], "k2_as_loss,weight=positive")
    del given.info[INFO]
    with pytest.raises(RuntimeError, match="this experience carries nothing of klplug's"):
        bench.step(given, "k2_as_loss,weight=positive", COEF)
