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
    assert "OpenRLHF has none like it" in capsys.readouterr().err


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


def test_a_run_is_the_launcher_then_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[tuple[list[str], dict[str, str]]] = []

    def launched(words: list[str], variables: dict[str, str], log: Path) -> None:
        launches.append((words, variables))
        if words[0] == "recipes.evaluate":
            out = Path(words[words.index("--out") + 1])
            out.mkdir()
            means = {"greedy": 0.7, "pass@1": 0.6, "pass@16": 0.9, "majority@16": 0.8}
            metrics = {name: {"mean": mean} for name, mean in means.items()}
            (out / "summary.json").write_text(json.dumps({"metrics": metrics}))
            return
        log.write_text("Global step 1: {'reward': 0.5}\nGlobal step 2: {'reward': 0.75}\n")

    monkeypatch.setattr(gpu, "launched", launched)
    grid = load("gpu-gsm8k")
    first = Grid(grid.name, grid.runs[:1], grid.problems, grid.samples)
    said: list[str] = []
    assert drive(first, tmp_path, gpu.measured_run, said.append) == 0
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["settings"]["base"] == "qwen2.5-math-1.5b-gsm8k"
    assert row["training"]["reward"] == [0.5, 0.75]
    (found,) = row["evaluations"]
    assert (found["step"], found["accuracy"], found["sampled_accuracy"]) == (2, 0.7, 0.6)
    assert found["pass_at"] == {"1": 0.6, "16": 0.9}
    (training, variables), (evaluating, _) = launches
    assert training[0] == "recipes.openrlhf"
    assert load_recipe(training[1]).kl_type == "none"
    assert evaluating[1] == str(Path(variables["OUT"]) / "policy")
    assert evaluating[2:6] == ["--data", "gsm8k", "--samples", "16"]
    assert "pass@1 60.0% (" in said[-1]


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
