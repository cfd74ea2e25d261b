"""What parts an exact KL's gradient from the mean of sampled ones in bfloat16?

    python -m benchmarks.exact_bfloat16 [--out benchmarks/results]

A small model in bfloat16, whose output layer is run in bfloat16, as hosts do, or in float32 on the
same hidden states. The mean of the gradients of ``k2`` is taken over all tokens, each weighed by
its probability, so that it has no noise of sampling; and over some draws, so that it has.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import klplug

TOKENS = VOCABULARY = 96
WIDTH = 32
SCALES = (1.0, 4.0)  # of the output matrix: logits of this size
DRIFTS = (0.5, 0.05, 0.01)  # of each parameter, over its mean size
DRAWS = (16, 64)

HEADING = f"""# bfloat16: the exact gradient and the mean of sampled ones

`python -m benchmarks.exact_bfloat16`, on a CPU: {TOKENS} prefixes, {VOCABULARY} tokens, a model of
two layers in bfloat16. Each number is the distance of two gradients of all parameters, over the
norm of the second. Truth is that of the same weights in float64. "Mean" is the mean of `k2`'s
gradients over all tokens by their probability, with the output layer in bfloat16 or float32.
"Draws" is the mean of so many sampled tokens after each prefix, with the output layer in float32.
"""


def models(scale: float, drift: float) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Policy and reference, in bfloat16."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.RMSNorm(WIDTH),
    )
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    nn.init.normal_(head.weight, 0.0, scale / WIDTH**0.5)
    reference = nn.ModuleDict({"body": body, "head": head})
    policy = copy.deepcopy(reference)
    for parameter in reference.parameters():
        noise = torch.randn(parameter.shape)
        parameter.data += drift * parameter.data.abs().mean() * noise
    return policy.bfloat16(), reference.bfloat16()


def log_softmax(model: Any, tokens: Tensor, head: torch.dtype, wide: torch.dtype) -> Tensor:
    """(N, V) in ``wide``, of logits that are made in ``head``."""
    logits = model.body(tokens).to(head) @ model.head.weight.to(head).T
    return logits.to(wide).log_softmax(-1)


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def measured(scale: float, drift: float) -> list[float]:
    """The KL and the distances, in the order of the table's columns."""
    policy, reference = models(scale, drift)
    tokens = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))

    double = torch.float64
    wide, wide_reference = copy.deepcopy(policy).double(), copy.deepcopy(reference).double()
    log_p = log_softmax(wide, tokens, double, double)
    with torch.no_grad():
        log_q = log_softmax(wide_reference, tokens, double, double)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    truth = gradient(kl, wide)

    made: Any = policy
    given: Any = reference
    with torch.no_grad():
        ref_hidden = given.body(tokens)
    result = klplug.exact_kl(
        made.body(tokens), made.head.weight, ref_hidden, given.head.weight, tokens
    )
    exact = gradient(result.kl.mean(), policy)

    def k2(sampled: Tensor, weight: Tensor, head: torch.dtype) -> Tensor:
        """The gradient of k2 where these tokens were drawn."""
        index = sampled[:, None]
        log_p = log_softmax(policy, tokens, head, torch.float32).gather(-1, index)[:, 0]
        with torch.no_grad():
            log_q = log_softmax(reference, tokens, head, torch.float32).gather(-1, index)[:, 0]
        return gradient((weight * (log_p - log_q).detach() * log_p).mean(), policy)

    found = [kl.item(), apart(exact, truth)]
    for head in (torch.bfloat16, torch.float32):
        with torch.no_grad():
            p = log_softmax(policy, tokens, head, torch.float32).exp()
        mean = torch.zeros_like(exact)
        for token in range(VOCABULARY):
            mean += k2(torch.full_like(tokens, token), p[:, token], head)
        found += [apart(mean, exact), apart(mean, truth)]
    generator, total = torch.Generator().manual_seed(2), torch.zeros_like(exact)
    for draw in range(1, max(DRAWS) + 1):
        sampled = torch.multinomial(p, 1, generator=generator)[:, 0]
        total += k2(sampled, torch.ones(TOKENS), torch.float32)
        if draw in DRAWS:
            found.append(apart(total / draw, exact))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    columns = [
        *("logits", "KL", "exact, truth", "mean (bfloat16), exact", "mean (bfloat16), truth"),
        *("mean (float32), exact", "mean (float32), truth"),
        *(f"{n} draws, exact" for n in DRAWS),
    ]
    lines = [HEADING, "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for scale in SCALES:
        for drift in DRIFTS:
            kl, *distances = measured(scale, drift)
            cells = [f"{scale:g}", f"{kl:.2g}", *(f"{x:.3f}" for x in distances)]
            lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join([*lines, ""])
    if given.out is None:
        print(text)
    else:
        (given.out / "exact-bfloat16.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
