"""A model's own answers and their log-probs: `python -m recipes.reference_answers MODEL --data D`.

Drawn once, they stand in for the reference in a run with `klplug.source` (docs/options.md): no
reference model is loaded there. Answers are sampled from the whole distribution, with transformers,
and a second pass takes the log-probs of what was sampled. A line of the file is an answer, and any
part of the lines is such a file too.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.data import INSTRUCTION, READERS, TRAINING, DataError
from recipes.evaluate import EvaluationError, as_trained, chat, table_of
from recipes.shared.settings import SettingsError, check_model


class DrawingError(ValueError):
    """Something asked for cannot be; the message is all one needs."""


def lines(
    model: Any,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    template: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """The lines of the file: `samples` answers to each question, a line an answer.

    An answer has its eos, where it reached one. Its log-probs are of softmax(logits / temperature),
    in nats, and of the whole vocabulary. `template` is what the model's chat template is told.
    """
    from klplug.hosting.stored import tokenizer_digest
    from recipes.quickstart.evaluate import answers, log_probs_of

    digest = tokenizer_digest(tokenizer.get_vocab())
    prompts = [
        chat(tokenizer, question, template) for question in questions for _ in range(samples)
    ]
    # Neighbours of like length need little padding.
    prompts.sort(key=len)
    for start in range(0, len(prompts), batch_size):
        batch = answers(
            model,
            tokenizer,
            prompts[start : start + batch_size],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        log_probs = log_probs_of(model, batch, temperature=temperature)
        width = batch.sequences.shape[1] - batch.response_mask.shape[1]
        for ids, attention, mask, own in zip(
            batch.sequences, batch.attention_mask, batch.response_mask, log_probs, strict=True
        ):
            kept = mask.bool()
            yield {
                "prompt": ids[:width][attention[:width].bool()].tolist(),
                "answer": ids[width:][kept].tolist(),
                "log_probs": [round(x, 6) for x in own[kept].tolist()],
                "temperature": temperature,
                "tokenizer": digest,
            }


def asked(arguments: argparse.Namespace) -> list[str]:
    """The questions as a run puts them."""
    table = table_of(arguments, {name: train for name, (train, _) in TRAINING.items()})
    instruction = arguments.instruction
    if instruction is None:
        instruction = INSTRUCTION if arguments.data in TRAINING else ""
    found = [row[table.question] + instruction for row in table.rows]
    return found[: arguments.n]


def draw(arguments: argparse.Namespace) -> tuple[int, int]:
    """Write the file; how many answers it has, and how many tokens they have.

    Raises:
        DrawingError, EvaluationError, DataError, SettingsError: Before the model is loaded.
    """
    for name in ("n", "samples", "max_new_tokens", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise DrawingError(f"--{name.replace('_', '-')} {value}: at least 1")
    if arguments.temperature <= 0:
        raise DrawingError(f"--temperature {arguments.temperature:g}: above 0, that of the run")
    for name, off in (("top_p", 1.0), ("top_k", 0)):
        if (value := getattr(arguments, name)) != off:
            raise DrawingError(
                f"--{name.replace('_', '-')} {value:g}: a cut distribution is not the reference's, "
                f"and its log-probs would not be those of what was sampled. Leave it out ({off:g})"
            )
    if arguments.out.exists():
        raise DrawingError(f"--out {arguments.out}: there is such a file already")
    questions = asked(arguments)
    check_model(arguments.model)
    template, max_new_tokens = as_trained(arguments)

    import torch
    from tqdm import tqdm

    from recipes.quickstart.evaluate import load

    model, tokenizer = load(arguments.model)
    if torch.cuda.is_available():
        model.to("cuda", torch.bfloat16)
    torch.manual_seed(arguments.seed)
    made = lines(
        model,
        tokenizer,
        questions,
        samples=arguments.samples,
        temperature=arguments.temperature,
        max_new_tokens=max_new_tokens,
        batch_size=arguments.batch_size,
        template=template,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = arguments.out.with_name(f"{arguments.out.name}.{os.getpid()}.tmp")
    tokens, count = 0, len(questions) * arguments.samples
    try:
        with scratch.open("w", encoding="utf-8") as file:
            for row in tqdm(made, total=count, unit=" answers"):
                file.write(json.dumps(row) + "\n")
                tokens += len(row["answer"])
        scratch.replace(arguments.out)  # whole or not there
    finally:
        scratch.unlink(missing_ok=True)
    return count, tokens


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m recipes.reference_answers",
        description="A model's own answers with their log-probs, for klplug.source.",
    )
    add = made.add_argument
    add("model", help="the reference: a Hugging Face folder, or a hub's owner/name")
    add("--data", required=True, help=f"{', '.join(TRAINING)}, or a file of {', '.join(READERS)}")
    add("--file", nargs="+", type=Path, help="local files of the named set, not the hub's")
    add("--question", help="FILE's column")
    add("--answer", help="FILE's column")
    add("--out", type=Path, required=True, help="the file to write, JSON lines")
    add("--n", type=int, help="the first so many problems (default: all)")
    add("--samples", type=int, default=1, help="answers per problem (default: 1)")
    add("--temperature", type=float, default=1.0, help="that of the run's rollouts (default: 1)")
    add("--top-p", type=float, default=1.0, help="1 alone: samples are of the whole distribution")
    add("--top-k", type=int, default=0, help="0 alone: the same")
    add("--recipe", help="ask as this recipe trains: its chat template's options, its length")
    add("--max-new-tokens", type=int, help="of an answer (default: the recipe's, or 3072)")
    add("--batch-size", type=int, default=64, help="answers at a time (default: 64)")
    add("--seed", type=int, default=0)
    add(
        "--instruction", help="added to each question (default: the recipes' own; to a FILE's none)"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        count, tokens = draw(arguments)
    except (DrawingError, EvaluationError, DataError, SettingsError) as error:
        print(f"recipes.reference_answers: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {count} answers of {tokens / count:.1f} tokens each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
