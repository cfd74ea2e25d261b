"""`python -m recipes.data`: each data set in its own schema, what is counted, what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="the recipes extra is not installed")
pytest.importorskip("math_verify", reason="the recipes extra is not installed")

from recipes import data
from recipes.data import EVALUATION, INSTRUCTION, TRAINING, any_form, in_box, main
from recipes.shared.reward import compute_score

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[3] / "shared" / "data"
TEST_OF = {"gsm8k": "gsm8k_test", "math": "math500", "openr1-math": "math500"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make(name: str, out: Path, *words: str, host: str = "openrlhf") -> int:
    """The named set from the fixtures."""
    train, test = FIXTURES / f"{name}_train.jsonl", FIXTURES / f"{TEST_OF[name]}.jsonl"
    files = ["--train", str(train), "--test", str(test)]
    return main([name, "--to", host, "--out", str(out), "--workers", "1", *files, *words])


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


ANSWERS = {
    "gsm8k": (["7", "1,200"], ["24", "18"]),
    "math": (
        [r"\frac{3}{2}", "9", r"(-\infty,-2)\cup(2,\infty)"],
        ["6", r"\left( 3, \frac{\pi}{2} \right)"],
    ),
    "openr1-math": ([r"\sqrt{3}", "B"], ["6", r"\left( 3, \frac{\pi}{2} \right)"]),
}


@pytest.mark.parametrize("name", TRAINING)
def test_openrlhfs_form(name: str, tmp_path) -> None:
    assert make(name, tmp_path / "out") == 0
    train, test = (rows(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "test"))
    assert ([r["answer"] for r in train], [r["answer"] for r in test]) == ANSWERS[name]
    for row in train + test:
        assert set(row) == {"prompt", "answer", "datasource"} and row["datasource"] == name
        assert row["prompt"].endswith(INSTRUCTION) and len(row["prompt"]) > len(INSTRUCTION)
        assert compute_score(name, rf"So \boxed{{{row['answer']}}}.", row["answer"]) == 1.0


@pytest.mark.parametrize("name", TRAINING)
def test_verls_form_has_the_same_problems(name: str, tmp_path) -> None:
    import pyarrow.parquet

    assert make(name, tmp_path / "ours") == make(name, tmp_path / "theirs", host="verl") == 0
    for split in ("train", "test"):
        ours = rows(tmp_path / "ours" / f"{split}.jsonl")
        path = tmp_path / "theirs" / f"{split}.parquet"
        theirs = pyarrow.parquet.read_table(path).to_pylist()
        for mine, row in zip(ours, theirs, strict=True):
            assert row["prompt"] == [{"role": "user", "content": mine["prompt"]}]
            assert row["reward_model"] == {"style": "rule", "ground_truth": mine["answer"]}
            assert row["data_source"] == name and row["extra_info"]["split"] == split


def test_what_is_left_out_is_counted_and_shown(tmp_path, capsys) -> None:
    make("gsm8k", tmp_path / "gsm8k")
    out = capsys.readouterr().out
    assert "train: 1 rows dropped whose question is in the test set" in out
    assert "train.jsonl: 2 rows, sha256 " in out and "'Mara bakes 12 rolls" in out
    digest = hashlib.sha256((tmp_path / "gsm8k" / "train.jsonl").read_bytes()).hexdigest()
    assert digest in out
    assert "What follows the last `####`" in out and repr(INSTRUCTION)[1:-1] in out
    make("openr1-math", tmp_path / "r1")
    out = capsys.readouterr().out
    assert "1 rows left out: answer that math-verify cannot parse, as ['\\\\sum_{i=1}" in out
    assert "1 rows left out: no answer found, as [\"'proof'\"]" in out
    made = json.loads((tmp_path / "r1" / "data.json").read_text())
    assert made["test_questions_dropped_from_train"] == 1
    assert made["files"]["train.jsonl"]["rows"] == 2


def test_a_test_question_that_cannot_be_graded_stays(tmp_path, capsys) -> None:
    test = tmp_path / "test.jsonl"
    hard = {"problem": "Evaluate the sum.", "answer": r"\sum_{i=1}^{10^{9}} i!"}
    test.write_text(
        "".join(json.dumps({**hard, "answer": a}) + "\n" for a in ("6", hard["answer"]))
    )
    words = ["--to", "verl", "--out", str(tmp_path / "out"), "--workers", "1"]
    files = ["--train", str(FIXTURES / "math_train.jsonl"), "--test", str(test)]
    assert main(["math", *words, *files]) == 0
    out = capsys.readouterr().out
    assert "test: 1 rows kept, and never right: answer that math-verify" in out
    assert "test.parquet: 2 rows" in out


def test_forms_of_an_answer() -> None:
    assert in_box(r"\boxed{a} then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert in_box(r"is $\boxed 9$.") == "9"
    assert in_box("none") == ""
    assert any_form("so\n#### 5") == "5"
    assert any_form(r"so \boxed{6}.") == "6"
    assert any_form(" 7 ") == "7"


# Own files


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


OWN = [{"problem": f"What is {i}+1?", "solution": rf"It is \boxed{{{i + 1}}}."} for i in range(40)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_of_ones_own(tmp_path, suffix: str) -> None:
    import datasets

    path = tmp_path / f"mine{suffix}"
    writer = {".jsonl": "to_json", ".csv": "to_csv", ".parquet": "to_parquet"}
    if suffix == ".json":
        path.write_text(json.dumps(OWN))
    else:
        getattr(datasets.Dataset.from_list(OWN), writer[suffix])(str(path))
    assert main([str(path), "--to", "openrlhf", "--out", str(tmp_path / "out")]) == 0
    train, test = (rows(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "test"))
    assert (len(train), len(test)) == (36, 4)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    for row in train + test:
        number = int(re.findall(r"\d+", row["prompt"])[0])
        assert row["answer"] == str(number + 1)


def test_a_files_columns_can_be_named(tmp_path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", [{"frage": f"{i}?", "n": i} for i in range(20)])
    words = ["--to", "openrlhf", "--out", str(tmp_path / "out"), "--question", "frage"]
    assert main([str(path), *words, "--answer", "n"]) == 0
    answers = {row["prompt"][0]: row["answer"] for row in rows(tmp_path / "out" / "train.jsonl")}
    assert all(answer.startswith(question) for question, answer in answers.items())


def test_another_column_is_another_data_set(tmp_path, capsys) -> None:
    made = [{"question": f"{i}?", "answer": str(i), "other": str(-i)} for i in range(20)]
    path = jsonl(tmp_path / "mine.jsonl", made)
    words = [str(path), "--to", "openrlhf", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(words) == 0
    assert main([*words, "--answer", "answer"]) == 0
    assert "already there" in capsys.readouterr().out
    assert main([*words, "--answer", "other"]) == 2
    assert "(answer=answer there, other here)" in capsys.readouterr().err


BAD = [
    ([{"question": "q?", "result": "1"}], "no column 'answer'; there are question, result"),
    ([{"text": "q?"}], "no column 'question', 'answer'; there are text"),
    ([], "empty, not one row"),
    ("{not json}\n", "cannot be read"),
    ([{"question": "q?", "answer": ""}], "no row is left for train. 1 with no answer found"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_a_file_that_is_no_data_is_refused(tmp_path, capsys, content, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content) if isinstance(content, str) else jsonl(path, content)
    words = ["--to", "verl", "--out", str(tmp_path / "out"), "--workers", "1"]
    test = ["--test", str(FIXTURES / "gsm8k_test.jsonl")]
    assert main([str(path), *words, *test]) == 2
    error = capsys.readouterr().err
    assert "mine" in error and message in error


WORDS = [
    (["gsm9k"], r"no data set 'gsm9k'\. Did you mean gsm8k\?"),
    (["./nowhere.jsonl"], r"nowhere\.jsonl: no such file"),
    (["notes.txt"], r"no data set 'notes\.txt'\. There are gsm8k, math, openr1-math"),
    (["gsm8k", "--answer", "solution"], "gsm8k has columns of its own"),
    (["math", "--train", "a.txt"], r"a\.txt: no such file"),
]


@pytest.mark.parametrize(("words", "message"), WORDS)
def test_what_is_not_there_is_named(tmp_path, capsys, words, message: str) -> None:
    assert main([*words, "--to", "verl", "--out", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_set_in_anothers_schema_is_refused(tmp_path, capsys) -> None:
    files = [
        "--train",
        str(FIXTURES / "math_train.jsonl"),
        "--test",
        str(FIXTURES / "math500.jsonl"),
    ]
    assert main(["gsm8k", "--to", "verl", "--out", str(tmp_path / "out"), *files]) == 2
    error = capsys.readouterr().err
    assert "no column 'question', 'answer'; there are problem, level, type, solution" in error


# The hub


def test_the_hubs_sets_are_asked_for_by_name(tmp_path, monkeypatch, capsys) -> None:
    import datasets

    asked = []

    def load_dataset(hub: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((hub, name, split))
        file = "math500" if "MATH-500" in hub else "math_train"
        return datasets.Dataset.from_list(rows(FIXTURES / f"{file}.jsonl"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert main(["math", "--to", "openrlhf", "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    subjects = [name for hub, name, _ in asked if hub == "EleutherAI/hendrycks_math"]
    assert len(subjects) == len(set(subjects)) == 7 and "precalculus" in subjects
    assert asked[-1] == ("HuggingFaceH4/MATH-500", None, "test")
    assert len(rows(tmp_path / "out" / "train.jsonl")) == 21

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert main(["openr1-math", "--to", "verl", "--out", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "open-r1/OpenR1-Math-220k cannot be had from the hub: no route." in error
    assert "A local copy does too: --train FILE ... (.jsonl, .json, .parquet, .csv)" in error


def test_a_gathered_set_loses_the_questions_of_every_benchmark(
    tmp_path, monkeypatch, capsys
) -> None:
    import datasets

    files = {"math500": "math500", "gsm8k": "gsm8k_test", "aime24": "aime24", "amc23": "amc23"}
    sets = {EVALUATION[name].hub: FIXTURES / f"{file}.jsonl" for name, file in files.items()}
    own = rows(FIXTURES / "openr1-math_train.jsonl")
    taken = [
        ("Find the three-digit number $n$ with $n = 2\\cdot 102$.", "204"),
        ("find n with $n=5\\cdot 5$.", "25"),
        ("At what hour do they meet?", "27"),
        ("At what hour do they sleep?", "23"),  # in none
    ]
    gathered = own + [{**own[0], "problem": question, "answer": n} for question, n in taken]

    def load_dataset(hub: str, name: str | None, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list(gathered if "OpenR1" in hub else rows(sets[hub]))

    words = ["openr1-math", "--to", "openrlhf", "--out", str(tmp_path / "out"), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        assert main(words) == 0
        told = capsys.readouterr().out
        assert main(words) == 0 and "is in amc23" in capsys.readouterr().out
    for name, count in {"the test set": 1, "gsm8k": 0, "aime24": 2, "amc23": 1}.items():
        assert f"train: {count} rows dropped whose question is in {name}\n" in told
    left = rows(tmp_path / "out" / "train.jsonl")
    assert [row["answer"] for row in left] == [*ANSWERS["openr1-math"][0], "23"]

    assert make("openr1-math", tmp_path / "local") == 0
    assert "local files, so no benchmark was looked at" in capsys.readouterr().out
    assert make("math", tmp_path / "math") == 0
    assert "local files" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["aime24", "amc23"])
def test_benchmarks_in_their_own_schema(name: str) -> None:
    table = data.source_table(EVALUATION[name], [FIXTURES / f"{name}.jsonl"], "--file")
    found = [data.prepared(r[table.question], r[table.answer], table.form) for r in table.rows]
    assert [problem.answer for problem in found] == {
        "aime24": ["204", "025"],
        "amc23": ["27", "36"],
    }[name]
    assert compute_score(name, r"\boxed{25}", "025") == 1.0


# The folder


def test_an_interrupted_call_goes_on_where_it_was(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data, "PART_ROWS", 10)
    path = jsonl(tmp_path / "mine.jsonl", OWN)
    words = [str(path), "--to", "openrlhf", "--out", str(tmp_path / "out"), "--workers", "1"]
    judged: list[str] = []

    def is_gradable(answer: str) -> bool:
        judged.append(answer)
        if len(judged) == 25:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(data, "is_gradable", is_gradable)
    assert main(words) == 130
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert main(words) == 0
    assert len(judged) == 25 + 20, "the first two parts of ten rows were there"
    whole = (tmp_path / "out" / "train.jsonl").read_bytes()
    assert not (tmp_path / "out" / data.PARTS).exists()
    assert main([*words[:-4], "--out", str(tmp_path / "new"), "--workers", "2"]) == 0
    assert (tmp_path / "new" / "train.jsonl").read_bytes() == whole


def test_a_finished_folder_is_left_alone_and_a_torn_one_made_again(tmp_path, capsys) -> None:
    assert make("gsm8k", tmp_path / "out") == 0
    made = (tmp_path / "out" / "train.jsonl").read_bytes()
    assert make("gsm8k", tmp_path / "out") == 0
    assert "already there, whole and unchanged" in capsys.readouterr().out
    (tmp_path / "out" / "train.jsonl").write_bytes(made[:-40])
    assert make("gsm8k", tmp_path / "out") == 0
    assert "already there" not in capsys.readouterr().out
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == made


def test_anothers_folder_is_refused(tmp_path, capsys) -> None:
    make("gsm8k", tmp_path / "out")
    assert make("gsm8k", tmp_path / "out", host="verl") == 2
    assert "holds another prepared data set (to=openrlhf there" in capsys.readouterr().err
    assert make("math", tmp_path / "out") == 2
    assert "data=gsm8k there, math here" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.json").write_text("[1]")
    assert make("gsm8k", tmp_path / "mine") == 2
    assert "no prepared data set" in capsys.readouterr().err


# The real rows


def test_real_gsm8k(tmp_path, capsys) -> None:
    if not SHARED.is_dir():
        pytest.skip("no local copy of GSM8K beside the repository")
    files = [
        "--train",
        str(SHARED / "gsm8k_train.jsonl"),
        "--test",
        str(SHARED / "gsm8k_test.jsonl"),
    ]
    words = ["gsm8k", "--to", "openrlhf", "--out", str(tmp_path / "out"), "--workers", "1", *files]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "train.jsonl: 7473 rows" in out and "test.jsonl: 1319 rows" in out
    assert "left out" not in out and "0 rows dropped" in out


def test_real_math_500(tmp_path, capsys) -> None:
    if not SHARED.is_dir():
        pytest.skip("no local copy of MATH-500 beside the repository")
    files = ["--train", str(FIXTURES / "math_train.jsonl"), "--test", str(SHARED / "math500.json")]
    words = ["math", "--to", "verl", "--out", str(tmp_path / "out"), "--workers", "1", *files]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "test.parquet: 500 rows" in out and "never right" not in out


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        *((1234567, "1234567"), (1e6, "1000000"), (0.12345678, "0.12345678"), (-3.0, "-3")),
        (0.10000000149011612, "0.1"),  # a column of float32
    ],
)
def test_a_number_keeps_its_digits(answer: float, told: str) -> None:
    found = data.prepared("How many?", answer, any_form)
    assert found == data.Problem("How many?", told)
    assert compute_score("", rf"So \boxed{{{told}}}.", found.answer) == 1.0
