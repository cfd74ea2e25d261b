"""``posterior_log_probs``, by hand; whose gradient it makes is in test_oracle.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from klplug import Samples, kl_term, posterior_log_probs

BETA = 0.5
NAN = math.nan


def samples(dtype: torch.dtype = torch.float64) -> Samples:
    """Three answers to one prompt, one without tokens, and one alone; nan behind the mask."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()
    draw = torch.Generator().manual_seed(0)
    log_probs, ref = -torch.rand(2, 5, 3, generator=draw, dtype=torch.float64)
    return Samples(
        mask,
        log_probs=log_probs.masked_fill(~mask, NAN).to(dtype),
        ref_log_probs=ref.masked_fill(~mask, NAN).to(dtype),
        rewards=torch.tensor([1.0, 0.0, 0.25, 9.0, 1.0]),
        group_ids=["a", "a", "a", "a", "b"],
    )


def of_answers(tensor: Tensor | None, mask: Tensor) -> list[float]:
    assert tensor is not None
    return tensor.where(mask, 0.0).sum(-1).tolist()


def test_z_is_the_mean_weight_of_the_other_answers() -> None:
    given = samples()
    old, ref = (of_answers(x, given.mask) for x in (given.log_probs, given.ref_log_probs))
    weight = [math.exp(r / BETA + q - p) for r, q, p in zip((1, 0, 0.25), ref, old, strict=False)]
    found = posterior_log_probs(given, BETA)
    assert not found[~given.mask].any()
    for row, reward in enumerate((1, 0, 0.25)):
        others = [weight[i] for i in range(3) if i != row]
        expected = ref[row] + reward / BETA - math.log(sum(others) / 2)
        assert found[row].sum().item() == pytest.approx(expected, rel=1e-12)
        share = (found[row] - given.ref_log_probs[row])[given.mask[row]]
        torch.testing.assert_close(share, share[:1].expand_as(share))


def test_an_answer_alone_has_a_ratio_of_one_to_where_it_began() -> None:
    given = samples()
    found = posterior_log_probs(given, BETA)
    assert found[4].sum().item() == pytest.approx(of_answers(given.log_probs, given.mask)[4])
    term = kl_term(
        "js_as_loss,reference=posterior",
        given.log_probs,
        given.ref_log_probs,
        given.mask,
        old_log_probs=given.log_probs,
        posterior_log_probs=found,
    )
    assert term.coefficient[4].abs().max() < 1e-12 < term.coefficient[0].abs().min()


def test_groups_may_be_numbers_and_log_probs_of_fewer_digits() -> None:
    given = samples(torch.bfloat16)
    expected = posterior_log_probs(given, BETA)
    assert expected.dtype == torch.float32
    numbers = replace(given, group_ids=torch.tensor([7, 7, 7, 7, 2]))
    assert torch.equal(posterior_log_probs(numbers, BETA), expected)


def test_a_small_beta_stays_a_number() -> None:
    given = samples(torch.float32)
    found = posterior_log_probs(given, 1e-4)
    assert found.isfinite().all() and found[0].sum() - found[1].sum() > 9000


def test_an_answer_that_the_reference_rules_out_has_no_weight() -> None:
    given = samples()
    assert given.ref_log_probs is not None
    given.ref_log_probs[1, 0] = -math.inf
    without = replace(given, mask=given.mask & torch.tensor([1, 0, 1, 1, 1]).bool()[:, None])
    found, alone = posterior_log_probs(given, BETA), posterior_log_probs(without, BETA)
    half = math.log(2)  # the mean is over two others, one of weight 0
    difference = (found - alone)[[0, 2]].sum(-1)
    torch.testing.assert_close(difference, torch.full((2,), half, dtype=torch.float64))


@pytest.mark.parametrize("name", ["log_probs", "ref_log_probs", "rewards", "group_ids"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"reference=posterior needs {name}, which is missing"):
        posterior_log_probs(replace(samples(), **{name: None}), BETA)


def test_groups_of_another_number_are_told() -> None:
    with pytest.raises(ValueError, match="group_ids has 2 entries for 5 answers"):
        posterior_log_probs(replace(samples(), group_ids=["a", "b"]), BETA)


def test_a_term_without_it_is_told() -> None:
    given = samples()
    with pytest.raises(ValueError, match="needs posterior_log_probs, which is missing"):
        kl_term(
            "k2_as_loss,ratio=none,reference=posterior",
            given.log_probs,
            given.ref_log_probs,
            given.mask,
        )


@pytest.mark.parametrize("reward", [NAN, math.inf])
def test_a_reward_that_is_no_number_leaves_the_other_answers_as_they_are(reward: float) -> None:
    """As if that answer had no tokens."""
    given = samples()
    assert given.rewards is not None
    rewards, mask = given.rewards.clone(), given.mask.clone()
    rewards[1], mask[1] = reward, False
    found = posterior_log_probs(replace(given, rewards=rewards), BETA)
    expected = posterior_log_probs(replace(given, mask=mask), BETA)
    torch.testing.assert_close(found[[0, 2, 4]], expected[[0, 2, 4]], rtol=1e-12, atol=0)
    assert not found[1][given.mask[1]].isfinite().any()


@pytest.mark.parametrize("name", ["log_probs", "ref_log_probs"])
def test_a_token_that_is_no_number_leaves_its_answer_the_others(name: str) -> None:
    """As if it were masked: all of r/beta - log Z lies on the tokens that are left."""
    given = samples()
    given.mask[2, 1] = True
    for tensor in (given.log_probs, given.ref_log_probs):
        assert tensor is not None
        tensor[2, 1] = -0.5
    masked = replace(given, mask=given.mask.clone())
    masked.mask[2, 1] = False
    getattr(given, name)[2, 1] = NAN
    found, expected = (posterior_log_probs(x, BETA) for x in (given, masked))
    assert found[2, 1].isnan()  # so that the KL, too, leaves it
    torch.testing.assert_close(found[masked.mask], expected[masked.mask], rtol=1e-12, atol=0)
    getattr(given, name)[2] = NAN  # and an answer of which none is left is none
    masked.mask[2] = False
    found, expected = (posterior_log_probs(x, BETA) for x in (given, masked))
    torch.testing.assert_close(found[masked.mask], expected[masked.mask], rtol=1e-12, atol=0)


# f'(u) - f'(1) of the textbook as u = pi/p goes to infinity.
SLOPES = {"js": math.log(2), "tv": 0.5, "hellinger": 1.0, "forward": 1.0, "alpha": 2.0}


@pytest.mark.parametrize("estimator", SLOPES)
def test_an_answer_that_the_reference_rules_out_is_pushed_down_by_the_limit(estimator: str) -> None:
    """The posterior, too, rules out all of it, by whichever of its tokens."""
    given = samples(torch.float32)
    assert given.log_probs is not None and given.ref_log_probs is not None
    given.ref_log_probs[0, 1] = -math.inf
    term = kl_term(
        f"{estimator}_as_loss,ratio=none,reference=posterior",
        given.log_probs,
        given.ref_log_probs,
        given.mask,
        posterior_log_probs=posterior_log_probs(given, BETA),
    )
    assert term.coefficient[0].tolist() == pytest.approx([SLOPES[estimator]] * 3)
    assert term.metrics["klplug/nonfinite/ref_log_probs"] == 1
    assert term.metrics["klplug/gradient_norm_ratio"] > 1e-3  # of the yardstick's numbers alone


@pytest.mark.parametrize("beta", [0.0, -1.0, NAN, math.inf, 10**400, True, "0.1", None])
def test_a_coefficient_that_is_none_is_told(beta: Any) -> None:
    with pytest.raises(ValueError, match="which must be a positive number"):
        posterior_log_probs(samples(), beta)


def test_a_reward_is_of_an_answer() -> None:
    given = samples()
    assert given.rewards is not None
    with pytest.raises(ValueError, match=r"rewards has shape \(5, 1\), and must have \(5,\)"):
        posterior_log_probs(replace(given, rewards=given.rewards[:, None]), BETA)
