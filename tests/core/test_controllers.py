from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("kl_ctrl", ["adaptive", "pid"])
@pytest.mark.parametrize("start", [5e-324, 1e-310, 1e-3, 1e305, 1.7e308])
@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf, -1e300, 0.0, 1e300])
@pytest.mark.parametrize("n", [-5, 0, 10**6, math.inf, math.nan])
def test_no_start_and_no_input_ends_it(kl_ctrl: str, start: float, kl: float, n: float) -> None:
    """What no float holds included: 1e305 times 1e4, and 1e-310 over 1e4."""
    controller = kl_controller(kl_ctrl, start, kl_target=0.1)
    for _ in range(100):
        controller.update(kl, n)  # type: ignore[arg-type]
        controller.update(0.1, n)  # type: ignore[arg-type]  # on target: 0 times whatever n is
    assert 0 < controller.value < math.inf
    assert start / 1e4 * (1 - 1e-9) <= controller.value <= start * 1e4 * (1 + 1e-9)
    if not (math.isfinite(kl) and n > 0):
        assert controller.value == start


@pytest.mark.parametrize("value", [-0.2, 0.0, math.nan, math.inf, None, "x", True, 10**400])
def test_a_saved_coefficient_that_is_none_is_named(value: object) -> None:
    with pytest.raises(ValueError, match="saved state of the KL controller has value="):
        AdaptiveKL(0.1, 0.05, 1000).load_state_dict({"kl_ctrl": "adaptive", "value": value})


@pytest.mark.parametrize("kl_ctrl", ["adaptive", "pid"])
@pytest.mark.parametrize(("saved", "held"), [(1e9, 10.0), (1e-30, 1e-7), (3.0, 3.0)])
def test_a_saved_coefficient_beyond_the_ends_is_held_and_said(
    kl_ctrl: str, saved: float, held: float, capsys: pytest.CaptureFixture[str]
) -> None:
    controller = kl_controller(kl_ctrl, 1e-3, kl_target=0.1)
    controller.load_state_dict({"value": np.float64(saved), "error": None})
    assert controller.value == pytest.approx(held, rel=1e-12)
    assert capsys.readouterr().out.count("kl_coef=") == (saved != held)


@pytest.mark.parametrize("kl_ctrl", ["adaptive", "pid"])
def test_what_a_controller_is_fed_is_a_number(kl_ctrl: str) -> None:
    """A tensor's or an array's one number is; what is none is named, and moves nothing."""
    moved, *others = (kl_controller(kl_ctrl, 0.1, kl_target=0.1) for _ in range(4))
    moved.update(0.25, 64)
    given = ((torch.tensor(0.25), 64), (np.array([0.25]), torch.tensor([64])), (0.25, np.int32(64)))
    for controller, (kl, n) in zip(others, given, strict=True):
        controller.update(kl, n)
        assert controller.value == moved.value and type(controller.value) is float
    before = moved.value
    for kl, n, name in (
        (None, 64, "kl=None"),
        ("0.2", 64, "kl='0.2'"),
        (torch.ones(2), 64, "kl=tensor"),
        (0.2, None, "n_samples=None"),
    ):
        with pytest.raises(TypeError, match=f"{name}.* must be a number"):
            moved.update(kl, n)
    moved.update(10**400, 64)  # inf to a float: a diverged batch
    assert moved.value == before
    moved.update(0.25, 10**400)
    assert before < moved.value <= 0.1 * 1e4


def test_state_survives() -> None:
    controller = AdaptiveKL(0.1, 0.05, 1000)
    controller.update(1.0, 500)
    resumed = AdaptiveKL(0.1, 0.05, 1000)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.value == controller.value != 0.1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("sine", 0.1), "fixed, adaptive, linear, cosine, pid"),
        (("adaptive", 0.1), "kl_target"),
        (("adaptive", -0.1, 0.1), "positive kl_coef"),
        (("adaptive", 0.1, 0.0), "kl_target"),
        (("adaptive", 0.1, math.nan), "kl_target"),
        (("adaptive", 0.1, 0.1, -5), "kl_horizon"),
        (("fixed", 0.1, 0.1), "no meaning"),
        (("fixed", math.nan), "kl_coef=nan must be finite"),
        (("linear", math.inf), "kl_coef=inf must be finite"),
        (("fixed", 10**400), "kl_coef=inf must be finite"),
        (("adaptive", 0.1, 0.1, 10**400), "kl_horizon=inf must be finite"),
        # Half as many digits as a float: the least number of those is 0 to it.
        (("adaptive", 0.1, np.float16(0)), "kl_target=0 must be finite and positive"),
        ((["pid"], 0.1), "kl_ctrl=.'pid'. is unknown"),
    ],
)
def test_mistakes_are_named(arguments: tuple, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        kl_controller(*arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("adaptive", "0.1", 0.1), "kl_coef must be a number, got '0.1'"),
        (("fixed", None), "kl_coef must be a number, got None"),
        (("fixed", True), "kl_coef must be a number, got True"),
        (("adaptive", 0.1, "x"), "kl_target must be a number, got 'x'"),
        (("adaptive", 0.1, np.True_), "kl_target must be a number, got np.True_"),
    ],
)
def test_a_setting_that_is_no_number_is_named(arguments: tuple, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        kl_controller(*arguments)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, Fraction])
def test_a_number_of_any_library_is_saved_as_one(kind: type) -> None:
    """JSON has none of numpy's."""
    made = kl_controller("linear", kind(2), kl_end=kind(1), kl_steps=kind(4))
    for _ in range(2):
        assert json.loads(json.dumps(made.state_dict())) == made.state_dict()
        made.update(0.0, 1)
    assert made.value == 1.5
    saved = made.state_dict()
    made.load_state_dict(saved | {"done": np.int64(saved["done"])})
    assert json.loads(json.dumps(made.state_dict())) == saved


def test_without_a_horizon_it_is_that_of_both_hosts() -> None:
    """10 000 answers: OpenRLHF's ``--algo.kl.horizon`` and verl's ``kl_ctrl.horizon``."""
    controller = kl_controller("adaptive", 0.1, kl_target=1.0)
    controller.update(kl=2.0, n_samples=1000)
    assert controller.value == pytest.approx(0.1 * math.exp(0.2 * 1000 / 10_000))


@pytest.mark.parametrize(
    ("kl_ctrl", "settings", "words"),
    [
        ("linear", {"kl_steps": 5}, "linear needs a kl_end"),
        ("cosine", {"kl_end": 0.1}, "cosine needs a kl_steps"),
        ("linear", {"kl_end": -0.1, "kl_steps": 5}, "kl_end=-0.1 must be finite and not negative"),
        ("linear", {"kl_end": math.nan, "kl_steps": 5}, "kl_end=nan"),
        ("cosine", {"kl_end": 0.1, "kl_steps": 0}, "kl_steps=0 must be finite and at least 1"),
        ("cosine", {"kl_end": 0.1, "kl_steps": 5, "kl_target": 1}, "it is for adaptive, pid"),
        ("pid", {}, "pid needs a kl_target, the KL to hold, nats per token"),
        ("pid", {"kl_target": 1, "kl_horizon": 9}, "kl_horizon=9 has no meaning.*for adaptive"),
        ("pid", {"kl_target": 1, "kl_band": 1}, "kl_band=1 must be below 1"),
        ("pid", {"kl_target": 1, "kl_band": -0.1}, "kl_band=-0.1 must be finite and not negative"),
        ("adaptive", {"kl_target": 1, "kl_end": 0}, "kl_end=0 has no meaning.*for linear, cosine"),
        ("fixed", {"kl_steps": 9}, "kl_steps=9 has no meaning with kl_ctrl=fixed"),
    ],
)
def test_a_setting_that_is_missing_or_of_another_controller_is_named(
    kl_ctrl: str, settings: dict[str, float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        kl_controller(kl_ctrl, 0.1, **settings)


@pytest.mark.parametrize("kl_ctrl", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(1.0, 1e-20), (0.3, 0.1), (1e308, 1e-308), (0.7, 0.0)])
def test_a_schedule_arrives_at_its_end(kl_ctrl: str, start: float, end: float) -> None:
    """However small it is beside the start: 1 + (1e-20 - 1) is 0."""
    controller = kl_controller(kl_ctrl, start, kl_end=end, kl_steps=3)
    assert controller.value == start
    for _ in range(5):
        controller.update(0.0, 1)
    assert controller.value == end


@pytest.mark.parametrize("end", [0.0, 0.1, 0.5])
def test_a_schedule_goes_from_start_to_end_and_stays(end: float) -> None:
    linear = kl_controller("linear", 0.3, kl_end=end, kl_steps=4)
    cosine = kl_controller("cosine", 0.3, kl_end=end, kl_steps=4)
    half = math.sqrt(0.5) / 2
    shares = [0, 0.25, 0.5, 0.75, 1, 1]
    rounded = [0, 0.5 - half, 0.5, 0.5 + half, 1, 1]
    for step, (straight, round_) in enumerate(zip(shares, rounded, strict=True)):
        assert linear.value == pytest.approx(0.3 + (end - 0.3) * straight)
        assert cosine.value == pytest.approx(0.3 + (end - 0.3) * round_)
        for controller in (linear, cosine):
            controller.update(math.nan if step else 1e9, 1024)  # whatever the KL is


def test_a_pid_does_nothing_in_its_band_and_pulls_outside_of_it() -> None:
    controller = kl_controller("pid", 0.1, kl_target=0.5, kl_band=0.2)
    for kl in (0.41, 0.59, 0.5):
        controller.update(kl, 8)
        assert controller.value == 0.1
    controller.update(0.75, 8)  # 1.5 targets: 0.3 above the band
    assert controller.value == pytest.approx(0.1 * math.exp(0.3 * 0.3 + 0.03 * 0.3))
    controller.update(0.75, 8)
    assert controller.value == pytest.approx(0.1 * math.exp(0.3 * 0.3 + 2 * 0.03 * 0.3))
    controller.update(0.25, 8)  # 0.3 below it
    moved = 0.3 * 0.3 + 2 * 0.03 * 0.3 - 0.3 * 0.6 - 0.03 * 0.3
    assert controller.value == pytest.approx(0.1 * math.exp(moved))
    before = controller.value
    controller.update(math.nan, 8)
    assert controller.value == before


def test_a_pid_meets_one_error_however_large_and_no_fall_at_the_start() -> None:
    for kl, error in ((1e9, 1.0), (0.0, -0.8)):
        controller = kl_controller("pid", 0.1, kl_target=0.5)
        controller.update(kl, 8)
        assert controller.value == pytest.approx(0.1 * math.exp(0.03 * error))


@pytest.mark.parametrize("kl", [0.0, 1e9])
def test_a_pid_is_held_within_bounds_and_comes_back(
    kl: float, capsys: pytest.CaptureFixture[str]
) -> None:
    controller = kl_controller("pid", 0.001, kl_target=0.1)
    for _ in range(2000):
        controller.update(kl, 8)
    assert controller.value == pytest.approx(0.001 * (1e4 if kl else 1e-4))
    assert capsys.readouterr().out.count("the pid controller goes") == 1
    for _ in range(10):  # no sum has wound up
        controller.update(0.0 if kl else 1e9, 8)
    assert 1e-7 * 1.1 < controller.value < 10 / 1.1


STATES = {
    "adaptive": {"kl_target": 0.05, "kl_horizon": 1000},
    "linear": {"kl_end": 0.5, "kl_steps": 9},
    "cosine": {"kl_end": 0.0, "kl_steps": 9},
    "pid": {"kl_target": 0.05},
}


@pytest.mark.parametrize("kl_ctrl", STATES)
def test_killed_and_resumed_is_the_same_as_never_killed(kl_ctrl: str) -> None:
    kls = [0.0, 0.01, 0.2, 0.07, 0.3, 0.02, 0.05]
    whole, first, second = (kl_controller(kl_ctrl, 0.1, **STATES[kl_ctrl]) for _ in range(3))
    for kl in kls:
        whole.update(kl, 64)
    for kl in kls[:3]:
        first.update(kl, 64)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.value == first.value
    for kl in kls[3:]:
        second.update(kl, 64)
    assert second.value == whole.value != 0.1


@pytest.mark.parametrize(
    ("kl_ctrl", "state", "words"),
    [
        ("linear", {"value": 0.1}, "done=None, which must be a count of steps"),
        ("cosine", {"value": 0.1, "done": -1}, "done=-1"),
        ("cosine", {"value": 0.1, "done": 1.5}, "done=1.5"),
        ("pid", {"value": 0.1, "error": 2}, "error=2, which must be a number from -1 to 1"),
        ("pid", {"value": 0.0, "error": 0.1}, "value=0.0"),
        ("pid", {"value": 0.1, "error": True}, "error=True"),
        ("adaptive", None, "state of the KL controller is None, and must be what state_dict gave"),
        ("cosine", [1], r"state of the KL controller is \[1\]"),
    ],
)
def test_a_saved_state_that_is_none_is_named(
    kl_ctrl: str, state: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        kl_controller(kl_ctrl, 0.1, **STATES[kl_ctrl]).load_state_dict(state)


@pytest.mark.parametrize("name", ["kl_coef", "target", "horizon"])
@pytest.mark.parametrize("number", [0, -1.0, float("nan"), float("inf")])
def test_a_number_that_can_not_drive_is_refused_at_once(name: str, number: float) -> None:
    """At the first update a target of 0 divides by it, and a negative one drives the wrong way."""
    given = {"kl_coef": 0.1, "target": 0.1, "horizon": 100.0} | {name: number}
    with pytest.raises(ValueError, match=f"^{name}=.* must be finite and positive$"):
        AdaptiveKL(**given)
