"""The exact KL of every token: the expectation over the whole vocabulary, in one chunked pass.

A sampled estimate has one number per token, the log-ratio of the token that was drawn. Policy and
reference are at hand as hidden states and output matrices, so the sum over all tokens can be taken
instead: no noise, no importance ratio of the own token, and never negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

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
        ref_log_probs: log ref of the targets; detached.
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
    for name, number in (("temperature", temperature), ("softcap", softcap)):
        if number is not None and not (0 < number < math.inf):
            raise ValueError(f"{name}={number!r} must be a positive number")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a positive number of logits, or None")
    held, tile = (_HELD, _TILE) if hidden.device.type == "cpu" else (_HELD_ON_GPU, _TILE_ON_GPU)
    held = held if chunk is None else chunk
    scaling = _Scaling(temperature, softcap)
    plan = _Plan(row, scaling, held, min(tile, held), group, torch.is_grad_enabled())
    tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    with torch.autocast(hidden.device.type, enabled=False):
        results = _ExactKL.apply(plan, targets, *tensors)  # type: ignore[no-untyped-call]
    return ExactKL(*results)


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
    given = {
        "hidden": hidden,
        "weight": weight,
        "ref_hidden": ref_hidden,
        "ref_weight": ref_weight,
        "bias": bias,
        "ref_bias": ref_bias,
    }
    for name, tensor in given.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be token ids, integers, got {targets.dtype}")
    for name in ("hidden", "weight", "ref_hidden", "ref_weight"):
        tensor = given[name]
        if tensor is not None and tensor.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {tuple(tensor.shape)}")
    tokens, vocabulary = len(hidden), len(weight)
    if ref_weight.shape[0] != vocabulary:
        raise ValueError(
            f"ref_weight has {ref_weight.shape[0]} rows and weight {vocabulary}: "
            "policy and reference must have one vocabulary"
        )
    for name, tensor, shape in (
        ("hidden", hidden, (tokens, weight.shape[1])),
        ("ref_hidden", ref_hidden, (tokens, ref_weight.shape[1])),
        ("targets", targets, (tokens,)),
        ("bias", bias, (vocabulary,)),
        ("ref_bias", ref_bias, (vocabulary,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, and must have {shape}")
    for name, tensor in (*given.items(), ("targets", targets)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden is on {hidden.device}")
    if hidden.device.type == "cpu" and tokens:  # elsewhere the look would wait for the device
        low, high = int(targets.min()), int(targets.max())
        whole = vocabulary * (dist.get_world_size(group) if group is not None else 1)
        if low < 0 or high >= whole:
            wrong = low if low < 0 else high
            raise ValueError(f"targets has the token {wrong}; allowed: 0 to {whole - 1}")


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

    def reduced_(self, x: Tensor, maximum: bool = False) -> Tensor:
        """The sum over the shards of the vocabulary."""
        if self.group is not None:
            operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
            dist.all_reduce(x, operation, group=self.group)
        return x


@dataclass(frozen=True)
class _Head:
    """Hidden states, and the output matrix (or this rank's shard of it) that they meet."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    plan: _Plan
    dtype: torch.dtype

    @classmethod
    def pair(cls, plan: _Plan, tensors: Sequence[Tensor | None]) -> tuple[_Head, _Head]:
        """The policy's and the reference's; all work is in the widest of their dtypes."""
        dtype = torch.float32
        for tensor in tensors:
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        policy, reference = (
            cls(cast(Tensor, hidden), cast(Tensor, weight), bias, plan, dtype)
            for hidden, weight, bias in (tensors[:3], tensors[3:])
        )
        return policy, reference

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


class _Tile(NamedTuple):
    """Both distributions, for some tokens and some of the vocabulary."""

    log_p: Tensor
    log_ratio: Tensor
    p: Tensor

    @classmethod
    def of(cls, z: Tensor, r: Tensor, policy: _Normaliser, reference: _Normaliser) -> _Tile:
        log_p = policy.log_softmax(z)
        # Of the logits themselves: close ones are subtracted without a rounding.
        log_ratio = (z - r).sub_(policy.minus(reference))
        return cls(log_p, log_ratio, log_p.exp())


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
        policy, reference = _Head.pair(plan, tensors)
        of_hidden, *of_matrix = ctx.needs_input_grad[2:5]
        frozen = plan.differentiated and of_hidden and not any(of_matrix)
        of_kl = torch.zeros_like(policy.hidden, dtype=policy.dtype) if frozen else None
        kept = torch.empty((9, len(targets)), dtype=policy.dtype, device=targets.device)
        for rows in _slices(len(targets), plan.held // len(policy.weight)):
            z, r = policy.all_logits(rows), reference.all_logits(rows)
            kept[:, rows] = _sums(plan, z, r, policy.local(targets[rows]), overwritten=frozen)
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
        policy, reference = _Head.pair(plan, tensors)
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


def _sums(plan: _Plan, z: Tensor, r: Tensor, targets: Tensor, *, overwritten: bool) -> Tensor:
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
        tile = _Tile.of(z[:, columns], r[:, columns], policy, reference)
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
    reference: _Head,
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
                r = reference.logits(rows, columns)
                tile = _Tile.of(z, r, kept.policy.of(rows), kept.reference.of(rows))
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
