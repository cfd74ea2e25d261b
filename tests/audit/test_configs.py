"""Which config file a trainer takes, and what it sets, where its source lies beside the script."""

from __future__ import annotations

from pathlib import Path

import pytest

from klplug.audit import Report, audit

_A = "actor_rollout_ref.actor"
_GRPO = "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8"
_MAIN = """\
import hydra
raise SystemExit("the audit ran this")


@hydra.main(config_path={path!r}, config_name={name!r}, version_base=None)
def main(config):
    run(config)
"""


def _project(tmp_path: Path, files: dict[str, str], command: str) -> Report:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = tmp_path / "scripts" / "train" / "run.sh"
    script.parent.mkdir(parents=True)
    script.write_text(f"{command}\n")
    return audit(script)


_RUN = "python3 -m verl.trainer.main_ppo"
_LOSS = """\
algorithm: {use_kl_in_reward: false}
actor_rollout_ref: {actor: {use_kl_loss: true, kl_loss_type: mse, kl_loss_coef: 0.25}}
"""


# Where the checkout is, as scripts two folders down find it.
@pytest.mark.parametrize(
    "root",
    [
        'R="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"',
        'S=$(cd $(dirname "$0") &>/dev/null && pwd -P); R=$S/../..',
        'R=$(dirname $(dirname $(dirname $(readlink -f "$0"))))',
        'R=$(realpath "$(dirname "$0")/../..")',
        'S=$(dirname "$(realpath "$0")"); S="${S%/*}"; R="${S%/*}"',
        'R="${BASH_SOURCE[0]%/*}/../.."',
        'R=${R:-"$(git rev-parse --show-toplevel)"}',
    ],
)
def test_a_config_is_found_from_where_the_script_lies(tmp_path: Path, root: str) -> None:
    command = f'{root}\n{_RUN} --config-path="$R/conf" --config-name=mine {_GRPO}'
    report = _project(tmp_path, {"conf/mine.yaml": _LOSS}, command)
    assert (report.gradient, report.beta) == ("reverse", 0.25)


@pytest.mark.parametrize(
    "path",
    [
        'os.path.join(os.path.dirname(__file__), "own", "config")',
        'str(Path(__file__).resolve().parent / "own" / "config")',
        'os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "mine/own/config")',
        'f"{Path(__file__).parents[1]}/mine/own/config"',
        "HERE",
    ],
)
def test_a_path_that_hydra_main_makes_of_its_own_file(tmp_path: Path, path: str) -> None:
    main = _MAIN.format(path="PATH", name="mine").replace("'PATH'", path)
    main = f'HERE = os.path.dirname(__file__) + "/own/config"\n{main}'
    files = {"mine/main.py": main, "mine/own/config/mine.yaml": _LOSS}
    report = _project(tmp_path, files, f"python3 -m mine.main {_GRPO}")
    assert (report.gradient, report.beta) == ("reverse", 0.25)


@pytest.mark.parametrize("started", ["-m mine.trainer.main", "mine/trainer/main.py"])
def test_a_trainer_takes_the_config_of_its_own_hydra_main(tmp_path: Path, started: str) -> None:
    files = {
        "mine/trainer/main.py": _MAIN.format(path="config", name="mine"),
        "mine/trainer/config/mine.yaml": f"defaults: [ppo_trainer, _self_]\n{_LOSS}",
    }
    report = _project(tmp_path, files, f"python3 {started} {_GRPO}")
    assert (report.gradient, report.beta) == ("reverse", 0.25)
    # The command goes before it.
    (tmp_path / "scripts" / "train" / "run.sh").write_text(
        f"python3 {started} {_GRPO} {_A}.kl_loss_type=low_var_kl\n"
    )
    assert audit(tmp_path / "scripts" / "train" / "run.sh").gradient == "forward"


def test_a_path_that_hydra_main_gives_as_a_package(tmp_path: Path) -> None:
    """rllm's examples: their config lies in the package, beside the folder of the examples."""
    files = {
        "examples/mine/main.py": _MAIN.format(path="pkg://theirs.trainer.config", name="mine"),
        "theirs/trainer/config/mine.yaml": f"defaults: [ppo_trainer, _self_]\n{_LOSS}",
    }
    report = _project(tmp_path, files, f"python3 -m examples.mine.main {_GRPO}")
    assert (report.gradient, report.beta) == ("reverse", 0.25)
    (tmp_path / "theirs/trainer/config/mine.yaml").unlink()
    assert audit(tmp_path / "scripts" / "train" / "run.sh").gradient is None
    main = _MAIN.format(path="pkg://verl.trainer.config", name="ppo_trainer")
    own = {"examples/mine/main.py": main}
    report = _project(tmp_path / "other", own, f"python3 -m examples.mine.main {_GRPO}")
    assert report.gradient == "none"  # verl's own config, which need not be here


def test_a_default_that_is_written_from_the_root(tmp_path: Path) -> None:
    """rllm's rllm/backend/verl.yaml brings verl's own config as ``/ppo_trainer``."""
    files = {
        "mine/main.py": _MAIN.format(path="conf", name="whole"),
        "mine/conf/whole.yaml": "defaults: [backend: verl, _self_]\n",
        "mine/conf/backend/verl.yaml": "# @package _global_\ndefaults: [/ppo_trainer, /more]\n"
        + _LOSS,
        "mine/conf/more.yaml": "actor_rollout_ref: {actor: {kl_loss_coef: 0.5}}\n",
    }
    report = _project(tmp_path, files, f"python3 -m mine.main {_GRPO}")
    assert (report.gradient, report.beta) == ("reverse", 0.25)
    assert "config-not-read" not in [finding.id for finding in report.findings]


def test_positional_arguments_and_a_path_upwards(tmp_path: Path) -> None:
    main = 'import hydra\n@hydra.main("../../config", "mine")\ndef main(config): ...\n'
    files = {"mine/trainer/main.py": main, "config/mine.yaml": _LOSS}
    report = _project(tmp_path, files, f"python3 -m mine.trainer.main {_GRPO}")
    assert (report.gradient, report.beta) == ("reverse", 0.25)


@pytest.mark.parametrize(
    "main",
    [
        _MAIN.format(path="config", name="mine"),  # not there
        "import hydra\n@hydra.main(config_path=HERE, config_name='mine')\ndef main(c): ...\n",
    ],
)
def test_what_a_config_that_is_not_there_decides_is_unknown(tmp_path: Path, main: str) -> None:
    report = _project(tmp_path, {"mine/main.py": main}, f"python3 -m mine.main {_GRPO}")
    assert report.gradient is None
    assert "config_name" in report.unknown["gradient"][0]
    assert any(finding.id == "config-not-read" for finding in report.findings)


def test_a_default_that_is_not_there_is_unknown(tmp_path: Path) -> None:
    files = {
        "mine/main.py": _MAIN.format(path=".", name="mine"),
        "mine/mine.yaml": "defaults: [theirs, _self_]\nactor_rollout_ref: {rollout: {n: 4}}\n",
    }
    report = _project(tmp_path, files, "python3 -m mine.main algorithm.adv_estimator=grpo")
    assert report.gradient is None
    assert "mine.yaml's default=theirs" in report.unknown["gradient"][0]


def test_a_config_of_that_name_elsewhere_is_another(tmp_path: Path) -> None:
    # examples/split_placement of verl 0.2: its own config has no KL loss, the package's has one.
    files = {
        "examples/split.py": _MAIN.format(path="config", name="split"),
        "examples/config/split.yaml": _LOSS.replace("use_kl_loss: true", "use_kl_loss: false"),
        "split.yaml": _LOSS,
        "scripts/config/split.yaml": _LOSS,
    }
    report = _project(tmp_path, files, f"python3 examples/split.py {_GRPO}")
    assert report.gradient == "none"


def test_config_name_is_looked_for_where_hydra_main_says(tmp_path: Path) -> None:
    files = {
        "train.py": _MAIN.format(path="config", name="base"),
        "config/base.yaml": "defaults: [ppo_trainer, envs, _self_]\nmini: 32\nactor_rollout_ref:\n"
        "  actor: {ppo_mini_batch_size: '${mini}', kl_loss_type: kl}\n"
        "data: {train_batch_size: null}\n",
        "config/envs.yaml": "envs: {a: 1}\n",
        "config/_2_sokoban.yaml": "defaults: [base, _self_]\n",
    }
    command = f"python train.py --config-name _2_sokoban {_GRPO} {_A}.use_kl_loss=True"
    report = _project(tmp_path, files, command)
    assert report.gradient == "zero"
    # Its own code makes the batch: the host's rule on it is not known to hold.
    assert "rejected-setting" not in {finding.id for finding in report.findings}
    assert "the trainer itself decides it" in report.unknown["updates_per_rollout"][0]
    # rllm's asynchronous trainer, as verl's own, draws no batch: 0 is no number of answers.
    script = tmp_path / "scripts" / "train" / "run.sh"
    script.write_text(f"{command} data.train_batch_size=0\n")
    assert audit(script).updates_per_rollout is None


def test_a_recipe_is_found_in_its_own_repository(tmp_path: Path) -> None:
    # verl-recipe is verl's folder `recipe`: there the module's first name is the checkout.
    files = {
        "mine/main_mine.py": _MAIN.format(path="config", name="mine_trainer"),
        "mine/config/mine_trainer.yaml": f"hydra: {{searchpath: ['pkg://verl.trainer.config']}}\n"
        f"defaults: [ppo_trainer, _self_]\n{_LOSS}",
    }
    report = _project(tmp_path, files, f"python3 -m recipe.mine.main_mine {_GRPO}")
    assert (report.gradient, report.beta) == ("reverse", 0.25)


def test_a_trainer_whose_source_is_not_here_is_read_over_verls_defaults(tmp_path: Path) -> None:
    report = _project(tmp_path, {}, f"python3 -m mine.main {_GRPO} {_A}.use_kl_loss=True")
    assert report.gradient == "forward"


def test_a_source_that_is_no_python(tmp_path: Path) -> None:
    files = {"mine/main.py": "def main(:\n"}
    report = _project(tmp_path, files, f"python3 -m mine.main {_GRPO} {_A}.use_kl_loss=True")
    assert report.gradient == "forward"


def test_a_config_on_its_own_has_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "user.yaml").write_text(_LOSS)
    config = tmp_path / "mine.yaml"
    config.write_text("defaults: [ppo_trainer, user, _self_]\nalgorithm: {adv_estimator: grpo}\n")
    report = audit(config)
    assert (report.gradient, report.beta) == ("reverse", 0.25)
    config.write_text(f"{config.read_text()}actor_rollout_ref: {{actor: {{kl_loss_type: kl}}}}\n")
    report = audit(config)
    assert report.gradient == "zero" and report.findings[0].line == 3
    # What another file sets that is not there is not known.
    (tmp_path / "user.yaml").unlink()
    assert audit(config).gradient is None
    # A package above it is the release.
    package = tmp_path / "verl" / "trainer" / "config"
    package.mkdir(parents=True)
    (package / "ppo_trainer.yaml").write_text(_LOSS)
    (package / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\nalgorithm: {gamma: 1}\n")
    assert audit(package / "mine.yaml").version_from == "beside"
    assert audit(package / "mine.yaml").gradient == "reverse"


@pytest.mark.parametrize(("words", "beta"), [("", 0.25), ("engine=slow ", 0.5)])
def test_a_default_may_be_named_by_another(tmp_path: Path, words: str, beta: float) -> None:
    files = {
        "conf/mine.yaml": "defaults:\n- engine: fast\n"
        "- actor@actor_rollout_ref.actor: ${engine}_actor\n",
    }
    for name, coef in (("fast", 0.25), ("slow", 0.5)):
        files[f"conf/engine/{name}.yaml"] = "{}\n"
        files[f"conf/actor/{name}_actor.yaml"] = (
            f"use_kl_loss: true\nkl_loss_type: mse\nkl_loss_coef: {coef}\n"
        )
    command = f"{_RUN} --config-path=../../conf --config-name=mine {words}{_GRPO}"
    report = _project(tmp_path, files, command)
    assert (report.gradient, report.beta) == ("reverse", beta)


_GROUPS = {
    "conf/base.yaml": "defaults: [ppo_trainer, {algo: plain}, _self_]\n",
    "conf/algo/plain.yaml": "algorithm: {adv_estimator: grpo}\n",
    "conf/algo/kl.yaml": f"# @package _global_\n{_LOSS}",
}
_NAMED = "--config-path=../../conf --config-name=base"


@pytest.mark.parametrize(
    "words",
    [
        f"{_NAMED} algo=kl",
        f"{_NAMED} +algo@here=kl",
        "--config-dir=../../conf +algo=kl",
        "'hydra.searchpath=[file://conf]' +algo=kl",
    ],
)
def test_a_file_that_the_command_chooses_is_read(tmp_path: Path, words: str) -> None:
    report = _project(tmp_path, _GROUPS, f"{_RUN} {words} {_GRPO}")
    # As Hydra has it, what goes elsewhere sets no KL.
    right = ("none", 0.0) if "@here" in words else ("reverse", 0.25)
    assert (report.gradient, report.beta) == right


@pytest.mark.parametrize(
    "words",
    [
        f"{_NAMED} algo=lacks",
        f"{_NAMED} algo=$ALGO",
        "--config-dir=lacks +algo=kl",
        "rollout@actor_rollout_ref=mine",
        "actor@actor_rollout_ref.actor=mine_actor",
    ],
)
def test_what_a_chosen_file_that_is_not_there_decides_is_unknown(
    tmp_path: Path, words: str
) -> None:
    report = _project(tmp_path, _GROUPS, f"{_RUN} {words} {_GRPO} {_A}.use_kl_loss=True")
    assert report.gradient is None
    assert "config-not-read" in {finding.id for finding in report.findings}


def test_a_chosen_file_decides_its_own_package_alone(tmp_path: Path) -> None:
    # critic and reference have no setting that the verdict hangs on.
    words = "critic@critic=mine ref@actor_rollout_ref.ref=mine"
    written = f"{_A}.use_kl_loss=True {_A}.kl_loss_type=k2"
    report = _project(tmp_path, {}, f"{_RUN} {words} {_GRPO} {written}")
    assert report.gradient == "reverse" and report.unknown == {}
    assert "config-not-read" not in {finding.id for finding in report.findings}


@pytest.mark.parametrize("engine", ["dp", "megatron", "torchtitan", "veomni"])
def test_the_file_of_the_actor_has_the_engine(tmp_path: Path, engine: str) -> None:
    words = f"actor@actor_rollout_ref.actor={engine}_actor {_GRPO}"
    kl_type = "'+klplug.kl_type=\"k2_as_loss,vocab=exact\"' +klplug.kl_coef=0.1"
    report = _project(tmp_path, {}, f"{_RUN} {words} {kl_type}")
    refused = "klplug-refuses" in {finding.id for finding in report.findings}
    assert refused == (engine != "dp")


@pytest.mark.parametrize("recipe", ["recipe.dmpo.main_dmpo", "recipe/mine/main_mine.py"])
def test_the_config_of_a_recipe_that_is_not_here_is_unknown(tmp_path: Path, recipe: str) -> None:
    started = f"python3 {'' if recipe.endswith('.py') else '-m '}{recipe}"
    report = _project(tmp_path, {}, f"{started} {_GRPO} {_A}.use_kl_loss=True")
    assert report.gradient is None
    assert "_trainer is not read" in report.unknown["gradient"][0]


def test_the_config_of_a_recipe_of_verls_is_known(tmp_path: Path) -> None:
    # verl-recipe prime/config/prime_trainer.yaml: rloo, 4 answers.
    report = _project(tmp_path, {}, f"python3 -m recipe.prime.main_prime {_A}.use_kl_loss=True")
    assert (report.gradient, report.beta_relative) == ("forward", 0.001)
    # one_step_off_ppo_trainer.yaml has bypass_mode: the old policy is the sampler.
    started = "python3 -m verl.experimental.one_step_off_policy.main_ppo"
    kl_type = f"{_A}.use_kl_loss=True +klplug.kl_type=k2_as_loss +klplug.kl_coef=0.1"
    (tmp_path / "scripts/train/run.sh").write_text(f"{started} {_GRPO} {kl_type}\n")
    assert audit(tmp_path / "scripts/train/run.sh").rollout_corrected
