"""The quickstart around its host: what is refused, what is started, what is left behind."""

import json
import math
import os
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from recipes.quickstart import openrlhf, run
from recipes.quickstart import settings as settings_module
from recipes.quickstart.__main__ import main
from recipes.quickstart.openrlhf import kl_arguments
from recipes.quickstart.progress import StepLine
from recipes.quickstart.settings import TINY, Settings, settings
from recipes.quickstart.summary import (
    baselines,
    curves,
    next_steps,
    read_metrics,
    rolling_mean,
    table,
)
from recipes.shared import processes
from recipes.shared.folder import FolderError
from recipes.shared.processes import HostProcesses


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes into the checkout's own runs/."""
    folder = tmp_path / "runs"
    monkeypatch.setattr(settings_module, "RUNS", folder)
    monkeypatch.setattr(run, "RUNS", folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--kl-type", "k2_as_los"], "k2_as_loss"),
        (["--kl-type", "k3"], "k3_as_loss"),
        (["--kl-type", "k2_as_loss,cap=-1"], "cap"),
        (["--kl-type", "stock:k4"], "stock:k1, stock:k2, stock:k3"),
        (["--kl-type", "k1_in_reward,reward_norm=group"], "verl's own order"),
        (["--kl-type", "k2_as_loss,reference=teacher"], "needs --klplug.teacher"),
        (["--kl-coef=-0.1"], "KL_COEF=-0.1"),
        (["--kl-coef", "0"], "KL_COEF=0: a finite number above 0"),
        (["--kl-coef", "nan"], "KL_COEF=nan"),
        (["--kl-coef", "inf"], "KL_COEF=inf"),
        (["--kl-type", "none", "--kl-coef", "0.1"], "none takes no coefficient"),
        (["--steps", "0"], "STEPS=0"),
        (["--seed=-1"], "SEED=-1: a whole number from 0 to 2147483647"),
        (["--ranks", "0"], "RANKS=0"),
        (["--ranks", "3"], "RANKS=3"),
        (["--updates", "3"], "UPDATES=3"),
        (["--updates", "256", "--ranks", "2"], "UPDATES must be a divisor of 128"),
        (["--updates", "64", "--host", "verl"], "a step's 32 questions"),
        (["--host", "vrl"], "HOST=vrl"),
        (["--model", "./no/such/model"], "no such folder"),
        (["--model", "empty"], "config.json"),
        (["--data", "no.jsonl"], "no.jsonl"),
        (["--data", "columns.jsonl"], "'answer'"),
        (["--data", "gsm8k", "--gsm8k", "no.jsonl"], "no.jsonl"),
        (["--gsm8k", "columns.jsonl"], "DATA=gsm8k only"),
    ],
)
def test_bad_input_is_one_error_before_anything_starts(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns.jsonl").write_text('{"question": "1+1?", "solution": "2"}\n' * 2)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("quickstart: error: ")
    assert told in error
    assert len(error.splitlines()) == 1
    assert not runs.exists()


def test_what_is_left_out_comes_from_the_recipe() -> None:
    made = settings()
    assert (made.kl_type, made.kl_coef, made.steps) == ("k2_as_loss", TINY.kl_coef, TINY.steps)
    assert settings(kl_type="mse_as_loss,ratio=old").kl_type == "k2_as_loss"
    assert settings(kl_type="none").kl_coef is None


@pytest.mark.parametrize(("updates", "ranks", "passes"), [(4, 1, 2), (16, 1, 1), (32, 2, 1)])
def test_an_update_of_few_answers_is_one_backward_pass(
    updates: int, ranks: int, passes: int
) -> None:
    made = settings(updates=updates, ranks=ranks)
    assert made.train_micro_batch * passes * updates * ranks == TINY.prompts * TINY.samples
    assert made.train_micro_batch <= TINY.micro_batch


def test_klplugs_launcher_gets_the_kl_type_and_the_host_its_own() -> None:
    def words(**changes: Any) -> list[str]:
        return kl_arguments(settings(kl_coef=None, **changes))

    coef = repr(TINY.kl_coef)
    assert words(kl_type="k3_as_loss,ratio=none") == [
        *("klplug_openrlhf", "--klplug.kl_type", "k3_as_loss,ratio=none"),
        *("--klplug.kl_coef", coef),
    ]
    assert words(kl_type="none") == ["klplug_openrlhf", "--klplug.kl_type", "none"]
    stock = ["openrlhf.cli.train_ppo_ray", "--algo.kl.init_coef", coef, "--algo.kl.estimator"]
    assert words(kl_type="stock:k1") == [*stock, "k1"]
    assert words(kl_type="stock:k2") == [*stock, "k2", "--algo.kl.use_loss"]
    assert words(kl_type="stock:k3") == [*stock, "k3", "--algo.kl.use_loss"]


def test_the_folders_name_holds_the_model(runs: Path) -> None:
    assert settings().default_out == runs / "quickstart"
    assert settings(model="smollm2").default_out == runs / "quickstart-smollm2"
    other = replace(settings(), host="verl", model="org/name")
    assert other.default_out == runs / "quickstart-verl-name"


def test_the_same_run_again_overwrites(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.claim_folder(settings(), out, overwrite=False)
    (out / "summary.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    run.claim_folder(settings(), out, overwrite=False)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "settings.json"]


def test_a_named_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.claim_folder(settings(seed=1), out, overwrite=False)
    with pytest.raises(FolderError, match=r"seed=1 there, 2 here.*OVERWRITE=1"):
        run.claim_folder(settings(seed=2), out, overwrite=False)
    assert json.loads((out / run.RECORD).read_text()) == settings(seed=1).as_dict()
    run.claim_folder(settings(seed=2), out, overwrite=True)
    assert json.loads((out / run.RECORD).read_text()) == settings(seed=2).as_dict()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FolderError, match="no quickstart run"):
        run.claim_folder(settings(), tmp_path, overwrite=False)
    with pytest.raises(FolderError, match="is a file"):
        run.claim_folder(settings(), tmp_path / "thesis.tex", overwrite=True)


def test_in_the_default_place_another_run_makes_way(runs: Path) -> None:
    for seed in (1, 2, 3):
        folder, told = run.claim_folder(settings(seed=seed), None, overwrite=False)
        assert folder == runs / "quickstart"
        assert bool(told) == (seed > 1)
    kept = {path.name: json.loads((path / "settings.json").read_text()) for path in runs.iterdir()}
    assert {name: made["seed"] for name, made in kept.items()} == {
        "quickstart": 3,
        "quickstart-k2_as_loss": 1,
        "quickstart-k2_as_loss-2": 2,
    }


def test_a_short_file_comes_round_again(tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = settings(data=str(data), steps=3)
    run.write_prompts(made, tmp_path / "prompts.jsonl")
    written = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert len(written) == 3 * made.recipe.prompts
    assert len(set(written)) == 18


def fake_host(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(openrlhf, "command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(run, "compiled_ops", lambda *_: nullcontext())
    monkeypatch.setattr(run, "POLL", 0.01)


def train(made: Settings, folder: Path) -> list[dict[str, float]]:
    folder.mkdir()
    with StepLine(Console(file=StringIO()), made.steps) as line:
        return run.train(made, folder, "model", line, run.Phases())


def test_the_hosts_steps_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_host(monkeypatch, "for i in (1, 2): print(f\"Global step {i}: {{'kl': {i / 8}}}\")")
    steps = train(settings(steps=2), tmp_path / "out")
    assert steps == [{"step": 1, "kl": 0.125}, {"step": 2, "kl": 0.25}]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == steps


def test_a_failing_host_shows_its_error_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_host(monkeypatch, "print('one'); raise ValueError('no such knob')")
    with pytest.raises(run.RunError, match=r"exit status 1(?s:.*)log\.txt(?s:.*)no such knob"):
        train(settings(steps=2), tmp_path / "out")


def test_a_host_that_ends_early_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_host(monkeypatch, "print(\"Global step 1: {'kl': 0.0}\")")
    with pytest.raises(run.RunError, match="1 of 2 steps"):
        train(settings(steps=2), tmp_path / "out")


def test_the_error_is_found_above_what_follows_it(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("start\nRuntimeError: the cause\n" + "goodbye\n" * 40)
    assert run.last_lines(log).splitlines()[:2] == ["RuntimeError: the cause", "..."]


ORPHAN = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", '''
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
'''], start_new_session=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("lives", [0, 600])
def test_no_process_outlives_the_run(
    lives: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one in a session of its own, without a parent, that does not listen to SIGTERM."""
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    log = tmp_path / "log.txt"
    with HostProcesses() as host:
        environment = host.environment({})
        parent = host.start([sys.executable, "-c", ORPHAN, str(lives)], environment, tmp_path, log)
        until = time.monotonic() + 30
        while "up" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.05)
        if not lives:
            parent.wait()
        found = host.alive()
        assert len(found) == (2 if lives else 1)
        scratch = host.scratch
    assert not any(process.is_running() and process.status() != "zombie" for process in found)
    assert not scratch.exists()


def test_other_runs_processes_are_left_alone(tmp_path: Path) -> None:
    with HostProcesses() as other:
        sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
        process = other.start(sleep, other.environment({}), tmp_path, tmp_path / "log.txt")
        with HostProcesses():
            pass
        assert psutil.Process(process.pid).is_running()
        assert process.poll() is None


def test_rays_sockets_have_short_paths_and_no_other_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with HostProcesses() as host:
        environment = host.environment({"A": "b"})
        assert "RAY_ADDRESS" not in environment
        assert environment["A"] == "b"
        assert environment["HOME"] == os.environ["HOME"]
        assert len(environment["RAY_TMPDIR"]) < 25


def summary_of(made: Settings, **changes: Any) -> dict[str, Any]:
    return {
        **made.as_dict(),
        "accuracy_before": 0.5,
        "accuracy_after": 0.625,
        "kl_last": 0.25,
        "kl_last_standard_error": None,
        "response_tokens_before": 20.0,
        "response_tokens_after": 21.0,
        "test_problems": 8,
        **changes,
    }


def write_summary(folder: Path, made: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(made))


def test_a_baseline_has_the_same_settings(runs: Path) -> None:
    own = summary_of(settings())
    write_summary(runs / "a", summary_of(settings(kl_type="stock:k3")))
    write_summary(runs / "b", summary_of(settings(kl_type="stock:k2", seed=7)))
    write_summary(runs / "c", summary_of(settings(kl_type="k3_as_loss")))
    (runs / "torn").mkdir()
    (runs / "torn" / "summary.json").write_text('{"kl_type": "stock:k1", "se')
    assert [row["kl_type"] for row in baselines(own, runs).values()] == ["stock:k3"]
    assert baselines(summary_of(settings(kl_type="stock:k3")), runs) == {}
    without_kl = summary_of(settings(kl_type="none"))
    assert [row["kl_type"] for row in baselines(without_kl, runs).values()] == ["stock:k3"]


def test_the_table_has_a_row_a_run() -> None:
    rows = [summary_of(settings()), summary_of(settings(kl_type="stock:k3"), accuracy_after=0.25)]
    console = Console(file=StringIO(), width=120)
    console.print(table(rows))
    text = console.file.getvalue()
    for word in ("k2_as_loss", "stock:k3", "50.0%", "62.5%", "25.0%", "20.0 → 21.0", "0.250"):
        assert word in text


def test_the_rolling_mean_leaves_gaps_out() -> None:
    assert rolling_mean([1.0, 3.0, math.nan, 5.0], width=2) == [1.0, 2.0, 3.0, 5.0]
    assert math.isnan(rolling_mean([math.nan])[0])


def test_curves_can_be_drawn_of_a_log_with_gaps(tmp_path: Path) -> None:
    steps = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": math.nan, "kl": 0.1}]
    curves(settings(), steps, tmp_path / "curves.png", {})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_baselines_curve_lies_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    stock = tmp_path / "metrics.jsonl"
    stock.write_text('{"step": 1, "reward": 0.25}\n{"step": 2, "reward": null}\n')
    steps = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75}]
    curves(settings(), steps, tmp_path / "c.png", {"stock:k3": read_metrics(stock)})
    reward = drawn[0].axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in reward.lines}
    assert lines["k2_as_loss"] == [0.5, 0.625] and lines["stock:k3"] == [0.25, 0.25]
    assert {text.get_text() for text in reward.get_legend().get_texts()} == {
        "k2_as_loss",
        "stock:k3",
    }


def test_the_end_says_what_to_do_next(tmp_path: Path) -> None:
    own = summary_of(settings())
    alone = next_steps(own, tmp_path / "a", [])
    assert "KL_TYPE=stock:k3" in alone and "klplug audit" in alone
    beside = next_steps(own, tmp_path / "a", [tmp_path / "b"])
    assert "KL_TYPE=stock:k3" not in beside
    assert re.search(r"klplug report \S+/a \S+/b ", beside)
