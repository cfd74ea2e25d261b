"""Sums over the vocabulary, for policy and reference at once, a tile of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor

from klplug import tiles
from klplug.divergences import Divergence
from klplug.numerics import HUGE
from klplug.tiles import Kind, Normaliser, Scaling


@dataclass(frozen=True)
class Plan:
    """All but the tensors."""

    divergence: Divergence
    scaling: Scaling
    held: int
    tile: int
    rows: int
    group: Any
    differentiated: bool
    reference: type[Head] | type[Top]
    fused: bool

    @property
    def kind(self) -> Kind:
        return Kind(self.divergence, self.scaling, self.reference.log_ratio)

    def kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return tiles.compiled(function) if self.fused else function

    def reduced_(self, x: Tensor, maximum: bool = False) -> Tensor:
        """The sum over the shards of the vocabulary."""
        if self.group is not None:
            operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
            dist.all_reduce(x, operation, group=self.group)
        return x


def widest(tensors: Sequence[Tensor | None]) -> torch.dtype:
    """Of their dtypes and float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _pair(plan: Plan, tensors: Sequence[Tensor | None]) -> tuple[Head, _Reference]:
    """The policy and the reference; all work is in the widest of their dtypes."""
    hidden, weight, bias, *of_reference = tensors
    dtype = widest(tensors)
    policy = Head(cast(Tensor, hidden), cast(Tensor, weight), bias, plan, dtype)
    return policy, plan.reference.beside(policy, *of_reference)


@dataclass(frozen=True)
class Head:
    """Hidden states, and the output matrix (or this rank's shard of it) that they meet."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    plan: Plan
    dtype: torch.dtype

    @classmethod
    def beside(cls, policy: Head, *given: Tensor | None) -> Head:
        hidden, weight, bias = given
        return cls(cast(Tensor, hidden), cast(Tensor, weight), bias, policy.plan, policy.dtype)

    def local(self, targets: Tensor) -> Tensor:
        """Tokens, counted from the first one of this rank's shard."""
        group = self.plan.group
        return targets if group is None else targets - len(self.weight) * dist.get_rank(group)

    def columns(self, rows: int) -> Iterator[slice]:
        """The vocabulary in pieces: a tile of logits each, and no more of the matrix than held."""
        vocabulary, width = self.weight.shape
        return slices(vocabulary, min(self.plan.tile // rows, self.plan.held // max(1, width)))

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

    def without(self, rows: Tensor) -> Head:
        """The same, with zeros for the hidden states of some tokens."""
        return replace(self, hidden=self.hidden.masked_fill(rows[:, None], 0.0))

    def scores(self, rows: slice, z: Tensor) -> Tensor:
        """(n, V), whose normaliser ``log_ratio`` is given."""
        return self.all_logits(rows)

    def tile(self, rows: slice, columns: slice) -> Tensor | None:
        return self.logits(rows, columns)

    def beyond(self, at: _At) -> tuple[Tensor, ...]:
        """What ``log_ratio`` takes beside logits."""
        return (at.policy.minus(at.reference),)

    @staticmethod
    def log_ratio(log_p: Tensor, z: Tensor, r: Tensor, shift: Tensor) -> Tensor:
        # Of the logits themselves: close ones are subtracted without a rounding.
        return (z - r).sub_(shift)


@dataclass(frozen=True)
class Top:
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
    def beside(cls, policy: Head, *given: Tensor | None) -> Top:
        ids, sent = cast(Tensor, given[0]), cast(Tensor, given[1])
        log_probs = sent.to(policy.dtype)
        rest = 1 - log_probs.exp().sum(-1, keepdim=True)
        log_rest = rest.clamp(min=torch.finfo(sent.dtype).eps).log()
        return cls(policy.local(ids), log_probs, log_rest)

    def without(self, rows: Tensor) -> Top:
        """The same, with log-probs of zero at some tokens."""
        log_probs, log_rest = (
            x.masked_fill(rows[:, None], 0.0) for x in (self.log_probs, self.log_rest)
        )
        return Top(self.ids, log_probs, log_rest)

    def scores(self, rows: slice, z: Tensor) -> Tensor:
        """The policy's logits of all other tokens: their normaliser has log pi_rest."""
        index = self._index(rows, slice(0, z.shape[-1]))
        return _scattered(z, index, z.new_full(index.shape, -torch.inf))

    def tile(self, rows: slice, columns: slice) -> Tensor | None:
        return None

    def beyond(self, at: _At) -> tuple[Tensor, ...]:
        # Where K is V there are no others: this is no number, and stands nowhere.
        of_rest = at.reference.minus(at.policy) - self.log_rest[at.rows]
        return self._index(at.rows, at.columns), self.log_probs[at.rows], of_rest

    @staticmethod
    def log_ratio(
        log_p: Tensor, z: Tensor, r: Tensor, index: Tensor, log_ref: Tensor, of_rest: Tensor
    ) -> Tensor:
        own = log_p.gather(-1, index.clamp(max=log_p.shape[-1] - 1)) - log_ref
        return _scattered(of_rest.expand_as(log_p), index, own)

    def _index(self, rows: slice, columns: slice) -> Tensor:
        """Of the tokens in a tile; of those elsewhere, the column after its last."""
        index, width = self.ids[rows] - columns.start, columns.stop - columns.start
        found: Tensor = index.where((index >= 0) & (index < width), width)
        return found


def _scattered(x: Tensor, index: Tensor, own: Tensor) -> Tensor:
    """A copy of a tile with ``own`` at some tokens; the column after its last is none."""
    wide = x.new_empty(x.shape[0], x.shape[1] + 1)
    wide[:, :-1] = x
    return wide.scatter_(-1, index, own)[:, :-1]


_Reference: TypeAlias = Head | Top


class _At(NamedTuple):
    """Some tokens and some of the vocabulary, with the normalisers of these tokens."""

    rows: slice
    columns: slice
    policy: Normaliser
    reference: Normaliser


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
    def policy(self) -> Normaliser:
        return Normaliser(self.maximum[:, None], self.log_sum[:, None])

    @property
    def reference(self) -> Normaliser:
        return Normaliser(self.ref_maximum[:, None], self.ref_log_sum[:, None])


_OF_KL_ALONE = ("mean_slope", "ref_maximum", "ref_log_sum")


class Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, targets: Tensor, *tensors: Tensor | None) -> Any:
        policy, reference = _pair(plan, tensors)
        of_hidden, *of_matrix = ctx.needs_input_grad[2:5]
        frozen = plan.differentiated and of_hidden and not any(of_matrix)
        of_kl = torch.zeros_like(policy.hidden, dtype=policy.dtype) if frozen else None
        kept = torch.empty((9, len(targets)), dtype=policy.dtype, device=targets.device)
        for rows in slices(len(targets), plan.held // len(policy.weight)):
            z = policy.all_logits(rows)
            r = reference.scores(rows, z)
            local = policy.local(targets[rows])
            kept[:, rows] = _sums(plan, reference, rows, z, r, local)
            if of_kl is not None:
                here = _Kept(*kept[:, rows])
                for columns in policy.columns(len(r)):
                    matrix = policy.weight[columns]
                    at = _At(rows, columns, here.policy, here.reference)
                    gradient = plan.kernel(tiles.gradient_of_kl)(
                        plan.kind,
                        z[:, columns],
                        r[:, columns],
                        here.policy,
                        reference.beyond(at),
                        here.mean_slope[:, None],
                        _factor(matrix, z.dtype),
                    )
                    _add_product(of_kl[rows], gradient, matrix)
            del z, r  # the next ones are made before the names are free
        ctx.plan = plan
        if plan.differentiated:
            saved = (targets, *tensors, kept, of_kl)
            ctx.save_for_backward(*map(_savable, saved))
        ctx.set_materialize_grads(False)
        # No views of one tensor: autograd lets nobody write into such.
        kl, entropy, log_probs, ref_log_probs = (x.clone() for x in kept[:4])
        ctx.mark_non_differentiable(ref_log_probs)
        return kl, entropy, log_probs, ref_log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
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


def _savable(x: Tensor | None) -> Tensor | None:
    """For the backward: of inference mode, as a reference's hidden states may be, a copy."""
    if torch.compiler.is_compiling() or x is None or not x.is_inference():  # a trace can't ask it
        return x
    return x.clone()


def _sums(
    plan: Plan,
    other: _Reference,
    rows: slice,
    z: Tensor,
    r: Tensor,
    targets: Tensor,
) -> Tensor:
    """The fields of ``_Kept``, of all logits of n tokens: (9, n), by three sums over the shards."""
    tokens, vocabulary = z.shape
    pieces = list(slices(vocabulary, plan.tile // tokens))
    maxima = plan.reduced_(torch.stack([z.amax(-1), r.amax(-1)]), maximum=True)
    # Sums of exponentials, and the logits of the targets: another shard's are zero here.
    sums = torch.zeros((4, tokens), dtype=z.dtype, device=z.device)
    here = (targets >= 0) & (targets < vocabulary)
    index = targets.where(here, 0)[:, None]
    for i, logits in enumerate((z, r)):
        for columns in pieces:
            sums[i] += plan.kernel(tiles.sum_of_exponentials)(
                logits[:, columns], maxima[i, :, None]
            )
        sums[2 + i] = torch.where(here, logits.gather(-1, index)[:, 0] - maxima[i], 0.0)
    plan.reduced_(sums)
    log_sums, log_probs = sums[:2].log(), sums[2:] - sums[:2].log()
    policy, reference = (
        Normaliser(*x) for x in zip(maxima[..., None], log_sums[..., None], strict=True)
    )
    value, entropy, mean_slope = expected = torch.zeros_like(sums[:3])
    for columns in pieces:
        beyond = other.beyond(_At(rows, columns, policy, reference))
        parts = plan.kernel(tiles.expectations)(
            plan.kind,
            z[:, columns],
            r[:, columns],
            policy,
            beyond,
            plan.differentiated,
        )
        for total, part in zip(expected, parts, strict=False):
            total += part
    plan.reduced_(expected)
    value.clamp_(min=0)  # no divergence is less, but for the rounding of its terms
    return torch.stack(
        (value, entropy, *log_probs, mean_slope, maxima[0], log_sums[0], maxima[1], log_sums[1])
    )


@dataclass(frozen=True)
class _Gradients:
    """Of hidden states in the dtype of the work, of output matrix and bias in their own."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, head: Head, needed: Sequence[bool]) -> _Gradients:
        like = (head.hidden.to(head.dtype), head.weight, head.bias)
        made = (
            torch.zeros_like(x) if need and x is not None else None
            for x, need in zip(like, needed, strict=True)
        )
        return cls(*made)


def _differentiate(
    gradients: _Gradients,
    weights: Sequence[Tensor | None],
    policy: Head,
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
    # A token without a weight: 0 times what it holds would be nan, were that no number. It has
    # zeros instead, and of what it lacks, policy or reference, no probability at any token.
    no_kl = of_kl == 0
    unused = no_kl & (of_entropy == 0) & (of_log_probs == 0)
    policy, reference = policy.without(unused), reference.without(no_kl)
    without = {name: no_kl if name in _OF_KL_ALONE else unused for name in vars(kept)}
    instead = {"maximum": HUGE, "ref_maximum": HUGE}
    kept = _Kept(
        **{
            name: x.masked_fill(without[name], instead.get(name, 0.0))
            for name, x in vars(kept).items()
        }
    )
    common = of_kl * kept.mean_slope + of_entropy * kept.entropy + of_log_probs
    plan = policy.plan
    step = max(1, min(len(targets), plan.rows, plan.tile))
    for columns in policy.columns(step):
        matrix = policy.weight[columns]
        of_matrix = torch.zeros_like(matrix, dtype=policy.dtype)
        of_bias = of_matrix.new_zeros(len(matrix))
        for rows in slices(len(targets), step):
            z, r = policy.logits(rows, columns), None
            beyond: tuple[Tensor, ...] = ()
            if weights[0] is not None:
                at = _At(rows, columns, kept.policy.of(rows), kept.reference.of(rows))
                r, beyond = reference.tile(rows, columns), reference.beyond(at)
            local = targets[rows] - columns.start
            here = (local >= 0) & (local < z.shape[-1])
            gradient = plan.kernel(tiles.gradient_of_all)(
                plan.kind,
                z,
                r,
                kept.policy.of(rows),
                beyond,
                (
                    None if weights[0] is None else of_kl[rows, None],
                    of_entropy[rows, None],
                    common[rows, None],
                ),
                (local.where(here, 0)[:, None], of_log_probs[rows].where(here, 0.0)[:, None]),
                policy.dtype if gradients.bias is not None else _factor(matrix, policy.dtype),
            )
            if gradients.hidden is not None:
                _add_product(gradients.hidden[rows], gradient, matrix)
            if gradients.weight is not None:
                _add_product(of_matrix, gradient.T, policy.hidden[rows])
            if gradients.bias is not None:
                of_bias += gradient.sum(0)
        if gradients.weight is not None:
            gradients.weight[columns] = of_matrix
        if gradients.bias is not None:
            gradients.bias[columns] = of_bias


def slices(length: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``a b``, neither rounded to less than ``dtype`` nor summed up in less."""
    if _on_tensor_cores(a, b):
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _factor(b: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of what ``_add_product`` multiplies with b: what autograd would hand to the product.

    A gradient in float16 would have too few exponents.
    """
    return b.dtype if b.dtype == torch.bfloat16 and _on_tensor_cores(b, b) else dtype


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if _factor(b, total.dtype) == b.dtype != total.dtype:
        total += torch.mm(a.to(b.dtype), b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _on_tensor_cores(a: Tensor, b: Tensor) -> bool:
    return a.is_cuda and a.dtype == b.dtype and a.dtype in _HALVES and _WIDE_PRODUCTS


_HALVES = (torch.bfloat16, torch.float16)
# Products of halves that are summed up and returned in float32: torch 2.8 has them, on CUDA.
_WIDE_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
