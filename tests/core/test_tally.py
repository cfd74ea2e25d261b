"""Live diagnostics: cosine, norm ratio and concentration of the gradient, and their warnings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from klplug import kl_term
from klplug.seen import Seen
from klplug.tally import SAMPLE, TOP, Tally, tally
from klplug.watch import RULES, Watch
from tests.core.test_term import BETA, CLIP, GRID, batch

TENSORS = ("log_probs", "ref_log_probs", "old_log_probs", "response_mask")


def metrics(gradient: Tensor, principled: Tensor, mask: Tensor) -> dict[str, Tensor]:
    seen = Seen("", mask, mask, mask, principled, gradient, gradient, principled)
    return {n.removeprefix("klplug/"): value for n, value in tally([seen]).metrics().items()}


def test_cosine_and_ratio_by_hand() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = metrics(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 0.0]]), mask)
    assert found["gradient_cosine"].item() == pytest.approx(0.6)
    assert found["gradient_norm_ratio"].item() == pytest.approx(0.5)
    assert found["top_share"].item() == pytest.approx(4 / 7)


def test_the_top_hundredth_is_of_counted_tokens() -> None:
    force = torch.ones(4, 100)
    force[0, :3] = torch.tensor([50.0, 20.0, 10.0])
    mask = torch.ones(4, 100, dtype=torch.bool)
    mask[2:] = False
    force[2:] = 0
    assert metrics(force, force, mask)["top_share"].item() == pytest.approx(70 / (80 + 197))


@pytest.mark.parametrize("spread", ["normal", "lognormal", "cauchy", "few", "equal", "none"])
@pytest.mark.parametrize("shape", [(64, 4096), (3, 50_001), (8, 512)])
def test_the_top_of_many_tokens_is_near_the_sorted_one(spread: str, shape: tuple[int, int]) -> None:
    """Exact where all are looked at, else a little above; never more than all there is."""
    draw = torch.Generator().manual_seed(0)
    size = {
        "normal": lambda x: x.normal_(generator=draw).abs_(),
        "lognormal": lambda x: x.log_normal_(generator=draw),
        "cauchy": lambda x: x.cauchy_(generator=draw).abs_(),
        "few": lambda x: (x.uniform_(generator=draw) > 0.999).double(),
        "equal": torch.ones_like,
        "none": torch.zeros_like,
    }[spread](torch.zeros(shape, dtype=torch.float64))
    mask = torch.arange(shape[1]) < torch.randint(1, shape[1], (shape[0], 1), generator=draw)
    size *= mask
    counted = mask.sum()
    exact = size.flatten().topk(int((TOP * counted).ceil())).values.sum().item()
    found = tally([Seen("", mask, mask, mask, size, size, size, size)]).sums["top_size"].item()
    assert exact * (1 - 1e-12) <= found <= min(size.sum().item(), 1.02 * exact)
    if size.numel() < SAMPLE:
        assert found == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(
    ("kl_type", "low", "high"),
    [
        ("k2_as_loss", 1 - 1e-9, 1 + 1e-9),
        ("k1_in_reward", 1 - 1e-9, 1 + 1e-9),
        ("k2_as_loss,horizon=sequence", 1 - 1e-9, 1 + 1e-9),
        ("k2_as_loss,head=clipped", 1 - 1e-9, 1 + 1e-9),
        ("k3_as_loss", 0.2, 0.95),
        ("k1_as_loss", -0.5, 0.5),
        ("k3_in_reward", -0.5, 0.9),
    ],
)
def test_the_principled_ones_have_cosine_one(kl_type: str, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs, ref, old = (torch.randn(3, 16, 30, generator=generator) - 3).double()
    mask = torch.rand(16, 30, generator=generator) > 0.2
    old = log_probs + 0.1 * old
    term = kl_term(kl_type, log_probs, ref, mask, old_log_probs=old, clip_range=0.2)
    assert low <= term.metrics["klplug/gradient_cosine"].item() <= high
    if low > 0.9:
        assert term.metrics["klplug/gradient_norm_ratio"].item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("kl_type", "principled"),
    [
        ("k3_as_loss", "k2_as_loss"),
        ("k3_as_loss,ratio=none", "k2_as_loss,ratio=none"),
        ("k3_in_reward", "k1_in_reward"),
        ("k2_in_reward,ratio=none", "k1_in_reward,ratio=none"),
        ("js_as_loss,horizon=sequence", "k2_as_loss,horizon=sequence"),
        (
            "js_as_loss,horizon=sequence,head=combined",
            "k2_as_loss,horizon=sequence,head=combined",
        ),
        ("k3_as_loss+0.5*k2_as_loss,reference=old", "k2_as_loss+0.5*k2_as_loss,reference=old"),
        ("k2_as_loss+k3_in_reward", "k2_as_loss+k1_in_reward"),
    ],
)
def test_the_yardstick_is_the_same_formulation_with_its_coefficient_right(
    kl_type: str, principled: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs, ref, old = (torch.randn(3, 16, 30, generator=generator) / 2 - 3).double()
    mask = torch.rand(16, 30, generator=generator) > 0.2
    old = log_probs + 0.3 * old
    given = {"old_log_probs": old, "advantages": torch.ones_like(old)}
    head = {"kl_coef": 1e-9, "clip_range": 1e9}  # joined to it, and next to nothing beside it
    term, twin = (
        kl_term(name, log_probs, ref, mask, **given, **(head if "head=" in name else {}))
        for name in (kl_type, principled)
    )
    g, p = term.gradient, twin.gradient
    cosine = (g * p).sum() / (g.norm() * p.norm())
    assert term.metrics["klplug/gradient_cosine"].item() == pytest.approx(cosine.item())
    ratio = term.metrics["klplug/gradient_norm_ratio"].item()
    assert ratio == pytest.approx((g.norm() / p.norm()).item())


def test_sums_of_less_than_a_token_have_the_same_means() -> None:
    """A host that averages over ranks hands in a share of each sum."""
    given = batch(shape=(1, 1), dtype=torch.float64)
    whole = kl_term("k2_as_loss", **{k: given[k] for k in TENSORS}).tally
    share = Tally({name: value / 8 for name, value in whole.sums.items()}, whole.maxima)
    expected = {n: v.item() for n, v in whole.metrics().items()}
    assert {n: v.item() for n, v in share.metrics().items()} == pytest.approx(expected)


def test_where_the_policy_has_left_tokens_of_the_reference_the_estimate_is_k1() -> None:
    """All ref/pi are near one half: steady as they are, their mean is not 1, and nothing fits."""
    generator = torch.Generator().manual_seed(0)
    log_probs = 0.7 + 0.1 * torch.randn(8, 64, generator=generator).double()
    zero = torch.zeros_like(log_probs)
    term = kl_term("k2_as_loss,ratio=none", log_probs, zero, torch.ones_like(zero))
    assert term.metrics["klplug/kl"].item() == pytest.approx(log_probs.mean().item(), rel=1e-12)


def test_at_the_reference_nothing_is_amiss() -> None:
    zero = torch.zeros(2, 3)
    found = kl_term("k2_as_loss,ratio=none", zero, zero, torch.ones(2, 3)).metrics
    assert found["klplug/gradient_cosine"] == 1
    assert found["klplug/gradient_norm_ratio"] == 1
    assert found["klplug/top_share"] == 0


def test_a_warning_comes_once_after_its_patience() -> None:
    watch = Watch(patience=3)
    bad, good = {"klplug/gradient_cosine": 0.5}, {"klplug/gradient_cosine": 0.95}
    said = [watch.see(m) for m in (bad, bad, good, bad, bad, bad, bad, bad, bad)]
    assert [len(s) for s in said] == [0, 0, 0, 0, 0, 1, 0, 0, 0]
    (line,) = said[5]
    assert "klplug/gradient_cosine is 0.5, below 0.9 for 3 steps" in line
    assert watch.see({}) == [] and watch.rules == RULES


def test_a_number_that_is_none_is_said_at_once_with_its_tensor() -> None:
    watch = Watch()
    seen = {"klplug/nonfinite_share": 0.25, "klplug/nonfinite/rollout_log_probs": 1.0}
    share, tensor = watch.see(seen | {"klplug/nonfinite/log_probs": 0.0})
    assert "klplug/nonfinite_share is 0.25" in share and "left out of the KL" in share
    assert "rollout_log_probs has a nan or an infinite number" in tensor
    assert watch.see(seen) == []
    (later,) = watch.see(seen | {"klplug/nonfinite/ref_log_probs": 1.0})
    assert "ref_log_probs" in later


@pytest.mark.parametrize("log_ratio", [-30.0, -40.0, -60.0, -88.0, -200.0])
def test_one_token_that_fell_far_leaves_the_estimate_k1(log_ratio: float) -> None:
    """Its 1/ratio is beyond what a variance can be taken of; the KL is not 0 for that."""
    log_probs = torch.linspace(-0.1, 0.1, 8)[None].clone()
    log_probs[0, 0] = log_ratio
    term = kl_term("k2_as_loss,ratio=none", log_probs, torch.zeros(1, 8), torch.ones(1, 8))
    assert term.metrics["klplug/kl"].item() == pytest.approx(log_probs.mean().item(), rel=1e-6)


def found_at(
    kl_type: str, log_ratio: list[float], old: list[float] | None = None
) -> dict[str, float]:
    """The metrics where the reference is 0; ``old`` is the log-weight, on-policy where left out."""
    x = torch.tensor([log_ratio])
    weight = torch.zeros_like(x) if old is None else torch.tensor([old])
    term = kl_term(kl_type, torch.zeros_like(x), -x, torch.ones_like(x), old_log_probs=-weight)
    return {n.removeprefix("klplug/"): v.item() for n, v in term.metrics.items()}


@pytest.mark.parametrize("infinite", [1, 3, 4])
def test_a_token_at_its_limit_counts_once_in_weights_and_coefficients(infinite: int) -> None:
    """js has c = log 2 where the reference rules a token out, and a weight of 1 on-policy."""
    log_ratio = [0.5] * (4 - infinite) + [math.inf] * infinite
    near = math.log(2 * math.exp(0.5) / (math.exp(0.5) + 1))
    for kl_type, coefficients in (
        ("js_as_loss", (near, math.log(2))),
        ("k2_as_loss,bound=0.25", (0.25, 0.25)),
        ("0.5*js_as_loss+k2_as_loss,bound=0.25", (near / 2 + 0.25, math.log(2) / 2 + 0.25)),
    ):
        found = found_at(kl_type, log_ratio)
        mean = (coefficients[0] * (4 - infinite) + coefficients[1] * infinite) / 4
        assert found["coef_mean"] == pytest.approx(mean, rel=1e-6)
        assert found["coef_mean"] <= found["coef_max"] * (1 + 1e-6)
        assert found["weight_mean"] == found["ess"] == 1
        assert found["bounded_share"] == (1 if "bound" in kl_type else 0)
        assert found["nonfinite_share"] == infinite / 4
        assert found["top_share"] == pytest.approx(max(coefficients) / (4 * mean), rel=1e-6)


def test_squares_beyond_float32_are_squares() -> None:
    """A weight of e^60 is all of the batch's; k3's c of e^50 points where c = x does."""
    found = found_at("k2_as_loss,cap=none", [0.2, -0.2, 0.3, 0.1], old=[60.0, 0.0, 0.0, 0.0])
    assert found["ess"] == pytest.approx(1 / 4)
    found = found_at("k2_as_loss,cap=none", [0.2, -0.2, 0.3, 0.1], old=[60.0, 60.0, 0.0, 0.0])
    assert found["ess"] == pytest.approx(2 / 4)
    for kl_type in ("k3_as_loss", "k3_as_loss+0.001*k2_as_loss"):
        log_ratio = [-50.0, 30.0, -0.3, 0.2]
        c = [1 - math.exp(-x) + (0.001 * x if "+" in kl_type else 0) for x in log_ratio]
        p = [x * (1.001 if "+" in kl_type else 1) for x in log_ratio]
        cosine = sum(a * b for a, b in zip(c, p, strict=True)) / math.hypot(*c) / math.hypot(*p)
        found = found_at(kl_type, log_ratio)
        assert found["gradient_cosine"] == pytest.approx(cosine, rel=1e-5)
        ratio = math.hypot(*c) / math.hypot(*p)
        assert found["gradient_norm_ratio"] == pytest.approx(ratio, rel=1e-5)


def test_tallies_of_unlike_tensors_do_not_merge() -> None:
    """A micro-batch without a reference has no k1: over both's tokens it would be too small."""
    x = torch.zeros(1, 2)
    with_ref, without = (
        kl_term("k2_as_loss,reference=old", x, ref, x + 1, old_log_probs=x - 1).tally
        for ref in (x - 1, None)
    )
    for pair in ((with_ref, without), (without, with_ref)):
        with pytest.raises(ValueError, match=r"not all have .*k1"):
            Tally.merged(pair)


def test_tallies_of_unlike_maxima_do_not_merge() -> None:
    one = torch.ones(())
    pair = Tally({"tokens": one}, {"coef_max": one}), Tally({"tokens": one}, {})
    for tallies in (pair, pair[::-1]):
        with pytest.raises(ValueError, match="not all have coef_max"):
            Tally.merged(tallies)


@pytest.mark.parametrize("log_ratio", [[-44.8, 0.2, -0.2], [-60.0, -60.4, -60.0]])
def test_where_no_square_can_be_summed_the_estimate_is_k1(log_ratio: list[float]) -> None:
    found = found_at("k2_as_loss,ratio=none", log_ratio)
    assert found["kl"] == pytest.approx(sum(log_ratio) / 3, rel=1e-6)


@pytest.mark.parametrize("kl_type", [k for k in GRID if "+" not in k and "reference" not in k])
def test_the_share_of_saturated_tokens_is_that_of_their_numbers(kl_type: str) -> None:
    """A token counts once whichever of its coefficient, weight and ref/pi is the largest number."""
    given = {
        name: x.detach() * 100 if x.is_floating_point() and "advantages" not in name else x
        for name, x in batch(shape=(16, 8), dtype=torch.float32).items()
    }
    term = kl_term(kl_type, **given, kl_coef=BETA, clip_range=CLIP)
    if not term.spec.terms:
        return
    largest = torch.finfo(torch.float32).max
    own_token = term.spec.placement == "as_loss" and term.spec.horizon == "token"
    coefficient = term.coefficient if own_token else term.gradient
    mask = given["response_mask"] != 0
    numbers = [coefficient, (given["ref_log_probs"] - given["log_probs"]).exp() * mask]
    if term.spec.ratio in ("old", "rollout") or term.spec.head in ("combined", "clipped"):
        numbers.append(term.weight)
    reached = torch.stack([x.nan_to_num().abs() >= largest for x in numbers]).any(0) & mask
    share = term.metrics["klplug/overflow_share"].item()
    assert share == pytest.approx(reached.sum().item() / mask.sum().item())
    assert share > 0


def test_a_sample_weight_counts_where_its_token_is_in_the_kl() -> None:
    """One of three tokens has no reference: the mean is of the other two."""
    x = torch.zeros(1, 3)
    ref, weight = torch.tensor([[0.0, math.nan, 0.0]]), torch.tensor([[0.25, 1.0, 0.75]])
    term = kl_term(
        "k2_as_loss,ratio=none,weight=mask:tool",
        x,
        ref,
        x + 1,
        sample_weights={"mask:tool": weight},
    )
    assert term.metrics["klplug/sample_weight_mean"].item() == 0.5


@pytest.mark.parametrize("kl_type", ["k3_as_loss", "k3_in_reward", "k3_as_loss+0.5*k2_as_loss"])
def test_in_float64_a_cosine_is_one_whatever_saturates(kl_type: str) -> None:
    """Of no square that float64 has: c is -e^709 where x is -1000, and half x there."""
    x = torch.tensor([[-1000.0, 0.5, 800.0]], dtype=torch.float64)
    zero = torch.zeros_like(x)
    parts = [
        kl_term(
            kl_type, x[:, i : i + 1], zero[:, :1], zero[:, :1] + 1, old_log_probs=x[:, i : i + 1]
        )
        for i in range(3)
    ]
    whole = kl_term(kl_type, x, zero, zero + 1, old_log_probs=x).metrics
    merged = Tally.merged([part.tally for part in parts]).metrics()
    if kl_type.endswith("loss"):  # all of the gradient is at the first token, where both push alike
        cosine = 1000 / math.hypot(1000, 0.5, 800)
        assert whole["klplug/gradient_cosine"].item() == pytest.approx(cosine, rel=1e-9)
        for name, value in whole.items():
            if "top_share" not in name:
                assert merged[name].item() == pytest.approx(value.item(), rel=1e-9), name
    assert -1 <= whole["klplug/gradient_cosine"].item() <= 1


@pytest.mark.parametrize(
    "kl_type", ["monitor", "k2_as_loss,reference=old", "k2_as_loss,weight=mask:tool"]
)
def test_metrics_are_of_the_moment_of_the_call(kl_type: str) -> None:
    """A loop may fill the same buffers anew before it reads them."""
    x, ref, weight = torch.zeros(1, 2), torch.tensor([[-0.5, -1.5]]), torch.tensor([[0.25, 0.75]])
    term = kl_term(kl_type, x, ref, x + 1, old_log_probs=x, sample_weights={"mask:tool": weight})
    ref.fill_(7.0)
    weight.fill_(7.0)
    assert term.metrics["klplug/k1"].item() == 1
    assert term.metrics.get("klplug/sample_weight_mean", torch.tensor(0.5)).item() == 0.5
