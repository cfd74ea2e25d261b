"""``vocab=exact``: what it is written as, refused for, and reported as."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import klplug

SHAPE = (2, 4)


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    log_probs, ref, old, kl = -torch.rand((4, *SHAPE), generator=draw)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])
    return {
        "log_probs": log_probs.requires_grad_(),
        "ref_log_probs": ref,
        "response_mask": mask,
        "old_log_probs": old,
        "exact_kl": (-kl).requires_grad_(),
    }


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("exact_as_loss", "k2_as_loss,vocab=exact"),
        ("exact_as_loss,vocab=exact", "k2_as_loss,vocab=exact"),
        ("exact_as_loss,ratio=none", "k2_as_loss,vocab=exact"),
        ("exact_as_loss,ratio=old", "k2_as_loss,vocab=exact,ratio=old"),
        ("exact_as_loss,ratio=old,level=prefix", "k2_as_loss,vocab=exact,ratio=old"),
        ("exact_as_loss,horizon=sequence", "k2_as_loss,vocab=exact,horizon=sequence"),
        (
            "exact_as_loss,horizon=sequence,ratio=none",
            "k2_as_loss,vocab=exact,ratio=none,horizon=sequence",
        ),
        ("js_as_loss,vocab=exact", "js_as_loss,vocab=exact"),
        ("alpha_as_loss,alpha=2,vocab=exact", "alpha_as_loss,alpha=2,vocab=exact"),
        ("k2_as_loss,vocab=sample", "k2_as_loss"),
        ("k2_as_loss, vocab=topk:064", "k2_as_loss,vocab=topk:64"),
        ("js_as_loss,vocab=topk:1,ratio=none", "js_as_loss,vocab=topk:1"),
        (
            "k2_as_loss,horizon=sequence,level=prefix,vocab=topk:64",
            "k2_as_loss,vocab=topk:64,horizon=sequence",
        ),
    ],
)
def test_one_canonical_form(written: str, canonical: str) -> None:
    assert str(klplug.parse(written)) == canonical
    assert klplug.parse(canonical) == klplug.parse(written)


def test_what_it_needs() -> None:
    assert klplug.parse("exact_as_loss").requires == ("ref_log_probs", "exact_kl")
    needs = klplug.parse("exact_as_loss,horizon=sequence").requires
    assert set(needs) == {"ref_log_probs", "exact_kl", "old_log_probs"}
    given = tensors() | {"exact_kl": None}
    with pytest.raises(ValueError, match="needs exact_kl, which is missing"):
        klplug.kl_term("exact_as_loss", **given)


@pytest.mark.parametrize(
    ("kl_type", "message"),
    [
        ("k1_in_reward,vocab=exact", "Use 'exact_as_loss,horizon=sequence'"),
        ("k1_as_loss,vocab=exact", "exactly no gradient"),
        ("k3_as_loss,vocab=exact", "'forward_as_loss,vocab=exact'"),
        ("abs_as_loss,vocab=exact", "'tv_as_loss,vocab=exact'"),
        ("forward_as_loss,vocab=exact,horizon=sequence", "no sum over tokens"),
        ("exact_as_loss,head=combined", "head=combined with vocab=exact is refused"),
        ("exact_as_loss,head=clipped", "head=clipped with vocab=exact is refused"),
        ("exact_as_loss,reference=rollout", "reference=rollout with vocab=exact is refused"),
        ("exact_as_loss,bound=2", "bound=2 with vocab=exact is refused"),
        ("exact_as_loss,horizon=sequence,baseline=group", "baseline=group with vocab=exact"),
        ("exact_as_loss,ratio=old,level=token", "level=token with vocab=exact is refused"),
        ("exact_as_loss,ratio=old,level=sequence", "level=sequence with vocab=exact is refused"),
        ("exact_as_loss,cap=5", "with ratio=none there is no weight"),
        ("exact_as_loss,vocab=sample", "Leave vocab out"),
        ("full", "'exact_as_loss'"),
        ("full_as_loss", "'exact_as_loss'"),
        ("exact_in_reward", "a reward goes to the sampled .* Use 'exact_as_loss,horizon=sequence'"),
        ("k2_as_loss,vocab=top", "Did you mean 'topk:K'.* Allowed: sample, exact, topk:K"),
        ("k2_as_loss,vocab=topk", "vocab=topk needs a whole number .* vocab=topk:64"),
        ("k2_as_loss,vocab=topk:0", "vocab=topk:0 needs a whole number of at least 1"),
        # Of more than 4300 digits Python itself makes no number.
        ("k2_as_loss,vocab=topk:" + 5000 * "9", "9 needs a whole number of at least 1"),
        ("k2_as_loss,vocab=topk:6.5", "vocab=topk:6.5 needs a whole number"),
        ("k2_as_loss,vocab=topk:-1", "vocab=topk:-1 needs a whole number"),
        ("exact_as_loss,vocab=topk:4", "Leave vocab out"),
        ("k1_in_reward,vocab=topk:4", "Use 'k2_as_loss,vocab=topk:4,horizon=sequence'"),
        ("k1_as_loss,vocab=topk:4", "Use 'k2_as_loss,vocab=topk:4'"),
        (
            "k3_as_loss,vocab=topk:4",
            "'forward_as_loss,vocab=topk:4'. .* use 'k2_as_loss,vocab=topk:4'",
        ),
        ("forward_as_loss,vocab=topk:4,horizon=sequence", "no sum over tokens"),
        ("k2_as_loss,vocab=topk:4,head=combined", "head=combined with vocab=topk:4 is refused"),
        ("k2_as_loss,vocab=topk:4,reference=old", "reference=old with vocab=topk:4 is refused"),
        ("k2_as_loss,vocab=topk:4,bound=2", "bound=2 with vocab=topk:4 is refused"),
        ("k2_as_loss,vocab=topk:4,ratio=old,level=token", "level=token with vocab=topk:4"),
    ],
)
def test_refused_with_a_reason(kl_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        klplug.parse(kl_type)


def test_one_exact_kl_serves_one_divergence() -> None:
    with pytest.raises(ValueError, match="several divergences over the vocabulary"):
        klplug.kl_term("exact_as_loss+js_as_loss,vocab=exact", **tensors())
    with pytest.raises(ValueError, match="several divergences over the vocabulary"):
        klplug.kl_term("exact_as_loss+k2_as_loss,vocab=topk:8", **tensors())
    term = klplug.kl_term("exact_as_loss+exact_as_loss,horizon=sequence", **tensors())
    assert torch.equal(term.value, 2 * klplug.kl_term("exact_as_loss", **tensors()).value)


def test_a_detached_exact_kl_is_an_error_and_not_a_term_that_does_nothing() -> None:
    given = tensors()
    given["exact_kl"] = given["exact_kl"].detach()
    with pytest.raises(ValueError, match="exact_kl carries no gradient"):
        klplug.kl_term("exact_as_loss", **given)
    with torch.no_grad():
        klplug.kl_term("exact_as_loss", **given)


@pytest.mark.parametrize("other", ["exact_as_loss,horizon=sequence", "k2_as_loss,ratio=none"])
def test_detached_log_probs_are_an_error_where_half_of_a_term_goes_through_them(other: str) -> None:
    given = tensors()
    given["log_probs"] = given["log_probs"].detach()
    own = klplug.kl_term("exact_as_loss", **given)
    (gradient,) = torch.autograd.grad(own.loss.sum(), given["exact_kl"])
    assert torch.equal(gradient, given["response_mask"].float())  # all of its gradient
    for kl_type in (other, f"0.5*exact_as_loss,ratio=old+{other}"):
        term = klplug.kl_term(kl_type, **given)
        with pytest.raises(RuntimeError, match=r"would have (no|the) gradient"):
            _ = term.loss
    update = {"advantages": given["old_log_probs"], "kl_coef": 0.1}
    with pytest.raises(RuntimeError, match=r"policy loss .* would have the gradient of exact_kl"):
        klplug.policy_loss("exact_as_loss", **given, **update)
    with torch.no_grad():  # to measure
        assert not klplug.policy_loss("exact_as_loss", **given, **update).requires_grad


@pytest.mark.parametrize("kl_type", ["exact_as_loss,ratio=old", "exact_as_loss,horizon=sequence"])
def test_masked_tokens_reach_nothing_and_enter_no_product(kl_type: str) -> None:
    """Row 0 has a hole: the token after it has the ratio of the one before it."""
    given = tensors()
    mask = given["response_mask"].bool()
    garbage = {
        name: x.detach().where(mask, torch.nan).requires_grad_(x.requires_grad)
        if x.is_floating_point()
        else x
        for name, x in given.items()
    }
    clean, dirty = klplug.kl_term(kl_type, **given), klplug.kl_term(kl_type, **garbage)
    assert torch.equal(clean.loss, dirty.loss)
    for name in ("log_probs", "exact_kl"):
        found, expected = (
            torch.autograd.grad(x.loss.sum(), y[name], retain_graph=True)[0]
            for x, y in ((dirty, garbage), (clean, given))
        )
        assert torch.equal(found, expected)
        assert (found[~mask] == 0).all()
    ratio = (given["log_probs"] - given["old_log_probs"]).detach().exp()
    expected = torch.stack([ratio[0, 0].new_ones(()), ratio[0, 0], ratio[0, 0] * ratio[0, 2]])
    torch.testing.assert_close(dirty.weight[0][mask[0]], expected)


def test_a_token_of_an_infinite_kl_leaves_and_is_counted() -> None:
    given, without = tensors(), tensors()
    with torch.no_grad():
        given["exact_kl"][0, 2] = torch.inf
    without["response_mask"][0, 2] = 0
    term, expected = (klplug.kl_term("exact_as_loss", **x) for x in (given, without))
    assert torch.equal(term.loss, expected.loss)
    (of_kl,) = torch.autograd.grad(term.loss.sum(), given["exact_kl"])
    assert torch.equal(of_kl, without["response_mask"].float())
    assert term.metrics["klplug/nonfinite/exact_kl"] == 1
    assert term.metrics["klplug/nonfinite_share"].item() == pytest.approx(1 / 5)


def test_the_parts_of_the_term() -> None:
    given = tensors()
    mask = given["response_mask"]
    own = klplug.kl_term("exact_as_loss", **given)
    kl = given["exact_kl"].detach() * mask
    assert torch.equal(own.value, kl)
    assert torch.equal(own.weight, mask.float())
    assert not own.coefficient.any() and not own.gradient.any()
    (of_kl,) = torch.autograd.grad(own.loss.sum(), given["exact_kl"])
    assert torch.equal(of_kl, mask.float())
    whole = klplug.kl_term("exact_as_loss,horizon=sequence,ratio=none", **given)
    later = torch.tensor([[kl[0, 2] + kl[0, 3], 0, kl[0, 3], 0], [kl[1, 1], 0, 0, 0]])
    torch.testing.assert_close(whole.gradient, later)
    (of_score,) = torch.autograd.grad(whole.loss.sum(), given["log_probs"])
    torch.testing.assert_close(of_score, later)


def test_metrics_have_the_exact_kl_and_no_coefficient() -> None:
    given = tensors()
    metrics = klplug.kl_term("exact_as_loss", **given).metrics
    kl = given["exact_kl"].detach()[given["response_mask"].bool()]
    assert metrics["klplug/exact_kl"].item() == pytest.approx(kl.mean().item())
    assert metrics["klplug/ess"] == 1
    assert {"klplug/k1", "klplug/k2", "klplug/k3"} <= set(metrics)
    # Of the reference's top tokens it is a lower bound, and has a name of its own.
    bound = klplug.kl_term("k2_as_loss,vocab=topk:8", **given).metrics
    assert bound["klplug/topk_kl"] == metrics["klplug/exact_kl"]
    assert set(metrics) - set(bound) == {"klplug/exact_kl"}
    both = klplug.kl_term("k2_as_loss,vocab=topk:8+k3_as_loss", **given).metrics
    assert both["klplug/topk_kl"] == both["klplug/k2_as_loss.vocab-topk-8/topk_kl"]
    assert not any("coef" in name or "gradient" in name for name in metrics)
    assert "klplug/exact_kl" not in klplug.kl_term("k2_as_loss", **given).metrics


def test_what_goes_through_the_vocabulary_is_summed_over_terms() -> None:
    given = tensors()
    both = klplug.kl_term("2*exact_as_loss+exact_as_loss,ratio=old", **given)
    (gradient,) = torch.autograd.grad(both.loss.sum(), given["exact_kl"])
    alone = klplug.kl_term("exact_as_loss,ratio=old", **given)
    expected = 2 * given["response_mask"] + alone.weight
    torch.testing.assert_close(gradient, expected)
