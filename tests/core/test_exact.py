"""The exact KL in chunks against two whole matrices of logits in float64, autograd and mpmath."""

from __future__ import annotations

import itertools
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
from torch.utils.checkpoint import checkpoint

import klplug
from benchmarks.measure import peak_bytes
from klplug import divergences, exact, tiles, vocabulary
from klplug.estimators import ESTIMATORS
from tests.core.enumeration import F

# By name of the divergence: its textbook f, and what exact_kl is called with.
NAMES: dict[str, dict[str, Any]] = {
    name: {"divergence": name} for name in ("forward", "js", "jeffreys", "chi2", "hellinger", "tv")
}
NAMES["reverse"] = {"divergence": "k2"}
NAMES["alpha"] = {"divergence": "alpha"}
NAMES["alpha,alpha=2"] = {"divergence": "alpha", "alpha": 2.0}
NAMES["alpha,alpha=-1"] = {"divergence": "alpha", "alpha": -1.0}

TOKENS, VOCABULARY, WIDTH = 11, 23, 5
Inputs = dict[str, Any]


def drawn(dtype: torch.dtype = torch.float64, tokens: int = TOKENS, **changed: Any) -> Inputs:
    """A policy, a teacher of another width, and the tokens that were sampled."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    made = {
        "hidden": normal(tokens, WIDTH).requires_grad_(),
        "weight": normal(VOCABULARY, WIDTH).requires_grad_(),
        "ref_hidden": normal(tokens, WIDTH + 2),
        "ref_weight": normal(VOCABULARY, WIDTH + 2),
        "targets": torch.randint(VOCABULARY, (tokens,), generator=draw),
    }
    return made | changed


def biases() -> Inputs:
    draw = torch.Generator().manual_seed(2)
    bias, ref_bias = torch.randn((2, VOCABULARY), generator=draw, dtype=torch.float64)
    return {"bias": bias.requires_grad_(), "ref_bias": ref_bias}


def naive(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    f: Callable[[Tensor], Tensor] = F["reverse"],
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = hidden @ weight.T
        logits = logits if bias is None else logits + bias
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        return (logits / temperature).log_softmax(-1)

    log_p = log_softmax(hidden, weight, bias)
    log_q = log_softmax(ref_hidden, ref_weight, ref_bias).detach()
    q = log_q.exp()
    return (
        (q * f(log_p.exp() / q)).sum(-1),
        -(log_p.exp() * log_p).sum(-1),
        log_p[torch.arange(len(targets)), targets],
        log_q[torch.arange(len(targets)), targets],
    )


def weighted(results: tuple[Tensor, ...], only: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    """A sum under per-token weights, of the results that are named."""
    weights = torch.randn((3, TOKENS), generator=torch.Generator().manual_seed(3)).double()
    return sum((weights[i] * results[i]).sum() for i in only)  # type: ignore[return-value]


def gradients(scalar: Tensor, inputs: Inputs) -> list[Tensor]:
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    return list(torch.autograd.grad(scalar, leaves))


def assert_equal(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(
        tuple(actual), tuple(expected), rtol=tolerance, atol=tolerance, check_dtype=False
    )


@pytest.mark.parametrize("chunk", [None, 1, 50, 3 * VOCABULARY])
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_is_that_of_two_whole_matrices_of_logits(name: str, chunk: int) -> None:
    inputs = drawn() | biases()
    mine = klplug.exact_kl(**inputs, **NAMES[name], chunk=chunk)
    theirs = naive(**inputs, f=F[name])
    assert_equal(mine, theirs)
    assert_equal(gradients(weighted(mine), inputs), gradients(weighted(theirs), inputs))


@pytest.mark.parametrize(
    ("name", "trained"), [("reverse", "hidden"), ("alpha", "hidden weight bias")]
)
def test_what_a_gpu_compiles_is_the_same(
    name: str, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        made.append(function)
        return torch.compile(function, dynamic=True, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(vocabulary.Plan, "kernel", lambda _, function: compiled(function))
    inputs = drawn() | biases()
    for leaf in ("hidden", "weight", "bias"):
        inputs[leaf].requires_grad_(leaf in trained.split())
    scaling = {"temperature": 1.7, "softcap": 1.5}
    mine = klplug.exact_kl(**inputs, **NAMES[name], **scaling, chunk=4 * VOCABULARY)
    theirs = naive(**inputs, **scaling, f=F[name])
    assert_equal(mine, theirs)
    assert_equal(gradients(weighted(mine), inputs), gradients(weighted(theirs), inputs))
    assert len(set(made)) == 3 + (trained == "hidden")


def test_without_a_compiler_it_runs_all_the_same(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def backend(*given: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, **how, backend=backend))
    run = tiles.compiled.__wrapped__(tiles.sum_of_exponentials)
    for _ in range(2):
        assert_equal([run(torch.zeros(2, 3), torch.zeros(2, 1))], [torch.full((2,), 3.0)])
    (line,) = [str(w.message) for w in recwarn if "exact KL" in str(w.message)]
    assert "without compiled kernels" in line and "C compiler" in line


@pytest.mark.parametrize("scaling", [{"temperature": 0.6}, {"softcap": 2.0}, {}], ids=str)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden weight bias"])
@pytest.mark.parametrize("only", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_gradients_of_each_result_towards_each_input(
    only: tuple[int, ...], trained: str, scaling: Inputs
) -> None:
    inputs = drawn() | biases()
    for name in ("hidden", "weight", "bias"):
        inputs[name].requires_grad_(name in trained.split())
    mine, theirs = klplug.exact_kl(**inputs, **scaling, chunk=60), naive(**inputs, **scaling)
    assert_equal(mine, theirs)
    found, expected = (gradients(weighted(x, only), inputs) for x in (mine, theirs))
    assert len(found) == len(trained.split())
    assert_equal(found, expected)


def test_both_scalings_at_once_and_a_softcap_that_bites() -> None:
    scaling = {"temperature": 1.7, "softcap": 1.5}
    inputs = drawn()
    mine, theirs = klplug.exact_kl(**inputs, **scaling), naive(**inputs, **scaling)
    assert_equal(mine, theirs)
    assert_equal(gradients(weighted(mine), inputs), gradients(weighted(theirs), inputs))
    assert not torch.allclose(mine.kl, klplug.exact_kl(**inputs, temperature=1.7).kl, rtol=0.1)


def test_gradcheck() -> None:
    inputs = drawn(tokens=3) | biases()
    fixed = {name: inputs[name] for name in ("ref_hidden", "ref_weight", "targets", "ref_bias")}

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return klplug.exact_kl(
            hidden, weight, bias=bias, divergence="js", temperature=0.8, chunk=30, **fixed
        )[:3]

    assert torch.autograd.gradcheck(
        function, (inputs["hidden"], inputs["weight"], inputs["bias"]), atol=1e-7
    )


def test_a_matrix_that_is_embedding_and_output_of_both_models() -> None:
    tokens = torch.arange(TOKENS) % VOCABULARY
    matrix = drawn()["weight"]

    def loss(function: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        hidden = torch.tanh(matrix[tokens])
        return weighted(function(hidden, matrix, matrix[tokens].detach(), matrix, tokens))

    mine, theirs = (torch.autograd.grad(loss(f), matrix) for f in (klplug.exact_kl, naive))
    # The naive one holds the reference's logits fixed by hand.
    assert_equal(mine, theirs)


def test_the_reference_gets_no_gradient() -> None:
    inputs = drawn()
    inputs["ref_hidden"].requires_grad_()
    result = klplug.exact_kl(**inputs)
    assert not result.ref_log_probs.requires_grad
    (gradient,) = torch.autograd.grad(result.kl.sum(), inputs["ref_hidden"], allow_unused=True)
    assert gradient is None


# ── What is made again ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of all logits that are made."""
    made: list[tuple[int, int]] = []
    original = vocabulary._product

    def recorded(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        made.append((a.shape[0], b.shape[1]))
        return original(a, b, *rest)

    monkeypatch.setattr(vocabulary, "_product", recorded)
    return made


@pytest.mark.parametrize(
    ("trained", "only", "again"),
    [("hidden", (0,), 0), ("hidden", (1, 2), 1), ("hidden", (0, 1, 2), 1), ("both", (0,), 2)],
)
def test_what_the_backward_makes_again(
    products: list[tuple[int, int]], trained: str, only: tuple[int, ...], again: int
) -> None:
    inputs = drawn()
    inputs["weight"].requires_grad_(trained == "both")
    whole = TOKENS * VOCABULARY
    result = klplug.exact_kl(**inputs, chunk=100)
    assert sum(map(math.prod, products)) == 2 * whole
    weighted(result, only).backward()
    assert sum(map(math.prod, products)) == (2 + again) * whole


@pytest.mark.parametrize("trained", [False, True])
def test_memory_does_not_grow_with_the_vocabulary(trained: bool) -> None:
    chunk, tokens, width = 2**14, 64, 8

    def peak(vocabulary: int) -> int:
        hidden = torch.randn(tokens, width, requires_grad=True)
        matrix = torch.randn(vocabulary, width, requires_grad=trained)
        targets = torch.arange(tokens)

        def step() -> None:
            result = klplug.exact_kl(hidden, matrix, hidden, matrix, targets, chunk=chunk)
            torch.autograd.grad(result.kl.sum() + result.entropy.sum(), hidden)

        gradient = matrix.nbytes if trained else 0  # which is no less in any other way
        return peak_bytes(step) - gradient

    small, large = peak(512), peak(8192)
    assert large <= 1.1 * small
    assert large < 12 * chunk * 4 + 50 * tokens * width * 4
    assert large < 64 * 8192 * 4  # one matrix of logits, of which naive takes six


def test_no_more_than_two_chunks_of_logits_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 2**14
    monkeypatch.setattr(exact, "_TILE", chunk // 32)
    hidden, matrix = torch.randn(64, 8, requires_grad=True), torch.randn(2048, 8)

    def step() -> None:  # of eight chunks, the gradient of ``kl`` kept from the forward
        kl = klplug.exact_kl(hidden, matrix, hidden, matrix, torch.arange(64), chunk=chunk).kl
        torch.autograd.grad(kl.sum(), hidden)

    assert 2 * chunk * 4 < peak_bytes(step) < 2.6 * chunk * 4


# ── Numbers ─────────────────────────────────────────────────────────────────────────────────────

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_are_neither_rounded_nor_summed_up_in_halves(
    dtype: torch.dtype, trained: bool
) -> None:
    inputs = drawn(dtype)
    inputs["weight"].requires_grad_(trained)
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in inputs.items()}
    for name in ("hidden", "weight"):
        wide[name].requires_grad_(inputs[name].requires_grad)
    mine, theirs = klplug.exact_kl(**inputs, chunk=60), naive(**wide)
    assert all(x.dtype == torch.float32 for x in mine)
    assert_equal(mine, theirs, 1e-5)
    found, expected = (
        gradients(weighted(x), given) for x, given in ((mine, inputs), (theirs, wide))
    )
    assert all(x.dtype == dtype for x in found)
    # One rounding to the dtype of the input, at the end.
    assert_equal(found, expected, max(1e-5, torch.finfo(dtype).eps))


def test_the_gradient_of_a_bias_is_not_summed_up_in_halves() -> None:
    """Of 2000 tokens, 40 at a time: a sum in bfloat16 would come to stand still."""
    tokens, chunk = 2000, 40
    inputs = drawn(torch.bfloat16, tokens=tokens)
    targets = torch.zeros(tokens, dtype=torch.long)
    bias = torch.zeros(VOCABULARY, dtype=torch.bfloat16, requires_grad=True)
    given = {
        name: inputs[name].detach() for name in ("hidden", "weight", "ref_hidden", "ref_weight")
    }
    log_probs = klplug.exact_kl(**given, targets=targets, bias=bias, chunk=chunk).log_probs
    (found,) = torch.autograd.grad(log_probs.sum(), bias)
    p = (given["hidden"].double() @ given["weight"].double().T).softmax(-1)
    expected = torch.nn.functional.one_hot(targets, VOCABULARY).double().sub(p).sum(0)
    assert_equal([found], [expected], torch.finfo(torch.bfloat16).eps)


def test_autocast_does_not_reach_it() -> None:
    inputs = drawn(torch.float32)
    alone = klplug.exact_kl(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = klplug.exact_kl(**inputs)
        found = gradients(weighted(within), inputs)
    assert_equal(within, alone, 0)
    assert_equal(found, gradients(weighted(alone), inputs), 0)


EXTREMES = [
    [0.0, 0.0, 0.0, 0.0],
    [300.0, 0.0, -300.0, 1.0],
    [-300.0, 0.0, 300.0, 1.0],
    [90.0, 0.0, 0.0, -20.0],
    [0.0, 90.0, 0.0, -20.0],
    [5.0, 4.0, 3.0, -130.0],
]
PRECISE_F: dict[str, Any] = {
    "reverse": lambda t: t * mpmath.log(t),
    "forward": lambda t: -mpmath.log(t),
    "tv": lambda t: abs(t - 1) / 2,
    "js": lambda t: t * mpmath.log(t) - (t + 1) * mpmath.log((t + 1) / 2),
    "jeffreys": lambda t: (t - 1) * mpmath.log(t),
    "chi2": lambda t: (t - 1) ** 2,
    "hellinger": lambda t: (1 - mpmath.sqrt(t)) ** 2,
    "alpha": lambda t: -4 * (mpmath.sqrt(t) - t / 2 - mpmath.mpf(1) / 2),
    "alpha,alpha=2": lambda t: (t - 1) ** 2 / 2,
    "alpha,alpha=-1": lambda t: (1 / t + t - 2) / 2,
}


def precise(name: str, z: list[float], r: list[float]) -> tuple[Any, list[Any]]:
    """The divergence of two lists of logits and its gradient towards the first, by mpmath."""
    with mpmath.workdps(400):

        def softmax(logits: list[float]) -> list[Any]:
            weights = [mpmath.exp(mpmath.mpf(x)) for x in logits]
            return [w / mpmath.fsum(weights) for w in weights]

        p, q = softmax(z), softmax(r)
        f = PRECISE_F[name]
        value = mpmath.fsum(b * f(a / b) for a, b in zip(p, q, strict=True))
        if name == "tv":
            slopes = [mpmath.sign(a - b) / 2 for a, b in zip(p, q, strict=True)]
        else:
            slopes = [
                mpmath.diff(f, a / b, h=(a / b) * mpmath.mpf(10) ** -80)
                for a, b in zip(p, q, strict=True)
            ]
        mean = mpmath.fsum(a * s for a, s in zip(p, slopes, strict=True))
        return value, [a * (s - mean) for a, s in zip(p, slopes, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_by_mpmath(name: str, dtype: torch.dtype) -> None:
    pairs = list(itertools.product(EXTREMES, EXTREMES))
    # The identity as output matrix: hidden states are the logits.
    identity = torch.eye(4, dtype=dtype)
    z = torch.tensor([pair[0] for pair in pairs], dtype=dtype, requires_grad=True)
    r = torch.tensor([pair[1] for pair in pairs], dtype=dtype)
    targets = torch.zeros(len(pairs), dtype=torch.long)
    result = klplug.exact_kl(z, identity, r, identity, targets, **NAMES[name])
    (found,) = torch.autograd.grad(result.kl.sum(), z)
    largest = mpmath.mpf(torch.finfo(dtype).max)
    seen = 0
    for i, pair in enumerate(pairs):
        value, gradient = precise(name, *pair)
        assert result.kl[i] >= 0
        if max([value, *map(abs, gradient)]) > largest / mpmath.exp(40):
            assert result.kl[i].isfinite() and found[i].isfinite().all()
            assert value < largest / mpmath.exp(40) or result.kl[i] > 1e20
            continue
        seen += 1
        # A logit's own rounding, of 300 and more, is in the exponent.
        ulps = 8 * (10 + max(map(abs, [*pair[0], *pair[1]])))
        scale = ulps * torch.finfo(dtype).eps * (1 + float(max([value, *map(abs, gradient)])))
        assert abs(result.kl[i].item() - float(value)) <= scale
        for one, other in zip(found[i].tolist(), gradient, strict=True):
            assert abs(one - float(other)) <= scale
    assert seen >= 10


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_distributions(dtype: torch.dtype, trained: bool) -> None:
    """By hand: logits of up to 8192 put all of the policy on token 0, of the reference on 2.

    Row 0 has them so; in row 1 both are one distribution.
    """
    of_policy, of_reference = [8192.0, 0.0, -4096.0, 0.0], [-4096.0, 0.0, 8192.0, 1.0]
    identity = torch.eye(4, dtype=dtype)
    r = torch.tensor([of_reference, of_policy], dtype=dtype)
    one_to_other = torch.tensor([[1.0, 0.0, -1.0, 0.0], [0.0] * 4])
    nothing = torch.zeros(2, 4)
    # Value, and gradient towards the logits: p (slope - mean slope).
    by_hand = {
        "k2": (12288.0, nothing),
        "forward": (12288.0, one_to_other),
        "jeffreys": (2 * 12288.0, one_to_other),
        "js": (2 * math.log(2), nothing),
        "hellinger": (2.0, nothing),
        "tv": (1.0, nothing),
        "alpha": (4.0, nothing),
    }
    for name, (value, gradient) in by_hand.items():
        z = torch.tensor([of_policy, of_policy], dtype=dtype, requires_grad=True)
        weight = identity.clone().requires_grad_(trained)
        result = klplug.exact_kl(
            z, weight, r, identity, torch.tensor([0, 2]), divergence=name, chunk=4
        )
        torch.testing.assert_close(result.kl, torch.tensor([value, 0.0]), rtol=1e-6, atol=0)
        assert result.entropy.tolist() == [0, 0]
        assert result.log_probs.tolist() == [0, -12288]
        assert result.ref_log_probs.tolist() == [-12288, -12288]
        found = torch.autograd.grad(result.kl.sum(), [z, weight][: 1 + trained])
        torch.testing.assert_close(found[0].float(), gradient, rtol=1e-6, atol=1e-6)
        if trained:
            torch.testing.assert_close(found[1], (gradient.T.to(dtype) @ z).detach())


@pytest.mark.parametrize("name", NAMES)
def test_near_the_reference_float32_keeps_its_digits(name: str) -> None:
    """Naive differences of float32 log-probs are all noise here, and of either sign."""
    draw = torch.Generator().manual_seed(5)
    r = 3 * torch.randn((50, 1000), generator=draw)
    z = (r + 1e-3 * torch.randn(r.shape, generator=draw)).requires_grad_()
    identity, targets = torch.eye(1000), torch.zeros(50, dtype=torch.long)
    mine = klplug.exact_kl(z, identity, r, identity, targets, **NAMES[name]).kl
    wide = z.detach().double(), identity.double(), r.double(), identity.double()
    # In float64 the difference of close numbers has digits enough.
    theirs = naive(*wide, targets, f=F[name])[0]
    torch.testing.assert_close(mine.double(), theirs, rtol=2e-3, atol=0)
    assert (mine > 0).all()
    same = klplug.exact_kl(r, identity, r, identity, targets, **NAMES[name]).kl
    assert (same == 0).all()


@pytest.mark.parametrize(("limit", "name"), [(1.0, "reverse"), (0.0, "forward")])
def test_alpha_near_its_limits_keeps_its_digits(limit: float, name: str) -> None:
    """A difference of numbers that are alike, over one that is next to nothing."""
    inputs = drawn(torch.float32)
    expected = naive(**drawn(), f=F[name])[0].detach()
    for away in (1e-6, -1e-6):
        kl = klplug.exact_kl(**inputs, divergence="alpha", alpha=limit + away).kl.detach()
        assert_equal([kl], [expected], 5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_none_is_negative_where_rounding_is_all_there_is(name: str, dtype: torch.dtype) -> None:
    """A few sharp tokens, as far from the reference as the last digits of a logit."""
    draw = torch.Generator().manual_seed(6)
    identity, targets = torch.eye(3, dtype=dtype), torch.zeros(2000, dtype=torch.long)
    r = 20 * torch.randn((2000, 3), generator=draw).to(dtype)
    z = r + 8 * torch.finfo(dtype).eps * torch.randn(r.shape, generator=draw).to(dtype)
    kl = klplug.exact_kl(z, identity, r, identity, targets, **NAMES[name]).kl
    ids = r.topk(2).indices
    of_top = r.log_softmax(-1).gather(-1, ids)
    bound = klplug.topk_kl(z, identity, targets, ids, of_top, **NAMES[name]).kl
    for found in (kl, bound):
        assert (found >= 0).all() and (found > 0).any()


def test_the_registry_has_the_same_coefficients() -> None:
    """On moderate tokens the slope is p times the estimator's coefficient as a loss."""
    log_ratio = torch.linspace(-3, 3, 61, dtype=torch.float64)
    log_p = torch.full_like(log_ratio, -2.0)
    rows = divergences.DIVERGENCES | {"alpha": divergences.alpha_divergence(0.5)}
    for name, row in rows.items():
        expected = log_p.exp() * ESTIMATORS[name].as_loss.coefficient(log_ratio)
        torch.testing.assert_close(
            row.slope(log_p, log_ratio, log_p.exp()), expected, rtol=1e-13, atol=1e-15
        )
    # Those without a row have no divergence of their own, and a message that says what to use.
    assert set(ESTIMATORS) - set(rows) == set(divergences._INSTEAD)


def test_a_token_without_weight_may_hold_anything() -> None:
    clean, inputs = drawn(), drawn()
    with torch.no_grad():
        inputs["hidden"][3], inputs["ref_hidden"][5], inputs["hidden"][7] = (
            torch.nan,
            torch.inf,
            1e300,
        )
    used = torch.ones(TOKENS, dtype=torch.float64)
    used[[3, 5, 7]] = 0
    for trained in (True, False):
        for given in (clean, inputs):
            given["weight"].requires_grad_(trained)
        found, expected = (
            gradients(((x.kl + x.entropy + x.log_probs)[used > 0]).sum(), given)
            for x, given in ((klplug.exact_kl(**given), given) for given in (inputs, clean))
        )
        assert_equal(found, expected)


@pytest.mark.parametrize("trained", [False, True])
def test_a_token_without_a_kl_leaves_the_other_results_theirs(trained: bool) -> None:
    """Its reference is no number, so its KL has no weight; its log-probs and entropy have one."""
    clean, inputs = drawn(), drawn()
    inputs["ref_hidden"][5] = torch.nan
    used = torch.ones(TOKENS, dtype=torch.float64)
    used[5] = 0
    sums = []
    for given in (inputs, clean):
        given["weight"].requires_grad_(trained)
        kl, entropy, log_probs, _ = klplug.exact_kl(**given)
        sums.append(gradients(kl[used > 0].sum() + (entropy - 2 * log_probs).sum(), given))
    assert_equal(*sums)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("whose", ["bias", "ref_bias"])
def test_a_token_without_weight_has_no_bias_either(whose: str, name: str) -> None:
    """float32 has no exp(100). Of the others nothing is used, or their log-probs alone."""
    for used in (slice(0, 1), slice(None)):
        found = []
        for dtype in (torch.float32, torch.float64):
            given = drawn(dtype)
            given[whose] = torch.zeros(VOCABULARY, dtype=dtype)
            given[whose][3] = 100
            x = klplug.exact_kl(**given, **NAMES[name])
            of_kl = 0 * x.kl.sum() if dtype == torch.float32 else 0
            found.append(gradients(x.log_probs[used].sum() + of_kl, given))
        assert_equal(*found, tolerance=1e-5)


def test_no_tokens_at_all() -> None:
    inputs = drawn(tokens=0)
    result = klplug.exact_kl(**inputs)
    assert [len(x) for x in result] == [0, 0, 0, 0]
    found = gradients(result.kl.sum() + result.log_probs.sum(), inputs)
    assert_equal(found, [torch.zeros(0, WIDTH), torch.zeros(VOCABULARY, WIDTH)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_targets_of_any_integers(dtype: torch.dtype) -> None:
    inputs = drawn()
    mine = klplug.exact_kl(**inputs | {"targets": inputs["targets"].to(dtype)})
    theirs = naive(**inputs)
    assert_equal(mine, theirs)
    assert_equal(gradients(weighted(mine), inputs), gradients(weighted(theirs), inputs))


def test_each_input_in_a_dtype_of_its_own_and_none_of_them_contiguous() -> None:
    draw = torch.Generator().manual_seed(4)

    def strided(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randn((columns, 2 * rows), generator=draw).to(dtype).T[::2]

    inputs = {
        "hidden": strided(TOKENS, WIDTH, torch.bfloat16).requires_grad_(),
        "weight": strided(VOCABULARY, WIDTH, torch.float32).requires_grad_(),
        "ref_hidden": strided(TOKENS, WIDTH + 2, torch.float16),
        "ref_weight": strided(VOCABULARY, WIDTH + 2, torch.bfloat16),
        "targets": torch.randint(VOCABULARY, (2 * TOKENS,), generator=draw)[::2],
        "bias": torch.randn((2 * VOCABULARY,), generator=draw).half()[::2].requires_grad_(),
    }
    assert not any(x.is_contiguous() for x in inputs.values())
    mine = klplug.exact_kl(**inputs)
    wide = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    theirs = naive(**wide)
    assert all(x.dtype == torch.float32 for x in mine)
    assert_equal(mine, theirs, 1e-5)
    found, expected = gradients(weighted(mine), inputs), gradients(weighted(theirs), wide)
    for one, other, x in zip(found, expected, (inputs["hidden"], *found[1:]), strict=True):
        assert one.dtype == x.dtype
        assert_equal([one], [other], max(1e-5, torch.finfo(one.dtype).eps))


def test_results_may_be_written_into() -> None:
    inputs = drawn()
    mine, theirs = klplug.exact_kl(**inputs), naive(**inputs)
    mine.kl.mul_(3)
    mine.log_probs.clamp_(min=-3)
    own = mine.kl.sum() + mine.log_probs.sum()
    expected = 3 * theirs[0].sum() + theirs[2].clamp(min=-3).sum()
    assert_equal([own], [expected])
    assert_equal(gradients(own, inputs), gradients(expected, inputs))


def test_on_a_device_a_target_that_is_no_token_has_no_log_prob(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There nobody looks at the numbers: an error would wait for the device."""
    monkeypatch.setattr(exact, "_may_be_read", lambda _: False)
    inputs = drawn()
    wrong = inputs["targets"].clone()
    wrong[2], wrong[6] = -100, VOCABULARY
    theirs = naive(**inputs)
    mine = klplug.exact_kl(**inputs | {"targets": wrong})
    told = torch.ones(TOKENS, dtype=torch.bool)
    told[[2, 6]] = False
    assert_equal(mine[:2], theirs[:2])
    for one, other in zip(mine[2:], theirs[2:], strict=True):
        assert torch.equal(one.isnan(), ~told)
        assert_equal([one[told]], [other[told]])
    own, expected = (x[0].sum() + x[2][told].sum() for x in (mine, theirs))
    assert_equal(gradients(own, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("names", ["ref_hidden targets", "ref_weight ref_bias"])
def test_a_reference_of_inference_mode(names: str) -> None:
    inputs = drawn() | biases()
    with torch.inference_mode():
        made = {name: inputs[name].clone() for name in names.split()}
    mine, theirs = klplug.exact_kl(**inputs | made), naive(**inputs)
    assert_equal(mine, theirs)
    assert_equal(gradients(weighted(mine), inputs), gradients(weighted(theirs), inputs))
    with torch.inference_mode():
        assert_equal(klplug.exact_kl(**inputs), theirs)


@pytest.mark.parametrize("trained", [False, True])
def test_compiled_as_a_whole_where_nobody_looks_at_tokens(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    monkeypatch.setattr(exact, "_may_be_read", lambda _: False)
    inputs = drawn()
    inputs["weight"].requires_grad_(trained)
    mine = torch.compile(klplug.exact_kl, fullgraph=True, backend="aot_eager")(**inputs)
    theirs = naive(**inputs)
    assert_equal(mine, theirs)
    assert_equal(gradients(weighted(mine), inputs), gradients(weighted(theirs), inputs))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_made_again_by_a_checkpoint(reentrant: bool, trained: bool) -> None:
    inputs = drawn()
    leaves = [inputs["hidden"], inputs["weight"].requires_grad_(trained)][: 1 + trained]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(klplug.exact_kl(*given))

    expected = gradients(weighted(naive(**inputs)), inputs)
    mine = checkpoint(function, *inputs.values(), use_reentrant=reentrant)
    weighted(mine).backward()
    assert_equal([x.grad for x in leaves], expected)


def test_without_gradients() -> None:
    inputs = drawn()
    with torch.no_grad():
        assert not any(x.requires_grad for x in klplug.exact_kl(**inputs))


# ── A vocabulary in shards ──────────────────────────────────────────────────────────────────────


def shard_of(inputs: Inputs, rank: int, ranks: int) -> Inputs:
    size = VOCABULARY_IN_SHARDS // ranks
    return {
        name: x[rank * size : (rank + 1) * size].detach().clone().requires_grad_(x.requires_grad)
        if name in ("weight", "bias", "ref_weight", "ref_bias")
        else x
        for name, x in inputs.items()
    }


VOCABULARY_IN_SHARDS = 22


def whole_inputs(trained: bool) -> Inputs:
    inputs = drawn() | biases()
    for name in ("weight", "bias", "ref_weight", "ref_bias"):
        cut = inputs[name][:VOCABULARY_IN_SHARDS].detach().clone()
        inputs[name] = cut.requires_grad_(trained and not name.startswith("ref"))
    inputs["targets"] = inputs["targets"] % VOCABULARY_IN_SHARDS
    return inputs


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    original, calls = dist.all_reduce, []
    dist.all_reduce = lambda x, *rest, **named: (calls.append(x.shape), original(x, *rest, **named))
    saved = {}
    for trained, only in itertools.product((False, True), ((0,), (0, 1, 2))):
        inputs = shard_of(whole_inputs(trained), rank, 2)
        result = klplug.exact_kl(
            **inputs, divergence="jeffreys", softcap=3.0, chunk=55, group=dist.group.WORLD
        )
        in_forward = len(calls)
        found = gradients(weighted(result, only), inputs)
        saved[trained, only] = (tuple(result), found, in_forward, len(calls) - in_forward)
        calls.clear()
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def assert_halves(of_first: Any, of_second: Any, expected: Any, whole: list[Tensor]) -> None:
    """Both ranks have all results and the gradient of ``hidden``; of the matrix a half each."""
    hidden, *of_matrix = whole
    for results, found in (of_first, of_second):
        assert_equal(results, expected)
        assert_equal(found[:1], [hidden])
    halves = [torch.cat(pair) for pair in zip(of_first[1][1:], of_second[1][1:], strict=True)]
    assert_equal(halves, of_matrix)


def test_two_ranks_with_half_of_the_vocabulary_each(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        one_rank, args=(str(tmp_path),), nprocs=2, start_method="fork"
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for (trained, only), of_first in ranks[0].items():
        inputs = whole_inputs(trained)
        expected = naive(**inputs, f=F["jeffreys"], softcap=3.0)
        of_second = ranks[1][trained, only]
        whole = gradients(weighted(expected, only), inputs)
        assert_halves(of_first[:2], of_second[:2], expected, whole)
        for *_, in_forward, in_backward in (of_first, of_second):
            # Five tokens of eleven local logits are a chunk of 55: three chunks.
            # And one to ask whether all shards are of one size.
            assert (in_forward, in_backward) == (1 + 3 * 3, 1)


def one_of_unlike_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    inputs = drawn()
    own = slice(0, 12) if rank == 0 else slice(12, VOCABULARY)
    inputs |= {name: inputs[name][own] for name in ("weight", "ref_weight")}
    with pytest.raises(ValueError) as refused:
        klplug.exact_kl(**inputs, group=dist.group.WORLD)
    Path(f"{folder}/{rank}").write_text(str(refused.value))
    dist.destroy_process_group()


def test_shards_of_unlike_size_are_refused_on_every_rank(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        one_of_unlike_ranks, args=(str(tmp_path),), nprocs=2, start_method="fork"
    )
    for rank, size in ((0, 12), (1, 11)):
        words = f"weight has {size} rows on this rank, and from 11 to 12 over the group"
        assert words in (tmp_path / str(rank)).read_text()


# ── What is refused ─────────────────────────────────────────────────────────────────────────────

FLOATS = torch.zeros(TOKENS, WIDTH)
REFUSED: list[tuple[Inputs, str]] = [
    ({"divergence": "k1"}, "'k2' is its exact form"),
    ({"divergence": "k3"}, "'forward' what its derivative does"),
    ({"divergence": "abs"}, "'tv' is half of it"),
    ({"divergence": "kl"}, "known: k2, forward"),
    ({"divergence": "alpha", "alpha": 1}, "neither 0 nor 1"),
    # 1e-40 has no digits in float32, and 1e20 no products: kl_types of these are refused too.
    *(({"divergence": "alpha", "alpha": x}, "between 1e-15 and 1e15") for x in (1e-40, -1e20)),
    ({"alpha": 0.3}, "is for divergence='alpha'"),
    ({"divergence": ["k2"]}, r"\['k2'\] has no form over the vocabulary; known: k2"),
    ({"divergence": "alpha", "alpha": "half"}, "alpha='half' must be a finite number"),
    ({"temperature": 0.0}, "temperature=0.0"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"temperature": math.nan}, "temperature=nan must be a positive number"),
    ({"temperature": None}, "temperature=None must be a positive number"),
    ({"temperature": torch.ones(TOKENS)}, r"temperature=tensor.* must be a positive number"),
    ({"softcap": -1.0}, "softcap=-1.0"),
    ({"softcap": 0}, "softcap=0 must be a positive number"),
    ({"softcap": "30"}, "softcap='30' must be a positive number"),
    ({"chunk": 0}, "chunk=0"),
    ({"chunk": 2.5}, "chunk=2.5 must be a positive whole number of logits, or None"),
    ({"chunk": (64, 64)}, r"chunk=\(64, 64\) must be a positive whole number"),
    ({"chunk": True}, "chunk=True must be a positive whole number"),
    ({"group": "tp"}, "group='tp' must be a torch.distributed.ProcessGroup"),
    ({"group": dist.GroupMember.NON_GROUP_MEMBER}, "that this process is in, or None"),
    ({"ref_weight": torch.zeros(VOCABULARY + 1, WIDTH + 2)}, "must have one vocabulary"),
    ({"ref_hidden": torch.zeros(TOKENS - 1, WIDTH + 2)}, r"ref_hidden has shape \(10, 7\)"),
    ({"hidden": torch.zeros(TOKENS, WIDTH + 1)}, r"hidden has shape \(11, 6\)"),
    ({"hidden": torch.zeros(1, TOKENS, WIDTH)}, "hidden must have two dimensions"),
    ({"hidden": torch.zeros(TOKENS, WIDTH, dtype=torch.long)}, "hidden must be floating-point"),
    ({"hidden": FLOATS.to(torch.complex64)}, "hidden must be floating-point.*complex64"),
    ({"hidden": FLOATS.to(torch.float8_e4m3fn)}, "bfloat16, float16, float32 or float64.*float8"),
    ({"hidden": FLOATS.tolist()}, "hidden must be a dense tensor, got list"),
    ({"hidden": FLOATS.to_sparse()}, "hidden must be a dense tensor, got torch.sparse_coo"),
    ({"weight": torch.nn.Linear(WIDTH, VOCABULARY)}, "weight must be a dense tensor, got Linear"),
    ({"weight": torch.zeros(0, WIDTH)}, r"weight has shape \(0, 5\), and must have a token"),
    ({"weight": torch.zeros(VOCABULARY, WIDTH, device="meta")}, "weight is on meta, hidden is on"),
    ({"ref_weight": None}, "ref_weight must be a dense tensor, got NoneType"),
    ({"ref_hidden": torch.zeros(TOKENS, WIDTH)}, r"ref_hidden has shape \(11, 5\), and must"),
    ({"targets": torch.zeros(TOKENS)}, "targets must be token ids"),
    ({"targets": torch.ones(TOKENS, dtype=torch.bool)}, "targets must be token ids.*bool"),
    ({"targets": [0] * TOKENS}, "targets must be a dense tensor, got list"),
    ({"targets": torch.zeros(1, TOKENS, dtype=torch.long)}, r"targets has shape \(1, 11\)"),
    ({"targets": torch.full((TOKENS,), -100)}, "targets has the token -100; allowed: 0 to 22"),
    ({"targets": torch.full((TOKENS,), VOCABULARY)}, "targets has the token 23"),
    ({"bias": torch.zeros(VOCABULARY, 1)}, r"bias has shape \(23, 1\)"),
    ({"ref_bias": torch.full((VOCABULARY,), -math.inf)}, "ref_bias has the number -inf; allowed"),
]


@pytest.mark.parametrize(
    ("wrong", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_wrong_input_is_named(wrong: Inputs, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        klplug.exact_kl(**drawn(**wrong))
