from __future__ import annotations

import math

import pytest

from klplug import AdaptiveKL, FixedKL, kl_controller


def test_fixed_stays() -> None:
    controller = kl_controller("fixed", 0.1)
    assert isinstance(controller, FixedKL)
    controller.update(100.0, 64)
    controller.load_state_dict({"kl_ctrl": "fixed", "value": 5.0})
    assert controller.value == 0.1


def test_adaptive_moves_towards_the_target_by_ziegler_s_rule() -> None:
    controller = kl_controller("adaptive", 0.1, kl_target=0.05, kl_horizon=1000)
    assert isinstance(controller, AdaptiveKL)
    controller.update(0.055, 100)  # error 0.1
    assert controller.value == pytest.approx(0.1 * (1 + 0.1 * 100 / 1000))
    before = controller.value
    controller.update(5.0, 100)  # clipped to 0.2
    assert controller.value == pytest.approx(before * 1.02)
    before = controller.value
    controller.update(-1.0, 100)
    assert controller.value == pytest.approx(before * 0.98)
    controller.update(math.nan, 100)
    assert controller.value == pytest.approx(before * 0.98)


def test_state_survives() -> None:
    controller = AdaptiveKL(0.1, 0.05, 1000)
    controller.update(1.0, 500)
    resumed = AdaptiveKL(0.1, 0.05, 1000)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.value == controller.value != 0.1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("linear", 0.1), "fixed, adaptive"),
        (("adaptive", 0.1), "kl_target"),
        (("adaptive", 0.1, 0.0), "kl_target"),
        (("adaptive", 0.1, math.nan), "kl_target"),
        (("adaptive", 0.1, 0.1, -5), "kl_horizon"),
        (("fixed", 0.1, 0.1), "no meaning"),
    ],
)
def test_mistakes_are_named(arguments: tuple, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        kl_controller(*arguments)
