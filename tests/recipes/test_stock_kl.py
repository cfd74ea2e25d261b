"""The stock KL terms that the studies use, against the host's own functions, to the bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recipes import cpu_shim
from recipes.reproduce.stock_kl import STOCK
from tests.conftest import NAMED

# Where the clamps begin, and far beyond them, both ways.
LOG_RATIOS = torch.tensor([*torch.linspace(-25, 25, 201).tolist(), -1e-4, 1e-4, -60.0, 60.0])


def gradient(kl: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    log_probs = (LOG_RATIOS - 2).requires_grad_()
    value = kl(log_probs, torch.full_like(LOG_RATIOS, -2.0))
    (found,) = torch.autograd.grad(value.sum(), log_probs)
    return value.detach(), found


def of_host(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    _, host, estimator = name.split(":")
    cpu_shim.install(host)
    if host == "verl":
        from verl.trainer.ppo.core_algos import kl_penalty

        return lambda a, b: kl_penalty(a, b, estimator)
    from openrlhf.models.utils import compute_approx_kl

    return lambda a, b: compute_approx_kl(a, b, kl_estimator=estimator)


@pytest.mark.parametrize("name", [n for n in STOCK if n.split(":")[1] in NAMED])
def test_as_the_host_has_it(name: str) -> None:
    assert importlib.util.find_spec(name.split(":")[1]) is not None
    for found, expected in zip(gradient(STOCK[name]), gradient(of_host(name)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "log_ratio", "moves"),
    [
        ("stock:verl:k3", -2.5, True),
        ("stock:verl:k3", -2.7, False),
        ("stock:openrlhf:k2", 4.4, True),
        ("stock:openrlhf:k2", 4.6, False),
        ("stock:openrlhf:k2", -4.6, False),
        ("stock:openrlhf:k3", -2.7, False),
        ("stock:verl:k2", -50.0, True),
    ],
)
def test_dead_zones_are_where_the_documentation_says(
    name: str, log_ratio: float, moves: bool
) -> None:
    x = torch.tensor([log_ratio], requires_grad=True)
    (found,) = torch.autograd.grad(STOCK[name](x, torch.zeros(1)).sum(), x)
    assert bool(found != 0) == moves
