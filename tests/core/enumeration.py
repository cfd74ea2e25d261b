"""Policies small enough to enumerate: every expectation exact, every target by autograd.

Nothing here knows klplug. A problem has one parameter vector shared by all prefixes, so that
gradients of different tokens mix as in a network.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

# Divergences E_ref f(u), each by its textbook f.
F = {
    "reverse": lambda t: t * t.log(),
    "forward": lambda t: -t.log(),
    "tv": lambda t: (t - 1).abs() / 2,
    "twice_tv": lambda t: (t - 1).abs(),
    "js": lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log(),
    "jeffreys": lambda t: (t - 1) * t.log(),
    "chi2": lambda t: (t - 1) ** 2,
    "hellinger": lambda t: (1 - t.sqrt()) ** 2,
    "alpha": lambda t: (t**0.5 - 0.5 * t - 0.5) / (0.5 * -0.5),
    "alpha,alpha=2": lambda t: (t**2 - 2 * t + 1) / 2,
    "alpha,alpha=-1": lambda t: (t**-1 + t - 2) / 2,
}

STOP = 0  # with ``stops``, the token that ends an answer


@dataclass
class Problem:
    """All answers over ``vocabulary`` tokens of up to ``length``, under four policies.

    ``logits(theta)[prefix]`` is a fixed random linear map of theta. ``theta`` and ``old`` are two
    parameter vectors; reference and teacher are arbitrary per prefix. With ``top`` a token's
    divergence is of that many categories, the reference's most likely tokens, and one of all
    others.
    """

    vocabulary: int
    length: int
    stops: bool = False
    seed: int = 0
    dimension: int = 7
    top: int | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.answers = [
            answer
            for answer in itertools.chain.from_iterable(
                itertools.product(range(self.vocabulary), repeat=n)
                for n in range(1, self.length + 1)
            )
            if self._complete(answer)
        ]
        self.prefixes = sorted({a[:t] for a in self.answers for t in range(len(a))})
        index = {prefix: i for i, prefix in enumerate(self.prefixes)}
        shape = len(self.answers), self.length
        self.prefix_of = torch.zeros(shape, dtype=torch.long)
        self.token_of = torch.zeros(shape, dtype=torch.long)
        self.mask = torch.zeros(shape, dtype=torch.bool)
        for i, answer in enumerate(self.answers):
            for t, token in enumerate(answer):
                self.prefix_of[i, t] = index[answer[:t]]
                self.token_of[i, t] = token
                self.mask[i, t] = True
        count = len(self.prefixes)
        self.features = normal(count, self.vocabulary, self.dimension)
        self.theta = (0.7 * normal(self.dimension)).requires_grad_()
        self.old_theta = self.theta.detach() + 0.4 * normal(self.dimension)
        self.ref_logits = 0.8 * normal(count, self.vocabulary)
        self.teacher_logits = 0.9 * normal(count, self.vocabulary)

    def _complete(self, answer: tuple[int, ...]) -> bool:
        if not self.stops:
            return len(answer) == self.length
        ended = answer[-1] == STOP or len(answer) == self.length
        return ended and STOP not in answer[:-1]

    # Conditional log-distributions, one row per prefix.
    def policy(self) -> Tensor:
        return (self.features @ self.theta).log_softmax(-1)

    def old(self) -> Tensor:
        return (self.features @ self.old_theta).log_softmax(-1)

    def ref(self) -> Tensor:
        return self.ref_logits.log_softmax(-1)

    def teacher(self) -> Tensor:
        return self.teacher_logits.log_softmax(-1)

    # Of the sampled tokens, (answers, length), zero where masked.
    def log_probs(self, conditional: Tensor) -> Tensor:
        return torch.where(self.mask, conditional[self.prefix_of, self.token_of], 0.0)

    def answer_probability(self, conditional: Tensor) -> Tensor:
        return self.log_probs(conditional).sum(-1).exp()

    def reach(self, conditional: Tensor) -> Tensor:
        """Probability that an answer passes through each prefix."""
        reach = torch.zeros(len(self.prefixes), dtype=torch.float64)
        probability = self.answer_probability(conditional)
        for i, answer in enumerate(self.answers):
            reach[self.prefix_of[i, : len(answer)]] += probability[i]
        return reach

    def gradient(self, scalar: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(scalar, self.theta, retain_graph=True)
        return gradient

    # ── Targets, each as the gradient of what it is named after ─────────────────────────────────

    def full(self) -> Tensor:
        """grad KL(pi||ref) over whole answers."""
        policy = self.policy()
        ratio = self.log_probs(policy).sum(-1) - self.log_probs(self.ref()).sum(-1)
        return self.gradient((self.answer_probability(policy) * ratio).sum())

    def at_prefixes(self, reach: Tensor, divergence: str = "reverse") -> Tensor:
        """grad of a divergence of each token's distribution, prefixes weighted and held fixed."""
        return self.gradient((reach.detach() * self.per_prefix(divergence)).sum())

    def per_prefix(self, divergence: str) -> Tensor:
        """``E_ref f(u)`` of each prefix's next token, u = pi / ref."""
        ref, policy = self.merged(self.ref().exp()), self.merged(self.policy().exp())
        return (ref * F[divergence](policy / ref)).sum(-1)

    def merged(self, p: Tensor) -> Tensor:
        """Probabilities of the categories."""
        if self.top is None:
            return p
        top = self.ref().topk(self.top).indices
        others = p * torch.ones_like(p).scatter(-1, top, 0.0)
        return torch.cat([p.gather(-1, top), others.sum(-1, keepdim=True)], -1)

    def expected(self, divergence: str) -> Tensor:
        """grad of the divergence of each token summed along answers from pi, reach and all."""
        return self.gradient((self.reach(self.policy()) * self.per_prefix(divergence)).sum())

    def full_forward(self) -> Tensor:
        """grad KL(ref||pi) over whole answers."""
        log_probs, ref = self.log_probs(self.policy()).sum(-1), self.ref()
        probability = self.answer_probability(ref)
        return self.gradient((probability * (self.log_probs(ref).sum(-1) - log_probs)).sum())

    def between_answers(self, divergence: str, other: Tensor | None = None) -> Tensor:
        """grad of ``E_ref f(u)`` over whole answers, ``other`` in the place of their ref."""
        ref = self.answer_probability(self.ref()) if other is None else other
        ratio = self.answer_probability(self.policy()) / ref
        return self.gradient((ref * F[divergence](ratio)).sum())

    @property
    def rewards(self) -> Tensor:
        """One for each answer, of three values."""
        return torch.arange(len(self.answers)).remainder(3).double() / 2

    def posterior(self, beta: float) -> Tensor:
        """The probability of each answer under ``ref exp(r/beta) / Z``."""
        weight = self.answer_probability(self.ref()) * (self.rewards / beta).exp()
        return weight / weight.sum()

    def loc(self, divergence: str = "reverse") -> Tensor:
        return self.at_prefixes(self.reach(self.policy()), divergence)

    def oldpref(self, divergence: str = "reverse") -> Tensor:
        return self.at_prefixes(self.reach(self.old()), divergence)

    def surr(self) -> Tensor:
        """grad of PPO's surrogate of the KL, its reward-to-go frozen at old."""
        old = self.log_probs(self.old())
        later = (old - self.log_probs(self.ref())).flip(-1).cumsum(-1).flip(-1)
        ratio = (self.log_probs(self.policy()) - old).exp()
        weight = self.answer_probability(self.old())[:, None] * self.mask
        return self.gradient((weight * ratio * later).sum())

    def expected_values(self, estimate: str, behaviour: Tensor | None = None) -> Tensor:
        """grad E[sum of an estimator's values], the samples from pi (or, fixed, from old)."""
        policy = self.policy()
        lr = self.log_probs(policy) - self.log_probs(self.ref())
        if estimate in F:
            value = torch.where(self.mask, F[estimate](lr.exp()) / lr.exp(), 0.0)
        else:
            value = {"k2": lr**2 / 2, "k3": torch.exp(-lr) - 1 + lr, "abs": lr.abs()}[estimate]
        probability = self.answer_probability(policy if behaviour is None else behaviour)
        return self.gradient((probability[:, None] * value).sum())

    def away_from_old(self) -> Tensor:
        """-grad KL(old||pi) over whole answers."""
        return self.gradient(
            (self.answer_probability(self.old()) * self.log_probs(self.policy()).sum(-1)).sum()
        )


PROBLEMS = {
    "one token": lambda: Problem(vocabulary=5, length=1),
    "three tokens": lambda: Problem(vocabulary=3, length=3, seed=1),
    "varying length": lambda: Problem(vocabulary=3, length=3, stops=True, seed=2),
}
