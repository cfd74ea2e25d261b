"""Where the problems come from, and what is refused before anything starts."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from recipes.quickstart.data import load_problems, prompt_file
from recipes.quickstart.problems import problems

SHARED = Path(__file__).parents[3] / "shared" / "data"
ROWS = [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(40)]


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_words() -> None:
    assert len(load_problems("words", "train")) == 2000
    assert load_problems("words", "test") == problems("test", 200, 0)
    assert load_problems("words", "test", count=5, seed=2) == problems("test", 5, 2)


def test_a_file_holds_out_a_tenth_of_its_questions(tmp_path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", [*ROWS, ROWS[0]])
    train, test = load_problems(path, "train"), load_problems(str(path), "test")
    train_questions = {row["question"] for row in train}
    test_questions = {row["question"] for row in test}
    assert len(train) + len(test) == 41 and len(test_questions) == 4
    assert not train_questions & test_questions
    assert load_problems(path, "train", count=3) == train[:3]


@pytest.mark.parametrize("pattern", ["{}.jsonl", "gsm8k_{}.jsonl"])
def test_a_folder_has_a_file_for_each_split(tmp_path, pattern: str) -> None:
    jsonl(tmp_path / pattern.format("train"), ROWS[:30])
    jsonl(tmp_path / pattern.format("test"), ROWS[30:])
    assert load_problems("gsm8k", "train", gsm8k_path=tmp_path) == ROWS[:30]
    assert load_problems("gsm8k", "test", gsm8k_path=tmp_path) == ROWS[30:]
    assert load_problems(tmp_path, "test") == ROWS[30:]


def test_other_columns_and_line_separators_within_text_are_no_trouble(tmp_path) -> None:
    row = {"question": "One\u2028two?", "answer": "#### 2", "id": 7}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", "utf-8")
    assert load_problems(tmp_path, "train") == [{"question": "One\u2028two?", "answer": "#### 2"}]


def test_prompt_file_is_what_the_host_reads(tmp_path) -> None:
    path = prompt_file(tmp_path / "new" / "train.jsonl", "words", "train", count=20, seed=3)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows == problems("train", 20, 3)


def test_prompt_file_through_the_datasets_library(tmp_path) -> None:
    datasets = pytest.importorskip("datasets", reason="the recipes extra is not installed")
    path = prompt_file(tmp_path / "train.jsonl", "words", "train", count=20)
    loaded = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].to_list() == problems("train", 20)


def test_gsm8k_itself() -> None:
    if not SHARED.is_dir():
        pytest.skip("no local copy of GSM8K beside the repository")
    assert len(load_problems("gsm8k", "train", gsm8k_path=SHARED)) == 7473
    assert len(load_problems("gsm8k", "test", gsm8k_path=SHARED)) == 1319
    assert len(load_problems("gsm8k", "test", gsm8k_path=SHARED / "gsm8k_train.jsonl")) == 747


def test_gsm8k_comes_from_the_hub_or_says_what_else_to_do(monkeypatch) -> None:
    hub = ModuleType("datasets")
    asked = []
    hub.load_dataset = lambda *args, **kwargs: asked.append((args, kwargs)) or ROWS
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert load_problems("gsm8k", "test") == ROWS
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    hub.load_dataset = unreachable
    with pytest.raises(FileNotFoundError, match=r"GSM8K=path.*no route"):
        load_problems("gsm8k", "test")


BAD_ROWS = [
    ({"question": "q?"}, "line 2: no column 'answer'; there are question"),
    ({"prompt": "q?", "answer": "#### 1"}, "no column 'question'; there are prompt, answer"),
    ({"question": "q?", "answer": 1}, "'answer' must be text, not 1"),
    ({"question": " ", "answer": "#### 1"}, "'question' must be text"),
    ({"question": "q?", "answer": "one"}, "must end in '#### N': 'one'"),
    ({"question": "q?", "answer": "one\n#### "}, "must end in '#### N'"),
    (["q?", "#### 1"], "a JSON object is needed, not list"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_row_not_in_the_form_is_refused(tmp_path, row: object, message: str) -> None:
    path = jsonl(tmp_path / "mine.jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2") as caught:
        load_problems(path, "train")
    assert message in str(caught.value)


def test_a_file_that_is_no_data_is_refused(tmp_path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("{not json}\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        load_problems(path, "train")
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"mine.jsonl: empty"):
        load_problems(path, "train")
    jsonl(path, ROWS[:1])
    with pytest.raises(ValueError, match="cannot be split"):
        load_problems(path, "train")


def test_what_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl: no such file"):
        load_problems(tmp_path / "nothing.jsonl", "train")
    with pytest.raises(FileNotFoundError, match="wrods: no such file or folder"):
        load_problems("wrods", "train")
    jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(FileNotFoundError, match=r"neither test.jsonl .* but train.jsonl"):
        load_problems(tmp_path, "test")


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        load_problems("words", "dev")
    with pytest.raises(ValueError, match="at least 1"):
        load_problems("words", "train", count=0)
