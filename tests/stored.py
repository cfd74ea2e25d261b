"""Files of answers that a reference gave, as the tool writes them, and with something wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from klplug.hosting.stored import tokenizer_digest

LENGTHS = (4, 6, 3, 5, 7, 2)


def policys_digest() -> str:
    """Of the committed policy's tokenizer."""
    from transformers import AutoTokenizer

    from tests.references import POLICY

    return tokenizer_digest(AutoTokenizer.from_pretrained(POLICY).get_vocab())


def rows(digest: str = "", *, vocabulary: int = 60, count: int = 6) -> list[dict[str, Any]]:
    """Prompts of three to five tokens, answers of two to seven."""
    draw = torch.Generator().manual_seed(7)

    def ids(n: int) -> list[int]:
        return torch.randint(5, vocabulary, (n,), generator=draw).tolist()

    return [
        {
            "prompt": ids(3 + i % 3),
            "answer": ids(LENGTHS[i % len(LENGTHS)]),
            "log_probs": (
                -4 * torch.rand(LENGTHS[i % len(LENGTHS)], generator=draw, dtype=torch.float64)
            ).tolist(),
            "temperature": 1.0,
            "tokenizer": digest,
        }
        for i in range(count)
    ]


def written(path: Path, made: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return path


def drawn(folder: Path) -> Path:
    """Answers of the committed policy to the quickstart's problems, by the tool itself."""
    from recipes.quickstart.data import load_problems
    from recipes.reference_answers import main
    from tests.references import POLICY

    problems, path = folder / "questions.jsonl", folder / "own_answers.jsonl"
    written(problems, load_problems("words", "train", count=96))
    words = [str(POLICY), "--data", str(problems), "--out", str(path), "--samples", "4"]
    assert main([*words, "--max-new-tokens", "48"]) == 0
    return path


def changed(**values: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(made: list[dict[str, Any]]) -> None:
        made[1].update(values)

    return change


def without(key: str) -> Callable[[list[dict[str, Any]]], None]:
    return lambda made: made[1].pop(key)


def emptied(made: list[dict[str, Any]]) -> None:
    made.clear()


BAD: list[tuple[Callable[[list[dict[str, Any]]], None], str]] = [
    (emptied, "has no answers"),
    (without("log_probs"), "line 2 has no 'log_probs'. It needs prompt, answer, log_probs"),
    (without("tokenizer"), "line 2 has no 'tokenizer'"),
    (changed(log_probs=[-1.0]), "has 6 tokens of an answer and 1 log_probs"),
    (changed(log_probs=[-1.0] * 5 + [None]), "must be a list of finite numbers"),
    (changed(log_probs=[-1.0] * 5 + [0.5]), "a log-prob of 0.5 is above 0"),
    (changed(log_probs=[-1.0] * 5 + [-(10**400)]), "must be a list of finite numbers"),
    (changed(log_probs="all"), "must be a list of finite numbers"),
    (changed(answer=[], log_probs=[]), "'answer' must be a list of one token id or more"),
    (changed(prompt=["a"]), "'prompt' must be a list of one token id or more"),
    (changed(prompt=[-1]), "'prompt' must be a list"),
    (changed(temperature=0), "'temperature' must be a number above 0, got 0"),
    (changed(temperature=10**400), "'temperature' must be a number above 0, got 1000"),
    (changed(temperature=True), "'temperature' must be a number above 0, got True"),
    (changed(temperature=0.7), "answers of 2 temperatures (0.7, 1.0)"),
    (changed(tokenizer="other"), "answers of 2 tokenizers"),
    (changed(tokenizer=3), "'tokenizer' must be a string, got 3"),
]
