"""`python -m recipes.evaluate`: the metrics by hand, and real policies on a handful of rows."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="no transformers here: it comes with a host")
pytest.importorskip("math_verify", reason="the recipes extra is not installed")

from recipes import cpu_shim
from recipes import evaluate as module
from recipes.data import EVALUATION, INSTRUCTION, Problem
from recipes.evaluate import ks, main, majority, pass_at, record, wilson
from recipes.quickstart.problems import problems, write_rows
from recipes.quickstart.settings import HERE
from recipes.quickstart.smollm2 import FOLDER
from recipes.recipe import load
from recipes.shared.folder import FolderError
from recipes.shared.settings import CACHE

ROOT = Path(__file__).resolve().parents[2]
POLICY = HERE / "policy"
SMOLLM2 = CACHE / "models" / FOLDER
FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


# The metrics


@pytest.mark.parametrize(("samples", "right"), [(5, 0), (5, 2), (6, 5), (4, 4)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples: int, right: int) -> None:
    verdicts = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        draws = list(itertools.combinations(verdicts, k))
        assert pass_at(k, right, samples) == pytest.approx(statistics.mean(map(any, draws)))


def test_wilsons_interval() -> None:
    z = statistics.NormalDist().inv_cdf(0.975)
    # At p = 1/2 the interval is 1/2 -+ z / (2 sqrt(n + z^2)).
    half = z / (2 * (4 + z**2) ** 0.5)
    assert wilson(0.5, 4) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert wilson(0.0, 4)[0] == 0.0 and wilson(1.0, 4)[1] == pytest.approx(1.0)
    # At p = 0 the upper end is z^2 / (n + z^2).
    assert wilson(0.0, 500)[1] == pytest.approx(z**2 / (500 + z**2))


def test_ks_are_powers_of_two_and_the_number_itself() -> None:
    assert [ks(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


VOTES = [
    ([r"\boxed{3}", r"\boxed{4}", r"so \boxed{4}"], 1),
    ([r"\boxed{0.5}", r"\boxed{2}", r"\boxed{\frac{1}{2}}"], 0),
    (["#### 8", "I say 7", "it is 7.", "#### 7", r"\boxed{7 apples}"], 3),
    ([r"\boxed{1}", r"\boxed{2}"], 0),
    (["", "no idea", r"\boxed{2}"], 2),
    (["", "no idea"], None),
]


@pytest.mark.parametrize(("responses", "place"), VOTES)
def test_the_majority(responses: list[str], place: int | None) -> None:
    assert majority(responses) == place


def test_a_record_has_every_verdict() -> None:
    texts = [r"\boxed{6}", r"\boxed{5}", r"\boxed{\frac{12}{2}}"]
    made = record(Problem("q?", "6"), r"\boxed{5}", texts)
    assert made["greedy"]["right"] is False and made["majority_right"] is True
    assert [sample["right"] for sample in made["samples"]] == [True, False, True]
    hopeless = record(Problem("q?", r"\sum_{i=1}^{10^{9}} i!"), r"\boxed{5}", [])
    assert hopeless["gradable"] is False and "samples" not in hopeless
    cut_off = record(Problem("q?", "6"), "first 12, then 6", ["first 12, then 6"])
    assert cut_off["greedy"]["right"] is False and cut_off["majority_right"] is False


# Whole evaluations


def words(tmp_path: Path, count: int) -> str:
    write_rows(tmp_path / "words.jsonl", problems("test", count, 0))
    return str(tmp_path / "words.jsonl")


def arguments(data: str, out: Path, **own: Any) -> list[str]:
    """The quickstart's policy, asked as it was trained."""
    options = {"instruction": "", "max_new_tokens": 48, "samples": 8, "batch_size": 8, **own}
    flags = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    engine = ["--engine", "transformers"]
    return [str(POLICY), "--data", data, "--out", str(out), *engine, *flags]


def files(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    records = (out / "records.jsonl").read_text("utf-8").splitlines()
    return json.loads((out / "summary.json").read_text()), list(map(json.loads, records))


def test_the_quickstarts_policy(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(arguments(words(tmp_path, 32), out)) == 0
    summary, records = files(out)
    means = {name: metric["mean"] for name, metric in summary["metrics"].items()}
    # Its card: 63.8 % greedy, 53 % sampled.
    assert 0.4 < means["greedy"] < 0.9 and 0.3 < means["pass@1"] < 0.8
    assert means["pass@1"] < means["pass@2"] < means["pass@4"] < means["pass@8"]
    assert means["majority@8"] >= means["pass@1"]
    assert len(records) == 32
    assert means["greedy"] == statistics.mean(r["greedy"]["right"] for r in records)
    for metric in summary["metrics"].values():
        low, high = metric["interval"]
        assert 0 <= low < metric["mean"] < high <= 1
    assert "95 % interval" in capsys.readouterr().out


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(tmp_path, monkeypatch) -> None:
    data, out = words(tmp_path, 12), tmp_path / "out"
    own = {"samples": 2, "batch_size": 4}
    assert main(arguments(data, tmp_path / "whole", **own)) == 0
    answers, calls = module.Transformers.answers, []

    def interrupted(self, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return answers(self, *args)

    monkeypatch.setattr(module.Transformers, "answers", interrupted)
    assert main(arguments(data, out, **own)) == 130
    with (out / "records.jsonl").open("a") as file:
        file.write('{"question": "torn')
    calls.clear()
    assert main(arguments(data, out, **own)) == 0
    assert len(calls) == 2, "two of three batches were there"
    assert files(out) == files(tmp_path / "whole")
    calls.clear()
    assert main(arguments(data, out, **own)) == 0
    assert not calls
    assert main(arguments(data, out, samples=4, batch_size=4)) == 2


@pytest.mark.parametrize("name", EVALUATION)
def test_every_benchmark_in_its_own_schema(name: str, tmp_path) -> None:
    file = {"gsm8k": "gsm8k_test"}.get(name, name)
    own = {"file": FIXTURES / f"{file}.jsonl", "samples": 0, "max_new_tokens": 4}
    assert main(arguments(name, tmp_path / "out", **own)) == 0
    summary, records = files(tmp_path / "out")
    assert set(summary["metrics"]) == {"greedy"} and len(records) == 2


def test_smollm2_on_real_rows_of_math_500(tmp_path) -> None:
    if not SMOLLM2.is_dir() or not SHARED.is_dir():
        pytest.skip("no SmolLM2 in the cache, or no local copy of MATH-500 beside the repository")
    own = {"file": SHARED / "math500.json", "n": 2, "samples": 2, "max_new_tokens": 16}
    words = arguments("math500", tmp_path / "out", **own, instruction=INSTRUCTION)
    assert main([str(SMOLLM2), *words[1:]]) == 0
    summary, records = files(tmp_path / "out")
    assert [r["answer"] for r in records] == [r"\left( 3, \frac{\pi}{2} \right)", "p - q"]
    assert all(len(r["samples"]) == 2 and r["greedy"]["text"] for r in records)
    assert set(summary["metrics"]) == {"greedy", "pass@1", "pass@2", "majority@2"}


# What is refused


BAD = [
    (["--n", "0"], "--n 0: at least 1"),
    (["--samples", "-1"], "--samples -1: 0"),
    (["--temperature", "0"], "--temperature 0: above 0"),
    (["--top-p", "1.5"], "--top-p 1.5: above 0 and at most 1"),
    (["--top-p", "0.9"], "--top-p 0.9: transformers samples with 1"),
    (["--data", "math501"], "--data math501: there are math500, gsm8k, aime24, amc23, or a file"),
    (["--question", "problem", "--data", "math500"], "are for a FILE, not for math500"),
    (["--file", "x.jsonl"], "--file is for math500"),
]


@pytest.mark.parametrize(("own", "message"), BAD)
def test_what_cannot_be_is_said(tmp_path, capsys, own: list[str], message: str) -> None:
    assert main([*arguments(words(tmp_path, 2), tmp_path / "out"), *own]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "records.jsonl").exists() or "top-p" in message


def test_another_column_is_another_evaluation(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "check_model", lambda name: None)
    path, out = tmp_path / "mine.jsonl", tmp_path / "out"
    path.write_text('{"question": "1?", "answer": "1", "other": "-1"}\n')
    words = ["m", "--data", str(path), "--engine", "transformers"]
    plain, other = (
        module.checked(module.parser().parse_args([*words, *own]))[0]
        for own in ([], ["--answer", "other"])
    )
    assert module.begun(out, plain) == [] == module.begun(out, plain)
    with pytest.raises(FolderError, match=r"\(answer=answer there, other here\)"):
        module.begun(out, other)


QWEN3_TEMPLATE = (  # the parts of Qwen3's chat_template that such a prompt reaches
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


@pytest.mark.parametrize(
    ("own", "thinks", "tokens"),
    [
        ([], True, 3072),
        (["--recipe", "qwen3-0.6b-gsm8k"], False, 1024),
        (["--recipe", "qwen3-0.6b-gsm8k", "--max-new-tokens", "7"], False, 7),
        (["--recipe", "qwen3-1.7b-math-thinking"], True, 8192),
    ],
)
def test_a_recipes_policy_is_asked_as_it_was_trained(
    tmp_path, monkeypatch, own: list[str], thinks: bool, tokens: int
) -> None:
    shutil.copytree(POLICY, tmp_path / "policy")
    (tmp_path / "policy" / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    asked: list[str] = []

    def answers(self, prompts: list[str], *_: Any) -> list[list[str]]:
        asked.extend(prompts)
        assert self.settings.max_new_tokens == tokens
        return [[""] for _ in prompts]

    monkeypatch.setattr(module.Transformers, "answers", answers)
    data, out = words(tmp_path, 1), str(tmp_path / "out")
    line = [str(tmp_path / "policy"), "--data", data, "--engine", "transformers", "--samples", "0"]
    assert main([*line, "--out", out, *own]) == 0
    # What the recipes without thinking train on with OpenRLHF.
    trained = load("qwen3-0.6b-gsm8k").openrlhf["data.input_template"]
    question = problems("test", 1, 0)[0]["question"] + INSTRUCTION
    expected = trained.replace("{}", question)
    assert asked == [expected.removesuffix("<think>\n\n</think>\n\n") if thinks else expected]


def test_a_recipe_that_is_not_there_is_said(tmp_path, capsys) -> None:
    assert main([*arguments(words(tmp_path, 2), tmp_path / "out"), "--recipe", "qwen4"]) == 2
    assert "no recipe 'qwen4'" in capsys.readouterr().err


def folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_a_model_trained_anew_in_its_place_is_another(tmp_path) -> None:
    model, out = folder(tmp_path / "policy"), tmp_path / "out"
    asked = module.parser().parse_args([str(model), "--data", words(tmp_path, 2)])
    first = module.checked(asked)[0]
    module.begun(out, first)
    assert module.checked(asked)[0] == first
    written = model.joinpath("model.safetensors").stat().st_mtime
    os.utime(model / "model.safetensors", (written + 1, written + 1))
    with pytest.raises(FolderError, match=r"model_files=2 of 9 bytes, .* there, 2 of 9 bytes, "):
        module.begun(out, module.checked(asked)[0])


def test_each_run_and_each_model_has_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "check_model", lambda name: None)
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    end = Path("checkpoints/global_step_9/actor/huggingface")
    models = {
        str(folder(tmp_path / "runs/a-1.5b/policy")): "a-1.5b_policy",
        str(folder(tmp_path / "runs/b" / end)): "b_checkpoints_global_step_9_actor_huggingface",
        "Qwen/Qwen2.5-Math-1.5B": "Qwen_Qwen2.5-Math-1.5B",
    }
    data = words(tmp_path, 2)
    for model, name in models.items():
        out = module.checked(module.parser().parse_args([model, "--data", data]))[2]
        assert out == tmp_path / "runs" / f"evaluate-{name}-words"


def test_a_model_and_a_folder_that_cannot_be_are_said(tmp_path, capsys) -> None:
    data, out = words(tmp_path, 2), tmp_path / "out"
    assert main([str(tmp_path / "nowhere"), *arguments(data, out)[1:]]) == 2
    assert re.search(r"MODEL=.*nowhere: no such folder", capsys.readouterr().err)
    out.mkdir()
    (out / "thesis.txt").touch()
    assert main(arguments(data, out)) == 2
    assert "not empty, and no evaluation" in capsys.readouterr().err


def test_rows_that_are_no_problems_are_named(tmp_path, capsys) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "", "answer": "3"}\n')
    assert main(arguments(str(path), tmp_path / "out")) == 2
    assert "1 rows are no problems, the first row 1: no question" in capsys.readouterr().err


def test_vllm_agrees_with_transformers(tmp_path) -> None:
    """Its real engine, on a CPU: the same greedy answers but for rounding, samples that vary."""
    pytest.importorskip("vllm", reason="vLLM comes with OpenRLHF's environment")
    data = words(tmp_path, 16)
    assert main(arguments(data, tmp_path / "ours", samples=0)) == 0
    own = arguments(data, tmp_path / "theirs", samples=4)
    done = subprocess.run(
        [sys.executable, "-m", "recipes.evaluate", *own, "--engine", "vllm"],
        cwd=ROOT,
        env={**os.environ, **cpu_shim.environment("openrlhf")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (files(tmp_path / out)[1] for out in ("ours", "theirs"))

    def texts(records: list[dict[str, Any]]) -> list[str]:
        # vLLM leaves out the token that ended an answer.
        return [r["greedy"]["text"].removesuffix("<|im_end|>") for r in records]

    same = [a == b for a, b in zip(texts(ours), texts(theirs), strict=True)]
    assert sum(same) >= 14, list(zip(texts(ours), texts(theirs), strict=True))
    assert any(len({sample["text"] for sample in row["samples"]}) > 1 for row in theirs)
    assert all(len(row["samples"]) == 4 for row in theirs)
