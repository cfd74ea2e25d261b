"""``topk_kl`` against K + 1 categories enumerated in float64, torch's kl_div and mpmath."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

import klplug
from tests.core.enumeration import F
from tests.core.test_exact import (
    DTYPES,
    EXTREMES,
    NAMES,
    PRECISE_F,
    TOKENS,
    VOCABULARY,
    VOCABULARY_IN_SHARDS,
    Inputs,
    assert_equal,
    assert_halves,
    biases,
    drawn,
    gradients,
    naive,
    shard_of,
    weighted,
    whole_inputs,
)

K = 4


def sent(inputs: Inputs, k: int = K, **scaling: Any) -> Inputs:
    """The policy's part of ``inputs``, and what a reference with whole logits sends of them."""
    given = dict(inputs)
    logits = given.pop("ref_hidden") @ given.pop("ref_weight").T
    if (ref_bias := given.pop("ref_bias", None)) is not None:
        logits = logits + ref_bias
    if (softcap := scaling.get("softcap")) is not None:
        logits = softcap * (logits / softcap).tanh()
    top = (logits.detach() / scaling.get("temperature", 1.0)).log_softmax(-1).topk(k)
    return given | scaling | {"ref_ids": top.indices, "ref_log_probs": top.values}


def merged(log_p: Tensor, ids: Tensor) -> Tensor:
    """(N, K + 1): the probabilities of these tokens, and of all others by adding them up."""
    others = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, ids, False)
    p = log_p.exp()
    return torch.cat([p.gather(-1, ids), (p * others).sum(-1, keepdim=True)], -1)


def categories(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_ids: Tensor,
    ref_log_probs: Tensor,
    f: Callable[[Tensor], Tensor] = F["reverse"],
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of K + 1 categories, entropy and log-probs, of whole logits."""
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    log_p = (logits / temperature).log_softmax(-1)
    p, q = merged(log_p, ref_ids), ref_log_probs.exp()
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    return (
        (q * f(p / q)).sum(-1),
        -(log_p.exp() * log_p).sum(-1),
        log_p[torch.arange(len(targets)), targets],
    )


@pytest.mark.parametrize("chunk", [None, 1, 50, 3 * VOCABULARY])
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_is_that_of_the_categories(name: str, chunk: int | None) -> None:
    inputs = sent(drawn() | biases())
    mine = klplug.topk_kl(**inputs, **NAMES[name], chunk=chunk)
    theirs = categories(**inputs, f=F[name])
    assert_equal(mine[:3], theirs)
    assert_equal(gradients(weighted(mine), inputs), gradients(weighted(theirs), inputs))


@pytest.mark.parametrize("scaling", [{"temperature": 0.6}, {"softcap": 2.0}, {}], ids=str)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden weight bias"])
@pytest.mark.parametrize("only", [(0,), (1,), (0, 1, 2)])
def test_gradients_of_each_result_towards_each_input(
    only: tuple[int, ...], trained: str, scaling: Inputs
) -> None:
    inputs = sent(drawn() | biases(), **scaling)
    for name in ("hidden", "weight", "bias"):
        inputs[name].requires_grad_(name in trained.split())
    mine, theirs = klplug.topk_kl(**inputs, chunk=60), categories(**inputs)
    assert_equal(mine[:3], theirs)
    assert_equal(*(gradients(weighted(x, only), inputs) for x in (mine, theirs)))


def test_both_directions_are_those_of_torchs_own_kl_div() -> None:
    inputs = sent(drawn())
    q = inputs["ref_log_probs"].exp()
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    for name in ("k2", "forward"):
        p = merged((inputs["hidden"] @ inputs["weight"].T).log_softmax(-1), inputs["ref_ids"])
        x, y = (q, p) if name == "k2" else (p, q)
        theirs = torch.nn.functional.kl_div(x.log(), y, reduction="none").sum(-1)
        mine = klplug.topk_kl(**inputs, divergence=name).kl
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
        assert_equal(gradients(mine.sum(), inputs), gradients(theirs.sum(), inputs))


def test_gradcheck() -> None:
    inputs = sent(drawn(tokens=3) | biases(), temperature=0.8)
    fixed = {name: inputs[name] for name in ("targets", "ref_ids", "ref_log_probs")}

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return klplug.topk_kl(
            hidden, weight, bias=bias, divergence="js", temperature=0.8, chunk=30, **fixed
        )[:3]

    assert torch.autograd.gradcheck(
        function, (inputs["hidden"], inputs["weight"], inputs["bias"]), atol=1e-7
    )


@pytest.mark.parametrize("name", NAMES)
def test_more_tokens_hold_more_of_the_divergence_and_all_of_them_the_whole(name: str) -> None:
    inputs = drawn()
    whole = naive(**inputs, f=F[name])[0].detach()
    before = torch.zeros(TOKENS, dtype=torch.float64)
    for k in (1, 2, K, 10, VOCABULARY - 2, VOCABULARY):
        kl = klplug.topk_kl(**sent(inputs, k), **NAMES[name]).kl.detach()
        # tv adds nothing where two categories have the same sign.
        assert (kl >= before * (1 - 1e-9)).all() and (kl <= whole * (1 + 1e-9)).all()
        assert (kl > before).any() or name == "tv"
        before = kl
    exact = klplug.exact_kl(**inputs, **NAMES[name])
    mine = klplug.topk_kl(**sent(inputs, VOCABULARY), **NAMES[name])
    assert_equal(mine, exact, 1e-9)
    assert_equal(*(gradients(weighted(x), inputs) for x in (mine, exact)), 1e-9)


def test_where_all_others_have_one_ratio_nothing_is_lost() -> None:
    inputs = drawn()
    log_p = (inputs["hidden"] @ inputs["weight"].T).log_softmax(-1).detach()
    ids = log_p.topk(K).indices
    p = merged(log_p, ids)
    q = p.roll(1, 0)
    log_q = log_p + (q[:, -1:] / p[:, -1:]).log()
    log_q = log_q.scatter(-1, ids, q[:, :-1].log())
    given = {name: inputs[name] for name in ("hidden", "weight", "targets")}
    mine = klplug.topk_kl(**given, ref_ids=ids, ref_log_probs=q[:, :-1].log())
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    theirs = naive(**given, ref_hidden=log_q, ref_weight=identity)
    assert_equal(mine[:3], theirs[:3])
    assert_equal(*(gradients(weighted(x), given) for x in (mine, theirs)))
    assert (mine.kl > 0.1).any()


def test_any_tokens_will_do_in_any_order() -> None:
    inputs = sent(drawn(), VOCABULARY)
    order = torch.stack([torch.randperm(VOCABULARY)[:K] for _ in range(TOKENS)])
    for name in ("ref_ids", "ref_log_probs"):
        inputs[name] = inputs[name].gather(-1, order)
    assert_equal(klplug.topk_kl(**inputs)[:3], categories(**inputs))


def test_log_ref_of_a_target_is_known_where_it_was_sent() -> None:
    inputs = sent(drawn())
    inputs["targets"] = inputs["ref_ids"][:, 1].clone()
    unsent = (inputs["ref_ids"][3:] == 0).any(-1)
    inputs["targets"][3:] = 0
    found = klplug.topk_kl(**inputs).ref_log_probs
    assert torch.equal(found[:3], inputs["ref_log_probs"][:3, 1])
    assert torch.equal(found[3:].isnan(), ~unsent) and not unsent.all()
    assert not found.requires_grad


@pytest.mark.parametrize("scaling", [{"temperature": 0.6}, {"softcap": 2.0}, {}], ids=str)
def test_what_a_reference_sends(scaling: Inputs) -> None:
    inputs = drawn() | biases()
    expected = sent(inputs, **scaling)
    own = inputs["ref_hidden"], inputs["ref_weight"]
    for chunk in (None, 3 * VOCABULARY):
        ids, log_probs = klplug.top_log_probs(
            *own, K, bias=inputs["ref_bias"], chunk=chunk, **scaling
        )
        assert torch.equal(ids, expected["ref_ids"])
        assert_equal([log_probs], [expected["ref_log_probs"]], 1e-13)
    assert klplug.top_log_probs(*own, 99)[0].shape == (TOKENS, VOCABULARY)
    for k in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"k={k} must be a number of tokens"):
            klplug.top_log_probs(*own, k)
    with pytest.raises(ValueError, match=r"weight must have two dimensions"):
        klplug.top_log_probs(own[0], own[1][0], K)


# ── Numbers ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("level", [0.0, 60.0, 12288.0])
def test_what_is_sent_of_large_logits_has_all_its_digits(level: float) -> None:
    """A log-sum-exp as one number has those of the logits alone: 1e-3 at 12288."""
    logits = level + torch.arange(20.0).flip(0)
    log_probs = klplug.top_log_probs(logits[None], torch.eye(20), K)[1]
    expected = logits.double().log_softmax(-1)[None, :K]
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_are_neither_rounded_nor_summed_up_in_halves(
    dtype: torch.dtype, trained: bool
) -> None:
    inputs = sent(drawn(dtype), temperature=3.0)  # float32 has no digits of a rest of next to 0
    inputs["weight"].requires_grad_(trained)
    inputs["ref_log_probs"] = inputs["ref_log_probs"].float()
    wide = {
        name: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    for name in ("hidden", "weight"):
        wide[name].requires_grad_(inputs[name].requires_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = klplug.topk_kl(**inputs, chunk=60)
    theirs = categories(**wide)
    assert all(x.dtype == torch.float32 for x in mine)
    assert_equal(mine[:3], theirs, 1e-5)
    found, expected = (
        gradients(weighted(x), given) for x, given in ((mine, inputs), (theirs, wide))
    )
    assert all(x.dtype == dtype for x in found)
    assert_equal(found, expected, max(1e-5, torch.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_by_mpmath(name: str, dtype: torch.dtype) -> None:
    """Of four tokens two are sent, and the others are as far away as logits of 300 put them."""
    eps = torch.finfo(dtype).eps
    pairs = [(z, ids, log_q) for z in EXTREMES for ids, log_q in SENT]
    z = torch.tensor([pair[0] for pair in pairs], dtype=dtype, requires_grad=True)
    ids = torch.tensor([pair[1] for pair in pairs])
    log_q = torch.tensor([pair[2] for pair in pairs], dtype=dtype)
    targets = torch.zeros(len(pairs), dtype=torch.long)
    result = klplug.topk_kl(z, torch.eye(4, dtype=dtype), targets, ids, log_q, **NAMES[name])
    (found,) = torch.autograd.grad(result.kl.sum(), z)
    largest, seen = mpmath.mpf(torch.finfo(dtype).max) / mpmath.exp(40), 0
    for i, (logits, own, _) in enumerate(pairs):
        with mpmath.workdps(400):
            value, gradient = precise(name, logits, own, log_q[i].tolist(), eps)
        assert result.kl[i] >= 0
        if max([value, *map(abs, gradient)]) > largest:
            assert result.kl[i].isfinite() and found[i].isfinite().all()
            continue
        seen += 1
        scale = 8 * (10 + max(map(abs, logits))) * eps
        scale *= 1 + float(max([value, *map(abs, gradient)]))
        assert abs(result.kl[i].item() - float(value)) <= scale
        for one, other in zip(found[i].tolist(), gradient, strict=True):
            assert abs(one - float(other)) <= scale
    assert seen >= 5


# Two of four tokens: a moderate rest, all of it sent, and a rest that is next to nothing.
SENT = [((0, 1), (-1.5, -0.5)), ((2, 0), (-0.6931471805599453,) * 2), ((3, 1), (-1e-30, -80.0))]


def precise(
    name: str, z: list[float], ids: tuple[int, ...], log_q: list[float], eps: float
) -> tuple[Any, list[Any]]:
    """By mpmath, the rest of the reference being what it is said to be: at least ``eps``."""
    f = PRECISE_F[name]
    weights = [mpmath.exp(mpmath.mpf(x)) for x in z]
    p = [w / mpmath.fsum(weights) for w in weights]
    groups = [[i] for i in ids] + [[i for i in range(len(z)) if i not in ids]]
    q = [mpmath.exp(mpmath.mpf(x)) for x in log_q]
    q.append(max(1 - mpmath.fsum(q), mpmath.mpf(eps)))
    whole = [mpmath.fsum(p[i] for i in group) for group in groups]
    # f, normalised to f(1) = f'(1) = 0 or not, on probabilities that sum to 1 or nearly.
    value, slope = mpmath.mpf(0), [mpmath.mpf(0)] * len(z)
    at_one = mpmath.mpf(0) if name == "tv" else mpmath.diff(f, 1)
    for group, b, a in zip(groups, q, whole, strict=True):
        value += b * f(a / b) - at_one * (a - b)
        own = (
            mpmath.sign(a - b) / 2
            if name == "tv"
            else mpmath.diff(f, a / b, h=(a / b) * mpmath.mpf(10) ** -80)
        )
        for i in group:
            slope[i] = own
    mean = mpmath.fsum(a * s for a, s in zip(p, slope, strict=True))
    return value, [a * (s - mean) for a, s in zip(p, slope, strict=True)]


@pytest.mark.parametrize("trained", [False, True])
def test_a_token_without_weight_may_hold_anything(trained: bool) -> None:
    clean, inputs = sent(drawn()), sent(drawn())
    with torch.no_grad():
        inputs["hidden"][3] = torch.nan
        inputs["ref_log_probs"][5] = torch.nan
        inputs["ref_ids"][5] = 0
        inputs["ref_log_probs"][7] = -torch.inf
    used = torch.ones(TOKENS, dtype=torch.float64)
    used[[3, 5, 7]] = 0
    for given in (clean, inputs):
        given["weight"].requires_grad_(trained)
    found, expected = (
        gradients((x.kl + x.entropy + x.log_probs)[used > 0].sum(), given)
        for x, given in ((klplug.topk_kl(**given), given) for given in (inputs, clean))
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_token_that_the_reference_never_writes(name: str, trained: bool) -> None:
    """A sampler that cuts its distribution sends log-probs of -inf.

    The divergence is that of a probability that is next to nothing, or infinite.
    """
    inputs, near = sent(drawn()), sent(drawn())
    for given, log_prob in ((inputs, -torch.inf), (near, -600.0)):
        given["ref_log_probs"][3, 1] = log_prob
        given["weight"].requires_grad_(trained)
    mine, theirs = (klplug.topk_kl(**given, **NAMES[name]) for given in (inputs, near))
    others = torch.arange(TOKENS) != 3
    infinite = name in ("reverse", "jeffreys", "chi2", "alpha,alpha=2")
    if infinite:
        assert mine.kl[3] == torch.inf
    else:
        assert_equal([mine.kl], [theirs.kl])
    kept = others if infinite else others | ~others
    sums = (x.kl[kept].sum() + (x.entropy + x.log_probs).sum() for x in (mine, theirs))
    found, expected = (gradients(x, y) for x, y in zip(sums, (inputs, near), strict=True))
    assert_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_token_without_a_kl_and_large_logits_leaves_the_others_theirs(
    name: str, dtype: torch.dtype
) -> None:
    """Logits of 100, whose exponential float32 has not: of one token nothing counts, of the other
    its log-prob alone.
    """
    z = torch.tensor([100.0, 99.0, 0.0, 0.0, 0.0], dtype=dtype)
    hidden = z.repeat(2, 1).requires_grad_()
    weight = torch.eye(5, dtype=dtype, requires_grad=True)
    ids, log_ref = torch.tensor([[1, 2]] * 2), torch.tensor([[0.3, 0.3]] * 2, dtype=dtype).log()
    x = klplug.topk_kl(hidden, weight, torch.tensor([0, 1]), ids, log_ref, **NAMES[name])
    found = torch.autograd.grad(x.log_probs[1] + 0 * x.kl[0], (hidden, weight))
    # 1[v = y] - pi, which is e^-100 but for two tokens that are one nat apart.
    first = 1 / (1 + math.exp(-1))
    score = torch.tensor([-first, first, 0.0, 0.0, 0.0], dtype=dtype)
    expected = torch.stack([0 * score, score]), score[:, None] * z
    assert_equal(found, expected, 1e-5 if dtype == torch.float32 else 1e-12)


def test_no_tokens_at_all() -> None:
    inputs = sent(drawn(tokens=0))
    result = klplug.topk_kl(**inputs)
    assert [len(x) for x in result] == [0, 0, 0, 0]
    assert not gradients(result.kl.sum() + result.log_probs.sum(), inputs)[1].any()


# ── A vocabulary in shards ──────────────────────────────────────────────────────────────────────


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    saved = {}
    for trained in (False, True):
        inputs = shard_of(sent(whole_inputs(trained)), rank, 2)
        result = klplug.topk_kl(**inputs, divergence="jeffreys", chunk=55, group=dist.group.WORLD)
        found = gradients(weighted(result), inputs)
        saved[trained] = (tuple(result[:3]), found)
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_half_of_the_vocabulary_each(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        one_rank, args=(str(tmp_path),), nprocs=2, start_method="fork"
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for trained, of_first in ranks[0].items():
        inputs = sent(whole_inputs(trained))
        # Sent tokens of either half.
        assert len((inputs["ref_ids"] < VOCABULARY_IN_SHARDS // 2).unique()) == 2
        expected = categories(**inputs, f=F["jeffreys"])
        whole = gradients(weighted(expected), inputs)
        assert_halves(of_first, ranks[1][trained], expected, whole)


# ── What is refused ─────────────────────────────────────────────────────────────────────────────

ONES = torch.ones((TOKENS, K), dtype=torch.long)
REFUSED: list[tuple[Inputs, str]] = [
    ({"divergence": "k1"}, "'k2' is its exact form"),
    ({"temperature": 0.0}, "temperature=0.0"),
    ({"ref_ids": ONES[:3]}, r"ref_ids has shape \(3, 4\), and must have \(11, 4\)"),
    ({"ref_ids": ONES[:, :0]}, r"ref_ids has shape \(11, 0\), .* K from 1 to 23"),
    ({"ref_ids": ONES[0]}, r"ref_ids has shape \(4,\), and must have \(N, K\)"),
    ({"ref_ids": ONES.double()}, "ref_ids must be token ids"),
    ({"ref_ids": ONES.tolist()}, "ref_ids must be a dense tensor, got list"),
    ({"ref_log_probs": None}, "ref_log_probs must be a dense tensor, got NoneType"),
    ({"group": 2}, "group=2 must be a torch.distributed.ProcessGroup"),
    ({"ref_ids": 23 + torch.arange(K) + 0 * ONES}, "ref_ids has the token 26; allowed: 0 to 22"),
    ({"ref_ids": ONES}, "ref_ids has a token twice"),
    ({"ref_log_probs": ONES}, "ref_log_probs must be floating-point"),
    ({"ref_log_probs": torch.zeros(TOKENS, K + 1)}, r"ref_log_probs has shape \(11, 5\)"),
    ({"ref_log_probs": torch.zeros(TOKENS, K)}, "probabilities that sum to 4 at one place"),
    ({"targets": torch.full((TOKENS,), -1)}, "targets has the token -1"),
    ({"hidden": torch.zeros(TOKENS, 3)}, r"hidden has shape \(11, 3\)"),
]


@pytest.mark.parametrize(
    ("wrong", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_wrong_input_is_named(wrong: Inputs, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        klplug.topk_kl(**sent(drawn()) | wrong)
