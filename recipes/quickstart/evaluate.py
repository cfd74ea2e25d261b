"""Accuracy of a policy, its entropy, and its exact KL to a reference, with transformers alone.

    kl_nats_per_answer         = E_{x} E_{y ~ pi(.|x)}  sum_t KL(pi(.|x, y_<t) || ref(.|x, y_<t))
    forward_kl_nats_per_answer = E_{x} E_{y ~ ref(.|x)} sum_t KL(ref(.|x, y_<t) || pi(.|x, y_<t))

which are KL(pi || ref) and KL(ref || pi) of whole answers. The answers are sampled; at each of
their prefixes the inner KL is summed over the whole vocabulary, so only the prefixes carry
sampling noise. The entropy is had in the same way.

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

from recipes.evaluate import ks, pass_at
from recipes.quickstart.data import file_rows
from recipes.shared.reward import is_correct

# Elements of a (rows, tokens, vocabulary) block: 16 MiB in float64, which glibc keeps for the next
# block; larger ones it gives back, and their page faults took half of the time.
BLOCK = 2**21


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


def chat_prompt(tokenizer: Any, question: str, **template: Any) -> str:
    """The prompt OpenRLHF builds with `--data.apply_chat_template`: one user message."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **template
    )


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
def log_probs_of(model: Any, batch: Answers, *, temperature: float = 1.0) -> Tensor:
    """Of the answers' own tokens, (B, T), in nats, float64; anything where an answer has ended."""
    tokens = batch.response_mask.shape[1]
    size = max(1, BLOCK // (tokens * model.config.get_text_config().vocab_size))
    found = []
    for start in range(0, len(batch.sequences), size):
        part = slice(start, start + size)
        rows, mask = batch.sequences[part], batch.attention_mask[part]
        whole = _log_probs(model, rows, mask, tokens, temperature)
        found.append(whole.gather(-1, rows[:, -tokens:, None]).squeeze(-1))
    return torch.cat(found)


@torch.no_grad()
def kl_and_entropy(
    policy: Any, reference: Any, batch: Answers, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """KL(policy || reference) and the policy's entropy on each answer, (B,), in nats, float64.

    At each prefix of the answer both are summed over the vocabulary; the sum over prefixes
    runs up to and including the one that the eos follows. With answers of the policy they are
    unbiased for the KL and the entropy of whole answers.
    """
    tokens = batch.response_mask.shape[1]
    vocabulary = policy.config.get_text_config().vocab_size
    if vocabulary != (other := reference.config.get_text_config().vocab_size):
        raise ValueError(f"policy has {vocabulary} tokens, reference {other}: no KL between them")
    size = max(1, BLOCK // (tokens * vocabulary))
    kls, entropies = [], []
    for start in range(0, len(batch.sequences), size):
        part = slice(start, start + size)
        rows, mask = batch.sequences[part], batch.attention_mask[part]
        kept = batch.response_mask[part]
        log_pi = _log_probs(policy, rows, mask, tokens, temperature)
        log_ref = _log_probs(reference, rows, mask, tokens, temperature)
        pi = log_pi.exp()
        kls.append(((pi * log_ref.neg_().add_(log_pi)).sum(-1) * kept).sum(-1))
        entropies.append(-((pi * log_pi).sum(-1) * kept).sum(-1))
    return torch.cat(kls), torch.cat(entropies)


def exact_kl(policy: Any, reference: Any, batch: Answers, *, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) on each answer, (B,), in nats: `kl_and_entropy`'s first."""
    return kl_and_entropy(policy, reference, batch, temperature=temperature)[0]


def first_of_each(batch: Answers, count: int, samples: int) -> Answers:
    """The first `count` of each problem's `samples` answers."""
    rows = torch.arange(len(batch.sequences)) % samples < count
    return Answers(
        batch.sequences[rows],
        batch.attention_mask[rows],
        batch.response_mask[rows],
        [text for text, kept in zip(batch.texts, rows, strict=True) if kept],
        batch.ended[rows],
    )


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
    kl_samples: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy on the problems, answer length, entropy, and exact KL to the reference.

    Args:
        policy_dir: A folder (or hub name) that transformers loads.
        reference_dir: The same of the reference, with the same vocabulary; None leaves KL out.
        problems: Rows with `question` and `answer`.
        max_new_tokens: Where an answer is cut off.
        batch_size: Answers generated at a time.
        samples: Sampled answers to each problem.
        kl_samples: The first so many of them have KL and entropy measured; None: all.
        temperature: Of the samples and of both distributions of the KL; above 0.
        seed: Of the samples.

    Returns:
        `accuracy` of the greedy answers; of the samples `sampled_accuracy`, `mixed_share` (problems
        with right and wrong samples), `pass_at` (k to the chance that k samples hold a right one),
        `response_tokens` (mean, eos included), `cut_share` (no eos); where there is a reference
        `kl_nats_per_answer` with `kl_standard_error` over problems, `kl_nats_per_token`,
        `forward_kl_nats_per_answer` with `forward_kl_standard_error`, `entropy_nats_per_answer`.

    Raises:
        ValueError: No problem, no chat template, samples < 1, temperature <= 0, other vocabulary.
    """
    if not problems:
        raise ValueError("no problem to evaluate on")
    if samples < 1 or temperature <= 0:
        raise ValueError(f"needs samples >= 1 and temperature > 0: {samples=}, {temperature=}")
    kl_samples = samples if kl_samples is None else kl_samples
    if not 1 <= kl_samples <= samples:
        raise ValueError(f"needs 1 <= kl_samples <= samples: {kl_samples=}, {samples=}")
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

    def sampled(model: Any, each: int) -> Iterator[tuple[list[int], Answers]]:
        """Batches of whole problems, `each` answers to a problem."""
        for part in _batches(order, max(1, batch_size // each)):
            repeated = [i for i in part for _ in range(each)]
            yield (
                repeated,
                answers(
                    model,
                    tokenizer,
                    [prompts[i] for i in repeated],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                ),
            )

    right, lengths, ended, kls, entropies, forward_kls = [], [], [], [], [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for places, batch in sampled(policy, samples):
            right += [
                is_correct(text, problems[i]["answer"])
                for i, text in zip(places, batch.texts, strict=True)
            ]
            lengths.append(batch.lengths)
            ended.append(batch.ended)
            if reference is not None:
                some = first_of_each(batch, kl_samples, samples)
                kl, entropy = kl_and_entropy(policy, reference, some, temperature=temperature)
                kls.append(kl)
                entropies.append(entropy)
        if reference is not None:
            for _, batch in sampled(reference, kl_samples):
                forward_kls.append(exact_kl(reference, policy, batch, temperature=temperature))

    count = len(problems)
    counts = torch.tensor(right).view(count, samples).sum(-1)
    tokens = torch.cat(lengths).double()
    result: dict[str, Any] = {
        "problems": count,
        "samples": samples,
        "temperature": temperature,
        "accuracy": sum(greedy) / count,
        "sampled_accuracy": counts.double().mean().item() / samples,
        "mixed_share": ((counts > 0) & (counts < samples)).double().mean().item(),
        "pass_at": {
            str(k): sum(pass_at(k, c, samples) for c in counts.tolist()) / count
            for k in ks(samples)
        },
        "response_tokens": tokens.mean().item(),
        "cut_share": 1 - torch.cat(ended).double().mean().item(),
        "kl_nats_per_answer": None,
        "kl_standard_error": None,
        "kl_nats_per_token": None,
        "forward_kl_nats_per_answer": None,
        "forward_kl_standard_error": None,
        "entropy_nats_per_answer": None,
    }
    if reference is not None:
        # Samples of one problem are not independent: the errors are those of the problems' means.
        for name, values in (("kl", kls), ("forward_kl", forward_kls)):
            means = torch.cat(values).view(count, kl_samples).mean(-1)
            result[f"{name}_nats_per_answer"] = means.mean().item()
            if count > 1:
                result[f"{name}_standard_error"] = (means.std() / count**0.5).item()
        measured = tokens.view(count, samples)[:, :kl_samples].sum()
        result["kl_nats_per_token"] = (torch.cat(kls).sum() / measured).item()
        result["entropy_nats_per_answer"] = torch.cat(entropies).mean().item()
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
