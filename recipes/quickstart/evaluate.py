"""Accuracy of a policy, and its exact KL to a reference, with transformers alone.

    kl_nats_per_answer = E_{x} E_{y ~ pi(.|x)} sum_t KL(pi(.|x, y_<t) || ref(.|x, y_<t))

which is the KL(pi || ref) of whole answers. The answers are sampled; at each of their prefixes
the inner KL is summed over the whole vocabulary, so only the prefixes carry sampling noise.

    python -m recipes.quickstart.evaluate POLICY --reference REF --data FILE --n 100 --json
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recipes.quickstart.data import file_rows
from recipes.quickstart.reward import is_correct

# Elements of a (rows, tokens, vocabulary) block: 128 MiB in float64, and three are alive at once.
BLOCK = 2**24


@dataclass(frozen=True)
class Answers:
    """A batch of prompts (padded on the left) with their answers (padded on the right)."""

    sequences: Tensor  # (B, P + T) token ids
    attention_mask: Tensor  # (B, P + T) 1 where a token is real
    response_mask: Tensor  # (B, T) 1 up to and including the first eos
    texts: list[str]  # B answers, special tokens kept, as the reward sees them
    ended: Tensor  # (B,) whether the answer reached an eos

    @property
    def lengths(self) -> Tensor:
        """Tokens in each answer, its eos included."""
        return self.response_mask.sum(-1)


def load(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The model in float32, in eval mode, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), tokenizer


def chat_prompt(tokenizer: Any, question: str) -> str:
    """The prompt OpenRLHF builds with `--data.apply_chat_template`: one user message."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's and the generation config's."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, prompts: list[str], *, max_new_tokens: int, temperature: float
) -> Answers:
    """One answer to each prompt: sampled from softmax(logits / temperature), greedy at 0."""
    eos = eos_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    rows = [tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
    width = max(map(len, rows))
    device = model.device
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)

    # Spelled out, since a folder's generation_config may hold top_k, top_p or a penalty.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    stored, model.generation_config = model.generation_config, config
    try:
        sequences = model.generate(ids, attention_mask=mask, generation_config=config)
    finally:
        model.generation_config = stored

    response = sequences[:, width:]
    is_eos = torch.isin(response, torch.tensor(eos, device=device))
    response_mask = (is_eos.cumsum(-1) - is_eos.long() == 0).long()  # pad may be eos
    texts = [
        tokenizer.decode(row[kept.bool()], skip_special_tokens=False)
        for row, kept in zip(response, response_mask, strict=True)
    ]
    attention = torch.cat([mask, response_mask], dim=-1)
    return Answers(sequences, attention, response_mask, texts, is_eos.any(-1))


def _log_probs(model: Any, rows: Tensor, mask: Tensor, tokens: int, temperature: float) -> Tensor:
    """Full-vocabulary log-probabilities (b, T, V) of the last T tokens, in float64."""
    logits = model(
        input_ids=rows,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=tokens + 1,
    ).logits[:, :-1]
    return (logits.double() / temperature).log_softmax(-1)


@torch.no_grad()
def exact_kl(policy: Any, reference: Any, batch: Answers, *, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) of each answer, (B,), in nats, float64.

    At each prefix of the answer the KL is summed over the vocabulary; the sum over prefixes
    runs up to and including the one that the eos follows.
    """
    tokens = batch.response_mask.shape[1]
    vocabulary = policy.config.get_text_config().vocab_size
    if vocabulary != (other := reference.config.get_text_config().vocab_size):
        raise ValueError(f"policy has {vocabulary} tokens, reference {other}: no KL between them")
    size = max(1, BLOCK // (tokens * vocabulary))
    sums = []
    for start in range(0, len(batch.sequences), size):
        part = slice(start, start + size)
        rows, mask = batch.sequences[part], batch.attention_mask[part]
        log_pi = _log_probs(policy, rows, mask, tokens, temperature)
        log_ref = _log_probs(reference, rows, mask, tokens, temperature)
        per_token = (log_pi.exp() * log_ref.neg_().add_(log_pi)).sum(-1)
        sums.append((per_token * batch.response_mask[part]).sum(-1))
    return torch.cat(sums)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def evaluate(
    policy_dir: str | os.PathLike[str],
    reference_dir: str | os.PathLike[str] | None,
    problems: list[dict[str, Any]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy on the problems, answer length, and exact KL to the reference.

    Args:
        policy_dir: A folder (or hub name) that transformers loads.
        reference_dir: The same of the reference, with the same vocabulary; None leaves KL out.
        problems: Rows with `question` and `answer`.
        max_new_tokens: Where an answer is cut off.
        batch_size: Answers generated at a time.
        samples: Sampled answers to each problem.
        temperature: Of the samples and of both distributions of the KL; above 0.
        seed: Of the samples.

    Returns:
        `accuracy` of the greedy answers; of the samples `sampled_accuracy`, `mixed_share` (problems
        with right and wrong samples), `response_tokens` (mean, eos included), `cut_share` (no eos);
        `kl_nats_per_answer` with `kl_standard_error` over problems, `kl_nats_per_token`.

    Raises:
        ValueError: No problem, no chat template, samples < 1, temperature <= 0, other vocabulary.
    """
    if not problems:
        raise ValueError("no problem to evaluate on")
    if samples < 1 or temperature <= 0:
        raise ValueError(f"needs samples >= 1 and temperature > 0: {samples=}, {temperature=}")
    started = perf_counter()
    policy, tokenizer = load(policy_dir)
    if not tokenizer.chat_template:
        raise ValueError(f"{policy_dir}: its tokenizer has no chat template")
    reference = None
    if reference_dir is not None:
        same = str(policy_dir) == str(reference_dir)
        reference = policy if same else load(reference_dir)[0]

    # Neighbours of like length need little padding; greedy and sampled answers share the order.
    prompts = [chat_prompt(tokenizer, row["question"]) for row in problems]
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))

    greedy = []
    for part in _batches(order, batch_size):
        batch = answers(
            policy,
            tokenizer,
            [prompts[i] for i in part],
            max_new_tokens=max_new_tokens,
            temperature=0.0,
        )
        greedy += [
            is_correct(t, problems[i]["answer"]) for i, t in zip(part, batch.texts, strict=True)
        ]

    right, lengths, ended, kls = [], [], [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in _batches([i for i in order for _ in range(samples)], batch_size):
            batch = answers(
                policy,
                tokenizer,
                [prompts[i] for i in part],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )
            right += [
                is_correct(t, problems[i]["answer"]) for i, t in zip(part, batch.texts, strict=True)
            ]
            lengths.append(batch.lengths)
            ended.append(batch.ended)
            if reference is not None:
                kls.append(exact_kl(policy, reference, batch, temperature=temperature))

    count = len(problems)
    groups = torch.tensor(right, dtype=torch.float64).view(count, samples).mean(-1)
    tokens = torch.cat(lengths).double()
    result: dict[str, Any] = {
        "problems": count,
        "samples": samples,
        "temperature": temperature,
        "accuracy": sum(greedy) / count,
        "sampled_accuracy": groups.mean().item(),
        "mixed_share": ((groups > 0) & (groups < 1)).double().mean().item(),
        "response_tokens": tokens.mean().item(),
        "cut_share": 1 - torch.cat(ended).double().mean().item(),
        "kl_nats_per_answer": None,
        "kl_standard_error": None,
        "kl_nats_per_token": None,
    }
    if reference is not None:
        kl = torch.cat(kls)
        # Samples of one problem are not independent: the error is that of the problems' means.
        means = kl.view(count, samples).mean(-1)
        result["kl_nats_per_answer"] = means.mean().item()
        if count > 1:
            result["kl_standard_error"] = (means.std() / count**0.5).item()
        result["kl_nats_per_token"] = (kl.sum() / tokens.sum()).item()
    return {**result, "seconds": perf_counter() - started}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Accuracy, and exact KL to a reference.")
    parser.add_argument("policy", help="folder of the policy")
    parser.add_argument("--reference", help="folder of the reference; none: no KL")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines: question, answer")
    parser.add_argument("--n", type=int, help="the first so many problems; all if not given")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1, help="sampled answers to each problem")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    args = parser.parse_args(argv)
    try:
        result = evaluate(
            args.policy,
            args.reference,
            file_rows(args.data)[: args.n],
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            samples=args.samples,
            temperature=args.temperature,
            seed=args.seed,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:20} {value:.4g}" if isinstance(value, float) else f"{name:20} {value}")


if __name__ == "__main__":
    main()
