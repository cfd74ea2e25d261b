"""How much of the exact KL do the reference's K most likely tokens hold, all others being one?

    python -m benchmarks.top_k --model SmolLM2-135M-Instruct [--out benchmarks/results]

For ``vocab=topk:K``. The policies are those of the gradient study: SmolLM2-135M-Instruct fine-tuned
on worked sums a little, more and much. The reference is the model as it was. Each policy answers
sums, on which it is sharp, and open questions, on which it is flat. KL(pi||ref) of its own answers'
tokens by ``exact_kl`` is compared with ``topk_kl``, and so are their gradients towards the policy's
hidden states. The K tokens are the most likely ones of the reference (what it can send) or of the
policy (what the reference could be asked for).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

import klplug
from recipes.reproduce.gradient_study import (
    POLICIES,
    TUNED,
    fine_tuned,
    prompt,
    question,
    sampled,
    through,
)

RESULTS = Path(__file__).parent / "results" / "exact-top-k.json"
SIZES = (1, 4, 16, 64, 256)
SUMS = [question(rng)[0] for rng in [Random(1)] for _ in range(8)]
OPEN = [
    "Tell me a story about a lighthouse.",
    "Why do people travel?",
    "Describe a city that does not exist.",
    "What makes a good teacher?",
    "Write a letter to an old friend.",
    "What will the world be like in a hundred years?",
    "Name some things that one could do on a rainy day.",
    "What is the sea like at night?",
]
TEXTS = {"sums": (SUMS, 10), "open questions": (OPEN, 24)}  # and tokens of an answer, at most
EACH = 4  # answers to a question


@torch.no_grad()
def states(
    policy: Any, ref: Any, tokenizer: Any, questions: list[str], length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of policy and reference at the answers' tokens, (N, H), and these, (N,)."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    generator = torch.Generator().manual_seed(1)
    parts: list[list[Tensor]] = [[], [], []]
    for text in questions:
        asked = torch.tensor([tokenizer(prompt(text)).input_ids])
        answers, mask, lower = sampled(policy, asked, EACH, length, end, generator)
        kept = mask.bool()
        for part, model in zip(parts, (policy, ref), strict=False):
            # The layers below are the reference's in both.
            hidden = through(model, model.model.layers[-TUNED:], lower)[:, -length:]
            part.append(model.model.norm(hidden)[kept])
        parts[2].append(answers[kept])
    policy_hidden, ref_hidden, tokens = (torch.cat(part) for part in parts)
    return policy_hidden, ref_hidden, tokens


def with_gradient(kl: Callable[[Tensor], klplug.ExactKL], hidden: Tensor) -> tuple[float, Tensor]:
    """The mean over tokens, and its gradient towards the hidden states."""
    leaf = hidden.detach().requires_grad_()
    mean = kl(leaf).kl.mean()
    (gradient,) = torch.autograd.grad(mean, leaf)
    return float(mean.detach()), gradient


def measured(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, tokens: Tensor) -> dict[str, Any]:
    """KL per token; by whose top tokens and by K the share of it, and the gradients' cosine."""
    whole, gradient = with_gradient(
        lambda leaf: klplug.exact_kl(leaf, weight, ref_hidden, weight, tokens), hidden
    )
    ref_top = klplug.top_log_probs(ref_hidden, weight, max(SIZES))
    mass = ref_top[1].exp().cumsum(-1).mean(0)
    top: dict[str, dict[int, dict[str, float]]] = {"ref": {}, "policy": {}}
    for whose in ("ref", "policy"):
        ids, log_probs = ref_top if whose == "ref" else asked_for(hidden, ref_hidden, weight)
        for k in SIZES:
            part, of_part = with_gradient(
                lambda leaf, ids=ids[:, :k], log_probs=log_probs[:, :k]: klplug.topk_kl(
                    leaf, weight, tokens, ids, log_probs
                ),
                hidden,
            )
            cosine = torch.nn.functional.cosine_similarity(
                of_part.flatten(), gradient.flatten(), dim=0
            )
            top[whose][k] = {"share": rounded(part / whole), "cosine": rounded(float(cosine))}
    return {
        "tokens": len(tokens),
        "kl": rounded(whole),
        "ref_mass": {k: rounded(float(mass[k - 1])) for k in SIZES},
        "top": top,
    }


def asked_for(hidden: Tensor, ref_hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's most likely tokens, and their log-probs by the reference."""
    ids, _ = klplug.top_log_probs(hidden, weight, max(SIZES))
    parts = [
        (rows @ weight.T).log_softmax(-1).gather(-1, index)
        for rows, index in zip(ref_hidden.split(64), ids.split(64), strict=True)
    ]
    return ids, torch.cat(parts)


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


def results(model: Path) -> Iterator[dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ref = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ref.requires_grad_(False).eval()
    for name, policy in fine_tuned(ref, tokenizer, POLICIES):
        for text, (questions, length) in TEXTS.items():
            hidden, ref_hidden, tokens = states(policy, ref, tokenizer, questions, length)
            found = measured(hidden, ref_hidden, ref.lm_head.weight, tokens)
            yield {"policy": name, "steps": POLICIES[name], "text": text, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS.parent)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for line in results(given.model):
        lines.append(line)
        print(json.dumps(line), flush=True)
    made = {
        "model": given.model.name,
        "torch": torch.__version__.partition("+")[0],
        "klplug": klplug.__version__,
        "results": lines,
    }
    text = json.dumps(made, indent=1)
    (given.out / RESULTS.name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
