"""A pytest plugin for a host's own tests: klplug's functions where the host's of one meaning are.

Loaded by ``python -m tests.host_tests``, which counts the calls.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import klplug

CALLS: Counter[str] = Counter()

VERL_ESTIMATORS = {
    **dict.fromkeys(("kl", "k1"), "k1_as_loss,ratio=none"),
    "abs": "abs_as_loss,ratio=none",
    **dict.fromkeys(("mse", "k2"), "k2_as_loss,ratio=none"),
    **dict.fromkeys(("low_var_kl", "k3"), "k3_as_loss,ratio=none"),
}


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """verl's: the estimate's value, with its own gradient or, after a ``+``, with k2's."""

    def term(name: str) -> klplug.KLTerm:
        everywhere = torch.ones_like(logprob)
        return klplug.kl_term(VERL_ESTIMATORS[name], logprob, ref_logprob, everywhere)

    base = term(kl_penalty.removesuffix("+"))
    gradient = (term("k2") if kl_penalty.endswith("+") else base).gradient
    return base.value + gradient * (logprob - logprob.detach())


def aggregate(
    x: Tensor,
    mask: Tensor,
    mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
) -> Tensor:
    """Both hosts': the share of a rank, times the ranks, for these take the mean of them."""
    count = batch_num_tokens if mode == "token-mean" else global_batch_size
    if mode == "token-sum":
        return klplug.aggregate(x, mask, mode, divisor=1.0) * dp_size
    return klplug.aggregate(x, mask, mode, count=count) * dp_size


def agg_loss(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, **of_batch: Any) -> Tensor:
    return aggregate(loss_mat, loss_mask, loss_agg_mode, **of_batch)


def aggregate_loss(
    loss: Tensor, mask: Tensor, token_level_loss: bool = True, **of_batch: Any
) -> Tensor:
    return aggregate(
        loss, mask, "token-mean" if token_level_loss else "seq-mean-token-mean", **of_batch
    )


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    return call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the test's own names, and in the host's module that they come from."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        for function in (kl_penalty, agg_loss, aggregate_loss):
            theirs = vars(module).get(function.__name__)
            if theirs is not None:
                for home in (module, sys.modules[theirs.__module__]):
                    setattr(home, function.__name__, counted(function))
