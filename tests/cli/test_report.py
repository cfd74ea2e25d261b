"""Reports from logs that the real writers wrote, whole and torn."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from torch.utils.tensorboard import SummaryWriter

from klplug.report.closed_form import closed_form
from klplug.report.intervals import final
from klplug.report.logs import EVENTS, Log, _wandb_step, read
from klplug.report.page import report
from klplug.report.runs import NoLogs, groups, not_finite, rolling_mean
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
    """Tags that are opened and not closed, identifiers, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


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
    assert len(page.ids) == len(set(page.ids))
    panels = {"frontier", "reward", "kl_k1", "kl_k2", "kl_k3", "kl_host", "entropy", "length"}
    panels |= {"grad_norm", "ess", "capped_share", "cosine", "top_share"}
    assert set(document["pictures"]) == panels
    for name in panels:
        assert name in page.ids
        drawn = ElementTree.parse(out / f"{name}.svg").getroot()
        assert drawn.tag.endswith("}svg") and drawn.attrib["viewBox"]
    assert not re.search(r"(?:src|href)=\"(?!#)", text)
    assert "a&lt;b&gt;&amp;c" in text and "a<b>" not in text


def axis(picture: Path) -> list[str]:
    """The words of a picture: its ticks, labels and title."""
    return [
        " ".join(element.itertext())
        for element in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")
    ]


def test_one_diverged_run_flattens_no_other(klplug_command: Klplug, tmp_path: Path) -> None:
    """The reports of two runs: a KL of 0.01, and one that ends at 500."""
    for name, rate in (("good", 1.05), ("bad", 1.8)):
        run = quickstart(tmp_path / name, kl_type=f"k{len(name)}_as_loss")
        lines = [
            {"step": step, "reward": 0.5, "klplug/k3": 0.004 * rate**step, "klplug/ess": 0.999}
            for step in range(1, STEPS + 1)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "settings.json").unlink()
    out = tmp_path / "out"
    reported(klplug_command, out, tmp_path / "good", tmp_path / "bad")
    assert {"0.01", "0.1", "1", "10", "100"} <= set(axis(out / "kl_k3.svg"))  # a logarithmic axis
    assert {"0.0", "1.0"} <= set(axis(out / "ess.svg"))  # a share keeps its whole axis
    assert not any("+" in word or "1e" in word for word in axis(out / "reward.svg"))  # no offset


def test_a_run_whose_metrics_never_change(klplug_command: Klplug, tmp_path: Path) -> None:
    lines = [{"step": step, "reward": 0.1, "klplug/kl": 0.1} for step in range(1, 61)]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, document = reported(klplug_command, tmp_path / "out", tmp_path)
    assert status == 0
    assert document["runs"][0]["final"]["reward"]["mean"] == pytest.approx(0.1)


def test_nan_from_some_step_on_is_a_problem(klplug_command: Klplug, tmp_path: Path) -> None:
    run = quickstart(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[11:]:
        line["klplug/k3"] = None  # so the quickstart writes nan
    lines[4]["klplug/k1"] = None  # a hole that closes
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, document = reported(klplug_command, tmp_path / "out", run)
    assert status == 1
    told = "no finite number from step 12 to the last, 20: klplug/k3"
    assert document["problems"] == [f"{run}: {told}"]
    assert told in page_of(tmp_path / "out").text
    # What was logged before counts no more: a run whose KL is nan has no final KL.
    assert "kl_k3" not in document["runs"][0]["final"]


def test_trailing_infinities_are_told_too(tmp_path: Path) -> None:
    ends = {1: 1.0, 2: math.inf, 3: math.nan}
    told = "no finite number from step 2 to the last, 3: reward, entropy"
    assert not_finite({"reward": ends, "entropy": ends}) == [told]
    assert not_finite({"reward": {1: math.nan, 2: 1.0}}) == []


VERL_LINE = (
    "step:{step} - global_seqlen/min:123 - actor/kl_loss:np.float64(0.0{step}) - "
    "actor/entropy:0.5 - critic/score/mean:0.{step} - val-core/gsm8k/acc/mean@1:0.7{step} - "
    "response_length/mean:20.0 - perf/throughput:1234.5 - perf/time_per_step:9.0"
)


def assert_is_the_verl_run(document: dict) -> None:  # type: ignore[type-arg]
    (run,) = document["runs"]
    final = {name: value["mean"] for name, value in run["final"].items()}
    assert final == pytest.approx(
        {
            "reward": 0.25, "kl_host": 0.025, "entropy": 0.5, "length": 20.0, "seconds": 9.0,
            "throughput": 1234.5, "val-core/gsm8k/acc/mean@1": 0.74,
        }
    )  # fmt: skip


def test_a_console_s_log(klplug_command: Klplug, tmp_path: Path) -> None:
    lines = ["\x1b[36m(TaskRunner pid=7)\x1b[0m " + VERL_LINE.format(step=s) for s in range(1, 5)]
    (tmp_path / "train.log").write_text("Loading weights\n" + "\n".join(lines) + "\n")
    status, document = reported(klplug_command, tmp_path / "out", tmp_path)
    assert status == 0
    assert_is_the_verl_run(document)
    assert document["runs"][0]["label"] == "train"


def test_a_console_s_dictionaries(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(
        "INFO Global step 3: {'reward': 0.5, 'kl': nan, 'actor_lr': 1e-06}\n"
        "INFO Evaluation completed in 0:00:09, global_step 3, eval_metrics: {'gsm8k_pass1': 0.25}\n"
        "INFO Global step 4: {'reward': np.float64(0.75), 'kl': 0.125}\n"
    )
    log = logged(path)
    assert log.scalars["reward"] == {3: 0.5, 4: 0.75}
    assert math.isnan(log.scalars["kl"][3]) and log.scalars["kl"][4] == 0.125
    assert log.scalars["actor_lr"] == {3: 1e-6}
    assert log.scalars["eval/gsm8k_pass1"] == {3: 0.25}


def test_json_lines_with_the_scalars_below_data(klplug_command: Klplug, tmp_path: Path) -> None:
    for name in ("one", "two"):
        lines = [
            {
                "step": s,
                "data": {
                    "actor/kl_loss": 0.01 * s, "actor/entropy": 0.5, "critic/score/mean": 0.1 * s,
                    "val-core/gsm8k/acc/mean@1": 0.7 + 0.01 * s, "response_length/mean": 20.0,
                    "perf/throughput": 1234.5, "perf/time_per_step": 9.0, "note": "a word",
                },
            }
            for s in range(1, 5)
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "prompts.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n')
    _, document = reported(klplug_command, tmp_path / "out", tmp_path)
    assert [run["label"] for run in document["runs"]] == ["one", "two"]
    _, document = reported(klplug_command, tmp_path / "out", tmp_path / "one.jsonl")
    assert_is_the_verl_run(document)


def test_a_table_as_wandb_exports_it(klplug_command: Klplug, tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text(
        '"train/global_step","run-1 - train/reward","run-1 - train/reward__MIN","note"\n'
        '"1","0.25","0.1","x"\n"2","0.75","0.1",""\n'
    )
    _, document = reported(klplug_command, tmp_path / "out", tmp_path)
    (run,) = document["runs"]
    assert run["steps"] == [2] and run["final"]["reward"]["mean"] == 0.5


def test_a_stock_run_has_its_own_kl_in_the_table(klplug_command: Klplug, tmp_path: Path) -> None:
    quickstart(tmp_path / "klplug")
    stock = quickstart(tmp_path / "stock", kl_type="stock:k3")
    lines = [json.dumps({"step": s, "reward": 0.5, "kl": 0.125}) for s in range(1, STEPS + 1)]
    (stock / "metrics.jsonl").write_text("\n".join(lines))
    done = klplug_command("report", tmp_path, "--out", tmp_path / "out")
    (line,) = (line for line in done.out.splitlines() if "stock:k3" in line)
    assert "0.125 (the trainer's own)" in line
    (line,) = (line for line in done.out.splitlines() if "k2_as_loss" in line)
    assert "(k3)" in line


def test_a_kl_that_the_trainer_logs_without_a_reference_is_none(
    klplug_command: Klplug, tmp_path: Path
) -> None:
    """OpenRLHF logs kl 0 at every step of a run whose coefficient is 0."""
    without = quickstart(tmp_path / "without", kl_type="none")
    lines = [json.dumps({"step": s, "reward": 0.5, "kl": 0.0}) for s in range(1, STEPS + 1)]
    (without / "metrics.jsonl").write_text("\n".join(lines))
    _, document = reported(klplug_command, tmp_path / "out", tmp_path)
    (run,) = document["runs"]
    assert set(run["final"]) == {"reward"}


def test_summaries_and_settings_stand_beside_the_curves(
    klplug_command: Klplug, tmp_path: Path
) -> None:
    for name, kl_type, after in (("a", "k2_as_loss", 0.774), ("b", "k3_as_loss", 0.25)):
        run = quickstart(tmp_path / name, kl_type=kl_type)
        summary = {"accuracy_before": 0.638, "accuracy_after": after, "kl_last": 0.66}
        (run / "summary.json").write_text(json.dumps(summary))
    reported(klplug_command, tmp_path / "out", tmp_path)
    page = (tmp_path / "out" / "report.html").read_text()
    row = re.search(r"accuracy after</th>(.*?)</tr>", page, re.DOTALL)
    assert row and re.findall(r"<td>(.*?)</td>", row[1]) == ["77.4 %", "25.0 %"]
    row = re.search(r">kl_type</th>(.*?)</tr>", page, re.DOTALL)
    assert row and re.findall(r"<td>(.*?)</td>", row[1]) == ["k2_as_loss", "k3_as_loss"]
    assert "The same in all that have settings: host verl, kl_coef 0.01, model tiny." in page


def test_a_log_without_settings_differs_in_none(klplug_command: Klplug, tmp_path: Path) -> None:
    quickstart(tmp_path / "a")
    (quickstart(tmp_path / "b") / "settings.json").unlink()
    reported(klplug_command, tmp_path / "out", tmp_path)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Settings that differ" not in page
    assert "kl_type k2_as_loss" in page


def test_a_validation_score_ends_with_its_last_evaluation(
    klplug_command: Klplug, tmp_path: Path
) -> None:
    """A mean of five evaluations would be of half the run."""
    rows = "".join(f"{s},{s / 100},{s / 100}\n" for s in range(10, 70, 10))
    (tmp_path / "run.csv").write_text("step,val-core/acc,critic/score/mean\n" + rows)
    _, document = reported(klplug_command, tmp_path / "out", tmp_path)
    final = document["runs"][0]["final"]
    assert final["val-core/acc"]["mean"] == 0.6
    assert final["reward"]["mean"] == pytest.approx(0.4)  # of 0.2 to 0.6


def test_a_name_breaks_after_an_option_and_a_run_of_nan_is_said(
    klplug_command: Klplug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = quickstart(tmp_path / "a", kl_type="k1_as_loss,ratio=none")
    lines = [{"step": s, "reward": None, "klplug/kl": 0.1} for s in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("COLUMNS", "70")
    done = klplug_command("report", tmp_path, "--out", tmp_path / "out")
    assert "k1_as_loss,ratio=none" in done.out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "k1_as_loss,<wbr>ratio=none" in page
    row = re.search(r">reward</th>(.*?)</tr>", page, re.DOTALL)
    assert row and re.findall(r"<td>(.*?)</td>", row[1]) == ["nan"]


def test_logs_below_a_run_are_that_runs(klplug_command: Klplug, tmp_path: Path) -> None:
    tensorboard(quickstart(tmp_path / "run") / "tensorboard" / "x")
    tensorboard(tmp_path / "other-seed1")
    tensorboard(tmp_path / "other-seed2")
    _, document = reported(klplug_command, tmp_path / "out", tmp_path)
    found = {run["label"]: len(run["folders"]) for run in document["runs"]}
    assert found == {"verl: k2_as_loss 0.01": 1, "other": 2}


def test_a_seed_that_ended_early_is_named(klplug_command: Klplug, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        quickstart(tmp_path / f"k2-{seed}", seed)
    short = tmp_path / "k2-2" / "metrics.jsonl"
    short.write_text("".join(short.read_text().splitlines(keepends=True)[:7]))
    alone = quickstart(tmp_path / "k3", kl_type="k3_as_loss") / "metrics.jsonl"
    alone.write_text("".join(alone.read_text().splitlines(keepends=True)[:3]))
    status, document = reported(klplug_command, tmp_path / "out", tmp_path)
    told = f"{short.parent}: ends at step 7, another seed of the same at {STEPS}"
    assert status == 1 and document["problems"] == [told]
    assert told in page_of(tmp_path / "out").text


def parts(folder: Path, *names_and_steps: tuple[str, int, int]) -> None:
    """Event files of a trainer that was started several times: reward is the step and a start."""
    for start, (name, first, last) in enumerate(names_and_steps):
        with SummaryWriter(log_dir=str(folder / name)) as writer:
            for step in range(first, last + 1):
                writer.add_scalar("train/reward", step + start / 8, step)


@pytest.mark.parametrize(
    "names",
    [
        ("ppo_1128T09:30", "ppo_1128T13:05", "ppo_1129T09:30"),  # OpenRLHF's own
        tuple(f"offline-run-20261128_{end}" for end in ("093000-x1", "130500-a2", "230000-k3")),
    ],
)
def test_a_resumed_run_is_one(
    klplug_command: Klplug, tmp_path: Path, names: tuple[str, str, str]
) -> None:
    """Seed 1 has a folder for each of its starts."""
    before, after, other = names
    parts(tmp_path / "k2-seed1" / "logs", (before, 1, 8), (after, 7, 20))
    parts(tmp_path / "k2-seed2" / "logs", (other, 1, 20))
    _, document = reported(klplug_command, tmp_path / "out", tmp_path)
    (run,) = document["runs"]
    folders = [str(tmp_path / f"k2-seed{seed}" / "logs") for seed in (1, 2)]
    assert run["folders"] == folders and run["steps"] == [20, 20]
    # Steps 16 to 20, of the one seed by the second start.
    assert run["final"]["reward"]["mean"] == pytest.approx(18 + 1 / 16)
    ((group,), _) = groups([tmp_path])
    assert group.runs[0].metrics["reward"] == {s: s + (s > 6) / 8 for s in range(1, 21)}


def clocked(folder: Path, monkeypatch: pytest.MonkeyPatch, *starts: tuple[float, int, int]) -> None:
    """Event files of a trainer that took a second a step; each start has its time and its steps."""
    for index, (began, first, last) in enumerate(starts):
        now = [1e9 + began]
        monkeypatch.setattr(time, "time", lambda now=now: now[0])
        with SummaryWriter(log_dir=str(folder)) as writer:
            for step in range(first, last + 1):
                now[0] += 1
                writer.add_scalar("critic/score/mean", step + index / 8, step)
                if step % 5 == 0:
                    writer.add_scalar("val-core/x", step, step)


def test_what_a_resumed_run_had_logged_beyond_counts_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl writes all starts into one folder, OpenRLHF each into its own."""
    expected = {s: s + (s > 10) / 8 for s in range(1, 14)}
    starts = (0, 1, 20), (1000, 11, 13)
    clocked(tmp_path / "verl", monkeypatch, *starts)
    for name, start in zip(("ppo_1128T09:30", "ppo_1128T13:05"), range(2), strict=True):
        (tmp_path / "openrlhf" / name).mkdir(parents=True)
        path = sorted((tmp_path / "verl").iterdir())[start]
        (tmp_path / "openrlhf" / name / path.name).write_bytes(path.read_bytes())
    for folder in ("verl", "openrlhf"):
        ((group,), problems) = groups([tmp_path / folder])
        (run,) = group.runs
        assert run.metrics == {"reward": expected, "val-core/x": {5: 5.0, 10: 10.0}}
        assert problems == [] and run.seconds == 20 + 3


def test_a_start_from_an_earlier_checkpoint_than_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, start in {"a": (0, 1, 20), "b": (100, 16, 18), "c": (200, 11, 13)}.items():
        clocked(tmp_path / f"run-20261128_09300{'abc'.index(name)}-{name}", monkeypatch, start)
    ((group,), _) = groups([tmp_path])
    assert list(group.runs[0].metrics["reward"]) == list(range(1, 14))
    assert group.runs[0].seconds == 20 + 3 + 3


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", '{{"step": {step}, "reward": {value}}}'),
        ("train.log", "step:{step} - actor/entropy:0.5 - reward:{value}"),
    ],
)
def test_a_log_that_goes_back_goes_on_from_there(tmp_path: Path, name: str, line: str) -> None:
    steps = [*range(1, 21), *range(11, 14)]
    lines = [line.format(step=step, value=index) for index, step in enumerate(steps)]
    (tmp_path / name).write_text("".join(f"{written}\n" for written in lines))
    reward = logged(tmp_path / name).scalars["reward"]
    assert reward == {step: step - 1 + 10 * (step > 10) for step in range(1, 14)}


def test_lines_in_another_order_are_all_there(tmp_path: Path) -> None:
    for name, form in (("metrics.jsonl", '{{"step": {0}, "reward": {0}}}'), ("run.csv", "{0},{0}")):
        head = ["step,reward"] if name.endswith("csv") else []
        lines = [*head, *(form.format(step) for step in (3, 1, 2, 5, 4))]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        assert logged(tmp_path / name).scalars["reward"] == {step: step for step in range(1, 6)}


def test_a_run_is_one_whatever_path_it_is_named_by(
    klplug_command: Klplug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings tell seeds apart from others: twice itself it would be two, with no spread."""
    quickstart(tmp_path / "runs" / "one")
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("runs")
    named = Path("runs"), tmp_path / "runs" / "one", Path("link/one")
    _, document = reported(klplug_command, tmp_path / "out", *named)
    (run,) = document["runs"]
    assert run["folders"] == ["runs/one"] and run["final"]["reward"]["over"] == "steps"


def test_a_metric_that_a_run_went_on_without_is_a_problem(tmp_path: Path) -> None:
    """As klplug's own are, of a run that is resumed without klplug."""
    lines: list[dict[str, object]] = [{"step": s, "reward": 0.5} for s in range(1, 21)]
    for line in lines[:9]:
        line["klplug/k3"] = 0.25
    for line in lines[4::5]:
        line["val-core/x"] = 0.5
    del lines[19]["val-core/x"]  # it may come at 25
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    _, problems = groups([tmp_path])
    assert problems == [f"{tmp_path}: not logged after step 9, and the run ends at 20: klplug/k3"]


def test_an_event_file_of_text_is_no_problem(tmp_path: Path) -> None:
    """verl's validation samples have a writer of their own, in the same folder."""
    tensorboard(tmp_path)
    with SummaryWriter(log_dir=str(tmp_path), filename_suffix=".text") as writer:
        writer.add_text("val/generations", "an answer", 1)
    ((group,), problems) = groups([tmp_path])
    assert problems == [] and len(group.runs[0].metrics["reward"]) == STEPS
    (tmp_path / "alone").mkdir()
    with SummaryWriter(log_dir=str(tmp_path / "alone")) as writer:
        writer.add_text("val/generations", "an answer", 1)
    with pytest.raises(NoLogs, match="no scalar in it"):
        report([tmp_path / "alone"], tmp_path / "out")


def test_a_console_s_last_number_may_be_half_of_one(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text("step:1 - reward:0.5 - kl:0.25\nstep:2 - reward:0.75 - kl:0.")
    log = logged(path)
    assert log.scalars == {"reward": {1: 0.5, 2: 0.75}, "kl": {1: 0.25}}
    assert log.problems == [f"{path}: ends within the line of step 2"]


def test_an_integer_that_no_float_reaches_is_infinite(tmp_path: Path) -> None:
    huge = "1" + 400 * "0"
    for name, line in (
        ("metrics.jsonl", f'{{"step": 1, "reward": {huge}, "kl": true}}'),
        ("train.log", f"Global step 1: {{'reward': {huge}, 'kl': True}}"),
    ):
        (tmp_path / name).write_text(line + "\n")
        assert logged(tmp_path / name).scalars == {"reward": {1: math.inf}}


def test_a_byte_order_mark_and_empty_lines_are_nothing(tmp_path: Path) -> None:
    for name, text in (
        ("run.csv", "step,reward\n1,0.5\n"),
        ("run.jsonl", '{"step": 1, "reward": 0.5}\n\n'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        log = logged(tmp_path / name)
        assert (log.scalars, log.problems) == ({"reward": {1: 0.5}}, [])


def test_of_many_wrong_lines_some_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n' * 1000 + '{"step": 1, "reward": 2}\n')
    *named, more = logged(tmp_path / "metrics.jsonl").problems
    assert [re.findall(r"line (\d+)", problem) for problem in named] == [["1"], ["2"], ["3"]]
    assert "997 more lines" in more


def test_a_folder_whose_name_is_no_text(klplug_command: Klplug, tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"run-\xff")
    (quickstart(run) / "settings.json").unlink()
    status, document = reported(klplug_command, tmp_path / "out", run)
    assert status == 0 and document["runs"][0]["label"] == run.name
    assert r"run-\udcff" in page_of(tmp_path / "out").text
    assert r"run-\udcff" in klplug_command("report", run, "--out", tmp_path / "out").out


def test_runs_in_one_folder_and_folders_that_are_named_stay_apart(
    klplug_command: Klplug, tmp_path: Path
) -> None:
    names = ("ppo_1128T09:30", "ppo_1128T10:30", "ppo_1128T13:05")
    parts(tmp_path, *zip(names, (1, 1, 7), (8, 8, 20), strict=True))
    _, document = reported(klplug_command, tmp_path / "out", tmp_path)
    assert [run["label"] for run in document["runs"]] == list(names)
    both = tmp_path / names[1], tmp_path / names[2]
    _, document = reported(klplug_command, tmp_path / "out", *both)
    assert [run["label"] for run in document["runs"]] == list(names[1:])


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
    assert "What is wrong" in page_of(tmp_path / "out").text


def test_runs_of_one_name_keep_their_own_ends(klplug_command: Klplug, tmp_path: Path) -> None:
    for folder, reward in (("a/logs", 0.25), ("b/logs", 0.75)):
        (tmp_path / folder).mkdir(parents=True)
        line = json.dumps({"step": 1, "reward": reward})
        (tmp_path / folder / "train.jsonl").write_text(line + "\n")
    _, document = reported(klplug_command, tmp_path / "out", tmp_path)
    ends = {run["label"]: run["final"]["reward"]["mean"] for run in document["runs"]}
    assert ends == {"train (a/logs/train.jsonl)": 0.25, "train (b/logs/train.jsonl)": 0.75}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.jsonl", '{"step": 1, "reward": 0.5}\n{"step": Infinity, "reward": 9}\n'),
        ("run.csv", "step,reward\n1,0.5\ninf,9\n"),
    ],
)
def test_an_infinite_step_is_named_by_file_and_line(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    log = logged(path)
    assert log.scalars["reward"] == {1: 0.5}
    (problem,) = log.problems
    assert problem.startswith(f"{path}, line {text.count(chr(10))}: ")


def test_a_table_of_several_runs_is_none(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(
        '"Step","A - train/reward","A - train/reward__MIN","B - train/reward"\n1,2,2,3\n'
    )
    log = logged(path)
    assert not log.scalars
    assert log.problems == [f"{path}: columns of several runs (A, B): export one run a file"]


def test_an_evaluation_in_wandb_stands_at_its_own_step() -> None:
    """OpenRLHF's log_eval has no other step: W&B counts its own calls."""
    values = {"eval/global_step": "40", "eval/gsm8k_pass1": "0.5", "_step": "7"}
    items = [SimpleNamespace(key=key, value_json=value) for key, value in values.items()]
    log = Log()
    _wandb_step(SimpleNamespace(item=items, step=SimpleNamespace(num=7)), log)
    assert log.scalars["eval/gsm8k_pass1"] == {40: 0.5}


def test_a_step_in_words_is_none(tmp_path: Path) -> None:
    values = {"step": '"1/100"', "reward": "0.5", "kl": '"NaN"', "note": '"a word"'}
    items = [SimpleNamespace(key=key, value_json=value) for key, value in values.items()]
    log = Log()
    _wandb_step(SimpleNamespace(item=items, step=SimpleNamespace(num=7)), log)
    assert log.scalars["reward"] == {7: 0.5} and set(log.scalars) == {"reward", "kl"}


def test_samples_in_another_encoding_are_named_by_line(
    klplug_command: Klplug, tmp_path: Path
) -> None:
    run, path = quickstart(tmp_path / "run"), tmp_path / "ref.jsonl"
    path.write_bytes('\n{"prompt": "café", "reward": 1, "tokens": 3}\n'.encode("latin-1"))
    done = klplug_command("report", run, "--samples", path, "--out", tmp_path / "o")
    assert done.status == 2 and f"{path}, line 2: not UTF-8" in done.err.replace("\n", "")


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


def test_one_seed_has_the_range_of_its_steps_and_no_interval() -> None:
    value = final([{step: float(step % 2) for step in range(100)}], 5)
    assert value is not None
    assert (value.mean, value.over, value.count) == (0.5, "steps", 10)
    assert (value.half_width, value.low, value.high) == (None, 0.0, 1.0)
    assert str(value) == "0.5 (0 to 1)"
    assert final([{1: math.nan}], 5) is None


def test_a_rolling_mean_leaves_nan_out() -> None:
    assert rolling_mean({1: 1.0, 2: math.nan, 5: 3.0}, 2) == {1: 1.0, 2: 1.0, 5: 3.0}


def answers(path: Path, *prompts: list[tuple[float, float]]) -> Path:
    """Of the reference, a list of rewards and tokens for each prompt."""
    rows = [
        {"prompt": f"prompt {i}", "reward": reward, "tokens": tokens}
        for i, own in enumerate(prompts)
        for reward, tokens in own
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_frontier_is_the_closed_form(tmp_path: Path) -> None:
    """Right and wrong, a half each, of 10 tokens; and 3 of 4 right, of 20."""
    path = answers(
        tmp_path / "ref.jsonl",
        [(1, 10), (0, 10), (1, 10), (0, 10)],
        [(1, 20), (1, 20), (1, 20), (0, 20)],
    )
    best = closed_form(path)
    assert (best.prompts, best.answers) == (2, 4)
    assert (best.frontier[0].kl, best.frontier[0].reward) == (0, pytest.approx(0.625))
    for point, beta in zip(best.frontier[1:], [2 ** (5 - k / 2) for k in range(25)], strict=True):
        reward = kl = 0.0
        for right in (0.5, 0.75):
            p = right * math.exp(1 / beta) / (right * math.exp(1 / beta) + 1 - right)
            reward += p / 2
            kl += p * math.log(p / right)
            kl += (1 - p) * math.log((1 - p) / (1 - right)) if p < 1 else 0.0
        assert point.reward == pytest.approx(reward, rel=1e-9)
        assert point.kl == pytest.approx(kl / 30, rel=1e-6, abs=1e-12)
    kls = [point.kl for point in best.frontier]
    assert kls == sorted(kls) and kls[-1] == pytest.approx((math.log(2) + math.log(4 / 3)) / 30)


def test_best_of_n_is_the_mean_over_every_choice_of_n(tmp_path: Path) -> None:
    own = [(0.2, 5.0), (1.0, 9.0), (0.7, 3.0), (0.4, 8.0), (0.9, 2.0)]
    best = closed_form(answers(tmp_path / "ref.jsonl", own))
    assert [point.n for point in best.best_of] == [1, 2, 4]
    for point in best.best_of:
        chosen = [max(some) for some in itertools.combinations(own, point.n)]
        reward, tokens = (sum(x) / len(chosen) for x in zip(*chosen, strict=True))
        assert point.reward == pytest.approx(reward)
        bound = math.log(point.n) - (point.n - 1) / point.n
        assert point.kl == pytest.approx(bound / tokens)


def test_the_closed_form_stands_beside_the_runs(klplug_command: Klplug, tmp_path: Path) -> None:
    run = quickstart(tmp_path / "run")
    path, out = answers(tmp_path / "ref.jsonl", [(1, 10), (0, 10)]), tmp_path / "out"
    done = klplug_command("report", str(run), "--samples", str(path), "--out", str(out))
    assert done.status == 0
    words = axis(out / "frontier.svg")
    assert {"ref exp(r/beta)/Z", "best of N", "2"} <= {word.strip() for word in words}
    assert "can&#39;t see beyond a KL of log 2 nats" in (out / "report.html").read_text()
    plain = klplug_command("report", str(run), "--out", str(out))
    assert plain.status == 0 and "best of N" not in axis(out / "frontier.svg")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no answers in it"),
        ('{"prompt": "a", "reward": 1, "tokens": 3}\n', 'prompt "a" has one answer'),
        ('{"prompt": "a", "reward": 1}\n', "line 1: no answer with prompt, reward and tokens"),
        ("half a line\n", "line 1: no answer with prompt"),
        ('{"prompt": "a", "reward": NaN, "tokens": 3}\n', "line 1: reward must be finite"),
        ('{"prompt": "a", "reward": 1, "tokens": 0}\n', "and tokens above 0"),
    ],
)
def test_samples_that_are_none_are_told(
    text: str, told: str, klplug_command: Klplug, tmp_path: Path
) -> None:
    run, path = quickstart(tmp_path / "run"), tmp_path / "ref.jsonl"
    path.write_text(text)
    done = klplug_command("report", str(run), "--samples", str(path), "--out", str(tmp_path / "o"))
    assert done.status == 2 and told in done.err
