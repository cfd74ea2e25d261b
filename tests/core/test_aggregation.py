from __future__ import annotations

import pytest
import torch

from klplug import aggregate
from klplug.baselines import others_mean

X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, torch.nan], [torch.inf, 0.0, 0.0]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 10 / 4),
        ("seq-mean-token-sum", (6 + 4) / 2),
        ("seq-mean-token-mean", (2 + 4) / 2),
    ],
)
def test_modes_by_hand(mode: str, expected: float) -> None:
    assert aggregate(X, MASK, mode).item() == expected
    assert aggregate(X, torch.zeros_like(MASK), mode).item() == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="seq-mean-token-sum"):
        aggregate(X, MASK, "mean")
    with pytest.raises(ValueError, match="shape"):
        aggregate(X, MASK[:, :2])


def test_leave_one_out_mean_is_the_others() -> None:
    returns = torch.tensor([[1.0], [2.0], [6.0]])
    assert others_mean(returns, None).tolist() == [[4.0], [3.5], [1.5]]
    with pytest.raises(ValueError, match="at least 2"):
        others_mean(torch.ones(3, 1), [0, 1, 2])
