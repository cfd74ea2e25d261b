"""How many problems a model solves: `python -m recipes.evaluate MODEL --data math500`.

Greedy accuracy, and of k sampled answers to each problem pass@1 ... pass@k (unbiased) and
majority@k. Every answer is judged by the reward of the training runs. All answers stay in
`records.jsonl`, a line a problem; a call that was interrupted goes on there.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol

from recipes.data import (
    EVALUATION,
    INSTRUCTION,
    READERS,
    DataError,
    Problem,
    Source,
    Table,
    file_table,
    prepared,
    source_table,
)
from recipes.recipe import load
from recipes.shared.folder import FolderError, claim
from recipes.shared.reward import final_answer, is_correct, is_gradable
from recipes.shared.settings import RUNS, SettingsError, check_model

SETTINGS, RECORDS, SUMMARY = "settings.json", "records.jsonl", "summary.json"
NORMAL = NormalDist().inv_cdf(0.975)  # of a 95 % interval
MAX_NEW_TOKENS = 3072
ENGINES = ("auto", "vllm", "transformers")


class EvaluationError(ValueError):
    """Something asked for cannot be; the message is all one needs."""


@dataclass(frozen=True)
class Settings:
    """An evaluation; equal settings go on in the same folder."""

    model: str
    model_files: str
    """Of a folder; "": a hub's model."""
    data: str
    fingerprint: str
    problems: int
    engine: str
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int
    seed: int
    instruction: str
    template: Mapping[str, Any]
    """What the model's chat template is told."""
    question: str
    answer: str


class Engine(Protocol):
    """Whatever answers prompts: `count` answers to each, greedy at temperature 0."""

    def answers(
        self, prompts: list[str], count: int, temperature: float, seed: int
    ) -> list[list[str]]: ...

    def prompt(self, question: str) -> str: ...


class Transformers:
    """On a GPU in bfloat16, else on the CPU in float32."""

    def __init__(self, settings: Settings) -> None:
        import torch

        from recipes.quickstart.evaluate import load

        if settings.top_p != 1:
            raise EvaluationError(f"--top-p {settings.top_p:g}: transformers samples with 1 here")
        self.model, self.tokenizer = load(settings.model)
        if torch.cuda.is_available():
            self.model.to("cuda", torch.bfloat16)
        self.settings = settings

    def prompt(self, question: str) -> str:
        return chat(self.tokenizer, question, self.settings.template)

    def answers(
        self, prompts: list[str], count: int, temperature: float, seed: int
    ) -> list[list[str]]:
        import torch

        from recipes.quickstart.evaluate import answers

        repeated = [prompt for prompt in prompts for _ in range(count)]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            texts = answers(
                self.model,
                self.tokenizer,
                repeated,
                max_new_tokens=self.settings.max_new_tokens,
                temperature=temperature,
            ).texts
        return [texts[i : i + count] for i in range(0, len(texts), count)]


class VLLM:
    """vLLM, on as many GPUs as `tensor_parallel` says."""

    def __init__(self, settings: Settings, tensor_parallel: int) -> None:
        import torch
        from vllm import LLM

        self.settings = settings
        self.llm = LLM(
            model=settings.model,
            tensor_parallel_size=tensor_parallel,
            dtype="auto" if torch.cuda.is_available() else "float32",
            seed=settings.seed,
        )
        self.tokenizer = self.llm.get_tokenizer()

    def prompt(self, question: str) -> str:
        return chat(self.tokenizer, question, self.settings.template)

    def answers(
        self, prompts: list[str], count: int, temperature: float, seed: int
    ) -> list[list[str]]:
        from vllm import SamplingParams

        # Spelled out: a folder's generation_config may hold a top_k or a penalty. The seed is the
        # engine's: a request's own ends vLLM on a CPU (torch's CPU generator has no offset).
        sampling = SamplingParams(
            n=count,
            temperature=temperature,
            top_p=self.settings.top_p if temperature > 0 else 1.0,
            max_tokens=self.settings.max_new_tokens,
            skip_special_tokens=False,
        )
        tokens = [self.tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
        requests = [{"prompt_token_ids": ids} for ids in tokens]
        outputs = self.llm.generate(requests, sampling, use_tqdm=False)
        return [[answer.text for answer in output.outputs] for output in outputs]


def chat(tokenizer: Any, question: str, template: Mapping[str, Any]) -> str:
    """The question as the training's prompts: one user message of the model's template."""
    from recipes.quickstart.evaluate import chat_prompt

    if not tokenizer.chat_template:
        raise EvaluationError(f"{tokenizer.name_or_path}: its tokenizer has no chat template")
    return chat_prompt(tokenizer, question, **template)


# Judging


def majority(responses: Sequence[str]) -> int | None:
    r"""The place of a response with the most frequent answer, the first of equals; None: no answer.

    Answers are one if their texts are, or if math-verify finds them equal (0.5 and \frac{1}{2}).
    """
    places: dict[str, list[int]] = {}
    for place, response in enumerate(responses):
        if answer := final_answer(response):
            same = (known for known in places if known == answer or is_same(known, answer))
            places.setdefault(next(same, answer), []).append(place)
    return max(places.values(), key=len)[0] if places else None


def is_same(first: str, second: str) -> bool:
    return is_correct(rf"\boxed{{{first}}}", second)


def pass_at(k: int, right: int, samples: int) -> float:
    """The chance that k of the samples, drawn without replacement, hold a right one.

    Unbiased for the chance that k fresh samples do (Chen et al., arXiv 2107.03374).
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def wilson(mean: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean of `count` problems' values between 0 and 1.

    Made for 0 and 1; values in between vary less, so for pass@k it errs on the wide side.
    """
    shrunk = mean + NORMAL**2 / (2 * count)
    half = NORMAL * math.sqrt(mean * (1 - mean) / count + NORMAL**2 / (4 * count**2))
    scale = 1 + NORMAL**2 / count
    return max(0.0, (shrunk - half) / scale), min(1.0, (shrunk + half) / scale)


def ks(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples."""
    return sorted({*(2**i for i in range(samples.bit_length()) if 2**i <= samples), samples})


def summary(settings: Settings, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every metric with its interval, and what could not be judged."""
    count = len(records)
    values = {"greedy": [float(r["greedy"]["right"]) for r in records]}
    if settings.samples:
        right = [sum(sample["right"] for sample in r["samples"]) for r in records]
        for k in ks(settings.samples):
            values[f"pass@{k}"] = [pass_at(k, c, settings.samples) for c in right]
        values[f"majority@{settings.samples}"] = [float(r["majority_right"]) for r in records]
    means = {name: sum(value) / count for name, value in values.items()}
    ungradable = [r["answer"] for r in records if not r["gradable"]]
    return {
        **asdict(settings),
        "metrics": {
            name: {"mean": mean, "interval": wilson(mean, count)} for name, mean in means.items()
        },
        "no_answer": sum(not final_answer(r["greedy"]["text"]) for r in records),
        "answers_math_verify_cannot_parse": {"count": len(ungradable), "first": ungradable[:5]},
    }


# Running


def problems_of(table: Table, count: int | None) -> list[Problem]:
    """The problems, all of them or the first so many.

    Raises:
        EvaluationError: A row that has no question or no answer.
    """
    rows = table.rows if count is None else table.rows.select(range(min(count, len(table.rows))))
    found = [prepared(row[table.question], row[table.answer], table.form) for row in rows]
    bad = [(i, row) for i, row in enumerate(found) if not isinstance(row, Problem)]
    if bad:
        place, row = bad[0]
        raise EvaluationError(
            f"{table.name}: {len(bad)} rows are no problems, the first row {place}: {row.reason}, "
            f"{row.shown}"
        )
    return found


def begun(out: Path, settings: Settings) -> list[dict[str, Any]]:
    """Take the folder; the records of whole batches that are there already.

    Raises:
        FolderError: The folder holds something else.
    """
    claim(out, SETTINGS, asdict(settings), f"--out {out}", "evaluation")
    path = out / RECORDS
    lines = path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []
    # A torn batch is done again as a whole: its seed is the batch's.
    whole = len(lines)
    if whole < settings.problems:
        whole -= whole % settings.batch_size
    path.write_text("".join(line + "\n" for line in lines[:whole]), "utf-8")
    return [json.loads(line) for line in lines[:whole]]


def record(problem: Problem, greedy: str, samples: list[str]) -> dict[str, Any]:
    """A problem's line in records.jsonl."""

    def judged(text: str) -> dict[str, Any]:
        return {"right": is_correct(text, problem.answer), "text": text}

    made = {**problem._asdict(), "gradable": is_gradable(problem.answer), "greedy": judged(greedy)}
    if samples:
        voted = [judged(text) for text in samples]
        place = majority(samples)
        made["majority_right"] = place is not None and voted[place]["right"]
        made["samples"] = voted
    return made


def evaluated(
    engine: Engine, problems: Sequence[Problem], settings: Settings, first: int
) -> Iterator[list[dict[str, Any]]]:
    """The records, a batch at a time, from problem `first` on."""
    for start in range(first, len(problems), settings.batch_size):
        batch = problems[start : start + settings.batch_size]
        prompts = [engine.prompt(p.question + settings.instruction) for p in batch]
        greedy = engine.answers(prompts, 1, 0.0, settings.seed + start)
        samples: list[list[str]] = [[] for _ in batch]
        if settings.samples:
            samples = engine.answers(
                prompts, settings.samples, settings.temperature, settings.seed + start
            )
        rows = zip(batch, greedy, samples, strict=True)
        yield [record(problem, texts[0], drawn) for problem, texts, drawn in rows]


def evaluate(
    settings: Settings, problems: Sequence[Problem], out: Path, tensor_parallel: int = 1
) -> dict[str, Any]:
    """Answer and judge what is not done yet; the summary of all of it.

    Raises:
        EvaluationError: The model has no chat template.
        FolderError: The folder holds something else.
    """
    from tqdm import tqdm

    records = begun(out, settings)
    if len(records) < len(problems):
        vllm = settings.engine == "vllm"
        engine = VLLM(settings, tensor_parallel) if vllm else Transformers(settings)
        with (
            (out / RECORDS).open("a", encoding="utf-8") as file,
            tqdm(total=len(problems), initial=len(records), unit=" problems") as bar,
        ):
            for batch in evaluated(engine, problems, settings, len(records)):
                file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in batch))
                file.flush()
                records += batch
                bar.update(len(batch))
    made = summary(settings, records)
    (out / SUMMARY).write_text(json.dumps(made, indent=2) + "\n", "utf-8")
    return made


def report(made: dict[str, Any], out: Path) -> None:
    print(f"{made['model']} on {made['data']}, {made['problems']} problems, {made['engine']}")
    for name, metric in made["metrics"].items():
        low, high = metric["interval"]
        print(f"  {name:14} {metric['mean']:7.1%}   95 % interval {low:.1%} to {high:.1%}")
    if made["no_answer"]:
        print(f"  {made['no_answer']} greedy responses hold no answer")
    unparsed = made["answers_math_verify_cannot_parse"]
    if unparsed["count"]:
        print(
            f"  {unparsed['count']} problems count as wrong, since math-verify cannot parse their "
            f"answer, as {unparsed['first']}"
        )
    print(f"{out}: {SUMMARY}, {RECORDS}")


def table_of(arguments: argparse.Namespace, sources: Mapping[str, Source]) -> Table:
    """The rows that a command line asks for: of one of the sets that have a name, or of a file."""
    data, files = arguments.data, arguments.file
    columns = (arguments.question, arguments.answer)
    if data in sources:
        if any(columns):
            raise EvaluationError(f"--question and --answer are for a FILE, not for {data}")
        return source_table(sources[data], files, "--file")
    if Path(data).suffix not in READERS and not Path(data).exists():
        raise EvaluationError(
            f"--data {data}: there are {', '.join(sources)}, or a file of {', '.join(READERS)}"
        )
    if files:
        raise EvaluationError(f"--file is for {', '.join(sources)}; {data} is a file itself")
    return file_table([Path(data)], *columns)


def files_of(model: str) -> str:
    """What tells a folder's files from those of a model trained anew in its place."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return ""
    found = [path.stat() for path in folder.iterdir() if path.is_file()]
    written = datetime.fromtimestamp(max(file.st_mtime for file in found), timezone.utc)
    return f"{len(found)} of {sum(file.st_size for file in found)} bytes, the last of {written}"


def run_of(model: str) -> str:
    """A folder's path from the runs' folder or from here; a hub's name as it is."""
    folder = Path(os.path.abspath(Path(model).expanduser()))
    if not folder.is_dir():
        return model
    above = (base for base in (RUNS, Path.cwd()) if folder.is_relative_to(base))
    return str(folder.relative_to(next(above, folder.anchor)))


def as_trained(arguments: argparse.Namespace) -> tuple[Mapping[str, Any], int]:
    """What the chat template is told, and an answer's longest length: those of the recipe.

    Raises:
        SettingsError: There is no such recipe.
    """
    recipe = load(arguments.recipe) if arguments.recipe else None
    longest = recipe.max_new_tokens if recipe else MAX_NEW_TOKENS
    return recipe.template if recipe else {}, arguments.max_new_tokens or longest


def engine_name(asked: str) -> str:
    """`auto` is vLLM where it is installed and there is a GPU."""
    if asked == "vllm" and find_spec("vllm") is None:
        raise EvaluationError("--engine vllm: vllm is not installed; transformers is the other one")
    if asked != "auto":
        return asked
    import torch

    return "vllm" if find_spec("vllm") and torch.cuda.is_available() else "transformers"


def checked(arguments: argparse.Namespace) -> tuple[Settings, list[Problem], Path]:
    """The settings, the problems and the folder that a command line asks for.

    Raises:
        EvaluationError, DataError, SettingsError: Before the model is loaded.
    """
    for name in ("n", "max_new_tokens", "batch_size", "tensor_parallel"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise EvaluationError(f"--{name.replace('_', '-')} {value}: at least 1")
    if arguments.samples < 0:
        raise EvaluationError(f"--samples {arguments.samples}: 0 (greedy alone) or more")
    if arguments.temperature <= 0:
        raise EvaluationError(
            f"--temperature {arguments.temperature:g}: above 0, of the samples; greedy is always "
            "measured too"
        )
    if not 0 < arguments.top_p <= 1:
        raise EvaluationError(f"--top-p {arguments.top_p:g}: above 0 and at most 1")
    table = table_of(arguments, EVALUATION)
    problems = problems_of(table, arguments.n)
    check_model(arguments.model)
    template, max_new_tokens = as_trained(arguments)
    settings = Settings(
        model=arguments.model,
        model_files=files_of(arguments.model),
        data=arguments.data,
        fingerprint=table.fingerprint,
        problems=len(problems),
        engine=engine_name(arguments.engine),
        samples=arguments.samples,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_new_tokens=max_new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        instruction=arguments.instruction,
        template=template,
        question=table.question,
        answer=table.answer,
    )
    name = "-".join(
        re.sub(r"[^\w.-]+", "_", part)
        for part in (run_of(settings.model), Path(settings.data).stem)
    )
    return settings, problems, arguments.out or RUNS / f"evaluate-{name}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m recipes.evaluate", description="How many problems a model solves."
    )
    add = made.add_argument
    add("model", help="a Hugging Face folder, or a hub's owner/name")
    add("--data", required=True, help=f"{', '.join(EVALUATION)}, or a file of {', '.join(READERS)}")
    add("--file", nargs="+", type=Path, help="local files of the named set, not the hub's")
    add("--question", help="FILE's column")
    add("--answer", help="FILE's column")
    add("--n", type=int, help="the first so many problems (default: all)")
    add("--samples", type=int, default=8, help="answers per problem, 0: greedy alone (default: 8)")
    add("--temperature", type=float, default=1.0, help="of the samples (default: 1)")
    add("--top-p", type=float, default=1.0, help="of the samples, with vLLM (default: 1)")
    add("--recipe", help="ask as this recipe trained: its chat template's options, its length")
    add("--max-new-tokens", type=int, help="of an answer (default: the recipe's, or 3072)")
    add("--batch-size", type=int, default=64, help="problems at a time (default: 64)")
    add("--tensor-parallel", type=int, default=1, help="GPUs of vLLM (default: 1)")
    add("--engine", choices=ENGINES, default="auto", help="default: vLLM where there is a GPU")
    add("--seed", type=int, default=0)
    add("--instruction", default=INSTRUCTION, help="added to each question (default: as trained)")
    add("--out", type=Path, help="folder; an interrupted call goes on there")
    return made


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        settings, problems, out = checked(arguments)
        report(evaluate(settings, problems, out, arguments.tensor_parallel), out)
    except (EvaluationError, DataError, FolderError, SettingsError) as error:
        print(f"recipes.evaluate: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("recipes.evaluate: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
