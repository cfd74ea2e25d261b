"""Every estimator's value and derivative against mpmath, over log-ratios of -100 to 100."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from mpmath import mp, mpf

from klplug.estimators import ESTIMATORS, Estimator, alpha_divergence

mp.prec = 400
ULPS = 4
ALPHAS = (2.0, 1.5, 0.9, 0.1, -0.5, -1.5)
ROWS = {**ESTIMATORS, **{f"alpha={a:g}": alpha_divergence(a) for a in ALPHAS}}

# Textbook f of E_ref f(u), and its derivative; k1, k2 and k3 by their own formulas.
F: dict[str, tuple[Callable, Callable]] = {
    "forward": (lambda u: -mp.log(u), lambda u: -1 / u),
    "js": (
        lambda u: u * mp.log(u) - (u + 1) * mp.log((u + 1) / 2),
        lambda u: mp.log(2 * u / (u + 1)),
    ),
    "jeffreys": (lambda u: (u - 1) * mp.log(u), lambda u: mp.log(u) + 1 - 1 / u),
    "chi2": (lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1)),
    "hellinger": (lambda u: (1 - mp.sqrt(u)) ** 2, lambda u: 1 - 1 / mp.sqrt(u)),
    "tv": (lambda u: abs(u - 1) / 2, lambda u: mp.sign(u - 1) / 2),
}


def alpha_f(a: mpf) -> tuple[Callable, Callable]:
    return (
        lambda u: (u**a - a * u - (1 - a)) / (a * (a - 1)),
        lambda u: (u ** (a - 1) - 1) / (a - 1),
    )


def exact(name: str, x: mpf) -> tuple[mpf, mpf]:
    """The value under samples of pi and the derivative, at ``lr = x``."""
    simple = {
        "k1": (x, mpf(1)),
        "k2": (x * x / 2, x),
        "k3": (mp.exp(-x) - 1 + x, 1 - mp.exp(-x)),
        "abs": (abs(x), mp.sign(x)),
    }
    if name in simple:
        return simple[name]
    alpha = name.partition("alpha=")[2]
    if name.startswith("alpha"):
        f, slope = alpha_f(mpf(alpha or "0.5") if alpha else mpf("0.5"))
    else:
        f, slope = F[name]
    u = mp.exp(x)
    # forward's derivative is f' - f'(1): 1 - 1/u.
    return f(u) / u, slope(u) - slope(mpf(1)) if name != "tv" else slope(u)


def log_ratios(dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    sizes = [torch.rand(60, generator=draw, dtype=torch.float64) * 100]
    sizes += [
        10.0**-n * (0.5 + torch.rand(4, generator=draw, dtype=torch.float64)) for n in range(12)
    ]
    sizes.append(
        torch.tensor(
            [0.0, 0.25, 0.4999, 0.5, 0.5001, 1.9999, 2.0, 88.4, 88.9, 89.3, 100.0]
        ).double()
    )
    size = torch.cat(sizes)
    return torch.cat([size, -size]).to(dtype)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ROWS)
def test_values_and_derivatives_have_all_their_digits(name: str, given: torch.dtype) -> None:
    row: Estimator = ROWS[name]
    log_ratio = log_ratios(given)
    log_ratio = log_ratio.to(torch.promote_types(given, torch.float32))
    info = torch.finfo(log_ratio.dtype)
    derivative = row.as_loss.coefficient(log_ratio)
    found = {"value": row.value(log_ratio), "derivative": derivative}
    if row.value_of_derivative is not None:
        found["value of the derivative"] = row.value_of_derivative(log_ratio, derivative)
    for i, x in enumerate(log_ratio.tolist()):
        value, slope = exact(name, mpf(x))
        for what, numbers in found.items():
            right = slope if what == "derivative" else value
            right = max(min(right, mpf(info.max)), mpf(info.min))
            if abs(right) < info.tiny:
                assert abs(numbers[i].item()) <= 2 * info.tiny
                continue
            off = abs(mpf(numbers[i].item()) - right) / abs(right) / mpf(info.eps)
            # (alpha - 1) lr is rounded before it is an exponent; exactly nothing for the default.
            allowed = ULPS + (abs(x) if "=" in name else 0)
            assert off <= allowed, (
                f"{what} at {x!r}: {numbers[i].item()!r}, {float(off):.1f} ulp off"
            )
            assert math.isfinite(numbers[i].item())


@pytest.mark.parametrize("alpha", [60.0, -60.0])
def test_an_alpha_whose_powers_are_beyond_the_dtype_is_held_at_its_largest(alpha: float) -> None:
    x = 1.9 if alpha > 0 else -1.9
    value, _ = exact(f"alpha={alpha}", mpf(x))
    assert value > 1e45
    found = alpha_divergence(alpha).value(torch.tensor([x]))
    assert found.item() == torch.finfo(torch.float32).max
