from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from klplug import aggregate, reward_to_go
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


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("on_device", [False, True])
def test_micro_batches_add_up_to_the_whole_batch(mode: str, on_device: bool) -> None:
    """Answers of 1 and 9 tokens: a mean of their means is 5.5, right is 19/10."""
    x, mask = torch.ones(3, 9), torch.ones(3, 9)
    x[0, 0], mask[0, 1:], mask[2] = 10.0, 0, 0
    whole = {"token-mean": 19 / 10, "seq-mean-token-sum": 19 / 2, "seq-mean-token-mean": 11 / 2}
    count = 10 if mode == "token-mean" else 2
    given = torch.tensor(count) if on_device else count
    parts = [aggregate(x[i : i + 1], mask[i : i + 1], mode, count=given) for i in range(3)]
    assert sum(parts).item() == pytest.approx(whole[mode])
    assert aggregate(x, mask, mode).item() == pytest.approx(whole[mode])


def test_a_constant_divisor() -> None:
    assert aggregate(X, MASK, "token-sum", divisor=9).item() == pytest.approx(10 / 9)
    rows = [aggregate(X[i : i + 1], MASK[i : i + 1], "token-sum", divisor=9) for i in range(3)]
    assert sum(rows).item() == pytest.approx(10 / 9)


@pytest.mark.parametrize(
    ("mode", "given", "words"),
    [
        ("token-sum", {}, "needs one"),
        ("token-mean", {"divisor": 3}, "no other mode"),
        ("token-sum", {"divisor": 0.0}, "divisor=0.0 must be a positive"),
        ("token-sum", {"divisor": 3, "count": 2}, "takes no count"),
        ("token-mean", {"count": 0}, "count=0 must be a positive"),
        ("token-mean", {"count": np.int64(0)}, "count=.*0.* must be a positive"),
        ("token-sum", {"divisor": np.float32("nan")}, "divisor=.*nan.* must be a positive"),
        ("token-mean", {"count": math.nan}, "count=nan must be"),
    ],
)
def test_counts_and_divisors_that_are_none(mode: str, given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        aggregate(X, MASK, mode, **given)


def test_leave_one_out_mean_is_the_others() -> None:
    returns = torch.tensor([[1.0], [2.0], [6.0]])
    assert others_mean(returns, None).tolist() == [[4.0], [3.5], [1.5]]


def test_an_answer_alone_and_a_row_without_tokens_have_no_others() -> None:
    returns = torch.tensor([[1.0], [2.0], [6.0], [5.0], [0.0]])
    present = torch.tensor([True, True, True, True, False])
    ids = ["a", "a", "a", "b", "a"]
    expected = [[4.0], [3.5], [1.5], [0.0], [3.0]]
    assert others_mean(returns, ids, present).tolist() == expected
    numbers = torch.tensor([7, 7, 7, -2, 7])
    assert others_mean(returns, numbers, present).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_of_many_has_the_range_and_the_digits_of_float32(dtype: torch.dtype) -> None:
    """float16 ends at 65504; bfloat16 has no 257."""
    x = torch.ones(1, 70_001, dtype=dtype)
    assert aggregate(x, x, "seq-mean-token-sum").item() == 70_001
    assert aggregate(x, x).item() == 1
    assert reward_to_go(x)[0, 0].item() == 70_001


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_a_whole_batch_without_tokens_is_0_by_its_count_too(mode: str) -> None:
    """Ranks add up their counts in a tensor: 0 of 0 would be a nan in the loss."""
    x = X.clone().requires_grad_()
    loss = aggregate(x, torch.zeros_like(MASK), mode, count=torch.tensor(0))
    loss.backward()
    assert loss == 0 and not x.grad.any()


@pytest.mark.parametrize(
    "given", [{"count": "3"}, {"count": True}, {"mode": "token-sum", "divisor": [9]}]
)
def test_a_count_of_another_kind_is_named(given: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=r"(count|divisor) must be a positive number, got"):
        aggregate(X, MASK, **given)
