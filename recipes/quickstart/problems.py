"""Arithmetic in GSM8K's form: word problems of one or two steps, without end, and plain sums.

    {"question": "...", "answer": "23+14=37. 37-5=32.\n#### 32"}

A question's hash decides which split it belongs to, so no question is ever in both splits,
whatever the seeds and however many rows are drawn.

    python -m recipes.quickstart.problems --out DIR --train 2000 --test 200 --seed 0
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

Row = dict[str, str]

SPLITS = ("train", "test")
TEST_SHARE = 10  # one question in ten is held out

# fmt: off
NAMES = (
    "Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Eva", "Leo", "Zoe", "Dan", "Ivy", "Jack",
    "Rosa", "Omar", "Nina",
)
THINGS = (
    "apples", "books", "coins", "marbles", "pens", "cards", "shells", "stamps", "cookies",
    "stickers", "beads", "toys",
)
# fmt: on

# Sums of two-digit numbers: hard enough that a policy of 0.75 M parameters is right half the time.
FIRST_MAX = 60
OTHER_MAX = 40
# SmolLM2-135M-Instruct is right on a third of these, by its likeliest tokens.
SUM_MAX = 30


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: there are {', '.join(SPLITS)}")


def question_rank(question: str) -> int:
    """A number that looks random and depends on the question's text alone."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big")


def question_split(question: str) -> str:
    """The split that a question belongs to."""
    return "test" if question_rank(question) % TEST_SHARE == 0 else "train"


def _row(question: str, steps: list[str], result: int) -> Row:
    return {"question": question, "answer": f"{'. '.join(steps)}.\n#### {result}"}


def _together(rng: Random, name: str, other: str, things: str) -> Row:
    """Two people, one with more or fewer than the other: how many together?"""
    first = rng.randint(5, FIRST_MAX)
    op, word = rng.choice((("+", "more"), ("-", "fewer")))
    change = rng.randint(2, OTHER_MAX if op == "+" else first - 1)
    second = first + change if op == "+" else first - change
    question = (
        f"{name} has {first} {things}. {other} has {change} {word} {things} than {name}. "
        f"How many {things} do they have together?"
    )
    total = first + second
    return _row(question, [f"{first}{op}{change}={second}", f"{first}+{second}={total}"], total)


def _groups(rng: Random, name: str, other: str, things: str) -> Row:
    """So many containers of so many things, and some loose or given away."""
    count, each = rng.randint(2, 9), rng.randint(2, 12)
    held = count * each
    if rng.random() < 0.5:
        change = rng.randint(2, OTHER_MAX)
        result, step = held + change, f"{held}+{change}"
        question = (
            f"{name} has {count} boxes with {each} {things} in each box and {change} loose "
            f"{things}. How many {things} does {name} have?"
        )
    else:
        change = rng.randint(1, held - 1)
        result, step = held - change, f"{held}-{change}"
        question = (
            f"{name} fills {count} bags with {each} {things} each and then gives {change} "
            f"{things} to {other}. How many {things} are left?"
        )
    return _row(question, [f"{count}*{each}={held}", f"{step}={result}"], result)


def _changes(rng: Random, name: str, other: str, things: str) -> Row:
    """Somebody's things become more or fewer, once or twice."""
    held = rng.randint(5, FIRST_MAX)
    sentences, steps = [f"{name} has {held} {things}."], []
    for _ in range(rng.randint(1, 2)):
        ops = "++--*" if held <= OTHER_MAX else "+---"
        op = "+" if held < 3 else rng.choice(ops)
        if op == "+":
            change = rng.randint(2, OTHER_MAX)
            result = held + change
            events = (
                f"{name} buys {change} more.",
                f"{name} finds {change} more.",
                f"{other} gives {name} {change} more.",
            )
        elif op == "-":
            change = rng.randint(1, held - 1)
            result = held - change
            events = (
                f"{name} gives {change} to {other}.",
                f"{name} loses {change}.",
                f"{name} sells {change}.",
            )
        else:
            change = rng.randint(2, 4)
            result = held * change
            events = (f"Then the number of {things} becomes {change} times as large.",)
        sentences.append(rng.choice(events))
        steps.append(f"{held}{op}{change}={result}")
        held = result
    return _row(" ".join([*sentences, f"How many {things} does {name} have now?"]), steps, held)


def problem(rng: Random) -> Row:
    """One problem, from either split."""
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    kind = rng.choices((_changes, _together, _groups), weights=(70, 15, 15))[0]
    return kind(rng, name, other, things)


def problem_stream(split: str, seed: int) -> Iterator[Row]:
    """Problems of one split without end, each question once; the same for the same seed."""
    check_split(split)
    rng, seen = Random(f"{split}-{seed}"), set()
    while True:
        row = problem(rng)
        if question_split(row["question"]) == split and row["question"] not in seen:
            seen.add(row["question"])
            yield row


def problems(split: str, count: int, seed: int = 0) -> list[Row]:
    """The first `count` problems of a split."""
    return list(islice(problem_stream(split, seed), count))


def sums(split: str, count: int | None = None, seed: int = 0) -> list[Row]:
    """Sums of two numbers up to SUM_MAX; every one of the split's, or the first `count`."""
    check_split(split)
    numbers = range(1, SUM_MAX + 1)
    rows = [
        _row(f"What is {a} + {b}?", [f"{a}+{b}={a + b}"], a + b) for a in numbers for b in numbers
    ]
    own = [row for row in rows if question_split(row["question"]) == split]
    Random(f"{split}-{seed}").shuffle(own)
    return own[:count]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and test.jsonl.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for split, count in (("train", args.train), ("test", args.test)):
        path = args.out / f"{split}.jsonl"
        write_rows(path, problems(split, count, args.seed))
        print(f"{path}: {count} problems")


if __name__ == "__main__":
    main()
