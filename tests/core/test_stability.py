"""Many updates per rollout, on an enumerated token: who stays at pi*, and who cycles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import stability, variance
from benchmarks.stability import FORMS, kl, optimum, path, rollout, spectral_radius

# Updates, and of each form the radius beside its KL.
ROW = r"^\| (\d+) \| ([\d.]+) \| [^|]+ \| ([\d.]+) \| [^|]+ \| ([\d.]+) \|"


@pytest.mark.parametrize("kl_type", FORMS.values())
def test_all_forms_have_the_optimum_as_fixed_point(kl_type: str) -> None:
    after = rollout(optimum().log(), kl_type, updates=20).softmax(-1)
    torch.testing.assert_close(after, optimum(), rtol=1e-12, atol=0)


def test_with_many_updates_only_the_corrected_one_is_stable() -> None:
    few = {name: spectral_radius(kl_type, 1) for name, kl_type in FORMS.items()}
    many = {name: spectral_radius(kl_type, 64) for name, kl_type in FORMS.items()}
    assert max(few.values()) < 1
    assert many["corrected"] < 0.5
    assert many["uncorrected"] > 2 and many["frozen"] > 2


def test_the_table_is_of_this_code() -> None:
    text = (Path(stability.__file__).parent / "results" / "stability.md").read_text()
    rows = {int(n): cells for n, *cells in re.findall(ROW, text, re.MULTILINE)}
    assert set(rows) == set(stability.UPDATES)
    for updates in (1, 8, 32, 64):
        radii = [spectral_radius(kl_type, updates) for kl_type in FORMS.values()]
        assert rows[updates] == [f"{radius:.3f}" for radius in radii]


def test_unstable_ones_fall_into_a_cycle() -> None:
    spans = {}
    for name, kl_type in FORMS.items():
        kls = [kl(policy) for policy in path(kl_type, 64, 24)][-6:]
        spans[name] = max(kls) - min(kls)
    assert spans["corrected"] < 1e-9
    assert spans["uncorrected"] > 0.3 and spans["frozen"] > 0.5


def test_one_rollout_driven_to_convergence_lands_on_the_optimum_with_the_ratio_alone() -> None:
    ends = {k: rollout(stability.REF.log(), k, 1200).softmax(-1) for k in FORMS.values()}
    distance = {k: float((end - optimum()).abs().max()) for k, end in ends.items()}
    assert distance["k2_as_loss,cap=none"] < 1e-9
    assert distance["k2_as_loss,ratio=none"] > 0.1 and distance["k1_in_reward"] > 0.1


def test_a_baseline_lowers_the_variance_in_one_problem_and_raises_it_in_another() -> None:
    ratio = {}
    for power in (0.85, -1.0):
        made = variance.against(variance.PROBLEMS["5 outcomes, one token"], power)
        on_policy = made.policy().detach()
        with_it, without = (
            variance.moments(made, 3, baseline, on_policy) for baseline in ("group", "none")
        )
        torch.testing.assert_close(with_it.mean, without.mean, rtol=1e-9, atol=1e-12)
        ratio[power] = with_it.variance / without.variance
    assert ratio[-1.0] < 0.6 and ratio[0.85] > 1.5
