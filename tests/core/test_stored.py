"""The KL on answers that the reference gave: whose gradient it is, and what it measures.

All answers enumerated, float64, no sampling noise, as in test_oracle.py.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from klplug import Tally, kl_term, stored_kl, stored_metrics
from tests.core.enumeration import PROBLEMS, F, Problem

SERVED = {
    **{name: f"{name}_as_loss" for name in ("forward", "js", "hellinger", "tv", "alpha")},
    "alpha,alpha=-1": "alpha_as_loss,alpha=-1",
}


@pytest.fixture(params=PROBLEMS, scope="module")
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]()


def gradient(problem: Problem, kl_type: str) -> Tensor:
    """Expected gradient under the reference's own answers."""
    log_probs, ref = (problem.log_probs(p) for p in (problem.policy(), problem.ref()))
    kl = stored_kl(f"{kl_type},cap=none", log_probs, ref, problem.mask)
    return problem.gradient((problem.answer_probability(problem.ref())[:, None] * kl.loss).sum())


def same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def differs(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() > 0.01 * other.norm())


@pytest.mark.parametrize("name", SERVED)
def test_of_own_tokens_at_the_references_prefixes(problem: Problem, name: str) -> None:
    """A whole gradient: its prefixes do not move with the policy."""
    target = problem.at_prefixes(problem.reach(problem.ref()), name)
    assert same(gradient(problem, SERVED[name]), target)
    if problem.length > 1:
        assert differs(target, problem.loc(name))
        assert differs(target, problem.expected(name))


def test_of_own_tokens_forward_is_the_likelihood_of_whole_answers(problem: Problem) -> None:
    probability = problem.answer_probability(problem.ref())
    likelihood = (probability * problem.log_probs(problem.policy()).sum(-1)).sum()
    for kl_type in ("forward_as_loss", "forward_as_loss,horizon=sequence"):
        found = gradient(problem, kl_type)
        assert same(found, problem.full_forward())
        assert same(found, -problem.gradient(likelihood))


@pytest.mark.parametrize("name", [name for name in SERVED if name != "forward"])
def test_between_whole_answers(problem: Problem, name: str) -> None:
    found = gradient(problem, f"{SERVED[name]},horizon=answer")
    assert same(found, problem.between_answers(name))
    if problem.length > 1:
        assert differs(found, gradient(problem, SERVED[name]))


@pytest.mark.parametrize("name", [name for name in SERVED if name != "forward"])
def test_of_all_tokens_along_the_policys_answers(problem: Problem, name: str) -> None:
    found = gradient(problem, f"{SERVED[name]},horizon=sequence")
    assert same(found, problem.expected(name))


def test_the_gradients_for_which_estimators_are_refused(problem: Problem) -> None:
    """kl_term serves a loop of one's own, which may hand in the reference's as the old policy's."""
    log_probs, ref = (problem.log_probs(p) for p in (problem.policy(), problem.ref()))
    probability = problem.answer_probability(problem.ref())[:, None]

    def of(kl_type: str) -> Tensor:
        term = kl_term(f"{kl_type},cap=none", log_probs, ref, problem.mask, old_log_probs=ref)
        return problem.gradient((probability * term.loss).sum())

    assert of("k1_as_loss").norm() < 1e-12
    assert same(of("k3_as_loss"), gradient(problem, "forward_as_loss"))
    assert same(of("abs_as_loss"), 2 * gradient(problem, "tv_as_loss"))


def test_a_sum_is_the_sum_of_its_terms() -> None:
    problem = PROBLEMS["three tokens"]()
    log_probs, ref = (problem.log_probs(p) for p in (problem.policy(), problem.ref()))

    def loss(kl_type: str) -> Tensor:
        return stored_kl(kl_type, log_probs, ref, problem.mask).loss

    both = loss("0.7*forward_as_loss+0.3*js_as_loss")
    parts = 0.7 * loss("forward_as_loss") + 0.3 * loss("js_as_loss")
    torch.testing.assert_close(both, parts)
    grads = [problem.gradient(x.sum()) for x in (both, parts)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", SERVED)
def test_the_value_is_of_the_divergence(problem: Problem, name: str) -> None:
    ref = problem.log_probs(problem.ref())
    kl = stored_kl(
        f"{SERVED[name]},cap=none", problem.log_probs(problem.policy()), ref, problem.mask
    )
    found = (problem.answer_probability(problem.ref())[:, None] * kl.value).sum()
    expected = (problem.reach(problem.ref()) * problem.per_prefix(name)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


# f(u) of the textbook, by mpmath's numbers, which neither underflow nor overflow.
PRECISE = {
    "forward": lambda u: -mpmath.log(u),
    "js": lambda u: u * mpmath.log(u) - (u + 1) * mpmath.log((u + 1) / 2),
    "hellinger": lambda u: (mpmath.sqrt(u) - 1) ** 2,
    "tv": lambda u: abs(u - 1) / 2,
    "alpha": lambda u: (mpmath.sqrt(u) - u / 2 - mpmath.mpf(1) / 2) / (-mpmath.mpf(1) / 4),
}


@pytest.mark.parametrize("x", [-400.0, -110.0, -95.0, -20.0, -0.5, 1.5])
@pytest.mark.parametrize("name", PRECISE)
def test_the_value_is_right_where_the_weight_is_no_number(name: str, x: float) -> None:
    """float32 has no u below 1e-45, and no f(u)/u of some digits far before. f(u) is at most 1."""
    u, options = mpmath.exp(x), ["", ",level=prefix", ",horizon=sequence"]
    expected = [float(PRECISE[name](u)), float(u * PRECISE[name](u))]
    for kl_type in (f"{name}_as_loss,cap=none{option}" for option in options):
        of_first, of_second = expected[0], expected[kl_type.endswith(("prefix", "sequence"))]
        value = stored_kl(kl_type, *log_ratios([x, x])).value
        assert value.tolist() == [pytest.approx([of_first, of_second], rel=2e-6, abs=1e-30)]
    if name != "forward":
        value = stored_kl(f"{name}_as_loss,cap=none,horizon=answer", *log_ratios([x / 4] * 4)).value
        assert value.tolist() == [pytest.approx([expected[0] / 4] * 4, rel=2e-6)]


@pytest.mark.parametrize("x", [20.0, 88.0, 95.0, 400.0])
@pytest.mark.parametrize("name", PRECISE)
def test_the_value_is_right_where_the_divergence_is_no_number(name: str, x: float) -> None:
    """The cap times f(u)/u, which is a small number where f(u) is beyond float32."""
    u = mpmath.exp(x)
    value = stored_kl(f"{name}_as_loss", *log_ratios([x])).value
    expected = float(10 * PRECISE[name](u) / u)
    assert value.item() == pytest.approx(expected, rel=2e-5, abs=1e-30)


@pytest.mark.parametrize("option", ["", ",horizon=sequence", ",level=prefix", ",cap=none"])
@pytest.mark.parametrize("x", [[-25.0] * 16, [-95.0, -1.0], [-110.0, 3.0], [-0.5, 2.0, 4.0, -9.0]])
def test_the_likelihood_pulls_where_the_policy_has_lost_an_answer(
    x: list[float], option: str
) -> None:
    """w (1 - 1/u) of forward is u - 1 below the cap: near -1 where float32 has neither factor."""
    log_probs, ref, mask = log_ratios(x)
    stored_kl(f"forward_as_loss{option}", log_probs, ref, mask).loss.sum().backward()
    own = [mpmath.exp(x_t) for x_t in x]
    so_far = [mpmath.exp(sum(x[: t + 1])) for t in range(len(x))]
    weights = so_far if option in (",horizon=sequence", ",level=prefix") else own
    ratios = so_far if option == ",horizon=sequence" else own
    cap = mpmath.inf if option == ",cap=none" else 10
    expected = [float(min(w, cap) * (1 - 1 / u)) for w, u in zip(weights, ratios, strict=True)]
    assert log_probs.grad.tolist() == [pytest.approx(expected, rel=2e-5, abs=1e-30)]


def log_ratios(x: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """A policy of these to a reference, and a mask."""
    ref = torch.full((1, len(x)), -1.0)
    return (ref + torch.tensor([x])).requires_grad_(), ref, torch.ones(1, len(x))


def test_what_a_cap_drops_is_no_part_of_the_value() -> None:
    """Products of the ratio e^4, which is more than 2: neither token counts, as none acts."""
    kl = stored_kl("js_as_loss,horizon=sequence,cap=2,mode=mask", *log_ratios([4.0, 0.5]))
    assert kl.value.tolist() == [[0, 0]] and kl.term.gradient.tolist() == [[0, 0]]
    kl = stored_kl("hellinger_as_loss,cap=2", *log_ratios([4.0, 0.5]))
    held = 2 * (1 - math.exp(-2.0)) ** 2  # for the sample counts twice, and not e^4 times
    assert kl.value.tolist() == [pytest.approx([held, (math.exp(0.25) - 1) ** 2], rel=1e-6)]


def test_at_the_reference_no_sample_has_a_gradient() -> None:
    """The likelihood's own gradient there is noise of full size, with a mean of 0."""
    ref = torch.log(torch.tensor([[0.2, 0.5], [0.7, 0.1]], dtype=torch.float64))
    log_probs = ref.clone().requires_grad_()
    stored_kl("forward_as_loss", log_probs, ref, torch.ones(2, 2)).loss.sum().backward()
    assert torch.equal(log_probs.grad, torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kl_type", "published"),
    [
        # seamoke/DPH-RL: low_var_kl with the two policies swapped, js_low_var, and
        # alpha_divergence_f, whose alpha is 1 - alpha here; differentiated as they stand.
        ("forward_as_loss", lambda x: x.exp() - x - 1),
        ("js_as_loss", lambda x: x.exp() * x - (x.exp() + 1) * ((x.exp() + 1) / 2).log()),
        (
            "alpha_as_loss,alpha=0.8",
            lambda x: ((0.8 * x).exp() - 0.8 * x.exp() - 0.2) / (0.2 * (0.2 - 1)),
        ),
    ],
)
def test_each_sample_has_the_gradient_of_the_papers_public_code(kl_type, published) -> None:
    draw = torch.Generator().manual_seed(0)
    log_probs, ref = (-torch.rand(2, 3, 4, generator=draw, dtype=torch.float64)).unbind()
    mask = torch.ones(3, 4)
    one, other = (log_probs.clone().requires_grad_() for _ in range(2))
    stored_kl(f"{kl_type},cap=none", one, ref, mask).loss.sum().backward()
    published(other - ref).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


# ── What is measured ────────────────────────────────────────────────────────────────────────────


def uniform() -> Problem:
    """Under its reference all answers are equally likely, so a batch of each once is exact."""
    problem = Problem(vocabulary=4, length=3, seed=3)
    problem.ref_logits = torch.zeros_like(problem.ref_logits)
    return problem


@pytest.mark.parametrize("kl_type", ["forward_as_loss", "js_as_loss", "tv_as_loss,horizon=answer"])
def test_the_forward_kl_is_measured_whatever_acts(kl_type: str) -> None:
    problem = uniform()
    log_probs, ref = (problem.log_probs(p) for p in (problem.policy().detach(), problem.ref()))
    metrics = stored_metrics(stored_kl(f"{kl_type},cap=none", log_probs, ref, problem.mask).tally)
    expected = (problem.reach(problem.ref()) * problem.per_prefix("forward")).sum() / problem.length
    assert metrics["klplug/source/forward_kl"].item() == pytest.approx(expected.item(), rel=1e-9)
    assert metrics["klplug/source/weight_mean"].item() == pytest.approx(1, rel=1e-9)
    assert metrics["klplug/active"] == 1


def test_weights_and_coefficients_are_of_the_term_that_acts() -> None:
    """u being pi/ref: a token's weight is u, and its coefficient the slope of u - 1 - log u."""
    problem = uniform()
    log_probs, ref = (problem.log_probs(p) for p in (problem.policy().detach(), problem.ref()))
    kl = stored_kl("forward_as_loss,cap=none", log_probs, ref, problem.mask)
    metrics = stored_metrics(kl.tally)
    weight = (log_probs - ref).exp()[problem.mask]
    ess = weight.sum() ** 2 / (len(weight) * weight.square().sum())
    assert metrics["klplug/source/ess"].item() == pytest.approx(ess.item(), rel=1e-9)
    slope = (1 - 1 / weight).abs()
    for name, expected in (("mean", slope.mean()), ("max", slope.max())):
        assert metrics[f"klplug/source/coef_{name}"].item() == pytest.approx(expected.item())


def test_no_name_is_that_of_a_kl_on_the_policys_own_answers() -> None:
    problem = uniform()
    log_probs, ref = (problem.log_probs(p) for p in (problem.policy().detach(), problem.ref()))
    own = kl_term("js_as_loss", log_probs, ref, problem.mask, old_log_probs=ref).metrics
    alike = (
        "klplug/source/active",
        "klplug/source/nonfinite",
    )  # of all answers: one name is theirs
    for kl_type in ("js_as_loss", "0.7*forward_as_loss+0.3*js_as_loss"):
        found = stored_metrics(stored_kl(kl_type, log_probs, ref, problem.mask).tally)
        assert {name for name in found if not name.startswith("klplug/source/")} == {
            "klplug/active",
            *(name for name in own if name.startswith("klplug/nonfinite")),
        }
        assert not {name.rpartition("/")[2] for name in found} & {"kl", "k1", "k2", "k3", "abs"}
        assert not [name for name in found if name.startswith(alike)]
    shares = ("weight_mean", "ess", "capped_share", "coef_mean", "coef_max", "top_share")
    assert {f"klplug/source/{name}" for name in shares} <= set(found)


def test_tallies_of_micro_batches_merge() -> None:
    problem = uniform()
    log_probs, ref = (problem.log_probs(p) for p in (problem.policy().detach(), problem.ref()))

    def tally(rows: slice) -> Tally:
        return stored_kl("js_as_loss", log_probs[rows], ref[rows], problem.mask[rows]).tally

    whole = stored_metrics(tally(slice(None)))
    merged = stored_metrics(Tally.merged([tally(slice(0, 20)), tally(slice(20, None))]))
    del whole["klplug/source/top_share"], merged["klplug/source/top_share"]  # of each micro-batch
    torch.testing.assert_close(whole, merged, rtol=1e-9, atol=1e-12)


def test_behind_the_mask_there_may_be_anything() -> None:
    mask = torch.tensor([[True, True, False]])
    ref = torch.tensor([[-1.0, -2.0, math.nan]])
    log_probs = torch.tensor([[-1.5, -1.0, math.inf]], requires_grad=True)
    kl = stored_kl("js_as_loss", log_probs, ref, mask)
    kl.loss.sum().backward()
    short = stored_kl("js_as_loss", log_probs[:, :2], ref[:, :2], mask[:, :2])
    assert torch.equal(kl.value[:, :2], short.value) and kl.value[0, 2] == 0
    assert log_probs.grad[0, 2] == 0
    metrics = stored_metrics(kl.tally)
    assert all(torch.isfinite(value) for value in metrics.values())
    assert metrics["klplug/nonfinite_share"] == 0


# ── What is refused ─────────────────────────────────────────────────────────────────────────────

REFUSED = [
    ("none", "no term that could act"),
    ("monitor", "no term that could act"),
    ("k1_as_loss", "k1 is refused: on these answers its gradient is 0 in the mean"),
    ("k2_as_loss", "k2 is refused: it is large where the policy goes and the reference does not"),
    ("k3_as_loss", "k3 is refused: on these answers its gradient is that of 'forward_as_loss'"),
    ("abs_as_loss", "abs is refused: on these answers its gradient is twice that of 'tv_as_loss'"),
    ("jeffreys_as_loss", "jeffreys is refused"),
    ("chi2_as_loss", "chi2 is refused"),
    ("alpha_as_loss,alpha=2", "alpha below 1"),
    ("k1_in_reward", "a reward is of the policy's own answers, .*'forward_as_loss'"),
    ("js_in_reward", "a reward is of the policy's own answers, .*'js_as_loss'"),
    ("js_as_loss,reference=old", "reference=old is refused"),
    ("js_as_loss,reference=posterior", "reference=posterior is refused"),
    ("forward_as_loss,vocab=exact", "vocab=exact is refused"),
    ("forward_as_loss,head=clipped", "head=clipped is refused"),
    ("js_as_loss,ratio=none", "ratio=none is refused"),
    ("js_as_loss,ratio=rollout", "ratio=rollout is refused"),
    ("js_as_loss,horizon=sequence,baseline=batch", "baseline=batch is refused"),
    ("js_as_loss,weight=positive", "weight=positive is refused"),
    ("forward_as_loss+k2_as_loss", "k2 is refused"),
]


@pytest.mark.parametrize(("kl_type", "words"), REFUSED)
def test_what_needs_the_policys_answers_is_refused(kl_type: str, words: str) -> None:
    tensors = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match=words):
        stored_kl(kl_type, *tensors)


@pytest.mark.parametrize("name", F)
def test_what_is_refused_has_no_bound_where_the_policy_goes(name: str) -> None:
    """``f(t) / t`` is what a sample of the policy weighs: without a bound, stored ones miss it."""
    t = torch.logspace(3, 12, 10, dtype=torch.float64)
    grows = bool((F[name](t) / t).diff()[-1] > 0.1)
    served = {*SERVED, "twice_tv"}  # abs, which tv is half of
    assert grows == (name not in served)
