"""The exact KL of every token: the expectation over the whole vocabulary, in one chunked pass.

A sampled estimate has one number per token, the log-ratio of the token that was drawn. Policy and
reference are at hand as hidden states and output matrices, so the sum over all tokens can be taken
instead: no noise, no importance ratio of the own token, and never negative. Of a reference that
sends no hidden states K tokens and one category of all others will do: a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor

Density = Callable[[Tensor, Tensor, Tensor], Tensor]


class ExactKL(NamedTuple):
    """What one pass gives, each (N,), in nats per token, float32 at least.

    Attributes:
        kl: the divergence from reference to policy, ``sum_v ref f(pi / ref)``; differentiable.
        entropy: of the policy; differentiable.
        log_probs: log pi of the targets; differentiable.
        ref_log_probs: log ref of the targets; detached. Of ``topk_kl`` nan where it is not known.
    """

    kl: Tensor
    entropy: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor


@dataclass(frozen=True)
class Divergence:
    """``E_ref f(u)``, ``u = p/q``, as a sum over the vocabulary of products that can't overflow.

    Both are functions of ``log p``, ``log u`` and ``p``. With f normalised to f(1) = f'(1) = 0,
    ``value`` is ``q f(u)``: no term is negative, and a normaliser that is off by one ulp enters
    in second order only. ``slope`` is ``p (f'(u) - f'(1))``: the registry's coefficient, times p.
    """

    value: Density
    slope: Density


def difference(x: Tensor, y: Tensor, log_ratio: Tensor) -> Tensor:
    """``x - y`` with all its digits where they are close; ``log_ratio`` is ``log(x/y)``."""
    return torch.tanh(log_ratio / 2).mul_(x + y)


def _less_reference(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    """``p - q``."""
    return difference(p, (log_p - log_ratio).exp_(), log_ratio)


def _reverse_slope(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return p * log_ratio


def _reverse(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return _less_reference(log_p, log_ratio, p).neg_().addcmul_(p, log_ratio)


def _forward(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    q = (log_p - log_ratio).exp_()
    return difference(p, q, log_ratio).addcmul_(q, log_ratio, value=-1)


def _jeffreys(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return _less_reference(log_p, log_ratio, p).mul_(log_ratio)


def _jeffreys_slope(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return _less_reference(log_p, log_ratio, p).addcmul_(p, log_ratio)


def _tilt(log_ratio: Tensor) -> Tensor:
    """``(p - q)/(p + q)``, short of -1 and 1, whose logarithms would meet a factor 0."""
    largest = 1 - torch.finfo(log_ratio.dtype).eps
    return torch.tanh(log_ratio / 2).clamp_(-largest, largest)


def _js(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    tilt = _tilt(log_ratio)
    of_reference = torch.log1p(-tilt).mul_((log_p - log_ratio).exp_())
    return of_reference.addcmul_(p, torch.log1p(tilt))


def _js_slope(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return torch.log1p(_tilt(log_ratio)).mul_(p)


def _tv(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return _less_reference(log_p, log_ratio, p).abs_().div_(2)


def _tv_slope(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return torch.sign(log_ratio).mul_(p).div_(2)


def alpha_divergence(alpha: float, factor: float = 1.0) -> Divergence:
    """``factor`` times D_a: f = (t^a - a t - (1 - a)) / (a (a - 1)); see the estimator ``alpha``.

    ``p^a q^(1-a)`` is held where a sum over any vocabulary is still finite.
    """

    def between(log_p: Tensor, log_ratio: Tensor) -> Tensor:
        exponent = log_p + (alpha - 1) * log_ratio
        return exponent.clamp_(max=math.log(torch.finfo(log_p.dtype).max) - 40).exp_()

    def value(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
        q = (log_p - log_ratio).exp_()
        powers = difference(between(log_p, log_ratio), q, alpha * log_ratio)
        powers -= alpha * difference(p, q, log_ratio)
        return powers.mul_(factor / (alpha * (alpha - 1)))

    def slope(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
        powers = difference(between(log_p, log_ratio), p, (alpha - 1) * log_ratio)
        return powers.mul_(factor / (alpha - 1))

    return Divergence(value, slope)


# By the name of the estimator whose expectation over the vocabulary it is.
DIVERGENCES: dict[str, Divergence] = {
    "k2": Divergence(_reverse, _reverse_slope),
    "forward": Divergence(_forward, _less_reference),
    "js": Divergence(_js, _js_slope),
    "jeffreys": Divergence(_jeffreys, _jeffreys_slope),
    "chi2": alpha_divergence(2.0, factor=2.0),
    "hellinger": alpha_divergence(0.5, factor=0.5),
    "tv": Divergence(_tv, _tv_slope),
}

_INSTEAD = {
    "k1": "'k2' is its exact form: KL(pi||ref)",
    "k3": "'k2' is what its value estimates, 'forward' what its derivative does",
    "abs": "'tv' is half of it",
}

# Logits of one policy held at once, and those that elementwise work is done on at once: on a CPU
# a tile stays within the caches. Measured in benchmarks/results/exact.md.
_HELD, _HELD_ON_GPU = 2**24, 2**27
_TILE, _TILE_ON_GPU = 2**20, 2**25
# Tokens for which the backward walks along the output matrix once.
_ROWS = 1024


def exact_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    *,
    divergence: str = "k2",
    alpha: float | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    group: Any = None,
) -> ExactKL:
    """Divergence, entropy and log-probs of N tokens over the whole vocabulary, without its logits.

    ``kl = sum_v pi (log pi - log ref)`` for ``k2``, in the direction KL(pi||ref); for a divergence
    ``sum_v ref f(pi/ref)``. Logits are ``softcap tanh((hidden weight^T + bias)/softcap) /
    temperature``. Value and gradient are exact, for the given prefixes: nothing is estimated, so
    neither has a bias. Differentiated is the policy; the reference is held fixed.

    Logits are made a chunk at a time and, where the output matrix is trained, made again in the
    backward, for any per-token weights that come to ``kl``, ``entropy`` and ``log_probs``. Where it
    is frozen, the gradient of ``kl`` towards ``hidden`` is kept instead, and a backward of ``kl``
    alone makes nothing again. A token whose weights are 0 adds nothing, whatever it holds.

    Args:
        hidden: (N, H), the policy's last hidden states, one row per predicted token.
        weight: (V, H), its output matrix.
        ref_hidden: (N, H'), the reference's, at the same prefixes; its width may be another.
        ref_weight: (V, H'), the reference's output matrix; may be ``weight`` itself.
        targets: (N,), the tokens whose log-probs are wanted, integers in [0, V).
        divergence: ``k2`` (the reverse KL), ``forward``, ``js``, ``jeffreys``, ``chi2``,
            ``hellinger``, ``tv`` or ``alpha``, each as the estimator of that name.
        alpha: for ``alpha``, 1/2 if left out; neither 0 nor 1.
        bias, ref_bias: (V,), finite.
        temperature: divides the logits of both, after ``softcap``.
        softcap: bound of the logits of both, where the model has one.
        chunk: logits of one policy to be held at once, at least one token's: 2^24 on a CPU and
            2^27 elsewhere. It decides memory, and no number beyond rounding.
        group: a process group over which the vocabulary is cut into equal shards, in the order of
            the ranks. ``weight``, ``bias`` and the reference's are the rank's own rows, everything
            else is whole and the same on all ranks; so are the results, and the gradient of
            ``hidden``, which is summed over the group here.

    Returns:
        ``ExactKL``: four (N,) tensors in float32, or float64 where an input is float64.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, by name.

    Source: Rao-Blackwell form of the sampled estimators, arXiv 2504.10637.
    """
    row = _divergence(divergence, alpha)
    _check(hidden, weight, ref_hidden, ref_weight, targets, bias, ref_bias, group)
    plan = _plan(row, hidden, temperature, softcap, chunk, group, _Head)
    return _results(plan, targets, (hidden, weight, bias, ref_hidden, ref_weight, ref_bias))


def topk_kl(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_ids: Tensor,
    ref_log_probs: Tensor,
    *,
    divergence: str = "k2",
    alpha: float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    group: Any = None,
) -> ExactKL:
    """``exact_kl`` of K + 1 categories: K tokens of each place, and all others as one.

    ``kl = sum_k pi_k (log pi_k - log ref_k) + pi_rest (log pi_rest - log ref_rest)`` for ``k2``, in
    the direction KL(pi||ref), and ``sum ref f(pi/ref)`` over the categories for a divergence. For
    a reference, or a teacher, that can send the log-probs of its most likely tokens and no hidden
    states. Any tokens will do: merging categories never adds to a divergence, so ``kl`` is at most
    that of the whole vocabulary, and equal to it where K is V, or where pi/ref is one number over
    all others. Value and gradient are exact for the categories. As estimates of the whole KL they
    are biased, the value downwards; how far is in ``docs/exact.md``. Entropy and log-probs of the
    policy are over the whole vocabulary.

    Args:
        hidden, weight, targets, divergence, alpha, bias, temperature, softcap, chunk, group: as
            ``exact_kl`` has them.
        ref_ids: (N, K), tokens of the reference at the same prefixes, integers in [0, V), each
            once; whole on all ranks.
        ref_log_probs: (N, K), log ref of these tokens in nats, normalised over the reference's
            whole vocabulary at the same temperature. What they leave of 1 is ref_rest. Less than
            the rounding of their dtype counts as that: so hand them in as float32, not as halves.

    Returns:
        ``ExactKL``: four (N,) tensors in float32, or float64 where an input is float64.
        ``ref_log_probs`` is nan where the target is not among ``ref_ids``.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, by name.

    Source: klplug; the data-processing inequality, Csiszar 1967.
    """
    row = _divergence(divergence, alpha)
    _check_policy(hidden, weight, targets, bias, group)
    _check_top(hidden, weight, ref_ids, ref_log_probs, group)
    plan = _plan(row, hidden, temperature, softcap, chunk, group, _Top)
    found = _results(plan, targets, (hidden, weight, bias, ref_ids, ref_log_probs, None))
    is_target = ref_ids == targets[:, None]
    of_target = ref_log_probs.detach().to(found.kl.dtype).where(is_target, 0.0).sum(-1)
    return found._replace(ref_log_probs=of_target.where(is_target.any(-1), torch.nan))


def top_log_probs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What a reference sends for ``topk_kl``: its K most likely tokens and their log-probs.

    Args:
        hidden, weight, bias, temperature, softcap, chunk: of the reference, as ``exact_kl`` has
            them of the policy.
        k: how many; all of a smaller vocabulary.

    Returns:
        ids (N, K), int64, the most likely first, and log-probs (N, K) in nats over the whole
        vocabulary, float32 or float64; both detached.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, by name.
    """
    _check_head("", hidden, weight, bias, hidden)
    if k < 1:
        raise ValueError(f"k={k!r} must be a number of tokens, at least 1")
    plan = _plan(DIVERGENCES["k2"], hidden, temperature, softcap, chunk, None, _Head)
    k = min(k, len(weight))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias, plan, _widest((hidden, weight, bias)))
        ids = torch.empty((len(hidden), k), dtype=torch.long, device=hidden.device)
        log_probs = torch.empty((len(hidden), k), dtype=head.dtype, device=hidden.device)
        for rows in _slices(len(hidden), plan.held // len(weight)):
            logits = head.all_logits(rows)
            top = logits.topk(k)
            ids[rows] = top.indices
            log_probs[rows] = top.values - logits.logsumexp(-1, keepdim=True)
    return ids, log_probs


def _results(plan: _Plan, targets: Tensor, tensors: Sequence[Tensor | None]) -> ExactKL:
    with torch.autocast(targets.device.type, enabled=False):
        return ExactKL(*_ExactKL.apply(plan, targets, *tensors))  # type: ignore[no-untyped-call]


def _plan(
    divergence: Divergence,
    hidden: Tensor,
    temperature: float,
    softcap: float | None,
    chunk: int | None,
    group: Any,
    reference: type[_Head] | type[_Top],
) -> _Plan:
    for name, number in (("temperature", temperature), ("softcap", softcap)):
        if number is not None and not (0 < number < math.inf):
            raise ValueError(f"{name}={number!r} must be a positive number")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a positive number of logits, or None")
    held, tile = (_HELD, _TILE) if hidden.device.type == "cpu" else (_HELD_ON_GPU, _TILE_ON_GPU)
    held = held if chunk is None else chunk
    scaling = _Scaling(temperature, softcap)
    differentiated = torch.is_grad_enabled()
    return _Plan(divergence, scaling, held, min(tile, held), group, differentiated, reference)


def _divergence(name: str, alpha: float | None) -> Divergence:
    if name == "alpha":
        alpha = 0.5 if alpha is None else alpha
        if not math.isfinite(alpha) or alpha in (0, 1):
            raise ValueError(f"alpha={alpha!r} must be finite, and neither 0 nor 1")
        return alpha_divergence(alpha)
    if alpha is not None:
        raise ValueError(f"alpha={alpha!r} is for divergence='alpha', not for {name!r}")
    if name not in DIVERGENCES:
        known = ", ".join([*DIVERGENCES, "alpha"])
        raise ValueError(
            f"divergence {name!r} has no form over the vocabulary; known: {known}. "
            + _INSTEAD.get(name, "")
        )
    return DIVERGENCES[name]


def _check(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    group: Any,
) -> None:
    _check_policy(hidden, weight, targets, bias, group)
    _check_head("ref_", ref_hidden, ref_weight, ref_bias, hidden)
    if len(ref_weight) != len(weight):
        raise ValueError(
            f"ref_weight has {len(ref_weight)} rows and weight {len(weight)}: "
            "policy and reference must have one vocabulary"
        )


def _check_policy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, group: Any
) -> None:
    _check_head("", hidden, weight, bias, hidden)
    _check_tokens("targets", targets, (len(hidden),), hidden, weight, group)


def _check_head(
    whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, policy: Tensor
) -> None:
    given = {f"{whose}hidden": hidden, f"{whose}weight": weight, f"{whose}bias": bias}
    for name, tensor in given.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
        if tensor is not None and tensor.dim() != 2 and tensor is not bias:
            raise ValueError(f"{name} must have two dimensions, got shape {tuple(tensor.shape)}")
    _check_shape(f"{whose}hidden", hidden, (len(policy), weight.shape[1]), policy)
    _check_device(f"{whose}weight", weight, policy)
    if bias is not None:
        _check_shape(f"{whose}bias", bias, (len(weight),), policy)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], policy: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, and must have {shape}")
    _check_device(name, tensor, policy)


def _check_device(name: str, tensor: Tensor, policy: Tensor) -> None:
    if tensor.device != policy.device:
        raise ValueError(f"{name} is on {tensor.device}, hidden is on {policy.device}")


def _check_tokens(
    name: str, ids: Tensor, shape: tuple[int, ...], policy: Tensor, weight: Tensor, group: Any
) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be token ids, integers, got {ids.dtype}")
    _check_shape(name, ids, shape, policy)
    if policy.device.type == "cpu" and len(ids):  # elsewhere the look would wait for the device
        low, high, whole = int(ids.min()), int(ids.max()), _vocabulary(weight, group)
        if low < 0 or high >= whole:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} has the token {wrong}; allowed: 0 to {whole - 1}")


def _vocabulary(weight: Tensor, group: Any) -> int:
    return len(weight) * (dist.get_world_size(group) if group is not None else 1)


# Above 1 by more than rounding, even of halves: these were never the log-probs of one softmax.
_SUM_OF_PROBABILITIES = 1.05


def _check_top(
    hidden: Tensor, weight: Tensor, ref_ids: Tensor, ref_log_probs: Tensor, group: Any
) -> None:
    size, whole = ref_ids.shape[-1] if ref_ids.dim() == 2 else 0, _vocabulary(weight, group)
    if not 1 <= size <= whole:
        raise ValueError(
            f"ref_ids has shape {tuple(ref_ids.shape)}, and must have (N, K), K from 1 to {whole}"
        )
    _check_tokens("ref_ids", ref_ids, (len(hidden), size), hidden, weight, group)
    if not ref_log_probs.is_floating_point():
        raise ValueError(f"ref_log_probs must be floating-point, got {ref_log_probs.dtype}")
    _check_shape("ref_log_probs", ref_log_probs, (len(hidden), size), hidden)
    if hidden.device.type != "cpu" or not len(hidden):
        return
    sums = ref_log_probs.detach().exp().sum(-1)
    wrong = sums[sums > _SUM_OF_PROBABILITIES]
    if len(wrong):
        raise ValueError(
            f"ref_log_probs has probabilities that sum to {float(wrong[0]):.3g} at one place; "
            "allowed: log-probs over the whole vocabulary, so 1 at most"
        )
    # Where there are no numbers, as in padding, the tokens may be any.
    if (ref_ids[sums.isfinite()].sort(-1).values.diff(dim=-1) == 0).any():
        raise ValueError("ref_ids has a token twice at one place; allowed: each once")


@dataclass(frozen=True)
class _Scaling:
    """What a model does to its logits before the softmax."""

    temperature: float
    softcap: float | None

    def scaled_(self, logits: Tensor) -> Tensor:
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def back_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient towards the logits before scaling, given that towards them after it."""
        if self.softcap is not None:
            gradient -= gradient * (logits * (self.temperature / self.softcap)).square_()
        return gradient if self.temperature == 1 else gradient.div_(self.temperature)


@dataclass(frozen=True)
class _Plan:
    """All but the tensors."""

    divergence: Divergence
    scaling: _Scaling
    held: int
    tile: int
    group: Any
    differentiated: bool
    reference: type[_Head] | type[_Top]

    def reduced_(self, x: Tensor, maximum: bool = False) -> Tensor:
        """The sum over the shards of the vocabulary."""
        if self.group is not None:
            operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
            dist.all_reduce(x, operation, group=self.group)
        return x


def _widest(tensors: Sequence[Tensor | None]) -> torch.dtype:
    """Of their dtypes and float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _pair(plan: _Plan, tensors: Sequence[Tensor | None]) -> tuple[_Head, _Reference]:
    """The policy and the reference; all work is in the widest of their dtypes."""
    hidden, weight, bias, *of_reference = tensors
    dtype = _widest(tensors)
    policy = _Head(cast(Tensor, hidden), cast(Tensor, weight), bias, plan, dtype)
    return policy, plan.reference.beside(policy, *of_reference)


@dataclass(frozen=True)
class _Head:
    """Hidden states, and the output matrix (or this rank's shard of it) that they meet."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    plan: _Plan
    dtype: torch.dtype

    @classmethod
    def beside(cls, policy: _Head, *given: Tensor | None) -> _Head:
        hidden, weight, bias = given
        return cls(cast(Tensor, hidden), cast(Tensor, weight), bias, policy.plan, policy.dtype)

    def local(self, targets: Tensor) -> Tensor:
        """Tokens, counted from the first one of this rank's shard."""
        group = self.plan.group
        return targets if group is None else targets - len(self.weight) * dist.get_rank(group)

    def columns(self, rows: int) -> Iterator[slice]:
        """The vocabulary in pieces: a tile of logits each, and no more of the matrix than held."""
        vocabulary, width = self.weight.shape
        return _slices(vocabulary, min(self.plan.tile // rows, self.plan.held // max(1, width)))

    def logits(self, rows: slice, columns: slice, out: Tensor | None = None) -> Tensor:
        logits = _product(self.hidden[rows], self.weight[columns].T, self.dtype, out)
        if self.bias is not None:
            logits += self.bias[columns].to(self.dtype)
        return self.plan.scaling.scaled_(logits)

    def all_logits(self, rows: slice) -> Tensor:
        size = rows.stop - rows.start, len(self.weight)
        logits = self.hidden.new_empty(size, dtype=self.dtype)
        for columns in self.columns(size[0]):
            self.logits(rows, columns, out=logits[:, columns])
        return logits

    def without(self, rows: Tensor) -> _Head:
        """The same, with zeros for the hidden states of some tokens."""
        return replace(self, hidden=self.hidden.masked_fill(rows[:, None], 0.0))

    def scores(self, rows: slice, z: Tensor) -> Tensor:
        """(n, V), whose normaliser ``log_ratio`` is given."""
        return self.all_logits(rows)

    def log_ratio(self, at: _At, log_p: Tensor, z: Tensor, r: Tensor | None) -> Tensor:
        """``log pi - log ref`` in a tile; ``r`` is that tile of ``scores``, where it is kept."""
        r = self.logits(at.rows, at.columns) if r is None else r
        # Of the logits themselves: close ones are subtracted without a rounding.
        return (z - r).sub_(at.policy.minus(at.reference))


@dataclass(frozen=True)
class _Top:
    """Some tokens' log-probs by the reference, and one category of all others.

    Within that category pi/ref is one number. So a divergence of K + 1 categories is that of the
    whole vocabulary to a reference that has the others in the policy's own proportions, and its
    gradient is that one's.

    Attributes:
        ids: (N, K), counted from the first token of this rank's shard.
        log_probs: (N, K).
        log_rest: (N, 1), of all others.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor

    @classmethod
    def beside(cls, policy: _Head, *given: Tensor | None) -> _Top:
        ids, sent = cast(Tensor, given[0]), cast(Tensor, given[1])
        log_probs = sent.to(policy.dtype)
        rest = 1 - log_probs.exp().sum(-1, keepdim=True)
        log_rest = rest.clamp(min=torch.finfo(sent.dtype).eps).log()
        return cls(policy.local(ids), log_probs, log_rest)

    def without(self, rows: Tensor) -> _Top:
        """The same, with log-probs of zero at some tokens."""
        log_probs, log_rest = (
            x.masked_fill(rows[:, None], 0.0) for x in (self.log_probs, self.log_rest)
        )
        return _Top(self.ids, log_probs, log_rest)

    def scores(self, rows: slice, z: Tensor) -> Tensor:
        """The policy's logits of all other tokens: their normaliser has log pi_rest."""
        return self._scattered(z, slice(0, z.shape[-1]), rows, -torch.inf)

    def log_ratio(self, at: _At, log_p: Tensor, z: Tensor, r: Tensor | None) -> Tensor:
        # Where K is V there are no others: this is no number, and stands nowhere.
        of_rest = at.reference.minus(at.policy) - self.log_rest[at.rows]
        index = self._index(at.rows, at.columns)
        here = index.clamp(max=log_p.shape[-1] - 1)
        own = log_p.gather(-1, here) - self.log_probs[at.rows]
        return self._scattered(of_rest.expand_as(log_p), at.columns, at.rows, own)

    def _index(self, rows: slice, columns: slice) -> Tensor:
        """Of the tokens in a tile; of those elsewhere, the column after its last."""
        index, width = self.ids[rows] - columns.start, columns.stop - columns.start
        found: Tensor = index.where((index >= 0) & (index < width), width)
        return found

    def _scattered(self, x: Tensor, columns: slice, rows: slice, own: Tensor | float) -> Tensor:
        """A copy of a tile with ``own`` at these tokens."""
        wide = x.new_empty(x.shape[0], x.shape[1] + 1)
        wide[:, :-1] = x
        index = self._index(rows, columns)
        filled = own if isinstance(own, Tensor) else x.new_full((1, 1), own).expand_as(index)
        wide.scatter_(-1, index, filled)
        return wide[:, :-1]


_Reference: TypeAlias = _Head | _Top


@dataclass(frozen=True)
class _Normaliser:
    """``log sum exp`` of each token's logits, (n, 1), in two parts: a sum would lose digits."""

    maximum: Tensor
    log_sum: Tensor

    def of(self, rows: slice) -> _Normaliser:
        return _Normaliser(self.maximum[rows], self.log_sum[rows])

    def log_softmax(self, logits: Tensor) -> Tensor:
        return (logits - self.maximum).sub_(self.log_sum)

    def minus(self, other: _Normaliser) -> Tensor:
        return (self.maximum - other.maximum) + (self.log_sum - other.log_sum)


class _At(NamedTuple):
    """Some tokens and some of the vocabulary, with the normalisers of these tokens."""

    rows: slice
    columns: slice
    policy: _Normaliser
    reference: _Normaliser


class _Tile(NamedTuple):
    """Both distributions, for some tokens and some of the vocabulary."""

    log_p: Tensor
    log_ratio: Tensor
    p: Tensor

    @classmethod
    def of(cls, reference: _Reference, at: _At, z: Tensor, r: Tensor | None = None) -> _Tile:
        log_p = at.policy.log_softmax(z)
        return cls(log_p, reference.log_ratio(at, log_p, z, r), log_p.exp())


@dataclass(frozen=True)
class _Kept:
    """What the forward finds out about each token, (N,) each."""

    kl: Tensor
    entropy: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    mean_slope: Tensor
    maximum: Tensor
    log_sum: Tensor
    ref_maximum: Tensor
    ref_log_sum: Tensor

    @property
    def policy(self) -> _Normaliser:
        return _Normaliser(self.maximum[:, None], self.log_sum[:, None])

    @property
    def reference(self) -> _Normaliser:
        return _Normaliser(self.ref_maximum[:, None], self.ref_log_sum[:, None])


class _ExactKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, targets: Tensor, *tensors: Tensor | None) -> Any:
        policy, reference = _pair(plan, tensors)
        of_hidden, *of_matrix = ctx.needs_input_grad[2:5]
        frozen = plan.differentiated and of_hidden and not any(of_matrix)
        of_kl = torch.zeros_like(policy.hidden, dtype=policy.dtype) if frozen else None
        kept = torch.empty((9, len(targets)), dtype=policy.dtype, device=targets.device)
        for rows in _slices(len(targets), plan.held // len(policy.weight)):
            z = policy.all_logits(rows)
            r = reference.scores(rows, z)
            local = policy.local(targets[rows])
            kept[:, rows] = _sums(plan, reference, rows, z, r, local, overwritten=frozen)
            if of_kl is not None:
                gradient = r.addcmul_(z, _Kept(*kept[:, rows, None]).mean_slope, value=-1)
                for columns in policy.columns(len(gradient)):
                    _add_product(of_kl[rows], gradient[:, columns], policy.weight[columns])
            del z, r
        ctx.plan = plan
        ctx.save_for_backward(targets, *tensors, kept, of_kl)
        ctx.set_materialize_grads(False)
        kl, entropy, log_probs, ref_log_probs = kept[:4].clone().unbind()
        ctx.mark_non_differentiable(ref_log_probs)
        return kl, entropy, log_probs, ref_log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        targets, *tensors, kept, of_kl = ctx.saved_tensors
        policy, reference = _pair(plan, tensors)
        gradients = _Gradients.zeros(policy, ctx.needs_input_grad[2:5])
        of_each, hidden = list(weights[:3]), gradients.hidden
        if of_kl is not None and of_each[0] is not None:
            assert hidden is not None
            scale = of_each[0][:, None]
            torch.where(scale != 0, of_kl * scale, hidden, out=hidden)
            of_each[0] = None
        with torch.autocast(kept.device.type, enabled=False):
            if any(weight is not None for weight in of_each):
                local = policy.local(targets)
                _differentiate(gradients, of_each, policy, reference, local, _Kept(*kept))
            if hidden is not None:
                hidden = plan.reduced_(hidden).to(policy.hidden.dtype)
        return None, None, hidden, gradients.weight, gradients.bias, None, None, None


def _sums(
    plan: _Plan,
    other: _Reference,
    rows: slice,
    z: Tensor,
    r: Tensor,
    targets: Tensor,
    *,
    overwritten: bool,
) -> Tensor:
    """The fields of ``_Kept``, of all logits of n tokens: (9, n), by three sums over the shards.

    ``overwritten`` leaves p in ``z`` and the slope in ``r``, towards logits before scaling.
    """
    tokens, vocabulary = z.shape
    tiles = list(_slices(vocabulary, plan.tile // tokens))
    maxima = plan.reduced_(torch.stack([z.amax(-1), r.amax(-1)]), maximum=True)
    # Sums of exponentials, and the logits of the targets: another shard's are zero here.
    sums = torch.zeros((4, tokens), dtype=z.dtype, device=z.device)
    here = (targets >= 0) & (targets < vocabulary)
    index = targets.where(here, 0)[:, None]
    for i, logits in enumerate((z, r)):
        for columns in tiles:
            sums[i] += (logits[:, columns] - maxima[i, :, None]).exp_().sum(-1)
        sums[2 + i] = torch.where(here, logits.gather(-1, index)[:, 0] - maxima[i], 0.0)
    plan.reduced_(sums)
    log_sums, log_probs = sums[:2].log(), sums[2:] - sums[:2].log()
    policy, reference = (
        _Normaliser(*x) for x in zip(maxima[..., None], log_sums[..., None], strict=True)
    )
    value, entropy, mean_slope = expected = torch.zeros_like(sums[:3])
    for columns in tiles:
        at = _At(rows, columns, policy, reference)
        tile = _Tile.of(other, at, z[:, columns], r[:, columns])
        value += plan.divergence.value(*tile).sum(-1)
        entropy -= (tile.p * tile.log_p).sum(-1)
        if plan.differentiated:
            slope = plan.divergence.slope(*tile)
            mean_slope += slope.sum(-1)
            if overwritten:
                r[:, columns] = plan.scaling.back_(slope, z[:, columns])
                z[:, columns] = plan.scaling.back_(tile.p, z[:, columns])
    plan.reduced_(expected)
    value.clamp_(max=torch.finfo(z.dtype).max)
    parts = (value, entropy, *log_probs, mean_slope, maxima[0], log_sums[0], maxima[1], log_sums[1])
    return torch.stack(parts)


@dataclass(frozen=True)
class _Gradients:
    """Of hidden states in the dtype of the work, of output matrix and bias in their own."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, head: _Head, needed: Sequence[bool]) -> _Gradients:
        like = (head.hidden.to(head.dtype), head.weight, head.bias)
        made = (
            torch.zeros_like(x) if need and x is not None else None
            for x, need in zip(like, needed, strict=True)
        )
        return cls(*made)


def _differentiate(
    gradients: _Gradients,
    weights: Sequence[Tensor | None],
    policy: _Head,
    reference: _Reference,
    targets: Tensor,
    kept: _Kept,
) -> None:
    """Add the gradient of ``sum_t w_t x_t``, x being kl, entropy and log_probs, by new logits.

    Towards the logits it is ``w_kl (slope - p mean_slope) - w_entropy p (log p + entropy) +
    w_log_probs (1[v = y] - p)``.
    """
    of_kl, of_entropy, of_log_probs = (
        torch.zeros_like(kept.kl) if w is None else w.to(kept.kl.dtype) for w in weights
    )
    # A token without a weight: 0 times what it holds would be nan, were that no number.
    unused = (of_kl == 0) & (of_entropy == 0) & (of_log_probs == 0)
    policy, reference = policy.without(unused), reference.without(unused)
    kept = _Kept(*(x.masked_fill(unused, 0.0) for x in vars(kept).values()))
    common = of_kl * kept.mean_slope + of_entropy * kept.entropy + of_log_probs
    step = max(1, min(len(targets), _ROWS, policy.plan.tile))
    for columns in policy.columns(step):
        matrix = policy.weight[columns]
        of_matrix = torch.zeros_like(matrix, dtype=policy.dtype)
        for rows in _slices(len(targets), step):
            z = policy.logits(rows, columns)
            if weights[0] is None:
                log_p = kept.policy.of(rows).log_softmax(z)
                p, slope = log_p.exp(), None
            else:
                at = _At(rows, columns, kept.policy.of(rows), kept.reference.of(rows))
                tile = _Tile.of(reference, at, z)
                (log_p, _, p), slope = tile, policy.plan.divergence.slope(*tile)
            gradient = p.mul_(log_p.mul_(-of_entropy[rows, None]).sub_(common[rows, None]))
            if slope is not None:
                gradient.addcmul_(slope, of_kl[rows, None])
            local = targets[rows] - columns.start
            here = (local >= 0) & (local < gradient.shape[-1])
            sampled = of_log_probs[rows].where(here, 0.0)
            gradient.scatter_add_(-1, local.where(here, 0)[:, None], sampled[:, None])
            policy.plan.scaling.back_(gradient, z)
            if gradients.hidden is not None:
                _add_product(gradients.hidden[rows], gradient, matrix)
            if gradients.weight is not None:
                _add_product(of_matrix, gradient.T, policy.hidden[rows])
            if gradients.bias is not None:
                gradients.bias[columns] += gradient.sum(0)
        if gradients.weight is not None:
            gradients.weight[columns] = of_matrix


def _slices(length: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``a b``, neither rounded to less than ``dtype`` nor summed up in less."""
    if _on_tensor_cores(a, b):
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if b.dtype == torch.bfloat16 and _on_tensor_cores(b, b):
        # As autograd would hand it to the matrix product; float16 has too few exponents for it.
        total += torch.mm(a.to(b.dtype), b, out_dtype=total.dtype)
    else:
        total.addmm_(a, b.to(total.dtype))


def _on_tensor_cores(a: Tensor, b: Tensor) -> bool:
    return a.is_cuda and a.dtype == b.dtype and a.dtype in _HALVES and _WIDE_PRODUCTS


_HALVES = (torch.bfloat16, torch.float16)
# Products of halves that are summed up and returned in float32: torch 2.8 has them, on CUDA.
_WIDE_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
