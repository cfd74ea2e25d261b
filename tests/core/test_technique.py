"""What a training stack does to a loss: compiles it, differentiates it, runs it on a device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import klplug
from tests.core.test_term import BETA, CLIP, GRID, batch

ROWS = list(klplug.kl_types())
NAMES = ("log_probs", "ref_log_probs", "response_mask", "old_log_probs", "advantages")


def loss(kl_type: str, tensors: dict[str, Tensor]) -> Tensor:
    if "vocab=" in kl_type:  # stands for a sum over the vocabulary
        tensors = tensors | {"exact_kl": (tensors["log_probs"] - tensors["ref_log_probs"]).square()}
    return klplug.kl_term(kl_type, **tensors, kl_coef=BETA, clip_range=CLIP).loss.sum()


def inputs(dtype: torch.dtype = torch.float32) -> dict:
    tensors = batch(dtype=dtype)
    return tensors | {"group_ids": tensors["group_ids"].tolist()}


def compiled(function: object, backend: str) -> object:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    ("kl_type", "backend"),
    [
        *((kl_type, "aot_eager") for kl_type in ROWS),
        ("k2_as_loss,horizon=sequence,baseline=group", "aot_eager"),
        *(
            (k, "inductor")
            for k in ("k2_as_loss", "k3_as_loss,ratio=none", "js_as_loss,horizon=sequence")
        ),
    ],
)
def test_a_term_compiles_into_one_graph(kl_type: str, backend: str) -> None:
    tensors = inputs()
    one = torch.autograd.grad(loss(kl_type, tensors), tensors["log_probs"])
    other = torch.autograd.grad(compiled(loss, backend)(kl_type, tensors), tensors["log_probs"])
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kl_type", ["none", "k2_as_loss", "k2_as_loss,head=combined+k3_as_loss,ratio=none"]
)
def test_a_policy_loss_compiles_into_one_graph(kl_type: str) -> None:
    tensors = {name: inputs()[name] for name in NAMES}

    def whole(tensors: dict[str, Tensor]) -> Tensor:
        return klplug.policy_loss(kl_type, **tensors, kl_coef=BETA, clip_range=CLIP).sum()

    one = torch.autograd.grad(whole(tensors), tensors["log_probs"])
    other = torch.autograd.grad(compiled(whole, "aot_eager")(tensors), tensors["log_probs"])
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kl_type", GRID)
def test_the_gradient_of_torch_func_is_autograd_s(kl_type: str) -> None:
    tensors = inputs(torch.float64)
    (one,) = torch.autograd.grad(loss(kl_type, tensors), tensors["log_probs"])
    other = torch.func.grad(lambda x: loss(kl_type, tensors | {"log_probs": x}))(
        tensors["log_probs"].detach()
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
