"""Math problems as the hosts read them: `python -m recipes.data gsm8k --to verl --out DIR`.

    prompt = question + INSTRUCTION, one user message of the model's own chat template
    answer = what follows the last `####`, or the content of the last `\\boxed{}`, or the column
             itself: each data set has its own form, printed with the rows

An answer that math-verify does not find equal to itself can never earn a reward: such rows are
counted, shown, and left out of the training file (never of the test file). Questions of the test
set that are also in the training set are counted and dropped from the latter. OpenR1-Math loses
those of all sets of `recipes.evaluate`.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from recipes.quickstart.data import share
from recipes.recipe import HOSTS
from recipes.shared.folder import FolderError, held, keep, other
from recipes.shared.reward import is_gradable, last_boxed

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
RECORD = "data.json"
PARTS = ".parts"
PART_ROWS = 2000  # what an interruption may cost
SHOWN = 3
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
QUESTIONS = ("question", "problem", "prompt")
ANSWERS = ("answer", "solution")
NO_ANSWER = ("proof", "notfound", "not found", "null", "none")  # OpenR1-Math's words for it
WORKERS = min(8, os.cpu_count() or 1)


class DataError(ValueError):
    """The data cannot be had, or is not what it should be; the message is all one needs."""


class Problem(NamedTuple):
    question: str
    answer: str


class LeftOut(NamedTuple):
    """A row that becomes no problem, and why."""

    reason: str
    shown: str


def after_hashes(text: str) -> str:
    """What follows the last `####`."""
    return text.rpartition("####")[2].strip() if "####" in text else ""


def in_box(text: str) -> str:
    r"""The content of the last `\boxed{}`; some solutions of MATH have `\boxed 9`."""
    if boxed := last_boxed(text):
        return boxed.removeprefix(r"\boxed{").removesuffix("}").strip()
    found = re.findall(r"\\boxed\s+([^\s$.]+)", text)
    return found[-1] if found else ""


def whole(text: str) -> str:
    """The column itself."""
    return text.strip()


def any_form(text: str) -> str:
    r"""What follows the last `####`, else the last `\boxed{}`, else the column itself."""
    return after_hashes(text) or in_box(text) or whole(text)


@dataclass(frozen=True)
class Source:
    """A split of a public data set, and where in its rows question and answer are."""

    hub: str
    split: str
    question: str
    answer: str
    form: Callable[[str], str]
    configs: tuple[str | None, ...] = (None,)


MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
GSM8K = Source("openai/gsm8k", "train", "question", "answer", after_hashes, ("main",))
GSM8K_TEST = Source("openai/gsm8k", "test", "question", "answer", after_hashes, ("main",))
MATH = Source("EleutherAI/hendrycks_math", "train", "problem", "solution", in_box, MATH_SUBJECTS)
MATH_500 = Source("HuggingFaceH4/MATH-500", "test", "problem", "answer", whole)
OPENR1 = Source("open-r1/OpenR1-Math-220k", "train", "problem", "answer", whole, ("default",))
AIME_24 = Source("HuggingFaceH4/aime_2024", "train", "problem", "answer", whole)
AMC_23 = Source("math-ai/amc23", "test", "question", "answer", whole)

TRAINING = {
    "gsm8k": (GSM8K, GSM8K_TEST),
    "math": (MATH, MATH_500),
    "openr1-math": (OPENR1, MATH_500),
}
EVALUATION = {"math500": MATH_500, "gsm8k": GSM8K_TEST, "aime24": AIME_24, "amc23": AMC_23}
GATHERED = ("openr1-math",)  # from many places, so any benchmark may be in it


@dataclass(frozen=True)
class Table:
    """Rows to be read, with the columns that matter."""

    name: str
    rows: Any
    """A `datasets.Dataset`."""
    question: str
    answer: str
    form: Callable[[str], str]
    fingerprint: str
    """Of the hub's data set or the files: other rows, other fingerprint."""

    @property
    def extraction(self) -> str:
        return f"column {self.answer!r}: {self.form.__doc__}"


# Reading


def hub_table(source: Source, option: str) -> Table:
    """A split from the hub, through the datasets library, which caches what it downloads.

    Raises:
        DataError: The hub cannot be reached, or has no such data set.
    """
    from datasets import concatenate_datasets, load_dataset

    try:
        parts = [load_dataset(source.hub, name, split=source.split) for name in source.configs]
    except Exception as error:  # the hub's clients raise of many kinds
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{source.hub} cannot be had from the hub: {reason}. A local copy does too: "
            f"{option} FILE ... ({', '.join(READERS)})"
        ) from error
    rows = concatenate_datasets(parts)
    return table(source.hub, rows, source.question, source.answer, source.form, source.hub)


def file_table(
    paths: list[Path],
    question: str | None = None,
    answer: str | None = None,
    form: Callable[[str], str] = any_form,
) -> Table:
    """The rows of local files.

    Args:
        paths: Files of one kind.
        question: Its column; None: the first there is of question, problem, prompt.
        answer: Its column; None: the first there is of answer, solution.
        form: How the answer stands in its column.

    Raises:
        DataError: No such file, another kind of file, no rows, or no such column.
    """
    from datasets import load_dataset

    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    kinds = {path.suffix for path in paths}
    if len(kinds) > 1 or not kinds <= set(READERS):
        raise DataError(
            f"{', '.join(map(str, paths))}: files of one kind are read, of {', '.join(READERS)}"
        )
    name = ", ".join(map(str, paths))
    if not any(path.read_bytes().strip() for path in paths):
        raise DataError(f"{name}: empty, not one row")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    try:
        rows = load_dataset(READERS[kinds.pop()], data_files=list(map(str, paths)), split="train")
    except Exception as error:  # of many kinds, the cause deepest
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: cannot be read: {reason}") from error
    columns = rows.column_names
    question = question or next((c for c in QUESTIONS if c in columns), QUESTIONS[0])
    answer = answer or next((c for c in ANSWERS if c in columns), ANSWERS[0])
    return table(name, rows, question, answer, form, digest)


def table(
    name: str, rows: Any, question: str, answer: str, form: Callable[[str], str], fingerprint: str
) -> Table:
    missing = [column for column in (question, answer) if column not in rows.column_names]
    if missing:
        raise DataError(
            f"{name}: no column {', '.join(map(repr, missing))}; there are "
            f"{', '.join(rows.column_names)}"
        )
    if len(rows) == 0:
        raise DataError(f"{name}: empty, not one row")
    rows = rows.select_columns([question, answer])
    return Table(name, rows, question, answer, form, fingerprint)


def source_table(source: Source, paths: list[Path] | None, option: str) -> Table:
    """A public split, from the hub, or from the local files of an option, in the same schema."""
    if paths is None:
        return hub_table(source, option)
    return file_table(paths, source.question, source.answer, source.form)


# Preparing


def written(number: float) -> str:
    """All digits of a number, as float64 or as float32 has them."""
    import numpy as np

    if isinstance(number, int) or number.is_integer():
        return str(int(number))
    with np.errstate(over="ignore"):
        single = np.float32(number)
    return str(single) if single == number else repr(number)


def prepared(question: Any, answer: Any, form: Callable[[str], str]) -> Problem | LeftOut:
    """A problem of a row's two columns, or why there is none."""
    if not isinstance(question, str) or not question.strip():
        return LeftOut("no question", repr(question))
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = written(answer)
    final = form(answer) if isinstance(answer, str) else ""
    if not final or final.casefold() in NO_ANSWER:
        return LeftOut("no answer found", repr(answer)[-120:])
    return Problem(question.strip(), final)


def graded(problem: Problem | LeftOut) -> Problem | LeftOut:
    """The problem, if its answer can earn a reward at all."""
    if isinstance(problem, Problem) and not is_gradable(problem.answer):
        return LeftOut("answer that math-verify cannot parse", problem.answer)
    return problem


def judged(question: Any, answer: Any, form: Callable[[str], str]) -> dict[str, Any]:
    """What becomes of a row's two columns, as a row of its own."""
    row = graded(prepared(question, answer, form))
    return {"kind": type(row).__name__, "fields": list(row)}


def prepare(source: Table, folder: Path, split: str, workers: int) -> list[Problem | LeftOut]:
    """All rows, in their order; those that an earlier, interrupted call has done are read."""
    rows = source.rows
    parts = [
        rows.select(range(start, min(start + PART_ROWS, len(rows)))).map(
            judged,
            input_columns=[source.question, source.answer],
            fn_kwargs={"form": source.form},
            remove_columns=rows.column_names,
            num_proc=workers if workers > 1 else None,
            cache_file_name=str(folder / f"{split}-{start}.arrow"),
            load_from_cache_file=True,
            desc=f"{split}, from row {start}",
        )
        for start in range(0, len(rows), PART_ROWS)
    ]
    kinds = {"Problem": Problem, "LeftOut": LeftOut}
    return [kinds[row["kind"]](*row["fields"]) for part in parts for row in part]


def same_text(question: str) -> str:
    """What two questions share that differ in case, white space and dollar signs alone."""
    return re.sub(r"[\s$]+", "", question).casefold()


def without(training: list[Problem], questions: Iterable[str]) -> list[Problem]:
    held_out = {same_text(question) for question in questions}
    return [problem for problem in training if same_text(problem.question) not in held_out]


# Writing


def openrlhf_row(problem: Problem, source: str, split: str, index: int) -> dict[str, Any]:
    """For `--data.input_key prompt --data.label_key answer --data.apply_chat_template`."""
    prompt = problem.question + INSTRUCTION
    return {"prompt": prompt, "answer": problem.answer, "datasource": source}


def verl_row(problem: Problem, source: str, split: str, index: int) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": problem.question + INSTRUCTION}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"split": split, "index": index},
    }


def write(host: str, problems: list[Problem], source: str, split: str, folder: Path) -> Path:
    """A split's file in the host's form."""
    if host == "openrlhf":
        path = folder / f"{split}.jsonl"
        rows = (openrlhf_row(p, source, split, i) for i, p in enumerate(problems))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, "utf-8")
        return path
    import pyarrow
    import pyarrow.parquet

    path = folder / f"{split}.parquet"
    rows = [verl_row(p, source, split, i) for i, p in enumerate(problems)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def begun(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Take the folder; what an earlier call with the same settings finished there, if it did.

    Raises:
        FolderError: The folder holds something else.
    """
    option, what = f"--out {out}", "prepared data set"
    earlier = held(out, RECORD, option, what)
    before = settings if earlier is None else earlier.get("settings")
    if not isinstance(before, dict):
        raise FolderError(f"{option}: not empty, and no {what}")
    if before != settings:
        raise other(before, settings, option, what)
    files = (earlier or {}).get("files", {})
    if files and all(
        (out / name).is_file() and checksum(out / name) == file["sha256"]
        for name, file in files.items()
    ):
        return earlier
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    keep(out, RECORD, {"settings": settings})
    return None


def make(
    name: str,
    host: str,
    out: Path,
    train: Table,
    test: Table | None,
    workers: int = WORKERS,
    benchmarks: Mapping[str, Table] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write both splits for a host; what is in them.

    Args:
        name: Of the data set, in the rows.
        host: `openrlhf` or `verl`.
        out: Folder, new or of the same call, interrupted or finished.
        train: Training rows.
        test: Test rows; None holds out a tenth of the training questions.
        workers: Processes.
        benchmarks: Other sets whose questions are dropped from training.

    Raises:
        DataError: No row is left to train or to test on.
        FolderError: The folder holds something else.
    """
    settings = {
        "data": name,
        "to": host,
        "train": train.fingerprint,
        "test": None if test is None else test.fingerprint,
        "instruction": INSTRUCTION,
        "question": train.question,
        "answer": train.answer,
        **({"without": sorted(benchmarks)} if benchmarks else {}),
    }
    if (earlier := begun(out, settings)) is not None:
        print(f"{out} is already there, whole and unchanged")
        report(earlier)
        return earlier
    parts = out / PARTS
    left_out: dict[str, list[LeftOut]] = {}
    read = prepare(train, parts, "train", workers)
    training = [row for row in read if isinstance(row, Problem)]
    left_out["train"] = [row for row in read if isinstance(row, LeftOut)]
    if test is None:
        rows = [{"question": p.question, "answer": p.answer} for p in training]
        try:
            held_out = [Problem(**row) for row in share(rows, "test", Path(train.name))]
        except ValueError as error:
            raise DataError(str(error)) from error
        training, dropped = without(training, (p.question for p in held_out)), 0
    else:
        # A benchmark stays whole: what cannot be graded is shown, and counts as wrong.
        rows = [prepared(r[test.question], r[test.answer], test.form) for r in test.rows]
        held_out = [row for row in rows if isinstance(row, Problem)]
        ungraded = (row for row in map(graded, rows) if isinstance(row, LeftOut))
        left_out["test"] = list(ungraded)
        kept = without(training, (problem.question for problem in held_out))
        training, dropped = kept, len(training) - len(kept)
    of_benchmarks = {}
    for benchmark, found in benchmarks.items():
        kept = without(training, found.rows[found.question])
        training, of_benchmarks[benchmark] = kept, len(training) - len(kept)
    for split, problems in (("train", training), ("test", held_out)):
        if not problems:
            raise DataError(
                f"{name}: no row is left for {split}. {shown_left_out(left_out[split])}"
            )
    files = {}
    for split, problems in (("train", training), ("test", held_out)):
        path = write(host, problems, name, split, out)
        files[path.name] = {"rows": len(problems), "sha256": checksum(path)}
    made = {
        "settings": settings,
        "template": "{question}" + INSTRUCTION,
        "extraction": {"train": train.extraction, "test": (test or train).extraction},
        "files": files,
        "test_questions_dropped_from_train": dropped,
        "benchmark_questions_dropped_from_train": of_benchmarks,
        "left_out": {
            split: {
                reason: {"rows": count, "first": [r.shown for r in rows if r.reason == reason][:5]}
                for reason, count in Counter(row.reason for row in rows).items()
            }
            for split, rows in left_out.items()
        },
        "first": {
            "train": [p._asdict() for p in training[:SHOWN]],
            "test": [p._asdict() for p in held_out[:SHOWN]],
        },
    }
    (out / RECORD).write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", "utf-8")
    shutil.rmtree(parts)
    report(made)
    return made


def shown_left_out(rows: list[LeftOut]) -> str:
    counts = Counter(row.reason for row in rows)
    return "; ".join(f"{count} with {reason}" for reason, count in counts.items())


def report(made: dict[str, Any]) -> None:
    print(f"prompt: {made['template']!r}")
    for split, text in made["extraction"].items():
        print(f"answer, {split}: {text}")
    for split, rows in made["first"].items():
        for row in rows:
            print(f"  {split}: {row['question'][:100]!r} -> {row['answer']!r}")
    for split, reasons in made["left_out"].items():
        what = "left out" if split == "train" else "kept, and never right"
        for reason, found in reasons.items():
            print(f"{split}: {found['rows']} rows {what}: {reason}, as {found['first']}")
    dropped = made["test_questions_dropped_from_train"]
    print(f"train: {dropped} rows dropped whose question is in the test set")
    for benchmark, count in made.get("benchmark_questions_dropped_from_train", {}).items():
        print(f"train: {count} rows dropped whose question is in {benchmark}")
    if made["settings"]["data"] in GATHERED and "without" not in made["settings"]:
        print("train: local files, so no benchmark was looked at but the test set")
    for name, file in made["files"].items():
        print(f"{name}: {file['rows']} rows, sha256 {file['sha256']}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m recipes.data", description="Math problems in a host's form."
    )
    add = made.add_argument
    add("data", help=f"{', '.join(TRAINING)}, or a file of {', '.join(READERS)}")
    add("--to", required=True, choices=HOSTS, help="whose form")
    add("--out", required=True, type=Path, help="folder; an interrupted call goes on there")
    add("--train", nargs="+", type=Path, help="local files of the training set, not the hub's")
    add("--test", nargs="+", type=Path, help="local files of the test set, not the hub's")
    add("--question", help=f"FILE's column (default: the first of {', '.join(QUESTIONS)})")
    add("--answer", help=f"FILE's column (default: the first of {', '.join(ANSWERS)})")
    add("--workers", type=int, default=WORKERS, help="processes (default: %(default)s)")
    return made


def tables(arguments: argparse.Namespace) -> tuple[Table, Table | None]:
    """The training and the test rows that a command line asks for."""
    name, columns = arguments.data, (arguments.question, arguments.answer)
    if name in TRAINING:
        if any(columns):
            raise DataError(
                f"--question and --answer are for a FILE; {name} has columns of its own"
            )
        train, test = TRAINING[name]
        return (
            source_table(train, arguments.train, "--train"),
            source_table(test, arguments.test, "--test"),
        )
    if Path(name).suffix not in READERS and not Path(name).exists():
        near = difflib.get_close_matches(name, TRAINING, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(
            f"no data set {name!r}.{hint} There are {', '.join(TRAINING)}, or a file of "
            f"{', '.join(READERS)}"
        )
    if arguments.train:
        raise DataError(f"--train is for {', '.join(TRAINING)}; {name} is a file itself")
    test_files = arguments.test and file_table(arguments.test, *columns)
    return file_table([Path(name)], *columns), test_files or None


def benchmark_tables(arguments: argparse.Namespace) -> dict[str, Table]:
    """The hub's benchmarks beside the test set, for a set of the hub that may have any of them."""
    if arguments.data not in GATHERED or arguments.train:
        return {}
    _, test = TRAINING[arguments.data]
    return {name: hub_table(it, "--train") for name, it in EVALUATION.items() if it is not test}


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    name = arguments.data if arguments.data in TRAINING else Path(arguments.data).stem
    try:
        train, test = tables(arguments)
        benchmarks = benchmark_tables(arguments)
        make(name, arguments.to, arguments.out, train, test, arguments.workers, benchmarks)
    except (DataError, FolderError) as error:
        print(f"recipes.data: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("recipes.data: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
