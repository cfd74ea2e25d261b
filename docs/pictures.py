"""Pictures for people who look before they read; ``docs.build`` draws them into docs/img."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from docs import plant
from klplug.report.plots import COLOURS, INK

BLUE, ORANGE = COLOURS[:2]
STUDY = Path(__file__).parents[1] / "recipes" / "reproduce" / "results" / "gradient_study.jsonl"


def full_and_loc(axes: Any) -> None:
    """Who answers for a token's KL: LOC, the token alone; FULL, all that came before it too."""
    axes.set(xlim=(-0.6, 5.6), ylim=(-1.75, 1.75))
    axes.axis("off")
    for token in range(5):
        box = {"boxstyle": "round,pad=0.45", "facecolor": "none", "edgecolor": INK}
        axes.text(token, 0, f"y{token + 1}", ha="center", va="center", bbox=box)
    late = {"arrowstyle": "->", "color": BLUE, "connectionstyle": "arc3,rad=0.35", "shrinkB": 14}
    for token in range(4):
        axes.annotate("", (token, 0.2), (4, 0.3), arrowprops=late)
    own = {"arrowstyle": "->", "color": BLUE, "connectionstyle": "arc3,rad=-1.6", "shrinkB": 10}
    axes.annotate("", (4.12, 0.2), (4.3, 0.3), arrowprops=own)
    axes.text(0, 1.55, "FULL: the KL of y5 is credited to every token before it", color=BLUE)
    alone = {"arrowstyle": "->", "color": ORANGE, "connectionstyle": "arc3,rad=1.6", "shrinkB": 10}
    for token in range(5):
        axes.annotate("", (token + 0.12, -0.25), (token + 0.3, -0.35), arrowprops=alone)
    axes.text(0, -1.35, "LOC: each token answers for its own KL alone", color=ORANGE)


def dead_zone(axes: Any) -> None:
    """c of k3 as a loss with verl's clamp of the value at 10, and without."""
    x = [i / 50 for i in range(-200, 651)]
    c = [1 - math.exp(-value) for value in x]
    held = [
        number if math.exp(-value) - 1 + value <= 10 else 0.0
        for value, number in zip(x, c, strict=True)
    ]
    axes.plot(x, c, color=BLUE, label="k3_as_loss")
    axes.plot(x, held, "--", color=ORANGE, label="k3 as a loss with the value clamped at 10")
    axes.axhline(0, color="#808080", linewidth=0.8)
    axes.set(ylim=(-16, 4), xlabel="x = log(pi/ref) of a token, nats", ylabel="c")
    axes.legend(frameon=False, labelcolor=INK, loc="lower right")


def group_norm(axes: Any) -> None:
    """The force of an in-reward KL against the spread of a group's rewards, for beta = 1."""
    sigma = [i / 100 for i in range(5, 101)]
    axes.plot(sigma, [1 / s for s in sigma], color=ORANGE, label="joined before: beta / sigma")
    axes.plot(sigma, [1.0 for _ in sigma], color=BLUE, label="joined after: beta")
    axes.set(
        ylim=(0, 12),
        xlabel="sigma: standard deviation of the rewards in a group",
        ylabel="force of the KL, beta = 1",
    )
    axes.legend(frameon=False, labelcolor=INK)


def kl_in_grpo(axes: Any) -> None:
    """GRPO from answers to update: a KL joins the reward before or after the group, or the loss."""
    axes.set(xlim=(-1.1, 11.1), ylim=(-2.4, 2.2))
    axes.axis("off")
    box = {"boxstyle": "round,pad=0.45", "facecolor": "none", "edgecolor": INK}
    along = {"arrowstyle": "->", "color": INK}
    stages = ("answers", "rewards", "group norm", "advantages", "loss", "update")
    places = [2 * i for i in range(len(stages))]
    for place, stage in zip(places, stages, strict=True):
        name = stage.replace(" ", "\n")
        axes.text(place, 0, name, ha="center", va="center", fontsize=8, bbox=box)
    for place in places[:-1]:
        axes.annotate("", (place + 1.12, 0), (place + 0.85, 0), arrowprops=along)
    enters = (
        (2, 1.5, BLUE, "in the reward,\nbefore (verl)"),
        (6, 1.5, BLUE, "in the reward,\nafter (OpenRLHF, klplug)"),
        (8, -1.6, ORANGE, "as a loss"),
    )
    for place, height, colour, words in enters:
        arrow = {"arrowstyle": "->", "color": colour, "shrinkB": 12}
        axes.annotate(
            *(words, (place, 0), (place, height)),
            **{"color": colour, "ha": "center", "va": "center", "fontsize": 9},
            arrowprops=arrow,
        )


def answers_needed(axes: Any) -> None:
    """Answers for a cosine of 0.9 with the own token's gradient: KL sampled, and KL exact."""
    lines = [json.loads(line) for line in STUDY.read_text().splitlines()]
    for place, (form, words) in enumerate(
        {"k2_as_loss": "k2_as_loss", "exact over the vocabulary": "exact_as_loss"}.items()
    ):
        found = {line["kl_per_answer"]: line["LOC"] for line in lines if line["form"] == form}
        needed = [math.ceil(loc["limit"]["answers_for_0.9"]) for loc in found.values()]
        at = [policy + 0.36 * (place - 0.5) for policy in range(len(needed))]
        bars = axes.bar(at, needed, 0.34, color=(ORANGE, BLUE)[place], label=words)
        axes.bar_label(bars, color=INK)
    axes.set(yscale="log", ylim=(1, 600), ylabel="answers for a cosine of 0.9")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(found)), [f"KL {kl:.2g}" for kl in found])
    axes.set_xlabel("policy: nats per answer from SmolLM2-135M")
    axes.legend(frameon=False, labelcolor=INK, loc="upper left")


PICTURES = {
    "answers-needed": answers_needed,
    "controllers": plant.picture,
    "dead-zone": dead_zone,
    "full-and-loc": full_and_loc,
    "group-norm": group_norm,
    "kl-in-grpo": kl_in_grpo,
}
