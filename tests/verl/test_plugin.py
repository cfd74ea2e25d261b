"""Found by verl, loud when it can't work: fresh processes, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from klplug_verl.hooks import PATCH, TESTED, claim_checkpoints
from klplug_verl_guard import asked, unquoted
from omegaconf import OmegaConf

from klplug.hosting.patching import Hook, HookError, Patch
from klplug.hosting.settings import SettingsError
from recipes import cpu_shim
from tests.hosting.test_folder import another_run

ROOT = Path(__file__).resolve().parents[2]
MAIN = ("-m", "verl.trainer.main_ppo")
ASKS = ("+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=0.01")


def run(
    folder: Path, arguments: Sequence[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("KLPLUG")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        env=own | cpu_shim.environment("verl") | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# The contract with the wheel that is installed.


def test_every_hook_is_there() -> None:
    PATCH.check()


def test_both_entry_points_are_declared() -> None:
    found = {e.name: e.value for e in entry_points(group="verl.plugins")}
    assert found["klplug"] == "klplug_verl.install"
    assert found["klplug_guard"] == "klplug_verl_guard"


def test_the_patch_is_complete_and_reaches_by_name_imports() -> None:
    import klplug_verl
    import verl.experimental.separation.ray_trainer as separation
    import verl.trainer.distillation.losses as distillation
    from verl.trainer.ppo.v1 import trainer_base
    from verl.workers import engine_workers

    klplug_verl.apply()
    assert all(klplug_verl.status().values())
    for function in (
        engine_workers.ppo_loss,
        distillation.ppo_loss,
        trainer_base.apply_kl_penalty,
        trainer_base.compute_advantage_for_multi_trajectories,
        trainer_base.reduce_metrics,
        separation.apply_kl_penalty,
    ):
        assert hasattr(function, "__klplug__")


def test_a_patched_loss_is_pickled_by_reference() -> None:
    import pickle
    from functools import partial

    from verl.workers.utils import losses

    assert pickle.loads(pickle.dumps(partial(losses.ppo_loss, dp_group=None))).func is (
        losses.ppo_loss
    )


@pytest.mark.parametrize("hook", PATCH.hooks, ids=[hook.path for hook in PATCH.hooks])
def test_a_hook_that_moved_or_changed_is_named(hook: Hook) -> None:
    moved = Hook(hook.module, hook.name + "_moved", hook.parameters, hook.wrapper)
    changed = Hook(hook.module, hook.name, (*hook.parameters, "no_such"), hook.wrapper)
    for broken, word in ((moved, "no such name"), (changed, "without no_such")):
        with pytest.raises(HookError) as error:
            Patch("verl", TESTED, (broken,)).check()
        for part in (f"verl {version('verl')}", TESTED, broken.path, "expects", word):
            assert part in str(error.value)


# The command line that asks.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["+klplug.kl_type=k2_as_loss"], True),
        (["++klplug.kl_coef=1"], True),
        (["klplug={kl_type: none}"], True),
        (["actor_rollout_ref.actor.kl_loss_type='k2_as_loss,cap=3'"], True),
        (["algorithm.kl_penalty=k1_in_reward"], True),
        (["algorithm.use_kl_in_reward=True", "actor_rollout_ref.actor.kl_loss_type=k3+"], False),
        (["trainer.project_name=klplug.test"], False),
    ],
)
def test_what_asks_for_klplug(words: list[str], expected: bool) -> None:
    assert asked(["main_ppo.py", *words]) is expected


@pytest.mark.parametrize(
    ("word", "readable"),
    [
        ("+klplug.kl_type=k2_as_loss,ratio=none", False),
        ("klplug.kl_type=k2_as_loss,cap=2.0,horizon=sequence+k1_in_reward", False),
        ("actor_rollout_ref.actor.kl_loss_type=k2_as_loss,cap=3", False),
        ("+klplug.kl_type=0.7*k2_as_loss+0.3*k2_as_loss,reference=old", False),
        ("+klplug.kl_type=k2_as_loss+-0.5*k2_as_loss,weight=mask:a", False),
        ("+klplug.ref_update=ema:0.99,every=10", False),
        ("+klplug.ref_update=ema:0.99", True),
        ("+klplug.kl_type=0.7*k2_as_loss+0.3*k3_as_loss", True),
        ("+klplug.kl_type='k2_as_loss,ratio=none'", True),
        ('+klplug.kl_type="k2_as_loss,ratio=none"', True),
        ("+klplug.kl_type=k2_as_loss", True),
        (r"+klplug.kl_type=k2_as_loss\,ratio\=none", True),
        ("+klplug={kl_type: 'k2_as_loss,ratio=none'}", True),
        ("actor_rollout_ref.actor.kl_loss_type=k3+", True),
    ],
)
def test_quotes_that_hydra_needs(word: str, readable: bool) -> None:
    """As Hydra's own parser says."""
    if readable:
        OverridesParser.create().parse_overrides([word])
        assert unquoted(["main_ppo.py", word]) is None
    else:
        with pytest.raises(OverrideParseException):
            OverridesParser.create().parse_overrides([word])
        assert unquoted(["main_ppo.py", word]) == word


def test_a_run_that_saves_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    trainer = {"default_local_dir": str(tmp_path), "save_freq": 1, "val_only": False}
    with another_run(tmp_path):
        for saves_none in ({"save_freq": -1}, {"val_only": True}):
            claim_checkpoints(OmegaConf.create({"trainer": trainer | saves_none}), make=True)
        config = OmegaConf.create({"trainer": trainer, "klplug": {"kl_type": "k2_as_loss"}})
        with pytest.raises(SettingsError, match=r"trainer\.default_local_dir=.*: another run"):
            claim_checkpoints(config, make=False)


# Whole processes.


def test_a_kl_type_without_quotes_is_told_what_to_write(tmp_path: Path) -> None:
    done = run(tmp_path, [*MAIN, "+klplug.kl_type=k2_as_loss,ratio=none", "+klplug.kl_coef=0.1"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert """write "+klplug.kl_type='k2_as_loss,ratio=none'\"""" in done.stderr


def test_unused_it_says_inactive_once_and_changes_nothing(tmp_path: Path) -> None:
    code = (
        "import verl, verl.utils.device as d; from omegaconf import OmegaConf;"
        "c = OmegaConf.create({'trainer': {'device': 'cpu'}}); before = OmegaConf.to_yaml(c);"
        "d.auto_set_device(c); assert OmegaConf.to_yaml(c) == before"
    )
    done = run(tmp_path, ["-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("inactive") == 1 and "active in" not in done.stdout


def test_disabled_it_is_not_there(tmp_path: Path) -> None:
    code = "import verl, verl.utils.device as d; print(hasattr(d.auto_set_device, '__klplug__'))"
    assert run(tmp_path, ["-c", code]).stdout.strip().endswith("True")
    done = run(tmp_path, ["-c", code], KLPLUG_DISABLE="1")
    assert done.stdout.strip().endswith("False") and "klplug" not in done.stdout + done.stderr


def test_disabled_and_asked_for_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path, [*MAIN, *ASKS], KLPLUG_DISABLE="1")
    assert done.returncode == 2
    assert "klplug: error: KLPLUG_DISABLE=1" in done.stderr


def test_kept_out_and_asked_for_is_an_error(tmp_path: Path) -> None:
    """Of all that verl loads klplug is not; Hydra imports its guard all the same."""
    done = run(tmp_path, [*MAIN, *ASKS], VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "klplug: error: verl 0.9.1 did not load klplug" in done.stderr
    assert "VERL_USE_EXTERNAL_PLUGINS must be unset" in done.stderr
    unasked = run(tmp_path, [*MAIN, "--help"], VERL_USE_EXTERNAL_PLUGINS="none")
    assert unasked.returncode == 0 and "klplug" not in unasked.stderr


def test_another_command_of_hydras_loads_nothing_of_klplug(tmp_path: Path) -> None:
    code = (
        "import sys; from hydra.core.plugins import Plugins; Plugins.instance()\n"
        "assert 'hydra_plugins.klplug_guard' in sys.modules\n"
        "assert not {'klplug', 'klplug_verl', 'verl'} & set(sys.modules)"
    )
    done = run(tmp_path, ["-c", code, "+klplug.kl_type=k2_as_loss"], KLPLUG_CPU_SHIM="")
    assert done.returncode == 0 and not done.stderr, done.stderr


PACKAGES = ("klplug_verl", "klplug", "klplug_verl_guard")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_directory_that_hides_the_plugin_stops_the_run(tmp_path: Path, package: str) -> None:
    hidden = tmp_path / package
    hidden.mkdir()
    (hidden / "__init__.py").touch()
    done = run(tmp_path, [*MAIN, *ASKS])
    assert done.returncode == 2
    assert "klplug: error" in done.stderr and str(hidden) in done.stderr


def test_a_folder_without_init_hides_nothing_that_is_installed(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / package).mkdir()
    done = run(tmp_path, [*MAIN, *ASKS])
    assert "kl_type=k2_as_loss" in done.stdout or "klplug: error: kl_type" in done.stderr


def test_a_moved_function_stops_the_run_that_asks_and_no_other(tmp_path: Path) -> None:
    """A doctored verl whose ``ppo_loss`` has another signature."""
    startup = tmp_path / "startup"
    startup.mkdir()
    (startup / "usercustomize.py").write_text(
        "from wrapt import register_post_import_hook\n"
        "def doctor(module):\n"
        "    module.ppo_loss = lambda config, output: None\n"
        "register_post_import_hook(doctor, 'verl.workers.utils.losses')\n"
    )
    shim = cpu_shim.environment("verl")["PYTHONPATH"]
    code = (
        "import usercustomize, runpy; runpy.run_module('verl.trainer.main_ppo', None, '__main__')"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(startup), shim])}
    done = run(tmp_path, ["-c", code, *ASKS, *files(tmp_path)], **path)
    assert done.returncode == 2
    for word in (
        "klplug: error",
        "verl 0.9.1",
        "verl.workers.utils.losses.ppo_loss",
        "model_output",
    ):
        assert word in done.stderr, done.stderr
    unused = run(tmp_path, ["-c", "import usercustomize, verl.workers.utils.losses"], **path)
    assert unused.returncode == 0 and "klplug: WARNING" in unused.stderr


def files(folder: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    path = folder / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1+1"]}), path)
    model = ROOT / "recipes" / "quickstart" / "policy"
    return [
        f"data.train_files={path}",
        f"data.val_files={path}",
        f"actor_rollout_ref.model.path={model}",
        "algorithm.adv_estimator=grpo",
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+klplug.kl_type=k4_as_loss", "+klplug.kl_coef=1"], ["klplug: error", "k4_as_loss"]),
        (
            [*ASKS, "actor_rollout_ref.actor.kl_loss_coef=0.5"],
            ["klplug: error", "kl_loss_coef=0.5 contradicts kl_type k2_as_loss"],
        ),
        ([*ASKS, "actor_rollout_ref.actor.no_such_key=1"], ["no_such_key", "not in struct"]),
    ],
)
def test_a_mistake_ends_the_stock_command_in_one_line(
    tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    done = run(tmp_path, [*MAIN, *overrides, *files(tmp_path)])
    assert done.returncode != 0
    for word in words:
        assert word in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
