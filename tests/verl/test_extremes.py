"""What users report: one token far from the reference, and the whole batch's direction with it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.one_meaning import batch
from tests.verl.tensors import LAYOUTS, loss

ROW, TOKEN = 1, 2


def gradient(kl_loss_type: str, log_ratio: float, dtype: torch.dtype) -> Tensor:
    """Of the KL alone, with one token ``log_ratio`` away from the reference."""
    given = batch()
    reference = given.ref_log_probs.clone()
    reference[ROW, TOKEN] = given.log_probs[ROW, TOKEN] - log_ratio
    log_probs = given.log_probs.to(dtype).requires_grad_(True)
    moved = dataclasses.replace(given, ref_log_probs=reference.to(dtype))
    value, _ = loss(moved, log_probs, kl_loss_type, 1.0, layout=LAYOUTS[-1])
    value.backward()
    assert log_probs.grad is not None
    return log_probs.grad.double()


def alignment(kl_loss_type: str, log_ratio: float, dtype: torch.dtype) -> float:
    """Cosine of the gradient with the outlier and the one with that token at the reference."""
    found, calm = (gradient(kl_loss_type, lr, dtype) for lr in (log_ratio, 0.0))
    return float(torch.cosine_similarity(found.flatten(), calm.flatten(), dim=0))


@pytest.mark.parametrize(
    ("log_ratio", "dtype"), [(-40.0, torch.bfloat16), (-100.0, torch.float32)], ids=str
)
def test_one_token_takes_the_direction_of_stock_and_not_of_a_bounded_kl(
    log_ratio: float, dtype: torch.dtype
) -> None:
    assert alignment("k2", log_ratio, dtype) < 0.1
    # Stock k3 clamps: the token that drifted furthest is the one that nothing holds.
    assert gradient("k3", log_ratio, dtype)[ROW, TOKEN] == 0
    for kl_type in ("k2_as_loss,ratio=none,bound=0.5", "k3_as_loss,ratio=none,bound=0.5"):
        assert alignment(kl_type, log_ratio, dtype) > 0.8
        assert gradient(kl_type, log_ratio, dtype)[ROW, TOKEN] < 0  # up, to the reference
    assert alignment("k3_as_loss,ratio=none", log_ratio, dtype) < 0.1
