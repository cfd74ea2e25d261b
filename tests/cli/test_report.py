"""Reports from logs that the real writers wrote, whole and torn."""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from klplug.report.intervals import final
from klplug.report.logs import EVENTS, Log, read
from klplug.report.runs import rolling_mean
from tests.cli.conftest import Klplug

STEPS = 20


def quickstart(
    folder: Path, seed: int = 1, kl_type: str = "k2_as_loss", shift: float = 0.0
) -> Path:
    """A run folder as the quickstart leaves it."""
    folder.mkdir(parents=True)
    settings = {"host": "verl", "kl_type": kl_type, "kl_coef": 0.01, "seed": seed, "model": "tiny"}
    (folder / "settings.json").write_text(json.dumps(settings))
    lines = [
        {
            "step": step,
            "reward": shift + 0.5 + 0.01 * step,
            "klplug/k1": 0.001 * step,
            "klplug/k2": None if step == 1 else 0.002 * step,
            "klplug/k3": 0.003 * step,
            "kl": 0.002 * step,
            "actor/entropy": 1 / step,
            "response_length": 20.0,
            "actor_grad_norm": 0.3,
            "klplug/ess": 0.9,
            "klplug/capped_share": 0.0,
            "klplug/gradient_cosine": 0.99,
            "klplug/top_share": 0.2,
        }
        for step in range(1, STEPS + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def tensorboard(folder: Path) -> Path:
    """An event file as OpenRLHF writes it; its path."""
    with SummaryWriter(log_dir=str(folder)) as writer:
        for step in range(1, STEPS + 1):
            writer.add_scalar("train/reward", 0.1 * step, step)
            writer.add_scalar("train/klplug/k3", 0.01 * step, step)
            writer.add_text("train/generated_samples", "an answer", step)
    (path,) = folder.glob(f"{EVENTS}*")
    return path


def logged(path: Path) -> Log:
    log = Log()
    read(path, log)
    return log


def reported(klplug_command: Klplug, out: Path, *runs: Path) -> tuple[int, dict]:  # type: ignore[type-arg]
    done = klplug_command("report", *runs, "--out", out, "--json")
    assert done.err == ""
    return done.status, json.loads(done.out)


class Page(HTMLParser):
    """Tags that are opened and not closed, and the pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_event_files_give_every_scalar(tmp_path: Path) -> None:
    log = logged(tensorboard(tmp_path))
    assert log.problems == []
    assert log.scalars["train/reward"] == pytest.approx(
        {step: 0.1 * step for step in range(1, STEPS + 1)}
    )


@pytest.mark.parametrize("harm", ["torn", "corrupt"])
def test_a_harmed_event_file_gives_what_is_before(tmp_path: Path, harm: str) -> None:
    path = tensorboard(tmp_path)
    data = bytearray(path.read_bytes())
    if harm == "torn":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    log = logged(path)
    reward = log.scalars["train/reward"]
    assert 0 < len(reward) < STEPS
    assert reward[1] == pytest.approx(0.1)
    (problem,) = log.problems
    assert re.search(r"torn or corrupt after byte [\d,]+ of ", problem) and str(path) in problem


def test_an_empty_and_a_foreign_event_file_are_named(tmp_path: Path) -> None:
    for name, content in (("1", b""), ("2", b"not an event file, but long enough for one header")):
        path = tmp_path / (EVENTS + name)
        path.write_bytes(content)
        assert any(str(path) in problem for problem in logged(path).problems)


def test_lines_that_are_no_json_are_named_by_number(tmp_path: Path) -> None:
    path = quickstart(tmp_path / "run") / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = "[1, 2]"
    path.write_text("\n".join(lines) + '\n{"step": 21, "rew')
    log = logged(path)
    assert len(log.scalars["reward"]) == STEPS - 1
    assert [re.findall(r"line (\d+)", problem)[0] for problem in log.problems] == ["4", "21"]
    assert math.isnan(log.scalars["klplug/k2"][1])


def test_a_report_of_two_runs_one_with_seeds(klplug_command: Klplug, tmp_path: Path) -> None:
    for seed, shift in ((1, 0.0), (2, 0.1), (3, 0.2)):
        quickstart(tmp_path / f"k2-{seed}", seed, shift=shift)
    quickstart(tmp_path / "k3", kl_type="k3_as_loss")
    status, document = reported(klplug_command, tmp_path / "out", tmp_path)
    assert status == 0 and document["problems"] == []
    runs = {run["label"]: run for run in document["runs"]}
    assert set(runs) == {"verl: k2_as_loss 0.01", "verl: k3_as_loss 0.01"}
    seeds = runs["verl: k2_as_loss 0.01"]
    assert len(seeds["folders"]) == 3 and seeds["steps"] == [STEPS] * 3
    # Steps 16 to 20: 0.5 + 0.18 + shift; 95 % of three seeds 0.1 apart: 4.303 * 0.1 / sqrt(3).
    reward = seeds["final"]["reward"]
    assert reward["mean"] == pytest.approx(0.78)
    assert reward["half_width"] == pytest.approx(0.24843, rel=1e-4)
    assert (reward["over"], reward["count"]) == ("seeds", 3)
    assert runs["verl: k3_as_loss 0.01"]["final"]["reward"]["over"] == "steps"


def test_the_page_needs_no_other_file(klplug_command: Klplug, tmp_path: Path) -> None:
    run = quickstart(tmp_path / "a<b>&c")
    (run / "settings.json").unlink()
    out = tmp_path / "out"
    _, document = reported(klplug_command, out, run)
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    panels = ["frontier", "reward", "kl", "entropy", "length", "grad_norm", "ess", "capped_share"]
    panels += ["cosine", "top_share"]
    assert set(document["pictures"]) == set(panels)
    for name, source in zip(panels, page.pictures, strict=True):
        inside = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert inside == (out / f"{name}.png").read_bytes()
        assert inside.startswith(b"\x89PNG")
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "a&lt;b&gt;&amp;c" in text and "a<b>" not in text


def test_logs_below_a_run_are_that_runs(klplug_command: Klplug, tmp_path: Path) -> None:
    tensorboard(quickstart(tmp_path / "run") / "tensorboard" / "x")
    tensorboard(tmp_path / "other-seed1")
    tensorboard(tmp_path / "other-seed2")
    _, document = reported(klplug_command, tmp_path / "out", tmp_path)
    found = {run["label"]: len(run["folders"]) for run in document["runs"]}
    assert found == {"verl: k2_as_loss 0.01": 1, "other": 2}


def test_without_wandb_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    path = tmp_path / "run-x.wandb"
    path.write_bytes(b":W&B\xe1\xbe\x00")
    (problem,) = logged(path).problems
    assert "pip install wandb" in problem


def test_what_can_be_read_is_reported_beside_what_cannot(
    klplug_command: Klplug, tmp_path: Path
) -> None:
    quickstart(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metrics.jsonl").write_text("{")
    status, document = reported(klplug_command, tmp_path / "out", tmp_path)
    assert status == 1
    assert len(document["runs"]) == 1
    assert all("bad" in problem for problem in document["problems"])
    assert "Not everything could be read" in (tmp_path / "out" / "report.html").read_text()


def test_bad_input(klplug_command: Klplug, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text("{")
    (tmp_path / "file").touch()
    quickstart(tmp_path / "good")
    for run, out, named in (
        ("nowhere", "out", "nowhere: no such folder"),
        ("empty", "out", "no log in it"),
        ("file", "out", "no log in it"),
        ("torn", "out", "no run could be read"),
        ("good", "file", "file: File exists"),
    ):
        done = klplug_command("report", tmp_path / run, "--out", tmp_path / out)
        assert done.status == 2
        assert named in done.err and "Traceback" not in done.err


def test_the_interval_of_one_seed_is_over_its_steps() -> None:
    value = final([{step: float(step % 2) for step in range(100)}])
    assert value is not None
    assert (value.mean, value.over, value.count) == (0.5, "steps", 10)
    # Ten values of variance 10 * 0.25 / 9: 2.262 * sqrt(0.2778 / 10).
    assert value.half_width == pytest.approx(0.37700, rel=1e-3)
    assert final([{1: math.nan}]) is None


def test_a_rolling_mean_leaves_nan_out() -> None:
    assert rolling_mean({1: 1.0, 2: math.nan, 5: 3.0}, 2) == {1: 1.0, 2: 1.0, 5: 3.0}
