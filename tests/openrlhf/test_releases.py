"""Releases that people have: the ones served, in full, and the ones refused, by name.

The released wheels themselves, with the dependencies of the newest one's environment.
"""

from __future__ import annotations

import pytest
from klplug_openrlhf.hooks import PATCH

from tests import latest
from tests.contract import missing
from tests.releases import release

SERVED = ("0.10.4", "0.9.10")


def test_the_table_names_the_releases_tested_here() -> None:
    for version in SERVED:
        assert version in PATCH.tested


@pytest.mark.parametrize("version", SERVED)
def test_every_hook_is_in_the_sources(version: str) -> None:
    assert missing(release("openrlhf", version), PATCH.hooks) == []


@pytest.mark.slow
@pytest.mark.parametrize("version", SERVED)
def test_a_kl_type_means_the_same_there(version: str) -> None:
    done = latest.behaviour("openrlhf", version)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"openrlhf {version} in" in done.stdout


def test_an_older_release_is_told_what_it_lacks() -> None:
    faults = missing(release("openrlhf", "0.8.11"), PATCH.hooks)
    assert [fault.split()[0] for fault in faults] == [
        "openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker._flatten_results",
        "openrlhf.trainer.ppo_trainer.BasePPOTrainer.save_best_checkpoint",
        "openrlhf.trainer.ppo_trainer.BasePPOTrainer.init_checkpoint_states",
    ]
