"""What a KL term reports: 0-d tensors, made without a device sync, that merge exactly.

A term keeps sums and maxima over its counted tokens. Micro-batches and ranks are merged as those,
and only then divided: a maximum by max, an effective sample size from its two sums.

The gradient's yardstick is the *principled* one: what the same term would have with ``c = x``, the
one coefficient of KL(pi||ref).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from klplug.numerics import finite_, largest, masked_
from klplug.seen import Seen

PREFIX = "klplug/"

Rows: TypeAlias = dict[str, Tensor]

TOP = 0.01
"""The share of tokens whose part in the gradient is reported."""

SAMPLE = 2**14
"""Beyond so many entries the threshold of the largest is read off a sample of about that size."""

EVEN = 1e-5
"""Of the second moment of w - 1, the variance below which all w are taken as one number."""


@dataclass(frozen=True)
class Tally:
    """Sums and maxima over counted tokens, each a 0-d tensor.

    Attributes:
        sums: added over micro-batches and ranks.
        maxima: joined by max over micro-batches and ranks.
    """

    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]

    @staticmethod
    def merged(tallies: Iterable[Tally]) -> Tally:
        """One tally of all tokens of all ``tallies`` (at least one)."""
        first, *others = tallies
        sums, maxima = dict(first.sums), dict(first.maxima)
        for other in others:
            for name, value in other.sums.items():
                sums[name] = sums[name] + value.to(sums[name].device)
            for name, value in other.maxima.items():
                maxima[name] = torch.maximum(maxima[name], value.to(maxima[name].device))
        return Tally(sums, maxima)

    def metrics(self) -> dict[str, Tensor]:
        """The metrics by their stable names, all finite, 0 where no token was counted.

        ``klplug/active``: 1, proof in a log that klplug computed the term.
        ``klplug/kl``: the estimate of KL(pi||ref) to read, nats per token; see ``estimate``.
        ``klplug/k1``, ``k2``, ``k3``, ``abs``: masked means of the estimators, nats per token.
        ``klplug/exact_kl``: with vocab=exact, the masked mean over the whole vocabulary, in place
        of the metrics of a coefficient. ``klplug/topk_kl``: with vocab=topk:K likewise, a lower
        bound of it.
        ``klplug/coef_mean``, ``coef_max``: mean and largest size of a token's coefficient, the
        number that stands beside its advantage: c, and over whole answers the sum to go, with its
        weights inside.
        ``klplug/weight_mean``: mean weight, near 1 while the KL has its strength.
        ``klplug/ess``: effective sample size of the weights as a share of the tokens,
        ``(sum w)^2 / (n sum w^2)``, 1 where all weights are equal.
        ``klplug/capped_share``, ``bounded_share``, ``overflow_share``: shares of tokens whose
        weight met the cap, whose c met the bound, one of whose numbers is the dtype's largest.
        ``klplug/sample_weight_mean``: mean of what ``weight=`` makes tokens count, where there is
        one.
        ``klplug/nonfinite_share``: share of counted tokens with a nan or an infinite number;
        ``klplug/nonfinite/<tensor>`` is 1 for each tensor that had one.
        ``klplug/gradient_cosine``: between the term's gradient and the principled one, over tokens;
        1 where neither has any. ``klplug/gradient_norm_ratio``: its norm over the principled one's;
        0 where there is nothing to compare with. ``klplug/top_share``: of all |gradient|, what the
        top 1 % of tokens have.

        ``kl``, ``k1``, ``k2``, ``k3`` and ``abs`` are always to ref, and absent where no reference
        is at hand. The terms of a sum, and a term to another policy, have all of them under
        ``klplug/<term>/``, <term> being ``str(term)`` with ``.`` for ``,``, ``-`` for ``=`` and
        ``x`` for ``*``; the shares and weights of the whole are then those of the worst term.
        """
        names = sorted(k.removesuffix("tokens") for k in self.sums if k.endswith("tokens"))
        means = self._means(names)
        found = {"active": torch.ones_like(self.sums["tokens"]), **self.maxima}
        metrics = {**_of_estimates(means), **_of_gradients(means)}
        metrics |= {"exact_kl": means["exact"], "topk_kl": means["topk"]}
        metrics["sample_weight_mean"] = means["sample_weight"]
        for key, values in metrics.items():
            for name, value in zip(names, values, strict=True):
                if name + _MADE_OF.get(key, "tokens") in self.sums:
                    found[name + key] = value
        return {PREFIX + name: value for name, value in found.items()}

    def _means(self, names: Sequence[str]) -> dict[str, Tensor]:
        """By key, the means per token, (names,) each; anything where there is no reference."""
        sums = self.sums
        tokens = torch.stack([sums[f"{name}tokens"] for name in names])
        never = torch.zeros_like(sums["tokens"])
        otherwise = {"weight": "tokens", "weight_square": "tokens"}  # where there is none, w is 1
        rows = [
            sums.get(name + key, sums.get(name + otherwise.get(key, ""), never))
            for key in _SUMS
            for name in names
        ]
        # Not clamp(min=1): a host that averages over ranks hands in sums of less than a token.
        means = torch.stack(rows).view(len(_SUMS), -1) / tokens.clamp(min=1e-30)
        found = dict(zip(_SUMS, means, strict=True))
        # Of all that are counted: the tokens that were none are not among those of the means.
        counted = torch.stack([sums[f"{name}counted"] for name in names])
        found["nonfinite"] = (counted - tokens) / counted.clamp(min=1e-30)
        return found


_MADE_OF = {
    **dict.fromkeys(("kl", "k1", "k2", "k3", "abs"), "k1"),
    **dict.fromkeys(("coef_mean", "gradient_cosine", "gradient_norm_ratio", "top_share"), "coef"),
    "exact_kl": "exact",
    "topk_kl": "topk",
    "sample_weight_mean": "sample_weight",
}
"""The sum without which a metric is absent: where there is no reference, or no coefficient."""
_SUMS = (
    *("k1", "k1_square", "k3", "abs", "growth_square", "k3_growth", "exact", "topk"),
    *("sample_weight", "coef", "weight", "weight_square", "capped", "bounded", "overflow"),
    *("gradient_square", "principled_square", "gradient_principled", "gradient_size", "top_size"),
)


def _of_estimates(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {key: means[key] for key in ("k1", "k3", "abs")}
    return {"kl": estimate(means), **named, "k2": means["k1_square"] / 2}


def estimate(means: Mapping[str, Tensor]) -> Tensor:
    """KL(pi||ref) in nats per token: near the better of k1 and k3, by what the batch shows.

    With ``w = exp(-x)``, whose mean under samples of pi is 1, ``k1 + b (w - 1)`` is unbiased for
    any b fixed beforehand: k1 at b = 0, k3 at b = 1. b is fitted on the batch, to the least
    variance, which biases it by order 1/n. Where the batch has too little of w to fit anything, a
    third of its effective sample size lost (``(sum w)^2 / (n sum w^2) < 2/3``) or a mean below 0.8
    (the policy has left tokens that ref has), it is k1. ``benchmarks/results/estimates.md`` has its
    error. A sampler that cuts its tail (top-p, top-k) biases all of them.

    Args:
        means: per token; ``growth`` is ``w - 1``.
    """
    k1, k3, square = means["k1"], means["k3"], means["growth_square"]
    growth = k3 - k1
    variance = torch.addcmul(square, growth, growth, value=-1)
    covariance = torch.addcmul(means["k3_growth"], k3, growth, value=-1)
    # k3 - (1 - b) (w - 1), which near the reference has more digits than k1 + b (w - 1).
    fitted = torch.addcmul(k3, covariance / variance, growth, value=-1)
    steady = ((1 + growth).square() > 2 * variance) & (growth > -0.2)
    # Where all w are one number there is no slope to see. Nor where one is so large that the
    # variance, the difference of two such squares, is none.
    slope = variance > EVEN * square
    return torch.where(steady & slope, fitted, k1).nan_to_num(nan=0.0)


def _of_gradients(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a term does, (terms,) each, the whole first."""
    square, principled = means["gradient_square"], means["principled_square"]
    # The slope of the gradient on the principled one is the cosine times the ratio of their norms.
    above = [means["gradient_principled"], square, means["weight"].square(), means["top_size"]]
    below = [principled, principled, means["weight_square"], means["gradient_size"]]
    slope, ratio_square, ess, top = torch.stack(above) / torch.stack(below)
    ratio = ratio_square.sqrt()
    ratios = torch.stack([slope / ratio, ratio, ess, top]).nan_to_num(
        nan=0.0, posinf=0.0, neginf=0.0
    )
    nothing = (square + principled) == 0
    cosine, ratio = (ratios[:2] + nothing).unbind()
    least = {"weight_mean": means["weight"], "ess": ratios[2]}
    shares = ("capped", "bounded", "overflow", "nonfinite")
    most = {f"{key}_share": means[key] for key in shares}
    if len(nothing) > 1:  # of the whole, those of its worst term
        least = {k: torch.cat([v[1:].amin(0, keepdim=True), v[1:]]) for k, v in least.items()}
        most = {k: torch.cat([v[1:].amax(0, keepdim=True), v[1:]]) for k, v in most.items()}
    return {
        "coef_mean": means["coef"],
        **least,
        **most,
        "gradient_cosine": cosine,
        "gradient_norm_ratio": ratio,
        "top_share": ratios[3].clamp(max=1.0),
    }


def tally(seen: Sequence[Seen]) -> Tally:
    """The sums of a term; or of a sum as a whole, and then of each of its terms."""
    roots: Rows = {}
    sums: Rows = {}
    maxima: Rows = {}
    for one in seen:
        for all_of, of_one in zip((roots, sums, maxima), _rows(one), strict=True):
            all_of |= {one.name + key: value for key, value in of_one.items()}
    together = torch.stack([*roots.values(), *sums.values()])
    together[: len(roots)].square_()
    # The sum of a row may be inf, and of two such rows no number. float64 where there is.
    wide = torch.float32 if together.device.type == "mps" else torch.float64
    totals = together.nan_to_num_(0.0).sum(-1, dtype=wide)
    if together.dtype == wide:
        finite_(totals)
    return Tally(dict(zip((*roots, *sums), totals, strict=True)), maxima | _nonfinite(seen[0]))


def _rows(s: Seen) -> tuple[Rows, Rows, Rows]:
    """Of each row the roots of its sums of squares and its other sums, (B,) each; and the maxima.

    All in float64 would first copy what is (B, T). What is made for its sum alone lies side by side
    and is summed at once: to a GPU a small operation costs what a large one does.
    """
    # Often one tensor has several of the parts: each norm is taken of it once.
    norm = functools.cache(functools.partial(torch.linalg.vector_norm, dim=-1))
    roots: Rows = {}
    sums: Rows = {}
    maxima: Rows = {}
    counted = {"tokens": s.numbers, "counted": s.counted, "capped": s.capped, "bounded": s.bounded}
    # Which numbers of a token might be at the dtype's largest.
    held = [x for x in s.saturating if x is not s.coefficient]
    if s.weight is not None:
        roots["weight_square"], sums["weight"] = norm(s.weight), s.weight.sum(-1)
    if s.expected is not None:
        sums["topk" if s.is_bound else "exact"] = s.expected.sum(-1)
    if s.sample_weight is not None:
        sums["sample_weight"] = s.sample_weight.sum(-1)
    if s.coefficient is not None:
        c, force, principled = s.coefficient, s.gradient, s.principled
        room, space = _room(
            force,
            "gradient_size",
            "top_size",
            *(["coef"] if c is not force else []),
            *(["abs"] if s.log_ratio is not None and c is not s.log_ratio else []),
            *(["gradient_principled"] if principled is not force else []),
        )
        size = torch.abs(force, out=space["gradient_size"])
        of_c = size if c is force else torch.abs(c, out=space["coef"])
        maxima["coef_max"] = of_c.amax() if of_c.numel() else of_c.sum()
        if any(c is x for x in s.saturating):
            held.append(of_c)
        if "abs" in space:
            torch.abs(cast(Tensor, s.log_ratio), out=space["abs"])
        if "gradient_principled" in space:
            torch.mul(force, principled, out=space["gradient_principled"])
        tokens = s.numbers.sum()
        threshold = _threshold(size, tokens)
        torch.sub(size, threshold, out=space["top_size"]).clamp_(min=0)
        made = dict(zip(space, room.sum(-1).unbind(), strict=True))
        if len(size):
            # Minus the number of the largest: the ceiling of a quotient is no operation.
            k = torch.div(tokens, -round(1 / TOP), rounding_mode="floor")
            made["top_size"] = torch.addcmul(made["top_size"], k, threshold, value=-1 / len(size))
        if c is force:
            made["coef"] = made["gradient_size"]
        if c is s.log_ratio:
            made["abs"] = made["coef"]
        sums |= made
        roots["gradient_square"], roots["principled_square"] = norm(force), norm(principled)
        if principled is force:
            roots["gradient_principled"] = roots["gradient_square"]
        del room, space, size, of_c
    if s.log_ratio is not None:
        room, space = _room(s.log_ratio, "k3_growth", *(["k3"] if s.k3 is None else []))
        growth = torch.neg(s.log_ratio, out=space["k3_growth"]).expm1_()  # w - 1: ``estimate``
        counted["overflow"] = functools.reduce(torch.maximum, [*held, growth]) >= largest(growth)
        roots["growth_square"], roots["k1_square"] = norm(growth), norm(s.log_ratio)
        k3 = torch.add(growth, s.log_ratio, out=space["k3"]) if s.k3 is None else s.k3
        growth.mul_(k3)
        sums |= dict(zip(space, room.sum(-1).unbind(), strict=True))
        sums["k1"] = s.log_ratio.sum(-1)
        if s.k3 is not None:
            sums["k3"] = k3.sum(-1)
        if "abs" not in sums:
            sums["abs"] = torch.linalg.vector_norm(s.log_ratio, 1, dim=-1)
    elif held:
        reached = functools.reduce(torch.maximum, held)
        counted["overflow"] = reached >= largest(reached)
    flags = {name: flag for name, flag in counted.items() if flag is not None}
    counts = torch.stack(list(flags.values())).view(torch.uint8).sum(-1, dtype=s.gradient.dtype)
    return roots, sums | dict(zip(flags, counts.unbind(), strict=True)), maxima


def _room(like: Tensor, *names: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Empty tensors as ``like``, side by side, and each by its name."""
    room = like.new_empty((len(names), *like.shape))
    return room, dict(zip(names, room.unbind(), strict=True))


def _nonfinite(whole: Seen) -> dict[str, Tensor]:
    """By tensor, 1 if one of its counted numbers is none, else 0."""
    if not whole.inputs:
        return {}
    dtype = whole.gradient.dtype
    x = torch.stack([tensor.to(dtype) for tensor in whole.inputs.values()])
    total = masked_(x, whole.counted).sum((-2, -1))
    found = (total - total).nan_to_num(nan=1.0)
    return {f"nonfinite/{name}": found[i] for i, name in enumerate(whole.inputs)}


def _threshold(size: Tensor, tokens: Tensor) -> Tensor:
    """Where the largest ``TOP`` of ``tokens`` entries begin, (1,).

    The sum of the k largest is the least of ``k t + sum(max(x - t, 0))`` over thresholds t, reached
    from the k-th largest to the next (Rockafellar and Uryasev 2000). Beyond ``SAMPLE`` entries t is
    that of an evenly spaced sample, for sorting costs more than all other metrics: near the minimum
    that shifts the sum upwards by a second order.

    Args:
        size: (B, T), not negative, zero where masked.
        tokens: how many are counted, 0-d.
    """
    every = size.numel() // SAMPLE | 1
    sample = size.reshape(-1)[::every]
    if not len(sample):
        return size.sum().view(1)
    most = sample.topk(min(len(sample), int(TOP * len(sample)) + 2)).values
    # The mask's count is on the device, so the rank is taken there too.
    rank = torch.div(tokens, every * round(1 / TOP), rounding_mode="floor")
    return most.gather(0, rank.view(1))
