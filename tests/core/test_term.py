"""kl_term as a user meets it: masks, dtypes, extremes, stopped gradients, metrics, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import klplug
from klplug import KLSpec, Tally, parse
from klplug.baselines import others_mean
from klplug.spec import CHOICES
from tests.one_meaning import STEPS

BETA, CLIP = 0.7, (0.2, 0.3)


def kl_term(kl_type: str | KLSpec, *args: Tensor, **tensors: Tensor) -> klplug.KLTerm:
    return klplug.kl_term(kl_type, *args, kl_coef=BETA, clip_range=CLIP, **tensors)


GRID = [
    str(parse(kl_type))
    for kl_type in (
        *klplug.kl_types(),
        *(kl_type for kl_type in STEPS if kl_type not in klplug.kl_types()),
        "k1_as_loss,ratio=none",
        "k2_as_loss,ratio=none",
        "k3_as_loss,ratio=rollout",
        "abs_as_loss,ratio=none",
        "k2_as_loss,ratio=none,horizon=sequence",
        "k2_as_loss,level=prefix,cap=2,mode=mask",
        "k2_as_loss,cap=1,mode=mask",
        "k2_as_loss,horizon=sequence,cap=1.5,mode=mask",
        "k2_as_loss,level=sequence,horizon=sequence",
        "k2_as_loss,horizon=sequence,cap=none",
        "k2_as_loss,level=sequence,horizon=sequence,cap=none",
        "k2_as_loss,cap=none,bound=0.5",
        "k1_in_reward,bound=3",
        "alpha_as_loss,alpha=2,level=prefix",
        "alpha_as_loss,alpha=-1.5,ratio=none",
        "chi2_as_loss,horizon=sequence,level=sequence",
        "js_as_loss,horizon=answer,ratio=none",
        "tv_as_loss,horizon=answer,baseline=group",
        "chi2_as_loss,horizon=answer,bound=0.5",
        "forward_as_loss,ratio=none,horizon=sequence",
        "k3_as_loss,head=clipped",
        "k3_as_loss,head=combined,bound=0.5",
        "js_as_loss,head=combined,horizon=sequence",
        "k2_as_loss,horizon=sequence,baseline=group",
        "k2_as_loss,horizon=sequence,level=sequence,baseline=batch",
        "k1_in_reward,baseline=group",
        "k3_as_loss,reference=rollout",
        "k2_as_loss,head=combined+k3_as_loss,ratio=none",
    )
    if "vocab=" not in kl_type  # test_exact_term.py
]


def batch(
    shape: tuple[int, int] = (4, 6), seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        return (-scale * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)

    mask = (torch.rand(shape, generator=generator) > 0.3).long()
    mask[0, 0] = 1
    return {
        "log_probs": draw(4.0).requires_grad_(),
        "ref_log_probs": draw(4.0),
        "response_mask": mask,
        "old_log_probs": draw(4.0),
        "rollout_log_probs": draw(4.0),
        "advantages": draw(2.0) + 1,
        "posterior_log_probs": draw(4.0),
        "teacher_log_probs": draw(4.0),
        "group_ids": torch.arange(shape[0]) // 2,
    }


def force(term: klplug.KLTerm, log_probs: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(term.loss.sum(), log_probs)
    return gradient


@pytest.mark.parametrize("kl_type", GRID)
def test_loss_is_the_value_with_weight_times_coefficient_as_gradient(kl_type: str) -> None:
    """Of a term in the reward, with what a host makes of its coefficient: the sum to go."""
    tensors = batch()
    term = kl_term(kl_type, **tensors)
    torch.testing.assert_close(term.loss, term.value, rtol=0, atol=0)
    expected = torch.zeros_like(term.value)
    for part in term.parts:
        acting = part.weight * part.coefficient
        if part.spec.placement == "in_reward":
            acting = acting.flip(-1).cumsum(-1).flip(-1) * tensors["response_mask"]
        expected += acting
    torch.testing.assert_close(force(term, tensors["log_probs"]), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(term.gradient, expected, rtol=1e-12, atol=0)
    for name in ("value", "coefficient", "gradient", "weight"):
        assert not getattr(term, name).requires_grad


@pytest.mark.parametrize("kl_type", GRID)
def test_no_gradient_reaches_reference_old_or_rollout(kl_type: str) -> None:
    tensors = batch()
    others = [
        tensors[f"{k}_log_probs"].requires_grad_() for k in ("ref", "old", "rollout", "posterior")
    ]
    kl_term(kl_type, **tensors).loss.sum().backward()
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("kl_type", GRID)
def test_masked_positions_are_zero_and_inert(kl_type: str, poison: float) -> None:
    clean = batch()
    masked = clean["response_mask"] == 0
    dirty = {
        k: v if k in ("response_mask", "group_ids") else v.detach().masked_fill(masked, poison)
        for k, v in clean.items()
    }
    dirty["log_probs"].requires_grad_()
    one, other = kl_term(kl_type, **clean), kl_term(kl_type, **dirty)
    for name in ("loss", "value", "coefficient", "weight"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)
        assert (getattr(other, name)[masked] == 0).all()
    torch.testing.assert_close(
        force(one, clean["log_probs"]), force(other, dirty["log_probs"]), rtol=0, atol=0
    )
    for name, metric in one.metrics.items():
        torch.testing.assert_close(metric, other.metrics[name], rtol=0, atol=0)


@pytest.mark.parametrize("kl_type", GRID)
def test_an_empty_mask_gives_zero_and_finite_metrics(kl_type: str) -> None:
    tensors = batch() | {"response_mask": torch.zeros(4, 6)}
    term = kl_term(kl_type, **tensors)
    assert (term.loss == 0).all()
    assert (force(term, tensors["log_probs"]) == 0).all()
    assert all(metric.isfinite() for metric in term.metrics.values())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16])
def test_any_mask_dtype_counts_the_same(dtype: torch.dtype) -> None:
    tensors = batch()
    term = kl_term("k2_as_loss", **tensors)
    other = kl_term("k2_as_loss", **tensors | {"response_mask": tensors["response_mask"].to(dtype)})
    torch.testing.assert_close(term.loss, other.loss, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "worked"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_work_is_done_in_float32_at_least(given: torch.dtype, worked: torch.dtype) -> None:
    tensors = batch(dtype=given)
    term = kl_term("k3_as_loss", **tensors)
    assert term.loss.dtype == term.coefficient.dtype == worked
    term.loss.sum().backward()
    assert tensors["log_probs"].grad is not None
    assert tensors["log_probs"].grad.dtype == given
    raised = {k: v.detach().to(worked) if v.is_floating_point() else v for k, v in tensors.items()}
    torch.testing.assert_close(kl_term("k3_as_loss", **raised).value, term.value, rtol=0, atol=0)


@pytest.mark.parametrize("log_ratio", [60.0, -60.0, 11.0, -4.0])
@pytest.mark.parametrize("kl_type", ["k1_as_loss", "k2_as_loss", "k3_as_loss", "abs_as_loss"])
def test_a_token_that_drifted_far_keeps_its_gradient(kl_type: str, log_ratio: float) -> None:
    log_probs = torch.full((1, 1), log_ratio, requires_grad=True)
    term = kl_term(f"{kl_type},ratio=none", log_probs, torch.zeros(1, 1), torch.ones(1, 1))
    expected = {
        "k1_as_loss": 1.0,
        "k2_as_loss": log_ratio,
        "k3_as_loss": 1 - math.exp(-log_ratio),
        "abs_as_loss": math.copysign(1.0, log_ratio),
    }[kl_type]
    assert force(term, log_probs).item() == pytest.approx(expected, rel=1e-5)


def test_exponents_saturate_at_the_dtype_and_are_counted() -> None:
    log_probs = torch.tensor([[-200.0, -1.0, -1.0, -1.0]], requires_grad=True)
    term = kl_term("k3_as_loss,ratio=none", log_probs, -torch.ones(1, 4), torch.ones(1, 4))
    largest = torch.finfo(torch.float32).max
    assert force(term, log_probs)[0, 0].item() == -largest
    assert term.metrics["klplug/overflow_share"].item() == 0.25
    assert all(metric.isfinite() for metric in term.metrics.values())
    weighted = kl_term(
        "k2_as_loss,cap=none",
        log_probs,
        log_probs.detach(),
        torch.ones(1, 4),
        old_log_probs=torch.tensor([[-1.0, -1.0, -150.0, -1.0]]),
    )
    assert weighted.weight[0, 2].item() == largest
    assert weighted.metrics["klplug/overflow_share"].item() == 0.25


@settings(max_examples=150, deadline=None)
@given(
    kl_type=st.sampled_from(GRID),
    values=st.lists(st.floats(-300, 0, allow_nan=False, width=32), min_size=24, max_size=24),
    mask=st.lists(st.integers(0, 1), min_size=6, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example("k3_in_reward+k3_as_loss", [0.0, -89.0, *[0.0] * 22], [0, 1, 0, 0, 0, 0], torch.float32)
def test_everything_stays_finite(
    kl_type: str, values: list[float], mask: list[int], dtype: torch.dtype
) -> None:
    log_probs, ref, old, rollout = torch.tensor(values, dtype=dtype).view(4, 2, 3)
    log_probs.requires_grad_()
    term = kl_term(
        kl_type,
        log_probs,
        ref,
        torch.tensor(mask).view(2, 3),
        old_log_probs=old,
        rollout_log_probs=rollout,
        posterior_log_probs=rollout,
        teacher_log_probs=old,
        advantages=torch.ones_like(ref),
        group_ids=[0, 0],
    )
    tensors = [term.loss, term.coefficient, term.weight, force(term, log_probs)]
    assert all(tensor.isfinite().all() for tensor in (*tensors, *term.metrics.values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kl_type", GRID)
def test_saturated_exponents_leave_finite_numbers_in_every_dtype(
    kl_type: str, dtype: torch.dtype
) -> None:
    """A gradient that float32 holds may be beyond bfloat16, and sums of float64 beyond itself."""
    tensors = batch(dtype=torch.float64)
    far = 3000.0 if dtype == torch.float64 else 90.0
    tensors = {
        name: (far * x.detach()).to(dtype) if x.is_floating_point() else x
        for name, x in tensors.items()
    }
    tensors["log_probs"].requires_grad_()
    term = kl_term(kl_type, **tensors)
    for tensor in (term.coefficient, force(term, tensors["log_probs"]), *term.metrics.values()):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(
    "kl_type", ["none", *(f"k2_as_loss,head={head}" for head in CHOICES["head"])]
)
def test_a_policy_loss_survives_a_ratio_beyond_its_dtype(kl_type: str, advantage: float) -> None:
    """One token whose probability rose by e^100: without its gradient the others keep theirs."""
    log_probs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-101.0, -1.0]])
    given = {"old_log_probs": old, "advantages": torch.full((1, 2), advantage), "kl_coef": 0.1}
    loss = klplug.policy_loss(kl_type, log_probs, old, torch.ones(1, 2), **given)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert gradient[0, 1].item() == pytest.approx(-advantage)


@settings(max_examples=40, deadline=None)
@given(kl_type=st.sampled_from(GRID), seed=st.integers(0, 1000), data=st.data())
def test_the_order_of_answers_does_not_matter(kl_type: str, seed: int, data: st.DataObject) -> None:
    tensors = batch(seed=seed)
    order = data.draw(st.permutations(range(4)))
    term = kl_term(kl_type, **tensors)
    shuffled = kl_term(kl_type, **{k: v[list(order)] for k, v in tensors.items()})
    torch.testing.assert_close(term.loss[list(order)], shuffled.loss, rtol=1e-12, atol=1e-14)
    for name, metric in term.metrics.items():
        torch.testing.assert_close(metric, shuffled.metrics[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kl_type", [g for g in GRID if not g.startswith("k1_as_loss")])
def test_at_the_reference_there_is_nothing(kl_type: str) -> None:
    tensors = batch()
    others = [
        f"{name}_log_probs" for name in ("old", "posterior", "teacher") if f"={name}" in kl_type
    ]
    for name in ("ref_log_probs", "rollout_log_probs", *others):
        tensors[name] = tensors["log_probs"].detach().clone()
    term = kl_term(kl_type, **tensors)
    assert (term.loss == 0).all()
    assert (force(term, tensors["log_probs"]) == 0).all()


@pytest.mark.parametrize("kl_type", [g for g in GRID if "_as_loss" in g and "ratio=none" not in g])
def test_on_policy_the_ratio_is_exactly_one(kl_type: str) -> None:
    tensors = batch()
    for name in ("old_log_probs", "rollout_log_probs"):
        tensors[name] = tensors["log_probs"].detach().clone()
    term = kl_term(kl_type, **tensors)
    assert (term.weight == tensors["response_mask"]).all()
    assert term.metrics["klplug/ess"] == 1
    assert term.metrics["klplug/capped_share"] == 0


def test_one_token_answers_make_the_horizons_one() -> None:
    tensors = batch(shape=(6, 1))
    own = kl_term("k2_as_loss,level=prefix", **tensors)
    whole = kl_term("k2_as_loss,horizon=sequence", **tensors)
    torch.testing.assert_close(own.loss, whole.loss, rtol=0, atol=0)
    torch.testing.assert_close(
        force(own, tensors["log_probs"]), force(whole, tensors["log_probs"]), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", ["k2", "forward", "js", "jeffreys", "chi2", "hellinger", "tv"])
def test_one_token_answers_make_the_horizons_one_for_every_divergence(name: str) -> None:
    tensors = batch(shape=(6, 1))
    own = kl_term(f"{name}_as_loss", **tensors)
    whole = kl_term(f"{name}_as_loss,horizon=sequence", **tensors)
    torch.testing.assert_close(own.coefficient, whole.coefficient, rtol=1e-12, atol=1e-15)
    if name not in ("k2", "forward"):
        between = kl_term(f"{name}_as_loss,horizon=answer", **tensors)
        for found, wanted in ((between.coefficient, own.coefficient), (between.value, own.value)):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_level_sequence_is_the_product_and_no_geometric_mean() -> None:
    tensors = batch()
    mask = tensors["response_mask"]
    term = kl_term("k2_as_loss,level=sequence,cap=none", **tensors)
    log_ratio = ((tensors["log_probs"] - tensors["old_log_probs"]).detach() * mask).sum(-1)
    product, geometric_mean = log_ratio.exp(), (log_ratio / mask.sum(-1)).exp()
    torch.testing.assert_close(term.weight, product[:, None] * mask, rtol=1e-12, atol=0)
    assert (product - geometric_mean).abs().min() > 0.01


# ── One token that went far, as users report it: PPO and GRPO runs that lose all their direction ──


@pytest.mark.parametrize(("dtype", "log_ratio"), [(torch.bfloat16, -40.0), (torch.float32, -100.0)])
@pytest.mark.parametrize("kl_type", ["k3_as_loss", "jeffreys_as_loss"])
def test_a_bound_keeps_the_batch_s_direction(
    kl_type: str, dtype: torch.dtype, log_ratio: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    ref = -torch.rand(8, 16, generator=generator) - 0.5
    drift = 0.3 * torch.randn(8, 16, generator=generator)
    directions = torch.randn(8 * 16, 64, generator=generator)  # of each token's score

    def direction(kl_type: str, far: bool) -> Tensor:
        moved = drift.clone()
        moved[3, 5] = log_ratio if far else 0.0
        log_probs = (ref + moved).to(dtype).requires_grad_()
        term = kl_term(f"{kl_type},ratio=none", log_probs, ref.to(dtype), torch.ones(8, 16))
        return force(term, log_probs).double().flatten() @ directions.double()

    def cosine(one: Tensor, other: Tensor) -> float:
        return float((one / one.norm()) @ (other / other.norm()))

    outlier = directions[3 * 16 + 5].double()
    lost = direction(kl_type, far=True)
    assert abs(cosine(lost, outlier)) > 0.999
    bounded = direction(f"{kl_type},bound=1", far=True)
    assert cosine(bounded, direction(f"{kl_type},bound=1", far=False)) > 0.9


def test_a_combined_term_drops_the_tokens_that_the_policy_loss_drops() -> None:
    """By the sign of advantage and KL together; a clipped one looks at the KL alone."""
    tensors = batch(shape=(8, 16))
    mask = tensors["response_mask"].bool()
    dropped = {}
    for head in ("combined", "clipped"):
        term = kl_term(f"k2_as_loss,head={head}", **tensors)
        dropped[head] = (term.weight == 0) & mask
        share = term.metrics["klplug/capped_share"].item()
        assert share == pytest.approx(float(dropped[head].sum() / mask.sum()))
    given = {k: v for k, v in tensors.items() if k not in ("rollout_log_probs", "group_ids")}
    loss = klplug.policy_loss("k2_as_loss,head=combined", **given, kl_coef=BETA, clip_range=CLIP)
    (gradient,) = torch.autograd.grad(loss.sum(), tensors["log_probs"])
    assert torch.equal((gradient == 0) & mask, dropped["combined"])
    assert 0 < dropped["combined"].sum() < mask.sum()
    assert not torch.equal(dropped["combined"], dropped["clipped"])


@pytest.mark.parametrize("horizon", ["token", "sequence"])
def test_terms_inside_the_policy_loss_have_one_clip(horizon: str) -> None:
    """It looks at the advantage and all of their KL together, as the policy loss does."""
    tensors = batch(shape=(8, 16))
    tensors |= {"teacher_log_probs": tensors["ref_log_probs"].flip(0)}
    of_each = [f"k2_as_loss,head=combined,horizon={horizon}{x}" for x in ("", ",reference=teacher")]
    both, apart = kl_term("+".join(of_each), **tensors), [kl_term(x, **tensors) for x in of_each]
    given = {k: v for k, v in tensors.items() if k not in ("rollout_log_probs", "group_ids")}

    def of_loss(kl_type: str, advantages: Tensor) -> Tensor:
        given["advantages"] = advantages
        loss = klplug.policy_loss(kl_type, **given, kl_coef=BETA, clip_range=CLIP)
        return torch.autograd.grad(loss.sum(), tensors["log_probs"])[0]

    # What a step has where the surrogate alone acts: A - beta (c_1 + c_2) in its place.
    c = sum(part.coefficient for part in apart)
    expected = of_loss("none", tensors["advantages"] - BETA * c)
    dropped = (expected == 0) & (tensors["response_mask"] != 0)
    for part in both.parts:
        assert torch.equal((part.weight == 0) & (tensors["response_mask"] != 0), dropped)
    assert any(not torch.equal(x.weight, y.weight) for x, y in zip(apart, both.parts, strict=True))
    rho = (tensors["log_probs"] - tensors["old_log_probs"]).detach().exp()
    torch.testing.assert_close(both.gradient, (rho * c).masked_fill(expected == 0, 0.0))
    torch.testing.assert_close(of_loss("+".join(of_each), tensors["advantages"]), expected)


def test_a_large_bound_changes_nothing() -> None:
    tensors = batch()
    one, other = kl_term("k2_as_loss", **tensors), kl_term("k2_as_loss,bound=1000", **tensors)
    torch.testing.assert_close(one.coefficient, other.coefficient, rtol=0, atol=0)


def test_a_sum_is_the_sum_of_its_terms() -> None:
    tensors = batch()
    both = kl_term("k3_in_reward+k3_as_loss", **tensors)
    parts = [kl_term(k, **tensors) for k in ("k3_in_reward", "k3_as_loss")]
    torch.testing.assert_close(both.loss, parts[0].loss + parts[1].loss, rtol=1e-12, atol=0)
    forces = [force(p, tensors["log_probs"]) for p in parts]
    torch.testing.assert_close(
        force(both, tensors["log_probs"]), forces[0] + forces[1], rtol=1e-12, atol=0
    )


# By hand: lr = log(0.5/0.25) = log 2 and log(0.1/0.4) = -log 4; rho = 0.5/0.4 and 0.1/0.2.
def test_golden_numbers() -> None:
    tensors = {
        "log_probs": torch.tensor([[0.5, 0.1]], dtype=torch.float64).log().requires_grad_(),
        "ref_log_probs": torch.tensor([[0.25, 0.4]], dtype=torch.float64).log(),
        "response_mask": torch.ones(1, 2),
        "old_log_probs": torch.tensor([[0.4, 0.2]], dtype=torch.float64).log(),
    }
    two, four = math.log(2), math.log(4)
    expected = {
        "k1_in_reward": ([two, -four], [two, -four], [1, 1]),
        "k2_in_reward": ([two**2 / 2, four**2 / 2], [two**2 / 2, four**2 / 2], [1, 1]),
        "k3_in_reward": ([two - 0.5, 3 - four], [two - 0.5, 3 - four], [1, 1]),
        "k1_as_loss": ([two, -four], [1, 1], [1.25, 0.5]),
        "k2_as_loss": ([two**2 / 2, four**2 / 2], [two, -four], [1.25, 0.5]),
        "k3_as_loss": ([two - 0.5, 3 - four], [0.5, -3], [1.25, 0.5]),
        "abs_as_loss": ([two, four], [1, -1], [1.25, 0.5]),
        "k2_as_loss,cap=1.1": ([two**2 / 2, four**2 / 2], [two, -four], [1.1, 0.5]),
        "k2_as_loss,cap=1.1,mode=mask": ([two**2 / 2, four**2 / 2], [two, -four], [0, 0.5]),
        "k2_as_loss,level=prefix": ([two**2 / 2, four**2 / 2], [two, -four], [1.25, 0.625]),
        "k2_as_loss,level=sequence": ([two**2 / 2, four**2 / 2], [two, -four], [0.625, 0.625]),
        "k2_as_loss,horizon=sequence": (
            [two**2 / 2, four**2 / 2],
            [two - 0.5 * four, -four],
            [1.25, 0.625],
        ),
        "chi2_as_loss,horizon=answer": ([0.25, 0.25], [-1, -1], [0.625, 0.625]),
    }
    for kl_type, (value, coefficient, weight) in expected.items():
        term = kl_term(kl_type, **tensors)
        for found, wanted in (
            (term.value, value),
            (term.coefficient, coefficient),
            (term.weight, weight),
        ):
            wanted = torch.tensor([wanted], dtype=torch.float64)
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_metrics_are_what_they_say() -> None:
    tensors = batch()
    mask = tensors["response_mask"].bool()
    term = kl_term("k3_as_loss,cap=1.2", **tensors)
    lr = (tensors["log_probs"] - tensors["ref_log_probs"]).detach()[mask]
    weight = (tensors["log_probs"] - tensors["old_log_probs"]).detach().exp()[mask]
    capped = weight.clamp(max=1.2)
    c = 1 - torch.exp(-lr)
    w = torch.exp(-lr)
    slope = -torch.cov(torch.stack([lr, w]))[0, 1] / w.var()
    assert 2 / 5 < w.sum() ** 2 / (len(w) * (w**2).sum()) < 1 / 2
    expected = {
        "active": 1.0,
        "k1": lr.mean(),
        "k2": (lr**2 / 2).mean(),
        "k3": (torch.exp(-lr) - 1 + lr).mean(),
        "abs": lr.abs().mean(),
        # By the regression of lr on exp(-lr), whose mean is 1 under all samples of pi.
        "kl": (lr + slope * (w - 1)).mean(),
        "coef_mean": c.abs().mean(),
        "coef_max": c.abs().max(),
        "weight_mean": capped.mean(),
        "ess": capped.sum() ** 2 / (len(capped) * (capped**2).sum()),
        "capped_share": (weight > 1.2).double().mean(),
        "bounded_share": 0.0,
        "overflow_share": 0.0,
        "nonfinite_share": 0.0,
        **{f"nonfinite/{n}_log_probs": 0.0 for n in ("ref", "old")},
        "nonfinite/log_probs": 0.0,
        "gradient_cosine": torch.cosine_similarity(capped * c, capped * lr, dim=0),
        "gradient_norm_ratio": (capped * c).norm() / (capped * lr).norm(),
        "top_share": (capped * c).abs().max() / (capped * c).abs().sum(),
    }
    assert set(term.metrics) == {f"klplug/{name}" for name in expected}
    for name, value in expected.items():
        metric = term.metrics[f"klplug/{name}"]
        assert metric.dim() == 0
        assert metric.item() == pytest.approx(float(value), rel=1e-9), name
    bounded = kl_term("k3_as_loss,bound=0.5", **tensors).metrics
    assert bounded["klplug/bounded_share"].item() == pytest.approx(
        (c.abs() > 0.5).double().mean().item()
    )
    assert bounded["klplug/coef_max"].item() == 0.5


def test_metrics_of_micro_batches_merge_exactly() -> None:
    tensors = batch(shape=(8, 5))
    whole = kl_term("k2_as_loss", **tensors).metrics
    parts = [
        kl_term("k2_as_loss", **{k: v[rows] for k, v in tensors.items()}).tally
        for rows in (slice(0, 1), slice(1, 5), slice(5, 8))
    ]
    merged = Tally.merged(parts).metrics()
    for name, value in whole.items():
        if name != "klplug/top_share":  # of each micro-batch's own top
            torch.testing.assert_close(merged[name], value, rtol=1e-12, atol=0)
    mean_of_ratios = sum(p.metrics()["klplug/ess"] for p in parts) / 3
    assert abs(mean_of_ratios - whole["klplug/ess"]) > 1e-3


def test_missing_tensors_are_named() -> None:
    tensors = batch()
    for kl_type, name in (
        ("k2_as_loss", "old_log_probs"),
        ("k2_as_loss,ratio=rollout", "rollout_log_probs"),
        ("k1_in_reward", "ref_log_probs"),
    ):
        with pytest.raises(ValueError, match=name):
            kl_term(kl_type, **tensors | {name: None})
    assert (kl_term("none", **tensors | {"ref_log_probs": None}).loss == 0).all()
    given = {k: v for k, v in tensors.items() if k not in ("advantages", "group_ids")}
    for kl_type, name, inputs in (
        ("k2_as_loss,head=combined", "advantages", {"kl_coef": 1.0, "clip_range": 0.2}),
        (
            "k2_as_loss,head=combined",
            "kl_coef",
            {"advantages": given["old_log_probs"], "clip_range": 0.2},
        ),
        ("k2_as_loss,head=clipped", "clip_range", {}),
        ("k1_in_reward,baseline=group", "group_ids", {}),
        ("k2_as_loss,reference=rollout", "rollout_log_probs", {"rollout_log_probs": None}),
    ):
        with pytest.raises(ValueError, match=f"needs {name}"):
            klplug.kl_term(kl_type, **given | inputs)


def test_an_answer_alone_is_compared_with_nothing() -> None:
    """verl pads its batches with rows of a group of their own, and drops answers of a group."""
    tensors = batch()
    plain = kl_term("k1_in_reward", **tensors).coefficient
    for ids in ([0, 0, 0, 1], ["a", "a", "a", "b"], torch.tensor([5, 5, 5, 2])):
        term = kl_term("k1_in_reward,baseline=group", **tensors | {"group_ids": ids})
        assert torch.equal(term.coefficient[3], plain[3])
        assert not torch.allclose(term.coefficient[0], plain[0])
    single = {k: v[:1] for k, v in tensors.items()}
    alone = kl_term("k1_in_reward,baseline=batch", **single).coefficient
    assert torch.equal(alone, kl_term("k1_in_reward", **single).coefficient)


@pytest.mark.parametrize(
    "kl_type", ["k1_in_reward,baseline=batch", "k2_as_loss,horizon=sequence,baseline=group"]
)
def test_a_row_without_tokens_is_no_answer(kl_type: str) -> None:
    tensors = batch() | {"group_ids": [0, 0, 0, 0]}
    three = {k: v[:3] for k, v in tensors.items()}
    padded = tensors | {"response_mask": tensors["response_mask"] * torch.tensor([[1, 1, 1, 0]]).T}
    expected = kl_term(kl_type, **three).coefficient
    torch.testing.assert_close(kl_term(kl_type, **padded).coefficient[:3], expected)


@pytest.mark.parametrize(
    ("ids", "words"),
    [([0, 0], "2 entries for 4 answers"), (torch.zeros(4, 1), r"shape \(4, 1\), .* \(B,\)")],
)
def test_group_ids_are_one_for_each_answer(ids: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kl_term("k1_in_reward,baseline=group", **batch() | {"group_ids": ids})


def test_groups_that_are_named_by_tensors_are_those_of_their_numbers() -> None:
    """A tensor is hashed by who it is: each answer would be alone, and compared with nothing."""
    tensors = batch()
    one, other = (
        kl_term("k1_in_reward,baseline=group", **tensors | {"group_ids": ids})
        for ids in ([0, 0, 1, 1], list(torch.tensor([0, 0, 1, 1])))
    )
    assert torch.equal(one.coefficient, other.coefficient)
    with pytest.raises(TypeError, match="group_ids must be B hashable"):
        kl_term("k1_in_reward,baseline=group", **tensors | {"group_ids": list(torch.zeros(4, 2))})


def test_a_baseline_of_saturated_exponents_is_a_number_and_of_no_answers_nothing() -> None:
    returns = torch.full((3, 2), torch.finfo(torch.float32).max)
    for baseline in (others_mean(returns, None), others_mean(-returns, [0, 0, 0])):
        assert baseline.isfinite().all()
    empty = torch.zeros(0, 2)
    term = kl_term("k1_in_reward,baseline=group", empty, empty, empty, group_ids=[])
    assert term.coefficient.shape == (0, 2)


def test_the_baseline_of_a_step_is_the_batch_s_own_where_the_policy_is_the_sampler() -> None:
    tensors = batch()
    current, mask, ids = (tensors[k] for k in ("log_probs", "response_mask", "group_ids"))
    for options, reference in (("", "ref_log_probs"), (",reference=rollout", "rollout_log_probs")):
        kl_type = f"k2_as_loss,horizon=sequence,baseline=group{options}"
        given = klplug.kl_return_baseline(kl_type, current, tensors[reference], mask, ids)
        against = tensors | {"ref_log_probs": tensors[reference]}
        plain = kl_term("k2_as_loss,ratio=none,horizon=sequence", **against)
        own = kl_term("k2_as_loss,ratio=none,horizon=sequence,baseline=group", **against)
        expected = (plain.coefficient - given) * mask
        torch.testing.assert_close(own.coefficient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip_range", [-0.1, (0.2, -1.0), (math.nan, 0.2), (0.2, 1e39)])
def test_a_clip_range_that_is_none(clip_range: float) -> None:
    with pytest.raises(ValueError, match="clip_range"):
        klplug.kl_term("k2_as_loss,head=clipped", clip_range=clip_range, **batch())


def test_a_kl_in_the_reward_is_not_the_policy_loss_s() -> None:
    tensors = batch()
    del tensors["rollout_log_probs"], tensors["group_ids"]
    with pytest.raises(ValueError, match="is in the reward: join it to the advantages"):
        klplug.policy_loss("k1_in_reward", **tensors, kl_coef=0.1)
    with pytest.raises(ValueError, match="has no baseline"):
        klplug.kl_return_baseline(
            "k1_in_reward", *(tensors[k] for k in ("log_probs", "ref_log_probs", "response_mask"))
        )


@pytest.mark.parametrize(
    "name", ["ref_log_probs", "old_log_probs", "rollout_log_probs", "response_mask"]
)
def test_shapes_that_differ_are_named(name: str) -> None:
    tensors = batch()
    tensors[name] = tensors[name][:, :-1]
    with pytest.raises(ValueError, match=rf"{name} has shape \(4, 5\).*\(4, 6\)"):
        kl_term("k2_as_loss", **tensors)


def test_log_probs_must_be_a_floating_matrix() -> None:
    tensors = batch()
    with pytest.raises(ValueError, match=r"log_probs must be .*\(24,\)"):
        kl_term(
            "k1_in_reward",
            tensors["log_probs"].flatten(),
            tensors["ref_log_probs"],
            tensors["response_mask"],
        )


def test_a_spec_serves_as_well_as_its_string() -> None:
    tensors = batch()
    one, other = kl_term(KLSpec("k3", "as_loss"), **tensors), kl_term("k3_as_loss", **tensors)
    torch.testing.assert_close(one.loss, other.loss, rtol=0, atol=0)


def test_the_coefficient_of_a_sum_has_the_weights_in_it() -> None:
    tensors = batch()
    both = kl_term("k2_as_loss,cap=2+k3_as_loss,ratio=rollout", **tensors)
    expected = sum(part.weight * part.coefficient for part in both.parts)
    torch.testing.assert_close(both.coefficient, expected, rtol=1e-12, atol=0)
    assert not torch.allclose(both.coefficient, sum(part.coefficient for part in both.parts))


@pytest.mark.parametrize("name", ["ref_log_probs", "old_log_probs"])
def test_one_tensor_of_more_digits_raises_the_work_of_all(name: str) -> None:
    tensors = batch(dtype=torch.float32)
    term = kl_term("k2_as_loss", **tensors | {name: tensors[name].double()})
    assert term.value.dtype == term.weight.dtype == term.gradient.dtype == torch.float64


def test_a_token_counts_where_its_mask_is_not_zero() -> None:
    tensors = batch()
    parts = tensors["response_mask"] * torch.tensor([0.25, -1.0, 1.0, 0.5, 2.0, 1e-9])
    one, other = (kl_term("k2_as_loss", **tensors | m) for m in ({}, {"response_mask": parts}))
    torch.testing.assert_close(one.loss, other.loss, rtol=0, atol=0)
    assert one.metrics["klplug/kl"] == other.metrics["klplug/kl"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kl_type", GRID)
def test_on_cuda_nothing_waits_for_the_device(kl_type: str) -> None:
    given = batch(dtype=torch.bfloat16)
    ids = given.pop(
        "group_ids"
    )  # looked at by the host's process, where a tensor would be waited for
    tensors = {k: v.detach().cuda() for k, v in given.items()}
    tensors["log_probs"].requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        term = kl_term(kl_type, **tensors, group_ids=ids)
        metrics = term.metrics
        term.loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(metric.isfinite() for metric in metrics.values())
