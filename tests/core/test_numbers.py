"""Nothing that counts is silently wrong: numbers that are none, packed rows, and the metrics."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

import klplug
from klplug import parse
from tests.core.test_term import BETA, CLIP, GRID, batch, force, kl_term

NAN, INF = math.nan, math.inf
LOG_PROBS = (
    *("log_probs", "ref_log_probs", "old_log_probs", "rollout_log_probs"),
    "teacher_log_probs",
)


def used(kl_type: str) -> list[str]:
    return ["log_probs", *(n for n in parse(kl_type).requires if n in (*LOG_PROBS, "advantages"))]


def with_number(tensors: dict[str, Tensor], name: str, number: float) -> dict[str, Tensor]:
    changed = tensors | {name: tensors[name].detach().clone()}
    changed[name][0, 0] = number
    if name == "log_probs":
        changed[name].requires_grad_()
    return changed


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("kl_type", [k for k in GRID if k != "none"])
def test_a_counted_number_that_is_none_leaves_the_kl_with_its_ratio(
    kl_type: str, number: float
) -> None:
    """As if that token were masked; in the metrics it is counted, with the tensor's name."""
    tensors = batch()
    without = tensors | {"response_mask": tensors["response_mask"].clone()}
    without["response_mask"][0, 0] = 0
    expected = kl_term(kl_type, **without)
    for name in used(kl_type):
        changed = with_number(tensors, name, number)
        term = kl_term(kl_type, **changed)
        gradient = force(term, changed["log_probs"])
        assert gradient.isfinite().all() and term.loss.isfinite().all()
        assert all(metric.isfinite() for metric in term.metrics.values())
        share = 1 / tensors["response_mask"].sum()
        assert term.metrics["klplug/nonfinite_share"].item() == pytest.approx(share.item())
        assert term.metrics[f"klplug/nonfinite/{name}"] == 1
        if number != number or name in ("log_probs", "old_log_probs", "advantages"):
            torch.testing.assert_close(gradient, expected.gradient)
    clean = kl_term(kl_type, **tensors).metrics
    assert not any(clean[f"klplug/nonfinite/{name}"] for name in used(kl_type))
    assert clean["klplug/nonfinite_share"] == 0


MEAN = math.log((math.e + 1) / 2)

# Limits of the textbook formulas as the reference rules a token out, u = pi/ref to infinity: the
# value f(u)/u and the derivative f'(u) - f'(1).
LIMITS = {
    "js": (math.log(2), math.log(2)),
    "tv": (0.5, 0.5),
    "hellinger": (1.0, 1.0),
    "forward": (0.0, 1.0),
    "alpha": (2.0, 2.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LIMITS)
def test_a_divergence_that_is_bounded_has_its_limit(name: str, dtype: torch.dtype) -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -0.5]], dtype=dtype, requires_grad=True)
    ref = torch.tensor([[-1.5, -INF, -0.5]], dtype=dtype)
    term = kl_term(f"{name}_as_loss,ratio=none", log_probs, ref, torch.ones(1, 3))
    value, slope = LIMITS[name]
    assert term.value[0, 1].item() == pytest.approx(value, abs=1e-6)
    assert force(term, log_probs)[0, 1].item() == pytest.approx(slope, rel=1e-6)
    assert kl_term(f"{name}_in_reward", log_probs, ref, torch.ones(1, 3)).coefficient[0, 1] == value
    assert term.metrics["klplug/nonfinite_share"].item() == pytest.approx(1 / 3)
    assert all(metric.isfinite() for metric in term.metrics.values())
    whole = kl_term(f"{name}_as_loss,ratio=none,horizon=sequence", log_probs, ref, torch.ones(1, 3))
    plain = kl_term(f"{name}_as_loss,ratio=none", log_probs, ref, torch.ones(1, 3))
    if name != "forward":
        torch.testing.assert_close(whole.coefficient[0, 1], slope + plain.value[0, 2])
        kl_type = f"{name}_as_loss,ratio=none,horizon=answer"
        between = kl_term(kl_type, log_probs, ref, torch.ones(1, 3))
        torch.testing.assert_close(between.coefficient, torch.full_like(ref, slope))
        torch.testing.assert_close(between.value.sum(), torch.tensor(value, dtype=dtype))


@pytest.mark.parametrize("kl_type", ["k2_as_loss,bound=2", "tv_as_loss,bound=2", "js_as_loss"])
def test_a_reference_of_more_than_one_has_no_limit(kl_type: str) -> None:
    """log ref = inf is no probability: pi/ref would be 0 there, and not infinite."""
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    ref = torch.tensor([[-1.5, INF]])
    term = kl_term(f"{kl_type},ratio=none", log_probs, ref, torch.ones(1, 2))
    assert force(term, log_probs)[0, 1] == 0 and term.value[0, 1] == 0
    assert term.metrics["klplug/nonfinite_share"] == 0.5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "own", "value"),
    [  # f'(u) - f'(1) at x = -20, and f(u)/u at x = 1
        ("tv", -0.5, (1 - math.exp(-1)) / 2),
        ("chi2", 2 * math.expm1(-20), (math.e - 1) ** 2 / math.e),
        ("js", math.log(2) - 20 - math.log1p(math.exp(-20)), 1 - (1 + 1 / math.e) * MEAN),
    ],
)
def test_a_token_far_below_the_reference_does_not_lose_the_later_ones(
    name: str, own: float, value: float, packed: bool
) -> None:
    """Its own f(u)/u, about exp(20), is that of the tokens before it: float32 has no digit of the
    rest beside it."""
    log_probs = torch.tensor([[-22.0, -1.0, -1.0]])
    ref = torch.tensor([[-2.0, -2.0, -2.0]])
    ids = torch.tensor([[4, 4, 4]]) if packed else None
    kl_type = f"{name}_as_loss,ratio=none,horizon=sequence"
    term = kl_term(kl_type, log_probs, ref, torch.ones(1, 3), segment_ids=ids)
    assert term.gradient[0, 0].item() == pytest.approx(own + 2 * value, abs=2e-6)


def test_chi2_of_a_long_answer_is_held_within_the_dtype_and_counted() -> None:
    """100 nats over the answer: u - 1 is beyond float32, and a bound is met."""
    log_probs = torch.full((2, 50), -1.0, requires_grad=True)
    ref = torch.tensor([[-3.0], [-1.001]]).expand(2, 50)
    given = (log_probs, ref, torch.ones(2, 50))
    term = kl_term("chi2_as_loss,ratio=none,horizon=answer", *given)
    u = math.exp(50 * 0.001)
    torch.testing.assert_close(
        term.coefficient[1], torch.full((50,), 2 * (u - 1)), rtol=1e-3, atol=0
    )
    assert term.coefficient[0, 0] == torch.finfo(torch.float32).max
    assert term.metrics["klplug/overflow_share"] == 0.5
    assert all(metric.isfinite() for metric in term.metrics.values())
    bounded = kl_term("chi2_as_loss,ratio=none,horizon=answer,bound=5", *given)
    assert (bounded.coefficient[0] == 5).all()
    torch.testing.assert_close(bounded.coefficient[1], term.coefficient[1])
    assert bounded.metrics["klplug/bounded_share"] == 0.5


def test_answers_that_are_packed_have_ratios_of_their_own() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -0.5, -0.1]], dtype=torch.float64)
    ref, mask = log_probs - torch.tensor([[0.3, -0.1, 0.2, 0.4]]), torch.ones(1, 4)
    ids, kl_type = torch.tensor([[0, 0, 1, 1]]), "js_as_loss,horizon=answer,ratio=none"
    packed = kl_term(kl_type, log_probs, ref, mask, segment_ids=ids)
    apart = kl_term(kl_type, log_probs.view(2, 2), ref.view(2, 2), mask.view(2, 2))
    for name in ("coefficient", "value"):
        found, wanted = getattr(packed, name), getattr(apart, name)
        torch.testing.assert_close(found, wanted.view(1, 4), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kl_type", ["k2_as_loss", "k3_as_loss", "jeffreys_as_loss"])
def test_a_bounded_coefficient_has_its_bound(kl_type: str) -> None:
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    ref = torch.tensor([[-1.5, -INF]])
    term = kl_term(f"{kl_type},ratio=none,bound=0.7", log_probs, ref, torch.ones(1, 2))
    assert force(term, log_probs)[0, 1].item() == pytest.approx(0.7)
    assert term.value[0, 1] == 0 and term.loss.isfinite().all()
    unbounded = kl_term(f"{kl_type},ratio=none", log_probs, ref, torch.ones(1, 2))
    assert force(unbounded, log_probs)[0, 1] == 0


@pytest.mark.parametrize("name", ["log_probs", "old_log_probs", "advantages"])
@pytest.mark.parametrize("kl_type", ["k2_as_loss", "k2_as_loss,head=combined", "none"])
def test_no_number_that_is_none_reaches_the_policy_loss(kl_type: str, name: str) -> None:
    tensors = with_number(batch(), name, NAN)
    del tensors["rollout_log_probs"], tensors["group_ids"]
    loss = klplug.policy_loss(kl_type, **tensors, kl_coef=BETA, clip_range=CLIP)
    (gradient,) = torch.autograd.grad(loss.sum(), tensors["log_probs"])
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert (gradient != 0).any()
    # The KL of its own beside a policy loss knows no advantage.
    if (kl_type, name) != ("k2_as_loss", "advantages"):
        assert gradient[0, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kl_type", GRID)
def test_a_number_that_is_merely_enormous_stays_one(kl_type: str, dtype: torch.dtype) -> None:
    """A vocabulary masked by the dtype's least number, say: finite, and so is all that it makes."""
    tensors = batch(dtype=dtype)
    enormous = torch.finfo(dtype).min
    for place, name in enumerate(("ref_log_probs", "log_probs", "old_log_probs")):
        for row in range(2):  # in each alone, and in two at once
            tensors[name].data[row, place : place + 2] = enormous
    term = kl_term(kl_type, **tensors)
    (gradient,) = torch.autograd.grad(term.loss.sum(), tensors["log_probs"])
    for found in (term.loss, term.coefficient, term.gradient, gradient, *term.metrics.values()):
        assert found.isfinite().all()


# ── A loss without a gradient ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kl_type", ["k2_as_loss", "k1_in_reward", "k3_in_reward+k3_as_loss"])
def test_a_kl_without_a_gradient_is_no_loss(kl_type: str) -> None:
    tensors = batch()
    with torch.no_grad():
        under = kl_term(kl_type, **tensors)
    detached = kl_term(kl_type, **tensors | {"log_probs": tensors["log_probs"].detach()})
    for term in (under, detached):
        with pytest.raises(RuntimeError, match=r"no gradient: .* under no_grad, or with log_probs"):
            _ = term.loss
        assert term.metrics["klplug/active"] == 1 and term.value.isfinite().all()
    term = kl_term(kl_type, **tensors)
    with torch.no_grad():
        assert term.loss.requires_grad


# ── Packed rows ───────────────────────────────────────────────────────────────────────────────────


PACKABLE = [k for k in GRID if "baseline" not in k]


@pytest.mark.parametrize("kl_type", PACKABLE)
def test_packed_rows_are_what_their_answers_are_one_by_one(kl_type: str) -> None:
    """Four answers of up to six tokens, gaps inside, in two rows; ids may be anything in a gap."""
    apart = batch()
    segments = torch.arange(4)[:, None].expand(4, 6)
    segments = torch.where(apart["response_mask"] == 1, segments, 77)

    def packed(x: Tensor) -> Tensor:
        return torch.cat([x[:2], x[2:]], dim=1)

    together = {k: packed(v) for k, v in apart.items() if k != "group_ids"}
    together["log_probs"] = together["log_probs"].detach().requires_grad_()
    one = kl_term(kl_type, **apart)
    other = kl_term(kl_type, **together, segment_ids=packed(segments))
    for name in ("loss", "coefficient", "weight", "gradient"):
        expected = packed(getattr(one, name))
        torch.testing.assert_close(getattr(other, name), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        force(other, together["log_probs"]), packed(force(one, apart["log_probs"]))
    )


def test_no_sum_reaches_over_the_end_of_an_answer() -> None:
    """lr = 1 everywhere, answers of 2 and 2: the sums to go are 2, 1, 2, 1."""
    given = (torch.zeros(1, 4), -torch.ones(1, 4), torch.ones(1, 4))
    ids = torch.tensor([[5, 5, 3, 3]])
    term = klplug.kl_term("k2_as_loss,horizon=sequence,ratio=none", *given, segment_ids=ids)
    assert term.coefficient.tolist() == [[2, 1, 2, 1]]
    assert klplug.reward_to_go(torch.ones(1, 4), ids).tolist() == [[2, 1, 2, 1]]
    assert klplug.reward_to_go(torch.ones(1, 4)).tolist() == [[4, 3, 2, 1]]
    huge = torch.tensor([[1.0, 2.0, 3e38, 3e38]])
    assert klplug.reward_to_go(huge, ids)[0, :2].tolist() == [3.0, 2.0]


def test_a_baseline_over_packed_rows_is_handed_in_or_refused() -> None:
    tensors = batch()
    ids = torch.zeros(4, 6, dtype=torch.long)
    for kl_type in ("k1_in_reward,baseline=group", "k2_as_loss,horizon=sequence,baseline=batch"):
        with pytest.raises(ValueError, match="baseline over packed rows"):
            kl_term(kl_type, **tensors, segment_ids=ids)
        given = torch.full((4, 6), 0.3, dtype=torch.float64)
        one = kl_term(kl_type, **tensors, segment_ids=ids, return_baseline=given)
        other = kl_term(kl_type, **tensors, return_baseline=given)
        torch.testing.assert_close(one.coefficient, other.coefficient)
    with pytest.raises(ValueError, match="segment_ids must be integers"):
        kl_term("k2_as_loss", **tensors, segment_ids=ids.float())


# ── What the metrics show ─────────────────────────────────────────────────────────────────────────


def test_a_term_s_results_are_the_reader_s_own() -> None:
    tensors = batch()
    for kl_type in ("k1_in_reward", "k2_as_loss,horizon=sequence", "k3_as_loss", "k3_in_reward"):
        untouched, term = kl_term(kl_type, **tensors), kl_term(kl_type, **tensors)
        for name in ("value", "coefficient", "weight", "gradient"):
            getattr(term, name).mul_(7.0)
        tensors["response_mask"].add_(0)
        assert torch.equal(term.loss, untouched.loss)
        assert torch.equal(force(term, tensors["log_probs"]), untouched.gradient)
        for name, value in untouched.metrics.items():
            assert torch.equal(term.metrics[name], value), name


SUM = ("k3_in_reward", "k2_as_loss,level=prefix", "k3_as_loss,reference=rollout")


def test_a_sum_has_each_term_s_metrics_and_the_same_in_any_order() -> None:
    tensors = batch()
    found = kl_term("+".join(SUM), **tensors).metrics
    other = kl_term("+".join(reversed(SUM)), **tensors).metrics
    assert found.keys() == other.keys()
    assert all(torch.equal(found[name], other[name]) for name in found)
    lr = {}
    mask = tensors["response_mask"].bool()
    for policy in ("ref", "rollout"):
        lr[policy] = (tensors["log_probs"].detach() - tensors[f"{policy}_log_probs"])[mask]
    # The plain ones are to ref.
    assert found["klplug/k1"].item() == pytest.approx(lr["ref"].mean().item())
    to_sampler = found["klplug/k3_as_loss.reference-rollout/k1"].item()
    assert to_sampler == pytest.approx(lr["rollout"].mean().item())
    for kl_type in SUM[:2]:
        name = str(parse(kl_type)).replace(",", ".").replace("=", "-")
        single = kl_term(kl_type, **tensors).metrics
        for key, value in single.items():
            if not key.startswith(("klplug/active", "klplug/nonfinite/")):
                inside = found[key.replace("klplug/", f"klplug/{name}/")]
                torch.testing.assert_close(inside, value, rtol=1e-12, atol=1e-15)
    names = [str(parse(k)).replace(",", ".").replace("=", "-") for k in SUM]
    for key, worst in (("weight_mean", min), ("ess", min), ("capped_share", max)):
        of_terms = [found[f"klplug/{name}/{key}"].item() for name in names]
        assert found[f"klplug/{key}"].item() == worst(of_terms)


def test_the_sampler_as_reference_is_not_called_ref() -> None:
    tensors = batch()
    kl_type = "k2_as_loss,reference=rollout"
    mask = tensors["response_mask"].bool()
    lr = (tensors["log_probs"].detach() - tensors["rollout_log_probs"])[mask].mean().item()
    alone = kl_term(kl_type, **tensors | {"ref_log_probs": None}).metrics
    assert alone["klplug/k2_as_loss.reference-rollout/k1"].item() == pytest.approx(lr)
    assert not {"klplug/k1", "klplug/k3", "klplug/kl"} & alone.keys()
    beside = kl_term(kl_type, **tensors).metrics
    plain = kl_term("k2_as_loss", **tensors).metrics
    assert beside["klplug/k1"] == plain["klplug/k1"] and beside["klplug/k3"] == plain["klplug/k3"]


@pytest.mark.parametrize("reference", ["old", "rollout", "teacher"])
def test_a_reference_that_only_the_metrics_have_is_no_part_of_the_others(reference: str) -> None:
    """Where it is no number, the KL to it leaves, and is named."""
    tensors = batch()
    tensors |= {"teacher_log_probs": tensors["old_log_probs"] - 0.5}
    kl_type, mask = f"k2_as_loss,ratio=none,reference={reference}", tensors["response_mask"].bool()
    holes = tensors["ref_log_probs"].masked_fill(mask, NAN)
    one = tensors["ref_log_probs"].clone()
    one[0, 0] = NAN
    clean = kl_term(kl_type, **tensors).metrics
    of_ref = {f"klplug/{name}" for name in ("kl", "k1", "k2", "k3", "abs")}
    for ref, share in ((holes, 1.0), (one, 1 / mask.sum().item())):
        found = kl_term(kl_type, **tensors | {"ref_log_probs": ref}).metrics
        assert found.pop("klplug/nonfinite/ref_log_probs") == 1
        assert found.pop("klplug/nonfinite_share").item() == pytest.approx(share)
        for name in found.keys() - of_ref:
            torch.testing.assert_close(found[name], clean[name], msg=name)
        if ref is one:
            first = torch.zeros_like(mask)
            first[0, 0] = True
            x = (tensors["log_probs"].detach() - ref)[mask & ~first]
            assert found["klplug/k1"].item() == pytest.approx(x.mean().item())


@pytest.mark.parametrize("level", ["prefix", "sequence"])
def test_weights_that_fall_together_are_seen(level: str) -> None:
    """8 answers of 8192 tokens whose sampler is 3.4e-4 nats above: a weight of 0.06 at the end."""
    draw = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(8, 8192, generator=draw, dtype=torch.float64)
    given = (log_probs, log_probs - 0.05, torch.ones(8, 8192))
    kl_type = f"k2_as_loss,level={level},ratio=rollout"
    found = kl_term(kl_type, *given, rollout_log_probs=log_probs + 3.4e-4).metrics
    steps = (
        torch.arange(1, 8193, dtype=torch.float64) if level == "prefix" else torch.tensor(8192.0)
    )
    expected = torch.exp(-3.4e-4 * steps).mean().item()
    assert found["klplug/weight_mean"].item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    "kl_type",
    [
        "k2_as_loss,horizon=sequence",
        "k2_as_loss,horizon=sequence,level=sequence",
        "js_as_loss,horizon=answer",
        "k1_in_reward",
    ],
)
def test_over_answers_the_coefficient_shown_is_the_gradient_per_token(kl_type: str) -> None:
    tensors = batch(shape=(4, 30))
    tensors["old_log_probs"] = tensors["log_probs"].detach() + 1.0  # weights fall to e^-30
    term = kl_term(kl_type, **tensors)
    gradient = force(term, tensors["log_probs"]).abs()
    assert term.metrics["klplug/coef_max"].item() == pytest.approx(gradient.max().item())
    mean = gradient.sum() / tensors["response_mask"].sum()
    assert term.metrics["klplug/coef_mean"].item() == pytest.approx(mean.item())


def test_a_term_survives_pickling() -> None:
    for kl_type in ("k2_as_loss,horizon=sequence", "k3_in_reward+k3_as_loss,ratio=none", "none"):
        term = kl_term(kl_type, **batch())
        again = pickle.loads(pickle.dumps(term))
        assert again.spec == term.spec and len(again.parts) == len(term.parts)
        for name in ("value", "coefficient", "weight", "gradient"):
            assert torch.equal(getattr(again, name), getattr(term, name))
        assert all(torch.equal(again.metrics[k], v) for k, v in term.metrics.items())
        if kl_type != "none":
            with pytest.raises(RuntimeError, match="no gradient"):
                _ = again.loss


@pytest.mark.parametrize("name", ["log_probs", "ref_log_probs", "response_mask", "old_log_probs"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    tensors = batch()
    with pytest.raises(TypeError, match=f"{name} must be a tensor of shape .*, got list"):
        kl_term("k2_as_loss", **tensors | {name: tensors[name].tolist()})
    if name in ("log_probs", "response_mask"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor .*, got None"):
            kl_term("k2_as_loss", **tensors | {name: None})
    if name != "response_mask":
        with pytest.raises(ValueError, match=f"{name} must be .*floating-point.* got .*int64"):
            kl_term("k2_as_loss", **tensors | {name: tensors[name].long()})


def test_a_clip_range_may_be_a_list() -> None:
    tensors = batch()
    one = klplug.kl_term("k2_as_loss,head=clipped", **tensors, clip_range=[0.1, 0.3])
    other = klplug.kl_term("k2_as_loss,head=clipped", **tensors, clip_range=(0.1, 0.3))
    assert torch.equal(one.gradient, other.gradient)
    for wrong in ("0.2", [0.1], [0.1, 0.2, 0.3], True, {0.2: 1}, 10**400, np.float32(NAN)):
        with pytest.raises(ValueError, match="clip_range"):
            klplug.kl_term("k2_as_loss,head=clipped", **tensors, clip_range=wrong)


@pytest.mark.parametrize("missing", ["group_ids", "ref_log_probs"])
def test_a_return_baseline_needs_what_kl_term_does(missing: str) -> None:
    tensors = batch()
    given = [tensors["log_probs"], tensors["ref_log_probs"], tensors["response_mask"]]
    if missing == "ref_log_probs":
        for wrong in (given[1][:1], None):
            with pytest.raises(ValueError, match="ref_log_probs"):
                klplug.kl_return_baseline(
                    "k1_in_reward,baseline=group", given[0], wrong, given[2], [0, 0, 1, 1]
                )
        return
    with pytest.raises(ValueError, match="needs group_ids, which is missing"):
        klplug.kl_return_baseline("k1_in_reward,baseline=group", *given)


@pytest.mark.parametrize("name", ["ref_log_probs", "old_log_probs"])
def test_the_work_is_done_in_the_widest_dtype_of_what_it_needs(name: str) -> None:
    """A float64 reference beside a float32 policy: their difference keeps what float32 rounds."""
    apart = 2.0**-30  # beside -1 it has no digit in float32
    tensors = {
        key: torch.full((1, 1), -1.0, requires_grad=key == "log_probs")
        for key in ("log_probs", "ref_log_probs", "old_log_probs")
    }
    tensors[name] = torch.tensor([[-1.0 - apart]], dtype=torch.float64)
    term = kl_term("k2_as_loss", **tensors, response_mask=torch.ones(1, 1))
    expected = {"ref_log_probs": apart, "old_log_probs": math.exp(apart)}[name]
    found = {"ref_log_probs": term.coefficient, "old_log_probs": term.weight}[name]
    assert found.dtype == torch.float64 and found.item() == expected


@pytest.mark.parametrize(
    ("kl_type", "share"),
    [
        ("k1_as_loss,ratio=none,bound=0.5", 1.0),  # whose c is 1 everywhere
        ("k1_as_loss,ratio=none,bound=1", 0.0),
        ("k2_as_loss,ratio=none,bound=0.7", 0.5),
        ("k1_in_reward,bound=0.7", 0.5),
    ],
)
def test_the_bound_is_met_by_counted_tokens_alone(kl_type: str, share: float) -> None:
    log_probs = torch.tensor([[0.5, 1.0, 0.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0]])
    term = kl_term(kl_type, log_probs, torch.zeros(1, 4), mask)
    assert term.metrics["klplug/bounded_share"] == share


@pytest.mark.parametrize("kl_type", ["k2_as_loss", "k2_as_loss,head=combined"])
def test_a_coefficient_and_a_clip_range_of_another_librarys_are_numbers(kl_type: str) -> None:
    tensors = batch()
    del tensors["rollout_log_probs"], tensors["group_ids"]
    one, other = (
        klplug.policy_loss(kl_type, **tensors, kl_coef=kind(0.5), clip_range=kind(0.25))
        for kind in (float, np.float32)
    )
    assert torch.equal(one, other)
    with pytest.raises(TypeError, match="kl_coef must be a number or a tensor, got bool"):
        klplug.policy_loss(kl_type, **tensors, kl_coef=True)


@pytest.mark.parametrize("kl_coef", [NAN, INF, -INF, 10**400, 1e39, -0.01])
@pytest.mark.parametrize("kl_type", ["k2_as_loss", "k2_as_loss,head=combined"])
def test_a_coefficient_that_is_no_number_is_refused(kl_type: str, kl_coef: float) -> None:
    tensors = batch()
    del tensors["rollout_log_probs"], tensors["group_ids"]
    words = r"kl_coef=-?(nan|inf|0.01|1e\+39) must be finite in float32, and not neg"
    with pytest.raises(ValueError, match=words):
        klplug.policy_loss(kl_type, **tensors, kl_coef=kl_coef)


@pytest.mark.parametrize("kl_type", ["k2_as_loss", "k2_as_loss,head=combined"])
def test_a_coefficient_in_a_tensor_is_one_number_or_each_token_s(kl_type: str) -> None:
    tensors = batch()
    del tensors["rollout_log_probs"], tensors["group_ids"]
    (size, length), number = tensors["log_probs"].shape, torch.tensor(0.5)

    def loss(kl_coef: object) -> torch.Tensor:
        return klplug.policy_loss(kl_type, **tensors, kl_coef=kl_coef)

    for shape in ((), (1,), (length,), (size, 1), (size, length)):
        torch.testing.assert_close(loss(number.expand(shape)), loss(0.5))
    # Spread over a loss of that shape, each token would count several times.
    for shape in ((size, 1, 1), (length + 1,), (size + 1, 1)):
        with pytest.raises(ValueError, match="kl_coef has shape"):
            loss(number.expand(shape))
    for wrong in (NAN, INF, -0.5):
        with pytest.raises(ValueError, match=f"kl_coef={wrong} must be finite"):
            loss(torch.tensor([[0.5]] * (size - 1) + [[wrong]]))
    with pytest.raises(ValueError, match=r"kl_coef=1e\+39 must be finite in float32"):
        loss(torch.tensor(1e39, dtype=torch.float64))


@pytest.mark.parametrize("name", ["old_log_probs", "advantages"])
def test_a_policy_loss_without_what_it_is_made_of_is_refused(name: str) -> None:
    tensors = batch()
    del tensors["rollout_log_probs"], tensors["group_ids"]
    with pytest.raises(ValueError, match=f"needs {name}, which is missing"):
        klplug.policy_loss("none", **tensors | {name: None}, kl_coef=0.1)


def test_answers_whose_group_is_no_number_are_of_no_group() -> None:
    """nan is not nan: neither the first row's group nor one of their own."""
    tensors = batch() | {"group_ids": torch.tensor([0.0, NAN, NAN, 0.0])}
    plain = kl_term("k1_in_reward", **tensors).coefficient
    term = kl_term("k1_in_reward,baseline=group", **tensors)
    assert torch.equal(term.coefficient[1:3], plain[1:3])
    others = kl_term("k1_in_reward,baseline=group", **tensors | {"group_ids": [0, 1, 2, 0]})
    assert torch.equal(term.coefficient, others.coefficient)


@pytest.mark.parametrize("shape", [(4, 0), (0, 6), (0, 0)])
def test_no_tokens_and_no_answers_are_no_kl(shape: tuple[int, int]) -> None:
    """As a filter leaves them, packed or not; the exact terms too, whose weight is the prefix's."""
    sized = {
        name: x.detach()[: shape[0], : shape[1]] if x.dim() == 2 else x[: shape[0]]
        for name, x in batch().items()
    }
    sized["log_probs"].requires_grad_()
    sized["exact_kl"] = sized["log_probs"].square()
    ids = torch.zeros(shape, dtype=torch.long)
    for kl_type in (*GRID, "exact_as_loss", "exact_as_loss,horizon=sequence"):
        for segment_ids in (None, *([ids] if "baseline" not in kl_type else [])):
            term = kl_term(kl_type, **sized, segment_ids=segment_ids)
            assert term.loss.shape == term.gradient.shape == shape
            assert all(x == (name == "klplug/active") or "gradient_" in name
                       for name, x in term.metrics.items())  # fmt: skip


@pytest.mark.parametrize("kl_type", ["k2_as_loss,horizon=sequence", "k2_as_loss,level=prefix"])
def test_the_policy_loss_of_packed_rows_is_that_of_their_answers(kl_type: str) -> None:
    apart = batch()
    del apart["group_ids"]
    ids = torch.arange(4)[:, None].expand(4, 6)
    given = {"kl_coef": BETA, "clip_range": CLIP}
    one = klplug.policy_loss(kl_type, **apart, **given)
    (expected,) = torch.autograd.grad(one.sum(), apart["log_probs"])
    packed = {name: torch.cat([x.detach()[:2], x.detach()[2:]], 1) for name, x in apart.items()}
    packed["log_probs"].requires_grad_()
    row = torch.cat([ids[:2], ids[2:]], 1)
    other = klplug.policy_loss(kl_type, **packed, **given, segment_ids=row)
    (found,) = torch.autograd.grad(other.sum(), packed["log_probs"])
    torch.testing.assert_close(found, torch.cat([expected[:2], expected[2:]], 1))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"kl_coef": "0.1"}, "kl_coef must be a number or a tensor, got str"),
        ({"kl_coef": [0.1]}, "kl_coef must be a number or a tensor, got list"),
        ({"sample_weights": torch.ones(4, 6)}, "sample_weights must be a mapping .*, got Tensor"),
        ({"sample_weights": [1.0]}, "sample_weights must be a mapping .*, got list"),
        ({"group_ids": 3}, "group_ids must be B hashable names or numbers, got 3"),
        ({"group_ids": [[0], [0], [1], [1]]}, "group_ids must be B hashable .*, got "),
    ],
)
def test_what_is_of_another_kind_is_named(changed: dict[str, object], words: str) -> None:
    given: dict = batch() | {"kl_coef": 0.1, "clip_range": 0.2} | changed
    with pytest.raises(TypeError, match=words):
        klplug.kl_term("k1_in_reward,baseline=group", **given)


def test_a_policy_loss_with_a_kl_needs_its_coefficient() -> None:
    tensors = batch()
    del tensors["rollout_log_probs"], tensors["group_ids"]
    with pytest.raises(ValueError, match="needs kl_coef, which is missing"):
        klplug.policy_loss("k2_as_loss", **tensors, kl_coef=None)


def test_what_is_summed_must_be_a_tensor() -> None:
    x, mask = torch.ones(1, 2), torch.ones(1, 2)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        klplug.aggregate([[1.0, 1.0]], mask)
    with pytest.raises(TypeError, match="response_mask must be a tensor, got NoneType"):
        klplug.aggregate(x, None)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        klplug.reward_to_go([1.0])
    with pytest.raises(ValueError, match=r"segment_ids has shape \(2,\), x has \(1, 2\)"):
        klplug.reward_to_go(x, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"x has shape \(2,\), and must be \(B, T\) with segment"):
        klplug.reward_to_go(x[0], torch.zeros(2, dtype=torch.long))


# ── What saturates ────────────────────────────────────────────────────────────────────────────────


def test_two_terms_that_saturate_with_other_signs_are_numbers() -> None:
    """One would be inf, the other minus that, and their sum none."""
    log_probs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    above, zero = torch.tensor([[300.0, -1.2]]), log_probs.detach()
    kl_type = "k3_as_loss,ratio=none+-2*forward_as_loss,ratio=none"
    loss = klplug.policy_loss(
        kl_type,
        log_probs,
        above,
        torch.ones(1, 2),
        old_log_probs=zero,
        advantages=zero,
        kl_coef=4.0,
    )
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert loss.isfinite().all() and gradient.isfinite().all()
    # 1 - e^-0.2 of both, and PPO's of an advantage of -1.
    expected = 4 * (1 - 2) * (1 - math.exp(-0.2)) + 1
    assert gradient[0, 1].item() == pytest.approx(expected, rel=1e-5)
    # Under a weight of e^2 each of the two is beyond the dtype; their sum is held at 0.
    weighed = klplug.kl_term(
        "k3_as_loss,cap=none+-2*forward_as_loss,cap=none",
        log_probs.detach(),
        above,
        torch.ones(1, 2),
        old_log_probs=zero - 2,
    )
    expected = math.exp(2) * (1 - 2) * (1 - math.exp(-0.2))
    assert weighed.coefficient[0].tolist() == pytest.approx([0, expected], rel=1e-5)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["prefix", "sequence"])
def test_a_weight_that_underflows_is_none_over_whole_answers_too(level: str, mode: str) -> None:
    """200 tokens one nat below the policy that sampled them: at the end a weight of e^-200."""
    log_probs = torch.full((1, 200), -1.0)
    given = (log_probs, log_probs - 0.1, torch.ones(1, 200))
    kl_type = f"k2_as_loss,level={level},mode={mode}"
    for horizon in ("token", "sequence"):
        term = klplug.kl_term(f"{kl_type},horizon={horizon}", *given, old_log_probs=log_probs + 1)
        assert term.weight[0, -1] == 0
        mean = term.metrics["klplug/weight_mean"].item()
        assert term.weight.mean().item() == pytest.approx(mean, rel=1e-5)
        torch.testing.assert_close(term.weight * term.coefficient, term.gradient)
