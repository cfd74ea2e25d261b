"""GRPO of a small language model on one GPU, with torch and transformers alone.

    python -m benchmarks.gpu_grpo --model DIR --out FILE [--device cuda] [--steps 150]

The model first learns the form of the task (`What is 17 + 25?`) by supervised steps: that policy is
start and reference. Then one run for each formulation: sampled answers, a reward of 1 for the right
sum, PPO's clip, two updates per rollout. A line of results every few rollouts; the KL is exact over
the vocabulary, at the prefixes of the rollout. No host takes part: this shows the core on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import klplug
from klplug import policy_loss
from recipes.reproduce.gradient_study import prompt, question, sampled
from recipes.reproduce.stock_kl import STOCK

KL_TYPES = ("k2_as_loss", "stock:verl:k3")
LENGTH = 20
UPDATES = 2
CLIP = 0.2
FINAL = re.compile(r"####\s*(-?\d+)")


def answer_log_probs(model: Any, prompts: Tensor, answers: Tensor) -> Tensor:
    """Of the whole vocabulary at each token of the answers: (B, T, V), float32."""
    given = torch.cat([prompts, answers[:, :-1]], 1)
    device = given.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = model(input_ids=given, logits_to_keep=answers.shape[1], use_cache=False).logits
    return logits.float().log_softmax(-1)


def supervised(model: Any, tokenizer: Any, steps: int, batch: int, rate: float) -> None:
    """Steps of maximum likelihood on worked sums, in place."""
    rng = Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for _ in range(steps):
        pairs = [question(rng) for _ in range(batch)]
        asked = [tokenizer(prompt(q)).input_ids for q, _ in pairs]
        wanted = [[*tokenizer(a).input_ids, end][:LENGTH] for _, a in pairs]
        longest = max(map(len, wanted))
        prompts = torch.tensor(asked, device=model.device)
        answers = torch.tensor(
            [row + [end] * (longest - len(row)) for row in wanted], device=model.device
        )
        mask = torch.tensor(
            [[float(t < len(row)) for t in range(longest)] for row in wanted], device=model.device
        )
        log_probs = answer_log_probs(model, prompts, answers)
        loss = -(log_probs.gather(-1, answers[..., None])[..., 0] * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def is_right(text: str, answer: str) -> bool:
    given, wanted = FINAL.search(text), FINAL.search(answer)
    return given is not None and wanted is not None and given[1] == wanted[1]


def grpo(
    ref: Any, tokenizer: Any, kl_type: str, given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One run; what it yields is of the rollout that was just sampled, before its updates."""
    policy = copy.deepcopy(ref).requires_grad_()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=given.rate, weight_decay=0.0)
    generator = torch.Generator(given.device).manual_seed(given.seed)
    rng = Random(given.seed)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stock = STOCK.get(kl_type)
    started = time.perf_counter()
    for step in range(given.steps):
        pairs = [question(rng) for _ in range(given.prompts)]
        prompts = torch.tensor([tokenizer(prompt(q)).input_ids for q, _ in pairs]).to(given.device)
        answers, mask, _ = sampled(policy, prompts, given.group, LENGTH, end, generator)
        prompts = prompts.repeat_interleave(given.group, 0)
        texts = tokenizer.batch_decode(answers * mask.long() + end * (1 - mask.long()))
        right = [is_right(text, pairs[i // given.group][1]) for i, text in enumerate(texts)]
        reward = torch.tensor(right, device=given.device).float().view(-1, given.group)
        advantage = (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-6)
        advantage = advantage.view(-1, 1).expand_as(mask)
        index = answers.unsqueeze(-1)
        with torch.no_grad():
            log_ref = answer_log_probs(ref, prompts, answers)
            log_old = answer_log_probs(policy, prompts, answers)
            kl = ((log_old.exp() * (log_old - log_ref)).sum(-1) * mask).sum(-1).mean()
            ref_log_probs, old = (x.gather(-1, index).squeeze(-1) for x in (log_ref, log_old))
            del log_ref, log_old
        for _ in range(UPDATES):
            log_probs = answer_log_probs(policy, prompts, answers).gather(-1, index).squeeze(-1)
            loss = policy_loss(
                "none" if stock else kl_type,
                log_probs,
                ref_log_probs,
                mask,
                old_log_probs=old,
                advantages=advantage,
                kl_coef=given.beta,
                clip_range=CLIP,
            )
            if stock is not None:
                loss = loss + given.beta * stock(log_probs, ref_log_probs) * mask
            optimizer.zero_grad()
            (loss.sum() / len(answers)).backward()
            norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        if step % given.every == 0 or step == given.steps - 1:
            yield {
                "kl_type": kl_type,
                "step": step,
                "reward": round(float(reward.mean()), 4),
                "kl_per_answer": round(float(kl), 4),
                "tokens": round(float(mask.sum(-1).mean()), 2),
                "gradient_norm": round(float(norm), 4),
                "seconds": round(time.perf_counter() - started, 2),
            }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kl-type", action="append", help="may be given again; default: both")
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--rate", type=float, default=5e-6)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--supervised-steps", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(argv)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ref = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).to(given.device)
    supervised(ref, tokenizer, given.supervised_steps, given.prompts, 1e-4)
    ref.requires_grad_(False).eval()
    on_gpu = given.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if on_gpu else "cpu"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", encoding="utf-8", buffering=1) as file:
        for kl_type in given.kl_type or KL_TYPES:
            for line in grpo(ref, tokenizer, kl_type, given):
                line |= {
                    "beta": given.beta,
                    "machine": machine,
                    "klplug": klplug.__version__,
                    "torch": torch.__version__,
                }
                print(json.dumps(line), flush=True)
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
