"""How much of an exact KL do the K most likely tokens hold, with all others as one category?

    python -m benchmarks.top_k --model SmolLM2-135M-Instruct --train gsm8k_train.jsonl \\
        --test gsm8k_test.jsonl [--out benchmarks/results]

For teachers and references that cannot send hidden states. The reference is the model as it is;
policies are the same at other temperatures, and with its upper layers fine-tuned on worked answers.
Prefixes are worked answers that none of them has seen. K + 1 categories hold at most the KL of all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES = (1, 3, 10, 30, 100, 300, 1000)
TEMPERATURES = (0.9, 0.7)
STEPS = (3, 12)  # of fine-tuning
TUNED = 4  # upper layers that it moves
RATE = 1e-4
ANSWERS = 4
LONGEST = 220  # tokens of question and answer

HEADING = """# What the top K tokens hold of a KL

`python -m benchmarks.top_k`: SmolLM2-135M-Instruct against itself, on {tokens} tokens of {answers}
worked answers of GSM8K (test). KL is KL(pi||ref) in nats per token over all 49152 tokens; the
columns are the share of it that K tokens and one category of all others hold, and in brackets the
cosine of its gradient towards the logits with the exact one. The K tokens are the most likely ones
of the reference (what a teacher can send) or of the policy (what it can ask for)."""


def texts(path: Path, count: int) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        problem = json.loads(line)
        yield f"Question: {problem['question']}\nAnswer: ", problem["answer"]


def batches(tokenizer: Any, path: Path, count: int) -> list[tuple[Tensor, int]]:
    """Tokens of each problem, (1, T), and where its answer starts."""
    found = []
    for question, answer in texts(path, count):
        start = len(tokenizer(question).input_ids)
        tokens = tokenizer(question + answer, return_tensors="pt").input_ids[:, :LONGEST]
        if tokens.shape[1] > start:
            found.append((tokens, start))
    return found


def fine_tuned(model: nn.Module, data: list[tuple[Tensor, int]]) -> Iterator[tuple[int, nn.Module]]:
    """The model after each number of steps, one answer a step; it is changed in place."""
    model.requires_grad_(False)
    layers = model.model.layers[-TUNED:]  # type: ignore[union-attr, index]
    layers.requires_grad_(True)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=RATE, weight_decay=0.0)
    for step, (tokens, start) in enumerate(data[: max(STEPS)], 1):
        logits = model(tokens).logits[0, start - 1 : -1]
        nn.functional.cross_entropy(logits, tokens[0, start:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in STEPS:
            yield step, model


@torch.no_grad()
def logits(model: nn.Module, data: list[tuple[Tensor, int]]) -> list[Tensor]:
    """(T, V) of the answers' tokens."""
    return [model(tokens).logits[0, start - 1 : -1].float() for tokens, start in data]


def with_tail(log_probs: Tensor, index: Tensor) -> Tensor:
    """Log-probs of some tokens and of all others together, (T, K + 1)."""
    top = log_probs.gather(-1, index)
    rest = log_probs.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest], -1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def measured(policy: list[Tensor], reference: list[Tensor], top: list[str]) -> dict[str, Any]:
    """KL per token, and share and cosine by K and by whose top tokens they are."""
    exact, tokens = 0.0, 0
    held = {(whose, size): [0.0, 0.0, 0.0] for whose in top for size in SIZES}
    norm = 0.0
    for z, r in zip(policy, reference, strict=True):
        z = z.clone().requires_grad_()
        log_p, log_q = z.log_softmax(-1), r.log_softmax(-1)
        whole = kl(log_p, log_q)
        (gradient,) = torch.autograd.grad(whole, z, retain_graph=True)
        exact, tokens, norm = (
            exact + whole.item(),
            tokens + len(z),
            norm + gradient.norm().item() ** 2,
        )
        for (whose, size), sums in held.items():
            index = (log_q if whose == "ref" else log_p).topk(size).indices
            part = kl(with_tail(log_p, index), with_tail(log_q, index))
            (of_part,) = torch.autograd.grad(part, z, retain_graph=True)
            sums[0] += part.item()
            sums[1] += (of_part * gradient).sum().item()
            sums[2] += of_part.norm().item() ** 2
    return {
        "kl": exact / tokens,
        "tokens": tokens,
        "share": {key: sums[0] / exact for key, sums in held.items()},
        "cosine": {key: sums[1] / (sums[2] * norm) ** 0.5 for key, sums in held.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    data = batches(tokenizer, given.test, ANSWERS)
    reference = logits(model, data)

    def policies() -> Iterator[tuple[str, list[Tensor]]]:
        for temperature in TEMPERATURES:
            yield f"temperature {temperature}", [x / temperature for x in reference]
        for steps, tuned in fine_tuned(model, batches(tokenizer, given.train, max(STEPS) + 8)):
            yield f"fine-tuned, {steps} steps", logits(tuned, data)

    lines = [
        "",
        "| policy | KL | top of | " + " | ".join(f"K = {size}" for size in SIZES) + " |",
        "| --- | --- | --- |" + " --- |" * len(SIZES),
    ]
    tokens = 0
    for name, policy in policies():
        # At another temperature the order of the tokens is the same.
        top = ["ref"] if name.startswith("temperature") else ["ref", "policy"]
        found = measured(policy, reference, top)
        tokens = found["tokens"]
        for whose in top:
            cells = (
                f"{found['share'][whose, size]:.2f} ({found['cosine'][whose, size]:.2f})"
                for size in SIZES
            )
            lines.append(f"| {name} | {found['kl']:.4f} | {whose} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    text = "\n".join([HEADING.format(tokens=tokens, answers=len(data)), *lines, ""])
    if given.out is None:
        print(text)
    else:
        (given.out / "exact-top-k.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
