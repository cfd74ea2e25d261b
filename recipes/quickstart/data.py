"""Problems as the hosts read them: JSON lines in GSM8K's form, checked before anything starts.

    {"question": "...", "answer": "reasoning\n#### N"}

A source is `words` or `sums` (made by problems.py), `gsm8k` (openai/gsm8k, or a local copy of
it), or the path of a file or folder in that form.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recipes.quickstart.problems import (
    TEST_SHARE,
    Row,
    check_split,
    problems,
    question_rank,
    sums,
    write_rows,
)

COLUMNS = ("question", "answer")
WORDS_COUNT = {"train": 2000, "test": 200}
# Made, not read: as many as are asked for, in an order that the seed chooses.
MADE = ("words", "sums")
# In a folder, the first of these that is there is a split's file.
FILE_NAMES = ("{split}.jsonl", "gsm8k_{split}.jsonl")


def load_problems(
    source: str | os.PathLike[str],
    split: str,
    *,
    gsm8k_path: str | os.PathLike[str] | None = None,
    count: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """The problems of a split, each a dict of `question` and `answer`.

    A single file has no splits: a tenth of its questions (at least one) is held out as `test`,
    chosen by their text. A folder holds `train.jsonl` and `test.jsonl`, or `gsm8k_train.jsonl` ...

    Args:
        source: `words`, `sums`, `gsm8k`, or the path of a .jsonl file or of a folder.
        split: `train` or `test`.
        gsm8k_path: A local copy of GSM8K, file or folder, instead of the hub's; for `gsm8k` only.
        count: The first so many rows; None for all (2000 and 200 of `words`).
        seed: Of `words` and `sums`.

    Raises:
        FileNotFoundError: The source is not there, or cannot be had from the hub.
        ValueError: An unknown split, an empty file, or a row that is not in the form.
    """
    check_split(split)
    if count is not None and count < 1:
        raise ValueError(f"count is {count}: it must be at least 1")
    if source == "words":
        return problems(split, WORDS_COUNT[split] if count is None else count, seed)
    if source == "sums":
        return sums(split, count, seed)
    if source == "gsm8k":
        rows = _hub_rows(split) if gsm8k_path is None else _local_rows(Path(gsm8k_path), split)
    else:
        rows = _local_rows(Path(source), split)
    return rows[:count]


def prompt_file(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    split: str,
    *,
    gsm8k_path: str | os.PathLike[str] | None = None,
    count: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a split as JSON lines for `--data.input_key question --data.label_key answer`."""
    rows = load_problems(source, split, gsm8k_path=gsm8k_path, count=count, seed=seed)
    write_rows(Path(path), rows)
    return Path(path)


def _hub_rows(split: str) -> list[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset("openai/gsm8k", "main", split=split)
    except Exception as error:  # the hub's clients raise of many kinds
        raise FileNotFoundError(
            "openai/gsm8k cannot be had from the hub. Give a local copy with GSM8K=path (a folder "
            f"with train.jsonl and test.jsonl, or one .jsonl file). {error}"
        ) from error
    places = (f"openai/gsm8k {split}, row {i}" for i in range(len(rows)))
    return _checked(zip(places, rows, strict=True), "openai/gsm8k")


def _local_rows(path: Path, split: str) -> list[Row]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder (and no source of that name)")
    if path.is_file():
        return share(file_rows(path), split, path)
    names = [name.format(split=split) for name in FILE_NAMES]
    for name in names:
        if (path / name).is_file():
            return file_rows(path / name)
    present = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
    raise FileNotFoundError(f"{path}: has neither {' nor '.join(names)}, but {present}")


def file_rows(path: Path) -> list[Row]:
    """Every row of a .jsonl file, checked."""

    def parsed() -> Iterable[tuple[str, Any]]:
        for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error

    return _checked(parsed(), path)


def _checked(rows: Iterable[tuple[str, Any]], name: object) -> list[Row]:
    """Each row's two columns; an error that says where and what for any that is not right."""
    kept = []
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: a JSON object is needed, not {type(row).__name__}")
        for column in COLUMNS:
            if column not in row:
                raise ValueError(f"{place}: no column {column!r}; there are {', '.join(row)}")
            if not isinstance(row[column], str) or not row[column].strip():
                raise ValueError(f"{place}: {column!r} must be text, not {row[column]!r}")
        if not re.search(r"####\s*\S[^#]*$", row["answer"]):
            raise ValueError(f"{place}: the answer must end in '#### N': {row['answer'][-80:]!r}")
        kept.append({column: row[column] for column in COLUMNS})
    if not kept:
        raise ValueError(f"{name}: empty, not one problem")
    return kept


def share(rows: list[Row], split: str, path: Path) -> list[Row]:
    """A split's share of a file's rows; rows with the same question stay together."""
    questions = sorted({row["question"] for row in rows}, key=question_rank)
    if len(questions) < 2:
        raise ValueError(f"{path}: one question cannot be split into train and test")
    held_out = set(questions[: max(1, len(questions) // TEST_SHARE)])
    return [row for row in rows if (row["question"] in held_out) == (split == "test")]
