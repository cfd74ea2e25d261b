"""The same gradient on every device and in every dtype: against the CPU's float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from klplug import exact_kl, kl_term, kl_types, parse, reward_to_go
from klplug.divergences import DIVERGENCES

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Inputs are exact in each dtype, and the work is done in float32: what is lost is float32's.
DTYPES = [torch.float32, torch.bfloat16]


def tensors(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Log-probs that the dtype holds exactly, with nan behind the mask, on the device."""
    draw = torch.Generator().manual_seed(0)
    made = {
        name: (-3 * torch.rand(6, 17, generator=draw)).bfloat16().to(dtype)
        for name in (
            "log_probs",
            "ref_log_probs",
            "old_log_probs",
            "rollout_log_probs",
            "teacher_log_probs",
            "advantages",
            "posterior_log_probs",
        )
    }
    mask = torch.arange(17) < torch.tensor([17, 9, 1, 0, 12, 5])[:, None]
    for tensor in made.values():
        tensor[~mask] = torch.nan
    made = {name: tensor.to(device) for name, tensor in made.items()}
    made["log_probs"].requires_grad_()
    return {**made, "response_mask": mask.to(device)}


def gradient(kl_type: str, given: dict[str, Tensor]) -> Tensor:
    leaves = [given["log_probs"]]
    if "vocab=" in kl_type:  # comes from hidden states, and has a gradient of its own
        work = torch.promote_types(leaves[0].dtype, torch.float32)
        leaves.append((leaves[0].detach().to(work) - given["ref_log_probs"]).square())
        given = given | {"exact_kl": leaves[-1].requires_grad_()}
    term = kl_term(kl_type, **given, kl_coef=0.5, clip_range=0.2)
    if all(part.placement == "in_reward" for part in parse(kl_type).terms):
        return reward_to_go(term.coefficient)
    found = torch.autograd.grad(term.loss.sum(), leaves, materialize_grads=True)
    return torch.stack([tensor.double() for tensor in found])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kl_type", [name for name in kl_types() if name not in ("none", "monitor")]
)
def test_devices_agree(kl_type: str, dtype: torch.dtype, device: str) -> None:
    found = gradient(kl_type, tensors(dtype, device))
    expected = gradient(kl_type, tensors(torch.float64, "cpu"))
    options: dict[str, Any] = {"rtol": 2e-5, "atol": 1e-6}
    if dtype == torch.bfloat16 and "as_loss" in kl_type:
        options["rtol"] = 2**-8  # the gradient comes back in the dtype of log_probs
    torch.testing.assert_close(found.double().cpu(), expected, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "kl_type",
    [
        "k1_in_reward",
        "k2_as_loss,horizon=sequence",
        "k3_as_loss,level=prefix",
        "js_as_loss,level=sequence,horizon=sequence",
        "forward_as_loss,horizon=sequence",
        "chi2_as_loss,horizon=answer",
    ],
)
def test_deterministic_algorithms_suffice(
    kl_type: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch then refuses, on a GPU, the cumsum of numbers that are no integers."""
    expected = gradient(kl_type, tensors(torch.float64, "cpu"))
    cumsum = Tensor.cumsum

    def of_integers(x: Tensor, dim: int) -> Tensor:
        if x.is_floating_point():
            raise RuntimeError("cumsum does not have a deterministic implementation")
        return cumsum(x, dim)

    monkeypatch.setattr(Tensor, "cumsum", of_integers)
    torch.use_deterministic_algorithms(True)
    try:
        found = gradient(kl_type, tensors(torch.float32, device))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("divergence", "dtype"), [(name, torch.float32) for name in DIVERGENCES] + [("k2", DTYPES[1])]
)
def test_the_exact_kl_of_devices_agrees(
    divergence: str, dtype: torch.dtype, trained: bool, device: str
) -> None:
    """On a GPU by compiled kernels and, of halves, by products on tensor cores."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 64, generator=draw)
    # Numbers that the dtype holds exactly.
    hidden, ref_hidden, weight = (
        x.bfloat16().to(dtype)
        for x in (
            hidden,
            hidden + 0.3 * torch.randn(70, 64, generator=draw),
            torch.randn(600, 64, generator=draw) / 4,
        )
    )
    targets, of_each = torch.randint(600, (70,), generator=draw), torch.rand(3, 70, generator=draw)

    def found(dtype: torch.dtype, device: str) -> list[Tensor]:
        h, w, ref_h = (x.to(device, dtype) for x in (hidden, weight, ref_hidden))
        leaves = [h.requires_grad_(), w.clone().requires_grad_(trained)]
        # Chunks of some tokens, of which the last one is shorter.
        results = exact_kl(
            *leaves, ref_h, w, targets.to(device), divergence=divergence, chunk=600 * 32
        )
        loss = sum((c.to(x) * x).sum() for c, x in zip(of_each, results, strict=False))
        assert isinstance(loss, Tensor)
        return [*results, *torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])]

    expected = found(torch.float64, "cpu")
    for i, (mine, theirs) in enumerate(zip(found(dtype, device), expected, strict=True)):
        limit = 2**-8 if i > 3 and dtype == torch.bfloat16 else 2e-5
        assert (mine.double().cpu() - theirs).norm() < limit * theirs.norm()
