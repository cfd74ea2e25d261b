"""How good is each formulation's gradient on a real language model?

SmolLM2-135M-Instruct is the reference. Its upper layers are fine-tuned a little, more and much, and
each of the three policies answers short questions. A formulation gives a gradient for every answer.
It is compared with the gradient of KL(pi||ref) that is exact over the vocabulary:

- LOC: ``sum_t grad D_t``, D_t the KL of the next token's distribution, prefixes held fixed;
- FULL: ``sum_t (grad D_t + s_t sum_{s>t} D_s)``, of whole answers, ``s_t = grad log pi(y_t)``.

Both by their mean over answers that the compared estimate has not seen. Nothing is trained by RL.

Gradients are taken in a random subspace of the last layer. Each of its seven matrices W becomes
``W + L A R^T`` with fixed random L and R. The gradient is that of A at 0. It is a linear map of the
layer's full gradient, the same for estimate and truth.

    python -m recipes.reproduce.gradient_study --model DIR [--answers 384]

The results, a line for each policy and formulation, go to ``results/gradient_study.jsonl``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import klplug
from klplug import kl_term, parse, reward_to_go
from recipes.reproduce.stock_kl import STOCK

RESULTS = Path(__file__).parent / "results" / "gradient_study.jsonl"
TUNED = 4  # upper layers that fine-tuning moves; those below are shared with the reference
RANK = 16  # A is RANK x RANK in each matrix
POLICIES = {"a little": 3, "more": 12, "much": 36}  # steps of fine-tuning
SIZES = (4, 16, 64, 192)  # answers in an estimate
DRAWS = 100
FORMS = (
    "k1_as_loss,ratio=none",
    "k2_as_loss",
    "k2_as_loss,bound=2",
    "k3_as_loss",
    "abs_as_loss",
    "stock:verl:k3",
    "stock:openrlhf:k2",
    "stock:openrlhf:k3",
    "k2_as_loss,horizon=sequence",
    "k2_as_loss,horizon=sequence,baseline=group",
    "k1_in_reward",
    "k2_in_reward",
    "k3_in_reward",
)
EXACT = "exact over the vocabulary"


# ── Gradients in a subspace of the last layer ────────────────────────────────────────────────────


@dataclass(frozen=True)
class Subspace:
    """Random L (out, rank) and R (in, rank) for each linear map of a layer, by name."""

    left: dict[str, Tensor]
    right: dict[str, Tensor]

    @classmethod
    def of(cls, layer: nn.Module, rank: int, seed: int = 0) -> Subspace:
        generator = torch.Generator().manual_seed(seed)
        left, right = {}, {}
        for name, module in linears(layer).items():
            out, into = module.weight.shape
            dtype = module.weight.dtype
            for side, size in ((left, out), (right, into)):
                drawn = torch.randn(size, rank, generator=generator) / math.sqrt(size)
                side[name] = drawn.to(module.weight.device, dtype)
        return cls(left, right)


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}


def rotary(model: Any, hidden: Tensor) -> Any:
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    return model.model.rotary_emb(hidden, positions)


def through(model: Any, layers: Any, hidden: Tensor) -> Tensor:
    """``hidden`` (B, positions, width) through some of the decoder's layers, causally."""
    embeddings = rotary(model, hidden)
    for layer in layers:
        hidden = layer(hidden, position_embeddings=embeddings)
    return hidden


@dataclass(frozen=True)
class Scored:
    """What a batch of answers says about a policy: B answers of T tokens, K parameters.

    ``score`` is grad log pi of each token (B, T, K), ``exact`` is sum_t grad D_t (B, K).
    """

    log_probs: Tensor
    ref_log_probs: Tensor
    divergence: Tensor  # D_t
    mask: Tensor
    score: Tensor
    exact: Tensor

    @property
    def full(self) -> Tensor:
        """FULL's estimate for each answer, exact over the vocabulary: (B, K)."""
        later = reward_to_go(self.divergence) - self.divergence
        return self.exact + torch.einsum("bt,btk->bk", later, self.score)


def scored(
    policy: Any, ref: Any, space: Subspace, lower: Tensor, answers: Tensor, mask: Tensor
) -> Scored:
    """Log-probs, exact divergences and gradients of sampled answers.

    Args:
        lower: (B, positions, width), what enters the first of the upper layers. It is of the prompt
            and all tokens but the last.
        answers, mask: (B, T); masked after the end of an answer.
    """
    length = answers.shape[1]
    upper = policy.model.layers[-TUNED:]
    with torch.no_grad():
        ref_hidden = through(ref, ref.model.layers[-TUNED:], lower)[:, -length:]
        ref_log = ref.lm_head(ref.model.norm(ref_hidden)).log_softmax(-1)
        entering = through(policy, upper[:-1], lower)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, given, out, name=name: (
                inputs.__setitem__(name, given[0].detach()),
                outputs.__setitem__(name, out),
            )[-1]
        )
        for name, module in linears(upper[-1]).items()
    ]
    with torch.enable_grad():
        hidden = through(policy, upper[-1:], entering.requires_grad_())
        hidden = policy.model.norm(hidden)[:, -length:]
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        weight = policy.lm_head.weight
        log = policy.lm_head(hidden).log_softmax(-1)
        p, log_ratio = log.exp(), log - ref_log
        divergence = (p * log_ratio).sum(-1) * mask
        # With respect to the hidden state: of log pi(y_t), and of D_t.
        of_score = weight[answers] - p @ weight
        of_divergence = (p * (log_ratio - divergence.unsqueeze(-1))) @ weight
        index = answers.unsqueeze(-1)
        log_probs, ref_log_probs = (x.gather(-1, index).squeeze(-1) * mask for x in (log, ref_log))
    projected = {name: inputs[name] @ space.right[name] for name in outputs}

    def gradient(cotangent: Tensor) -> Tensor:
        found = torch.autograd.grad(
            hidden, list(outputs.values()), cotangent * mask.unsqueeze(-1), retain_graph=True
        )
        return torch.cat(
            [
                torch.einsum("bpk,bpj->bkj", delta @ space.left[name], projected[name]).flatten(1)
                for name, delta in zip(outputs, found, strict=True)
            ],
            -1,
        )

    tokens = torch.eye(length, dtype=hidden.dtype, device=hidden.device)
    score = [gradient(of_score * tokens[t][:, None]) for t in range(length)]
    return Scored(
        log_probs,
        ref_log_probs,
        divergence,
        mask,
        torch.stack(score, 1),
        gradient(of_divergence),
    )


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def sampled(
    policy: Any, prompts: Tensor, each: int, length: int, end: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Answers at temperature 1 from the whole vocabulary, ``each`` to every prompt.

    Returns the answers and their mask, (B, length), and what entered the first upper layer.
    """
    seen: list[Tensor] = []
    hook = policy.model.layers[-TUNED].register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    out = policy(input_ids=prompts, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    cache.batch_repeat_interleave(each)
    logits = out.logits[:, -1].repeat_interleave(each, 0)
    answers: list[Tensor] = []
    for step in range(length):
        answers.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        if step < length - 1:
            out = policy(input_ids=answers[-1], past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1]
    hook.remove()
    tokens = torch.cat(answers, 1)
    ended = (tokens == end).long().cumsum(-1) - (tokens == end).long()
    lower = torch.cat([seen[0].repeat_interleave(each, 0), *seen[1:]], 1)
    return tokens, (ended == 0).to(lower.dtype), lower


def question(rng: Random) -> tuple[str, str]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"What is {a} + {b}?", f"{a} + {b} = {a + b}. #### {a + b}"


def prompt(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def fine_tuned(ref: Any, tokenizer: Any, steps: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """Policies along one run of supervised fine-tuning of the upper layers on worked sums."""
    rng = Random(0)
    texts = [question(rng) for _ in range(48)]
    rows, starts = [], []
    for asked, answer in texts:
        head = tokenizer(prompt(asked)).input_ids
        rows.append(head + tokenizer(answer + "<|im_end|>").input_ids)
        starts.append(len(head))
    longest = max(map(len, rows))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    device = ref.device
    tokens = torch.tensor([row + [end] * (longest - len(row)) for row in rows], device=device)
    wanted = torch.zeros(tokens.shape, dtype=torch.bool, device=device)
    for i, (start, row) in enumerate(zip(starts, rows, strict=True)):
        wanted[i, start : len(row)] = True
    with torch.no_grad():  # the lower layers never move
        lower = ref.model.embed_tokens(tokens)
        lower = through(ref, ref.model.layers[:-TUNED], lower)
    policy = copy.deepcopy(ref)
    moving = [p for layer in policy.model.layers[-TUNED:] for p in layer.parameters()]
    for p in moving:
        p.requires_grad_()
    optimizer = torch.optim.AdamW(moving, lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    done = 0
    for name, last in steps.items():
        while done < last:
            batch = torch.randint(len(rows), (8,), generator=generator).to(device)
            hidden = through(policy, policy.model.layers[-TUNED:], lower[batch])
            kept = wanted[batch][:, 1:]
            logits = policy.lm_head(policy.model.norm(hidden)[:, :-1][kept])
            loss = nn.functional.cross_entropy(logits, tokens[batch][:, 1:][kept])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
        yield name, copy.deepcopy(policy).requires_grad_(False)


# ── Formulations ─────────────────────────────────────────────────────────────────────────────────


def token_gradient(
    form: str, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, groups: Tensor | None
) -> Tensor:
    """What multiplies grad log pi of each token, (B, T): on-policy, one coefficient of 1."""
    leaf = log_probs.detach().clone().requires_grad_()
    if form in STOCK:
        loss = STOCK[form](leaf, ref_log_probs) * mask
    else:
        spec = parse(form)
        term = kl_term(spec, leaf, ref_log_probs, mask, old_log_probs=log_probs, group_ids=groups)
        if spec.placement == "in_reward":
            return reward_to_go(term.coefficient) * mask
        loss = term.loss
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return gradient


# ── Comparison ───────────────────────────────────────────────────────────────────────────────────


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(a, b, dim=-1)


def across(a: Tensor, b: Tensor) -> float:
    """``E[a] . E[b]`` from n pairs, without the products of an answer with itself: no noise in it.

    ``(sum a . sum b - sum_i a_i . b_i) / (n (n - 1))``.
    """
    n = len(a)
    return float(a.sum(0) @ b.sum(0) - (a * b).sum()) / (n * (n - 1))


def is_lost(x: Tensor) -> bool:
    """Whether the mean of x can't be told from 0: ``|E[x]|^2`` within two of its null's deviations.

    With mean 0 that estimate has the variance ``2 tr(Cov^2) / (n (n - 1))``. There ``tr(Cov^2)`` is
    the mean square of ``x_i . x_j``.
    """
    n = len(x)
    products = x @ x.T
    off = (products.square().sum() - products.diagonal().square().sum()) / (n * (n - 1))
    return across(x, x) < 2 * math.sqrt(2 * float(off) / (n * (n - 1)))


@dataclass(frozen=True)
class Limit:
    """What an estimate tends to with more answers, and its noise: of means, not of samples.

    ``cosine`` and ``norm`` are against the truth's mean; ``noise`` is tr Cov / |mean|^2 of one
    answer's gradient. nan where a mean is lost in its noise.
    """

    cosine: float
    norm: float
    noise: float

    @classmethod
    def of(cls, estimates: Tensor, truths: Tensor) -> Limit:
        if is_lost(estimates) or is_lost(truths):
            return cls(math.nan, math.nan, math.inf)
        estimates, truths = estimates.double(), truths.double()
        squared, true_squared = across(estimates, estimates), across(truths, truths)
        return cls(
            across(estimates, truths) / math.sqrt(squared * true_squared),
            math.sqrt(squared / true_squared),
            float(estimates.var(0).sum()) / squared,
        )

    def answers_for(self, wanted: float) -> float:
        """Answers until the cosine is ``wanted``: |mean|^2 grows to |mean|^2 (1 + noise/n)."""
        if not self.cosine > wanted:
            return math.inf
        return self.noise / ((self.cosine / wanted) ** 2 - 1)


def compared(estimates: Tensor, truths: Tensor, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Cosine and norm ratio of means of n answers with the truth of the other half: quartiles."""
    half = len(estimates) // 2
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"cosine": {}, "norm": {}}
    for n in (n for n in sizes if n <= half):
        cosines, norms = [], []
        for own, other in ((estimates[:half], truths[half:]), (estimates[half:], truths[:half])):
            truth = other.mean(0)
            for _ in range(DRAWS // 2):
                mean = own[torch.randperm(len(own), generator=generator)[:n]].mean(0)
                cosines.append(cosine(mean, truth))
                norms.append(mean.norm() / truth.norm())
        quartiles = torch.tensor([0.25, 0.5, 0.75])
        for name, values in (("cosine", cosines), ("norm", norms)):
            stacked = torch.stack(values).float()
            found[name][str(n)] = [round(x, 4) for x in stacked.quantile(quartiles).tolist()]
    limit = Limit.of(estimates, truths)
    found["limit"] = {
        "cosine": _number(limit.cosine),
        "norm": _number(limit.norm),
        "answers_for_0.9": _number(limit.answers_for(0.9)),
    }
    return found


def _number(x: float) -> float | None:
    return float(f"{x:.4g}") if math.isfinite(x) else None


def study(name: str, data: Scored, groups: Tensor, settings: dict[str, Any]) -> Iterator[dict]:
    """The lines of one policy: each formulation against both truths."""
    truths = {"LOC": data.exact, "FULL": data.full}
    for form in (*FORMS, EXACT, f"{EXACT}, whole answer"):
        if form.startswith(EXACT):
            estimates = truths["FULL" if "whole" in form else "LOC"]
            largest = None
        else:
            gradient = token_gradient(form, data.log_probs, data.ref_log_probs, data.mask, groups)
            estimates = torch.einsum("bt,btk->bk", gradient, data.score)
            largest = _number(float(gradient.abs().max()))
        yield {
            "policy": name,
            "form": form,
            **settings,
            "largest_coefficient": largest,
            **{target: compared(estimates, truth, SIZES) for target, truth in truths.items()},
        }


def on_cpu(data: Scored) -> Scored:
    return Scored(*(getattr(data, field).cpu() for field in Scored.__annotations__))


def joined(parts: list[Scored]) -> Scored:
    return Scored(*(torch.cat([getattr(p, f) for p in parts]) for f in Scored.__annotations__))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct, or a name")
    parser.add_argument("--answers", type=int, default=384, help="to each policy")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=10, help="of an answer, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    each = 8  # answers to a prompt in one batch, and a group of the baseline
    batch = each * given.prompts
    if given.answers % (2 * batch):
        parser.error(
            f"--answers {given.answers} must be a multiple of 2 x 8 x prompts, {2 * batch}"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ref = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).to(given.device)
    ref.requires_grad_(False).eval()
    rng = Random(1)
    rows = [tokenizer(prompt(question(rng)[0])).input_ids for _ in range(given.prompts)]
    prompts = torch.tensor(rows, device=given.device)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.unlink(missing_ok=True)
    started = time.process_time()
    for name, policy in fine_tuned(ref, tokenizer, POLICIES):
        space = Subspace.of(policy.model.layers[-1], RANK)
        generator = torch.Generator(given.device).manual_seed(1)
        parts = []
        for _ in range(given.answers // batch):
            answers, mask, lower = sampled(policy, prompts, each, given.tokens, end, generator)
            for part in torch.arange(batch).split(32):
                found = scored(policy, ref, space, lower[part], answers[part], mask[part])
                parts.append(on_cpu(found))
            print(
                f"{name}: {len(parts) * 32} answers, {time.process_time() - started:.0f} s",
                flush=True,
            )
        print(tokenizer.batch_decode(answers[:3]))
        data = joined(parts)
        groups = torch.arange(given.answers) // each
        log_ratio = data.log_probs - data.ref_log_probs
        settings = {
            "steps": POLICIES[name],
            "kl_per_answer": _number(float(data.divergence.sum(-1).mean())),
            "tokens_per_answer": _number(float(data.mask.sum(-1).mean())),
            "log_ratio_range": [_number(float(f(log_ratio))) for f in (torch.min, torch.max)],
            "answers": given.answers,
            "model": Path(given.model).name,
            "klplug": klplug.__version__,
            "torch": torch.__version__.partition("+")[0],
        }
        with given.out.open("a", encoding="utf-8", buffering=1) as file:
            for line in study(name, data, groups, settings):
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
