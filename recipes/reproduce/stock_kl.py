"""The KL terms of verl and OpenRLHF as their sources have them, clamps included: no host needed.

Read from verl 0.9.1 (`verl/trainer/ppo/core_algos.py`, `kl_penalty`) and OpenRLHF 0.11.2
(`openrlhf/models/utils.py`, `compute_approx_kl`). `tests/recipes/test_stock_kl.py` compares them
with the hosts' own functions, value and gradient to the bit, where a host is installed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

StockKL = Callable[[Tensor, Tensor], Tensor]


def verl_k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    return log_probs - ref_log_probs


def verl_k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    return 0.5 * (log_probs - ref_log_probs).square()


def verl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """No gradient where the ratio ref/pi is above e^2.61, its value clamped there."""
    log_ratio = (ref_log_probs - log_probs).clamp(min=-20, max=20)
    return (log_ratio.exp() - log_ratio - 1).clamp(min=-10, max=10)


def openrlhf_k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    return (log_probs.float() - ref_log_probs.float()).clamp(min=-10, max=10)


def openrlhf_k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """No gradient where the log-ratio is beyond 4.47 either way, its value clamped there."""
    return ((log_probs.float() - ref_log_probs.float()) ** 2 / 2.0).clamp(min=-10, max=10)


def openrlhf_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    log_ratio = (log_probs.float() - ref_log_probs.float()).clamp(min=-10)
    return ((-log_ratio).exp() - 1 + log_ratio).clamp(min=-10, max=10)


# Each as a loss, as a host has it where klplug is not asked for anything.
STOCK: dict[str, StockKL] = {
    "stock:verl:k1": verl_k1,
    "stock:verl:k2": verl_k2,
    "stock:verl:k3": verl_k3,
    "stock:openrlhf:k1": openrlhf_k1,
    "stock:openrlhf:k2": openrlhf_k2,
    "stock:openrlhf:k3": openrlhf_k3,
}
