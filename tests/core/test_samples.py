"""``weight=``: whose gradient a weighted KL is, by enumeration; and each weight by hand."""

from __future__ import annotations

import importlib.metadata
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import klplug
from klplug import Samples, SampleWeight, kl_term, parse, reward_to_go, sample_weights
from klplug.samples import WEIGHTS, described, named
from klplug.spec import _parsed
from klplug.watch import NONFINITE
from tests.core.enumeration import PROBLEMS, Problem
from tests.core.test_oracle import loss_gradient

PROBLEM = "varying length"


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def of_all(problem: Problem, behaviour: Tensor, **given: object) -> Samples:
    return Samples(problem.mask, log_probs=problem.log_probs(behaviour), **given)


def gradient(problem: Problem, kl_type: str, behaviour: Tensor, samples: Samples) -> Tensor:
    """Expected gradient of the weighted term's loss under ``behaviour``, token sums per answer."""
    return loss_gradient(
        problem,
        kl_type,
        behaviour,
        sample_weights=sample_weights(kl_type, samples),
        exact_kl=_exact(problem) if "exact" in kl_type else None,
    )


def _exact(problem: Problem) -> Tensor:
    policy = problem.policy()
    kl = (policy.exp() * (policy - problem.ref())).sum(-1)
    return torch.where(problem.mask, kl[problem.prefix_of], torch.nan)


def test_a_mask_of_prefixes_is_the_kl_of_those_prefixes_alone() -> None:
    problem = PROBLEMS[PROBLEM]()
    policy, old = problem.policy(), problem.old()
    kl = (policy.exp() * (policy - problem.ref())).sum(-1)
    chosen = torch.arange(len(problem.prefixes)) % 2 == 1
    tool = chosen[problem.prefix_of].double()
    samples = of_all(problem, old, tensors={"tool": tool})
    reach = problem.reach(old).detach()
    expected = problem.gradient((reach * chosen * kl).sum())
    for kl_type in ("k2_as_loss,cap=none", "exact_as_loss"):
        found = gradient(problem, f"{kl_type},weight=mask:tool", old, samples)
        assert_equal(found, expected)
        whole = gradient(problem, kl_type, old, samples)
        assert (found - whole).norm() > 0.01 * whole.norm()


def test_a_number_per_prompt_scales_the_gradient_of_whole_answers() -> None:
    problem = PROBLEMS[PROBLEM]()
    samples = of_all(
        problem,
        problem.old(),
        tensors={"easy": torch.full((len(problem.mask),), 0.3, dtype=torch.float64)},
    )
    for kl_type in ("k2_as_loss,horizon=sequence,cap=none", "js_as_loss,horizon=sequence,cap=none"):
        alone = gradient(problem, kl_type, problem.old(), samples)
        assert_equal(
            gradient(problem, f"{kl_type},weight=mask:easy", problem.old(), samples), 0.3 * alone
        )


def test_positive_is_the_divergence_on_better_answers_alone() -> None:
    """Of one token: the gradient of ``sum pi (log pi/ref - 1)`` over those with A > 0."""
    problem = PROBLEMS["one token"]()
    policy = problem.policy()
    better = torch.arange(problem.vocabulary) % 2 == 0
    advantages = torch.where(better, 1.5, -0.5).double()[problem.token_of]
    samples = of_all(problem, policy.detach(), advantages=advantages)
    found = gradient(problem, "k2_as_loss,weight=positive", policy.detach(), samples)
    cost = policy.exp() * (policy - problem.ref() - 1)
    assert_equal(found, problem.gradient(cost[:, better].sum()))
    assert (found - problem.loc()).norm() > 0.01 * found.norm()


def test_in_the_reward_each_token_has_its_own_weight() -> None:
    problem = PROBLEMS[PROBLEM]()
    old, tool = problem.log_probs(problem.old()), torch.rand(problem.mask.shape).double()
    samples = of_all(problem, problem.old(), tensors={"tool": tool})
    term = kl_term(
        "k1_in_reward,weight=mask:tool",
        old,
        problem.log_probs(problem.ref()),
        problem.mask,
        sample_weights=sample_weights("k1_in_reward,weight=mask:tool", samples),
    )
    log_ratio = old - problem.log_probs(problem.ref())
    assert_equal(term.coefficient, tool * log_ratio * problem.mask)
    assert_equal(term.gradient, reward_to_go(tool * log_ratio * problem.mask) * problem.mask)


@pytest.mark.parametrize(
    "kl_type",
    [
        "k3_as_loss",
        "k2_as_loss,bound=0.3",
        "k2_as_loss,horizon=sequence",
        "js_as_loss,horizon=sequence",
        "k2_as_loss,head=clipped",
        "k2_as_loss,head=combined,horizon=sequence",
        "exact_as_loss,horizon=sequence",
        "2*k2_as_loss",
    ],
)
def test_the_weight_is_outside_the_ratio_and_the_value(kl_type: str) -> None:
    """One number for all: the gradient and c are that number's, and no metric of the KL moves."""
    problem = PROBLEMS[PROBLEM]()
    half = {"mask:half": torch.full(problem.mask.shape, 0.5).double()}
    log_probs = problem.log_probs(problem.policy())

    def term(text: str):
        return kl_term(
            text,
            log_probs,
            problem.log_probs(problem.ref()),
            problem.mask,
            old_log_probs=problem.log_probs(problem.old()),
            advantages=torch.zeros_like(log_probs).detach(),
            kl_coef=1.0,
            clip_range=(0.5, 0.5),
            exact_kl=_exact(problem) if "exact" in kl_type else None,
            sample_weights=half,
        )

    alone, weighted = term(kl_type), term(f"{kl_type},weight=mask:half")
    assert_equal(weighted.value, alone.value)
    assert_equal(weighted.weight, alone.weight)
    assert_equal(weighted.coefficient, 0.5 * alone.coefficient)
    assert_equal(problem.gradient(weighted.loss.sum()), 0.5 * problem.gradient(alone.loss.sum()))
    found = weighted.metrics
    assert found["klplug/sample_weight_mean"] == 0.5
    for name, value in alone.metrics.items():
        scaled = name in ("klplug/coef_mean", "klplug/coef_max")
        assert_equal(found[name], (0.5 if scaled else 1.0) * value)


# ── Each weight, by hand ─────────────────────────────────────────────────────────────────────────


def test_difficulty_is_that_of_view_r1() -> None:
    """Two groups of four and one that is all right; d = 1 - share right, 1 - exp(-e (1 - d))."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0])
    advantages = torch.tensor([1.7, -0.6, -0.6, -0.6, 0.6, -1.7, 0.6, 0.6, 0.2, 0.0])
    mask = torch.ones(10, 2, dtype=torch.bool)
    samples = Samples(
        mask,
        advantages=advantages[:, None] * mask,
        rewards=rewards,
        group_ids=["a"] * 4 + ["b"] * 4 + ["c"] * 2,
    )
    found = sample_weights("k2_as_loss,weight=difficulty", samples)["difficulty"]
    hard, easy = 1 - math.exp(-math.e * 0.25), 1 - math.exp(-math.e * 0.75)
    expected = torch.tensor([hard, 1, 1, 1, easy, 1, easy, easy, 1, 1])
    torch.testing.assert_close(found, expected[:, None].expand(10, 2))


@pytest.mark.parametrize("without", ["tokens", "a reward"])
def test_what_is_no_answer_makes_no_question_harder(without: str) -> None:
    """Three answers are right, and one row has no tokens or no reward: all are, so no weight is
    other than 1. Beside a wrong one the share is 3/4."""
    mask = torch.ones(5, 2, dtype=torch.bool)
    mask[3] = without != "tokens"
    none = math.nan if without == "a reward" else 0.0
    advantages = torch.tensor([1, 1, 1, 0, -1])  # integers are numbers too
    for wrong, weight in ((1.0, 1.0), (0.0, 1 - math.exp(-math.e * 0.75))):
        rewards = torch.tensor([1.0, 1.0, 1.0, none, wrong])
        samples = Samples(
            mask, advantages=advantages[:, None] * mask, rewards=rewards, group_ids=[7] * 5
        )
        found = sample_weights("k2_as_loss,weight=difficulty", samples)["difficulty"]
        expected = torch.tensor([weight, weight, weight, 1.0, 1.0])[:, None] * mask
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_root_of_halves_has_all_their_digits(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    log_probs, ref = (torch.randn(2, 4, 9, generator=draw) - 2).to(dtype)
    log_u = (log_probs.double() - ref.double()).sum(-1)
    right = 1 / (2 * (log_u.exp() + (-log_u).exp() - 2).mean().sqrt())
    samples = Samples(torch.ones(4, 9).bool(), log_probs=log_probs, ref_log_probs=ref)
    found = sample_weights("chi2_as_loss,horizon=answer,weight=root", samples)["root"]
    assert_close = torch.testing.assert_close
    assert_close(found, right.float().expand(4, 9), rtol=1e-5, atol=0)


def test_entropy_keeps_the_least_of_all_counted_tokens() -> None:
    entropy = torch.tensor([[0.1, 2.0, 0.3, 9.0], [1.0, 0.2, math.nan, math.nan]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    samples = Samples(mask, entropy=entropy)
    found = sample_weights("k2_as_loss,weight=entropy", samples)["entropy"]
    assert found.tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]  # four fifths of five
    found = sample_weights("k2_as_loss,weight=entropy:0.4", samples)["entropy:0.4"]
    assert found.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    none = Samples(mask & False, entropy=entropy)
    assert not sample_weights("k2_as_loss,weight=entropy", none)["entropy"].any()


def test_a_share_of_tokens_is_that_of_its_decimal_digits() -> None:
    """55 % of 20 are 11; the float next to 0.55 is a little more."""
    samples = Samples(torch.ones(1, 20).bool(), entropy=torch.arange(20.0)[None])
    found = sample_weights("k2_as_loss,weight=entropy:0.55", samples)["entropy:0.55"]
    assert found.tolist() == [[1] * 11 + [0] * 9]


@pytest.mark.parametrize(("floor", "factor"), [("", 2 / 0.8), (":0.7", 0.875), (":0.1", 0.5)])
def test_entropy_floor_is_safes_factor_of_the_whole_batch(floor: str, factor: float) -> None:
    """A mean entropy of 0.7 nats over four tokens, and SAFE's max(0.5, floor / (H + 0.1))."""
    entropy = torch.tensor([[0.1, 2.0, 0.3, 9.0], [0.4, math.nan, math.nan, math.nan]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    weight = f"entropy_floor{floor}"
    kl_type = f"k2_as_loss,weight={weight}"
    found = sample_weights(kl_type, Samples(mask, entropy=entropy))[weight]
    torch.testing.assert_close(found, factor * mask)


def test_a_token_without_a_number_leaves_the_other_tokens_weights_as_they_are() -> None:
    """As if it were masked: neither 0 for all, by which the KL would be gone, nor the run's end."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    less = mask.clone()
    less[0, 1:] = False
    draw = torch.Generator().manual_seed(0)
    entropy, log_probs, ref = torch.rand(3, 2, 3, generator=draw, dtype=torch.float64)
    for bad in (math.nan, math.inf, -math.inf):
        holes = [x.masked_fill(~less, bad) for x in (entropy, ref)]
        for kl_type in (
            "k2_as_loss,weight=entropy",
            "k2_as_loss,weight=entropy_floor",
            "chi2_as_loss,horizon=answer,weight=root",
        ):
            found, expected = (
                next(iter(sample_weights(kl_type, s).values()))
                for s in (
                    Samples(mask, entropy=holes[0], log_probs=log_probs, ref_log_probs=holes[1]),
                    Samples(less, entropy=entropy, log_probs=log_probs, ref_log_probs=ref),
                )
            )
            assert_equal(found[less], expected[less])
            assert expected.any()


@pytest.mark.parametrize(
    ("kl_type", "given", "words"),
    [
        ("chi2_as_loss,horizon=answer,weight=root", {"ref_log_probs": torch.zeros(1, 3)},
         r"ref_log_probs has shape \(1, 3\), and must have \(4, 3\)"),
        ("k2_as_loss,weight=difficulty", {"rewards": torch.zeros(4, 1)},
         r"rewards has shape \(4, 1\), and must have \(4,\)"),
        ("k2_as_loss,weight=positive", {"mask": torch.ones(4, 3)}, "mask must be of dtype bool"),
        ("k2_as_loss,weight=positive", {"advantages": torch.ones(4, 3, device="meta")},
         "advantages is on meta, mask is on cpu"),
        ("k2_as_loss,weight=difficulty", {"group_ids": [0]}, "group_ids has 1 entries for 4"),
        ("k2_as_loss,weight=difficulty", {"group_ids": [0] * 5}, "group_ids has 5 entries for 4"),
    ],
)  # fmt: skip
def test_nothing_is_spread_over_tokens_that_it_is_not_of(
    kl_type: str, given: dict[str, Tensor], words: str
) -> None:
    zero, mask = torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool)
    whole = {"log_probs": zero, "ref_log_probs": zero, "advantages": zero, "group_ids": [0] * 4}
    with pytest.raises(ValueError, match=words):
        sample_weights(kl_type, Samples(**{"mask": mask, "rewards": zero[:, 0], **whole, **given}))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mask": [[1]]}, "mask must be a tensor, got list"),
        ({"advantages": [[1.0]]}, "advantages must be a tensor, got list"),
        ({"rewards": 1.0}, "rewards must be a tensor, got float"),
        ({"group_ids": 3}, "group_ids must be B hashable names or numbers, got 3"),
    ],
)
def test_what_is_no_tensor_is_named(given: dict[str, object], words: str) -> None:
    whole = {"mask": torch.ones(1, 1).bool(), "advantages": torch.ones(1, 1)}
    whole |= {"rewards": torch.ones(1), "group_ids": [0]}
    with pytest.raises(TypeError, match=words):
        sample_weights("k2_as_loss,weight=difficulty", Samples(**{**whole, **given}))
    with pytest.raises(TypeError, match="tensors must be a mapping, got list"):
        sample_weights("k2_as_loss,weight=mask:a", Samples(whole["mask"], tensors=[1]))


# ── Names ────────────────────────────────────────────────────────────────────────────────────────


def test_one_form_of_each() -> None:
    assert str(parse("k2_as_loss,weight=entropy:0.80")) == "k2_as_loss,weight=entropy"
    assert str(parse("k2_as_loss,weight=entropy:.5")) == "k2_as_loss,weight=entropy:0.5"
    assert str(parse("k2_as_loss,weight=none")) == "k2_as_loss"
    assert parse("k2_as_loss,weight=mask:tool").requires[-1] == "sample_weights"
    assert "sample_weights" not in parse("k2_as_loss").requires
    assert described(parse("k2_as_loss,weight=positive")) == (
        f" weight=positive (klplug {klplug.__version__})"
    )


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("postive", "unknown. Did you mean 'positive'?"),
        ("positive:1", "takes nothing after a colon"),
        ("mask", "needs a name"),
        ("mask:a-b", "no name of a tensor"),
        ("entropy:1", "no quantile"),
        ("entropy:many", "no quantile"),
        ("entropy_floor:0", "no entropy"),
        ("entropy_floor:inf", "no entropy"),
        ("entropy_floor:low", "no entropy"),
        ("json.loads", "unknown"),  # no dotted paths
    ],
)
def test_bad_names(weight: str, said: str) -> None:
    with pytest.raises(ValueError, match="weight=") as error:
        parse(f"k2_as_loss,weight={weight}")
    assert said in str(error.value)


def entry_points(monkeypatch: pytest.MonkeyPatch, *rows: tuple[str, object, str]) -> None:
    """What importlib.metadata would find: a name, what it loads, and its distribution."""
    entries = [
        SimpleNamespace(
            name=name, value=f"{dist}:{name}", load=lambda row=row: row,
            dist=SimpleNamespace(name=dist, version="2.1"),
        )
        for name, row, dist in rows
    ]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: entries)
    named.cache_clear(), _parsed.cache_clear()


def test_others_add_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    row = SampleWeight(lambda samples, _: 2 * samples.advantages.abs(), "", needs=("advantages",))
    entry_points(monkeypatch, ("twice", row, "theirs"), ("text", "no row", "theirs"))
    spec = parse("k2_as_loss,weight=twice")
    assert described(spec) == " weight=twice (theirs 2.1)"
    samples = Samples(torch.ones(1, 2).bool(), advantages=torch.tensor([[1.0, -3.0]]))
    assert sample_weights(spec, samples)["twice"].tolist() == [[2, 6]]
    with pytest.raises(ValueError, match="must be a klplug"):
        parse("k2_as_loss,weight=text")
    with pytest.raises(ValueError, match="mask, text, twice"):
        parse("k2_as_loss,weight=other")
    entry_points(monkeypatch, ("twice", row, "theirs"), ("twice", row, "others"))
    with pytest.raises(ValueError, match="of several packages: others, theirs"):
        parse("k2_as_loss,weight=twice")
    entry_points(monkeypatch)
    with pytest.raises(ValueError, match="unknown"):
        parse("k2_as_loss,weight=twice")


BAD = {
    "has shape (2, 3)": lambda s, _: torch.ones(2, 3),
    "has a gradient": lambda s, _: torch.ones(2, 4, requires_grad=True),
    "is -1 at a token": lambda s, _: -torch.ones(2),
    "is nan at a token": lambda s, _: torch.full((2, 4), math.nan),
    "is inf at a token": lambda s, _: torch.full((2, 4), math.inf),
    "is on meta, mask is on cpu": lambda s, _: torch.ones(2, 4, device="meta"),
    "is of torch.complex64: real numbers": lambda s, _: torch.ones(2, 4, dtype=torch.complex64),
    "must be a tensor, got list": lambda s, _: [1.0, 1.0],
    "must be a tensor, got ndarray": lambda s, _: np.ones((2, 4)),
}


@pytest.mark.parametrize("said", BAD)
def test_a_bad_weight_is_named_with_its_package(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, ("bad", SampleWeight(BAD[said], ""), "theirs"))
    with pytest.raises((ValueError, TypeError), match=r"weight=bad \(theirs 2.1\)") as error:
        sample_weights("k2_as_loss,weight=bad", Samples(torch.ones(2, 4).bool()))
    assert said in str(error.value)
    monkeypatch.undo()
    named.cache_clear(), _parsed.cache_clear()


def test_what_is_missing_is_named() -> None:
    mask = torch.ones(2, 4).bool()
    with pytest.raises(ValueError, match="weight=positive needs advantages, which is missing"):
        sample_weights("k2_as_loss,weight=positive", Samples(mask))
    with pytest.raises(ValueError, match="no tensor 'tool'"):
        samples = Samples(mask, tensors={"code": mask.float()})
        sample_weights("k2_as_loss,weight=mask:tool", samples)
    given = {"log_probs": torch.zeros(2, 4, requires_grad=True), "response_mask": mask}
    given |= {"ref_log_probs": torch.zeros(2, 4), "old_log_probs": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match="needs sample_weights, which is missing"):
        kl_term("k2_as_loss,weight=positive", **given)
    for weights, said in (
        ({"mask:a": torch.ones(2, 4)}, "sample_weights has no 'positive'. It has: mask:a"),
        ({"positive": torch.ones(2, 3)}, "has shape"),
        ({"positive": torch.ones(2, 4, requires_grad=True)}, "has a gradient"),
        ({"positive": torch.ones(2, 4).int()}, "floating-point"),
    ):
        with pytest.raises(ValueError) as error:
            kl_term("k2_as_loss,weight=positive", **given, sample_weights=weights)
        assert said in str(error.value)
    with pytest.raises(TypeError, match=r"sample_weights\['positive'\] must be a tensor.*got None"):
        kl_term("k2_as_loss,weight=positive", **given, sample_weights={"positive": None})


def test_a_token_whose_weight_is_no_number_leaves_the_kl() -> None:
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    term = kl_term(
        "k2_as_loss,ratio=none,weight=mask:a",
        log_probs,
        torch.zeros(1, 2),
        torch.ones(1, 2),
        sample_weights={"mask:a": torch.tensor([[math.nan, 1.0]])},
    )
    assert term.gradient.tolist() == [[0, -2]]
    assert term.metrics["klplug/nonfinite_share"] == 0.5
    bad = [name for name, x in term.metrics.items() if name.startswith(NONFINITE) and x]
    assert bad == ["klplug/nonfinite/sample_weights/mask-a"]


def test_every_row_is_documented() -> None:
    meaning = klplug.axes.AXES["weight"].meaning
    for name, row in WEIGHTS.items():
        assert name in meaning and len(row.meaning) > 30 and row.source, name
