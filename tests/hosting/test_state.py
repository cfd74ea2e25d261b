"""The state that a checkpoint keeps: whole or not there, and read with an error that helps."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from klplug import parse
from klplug.controllers import AdaptiveKL, kl_controller
from klplug.hosting.controller import MeasuredController
from klplug.hosting.state import Reference, StateError, read, write

STATE = {"kl_type": "k2_as_loss", "kl_ctrl": "adaptive", "value": 0.25}
# No file may grow, as on a full disk: the system's own error, after the file was opened.
ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from klplug.hosting.state import write
resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))
write(Path(sys.argv[1]), {"kl_type": "k3_as_loss", "kl_ctrl": "fixed", "value": 1.0})
"""


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "klplug.json"
    assert read(path) is None
    write(path, STATE)
    write(path, STATE | {"value": 0.5})
    assert read(path) == STATE | {"value": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["klplug.json"]


def test_a_full_disk_leaves_the_file_before_whole(tmp_path: Path) -> None:
    path = tmp_path / "klplug.json"
    write(path, STATE)
    command = [sys.executable, "-c", ON_A_FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "klplug can't save the state of its controller" in done.stderr.splitlines()[-1]
    assert str(path) in done.stderr.splitlines()[-1]
    assert read(path) == STATE
    assert [p.name for p in tmp_path.iterdir()] == ["klplug.json"]


@pytest.mark.parametrize("kept", [0, 1, 20, 56])
def test_a_file_cut_short_is_named_with_what_to_do(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "klplug.json"
    write(path, STATE)
    assert path.stat().st_size > kept + 1
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StateError, match="delete the file") as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


BARE = {"kl_type": "k2_as_loss", "kl_ctrl": "adaptive"}


@pytest.mark.parametrize(
    "saved",
    [
        [], 3, {}, {"kl_type": "k2_as_loss"}, "{",
        {**BARE, "reference": "hub/sft"}, {**BARE, "reference": {"weights": None}},
        {**BARE, "teacher": "hub/sft"}, {**BARE, "source": 3},
    ],
)  # fmt: skip
def test_a_state_of_another_shape_is_named(saved: Any) -> None:
    controller = MeasuredController(AdaptiveKL(0.1, target=0.1, horizon=10))
    with pytest.raises(StateError, match="state of klplug's controller"):
        controller.resume(saved, parse("k2_as_loss"), {}, "adaptive", "a host")


@pytest.mark.parametrize("value", [None, "0.1", -1.0, float("nan")])
def test_a_coefficient_that_is_none_is_named(value: Any) -> None:
    controller = MeasuredController(AdaptiveKL(0.1, target=0.1, horizon=10))
    with pytest.raises(ValueError, match=r"saved state.*value="):
        controller.resume(STATE | {"value": value}, parse("k2_as_loss"), {}, "adaptive", "a host")
    assert controller.value == 0.1


def resumed(
    capsys: pytest.CaptureFixture[str], saved: dict[str, Any], kl_ctrl: str, kl_coef: float
) -> tuple[float, str]:
    """The coefficient of a resumed run, and what is said."""
    settings = {"adaptive": {"kl_target": 0.1}, "linear": {"kl_end": 0.0, "kl_steps": 10}}
    made = kl_controller(kl_ctrl, kl_coef, **settings.get(kl_ctrl, {}))
    controller = MeasuredController(made)
    controller.resume(saved, parse("k2_as_loss"), {}, kl_ctrl, "a host")
    return controller.value, capsys.readouterr().out


def test_a_resume_says_whose_coefficient_it_goes_on_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    value, said = resumed(capsys, STATE, "adaptive", 0.1)
    assert value == 0.25 and "goes on from 0.25" in said and "not from kl_coef=0.1" in said
    value, said = resumed(capsys, STATE, "linear", 0.1)
    assert value == 0.1 and "WARNING: resuming with kl_ctrl=linear" in said
    assert "kl_ctrl=adaptive" in said and "0.25 there" in said and "kl_coef=0.1" in said
    fixed = STATE | {"kl_ctrl": "fixed"}
    value, said = resumed(capsys, fixed, "fixed", 0.5)
    assert value == 0.5 and "kl_coef=0.5" in said and "with kl_coef=0.25" in said
    # Nothing differs, or there is more in it than this version knows.
    assert resumed(capsys, fixed, "fixed", 0.25) == (0.25, "")
    assert resumed(capsys, STATE | {"of_a_later_version": 1}, "adaptive", 0.25) == (0.25, "")


def test_what_was_counted_stands_over_what_the_host_says() -> None:
    """3 answers left of the 100 that the host counts: e^(0.2 3/10), and not e^2."""
    controller = MeasuredController(AdaptiveKL(0.1, target=0.1, horizon=10))
    controller.measured, controller.answers = 1.0, 3
    controller.update(0.0, 100)
    assert controller.value == pytest.approx(0.1 * math.exp(0.06))


@pytest.mark.parametrize(
    ("kls", "from_reference", "said"),
    [
        ([0.63, 0.7], True, 1),
        ([-0.63], True, 1),
        ([3e-4, 0.63], True, 0),  # of a bfloat16 copy to a float32 one; then it was trained
        ([0.63], False, 0),
    ],
)
def test_a_run_that_begins_away_from_its_reference_says_so(
    kls: list[float], from_reference: bool, said: int, capsys: pytest.CaptureFixture[str]
) -> None:
    controller = MeasuredController(AdaptiveKL(0.1, target=0.1, horizon=10))
    for kl in kls:
        controller.measure(kl, from_reference)
        assert controller.measured == kl
    out = capsys.readouterr().out
    assert out.count(f"WARNING: before the first update the KL is {kls[0]:g} nats") == said
    assert said or not out


def test_a_run_that_goes_on_was_updated_before(capsys: pytest.CaptureFixture[str]) -> None:
    for saved in (STATE, None):
        controller = MeasuredController(AdaptiveKL(0.25, target=0.1, horizon=10))
        controller.resume(saved, parse("k2_as_loss"), {}, "adaptive", "a host")
        controller.measure(0.63, from_reference=True)
        assert "before the first update" not in capsys.readouterr().out


# The reference's identity.


def model(folder: Path, middle: bytes = b"\0", size: int = 3 << 20) -> Path:
    """A model of one large weights file, whose byte in the middle is given."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    weights = bytearray(size)
    weights[size // 2 : size // 2 + 1] = middle
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_reference_is_its_weights_wherever_they_lie(tmp_path: Path) -> None:
    first = Reference.of(str(model(tmp_path / "sft")))
    moved = Reference.of(str(shutil.copytree(tmp_path / "sft", tmp_path / "elsewhere")))
    trained = Reference.of(str(model(tmp_path / "step_300", b"\1")))
    assert not moved.is_another_than(vars(first))
    assert trained.is_another_than(vars(first))
    shutil.rmtree(tmp_path / "sft")
    replaced = Reference.of(str(model(tmp_path / "sft", b"\1")))
    assert replaced.path == first.path and replaced.is_another_than(vars(first))


def test_where_no_weights_are_at_hand_the_name_decides() -> None:
    first = Reference.of("hub/model")
    assert first.weights is None
    assert not Reference.of("hub/model").is_another_than(vars(first))
    assert Reference.of("hub/another").is_another_than(vars(first))


def test_a_resume_with_another_reference_says_both(capsys: pytest.CaptureFixture[str]) -> None:
    controller = MeasuredController(AdaptiveKL(0.1, target=0.1, horizon=10))
    spec, first = parse("k2_as_loss"), {"reference": Reference("hub/sft", "1234567890abcdef")}
    other = {"reference": Reference("ckpt/step_3", "fedcba09")}
    saved = json.loads(json.dumps(controller.saved(spec, first)))
    controller.resume(saved, spec, copy.deepcopy(first), "adaptive", "a host")
    controller.resume(controller.saved(spec, {}), spec, first, "adaptive", "a host")
    assert capsys.readouterr().out == ""
    controller.resume(saved, spec, other, "adaptive", "a host")
    said = capsys.readouterr().out
    assert "WARNING: resuming with the reference ckpt/step_3 (weights fedcba09)" in said
    assert "hub/sft (weights 12345678)" in said


def test_a_resume_on_other_stored_answers_or_without_them_says_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One kl_type acts on either, so the kl_type alone does not tell."""
    controller = MeasuredController(AdaptiveKL(0.1, target=0.1, horizon=10))
    spec, file = parse("js_as_loss"), tmp_path / "own.jsonl"
    file.write_text("one\n")
    first = Reference.of(str(file))
    assert first.weights is not None
    saved = json.loads(json.dumps(controller.saved(spec, {"source": first})))

    def said(source: Reference | None, saved: dict[str, Any] = saved) -> str:
        models = {} if source is None else {"source": source}
        controller.resume(saved, spec, models, "adaptive", "a host")
        return capsys.readouterr().out

    copied = Reference.of(str(shutil.copy(file, tmp_path / "elsewhere.jsonl")))
    assert said(first) == said(copied) == said(None, controller.saved(spec, {})) == ""
    file.write_text("two\n")
    words = said(Reference.of(str(file)))
    assert f"WARNING: resuming with a KL on the answers of {file} (weights " in words
    assert f"one on the answers of {file} (weights {first.weights[:8]})" in words
    assert f"one on the answers of {file}" in said(None) and "on the policy's own" in said(None)
    assert "one on the policy's own answers" in said(first, controller.saved(spec, {}))


# Two runs on one folder.

WRITES = """
import sys
from pathlib import Path
from klplug.hosting.state import write
for n in range(60):
    write(Path(sys.argv[1]), {"kl_type": sys.argv[2] * 500, "kl_ctrl": "adaptive", "value": n})
"""


def test_a_run_that_is_killed_while_it_writes_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "klplug.json"
    write(path, STATE)
    run = subprocess.Popen([sys.executable, "-c", WRITES.replace("60", "10**6"), str(path), "a"])
    while read(path) == STATE:
        assert run.poll() is None
    run.kill()
    run.wait()
    assert read(path)["kl_type"] == 500 * "a"
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) < 3 and "klplug.json" in left  # of the one that it was at, no more
    write(path, STATE)
    assert read(path) == STATE


def test_two_runs_on_one_folder_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "klplug.json"
    write(path, STATE)
    runs = [subprocess.Popen([sys.executable, "-c", WRITES, str(path), who]) for who in "ab"]
    seen = set()
    while any(run.poll() is None for run in runs):
        seen.add(read(path)["kl_type"][:1])
    assert [run.wait() for run in runs] == [0, 0] and {"a", "b"} & seen
    assert read(path)["value"] == 59
    assert [p.name for p in tmp_path.iterdir()] == ["klplug.json"]
