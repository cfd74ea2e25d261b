"""What a KL term reports: 0-d tensors, made without a device sync, that merge exactly.

A term keeps sums and maxima over its counted tokens. Micro-batches and ranks are merged as those,
and only then divided: a maximum by max, an effective sample size from its two sums. The one
exception is ``top_share``: merged, its top is each micro-batch's own, which can't be more.

The gradient's yardstick is the *principled* one: what the same term would have with ``c = x``, the
one coefficient of KL(pi||ref).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klplug.numerics import HUGE, finite_, largest, masked_
from klplug.seen import Seen

PREFIX = "klplug/"

TOP = 0.01
"""The share of tokens whose part in the gradient is reported."""

SAMPLE = 2**13
"""Beyond twice as many entries the threshold of the largest is read off so large a sample."""

LARGEST = 1e150
"""The largest part of a gradient that float64 has the squares of."""

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
        """One tally of all tokens of all ``tallies`` (at least one).

        Raises:
            ValueError: not all have the same sums and maxima, as those of one term with the same
                tensors have. So have some other terms, which nothing here tells apart.
        """
        first, *others = tallies
        sums, maxima = dict(first.sums), dict(first.maxima)
        for other in others:
            unlike = (other.sums.keys() ^ sums.keys()) | (other.maxima.keys() ^ maxima.keys())
            if apart := sorted(unlike):
                raise ValueError(
                    "tallies can be merged of one kl_type and one set of tensors only: not all "
                    f"have {', '.join(apart)}"
                )
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
        ``klplug/nonfinite_share``: share of counted tokens with a nan or an infinite number, those
        at which a term has its limit too;
        ``klplug/nonfinite/<tensor>`` is 1 for each tensor that had one.
        ``klplug/gradient_cosine``: between the term's gradient and the principled one, over tokens;
        1 where neither has any. ``klplug/gradient_norm_ratio``: its norm over the principled one's;
        0 where there is nothing to compare with. ``klplug/top_share``: of all |gradient|, what the
        top 1 % of tokens have; merged, the top 1 % of each micro-batch.

        ``kl``, ``k1``, ``k2``, ``k3`` and ``abs`` are always to ref, and absent where no reference
        is at hand. The terms of a sum, and a term to another policy, have all of them under
        ``klplug/<term>/``, <term> being ``str(term)`` with ``.`` for ``,``, ``-`` for ``=`` and
        ``:``, ``x`` for ``*``; the shares and weights of the whole are then those of the worst
        term, ``nonfinite_share`` that of ref where it is worse.
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
        acting = torch.stack([sums[f"{name}acting"] for name in names])
        never = torch.zeros_like(sums["tokens"])
        otherwise = {"weight": "acting", "weight_square": "acting"}  # where there is none, w is 1
        rows = [
            sums.get(name + key, sums.get(name + otherwise.get(key, ""), never))
            for key in _SUMS
            for name in names
        ]
        per = [tokens if key in _OF_RATIO else acting for key in _SUMS]
        # Not clamp(min=1): a host that averages over ranks hands in sums of less than a token.
        means = torch.stack(rows).view(len(_SUMS), -1) / torch.stack(per).clamp(min=1e-30)
        found = dict(zip(_SUMS, means, strict=True)) | {"n": tokens}
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
_OF_RATIO = ("k1", "k1_square", "k3", "abs", "growth_square", "k3_growth", "exact", "topk")
_SUMS = (
    *_OF_RATIO,
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
    variance, which biases it by order 1/n. It is k1 where the batch has too little of w to fit
    anything: three fifths of its effective sample size are lost (``(sum w)^2 / (n sum w^2) < 2/5``)
    or its mean is more than four standard errors below 1, for the policy has left tokens that ref
    has. ``benchmarks/results/estimates.md`` has its error. A sampler that cuts its tail (top-p,
    top-k) biases all of them.

    Args:
        means: per token; ``growth`` is ``w - 1``. And ``n``, of how many tokens.
    """
    k1, k3, square = means["k1"], means["k3"], means["growth_square"]
    growth = k3 - k1
    variance = torch.addcmul(square, growth, growth, value=-1)
    covariance = torch.addcmul(means["k3_growth"], k3, growth, value=-1)
    # k3 - (1 - b) (w - 1), which near the reference has more digits than k1 + b (w - 1).
    fitted = torch.addcmul(k3, covariance / variance, growth, value=-1)
    steady = ((1 + growth).square() > 2 / 3 * variance) & (square < HUGE**2)
    whole = growth > -4 * (variance / means["n"]).sqrt()
    # Where all w are one number there is no slope to see. Nor where one is so large that its
    # square is beyond float32.
    slope = variance > EVEN * square
    return torch.where(steady & whole & slope, fitted, k1).nan_to_num(nan=0.0)


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
        nonfinite = most.pop("nonfinite_share")  # of ref, too, where no term is to it
        most = {k: torch.cat([v[1:].amax(0, keepdim=True), v[1:]]) for k, v in most.items()}
        most["nonfinite_share"] = torch.cat([nonfinite.amax(0, keepdim=True), nonfinite[1:]])
    return {
        "coef_mean": means["coef"],
        **least,
        **most,
        "gradient_cosine": cosine,
        "gradient_norm_ratio": ratio,
        "top_share": ratios[3].clamp(max=1.0),
    }


def tally(seen: Sequence[Seen]) -> Tally:
    """The sums of a term; or of a sum as a whole, and then of each of its terms.

    What is summed lies side by side, a tensor once whichever terms have it, and is summed at once:
    to a GPU a small operation costs what a large one does. There are two such sums, and what the
    second one is of takes the room of the first one's.
    """
    if seen[0].gradient.dtype == torch.float64:
        seen = [_held(s) for s in seen]
    acting = [s for s in seen if s.coefficient is not None]
    # Where the two are one, their product is a square.
    apart = [s for s in acting if s.principled is not s.gradient]
    acting = [*apart, *(s for s in acting if s.principled is s.gradient)]
    forces = [s.gradient for s in acting]
    held = [s for s in seen if s.saturating or s.log_ratio is not None]
    sizes: list[Tensor] = []
    _add(sizes, (s.log_ratio for s in seen))
    ratios = sizes[:]
    of_forces = _adjacent(sizes, forces)
    _add(sizes, (s.coefficient for s in acting))
    others: list[Tensor] = []
    _add(others, (x for s in seen for x in (s.weight, s.expected, s.sample_weight)))
    given = [*(s.principled for s in apart), *others, *sizes]
    flags: list[Tensor] = []
    of_acting = _adjacent(flags, [s.in_the_kl for s in acting])
    for s in seen:
        _add(flags, (s.in_the_kl, s.numbers, s.counted, s.capped, s.bounded))

    squares = [*_named("square", given), *_named("growth_square", ratios)]
    first = [*_named("product", forces[: len(apart)]), *_named("sum", given[len(apart) :])]
    first += [*_named("", ratios), *_named("k3", ratios)]
    spare = held[:-1] if ratios else held  # the last takes the room of the first growth
    second = [*_named("top", forces), *_named("full", spare), *_named("size", sizes)]
    second += [*_named("full", held[len(spare) :]), *_named("", ratios[1:])]
    second += _named("k3_growth", ratios)
    rows = [*squares, *first, *second, *_named("count", flags)]

    maxima = _nonfinite(seen[0])
    like = seen[0].gradient
    room = like.new_empty((max(len(first), len(second)), *like.shape))
    of_first, of_second = room[-len(first) :], room[-len(second) :]
    lengths = [len(forces), len(spare), len(sizes), len(ratios), len(ratios)]
    top, full, size, growth, k3 = of_second.split_with_sizes(lengths)
    sums = like.new_empty((len(rows), like.shape[0]))
    lengths = [len(squares), len(first), len(second), len(flags)]
    squared, first_sums, second_sums, counts = sums.split_with_sizes(lengths)
    wide = torch.float32 if like.device.type == "mps" else torch.float64  # where there is
    totals = like.new_empty(len(rows), dtype=wide)
    summed = len(squares) if any(s.steep for s in seen) else 0

    x = torch.stack(given, out=of_first[: len(given)])
    torch.neg(size[: len(ratios)], out=growth).expm1_()  # w - 1: ``estimate``
    torch.add(growth, size[: len(ratios)], out=k3)
    norm = torch.linalg.vector_norm
    if summed:
        norm(of_first[:summed], dim=(-2, -1), dtype=wide, out=totals[:summed]).square_()
    else:
        norm(of_first[: len(squares)], dim=-1, out=squared).square_()
    if apart:
        x[: len(apart)].mul_(size[of_forces][: len(apart)])
    torch.sum(of_first, -1, out=first_sums)

    k3.mul_(growth)
    size.abs_()
    most = _by(sizes, size.amax((-2, -1)) if size.numel() else size.sum((-2, -1)))
    force, growths = size[of_forces], growth.unbind()
    size_of, growth_of = _by(sizes, size), dict(zip(map(id, ratios), growths, strict=True))
    for s, row in zip(held, [*full.unbind(), *growths[:1]], strict=True):
        # In the dtype of the numbers: a bool takes four times as long on a CPU.
        torch.ge(_largest_of(s, size_of, growth_of), largest(like), out=row)
    bits = torch.stack(flags).view(torch.uint8)
    torch.sum(bits, -1, dtype=like.dtype, out=counts)
    less, threshold = _largest(force, counts[of_acting].sum(-1, dtype=torch.long))
    torch.sub(force, threshold[:, None, None], out=top).clamp_(min=0)
    torch.sum(of_second, -1, out=second_sums)

    # The sum of a row may be inf, and of two such rows no number.
    torch.sum(sums[summed:].nan_to_num_(0.0), -1, dtype=wide, out=totals[summed:])
    tops = totals[len(squares) + len(first) :][: len(forces)]
    tops.addcmul_(less, threshold, value=-1)
    if like.dtype == wide:
        finite_(totals)
    made = {(what, id(x)): total for (what, x), total in zip(rows, totals.unbind(), strict=True)}
    found = {
        s.name + key: made[what, id(x)]
        for s in seen
        for key, (what, x) in _asked(s).items()
        if (what, id(x)) in made
    }
    maxima |= {s.name + "coef_max": most[id(s.coefficient)] for s in acting}
    return Tally(found, maxima)


def _held(s: Seen) -> Seen:
    """In float64, whose sums have no wider dtype: held where squares are still numbers."""
    gradient = s.gradient.clamp(-LARGEST, LARGEST)
    alike = s.principled is s.gradient
    return replace(
        s,
        gradient=gradient,
        principled=gradient if alike else s.principled.clamp(-LARGEST, LARGEST),
    )


def _asked(s: Seen) -> dict[str, tuple[str, object]]:
    """By name, what is summed of what; what is not at hand has no sum."""
    x, c, force = s.log_ratio, s.coefficient, s.gradient
    return {
        "tokens": ("count", s.numbers),
        "acting": ("count", s.in_the_kl),
        "counted": ("count", s.counted),
        "capped": ("count", s.capped),
        "bounded": ("count", s.bounded),
        "overflow": ("full", s),
        "k1": ("sum", x),
        "k1_square": ("square", x),
        "abs": ("size", x),
        "k3": ("k3", x),
        "growth_square": ("growth_square", x),
        "k3_growth": ("k3_growth", x),
        "topk" if s.is_bound else "exact": ("sum", s.expected),
        "weight": ("sum", s.weight),
        "weight_square": ("square", s.weight),
        "sample_weight": ("sum", s.sample_weight),
        "coef": ("size", c),
        "gradient_size": ("size", force),
        "gradient_square": ("square", force),
        "principled_square": ("square", s.principled),
        "gradient_principled": ("square" if s.principled is force else "product", force),
        "top_size": ("top", force),
    }


def _named(what: str, of: Sequence[object]) -> list[tuple[str, object]]:
    return [(what, x) for x in of]


def _largest_of(s: Seen, size: Mapping[int, Tensor], growth: Mapping[int, Tensor]) -> Tensor:
    """At each token the largest of what may be the dtype's largest number."""
    numbers = [size[id(x)] if x is s.coefficient else x for x in s.saturating]
    if s.log_ratio is not None:
        numbers.append(growth[id(s.log_ratio)])
    return functools.reduce(torch.maximum, numbers)


def _add(rows: list[Tensor], tensors: Iterable[Tensor | None]) -> None:
    """Each that is there, once."""
    for tensor in tensors:
        if tensor is not None:
            _adjacent(rows, [tensor])


def _adjacent(rows: list[Tensor], tensors: list[Tensor]) -> slice:
    """Where they stand side by side, at the end if they did not."""
    n = len(tensors)
    for i in range(len(rows) - n + 1):
        if all(a is b for a, b in zip(rows[i : i + n], tensors, strict=True)):
            return slice(i, i + n)
    rows += tensors
    return slice(len(rows) - n, len(rows))


def _by(tensors: Sequence[Tensor], values: Tensor) -> dict[int, Tensor]:
    """``values`` by the id of the tensor that each is of, which may stand in several places."""
    return dict(zip(map(id, tensors), values.unbind(), strict=False))


def _nonfinite(whole: Seen) -> dict[str, Tensor]:
    """By tensor, 1 if one of its counted numbers is none, else 0."""
    if not whole.inputs:
        return {}
    dtype = whole.gradient.dtype
    x = torch.stack([tensor.to(dtype) for tensor in whole.inputs.values()])
    total = masked_(x, whole.counted).sum((-2, -1))
    found = (total - total).nan_to_num(nan=1.0)
    return {
        f"nonfinite/{name}": value for name, value in zip(whole.inputs, found.unbind(), strict=True)
    }


def _largest(size: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Minus how many are the largest ``TOP`` of the counted entries, and where these begin.

    The sum of the k largest is the least of ``k t + sum(max(x - t, 0))`` over thresholds t, reached
    from the k-th largest to the next (Rockafellar and Uryasev 2000). Beyond ``SAMPLE`` entries t is
    that of an evenly spaced sample, for sorting costs more than all other metrics: near the minimum
    that shifts the sum upwards by a second order.

    Args:
        size: (n, B, T), not negative, zero where masked.
        tokens: (n,), how many are counted.

    Returns:
        (n,) each. Minus, for the ceiling of a quotient is no operation.
    """
    if not size.numel():
        return size.new_zeros(len(size)), size.new_zeros(len(size))
    every = size[0].numel() // SAMPLE | 1
    sample = size.flatten(1)[:, ::every]
    n = sample.shape[1]
    most = sample.topk(min(n, int(TOP * n) + 2)).values
    rank = torch.div(tokens, every * round(1 / TOP), rounding_mode="floor")
    minus = torch.div(tokens, -round(1 / TOP), rounding_mode="floor")
    return minus, most.gather(1, rank[:, None])[:, 0]
