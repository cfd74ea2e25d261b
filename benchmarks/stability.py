"""What many updates per rollout do to each way of correcting a KL: exact, on one enumerated token.

    python -m benchmarks.stability [--out FOLDER] [--figure FILE]

Outer loop: answers from pi_old. Inner loop: N exact gradient steps on E_old[rho r] - beta * KL
term. All three terms have pi* = ref exp(r/beta)/Z as fixed point of the outer loop; whether the
loop stays there, the spectral radius of its Jacobian at pi* says: above 1 it leaves.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klplug import kl_term, parse
from klplug.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REWARD = torch.tensor([1.0, 0.6, 0.1, 0.0, 0.3], dtype=torch.float64)
REF = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15], dtype=torch.float64)
BETA, RATE = 0.5, 0.5
UPDATES = (1, 2, 4, 8, 16, 32, 64, 128)

FORMS = {
    "corrected": "k2_as_loss,cap=none",
    "uncorrected": "k2_as_loss,ratio=none",
    "frozen": "k1_in_reward",
}

HEADING = f"""# Many updates per rollout

`python -m benchmarks.stability`: one token of five outcomes, enumerated, beta {BETA}, step {RATE}.
Spectral radius at pi* of the map from one rollout's policy to the next's (above 1 the loop leaves
pi*), and the KL where it then goes: one number where it settles, else the cycle's ends."""


def optimum() -> Tensor:
    return (REF.log() + REWARD / BETA).softmax(-1)


def rollout(logits: Tensor, kl_type: str, updates: int) -> Tensor:
    """The logits after ``updates`` exact gradient steps on answers of the policy they started from.

    ``kl_type`` in the reward is frozen where the rollout began; as a loss it is what it is now.
    """
    ref, mask = REF.log()[:, None], torch.ones(5, 1)
    old = logits.log_softmax(-1)
    in_reward, as_loss = parse(kl_type).placed("in_reward"), parse(kl_type).placed("as_loss")
    frozen = kl_term(in_reward, old[:, None], ref, mask).coefficient[:, 0]
    for _ in range(updates):
        logits = logits.detach().requires_grad_()
        log_probs = logits.log_softmax(-1)
        term = kl_term(as_loss, log_probs[:, None], ref, mask, old_log_probs=old[:, None])
        rho = (log_probs - old).exp()
        loss = (old.exp() * (BETA * term.loss[:, 0] - rho * (REWARD - BETA * frozen))).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = logits.detach() - RATE * gradient
    return logits


def spectral_radius(kl_type: str, updates: int) -> float:
    """Of the outer map's Jacobian at pi*, on logits up to a constant, by central differences."""
    # Adding a constant moves no policy: left in, it would be an eigenvalue of 1.
    basis = torch.linalg.qr(torch.cat([torch.ones(5, 1), torch.eye(5)[:, :4]], 1).double()).Q[:, 1:]
    start, step = optimum().log(), 1e-5
    columns = [
        (rollout(start + step * x, kl_type, updates) - rollout(start - step * x, kl_type, updates))
        for x in basis.T
    ]
    jacobian = basis.T @ torch.stack(columns, -1) / (2 * step)
    return float(torch.linalg.eigvals(jacobian).abs().max())


def path(kl_type: str, updates: int, rollouts: int) -> Iterator[Tensor]:
    """The policy after each rollout, from the reference on."""
    logits = REF.log()
    for _ in range(rollouts):
        logits = rollout(logits, kl_type, updates)
        yield logits.softmax(-1)


def kl(policy: Tensor) -> float:
    return float((policy * (policy.clamp(min=1e-300).log() - REF.log())).sum())


@dataclass(frozen=True)
class Outcome:
    radius: float
    distance: float  # total variation from pi*, the largest over the last rollouts
    lowest: float  # KL to the reference over the last rollouts
    highest: float


def outcome(kl_type: str, updates: int, last: int = 20) -> Outcome:
    rollouts = 60 + 800 // updates
    policies = list(path(kl_type, updates, rollouts))[-last:]
    kls = [kl(policy) for policy in policies]
    distance = max(float((p - optimum()).abs().sum() / 2) for p in policies)
    return Outcome(spectral_radius(kl_type, updates), distance, min(kls), max(kls))


def table() -> str:
    lines = [
        "| updates per rollout | "
        + " | ".join(f"{name}: radius | KL in the end" for name in FORMS)
        + " |",
        "| --- |" + " --- |" * (2 * len(FORMS)),
    ]
    for updates in UPDATES:
        cells = [str(updates)]
        for kl_type in FORMS.values():
            result = outcome(kl_type, updates)
            settled = result.highest - result.lowest < 1e-6
            span = (
                f"{result.highest:.3f}"
                if settled
                else f"{result.lowest:.3f} to {result.highest:.3f}"
            )
            cells += [f"{result.radius:.3f}", span]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(file: Path) -> None:
    """An SVG, for a light and a dark page."""
    import matplotlib

    with matplotlib.rc_context(plots.settings(file.stem)):
        drawn = plots.text_of(radii_and_paths(), file.stem)
    file.write_text(plots.standalone(drawn), encoding="utf-8")


def radii_and_paths() -> Figure:
    from matplotlib.figure import Figure

    colours = dict(zip(FORMS, ("tab:blue", "tab:orange", "tab:red"), strict=True))
    drawn = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for name, kl_type in FORMS.items():
        left.plot(
            UPDATES,
            [spectral_radius(kl_type, n) for n in UPDATES],
            marker="o",
            color=colours[name],
            label=f"{name}: {kl_type}",
        )
        kls = [kl(policy) for policy in path(kl_type, 64, 40)]
        right.plot(range(1, 41), kls, marker=".", color=colours[name])
    left.axhline(1, color="grey", linewidth=1, linestyle="--")
    left.set(xscale="log", yscale="log", xlabel="updates per rollout")
    left.set(ylabel="spectral radius at the optimum")
    left.set_xticks(UPDATES, [str(n) for n in UPDATES])
    left.xaxis.set_minor_formatter("")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    left.legend(fontsize=8)
    right.axhline(kl(optimum()), color="grey", linewidth=1, linestyle="--")
    right.set(xlabel="rollout", ylabel="KL(pi‖ref), nats", title="64 updates per rollout")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--figure", type=Path, default=Path("docs/img/stability.svg"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    text = table()
    (given.out / "stability.md").write_text(f"{HEADING}\n\n{text}\n", encoding="utf-8")
    figure(given.figure)
    print(text)


if __name__ == "__main__":
    main()
