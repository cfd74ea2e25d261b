"""The exact KL of every token: the expectation over the whole vocabulary, in one chunked pass.

A sampled estimate has one number per token, the log-ratio of the token that was drawn. Policy and
reference are at hand as hidden states and output matrices, so the sum over all tokens can be taken
instead: no noise, no importance ratio of the own token, and never negative. Of a reference that
sends no hidden states K tokens and one category of all others will do: a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from numbers import Integral, Real
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from klplug.divergences import DIVERGENCES, Divergence, named_divergence
from klplug.tiles import Normaliser, Scaling, sum_of_exponentials
from klplug.vocabulary import Head, Pass, Plan, Top, slices, widest

# Logits of one policy held at once, and those that elementwise work is done on at once: on a CPU
# a tile stays within the caches, on a GPU a fused one is as large as what is held. Measured in
# benchmarks/results/exact.md: on a CPU 128 tokens at once are enough for the products, and more
# take memory alone.
_TOKENS, _LEAST_HELD = 128, 2**22
_HELD, _HELD_ON_GPU = 2**24, 2**27
_TILE, _TILE_ON_GPU = 2**20, 2**25
# Tokens for which the backward walks along the output matrix once.
_ROWS, _ROWS_ON_GPU = 1024, 8192


# What torch.compile makes a GPU's kernels with.
_HAS_TRITON = find_spec("triton") is not None


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
    neither has a bias. Differentiated is the policy; the reference is held fixed. One thing is held
    that no metric counts: with chi2 and an alpha above 1, and with a negative one, ``p^a q^(1-a)``
    of a token at e^48.7 of float32, a KL that no training has.

    Logits are made a chunk at a time and, where the output matrix is trained, made again in the
    backward, for any per-token weights that come to ``kl``, ``entropy`` and ``log_probs``. Where it
    is frozen, the gradient of ``kl`` towards ``hidden`` is kept instead, and a backward of ``kl``
    alone makes nothing again. A token whose weights are 0 adds nothing, whatever it holds.

    Args:
        hidden: (N, H), the policy's last hidden states, one row per predicted token.
        weight: (V, H), its output matrix.
        ref_hidden: (N, H'), the reference's, at the same prefixes; its width may be another.
        ref_weight: (V, H'), the reference's output matrix; may be ``weight`` itself.
        targets: (N,), the tokens whose log-probs are wanted, integers in [0, V). On a GPU, where a
            look would wait for the device, another number has log-probs of nan.
        divergence: ``k2`` (the reverse KL), ``forward``, ``js``, ``jeffreys``, ``chi2``,
            ``hellinger``, ``tv`` or ``alpha``, each as the estimator of that name.
        alpha: for ``alpha``, 1/2 if left out; of a size between 1e-15 and 1e15, and not 1.
        bias, ref_bias: (V,), finite.
        temperature: divides the logits of both, after ``softcap``.
        softcap: bound of the logits of both, where the model has one.
        chunk: logits of one policy to be held at once, at least one token's. Left out those of 128
            tokens on a CPU, between 2^22 and 2^24, and 2^27 elsewhere. It decides memory, and no
            number beyond rounding.
        group: a process group over which the vocabulary is cut into equal shards, in the order of
            the ranks; on a GPU, where a look would wait for it, nobody asks whether they are equal:
            unequal ones have log-probs of other tokens, or wait for each other forever.
            ``weight``, ``bias`` and the reference's are the rank's own rows, everything
            else is whole and the same on all ranks; so are the results, and the gradient of
            ``hidden``, which is summed over the group here.

    Returns:
        ``ExactKL``: four (N,) tensors in float32, or float64 where an input is float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit, by name.

    Source: Rao-Blackwell form of the sampled estimators, arXiv 2504.10637.
    """
    row = named_divergence(divergence, alpha)
    _check(hidden, weight, ref_hidden, ref_weight, targets, bias, ref_bias, group)
    plan = _plan(row, weight, temperature, softcap, chunk, group, Head)
    return _results(plan, targets.long(), (hidden, weight, bias, ref_hidden, ref_weight, ref_bias))


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
            -inf is a token that the reference never writes. There k2, jeffreys, chi2 and an alpha
            above 1 are infinite, and ``kl_term`` leaves such a place out.

    Returns:
        ``ExactKL``: four (N,) tensors in float32, or float64 where an input is float64.
        ``ref_log_probs`` is nan where the target is not among ``ref_ids``.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit, by name.

    Source: klplug; the data-processing inequality, Csiszar 1967.
    """
    row = named_divergence(divergence, alpha)
    _check_policy(hidden, weight, targets, bias, group)
    _check_top(hidden, weight, ref_ids, ref_log_probs, group)
    targets, ref_ids = targets.long(), ref_ids.long()
    plan = _plan(row, weight, temperature, softcap, chunk, group, Top)
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
        ValueError, TypeError: shapes, dtypes or options that do not fit, by name.
    """
    _check_head("", hidden, weight, bias, hidden)
    if not _is_count(k):
        raise ValueError(f"k={k!r} must be a number of tokens, at least 1")
    plan = _plan(DIVERGENCES["k2"], weight, temperature, softcap, chunk, None, Head)
    k = min(k, len(weight))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, bias, plan, widest((hidden, weight, bias)))
        ids = torch.empty((len(hidden), k), dtype=torch.long, device=hidden.device)
        log_probs = torch.empty((len(hidden), k), dtype=head.dtype, device=hidden.device)
        for rows in slices(len(hidden), plan.held // len(weight)):
            logits = head.all_logits(rows)
            top = logits.topk(k)
            ids[rows] = top.indices
            maximum = top.values[:, :1]
            log_sum = sum_of_exponentials(logits, maximum).log_()[:, None]
            log_probs[rows] = Normaliser(maximum, log_sum).log_softmax(top.values)
    return ids, log_probs


def _results(plan: Plan, targets: Tensor, tensors: Sequence[Tensor | None]) -> ExactKL:
    with torch.autocast(targets.device.type, enabled=False):
        found = ExactKL(*Pass.apply(plan, targets, *tensors))  # type: ignore[no-untyped-call]
    if _may_be_read(targets):
        return found
    # Where no look could refuse it, a target that is no token has no log-probs.
    weight = cast(Tensor, tensors[1])
    known = (targets >= 0) & (targets < _vocabulary(weight, plan.group))
    return found._replace(
        log_probs=found.log_probs.where(known, torch.nan),
        ref_log_probs=found.ref_log_probs.where(known, torch.nan),
    )


def _plan(
    divergence: Divergence,
    weight: Tensor,
    temperature: float,
    softcap: float | None,
    chunk: int | None,
    group: Any,
    reference: type[Head] | type[Top],
) -> Plan:
    for name, number in (("temperature", temperature), ("softcap", softcap)):
        left_out = number is None and name == "softcap"
        if not left_out and not (isinstance(number, Real) and 0 < number < math.inf):
            raise ValueError(f"{name}={number!r} must be a positive number")
    if chunk is not None and not _is_count(chunk):
        raise ValueError(f"chunk={chunk!r} must be a positive whole number of logits, or None")
    held, tile, rows = _HELD_ON_GPU, _TILE_ON_GPU, _ROWS_ON_GPU
    if weight.device.type == "cpu":
        held, tile, rows = min(_HELD, max(_LEAST_HELD, _TOKENS * len(weight))), _TILE, _ROWS
    held = held if chunk is None else chunk
    scaling = Scaling(temperature, softcap)
    differentiated = torch.is_grad_enabled()
    fused = weight.is_cuda and _HAS_TRITON
    tile = held if fused else min(tile, held)
    return Plan(divergence, scaling, held, tile, rows, group, differentiated, reference, fused)


def _is_count(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 1


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
    _check_group(group, weight)
    _check_head("", hidden, weight, bias, hidden)
    _check_tokens("targets", targets, (len(hidden),), hidden, weight, group)


def _check_head(
    whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, policy: Tensor
) -> None:
    for name, tensor in ((f"{whose}hidden", hidden), (f"{whose}weight", weight)):
        _check_floats(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {tuple(tensor.shape)}")
    if not len(weight):
        raise ValueError(f"{whose}weight has shape {tuple(weight.shape)}, and must have a token")
    _check_shape(f"{whose}hidden", hidden, (len(policy), weight.shape[1]), policy)
    _check_device(f"{whose}weight", weight, policy)
    if bias is not None:
        _check_floats(f"{whose}bias", bias)
        _check_shape(f"{whose}bias", bias, (len(weight),), policy)
        if _may_be_read(bias) and not bias.isfinite().all():
            wrong = bias[~bias.isfinite()][0].item()
            raise ValueError(
                f"{whose}bias has the number {wrong}; allowed: finite ones. For a token that is "
                "never sampled use a large negative one"
            )


# What a product with float32 is defined for.
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check_dense(name: str, tensor: Any) -> None:
    kind = type(tensor).__name__
    if isinstance(tensor, Tensor):
        kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
    if kind != str(torch.strided):
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def _check_floats(name: str, tensor: Any) -> None:
    _check_dense(name, tensor)
    if tensor.dtype not in _FLOATS:
        raise ValueError(
            f"{name} must be floating-point (bfloat16, float16, float32 or float64), got "
            f"{tensor.dtype}"
        )


def _check_group(group: Any, weight: Any) -> None:
    if group is not None and not isinstance(group, getattr(dist, "ProcessGroup", ())):
        raise TypeError(
            f"group={group!r} must be a torch.distributed.ProcessGroup that this process is in, or "
            "None"
        )
    if group is None or not isinstance(weight, Tensor) or not _may_be_read(weight):
        return
    # Each rank would cut its tokens into chunks of its own, and wait for others' forever.
    sizes = torch.tensor([len(weight), -len(weight)])
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)
    most, least = int(sizes[0]), -int(sizes[1])
    if most != least:
        raise ValueError(
            f"weight has {len(weight)} rows on this rank, and from {least} to {most} over the "
            "group; allowed: shards of one size"
        )


def _may_be_read(tensor: Tensor) -> bool:
    """Elsewhere a look at the numbers would wait for the device."""
    return tensor.device.type == "cpu" and tensor.numel() > 0


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
    _check_dense(name, ids)
    if ids.dtype not in _INTEGERS:
        raise ValueError(f"{name} must be token ids, integers, got {ids.dtype}")
    _check_shape(name, ids, shape, policy)
    if _may_be_read(ids):
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
    _check_dense("ref_ids", ref_ids)
    size, whole = ref_ids.shape[-1] if ref_ids.dim() == 2 else 0, _vocabulary(weight, group)
    if not 1 <= size <= whole:
        raise ValueError(
            f"ref_ids has shape {tuple(ref_ids.shape)}, and must have (N, K), K from 1 to {whole}"
        )
    _check_tokens("ref_ids", ref_ids, (len(hidden), size), hidden, weight, group)
    _check_floats("ref_log_probs", ref_log_probs)
    _check_shape("ref_log_probs", ref_log_probs, (len(hidden), size), hidden)
    if not _may_be_read(ref_log_probs):
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
