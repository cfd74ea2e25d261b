from __future__ import annotations

import itertools
import math

import pytest

from klplug import AdaptiveKL, FixedKL, kl_controller


def test_fixed_stays() -> None:
    controller = kl_controller("fixed", 0.1)
    assert isinstance(controller, FixedKL)
    controller.update(100.0, 64)
    controller.load_state_dict({"kl_ctrl": "fixed", "value": 5.0})
    assert controller.value == 0.1


def test_adaptive_moves_towards_the_target_by_ziegler_s_rule_as_an_exponent() -> None:
    controller = kl_controller("adaptive", 0.1, kl_target=0.05, kl_horizon=1000)
    assert isinstance(controller, AdaptiveKL)
    controller.update(0.055, 100)  # error 0.1
    assert controller.value == pytest.approx(0.1 * math.exp(0.1 * 100 / 1000))
    # To first order in n / horizon, Ziegler's own.
    assert controller.value == pytest.approx(0.1 * (1 + 0.1 * 100 / 1000), rel=1e-4)
    before = controller.value
    controller.update(5.0, 100)  # clipped to 0.2
    assert controller.value == pytest.approx(before * math.exp(0.02))
    before = controller.value
    controller.update(-1.0, 100)
    assert controller.value == pytest.approx(before * math.exp(-0.02))
    controller.update(math.nan, 100)
    assert controller.value == pytest.approx(before * math.exp(-0.02))


@pytest.mark.parametrize("kl", [0.0, 1e-9, 1e9])
@pytest.mark.parametrize("horizon", [1, 100, 10_000])
@pytest.mark.parametrize("n", [1, 8192, 10**7])
def test_a_coefficient_is_positive_and_finite_whatever_comes(
    kl: float, horizon: int, n: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 8192 answers a step and a horizon of 100, Ziegler's factor is 1 - 0.2 * 81.92."""
    controller = kl_controller("adaptive", 0.001, kl_target=0.1, kl_horizon=horizon)
    seen = []
    for _ in range(200):
        controller.update(kl, n)
        seen.append(controller.value)
    assert all(0.001 * 1e-4 * (1 - 1e-9) <= value <= 0.001 * 1e4 * (1 + 1e-9) for value in seen)
    steps = [b - a for a, b in itertools.pairwise(seen)]
    assert all(step >= 0 if kl > 0.1 else step <= 0 for step in steps)
    said = capsys.readouterr().out
    assert said.count("kl_horizon") == (n > horizon)
    reached = abs(math.log(seen[-1] / 0.001)) > math.log(1e4) * (1 - 1e-9)
    assert said.count("kl_coef=") == reached
    if reached:  # and it comes back
        controller.update(0.1 * (2 if kl < 0.1 else 0.5), 1)
        assert 1e-7 < controller.value < 10


@pytest.mark.parametrize("value", [-0.2, 0.0, math.nan, math.inf, None, "x"])
def test_a_saved_coefficient_that_is_none_is_named(value: object) -> None:
    with pytest.raises(ValueError, match="saved state of the KL controller has value="):
        AdaptiveKL(0.1, 0.05, 1000).load_state_dict({"kl_ctrl": "adaptive", "value": value})


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
        (("adaptive", -0.1, 0.1), "positive kl_coef"),
        (("adaptive", 0.1, 0.0), "kl_target"),
        (("adaptive", 0.1, math.nan), "kl_target"),
        (("adaptive", 0.1, 0.1, -5), "kl_horizon"),
        (("fixed", 0.1, 0.1), "no meaning"),
    ],
)
def test_mistakes_are_named(arguments: tuple, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        kl_controller(*arguments)


def test_without_a_horizon_it_is_that_of_both_hosts() -> None:
    """10 000 answers: OpenRLHF's ``--algo.kl.horizon`` and verl's ``kl_ctrl.horizon``."""
    controller = kl_controller("adaptive", 0.1, kl_target=1.0)
    controller.update(kl=2.0, n_samples=1000)
    assert controller.value == pytest.approx(0.1 * math.exp(0.2 * 1000 / 10_000))
