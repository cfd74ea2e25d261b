"""The driver of a grid: what is refused, what is made again, what is written down."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.quickstart import openrlhf
from recipes.quickstart import run as quickstart
from recipes.quickstart.run import RunError
from recipes.quickstart.settings import Settings, settings
from recipes.reproduce import __main__ as reproduce
from recipes.reproduce import drive as module
from recipes.reproduce import measure
from recipes.reproduce.__main__ import COMMITTED, main, part, timed_rows
from recipes.reproduce.drive import FORM, DriveError, append, cost, drive, is_of, read_rows
from recipes.reproduce.ends import by_formulation, ended
from recipes.reproduce.grid import GRIDS, Grid, GridError, load
from recipes.shared.settings import REPOSITORY

SMALL = """
steps: 2
seeds: [1, 2]
problems: 4
samples: 2
runs:
  - {kl_type: [none, k2_as_loss], kl_coef: [0.1, 0.5], updates: 4}
"""


def written(folder: Path, text: str) -> str:
    path = folder / "small.yaml"
    path.write_text(text)
    return str(path)


def small(folder: Path) -> Grid:
    return load(written(folder, SMALL))


class Runner:
    """Stands in for a host: what it is told to do at each call, and which runs it was asked for."""

    def __init__(self, fails: Callable[[Settings], Exception | None] = lambda run: None) -> None:
        self.fails = fails
        self.asked: list[Settings] = []

    def __call__(self, run: Settings, folder: Path, problems: int, samples: int) -> dict[str, Any]:
        self.asked.append(run)
        if (error := self.fails(run)) is not None:
            raise error
        found = {"step": run.steps, "sampled_accuracy": 0.5, "kl_nats_per_answer": 0.25}
        return {
            "status": "done",
            "reason": None,
            "seconds": {"training": 60.0},
            "evaluations": [found],
            "training": {"reward": [0.5, 0.5]},
        }


def driven(grid: Grid, folder: Path, runner: Any) -> tuple[int, list[str]]:
    said: list[str] = []
    return drive(grid, folder, runner, said.append), said


# The grid


def test_a_block_is_made_seed_by_seed_and_without_a_kl_once(tmp_path: Path) -> None:
    runs = [(run.seed, run.kl_type, run.kl_coef) for run in small(tmp_path).runs]
    of_a_seed = [("none", None), ("k2_as_loss", 0.1), ("k2_as_loss", 0.5)]
    assert runs == [(seed, *run) for seed in (1, 2) for run in of_a_seed]


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_grid_here_can_be_run(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([path.stem, "--dry-run", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("\n") > len(load(path.stem).runs)


def test_tier_1_is_what_the_hypotheses_say() -> None:
    runs = load("tier1").runs
    first = [run.kl_type for run in runs[:7]]
    assert first == [
        *("none", "k1_as_loss,ratio=none", "stock:k3", "k3_in_reward", "k1_in_reward"),
        *("k2_as_loss", "k2_as_loss,horizon=sequence"),
    ]
    assert {run.seed for run in runs[:7]} == {1}
    assert {(run.kl_coef, run.updates) for run in runs[:35]} == {(None, 4), (0.5, 4)}
    assert {run.seed for run in runs} == {1, 2, 3, 4, 5}
    assert {run.kl_coef for run in runs if run.kl_type == "stock:k3"} == {0.05, 0.5, 2.0}
    assert {run.kl_type for run in runs if run.updates == 1} == {"none", "k1_as_loss,ratio=none"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("k2_as_loss", "k2_as_los"), "k2_as_los"),
        (("k2_as_loss", "stock:k4"), "stock:k1, stock:k2, stock:k3"),
        (("k2_as_loss", "'k1_in_reward,reward_norm=group'"), "verl's own order"),
        (("steps", "stepps"), "unknown key stepps. Did you mean steps?"),
        (("updates", "update"), "block 1: unknown key update. Did you mean updates?"),
        (("updates: 4", "updates: 3"), "UPDATES=3"),
        (("updates: 4", "updates: 0"), "updates=0 must be a whole number of at least 1"),
        (("0.5]", "-0.5]"), "KL_COEF=-0.5"),
        (("0.5]", "strong]"), "kl_coef='strong' must be a number"),
        (("[1, 2]", "[1, two]"), "seeds='two' must be a whole number"),
        (("[1, 2]", "'1'"), "seeds='1' must be a whole number"),
        (("[1, 2]", "[true]"), "seeds=True must be a whole number"),
        (("[1, 2]", "[-1]"), "SEED=-1: a whole number from 0 to 2147483647"),
        (("[1, 2]", "[2147483648]"), "SEED=2147483648"),
        (("[1, 2]", "[]"), "seeds=[]: at least one value is needed"),
        (("[1, 2]", "[1, 1]"), "seeds: 1 is there twice"),
        (("seeds: [1, 2]\n", ""), "block 1: no seeds"),
        (("updates: 4", "updates: []"), "updates=[]: at least one value is needed"),
        (("updates: 4", "updates: '4'"), "updates='4' must be a whole number"),
        (("updates: 4", "updates: -4"), "updates=-4 must be a whole number of at least 1"),
        (("[none, k2_as_loss]", "[]"), "kl_type=[]: at least one value is needed"),
        (("[none, k2_as_loss]", "5"), "block 1: kl_type=5 must be text"),
        (("[none, k2_as_loss]", "no"), "kl_type=False must be text"),  # as YAML reads no
        (
            ("[none, k2_as_loss]", "[exact_as_loss, 'k2_as_loss,vocab=exact']"),
            "kl_type: k2_as_loss,vocab=exact is there twice",
        ),
        (("[0.1, 0.5]", "[]"), "kl_coef=[]: at least one value is needed"),
        (("0.5]", "0.1]"), "kl_coef: 0.1 is there twice"),
        (("0.5]", "1.0e-50]"), "KL_COEF=1e-50: a finite number above 0, in float32"),
        (("0.5]", f"{10**400}]"), "000 must be a number"),
        (("steps: 2", "steps: '2'"), "steps='2' must be a whole number"),
        (("steps: 2", "steps: 2.5"), "steps=2.5 must be a whole number"),
        (("steps: 2", "spike: 0.5"), "spike=0.5: 1, or on OpenRLHF a finite number above it"),
        (("steps: 2", "spike: .inf"), "spike=inf: 1, or on OpenRLHF"),
        (("steps: 2", "spike: high"), "spike='high' must be a number"),
        (("steps: 2", "host: verl\nspike: 2"), "spike=2: 1, or on OpenRLHF"),
        (("steps: 2", "steps: -2"), "STEPS=-2"),
        (("steps: 2", "save_every: true"), "save_every=True must be a whole number"),
        (("steps: 2", "model: 5"), "model=5 must be text"),
        (("steps: 2", "data: [words]"), "data=['words'] must be text"),
        (("steps: 2", "data: sums\nproblems: 78"), "the key problems is there twice"),
        (("problems: 4", "problems: 78\ndata: sums"), "problems=78: sums has 77 that are held out"),
        (("samples: 2\nruns:", "samples: 2\nruns: [none]\nx:"), "unknown key x"),
        ((SMALL, "[none]"), "a mapping is needed, not list"),
        ((SMALL, ""), "a mapping is needed, not NoneType"),
        ((SMALL, "seeds: [1]\nruns: {kl_type: none}"), "runs must be a list of blocks"),
        ((SMALL, "seeds: [1]\nruns: [none]"), "block 1: a mapping is needed, not str"),
        ((SMALL, "recipe: 5\nseeds: [1]\nruns: [{kl_type: none}]"), "recipe=5 must be text"),
        (
            (SMALL, "seeds: [1]\nruns: [{kl_type: none, kl_type: monitor}]"),
            "kl_type is there twice",
        ),
        (("samples: 2", "samples: none"), "samples='none'"),
        (("kl_type: [none, k2_as_loss], ", ""), "no kl_type"),
        (("runs:", "runs: []\nhost: [a"), "not YAML"),
        (("steps: 2", "steps: 2\nhost: vrl"), "HOST=vrl"),
    ],
)
def test_a_grid_that_cannot_be_is_one_error_before_its_first_run(
    change: tuple[str, str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure, "measured_run", lambda *_: pytest.fail("a run was made"))
    out = tmp_path / "out"
    assert main([written(tmp_path, SMALL.replace(*change)), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("reproduce: error: ")
    assert told in error
    assert not out.exists()


def test_a_grid_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_bytes(b"seeds: [1] # \xff")
    with pytest.raises(GridError, match=r"small\.yaml: not YAML: .*utf-8"):
        load(str(path))


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path: Path) -> None:
    runs = load(written(tmp_path, SMALL.replace("0.5]", "1e-3]"))).runs
    assert {run.kl_coef for run in runs} == {None, 0.1, 0.001}


def test_monitor_too_is_made_once_whatever_the_coefficients(tmp_path: Path) -> None:
    runs = load(written(tmp_path, SMALL.replace("[none,", "[monitor,"))).runs
    assert [run.kl_coef for run in runs if run.kl_type == "monitor"] == [None, None]


def test_an_unknown_grid_is_told_which_there_are() -> None:
    with pytest.raises(GridError, match=r"no grid 'tire1': there are .*tier1"):
        load("tire1")


def test_a_dry_run_lists_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([written(tmp_path, SMALL), "--dry-run", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  2 k2_as_loss, kl_coef 0.1, 4 updates, seed 1"
    assert lines[-1].startswith("6 runs to make")
    assert not out.exists()
    driven(load(written(tmp_path, SMALL.replace("[1, 2]", "[1]"))), out, Runner())
    assert main([written(tmp_path, SMALL), "--dry-run", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  2 k2_as_loss, kl_coef 0.1, 4 updates, seed 1 (made)"
    assert lines[3] == "  4 none, 4 updates, seed 2"
    assert lines[-1].startswith("3 runs to make")


def test_parts_of_a_grid_share_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = small(tmp_path)
    parts = [part(grid, f"{number}/3").runs for number in (1, 2, 3)]
    assert {run for runs in parts for run in runs} == set(grid.runs)
    assert sum(map(len, parts)) == len(grid.runs)
    for asked in ("0/2", "3/2", "2", "half"):
        with pytest.raises(GridError, match=f"--part {asked}: a part and their number"):
            part(grid, asked)
    with pytest.raises(GridError, match="--part 1/7: small has 6 runs"):
        part(grid, "1/7")


# Going on


def test_each_run_is_a_row_with_its_settings_versions_load_and_commit(tmp_path: Path) -> None:
    grid, runner = small(tmp_path), Runner()
    failed, said = driven(grid, tmp_path / "out", runner)
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    assert failed == 0
    assert [row["settings"] for row in rows] == [run.as_dict() for run in grid.runs]
    row = rows[0]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.strip()
    assert row["commit"] == (head or None)
    assert row["recipe"]["samples"] == grid.runs[0].recipe.samples
    assert row["evaluation"] == {"problems": 4, "samples": 2}
    assert {"python", "klplug", "torch"} <= set(row["versions"])
    assert set(row["load"]) == {"before", "after"}
    assert row["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert row["status"] == "done"
    assert "6 runs to make; what one costs is known after the first" in said


def test_a_killed_grid_goes_on_where_it_was(tmp_path: Path) -> None:
    """The run that was under way is made again, those before it are not."""
    grid, out = small(tmp_path), tmp_path / "out"

    def killed(run: Settings) -> Exception | None:
        return SystemExit(143) if run == grid.runs[2] else None  # type: ignore[return-value]

    with pytest.raises(SystemExit):
        driven(grid, out, Runner(killed))
    assert len(read_rows(out / "results.jsonl")) == 2
    runner = Runner()
    failed, said = driven(grid, out, runner)
    assert failed == 0
    assert runner.asked == list(grid.runs[2:])
    assert len(read_rows(out / "results.jsonl")) == 6
    assert said[0].startswith("small: 6 runs, 2 of them in")
    runner = Runner()
    assert driven(grid, out, runner)[0] == 0
    assert runner.asked == []


def test_a_half_written_row_is_made_again(tmp_path: Path) -> None:
    grid, out = small(tmp_path), tmp_path / "out"
    driven(grid, out, Runner())
    path = out / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert len(read_rows(path)) == 5
    runner = Runner()
    driven(grid, out, runner)
    assert runner.asked == [grid.runs[-1]]
    assert [row["settings"] for row in read_rows(path)] == [run.as_dict() for run in grid.runs]


def test_a_failed_run_is_told_not_recorded_and_made_again(tmp_path: Path) -> None:
    grid, out = small(tmp_path), tmp_path / "out"
    failed, said = driven(
        grid, out, Runner(lambda run: RunError("no memory") if run == grid.runs[1] else None)
    )
    assert failed == 1
    assert "failed, and not recorded: no memory" in said
    assert len(read_rows(out / "results.jsonl")) == 5
    runner = Runner()
    assert driven(grid, out, runner)[0] == 0
    assert runner.asked == [grid.runs[1]]


def test_the_cost_comes_from_a_timed_run_and_time_left_is_told(tmp_path: Path) -> None:
    grid, out = small(tmp_path), tmp_path / "out"
    driven(grid, out, Runner())
    path = out / "results.jsonl"
    rows = [
        {**row, "seconds": {"training": 300.0}, "cpu_seconds": 600.0} for row in read_rows(path)
    ]
    path.unlink()
    append(path, rows[0])
    _, said = driven(grid, out, Runner())
    assert "5 runs to make: about 25 min and 0.8 CPU-hours, by 1 timed run" in said


def test_runs_with_as_many_updates_tell_the_cost_where_there_are_some(tmp_path: Path) -> None:
    grid, out = small(tmp_path), tmp_path / "out"
    driven(grid, out, Runner())
    (row, *_) = read_rows(out / "results.jsonl")
    slow = {**row, "settings": {**row["settings"], "updates": 64}, "seconds": {"training": 6000.0}}
    assert "by 1 timed run" in cost([row, slow], grid.runs[:1])
    assert cost([row, slow], grid.runs[:1]).startswith("1 runs to make: about 1 min")
    assert cost([slow], grid.runs[:1]).startswith("1 runs to make: about 1 h 40 min")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f'{{"form": {FORM + 1}}}', rf"line 1: form {FORM + 1}, .* reads form {FORM}"),
        (f'{{"form": {FORM}, "status": "done"}}', "line 1: no settings, evaluation, seconds"),
        ("5", "line 1: form 5"),
        ('{"form": ', "line 1: not JSON"),
    ],
)
def test_rows_of_another_form_are_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(text + "\n")
    with pytest.raises(DriveError, match=told):
        driven(small(tmp_path), tmp_path, Runner())


def test_what_is_no_results_file_and_no_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [written(tmp_path, SMALL), "--out"]
    (tmp_path / "file").write_text("")
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "results.jsonl").write_bytes(b"\xff\n")
    (tmp_path / "folder" / "results.jsonl").mkdir(parents=True)
    for name, told in (
        ("file", "a folder is needed that can be written"),
        ("bytes", "results.jsonl: no rows: 'utf-8' codec"),
        ("folder", "results.jsonl: Is a directory"),
    ):
        assert main([*words, str(tmp_path / name)]) == 2
        assert told in capsys.readouterr().err


def test_a_grid_ends_with_what_its_runs_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside what the committed runs of the same settings did, with any seed."""
    text = (GRIDS / "fast.yaml").read_text()
    accuracies = iter((0.25, 0.75))

    def made(run: Settings, folder: Path, problems: int, samples: int, **_: Any) -> dict[str, Any]:
        found = Runner()(run, folder, problems, samples)
        (last,) = found["evaluations"]
        start = {"step": 0, "sampled_accuracy": 0.125, "kl_nats_per_answer": 0.0}
        after = {**last, "sampled_accuracy": next(accuracies)}
        return {**found, "evaluations": [start, after]}

    monkeypatch.setattr(measure, "measured_run", made)
    words = [written(tmp_path, text), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    told = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert "before training 12.5% 0" in told
    committed = timed_rows(COMMITTED / "tier1.jsonl")
    for kl_type, accuracy in (("k1_as_loss,ratio=none", "25.0%"), ("k2_as_loss", "75.0%")):
        asked = {"kl_type": kl_type, "kl_coef": 0.5, "updates": 4}
        there = [row for row in committed if asked.items() <= row["settings"].items()]
        ends = " ".join(
            f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"
            for name, form in (("sampled_accuracy", ".1%"), ("kl_nats_per_answer", ".3g"))
            if (values := [row["evaluations"][-1][name] for row in there])
        )
        assert f"{kl_type} 0.5 4 1 {accuracy} 0.25 {len(there)} {ends}" in told


def test_a_host_that_is_not_installed_is_told_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "find_spec", lambda name: None if name == "verl" else object())
    monkeypatch.setattr(measure, "measured_run", lambda *_: pytest.fail("a run was made"))
    words = [written(tmp_path, SMALL.replace("steps: 2", "steps: 2\nhost: verl"))]
    assert main([*words, "--dry-run"]) == 0
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "verl is not installed here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverged_is_told_among_the_ends(tmp_path: Path) -> None:
    grid = load(written(tmp_path, SMALL.replace("[0.1, 0.5]", "0.1")))
    driven(grid, tmp_path / "out", Runner())
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    rows[1] |= {"status": "diverged", "reason": "not finite from step 2 on"}
    lines = by_formulation(grid, rows)
    assert ended(lines["k2_as_loss", 0.1, 4]) == ("2, 1 diverged", "25.0% (0.0% to 50.0%)", "0.25")
    assert ended(lines["none", None, 4]) == ("2", "50.0% (50.0% to 50.0%)", "0.25 (0.25 to 0.25)")


def test_rows_of_another_commit_stay_and_are_named(tmp_path: Path) -> None:
    grid, out = small(tmp_path), tmp_path / "out"
    driven(grid, out, Runner())
    path = out / "results.jsonl"
    rows = [{**row, "commit": "abcdef0123"} for row in read_rows(path)]
    path.unlink()
    for row in rows:
        append(path, row)
    runner = Runner()
    _, said = driven(grid, out, runner)
    assert runner.asked == []
    assert "rows of other commits stay, with their label: abcdef012" in said


def test_a_tree_that_changes_while_a_grid_runs_is_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is read when the driver starts, the others as each run ends."""
    found = iter([("a", False)] * 2 + [("b", False)] + [("a", True)] + [("a", False)] * 3)
    monkeypatch.setattr(module, "commit", lambda: next(found))
    driven(small(tmp_path), tmp_path / "out", Runner())
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    assert {row["commit"] for row in rows} == {"a"}
    assert [row["changed"] for row in rows] == [False, True, True, False, False, False]


def test_the_first_run_is_not_charged_with_the_policy_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def costly(settings: Settings, policy: Path, *_: Any) -> dict[str, float]:
        ends = time.process_time() + 1.0 * (policy == "start")
        while time.process_time() < ends:
            pass
        return {"sampled_accuracy": 0.5, "kl_nats_per_answer": 0.0}

    measure.reference_evaluation.cache_clear()
    monkeypatch.setattr(measure, "evaluation", costly)
    monkeypatch.setattr(measure, "train", lambda *_: None)
    monkeypatch.setattr(quickstart, "policy_folder", lambda *_: "start")
    driven(small(tmp_path), tmp_path / "out", measure.measured_run)
    first, *others = read_rows(tmp_path / "out" / "results.jsonl")
    assert first["seconds"]["reference"] >= 1 > first["cpu_seconds"]
    assert {row["seconds"]["reference"] for row in others} == {0.0}
    measure.reference_evaluation.cache_clear()


HOLDER = """
import sys, time
from pathlib import Path
from recipes.reproduce.drive import claimed
with claimed(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(600)
"""


def test_two_drivers_on_one_folder_are_refused_and_a_killed_one_leaves_no_lock(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "mine\n"
        with pytest.raises(DriveError, match=f"another driver works there .process {holder.pid}"):
            driven(small(tmp_path), out, Runner())
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert driven(small(tmp_path), out, Runner())[0] == 0


def test_a_row_is_a_runs_by_its_settings_and_its_measures(tmp_path: Path) -> None:
    """A setting that came later is not asked of older rows; a spike is, which they were without."""
    run, grid = settings(seed=3), small(tmp_path)
    older = {k: v for k, v in run.as_dict().items() if k not in ("save_every", "spike")}
    row = {"settings": older, "evaluation": {"problems": 4, "samples": 2}}
    assert is_of(row, run, grid)
    assert not is_of(row, settings(seed=4), grid)
    assert not is_of(row, settings(seed=3, spike=10.0), grid)
    assert not is_of({**row, "evaluation": {"problems": 4, "samples": 1}}, run, grid)


# A run that diverges


def trained_by(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A host that prints what `code` prints, and saves no policy."""
    from contextlib import nullcontext

    monkeypatch.setattr(openrlhf, "command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(quickstart, "compiled_ops", lambda *_: nullcontext())
    monkeypatch.setattr(quickstart, "POLL", 0.01)
    monkeypatch.setattr(measure, "reference_evaluation", lambda *_: {"sampled_accuracy": 0.5})


STEPS = "print(\"Global step 1: {'reward': 0.5, 'policy_loss': 0.1}\");"
NAN = "print(\"Global step 2: {'reward': 0.0, 'policy_loss': nan}\");"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (STEPS + NAN, "not finite from step 2 on"),
        (STEPS + NAN + "raise SystemExit(1)", "not finite from step 2 on; the host then failed"),
        (STEPS + "raise ValueError('probability tensor contains nan')", "the host failed: .*nan"),
    ],
)
def test_a_run_that_diverges_is_recorded_as_diverged(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_by(monkeypatch, code)
    grid = load(written(tmp_path, SMALL.replace("[1, 2]", "[1]").replace("none, ", "")))
    out = tmp_path / "out"
    failed, said = driven(grid, out, measure.measured_run)
    rows = read_rows(out / "results.jsonl")
    assert failed == 0
    assert len(rows) == 2
    for row in rows:
        assert row["status"] == "diverged"
        assert re.search(reason, row["reason"])
        assert row["training"]["reward"][0] == 0.5
    assert sum("diverged: " in line for line in said) == 2


def test_a_host_that_fails_for_another_reason_has_not_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a metric that its log ends with is nan."""
    other = "print(\"Global step 2: {'reward': 0.5, 'klplug/other': nan}\");"
    trained_by(monkeypatch, STEPS + other + "raise MemoryError('no memory')")
    grid = load(written(tmp_path, SMALL.replace("[1, 2]", "[1]").replace("none, ", "")))
    failed, _ = driven(grid, tmp_path / "out", measure.measured_run)
    assert failed == 2
    assert read_rows(tmp_path / "out" / "results.jsonl") == []


def test_a_policy_with_a_weight_that_is_nan_has_diverged(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run = settings(seed=1)
    start = quickstart.policy_folder(run, tmp_path / "log.txt")
    model = AutoModelForCausalLM.from_pretrained(start)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "policy")
    with pytest.raises(measure.Diverged, match="policy: a weight is not finite"):
        measure.evaluation(run, tmp_path / "policy", start, problems=1, samples=1)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ({"kl_nats_per_answer": float("inf")}, "policy: kl_nats_per_answer is not finite"),
        (RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"), "sampled"),
    ],
)
def test_an_evaluation_that_is_not_finite_is_a_divergence(
    result: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a policy with finite weights."""
    from recipes.quickstart import evaluate as module

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(module, "evaluate", evaluate)
    run = settings(seed=1)
    start = quickstart.policy_folder(run, Path("log.txt"))
    with pytest.raises(measure.Diverged, match=told):
        measure.evaluation(run, start, start, problems=1, samples=1)


# Where a run leaves its policies


def test_the_copies_along_the_run_are_found_where_verl_leaves_them(tmp_path: Path) -> None:
    steps = [tmp_path / "policy" / f"global_step_{step}" for step in (2, 4, 5)]
    expected = [(int(f.name[12:]), f / "actor" / "huggingface") for f in steps]
    made = settings(host="verl", steps=5, save_every=2)
    assert measure.policies(made, tmp_path) == expected


def test_the_copies_along_the_run_are_found_where_openrlhf_leaves_them(tmp_path: Path) -> None:
    made = settings(steps=5, save_every=2)
    command = openrlhf.command(made, made.recipe, "m", tmp_path / "p", tmp_path / "policy")
    assert command[command.index("--ckpt.save_steps") + 1] == "2"
    assert {"--ckpt.save_hf", "--ckpt.disable_ds"} <= set(command)
    checkpoints = Path(command[command.index("--ckpt.path") + 1])
    assert measure.policies(made, tmp_path) == [
        (2, checkpoints / "global_step2_hf"),
        (4, checkpoints / "global_step4_hf"),
        (5, tmp_path / "policy"),
    ]
    without = settings(steps=5)
    assert measure.policies(without, tmp_path) == [(5, tmp_path / "policy")]
    plain = openrlhf.command(without, without.recipe, "m", tmp_path / "p", tmp_path / "policy")
    assert not any("save_steps" in word for word in plain)


@pytest.mark.parametrize(("spike", "ends"), [(1.0, 2e-4), (20.0, 20 * 2e-4 / math.sqrt(120 / 4))])
def test_a_spike_falls_with_the_root_of_the_updates(
    spike: float, ends: float, tmp_path: Path
) -> None:
    """By the schedule that the host takes from transformers, warmed up over 3 % of the updates."""
    from transformers import get_scheduler

    made = settings(spike=spike)
    words = openrlhf.command(made, made.recipe, "m", tmp_path / "p", tmp_path / "policy")
    rate, name = (
        words[words.index(key) + 1] for key in ("--actor.adam.lr", "--actor.lr_scheduler")
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=float(rate))
    schedule = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=120)
    rates = []
    for _ in range(121):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert max(rates) == rates[4] == pytest.approx(spike * made.recipe.learning_rate)
    assert rates[-1] == pytest.approx(ends)


# A run of the real host


@pytest.mark.slow
def test_a_run_of_the_real_host_is_a_row(tmp_path: Path) -> None:
    """OpenRLHF with DeepSpeed, Ray and vLLM: two steps, measured at each, and never made twice."""
    text = """
steps: 2
save_every: 1
seeds: [1]
problems: 8
samples: 2
runs: [{kl_type: k2_as_loss, kl_coef: 0.5, updates: 4}]
"""
    words = [written(tmp_path, text), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    (row,) = read_rows(tmp_path / "out" / "results.jsonl")
    assert row["status"] == "done"
    before, along, after = row["evaluations"]
    assert [before["step"], along["step"], after["step"]] == [0, 1, 2]
    assert before["kl_nats_per_answer"] == before["forward_kl_nats_per_answer"] == 0
    # bfloat16 holds the first rollout's small steps only in part; after two the policy has moved.
    assert after["kl_nats_per_answer"] > 0 and after["forward_kl_nats_per_answer"] > 0
    assert after["entropy_nats_per_answer"] > 0
    assert set(after["pass_at"]) == {"1", "2"}
    assert len(row["training"]["reward"]) == len(row["training"]["klplug/k3"]) == 2
    assert row["training"]["actor_grad_norm"][0] > 0
    written_at = (tmp_path / "out" / "results.jsonl").stat().st_mtime_ns
    assert main(words) == 0
    assert (tmp_path / "out" / "results.jsonl").stat().st_mtime_ns == written_at
