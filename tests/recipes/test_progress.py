"""The log as it is really written: nan, tensors, torn lines; and the line on the screen."""

import json
import math
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from recipes.quickstart.openrlhf import step_metrics
from recipes.quickstart.progress import LogTail, StepLine, headline, json_line, kl, number

PREFIX = "(PPOTrainer pid=4895) INFO 11-21 08:59:44 ppo_trainer.py:551] ✨ "


def test_a_step_of_openrlhfs_log() -> None:
    line = PREFIX + "Global step 12: {'kl': 0.25, 'timing/generation': 1e-05, 'truncated': 1}"
    assert step_metrics(line) == {"step": 12, "kl": 0.25, "timing/generation": 1e-5, "truncated": 1}


def test_colours_around_a_line_do_not_matter() -> None:
    line = (
        "\x1b[36m(PPOTrainer pid=1)\x1b[0m Global step 1: {'kl': 0.5}\x1b[32m [repeated]\x1b[0m\r"
    )
    assert step_metrics(line) == {"step": 1, "kl": 0.5}


def test_nan_inf_and_tensors_are_numbers() -> None:
    status = "{'a': nan, 'b': -inf, 'c': inf, 'd': tensor(-0.5), 'e': np.float64(2.0)}"
    found = step_metrics(f"{PREFIX}Global step 3: {status}")
    assert found is not None
    assert math.isnan(found["a"])
    assert (found["b"], found["c"], found["d"], found["e"]) == (-math.inf, math.inf, -0.5, 2.0)


def test_what_is_no_number_is_left_out() -> None:
    found = step_metrics("Global step 3: {'a': 'text', 'b': None, 'c': [1], 'd': 1.0}")
    assert found == {"step": 3, "d": 1.0}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "INFO: experience making completed",
        PREFIX + "Global step 4: {'kl': 0.25, 'rew",
        PREFIX + "Global step 4: {'kl': 0.25, 'rew}",
        PREFIX + "Global step 4: {1, 2}",
        "Evaluation completed, global_step 4, eval_metrics: {'a': 1}",
    ],
)
def test_other_and_torn_lines_are_no_steps(line: str) -> None:
    assert step_metrics(line) is None


@pytest.mark.parametrize("printed", ["", "abc", "1 +", "'1'x", "f()", "[]"])
def test_what_number_does_not_know(printed: str) -> None:
    assert number(printed) is None


def test_the_tail_gives_each_line_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"one\ntw")
    tail = LogTail(path)
    assert list(tail) == ["one"]
    assert list(tail) == []
    with path.open("ab") as file:
        file.write("o ✨".encode()[:-1])
    assert list(tail) == []
    with path.open("ab") as file:
        file.write("✨".encode()[-1:] + b"\nthree\n")
    assert list(tail) == ["two ✨", "three"]


def test_a_line_of_metrics_is_strict_json() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json_line({"step": 2, "kl": math.nan, "ratio": math.inf, "reward": 0.5})
    assert json.loads(line, parse_constant=refuse) == {
        "step": 2,
        "kl": None,
        "ratio": None,
        "reward": 0.5,
    }


def test_the_kl_shown_is_the_unbiased_one_where_there_is_one() -> None:
    assert kl({"kl": 3.0, "klplug/k3": 2.0}) == 2.0
    assert kl({"kl": 3.0}) == 3.0
    assert math.isnan(kl({}))


def test_without_a_reference_there_is_no_kl() -> None:
    metrics = {"kl": 0.0, "klplug/kl_coef": 0.0, "reward": 0.5}
    assert math.isnan(kl(metrics))
    assert headline(metrics) == "reward 0.500"


@pytest.mark.parametrize("terminal", [False, True])
def test_the_line_on_the_screen(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("recipes.quickstart.progress.monotonic", lambda: next(clock))
    console = Console(file=StringIO(), force_terminal=terminal, width=120)
    with StepLine(console, steps=5) as line:
        line.phase("starting")
        line.step({"step": 1, "reward": 0.25})
        line.step({"step": 2, "reward": 0.5, "kl": 0.0125})
        status = line.progress.tasks[0].fields["status"]
    # Two seconds a step, three steps to go.
    assert status == "step 2/5  reward 0.500  KL 0.0125  6 s left"
    written = console.file.getvalue().splitlines()
    if not terminal:
        assert written == ["starting", "step 1/5  reward 0.250", status]
