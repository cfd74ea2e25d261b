"""Grids of the GPU recipes: what they would run, as far as a machine without a GPU can tell."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes import cpu_shim, estimates
from recipes.launch import chosen
from recipes.openrlhf import host
from recipes.quickstart.run import RunError
from recipes.recipe import load as load_recipe
from recipes.reproduce import gpu
from recipes.reproduce.__main__ import main
from recipes.reproduce.drive import drive, read_rows
from recipes.reproduce.ends import by_formulation, ended, table
from recipes.reproduce.grid import GRIDS, Grid, GridError, load

ROOT = GRIDS.parents[2]
GPU_GRIDS = sorted(path.stem for path in GRIDS.glob("gpu-*.yaml"))


def of_one_seed(grid: Grid) -> list[gpu.GpuRun]:
    return [run for run in grid.runs if isinstance(run, gpu.GpuRun) and run.seed == 1]


def test_the_gpu_grids_have_tier_1s_formulations() -> None:
    assert GPU_GRIDS == ["gpu-gsm8k", "gpu-math", "gpu-openr1-math"]
    formulations = [run.kl_type for run in load("tier1").runs[:7]]
    for name in GPU_GRIDS:
        assert [run.kl_type for run in of_one_seed(load(name))] == formulations


@pytest.mark.parametrize("name", GPU_GRIDS)
def test_a_dry_run_estimates_gpu_hours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--dry-run"]) == 0
    runs = load(name).runs
    recipe = load_recipe(f"qwen2.5-math-1.5b-{name.removeprefix('gpu-')}")
    hours = len(runs) * recipe.gpus * estimates.time(recipe)[-1].value
    told = f"{len(runs)} runs to make; about {hours:.0f} GPU-hours on H100s, estimated"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("gsm8k\n", "gsm9k\n"), "no recipe 'qwen2.5-math-1.5b-gsm9k'"),
        (("k2_as_loss,horizon", "k2_as_los,horizon"), "k2_as_los"),
        (("recipe:", "steps: 30\nrecipe:"), "unknown key steps"),
        (("host: openrlhf", "host: vrl"), "host=vrl"),
        (("updates: 4", "updates: 3"), "updates=3 does not divide prompts=128"),
    ],
)
def test_a_gpu_grid_that_cannot_be_is_one_error(
    change: tuple[str, str], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text((GRIDS / "gpu-gsm8k.yaml").read_text().replace(*change))
    with pytest.raises(GridError, match=r"grid\.yaml") as refused:
        load(str(path))
    assert told in str(refused.value)


def test_a_formulation_that_the_host_has_not_is_told_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.yaml"
    text = (GRIDS / "gpu-gsm8k.yaml").read_text()
    path.write_text(text.replace("k2_as_loss,horizon=sequence", "k1_in_reward,reward_norm=group"))
    assert main([str(path), "--dry-run"]) == 2
    assert "verl's own order" in capsys.readouterr().err


def test_the_launcher_reads_a_runs_recipe_as_it_is_meant(tmp_path: Path) -> None:
    for run in of_one_seed(load("gpu-math")):
        path = tmp_path / gpu.RECIPE
        path.write_text(gpu.recipe_file(run))
        read = chosen(host, load_recipe(str(path)), {})
        assert read.common() == run.recipe.common()
        assert read.common()["answers_per_update"] == read.answers // 4


COMPOSED = """
import contextlib, io, json, multiprocessing, sys
from pathlib import Path
from recipes.openrlhf import host
from recipes.recipe import load
import openrlhf.cli.train_ppo_ray, klplug_openrlhf

klplug_openrlhf.check()  # here, and its imports are not made again in each process

def composed(path):
    command = host.command(load(path), Path("data"), Path("out"))
    with contextlib.redirect_stdout(io.StringIO()):
        return host.common(host.compose(command))

# Each in a process of its own: klplug's launcher patches argparse for good.
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    print("\\n" + json.dumps(pool.map(composed, sys.argv[1:], chunksize=1)))
"""


def test_openrlhf_takes_every_formulation_of_a_grid(tmp_path: Path) -> None:
    """Its own command line, with all its assertions, up to where training would start."""
    runs = of_one_seed(load("gpu-gsm8k"))
    paths = [tmp_path / f"{number}.yaml" for number in range(len(runs))]
    for run, path in zip(runs, paths, strict=True):
        path.write_text(gpu.recipe_file(run))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    done = subprocess.run(
        [sys.executable, "-c", COMPOSED, *map(str, paths)],
        cwd=tmp_path,
        env={
            **os.environ,
            **cpu_shim.environment("openrlhf"),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{cpu_shim.environment('openrlhf')['PYTHONPATH']}",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(json.dumps([run.recipe.common() for run in runs]))


class Launched:
    """Stands in for the processes: a training logs steps, and may fail after them."""

    def __init__(self, steps: dict[int, str], failure: BaseException | None = None) -> None:
        self.steps, self.failure = steps, failure
        self.launches: list[tuple[list[str], dict[str, str]]] = []

    def __call__(self, words: list[str], variables: dict[str, str], log: Path) -> None:
        self.launches.append((words, variables))
        if words[0] == "recipes.evaluate":
            out = Path(words[words.index("--out") + 1])
            out.mkdir()
            means = {"greedy": 0.7, "pass@1": 0.6, "pass@16": 0.9, "majority@16": 0.8}
            metrics = {name: {"mean": mean} for name, mean in means.items()}
            (out / "summary.json").write_text(json.dumps({"metrics": metrics}))
            return
        with log.open("a") as file:
            for step, reward in self.steps.items():
                file.write(f"Global step {step}: {{'reward': {reward}}}\n")
        if self.failure is not None:
            raise self.failure


def driven(
    folder: Path, monkeypatch: pytest.MonkeyPatch, launched: Launched
) -> tuple[int, list[str]]:
    """The first run of a grid."""
    monkeypatch.setattr(gpu, "launched", launched)
    grid = load("gpu-gsm8k")
    first = Grid(grid.name, grid.runs[:1], grid.problems, grid.samples)
    said: list[str] = []
    return drive(first, folder, gpu.measured_run, said.append), said


def test_a_run_is_the_launcher_then_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = Launched({1: "0.5", 2: "0.75"})
    failed, said = driven(tmp_path, monkeypatch, launched)
    assert failed == 0
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["settings"]["base"] == "qwen2.5-math-1.5b-gsm8k"
    assert row["training"]["reward"] == [0.5, 0.75]
    (found,) = row["evaluations"]
    assert (found["step"], found["accuracy"], found["sampled_accuracy"]) == (2, 0.7, 0.6)
    assert found["pass_at"] == {"1": 0.6, "16": 0.9}
    (training, variables), (evaluating, _) = launched.launches
    assert training[0] == "recipes.openrlhf"
    assert load_recipe(training[1]).kl_type == "none"
    assert evaluating[1] == str(Path(variables["OUT"]) / "policy")
    assert evaluating[2:6] == ["--recipe", "qwen2.5-math-1.5b-gsm8k", "--data", "gsm8k"]
    assert "pass@1 60.0% (" in said[-1]


def test_a_resumed_run_has_all_its_seconds_and_the_commit_that_began_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call, (here, steps) in enumerate((("a", {1: "0.5", 2: "0.25"}), ("b", {2: "0.75"}))):
        monkeypatch.setattr(gpu, "commit", lambda here=here: (here, False))
        launched = Launched(steps, None if call else KeyboardInterrupt())
        if call == 0:
            with pytest.raises(KeyboardInterrupt):
                driven(tmp_path, monkeypatch, launched)
            # It was killed when it had logged for an hour, and nobody was there for another.
            (log,) = tmp_path.glob("runs/*/log.txt")
            begun = json.loads((log.parent / "begun.json").read_text())
            now = begun["at"] + 3600
            os.utime(log, (now, now))
        else:
            assert driven(tmp_path, monkeypatch, launched)[0] == 0
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["training"]["reward"] == [0.5, 0.75]
    assert row["seconds"]["earlier_calls"] == 3600
    assert row["seconds"].keys() == {"earlier_calls", "training", "evaluation"}
    assert (row["commit"], row["changed"]) == ("a", True)


@pytest.mark.parametrize(
    ("steps", "failure", "reason"),
    [
        ({1: "0.5", 2: "nan"}, None, "not finite from step 2 on"),
        ({1: "0.5", 2: "nan"}, RunError("failed"), "not finite from step 2 on; the host then"),
        ({1: "0.5"}, RunError("RuntimeError: probability tensor contains nan"), "the host failed"),
    ],
)
def test_a_run_that_diverges_is_recorded_as_diverged(
    steps: dict[int, str],
    failure: RunError | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = Launched(steps, failure)
    assert driven(tmp_path, monkeypatch, launched)[0] == 0
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["status"] == "diverged" and row["reason"].startswith(reason)
    assert row["training"]["reward"] == [0.5, None][: len(steps)]
    assert len(launched.launches) == 1
    assert driven(tmp_path, monkeypatch, launched)[0] == 0
    assert len(launched.launches) == 1
    (line,) = by_formulation(load("gpu-gsm8k"), [row]).values()
    assert ended(line)[0] == "1, 1 diverged"
    assert table(load("gpu-gsm8k"), [row], []).row_count == 1


def test_a_host_that_fails_for_another_reason_has_not_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = Launched({1: "0.5"}, RunError("MemoryError: no memory"))
    assert driven(tmp_path, monkeypatch, launched)[0] == 1
    assert read_rows(tmp_path / "results.jsonl") == []


def test_a_launcher_that_fails_shows_its_last_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"recipes.openrlhf failed \(2\)(?s:.*)no recipe 'nowhere'"):
        gpu.launched(["recipes.openrlhf", "nowhere"], {}, tmp_path / "log.txt")


def test_the_trained_policy_is_where_each_host_leaves_it(tmp_path: Path) -> None:
    def policy(of: str) -> Any:
        run = gpu.GpuRun(of, "qwen2.5-math-1.5b-gsm8k", "none", None, 4, 1)
        return gpu.trained_policy(run, tmp_path)

    assert policy("openrlhf") == tmp_path / "policy"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("174")
    assert policy("verl") == tmp_path / "checkpoints" / "global_step_174" / "actor" / "huggingface"
