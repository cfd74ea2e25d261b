"""The tool that draws the reference's own answers: against the model, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="no transformers here: it comes with a host")
pytest.importorskip("math_verify", reason="the recipes extra is not installed")

from klplug.hosting.stored import Stored, tokenizer_digest
from recipes.quickstart.evaluate import chat_prompt, load
from recipes.reference_answers import main

POLICY = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "policy"
QUESTIONS = ("Add 2 and 3.", "A longer question: what are 4 and 5 together?")


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    rows = ({"question": text, "answer": "#### 5"} for text in QUESTIONS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_the_file_has_the_models_answers_and_their_log_probs(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, temperature = tmp_path / "own" / "answers.jsonl", 0.7
    words = [str(POLICY), "--data", str(problems), "--out", str(out), "--samples", "3"]
    words += ["--temperature", str(temperature), "--max-new-tokens", "12", "--batch-size", "4"]
    assert main(words) == 0
    assert f"{out}: 6 answers of " in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]

    stored = Stored.read(str(out))
    model, tokenizer = load(POLICY)
    assert stored.temperature == temperature
    assert stored.tokenizer == tokenizer_digest(tokenizer.get_vocab())
    prompts = sorted(chat_prompt(tokenizer, question) for question in QUESTIONS for _ in range(3))
    assert sorted(tokenizer.decode(own.prompt) for own in stored.answers) == prompts
    assert len({tuple(own.answer) for own in stored.answers}) > 2  # sampled, and not greedy
    for own in stored.answers:
        ids = torch.tensor([[*own.prompt, *own.answer]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(own.prompt) - 1 : -1].double()
        expected = (logits / temperature).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(own.answer)[:, None])[:, 0]
        assert own.log_probs == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_chat_template_is_told_what_the_recipe_tells_it(problems: Path, tmp_path: Path) -> None:
    shutil.copytree(POLICY, tmp_path / "policy")
    (tmp_path / "policy" / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{% if enable_thinking is false %}<|im_start|>{% endif %}"
    )
    words = [str(tmp_path / "policy"), "--data", str(problems), "--max-new-tokens", "2"]
    out = tmp_path / "answers.jsonl"
    assert main([*words, "--recipe", "qwen3-0.6b-gsm8k", "--out", str(out)]) == 0
    tokenizer = load(POLICY)[1]
    prompts = [tokenizer.decode(own.prompt) for own in Stored.read(str(out)).answers]
    assert set(prompts) == {f"{question}<|im_start|>" for question in QUESTIONS}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--top-p", "0.9"), "--top-p 0.9: a cut distribution is not the reference's"),
        (("--top-k", "50"), "--top-k 50: a cut distribution is not the reference's"),
        (("--temperature", "0"), "--temperature 0: above 0"),
        (("--samples", "0"), "--samples 0: at least 1"),
        (("--data", "nothing"), "--data nothing: there are gsm8k, math, openr1-math, or a file"),
        (("--data", "gsm8k", "--question", "q"), "--question and --answer are for a FILE, not for"),
        (("--file", "train.jsonl"), "--file is for gsm8k, math, openr1-math; "),
    ],
)
def test_what_cannot_be_is_refused(
    words: tuple[str, ...],
    told: str,
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "answers.jsonl"
    assert main([str(POLICY), "--data", str(problems), "--out", str(out), *words]) == 2
    assert told in capsys.readouterr().err and not out.exists()


def test_a_file_that_is_there_is_left_as_it_is(
    problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = problems.read_bytes()
    assert main([str(POLICY), "--data", str(problems), "--out", str(problems)]) == 2
    assert "there is such a file already" in capsys.readouterr().err
    assert problems.read_bytes() == before
