"""The contract with the wheel: what is hooked, that it is all there, and what a moved hook says."""

from __future__ import annotations

import importlib
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import klplug_openrlhf
import pytest
from klplug_openrlhf.hooks import PATCH
from klplug_openrlhf.install import MODULES

from klplug import parse
from klplug.hosting.patching import Hook, HookError, Patch
from recipes import cpu_shim


def test_the_wheel_in_this_environment_has_every_hook() -> None:
    assert version("openrlhf") in PATCH.tested
    klplug_openrlhf.check()


def test_the_worker_watches_every_hooked_module() -> None:
    assert set(MODULES) == set(PATCH.modules)


def test_apply_reaches_by_name_imports_and_restore_undoes_it() -> None:
    from openrlhf.models import utils
    from openrlhf.trainer.ppo_utils import experience_maker
    from openrlhf.trainer.ray import ppo_actor

    original = utils.compute_approx_kl
    assert ppo_actor.compute_approx_kl is original
    assert not any(klplug_openrlhf.status().values())
    klplug_openrlhf.apply()
    try:
        assert all(klplug_openrlhf.status().values())
        assert ppo_actor.compute_approx_kl is utils.compute_approx_kl is not original
        assert experience_maker.compute_approx_kl is utils.compute_approx_kl
        klplug_openrlhf.apply()  # twice is once
        assert ppo_actor.compute_approx_kl is utils.compute_approx_kl
        assert pickle.loads(pickle.dumps(utils.compute_approx_kl)) is utils.compute_approx_kl
    finally:
        klplug_openrlhf.restore()
    assert ppo_actor.compute_approx_kl is original
    assert not any(klplug_openrlhf.status().values())


def test_stock_estimators_pass_through_bit_for_bit(patched: None) -> None:
    import torch
    from openrlhf.models import utils

    log_probs = torch.randn(3, 4, requires_grad=True)
    base = torch.randn(3, 4)
    for name in ("k1", "k2", "k3"):
        ours = utils.compute_approx_kl(log_probs, base, kl_estimator=name)
        theirs = utils.compute_approx_kl.__wrapped__(log_probs, base, kl_estimator=name)
        assert torch.equal(ours, theirs)


def test_a_kl_type_outside_of_a_training_step_stops(patched: None) -> None:
    import torch
    from openrlhf.models.utils import compute_approx_kl

    with pytest.raises(RuntimeError, match="outside of"):
        compute_approx_kl(torch.zeros(1, 1), torch.zeros(1, 1), kl_estimator="k2_as_loss")


DOCTORED = {
    "moved": ("def elsewhere(log_probs): ...", "no such name"),
    "changed": (
        "def compute_approx_kl(log_probs, reference, kl_estimator): ...",
        "without log_probs_base",
    ),
    "not a function": ("compute_approx_kl = 3", "a int"),
}


@pytest.mark.parametrize("name", DOCTORED)
def test_a_doctored_copy_is_refused_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, words = DOCTORED[name]
    package = tmp_path / "doctored"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "first.py").write_text("def fine(x): return x\n")
    (package / "second.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    kl = PATCH.hooks[0]
    patch = Patch(
        host="openrlhf",
        tested=PATCH.tested,
        hooks=(
            Hook("doctored.first", "fine", ("x",), kl.wrapper),
            Hook("doctored.second", kl.name, kl.parameters, kl.wrapper),
        ),
    )
    try:
        with pytest.raises(HookError) as error:
            patch.check()
        for word in ("openrlhf", version("openrlhf"), f"doctored.second.{kl.name}", words):
            assert word in str(error.value)
        first = importlib.import_module("doctored.first")
        assert first.fine(3) == 3 and not hasattr(first.fine, "__klplug__")
    finally:
        for module in ("doctored", "doctored.first", "doctored.second"):
            sys.modules.pop(module, None)


def test_the_launcher_refuses_a_doctored_openrlhf_before_anything_starts(tmp_path: Path) -> None:
    """A copy of the real package in which one parameter has another name."""
    import openrlhf

    shutil.copytree(Path(openrlhf.__file__).parent, tmp_path / "openrlhf")
    utils = tmp_path / "openrlhf" / "models" / "utils.py"
    utils.write_text(utils.read_text().replace("log_probs_base", "log_probs_reference"))
    done = subprocess.run(
        [sys.executable, "-m", "klplug_openrlhf", "--klplug.kl_type", "k2_as_loss",
         "--klplug.kl_coef", "0.1"],
        cwd=tmp_path,
        env=os.environ | cpu_shim.environment("openrlhf"),
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("klplug: error: klplug can't hook into openrlhf")
    assert "openrlhf.models.utils.compute_approx_kl" in line and "log_probs_base" in line


def test_a_tensor_that_no_hook_supplies_is_named() -> None:
    every = "k2_as_loss,head=combined+k3_as_loss,ratio=rollout+k1_in_reward,baseline=group"
    PATCH.check(parse(every).requires)
    with pytest.raises(HookError, match="nothing supplies entropies"):
        PATCH.check(["ref_log_probs", "entropies"])


def test_a_missing_module_is_named() -> None:
    patch = Patch("openrlhf", PATCH.tested, (Hook("openrlhf.gone", "f", (), lambda *_: None),))
    with pytest.raises(HookError, match=r"at openrlhf\.gone it expects a module"):
        patch.check()


def test_a_worker_is_patched_as_it_imports_and_stops_where_it_cannot_be(tmp_path: Path) -> None:
    """In a process of its own, as in a Ray worker: install first, then the host's module."""
    package = tmp_path / "openrlhf"
    for folder in (package, package / "models", package / "trainer", package / "trainer" / "ray"):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    (package / "trainer" / "ray" / "ppo_actor.py").write_text(
        textwrap.dedent(
            """
            def masked_mean(tensor, mask, dim=None): return tensor
            class ActorPPOTrainer:
                def __init__(self, strategy): ...
                def training_step(self, experience, kl_ctl, step): ...
                def ppo_train(self, kl_ctl): ...
            """
        )
    )
    (package / "models" / "utils.py").write_text("def compute_approx_kl(log_probs): ...\n")
    script = textwrap.dedent(
        """
        import sys
        from klplug_openrlhf.install import install
        install()
        assert "torch" not in sys.modules
        from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer, masked_mean
        assert hasattr(ActorPPOTrainer.training_step, "__klplug__")
        assert hasattr(masked_mean, "__klplug__")  # in place of aggregate_loss, which is not there
        import openrlhf.models.utils
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "HookError" in done.stderr and "openrlhf.models.utils.compute_approx_kl" in done.stderr
    assert "AssertionError" not in done.stderr
