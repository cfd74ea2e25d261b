"""The word problems: true arithmetic, disjoint splits, the same for the same seed."""

import json
import re
from itertools import islice

import pytest

from recipes.quickstart.problems import (
    SPLITS,
    SUM_MAX,
    main,
    problem_stream,
    problems,
    question_split,
    sums,
)

STEP = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@pytest.mark.parametrize("split", SPLITS)
def test_every_step_is_true_and_the_last_one_is_the_answer(split: str) -> None:
    for row in problems(split, 2000, seed=3):
        reasoning, final = row["answer"].split("\n#### ")
        steps = [step.rstrip(".") for step in reasoning.split(". ")]
        assert len(steps) in (1, 2)
        for step in steps:
            match = STEP.fullmatch(step)
            assert match, row
            left, op, right, result = match.groups()
            assert OPERATIONS[op](int(left), int(right)) == int(result), row
        assert result == final and int(final) >= 0


def test_the_steps_use_the_numbers_of_the_question() -> None:
    for row in problems("train", 2000, seed=4):
        asked = set(re.findall(r"\d+", row["question"]))
        made = {step[3] for step in STEP.findall(row["answer"])}
        used = {number for step in STEP.findall(row["answer"]) for number in (step[0], step[2])}
        assert asked <= used <= asked | made, row


def test_the_words_mean_the_operation() -> None:
    words = {
        "+": "more|loose|buys|finds|together",
        "-": "fewer|loses|sells|gives",
        "*": "times|each",
    }
    for row in problems("train", 1000, seed=5):
        for op, pattern in words.items():
            if op in row["answer"]:
                assert re.search(pattern, row["question"]), row


def test_one_known_problem() -> None:
    assert problems("train", 1, seed=0) == [
        {
            "question": "Jack fills 6 bags with 6 stickers each and then gives 28 stickers to Mia. "
            "How many stickers are left?",
            "answer": "6*6=36. 36-28=8.\n#### 8",
        }
    ]


def test_splits_share_no_question_even_across_seeds() -> None:
    train = {row["question"] for seed in range(3) for row in problems("train", 3000, seed)}
    test = {row["question"] for seed in range(3) for row in problems("test", 1000, seed)}
    assert len(train) > 8000 and len(test) > 2500
    assert not train & test
    assert {question_split(question) for question in test} == {"test"}


def test_a_split_has_each_question_once() -> None:
    questions = [row["question"] for row in problems("test", 2000)]
    assert len(set(questions)) == len(questions)


def test_seeds_decide_and_longer_draws_begin_alike() -> None:
    assert problems("train", 50, seed=1) == problems("train", 80, seed=1)[:50]
    assert problems("train", 50, seed=1) == list(islice(problem_stream("train", 1), 50))
    assert problems("train", 50, seed=1) != problems("train", 50, seed=2)


def test_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'dev'.*train, test"):
        problems("dev", 1)


def test_the_command_writes_both_files(tmp_path) -> None:
    main(["--out", str(tmp_path / "new"), "--train", "7", "--test", "3", "--seed", "9"])
    for split, count in (("train", 7), ("test", 3)):
        lines = (tmp_path / "new" / f"{split}.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == problems(split, count, 9)


def test_sums_are_every_pair_once_and_true() -> None:
    splits = {split: sums(split) for split in SPLITS}
    asked = [row["question"] for rows in splits.values() for row in rows]
    assert len(asked) == len(set(asked)) == SUM_MAX**2
    assert len(splits["test"]) >= 64  # as many as the quickstart's evaluation takes
    for row in [row for rows in splits.values() for row in rows]:
        left, right = map(int, re.findall(r"\d+", row["question"]))
        assert row["answer"] == f"{left}+{right}={left + right}.\n#### {left + right}"


def test_a_seed_orders_the_sums() -> None:
    first, again, other = (
        sums("train", 20, seed=1),
        sums("train", 20, seed=1),
        sums("train", seed=2),
    )
    assert first == again != other[:20]
    assert all(row in other for row in first)
