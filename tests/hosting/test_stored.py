"""The file of the reference's own answers: what is read of it, what is drawn, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from klplug.hosting.settings import SettingsError
from klplug.hosting.stored import Stored, tokenizer_digest
from tests.stored import BAD, LENGTHS, rows, written


def test_a_file_is_read_and_so_is_any_part_of_its_lines(tmp_path: Path) -> None:
    made = rows()
    stored = Stored.read(str(written(tmp_path / "all.jsonl", made)))
    assert [own.answer for own in stored.answers] == [row["answer"] for row in made]
    assert [own.log_probs for own in stored.answers] == [row["log_probs"] for row in made]
    assert stored.temperature == 1.0 and stored.mean_length == sum(LENGTHS) / len(LENGTHS)
    part = Stored.read(str(written(tmp_path / "part.jsonl", made[3:])))
    assert part.answers == stored.answers[3:]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_a_bad_file_is_told_with_its_line(tmp_path: Path, change, words: str) -> None:
    made = rows()
    change(made)
    path = str(written(tmp_path / "bad.jsonl", made))
    with pytest.raises(SettingsError) as error:
        Stored.read(path)
    assert words in str(error.value) and f"klplug.source {path}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "line 1 is no JSON object"),
        (b"[1]\n", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=words):
        Stored.read(str(path))
    with pytest.raises(SettingsError, match=r"none.jsonl can't be read: No such file"):
        Stored.read(str(tmp_path / "none.jsonl"))


def test_a_draw_is_a_function_of_what_it_stands_beside(tmp_path: Path) -> None:
    stored = Stored.read(str(written(tmp_path / "all.jsonl", rows())))
    beside = torch.arange(12).view(3, 4)
    assert stored.drawn(beside, 50) == stored.drawn(beside.clone(), 50)
    assert stored.drawn(beside, 50) != stored.drawn(beside + 1, 50)


def test_each_answer_is_as_likely_as_any_other(tmp_path: Path) -> None:
    stored = Stored.read(str(written(tmp_path / "all.jsonl", rows())))
    drawn = [own for i in range(100) for own in stored.drawn(torch.tensor([i]), 60)]
    counts = [sum(own is one for own in drawn) for one in stored.answers]
    # Of 6000 draws: a mean of 1000, a standard deviation of 29.
    assert sum(counts) == 6000 and all(850 < count < 1150 for count in counts)


def test_the_digest_is_of_tokens_and_their_ids() -> None:
    ids = {"a": 0, "b": 1, "c": 2}
    assert tokenizer_digest(ids) == tokenizer_digest(dict(reversed(ids.items())))
    assert tokenizer_digest(ids) != tokenizer_digest({**ids, "b": 2, "c": 1})
    assert tokenizer_digest(ids) != tokenizer_digest({**ids, "d": 3})
