"""``python -m toyrl.train``: REINFORCE over five answers of one token, with a KL as loss."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

REWARD = torch.tensor([1.0, 0.2, 0.0, 0.5, 0.1])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="toyrl")
    made.add_argument("--kl-kind", default="k3")
    made.add_argument("--kl-coef", type=float, default=0.1)
    made.add_argument("--samples", type=int, default=4)
    made.add_argument("--steps", type=int, default=1)
    return made


def kl_loss(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Per token, (B, T)."""
    log_ratio = log_probs - ref_log_probs
    if kind == "k1":
        return log_ratio * mask
    if kind == "k3":
        return (torch.exp(-log_ratio) - 1 + log_ratio) * mask
    raise NotImplementedError(kind)


def train(args: argparse.Namespace) -> Tensor:
    """The policy's logits after training."""
    torch.manual_seed(0)
    logits = torch.zeros(5, requires_grad=True)
    reference = torch.tensor([0.3, 0.1, 0.2, 0.3, 0.1]).log()
    for _ in range(args.steps):
        log_probs = logits.log_softmax(-1)
        answers = torch.multinomial(log_probs.exp().detach(), args.samples, replacement=True)
        own, ref = log_probs[answers][:, None], reference[answers][:, None]
        kl = kl_loss(own, ref, torch.ones_like(own), args.kl_kind)
        loss = (args.kl_coef * kl - REWARD[answers][:, None] * own).mean()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - gradient).detach().requires_grad_(True)
    return logits.detach()


if __name__ == "__main__":
    print(train(parser().parse_args()).tolist())
