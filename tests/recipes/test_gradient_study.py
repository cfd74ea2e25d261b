"""The gradient study's machinery on a tiny model, against enumeration and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.reproduce import gradient_study as study

VOCABULARY, LENGTH, END = 5, 3, 4
PROMPT = torch.tensor([[1, 3, 0]])


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=study.TUNED + 1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.6,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).double().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A reference and a policy that differ in the upper layers alone."""
    ref, policy, other = tiny(0), tiny(0), tiny(1)
    for layer, moved in zip(policy.model.layers[1:], other.model.layers[1:], strict=True):
        layer.load_state_dict(moved.state_dict())
    return ref, policy


@pytest.fixture(scope="module")
def answers() -> tuple[Tensor, Tensor]:
    """Every answer of up to three tokens that END may end, padded, and its mask."""
    rows = [
        a
        for n in range(1, LENGTH + 1)
        for a in itertools.product(range(VOCABULARY), repeat=n)
        if END not in a[:-1] and (n == LENGTH or a[-1] == END)
    ]
    tokens = torch.tensor([[*a, *[0] * (LENGTH - len(a))] for a in rows])
    mask = torch.tensor([[t < len(a) for t in range(LENGTH)] for a in rows]).double()
    return tokens, mask


def log_softmaxes(model: LlamaForCausalLM, tokens: Tensor, weights: dict[str, Tensor]) -> Tensor:
    given = torch.cat([PROMPT.expand(len(tokens), -1), tokens[:, :-1]], 1)
    logits = functional_call(model, weights, (given,)).logits
    return logits[:, -LENGTH:].log_softmax(-1)


def targets(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM],
    answers: tuple[Tensor, Tensor],
    space: study.Subspace,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of answers, and LOC and FULL by autograd with respect to every A."""
    ref, policy = models
    tokens, mask = answers
    last = f"model.layers.{study.TUNED}."
    cores = {
        name: torch.zeros(left.shape[1], space.right[name].shape[1], dtype=torch.float64)
        for name, left in space.left.items()
    }
    for core in cores.values():
        core.requires_grad_()
    weights = {
        f"{last}{name}.weight": module.weight + space.left[name] @ cores[name] @ space.right[name].T
        for name, module in study.linears(policy.model.layers[-1]).items()
    }
    log = log_softmaxes(policy, tokens, weights)
    ref_log = log_softmaxes(ref, tokens, {})

    def of_tokens(x: Tensor) -> Tensor:
        return x.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * mask

    probability = of_tokens(log).sum(-1).exp()
    log_ratio = (of_tokens(log) - of_tokens(ref_log)).sum(-1)
    full = torch.autograd.grad((probability * log_ratio).sum(), cores.values(), retain_graph=True)
    divergence = (log.exp() * (log - ref_log)).sum(-1) * mask
    loc = torch.autograd.grad((probability.detach()[:, None] * divergence).sum(), cores.values())
    return (
        probability.detach(),
        torch.cat([g.flatten() for g in loc]),
        torch.cat([g.flatten() for g in full]),
    )


@pytest.fixture(scope="module")
def found(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], answers: tuple[Tensor, Tensor]
) -> tuple[study.Scored, Tensor, Tensor, Tensor]:
    ref, policy = models
    tokens, mask = answers
    space = study.Subspace.of(policy.model.layers[-1], 3)
    given = torch.cat([PROMPT.expand(len(tokens), -1), tokens[:, :-1]], 1)
    lower = study.through(ref, ref.model.layers[: -study.TUNED], ref.model.embed_tokens(given))
    data = study.scored(policy, ref, space, lower, tokens, mask)
    return (data, *targets(models, answers, space))


def assert_same(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """To a millionth: the model's own norms and attention work in float32."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(scale.abs().max()))


def test_answers_are_all_there(found: tuple[study.Scored, Tensor, Tensor, Tensor]) -> None:
    data, probability, _, _ = found
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(data.log_probs.sum(-1).exp(), probability, rtol=1e-6, atol=0)


def test_truths_are_the_gradients_they_name(
    found: tuple[study.Scored, Tensor, Tensor, Tensor],
) -> None:
    data, probability, loc, full = found
    assert_same(probability @ data.exact, loc, loc)
    assert_same(probability @ data.full, full, full)
    assert (loc - full).norm() > 0.05 * full.norm()  # else nothing below tells them apart


@pytest.mark.parametrize(
    ("form", "target"),
    [
        ("k2_as_loss", "loc"),
        ("stock:verl:k2", "loc"),
        ("k2_as_loss,horizon=sequence", "full"),
        ("k1_in_reward", "full"),
        ("k1_as_loss,ratio=none", "zero"),
    ],
)
def test_the_expectation_over_all_answers(
    form: str, target: str, found: tuple[study.Scored, Tensor, Tensor, Tensor]
) -> None:
    data, probability, loc, full = found
    gradient = study.token_gradient(form, data.log_probs, data.ref_log_probs, data.mask, None)
    mean = torch.einsum("b,bt,btk->k", probability, gradient, data.score)
    expected = {"loc": loc, "full": full, "zero": torch.zeros_like(loc)}[target]
    assert_same(mean, expected, loc)


@pytest.mark.parametrize("form", ["k3_as_loss", "k3_in_reward", "stock:verl:k3"])
def test_the_biased_ones_are_not_there(
    form: str, found: tuple[study.Scored, Tensor, Tensor, Tensor]
) -> None:
    data, probability, loc, full = found
    gradient = study.token_gradient(form, data.log_probs, data.ref_log_probs, data.mask, None)
    mean = torch.einsum("b,bt,btk->k", probability, gradient, data.score)
    assert study.cosine(mean, loc) < 0.99 and study.cosine(mean, full) < 0.99


def test_samples_are_those_of_the_policy(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], answers: tuple[Tensor, Tensor]
) -> None:
    """Frequencies of 4,000 answers, and what entered the upper layers, from the plain model."""
    _, policy = models
    tokens, mask, lower = study.sampled(
        policy, PROMPT.repeat(2, 1), 2000, LENGTH, END, torch.Generator().manual_seed(0)
    )
    given = torch.cat([PROMPT.expand(len(tokens), -1), tokens[:, :-1]], 1)
    expected = study.through(
        policy, policy.model.layers[: -study.TUNED], policy.model.embed_tokens(given)
    )
    torch.testing.assert_close(lower, expected, rtol=1e-5, atol=1e-8)
    first = policy(PROMPT).logits[0, -1].softmax(-1)
    frequency = nn.functional.one_hot(tokens[:, 0], VOCABULARY).double().mean(0)
    error = (first * (1 - first) / len(tokens)).sqrt()
    assert ((frequency - first).abs() < 4 * error).all()
    ends = (tokens == END).long().cumsum(-1)
    assert torch.equal(mask, ((ends == 0) | ((ends == 1) & (tokens == END))).double())


def test_limit_sees_through_the_noise() -> None:
    """A mean of known cosine 0.8 and norm ratio 2, under noise far larger than it."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.zeros(64).double()
    truth[0] = 1.0
    mean = torch.zeros(64).double()
    mean[0], mean[1] = 1.6, 1.2
    noise = torch.randn(4000, 64, generator=draw, dtype=torch.float64)
    limit = study.Limit.of(mean + 2 * noise, truth.expand(4000, -1))
    assert limit.cosine == pytest.approx(0.8, abs=0.05)
    assert limit.norm == pytest.approx(2.0, rel=0.05)
    # cos of n answers is 0.8 / sqrt(1 + 64 / n): 64 x 4 of variance over a square of 4.
    assert limit.noise == pytest.approx(64, rel=0.1)
    assert limit.answers_for(0.4) == pytest.approx(64 / 3, rel=0.2)
    assert limit.answers_for(0.9) == float("inf")


def test_a_mean_of_zero_is_lost_and_no_limit() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 64, generator=draw, dtype=torch.float64)
    truth = torch.ones(400, 64).double()
    assert study.Limit.of(noise - noise.mean(0), truth).noise == float("inf")
    assert study.Limit.of(noise + 1, truth).cosine == pytest.approx(1, abs=0.05)
