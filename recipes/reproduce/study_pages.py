"""docs/closed-form.md and docs/gradient-study.md, with their figures, from the committed results.

    python -m recipes.reproduce.study_pages

Nothing is measured here. Every number on the pages comes from a line of `results/`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klplug.report import plots
from recipes.reproduce import enumerable, gradient_study
from recipes.reproduce.enumerable import GRID, Cell, Task, joint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parents[2] / "docs"
SEEDS = 100
STUDENT = 1.9842  # 97.5 % of Student's t with 99 degrees of freedom
ALIKE = 0.1


# ── The enumerable task: claims and verdicts ─────────────────────────────────────────────────────


class Results:
    """The ends of the enumerable task's cells: one number a seed."""

    def __init__(self, path: Path = enumerable.RESULTS) -> None:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.lines = {enumerable._key(line): line for line in lines}

    def line(self, cell: Cell) -> dict[str, Any] | None:
        return self.lines.get(enumerable._key({**dataclasses.asdict(cell), "seeds": SEEDS}))

    def has(self, study: str) -> bool:
        return all(self.line(cell) is not None for cell in GRID if cell.study == study)

    def end(self, cell: Cell, name: str) -> Tensor:
        line = self.line(cell)
        if line is None:
            raise KeyError(cell)
        if name == "objective":
            return self.end(cell, "reward") - cell.beta * self.end(cell, "kl")
        return torch.tensor([float(x) for x in line["end"][name]], dtype=torch.float64)


def cell(study: str, kl_type: str, **settings: Any) -> Cell:
    """The one cell of GRID with these settings."""
    found = [
        c
        for c in GRID
        if c.study == study
        and c.kl_type == kl_type
        and all(getattr(c, name) == value for name, value in settings.items())
    ]
    if len(found) != 1:
        raise LookupError(f"{len(found)} cells of {study!r} are {kl_type} with {settings}")
    return found[0]


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and its 95 % t-interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        mean = float(values.mean())
        half = STUDENT * float(values.std()) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ({self.low:+.3g} to {self.high:+.3g})"


@dataclass(frozen=True)
class Compared:
    """One comparison: what was predicted, what came out."""

    what: str
    interval: Interval
    verdict: str  # holds, fails, not decided


def more(what: str, larger: Tensor, smaller: Tensor | float) -> Compared:
    interval = Interval.of(larger - smaller)
    verdict = "holds" if interval.low > 0 else "fails" if interval.high < 0 else "not decided"
    return Compared(what, interval, verdict)


def alike(what: str, one: Tensor, other: Tensor) -> Compared:
    interval = Interval.of(one - other)
    band = ALIKE * max(abs(float(one.mean())), abs(float(other.mean())))
    inside = -band < interval.low and interval.high < band
    outside = interval.low > band or interval.high < -band
    return Compared(what, interval, "holds" if inside else "fails" if outside else "not decided")


OWN, UNCORRECTED, WHOLE = enumerable.OWN, enumerable.UNCORRECTED, enumerable.WHOLE
BOUNDED = enumerable.BOUNDED
K1 = "k1_as_loss,ratio=none"


def closed_form(r: Results) -> list[Compared]:
    def end(kl_type: str, name: str) -> Tensor:
        return r.end(cell("closed", kl_type), name)

    found = []
    others = [c.kl_type for c in GRID if c.study == "closed"]
    for right in ("k1_in_reward", WHOLE):
        for other in others:
            if other not in ("k1_in_reward", WHOLE):
                found.append(
                    more(
                        f"`{other}` ends further from pi* than `{right}`",
                        end(other, "to_optimum"),
                        end(right, "to_optimum"),
                    )
                )
    found.append(
        more(
            f"`{OWN}` ends further from pi* than from the myopic policy",
            end(OWN, "to_optimum"),
            end(OWN, "to_myopic"),
        )
    )
    for name, where in (("to_optimum", "pi*"), ("to_myopic", "the myopic policy")):
        found.append(
            more(
                f"`k3_as_loss` ends further from {where} than from the forward policy",
                end("k3_as_loss", name),
                end("k3_as_loss", "to_forward"),
            )
        )
    for other in ("k3_in_reward", "k2_in_reward", K1, "none"):
        found.append(
            more(
                f"`{other}` ends further from pi* than `{OWN}`",
                end(other, "to_optimum"),
                end(OWN, "to_optimum"),
            )
        )
    return found


def study_a(r: Results) -> list[Compared]:
    def end(kl_type: str, n: int, name: str) -> Tensor:
        return r.end(cell("a", kl_type, updates=n), name)

    found = [
        alike(f"1 update: `{K1}` like `none` in {what}", end(K1, 1, name), end("none", 1, name))
        for name, what in (("reward", "E[r]"), ("kl", "KL(pi‖ref)"))
    ]
    for n in (4, 16):
        found.append(
            more(
                f"{n} updates: `{K1}` has more KL(ref‖pi) than `none`",
                end(K1, n, "kl_forward"),
                end("none", n, "kl_forward"),
            )
        )
    for n in (1, 4, 16):
        for name, what in (("reward", "E[r]"), ("kl", "KL(pi‖ref)")):
            found.append(
                alike(
                    f"{n} update{'s' * (n > 1)}: `k1_as_loss` like `none` in {what}",
                    end("k1_as_loss", n, name),
                    end("none", n, name),
                )
            )
    return found


def study_b(r: Results) -> list[Compared]:
    found = []
    for beta in (0.1, 0.3):

        def end(kl_type: str, name: str, beta: float = beta) -> Tensor:
            return r.end(cell("b", kl_type, beta=beta), name)

        for wrong in ("k3_in_reward", "k2_in_reward"):
            found += [
                more(
                    f"beta {beta}: `{wrong}` has more KL(ref‖pi) than `none`",
                    end(wrong, "kl_forward"),
                    end("none", "kl_forward"),
                ),
                more(
                    f"beta {beta}: `{wrong}` has a lower lowest log-probability than `none`",
                    end("none", "lowest"),
                    end(wrong, "lowest"),
                ),
            ]
        found += [
            more(
                f"beta {beta}: `none` has more KL(ref‖pi) than `k1_in_reward`",
                end("none", "kl_forward"),
                end("k1_in_reward", "kl_forward"),
            ),
            more(
                f"beta {beta}: `none` has a lower lowest log-probability than `k1_in_reward`",
                end("k1_in_reward", "lowest"),
                end("none", "lowest"),
            ),
            more(
                f"beta {beta}: `k1_in_reward` has more of E[r] - beta KL than `k3_in_reward`",
                end("k1_in_reward", "objective"),
                end("k3_in_reward", "objective"),
            ),
        ]
    return found


def study_c(r: Results) -> list[Compared]:
    found = []
    for tokens in (1, 4):
        for share, word in ((0.02, "rare"), (0.8, "common")):
            for beta in (0.1, 0.3, 0.6):
                here = {"beta": beta, "share": share, "tokens": tokens}
                task = Task.drawn(cell("c", OWN, **here), SEEDS)
                ref = joint(task.ref)

                def of(log_p: Tensor, ref: Tensor = ref) -> Tensor:
                    return (log_p.exp() * (log_p - ref)).sum(-1)

                at_k2 = of(task.myopic(enumerable.reverse_step(beta)))
                at_k3 = of(task.myopic(enumerable.forward_step(beta)))
                k3_more = bool(at_k3.mean() > at_k2.mean())
                forms = ["k3_as_loss", *(["stock:verl:k3"] if beta == 0.3 else [])]
                for form in forms:
                    k3 = r.end(cell("c", form, **here), "kl")
                    k2 = r.end(cell("c", OWN, **here), "kl")
                    pair = (k3, k2) if k3_more else (k2, k3)
                    which = "more" if k3_more else "less"
                    plural = "s" if tokens > 1 else ""
                    found.append(
                        more(
                            f"{tokens} token{plural}, {word}, beta {beta}: `{form}` has {which} "
                            f"KL(pi‖ref) than `{OWN}`",
                            *pair,
                        )
                    )
    return found


def study_d(r: Results) -> list[Compared]:
    def end(kl_type: str, name: str, tokens: int, beta: float) -> Tensor:
        return r.end(cell("d", kl_type, tokens=tokens, beta=beta), name)

    found = []
    for beta in (0.1, 0.3):
        for tokens in (2, 4, 8):
            at = f"{tokens} tokens, beta {beta}:"
            own, whole = (
                {
                    name: end(form, name, tokens, beta)
                    for name in ("kl", "to_optimum", "entropy", "good_in_16")
                }
                for form in (OWN, WHOLE)
            )
            more_entropy = beta == 0.3
            pair = (whole, own) if more_entropy else (own, whole)
            found += [
                more(f"{at} the own token has more KL(pi‖ref)", own["kl"], whole["kl"]),
                more(f"{at} it ends further from pi*", own["to_optimum"], whole["to_optimum"]),
                more(
                    f"{at} the whole answer has {'more' if more_entropy else 'less'} entropy",
                    *(p["entropy"] for p in pair),
                ),
            ]
            if beta == 0.3:
                found.append(
                    alike(
                        f"{at} `k1_in_reward` like the whole answer in KL(pi‖ref)",
                        end("k1_in_reward", "kl", tokens, beta),
                        whole["kl"],
                    )
                )
        gaps = [end(OWN, "kl", n, beta) - end(WHOLE, "kl", n, beta) for n in (2, 4, 8)]
        for (small, short), (large, long) in (
            ((gaps[0], 2), (gaps[1], 4)),
            ((gaps[1], 4), (gaps[2], 8)),
        ):
            found.append(
                more(
                    f"beta {beta}: the difference of KL grows from {short} to {long} tokens",
                    large,
                    small,
                )
            )
    return found


def study_e(r: Results) -> list[Compared]:
    def end(kl_type: str, n: int, name: str) -> Tensor:
        return r.end(cell("e", kl_type, updates=n), name)

    found = [
        alike(
            f"1 update: `{form}` like `{OWN}` in the swing between rollouts",
            end(form, 1, "swing_between"),
            end(OWN, 1, "swing_between"),
        )
        for form in (UNCORRECTED, "k1_in_reward")
    ]
    for form in (UNCORRECTED, "k1_in_reward"):
        found.append(
            more(
                f"64 updates: `{form}` swings more within a rollout than `{OWN}`",
                end(form, 64, "swing_within"),
                end(OWN, 64, "swing_within"),
            )
        )
    return found


def start_of(c: Cell) -> Tensor:
    """KL(ref‖pi) before the first update, one number a seed."""
    _, _, levels = next(enumerable.train(c, SEEDS))
    return enumerable.measured(Task.drawn(c, SEEDS), levels, {})["kl_forward"]


def study_f(r: Results) -> list[Compared]:
    found = []
    for form in ("stock:verl:k3", "stock:openrlhf:k2", "stock:openrlhf:k3", OWN, BOUNDED):
        far = cell("f", form, start=3.0)
        left = r.end(far, "kl_forward") / start_of(far)
        if form.startswith("stock"):
            found.append(more(f"`{form}`: more than half of KL(ref‖pi) is left", left, 0.5))
        else:
            found.append(more(f"`{form}`: less than a tenth is left", 0.1 - left, 0.0))
    for form in enumerable.CLAMPED:
        found.append(
            more(
                f"after the spike `{BOUNDED}` has more of E[r] - beta KL than `{form}`",
                r.end(cell("f", BOUNDED, spike=100.0), "objective"),
                r.end(cell("f", form, spike=100.0), "objective"),
            )
        )
    return found


def beta_at(task: Task, kl: Tensor) -> Tensor:
    """The beta' at which pi*(beta') has this KL(pi‖ref), seed by seed, by bisection in log.

    0 where no pi* has as much: theirs is bounded, by minus the log of the good answers' mass.
    """
    low, high = torch.full_like(kl, math.log(1e-3)), torch.full_like(kl, math.log(1e3))
    log_ref = joint(task.ref)
    for _ in range(60):
        middle = (low + high) / 2
        log_p = (log_ref + task.reward / middle.exp().unsqueeze(-1)).log_softmax(-1)
        more_kl = (log_p.exp() * (log_p - log_ref)).sum(-1) > kl
        low, high = torch.where(more_kl, middle, low), torch.where(more_kl, high, middle)
    found = ((low + high) / 2).exp()
    return torch.where(found < 1.01e-3, 0.0, found)


def gap(r: Results, c: Cell) -> Tensor:
    """Reward lost against the best policy of the same KL, seed by seed."""
    task = Task.drawn(c, SEEDS)
    beta = beta_at(task, r.end(c, "kl")).clamp(min=1e-3)
    log_p = (joint(task.ref) + task.reward / beta.unsqueeze(-1)).log_softmax(-1)
    return (log_p.exp() * task.reward).sum(-1) - r.end(c, "reward")


def study_g(r: Results) -> list[Compared]:
    found = []
    for beta in (0.1, 0.2, 0.4):
        gaps = {c.kl_type: gap(r, c) for c in GRID if c.study == "g" and c.beta == beta}
        for right in (WHOLE, "k1_in_reward"):
            for other in (OWN, "stock:verl:k3"):
                found.append(
                    more(
                        f"beta {beta}: `{other}` has a larger gap than `{right}`",
                        gaps[other],
                        gaps[right],
                    )
                )
        for other in (OWN, WHOLE, "k1_in_reward", "stock:verl:k3"):
            found.append(
                more(
                    f"beta {beta}: `k3_in_reward` has a larger gap than `{other}`",
                    gaps["k3_in_reward"],
                    gaps[other],
                )
            )
    return found


def study_h(r: Results) -> list[Compared]:
    found = []
    for share in (0.05, 0.5):
        for beta in (0.1, 0.3):
            by_form = {}
            for form in ("k1_in_reward", "k1_in_reward,reward_norm=group"):
                c = cell("h", form, share=share, beta=beta)
                by_form[form] = beta_at(Task.drawn(c, SEEDS), r.end(c, "kl"))
            absolute, group = by_form.values()
            at = f"{share:.0%} good, beta {beta}: effective beta"
            found += [
                more(f"{at} larger under `reward_norm=group`", group, absolute),
                more(
                    f"{at} nearer to beta under `reward_norm=group`",
                    (absolute - beta).abs(),
                    (group - beta).abs(),
                ),
            ]
    return found


def study_clip(r: Results) -> list[Compared]:
    found = []
    for tokens in (2, 4):
        for form in (OWN, WHOLE):
            end = "to_myopic" if form == OWN else "to_optimum"
            where = "the myopic policy" if form == OWN else "pi*"

            def ends(head: str, clip: float, end: str = end, form: str = form) -> Tensor:
                return r.end(cell("clip", f"{form}{head}", tokens=tokens, clip=clip), end)  # noqa: B023

            for head, clip, how in (
                (",head=combined", 0.2, "`head=combined`"),
                ("", enumerable.NO_CLIP, "no clip"),
            ):
                found.append(
                    more(
                        f"{tokens} tokens: `{form}` ends nearer to {where} with {how}",
                        ends("", 0.2),
                        ends(head, clip),
                    )
                )
    return found


STUDIES: dict[str, Callable[[Results], list[Compared]]] = {
    "closed": closed_form,
    "a": study_a,
    "b": study_b,
    "c": study_c,
    "d": study_d,
    "e": study_e,
    "f": study_f,
    "g": study_g,
    "h": study_h,
    "clip": study_clip,
}


def comparisons(found: Sequence[Compared]) -> str:
    lines = ["| predicted | difference, mean and interval | verdict |", "| --- | --- | --- |"]
    lines += [f"| {c.what} | {c.interval} | {c.verdict} |" for c in found]
    return "\n".join(lines)


MEASURES = {
    "reward": "E[r]",
    "kl": "KL(pi‖ref)",
    "kl_forward": "KL(ref‖pi)",
    "entropy": "entropy",
    "to_optimum": "to pi*",
    "to_myopic": "to myopic",
    "to_forward": "to forward",
    "good_in_16": "good in 16",
    "swing_between": "swing between",
    "swing_within": "swing within",
}
SHOWN = {
    "closed": ("reward", "kl", "kl_forward", "to_optimum", "to_myopic", "to_forward"),
    "a": ("reward", "kl", "kl_forward"),
    "b": ("reward", "kl", "kl_forward", "to_optimum"),
    "c": ("reward", "kl"),
    "d": ("reward", "kl", "entropy", "good_in_16", "to_optimum"),
    "e": ("reward", "kl", "swing_between", "swing_within"),
    "f": ("reward", "kl", "kl_forward"),
    "g": ("reward", "kl", "to_optimum"),
    "h": ("reward", "kl"),
    "clip": ("reward", "kl", "to_optimum", "to_myopic"),
}
SETTINGS = ("beta", "updates", "tokens", "share", "start", "spike", "clip")


def means(r: Results, study: str) -> str:
    """A row for each cell of a study: means over seeds, and the standard deviation of seeds."""
    grid = [c for c in GRID if c.study == study]
    varied = [name for name in SETTINGS if len({getattr(c, name) for c in grid}) > 1]
    names = SHOWN[study]
    header = ["kl_type", *varied, *(MEASURES[name] for name in names)]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for c in grid:
        cells = [f"`{c.kl_type}`", *(f"{getattr(c, name):g}" for name in varied)]
        for name in names:
            values = r.end(c, name)
            cells.append(f"{float(values.mean()):.3g} ± {float(values.std()):.2g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def breaks(r: Results) -> str:
    """E[r] - beta KL against that of one update a rollout, as a share."""
    lines = ["| kl_type | 4 updates | 16 | 64 |", "| --- | --- | --- | --- |"]
    for form in (OWN, UNCORRECTED, "k1_in_reward"):
        one = r.end(cell("e", form, updates=1), "objective").mean()
        shares = [
            float(r.end(cell("e", form, updates=n), "objective").mean() / one) for n in (4, 16, 64)
        ]
        lines.append(f"| `{form}` | " + " | ".join(f"{x:.3f}" for x in shares) + " |")
    return "\n".join(lines)


# ── Figures ──────────────────────────────────────────────────────────────────────────────────────

COLOURS = {
    "none": "0.6",
    K1: "tab:brown",
    "k3_in_reward": "tab:red",
    "k2_in_reward": "tab:pink",
    "k3_as_loss": "tab:orange",
    "stock:verl:k3": "tab:olive",
    OWN: "tab:blue",
    "k1_in_reward": "tab:cyan",
    WHOLE: "tab:green",
}


@contextmanager
def drawn(file: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure that is written as SVG when it is drawn, for a light and a dark page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**plots.settings(file.stem), "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        file.write_text(plots.standalone(plots.text_of(figure, file.stem)), "utf-8")


def closed_form_figure(r: Results, figure: Figure) -> None:
    panels = figure.subplots(1, 3, sharey=True)
    where = {
        "to_optimum": "to pi* = ref exp(r/beta)/Z",
        "to_myopic": "to the myopic policy",
        "to_forward": "to the forward policy",
    }
    for panel, (name, title) in zip(panels, where.items(), strict=True):
        for c in (c for c in GRID if c.study == "closed"):
            line = r.line(c)
            assert line is not None
            low, middle, high = zip(*line["curve"][name], strict=True)
            panel.plot(line["at"], middle, color=COLOURS[c.kl_type], label=c.kl_type, linewidth=1.4)
            panel.fill_between(line["at"], low, high, color=COLOURS[c.kl_type], alpha=0.12, lw=0)
        panel.set(yscale="log", xlabel="update", title=f"KL {title}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
    panels[0].set(ylabel="nats per answer")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)


GRADIENT_LINES = {
    gradient_study.EXACT: ("LOC", plots.INK, "-"),
    OWN: ("LOC", "tab:blue", "-"),
    BOUNDED: ("LOC", "tab:purple", "-"),
    "k3_as_loss": ("LOC", "tab:orange", "-"),
    "stock:verl:k3": ("LOC", "tab:olive", "--"),
    "stock:openrlhf:k2": ("LOC", "tab:gray", "--"),
    WHOLE: ("FULL", "tab:green", "-"),
    "k2_in_reward": ("FULL", "tab:pink", "-"),
    "k3_in_reward": ("FULL", "tab:red", "-"),
    K1: ("LOC", "tab:brown", "-"),
}


def gradient_lines(path: Path = gradient_study.RESULTS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def gradient_figure(lines: list[dict[str, Any]], figure: Figure) -> None:
    policies = list(dict.fromkeys(line["policy"] for line in lines))
    panels = figure.subplots(1, len(policies), sharey=True)
    for panel, policy in zip(panels, policies, strict=True):
        here = {line["form"]: line for line in lines if line["policy"] == policy}
        for form, (target, colour, style) in GRADIENT_LINES.items():
            cosines = here[form][target]["cosine"]
            sizes = [int(n) for n in cosines]
            low, middle, high = zip(*cosines.values(), strict=True)
            panel.plot(sizes, middle, style, color=colour, marker=".", label=f"{form} ({target})")
            panel.fill_between(sizes, low, high, color=colour, alpha=0.12, lw=0)
        panel.axhline(1, color="#808080", alpha=0.4, linewidth=0.8)
        kl = here[OWN]["kl_per_answer"]
        panel.set(xscale="log", xlabel="answers", title=f"fine-tuned {policy}: KL {kl:.2g} nats")
        panel.set_xticks(sizes, [str(n) for n in sizes])
        panel.minorticks_off()
    panels[0].set(ylabel="cosine with the exact gradient")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)


def gradient_table(lines: list[dict[str, Any]]) -> str:
    """Cosine and norm ratio that every formulation tends to, and the answers for a cosine of 0.9.

    A cosine of 0.9 at once needs one answer; one above 1, by noise, is shown as 1.
    """
    policies = list(dict.fromkeys(line["policy"] for line in lines))
    header = ["formulation", "against", *(f"{p}: cosine, norm, answers" for p in policies)]
    rows = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for form in dict.fromkeys(line["form"] for line in lines):
        whole = "horizon=sequence" in form or "in_reward" in form or "whole" in form
        target = "FULL" if whole else "LOC"
        cells = [f"`{form}`" if not form.startswith(gradient_study.EXACT) else form, target]
        for policy in policies:
            (line,) = (x for x in lines if x["policy"] == policy and x["form"] == form)
            limit, measured = line[target]["limit"], line[target]["norm"]
            _, largest, _ = measured[max(measured, key=int)]
            # Of the square of the largest estimate less than a quarter is its mean's.
            if limit["cosine"] is None or limit["norm"] < largest / 2:
                cells.append("no mean, never")
                continue
            needed = limit["answers_for_0.9"]
            answers = "never" if needed is None else f"{math.ceil(needed)}"
            cells.append(f"{min(limit['cosine'], 1):.2f}, {limit['norm']:.2f}, {answers}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────


def filled(page: Path, parts: dict[str, str]) -> str:
    """The page with what stands between ``<!-- name -->`` and ``<!-- end -->`` made anew."""
    text = page.read_text(encoding="utf-8")
    for name, made in parts.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise LookupError(f"{page.name} has no place for {name!r}")
        text = f"{before}{start}\n{made}\n\n{end}{rest.partition(end)[2]}"
    return text


NOT_RUN = "Not run yet."


def pages(docs: Path = DOCS) -> dict[Path, str]:
    r, lines = Results(), gradient_lines()
    closed = {}
    for study, claims in STUDIES.items():
        done = r.has(study)
        closed[f"verdicts {study}"] = comparisons(claims(r)) if done else NOT_RUN
        closed[f"means {study}"] = means(r, study) if done else NOT_RUN
    closed["breaks"] = breaks(r) if r.has("e") else NOT_RUN
    return {
        docs / "closed-form.md": filled(docs / "closed-form.md", closed),
        docs / "gradient-study.md": filled(
            docs / "gradient-study.md", {"gradients": gradient_table(lines)}
        ),
    }


def main() -> None:
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
    with drawn(DOCS / "img" / "closed-form.svg", (11, 3.6)) as figure:
        closed_form_figure(Results(), figure)
    with drawn(DOCS / "img" / "gradient-study.svg", (11, 3.8)) as figure:
        gradient_figure(gradient_lines(), figure)


if __name__ == "__main__":
    main()
