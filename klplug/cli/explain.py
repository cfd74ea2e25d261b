"""``klplug explain``: what a kl_type computes, whose gradient that is, and how it looks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown
from rich.table import Table

import klplug
from klplug.audit import RULES, Rule
from klplug.audit.pages import text
from klplug.axes import AXES, OPTIONS, size_of
from klplug.catalogue import refined
from klplug.cli.catalogue import WORDS, completed, stock, stock_text
from klplug.cli.output import AsJson, console, print_json
from klplug.cli.plot import COLOURS, LETTERS, text_plot
from klplug.cli.status import Unreadable
from klplug.hosting.host import hosts
from klplug.papers import PAPERS, Paper
from klplug.spec import TermSpec

REACH = 4.0  # nats: where the curves of c end
STEPS = 10  # a nat
TABLED = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
MOST = len(LETTERS)
PICTURES = ("png", "svg", "pdf")
OVER = "Over the vocabulary c is that of each of its tokens, and what acts is their mean under pi."
# What these do depends on the rest of the batch; c itself is the same without.
OF_THE_BATCH = ("baseline", "head", "cap", "mode", "vocab", "weight")

_ROWS = {
    "formula": "estimate of the KL",
    "coefficient": "coefficient c",
    "target": "whose gradient, on-policy",
    "value_bias": "bias of the estimate",
    "gradient_bias": "bias as one of KL(pi||ref)",
    "off_policy": "off-policy",
}
# Words that no column of several would hold whole.
_BELOW = {"source": "source", "test": "held to it by"}


@dataclass(frozen=True)
class Option:
    """One option in force: its value, whether it is the default, and what it means."""

    value: str
    default: bool
    meaning: str


@dataclass(frozen=True)
class Explanation:
    """All that is known of one ``kl_type``.

    Attributes:
        kl_type: canonical form.
        written: as it was asked for.
        rows: the registry's rows that make it up: one, or one per term of a sum.
        options: those in force, by name, one dict per term.
        requires: what it needs from a batch, beside ``log_probs`` and the mask.
        log_ratio: a grid of log pi - log ref, nats.
        coefficient: c there, for an answer of one token: the number that multiplies
            ``grad log pi``, before the importance weight. ``None`` where there is no torch.
    """

    kl_type: str
    written: str
    rows: tuple[klplug.KLType, ...]
    options: tuple[dict[str, Option], ...]
    requires: tuple[str, ...]
    log_ratio: tuple[float, ...]
    coefficient: tuple[float, ...] | None


def explain(kl_type: str) -> Explanation:
    """What is known of ``kl_type``, from the registry, and its c on a grid of log-ratios.

    Raises:
        ValueError: not a ``kl_type``; the message names what there is and the nearest match.
    """
    spec = klplug.parse(kl_type)
    ends = round(REACH * STEPS)
    log_ratio = tuple(step / STEPS for step in range(-ends, ends + 1))
    return Explanation(
        kl_type=str(spec),
        written=kl_type,
        rows=registered(spec),
        options=tuple(options(term) for term in spec.terms),
        requires=spec.requires,
        log_ratio=log_ratio,
        coefficient=coefficient(spec, log_ratio) if find_spec("torch") else None,
    )


def registered(spec: klplug.KLSpec) -> tuple[klplug.KLType, ...]:
    """The registry's row for ``spec``; for a sum without one, the rows of its terms.

    A row answers for a formulation that has all options which the row's own name writes.
    """
    found: tuple[int, klplug.KLType] | None = None
    for row in klplug.kl_types().values():
        named = klplug.parse(row.name)
        if named == spec:
            return (row,)
        if len(named.terms) != 1 or len(spec.terms) != 1 or spec.terms[0].factor != 1:
            continue
        (own,), (asked,) = named.terms, spec.terms
        written = [option.partition("=")[0] for option in row.name.split(",")[1:]]
        if (
            own.name == asked.name
            and own.horizon == asked.horizon
            and all(_alike(option, own, asked) for option in written)
            and (found is None or len(written) > found[0])
        ):
            found = len(written), row
    if found is not None:
        (asked,) = spec.terms
        return (refined(asked, found[1]),)
    return tuple(_times(term.factor, row) for term in spec.terms for row in registered(term.alone))


def _alike(option: str, own: TermSpec, asked: TermSpec) -> bool:
    """Whether they have the same value; a row is one of a word's sizes, and answers for all."""
    values = getattr(own, option), getattr(asked, option)
    if AXES[option].sized:
        return size_of(values[0])[0] == size_of(values[1])[0]
    return bool(values[0] == values[1])


def _times(factor: float, row: klplug.KLType) -> klplug.KLType:
    """The row of a term, with the coefficient that a sum gives it."""
    if factor == 1:
        return row
    away = "; below 0 it drives away from that reference" if factor < 0 else ""
    return replace(
        row,
        formula=f"{factor:g} ({row.formula})",
        coefficient=f"{factor:g} ({row.coefficient})",
        target=f"{factor:g} times {row.target}{away}",
    )


def options(term: TermSpec) -> dict[str, Option]:
    """The options in force in one term, in canonical order."""
    written = {option.partition("=")[0] for option in str(term).split(",")[1:]}
    meanings = {name: AXES[name].meaning for name in OPTIONS}
    if term.weighting is not None:
        row = term.weighting.row
        meanings["weight"] = f"{row.meaning} ({row.source})" if row.source else row.meaning
    return {
        name: Option(AXES[name].shown(value), name not in written, meanings[name])
        for name in OPTIONS
        if (value := getattr(term, name)) is not None
    }


def coefficient(spec: klplug.KLSpec, log_ratio: Sequence[float]) -> tuple[float, ...]:
    """c at each log-ratio, for answers of one token: ``kl_term``'s own, without the weight."""
    import torch

    reference = -torch.tensor(log_ratio, dtype=torch.float64)[:, None]
    log_probs = torch.zeros_like(reference)
    total = torch.zeros_like(reference)
    for term in spec.terms:
        alone = klplug.parse(_without(str(term), OF_THE_BATCH))
        inputs = dict.fromkeys(alone.requires, log_probs)
        inputs[f"{term.reference}_log_probs"] = reference
        total += klplug.kl_term(
            alone,
            log_probs,
            inputs.get("ref_log_probs"),
            torch.ones_like(log_probs),
            old_log_probs=inputs.get("old_log_probs"),
            rollout_log_probs=inputs.get("rollout_log_probs"),
            teacher_log_probs=inputs.get("teacher_log_probs"),
            posterior_log_probs=inputs.get("posterior_log_probs"),
        ).coefficient
    return tuple(total[:, 0].tolist())


def _without(kl_type: str, names: Sequence[str]) -> str:
    name, *written = kl_type.split(",")
    return ",".join([name, *(o for o in written if o.partition("=")[0] not in names)])


def _completed(incomplete: str) -> list[str]:
    return [*completed(incomplete), *(n for n in (*RULES, *PAPERS) if n.startswith(incomplete))]


def explain_command(
    kl_types: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KL_TYPE | FINDING | PAPER",
            help="One, or several side by side; a host's name too, as low_var_kl or stock:k3. Or "
            "findings of klplug audit, as dead-zone, or papers, as frpo.",
            autocompletion=_completed,
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png",
            metavar="FILE",
            help="Draw the curves of c here too: a .png, .svg or .pdf.",
        ),
    ] = None,
    paper: Annotated[
        str | None,
        typer.Option(
            "--paper",
            metavar="NAME",
            help="The kl_type of a paper: frpo, 2510.01555.",
            autocompletion=lambda incomplete: [p for p in PAPERS if p.startswith(incomplete)],
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain kl_types (formula, coefficient, gradient, bias, plot of c), findings or papers."""
    names = kl_types or []
    if rules := [RULES[name] for name in names if name in RULES]:
        if png is not None:
            raise Unreadable(f"--png {png}: {rules[0].id} is a finding, and has no curve")
        _explain_findings(rules, names + ([] if paper is None else [paper]), as_json)
        return
    of_paper = [PAPERS[name] for name in names if name in PAPERS]
    of_paper += [] if paper is None else [_paper(paper)]
    written = [name for name in names if name not in PAPERS]
    written += [found.kl_type for found in of_paper if found.kl_type]
    kl_types = list(dict.fromkeys(written))
    if not kl_types and not of_paper:
        raise Unreadable(
            "name a kl_type, a finding of klplug audit or a paper, as in klplug explain k2_as_loss"
        )
    for found in of_paper if not as_json else ():
        console().print(f"{found.name}, arXiv {found.arxiv}\n{found.about}")
        if found.reports:
            console().print(f"The paper's own figures. {found.reports}")
    if not kl_types:
        if png is not None:
            raise Unreadable(f"--png {png}: {of_paper[0].key} has no kl_type, and so no curve")
        if as_json:
            print_json([asdict(found) for found in of_paper])
        else:
            console().print("klplug has no kl_type with this gradient.")
        return
    theirs = {name: meant for name in kl_types if (meant := _stock(name))}
    kl_types = [kl_type for name in kl_types for kl_type in theirs.get(name, [name])]
    kl_types = list(dict.fromkeys(kl_types))
    if len(kl_types) > MOST:
        raise Unreadable(f"{len(kl_types)} kl_types are more than fit side by side: {MOST} at most")
    try:
        explained = [explain(kl_type) for kl_type in kl_types]
    except ValueError as error:
        # Findings are written with hyphens, kl_types with underscores.
        near = [] if "_" in kl_types[0] else get_close_matches(kl_types[0], (*RULES, *PAPERS), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise Unreadable(f"{hint}{error}") from error
    if png is not None:
        picture(explained, png)
    if as_json:
        print_json([asdict(explanation) for explanation in explained])
        return
    out = console()
    for name, meant in theirs.items():
        out.print(stock_text(name, meant))
    out.print(text_table(explained))
    for line in dict.fromkeys(below(explained)):
        out.print(line)
    curves = {e.kl_type: e.coefficient for e in explained if e.coefficient is not None}
    if not curves:
        out.print("The curve of c needs torch: pip install 'klplug[torch]'")
        return
    out.print(value_table(explained[0].log_ratio, curves))
    out.print("c against log(pi/ref) of a token, in nats:")
    out.print(text_plot(explained[0].log_ratio, curves, limit=REACH), end="")
    if any(term.over_vocabulary for e in explained for term in klplug.parse(e.kl_type).terms):
        out.print(OVER)
    if png is not None:
        out.print(f"drawn in {png}")


def _explain_findings(found: Sequence[Rule], asked: Sequence[str], as_json: bool) -> None:
    """Prints the pages of findings.

    Raises:
        Unreadable: something else was asked for beside them.
    """
    others = [name for name in asked if name not in RULES]
    if others:
        raise Unreadable(f"{others[0]}: no finding, so it is explained without {found[0].id}")
    documents = [
        {"id": rule.id, "severity": rule.severity, "title": rule.title, "docs": rule.docs}
        | {"text": text(rule.id)}
        for rule in found
    ]
    if as_json:
        print_json(documents)
        return
    for document in documents:
        # On a terminal as it is meant; in a pipe as it stands, so that it can be pasted.
        out, page = console(), document["text"]
        out.print(Markdown(page) if out.is_terminal else page, soft_wrap=not out.is_terminal)
        out.print(document["docs"], soft_wrap=True)


def _stock(name: str) -> dict[str, list[str]]:
    """What the hosts mean by a word that is no ``kl_type`` of klplug's."""
    try:
        klplug.parse(name)
    except ValueError:
        return stock(name)
    return {}


def _paper(name: str) -> Paper:
    """A paper by its short name, or its number on arXiv.

    Raises:
        Unreadable: it is not listed; says what is.
    """
    number = re.sub(r"^arxiv:|v\d+$", "", name.lower())
    for key, paper in PAPERS.items():
        if name.lower() == key or number == paper.arxiv:
            return paper
    near = get_close_matches(name.lower(), PAPERS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise Unreadable(f"--paper {name}: not listed; {hint}there are {', '.join(PAPERS)}")


def text_table(explained: Sequence[Explanation]) -> Table:
    """A row per property, a column per kl_type."""
    table = Table(show_lines=True, caption=WORDS)
    table.add_column("kl_type", style="bold")
    for explanation in explained:
        # It may break after an option, and never within a word.
        table.add_column(explanation.kl_type.replace(",", ",\n"), overflow="fold")
    if any(e.kl_type != e.written for e in explained):
        table.add_row("written as", *(e.written for e in explained))
    for field, heading in _ROWS.items():
        cells = [[str(getattr(row, field)) for row in e.rows] for e in explained]
        table.add_row(heading, *("\n+ ".join(parts) for parts in cells))
    for name, host in hosts().items():
        cells = [[row.served[name] for row in e.rows] for e in explained]
        table.add_row(f"served by {host.title}", *("\n+ ".join(parts) for parts in cells))
    table.add_row("needs", *(", ".join(("log_probs", *e.requires)) for e in explained))
    table.add_row("options", *(_options(e) for e in explained))
    return table


def below(explained: Sequence[Explanation]) -> Iterator[str]:
    """What is too wide for a column: sources, tests, and what the options that were chosen mean."""
    for explanation in explained:
        for row in explanation.rows:
            said = {heading: getattr(row, field) for field, heading in _BELOW.items()}
            yield "\n".join(
                [row.name, *(f"  {name}: {fact}" for name, fact in said.items() if fact)]
            )
    for explanation in explained:
        for options in explanation.options:
            for name, option in options.items():
                if not option.default:
                    yield f"{name}: {option.meaning}"


def _options(explanation: Explanation) -> str:
    return "\n+\n".join(
        "\n".join(f"{name}={option.value}" for name, option in options.items())
        for options in explanation.options
    )


def value_table(log_ratio: Sequence[float], curves: Mapping[str, Sequence[float]]) -> Table:
    """c itself at a few log-ratios."""
    table = Table(title="c at log(pi/ref) =", title_justify="left")
    table.add_column("kl_type", no_wrap=True)
    for heading in TABLED:
        table.add_column(f"{heading:g}", justify="right")
    for kl_type, coefficient in curves.items():
        at = dict(zip(log_ratio, coefficient, strict=True))
        # Adding 0 leaves no -0.
        table.add_row(kl_type, *(f"{at[x] + 0:.3g}" for x in TABLED))
    return table


def picture(explained: Sequence[Explanation], path: Path) -> None:
    """The curves of c as a picture, of the kind that the file's name says.

    Raises:
        ModuleNotFoundError: torch or matplotlib is missing.
        Unreadable: the file can't be written, or is of no kind that is known.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in PICTURES:
        raise Unreadable(f"--png {path}: the name must end in .{', .'.join(PICTURES)}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.axvline(0, color="0.7", linewidth=0.8)
    for explanation, colour in zip(explained, COLOURS, strict=False):
        x, kl_type = explanation.log_ratio, explanation.kl_type
        curve = explanation.coefficient or coefficient(klplug.parse(kl_type), x)
        axes.plot(x, curve, color=colour, label=kl_type)
    axes.set(
        ylim=(-REACH, REACH),
        xlabel="log(pi/ref) of a token, nats",
        ylabel="c: what multiplies grad log pi",
    )
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150, format=kind)
    except OSError as error:
        raise Unreadable(f"--png {path}: {error.strerror or error}") from error
