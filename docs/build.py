"""Writes into the pages what the code knows: ``python -m docs.build``, or ``make pages``.

The pages read the same on GitHub, on PyPI and as a site, so what is made stands in them. A line
says what comes next, and until where:

    <!-- made: kl_types k1 -->          every registered kl_type of these estimators, or of this
                                        name, each a table
    <!-- made: table -->                all of them, a line each
    <!-- made: options -->              each option, its values and what it means
    <!-- made: refused -->              of the kl_types in the first column, parse's answer
    <!-- made: curves NAME kl_type ... -->    c against the log-ratio: docs/img/NAME.svg
    <!-- made: picture NAME -->         one of docs/pictures.py
    <!-- made: top_k -->                what the top K tokens hold of a KL, as it was measured
    <!-- made: plant -->                controllers on a simulated run: a table and a picture
    <!-- made: papers -->               papers, and the kl_type of each
    <!-- made: quickstart -->           the summaries in benchmarks/results/quickstart.jsonl
    <!-- made: output N WORDS -->       the first N lines that a command of klplug prints
    <!-- made: clone WORDS -->          git clone of the address in pyproject.toml, then a command
    # made: findings                    in mkdocs.yml: a page for each finding
    <!-- /made -->

``python -m docs.build --check`` writes nothing, and names what is stale.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import TextWrapper
from typing import Any

import klplug
from docs import pictures, plant
from klplug.axes import AXES, OPTIONS, Axis
from klplug.cli.explain import explain
from klplug.hosting.host import hosts
from klplug.papers import PAPERS
from klplug.report.plots import COLOURS, INK, standalone, svg

ROOT = Path(__file__).resolve().parents[1]
MADE = re.compile(
    r"^(?P<open>(?:<!--| *#) made: (?P<what>.+?)(?: -->)?)\n"
    r"(?P<old>.*?)"
    r"^(?P<close>(?:<!--| *#) /made)",
    re.MULTILINE | re.DOTALL,
)
REACH = 3.0  # of c, in the pictures
WIDTH = 100  # of what a command prints


def cell(text: str) -> str:
    """Text for a Markdown table: a bar would end the cell."""
    return text.replace("KL(pi||ref)", "KL(pi‖ref)").replace("||", "‖").replace("|", "\\|")


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def kl_types(page: Path, words: list[str], old: str) -> str:
    """Each registered kl_type of these estimators: a heading and a table."""
    rows = [
        row
        for row in klplug.kl_types().values()
        if {row.name, *(term.estimator for term in klplug.parse(row.name).terms)} & set(words)
    ]
    assert rows, f"no kl_type has an estimator among {words}"
    return "\n".join(map(_details, rows))


def _details(row: klplug.KLType) -> str:
    test = f"`{row.test}` in `tests/core/test_oracle.py`" if row.test else ""
    facts = (
        ("estimate", cell(row.formula)),
        ("coefficient c", cell(row.coefficient)),
        ("**whose gradient, on-policy**", cell(row.target)),
        ("bias of the estimate", cell(row.value_bias)),
        ("bias as a gradient of KL(pi‖ref)", cell(row.gradient_bias)),
        ("off-policy", cell(row.off_policy)),
        ("needs", ", ".join(f"`{name}`" for name in ("log_probs", *row.requires))),
        (
            "served by",
            "; ".join(f"{hosts()[name].title}: {how}" for name, how in row.served.items()),
        ),
        ("held to it by", test),
        ("source", cell(row.source)),
    )
    return f"### `{row.name}`\n\n" + table(
        ("property", "value"), [fact for fact in facts if fact[1]]
    )


def overview(page: Path, words: list[str], old: str) -> str:
    """Every registered kl_type, a line each."""
    rows = [
        (f"`{row.name}`", cell(row.coefficient), cell(row.target), cell(row.gradient_bias))
        for row in klplug.kl_types().values()
    ]
    return table(("`kl_type`", "c", "whose gradient", "bias as one of KL(pi‖ref)"), rows)


def options(page: Path, words: list[str], old: str) -> str:
    """Every option, from its axis."""
    rows = [(f"`{name}`", cell(_choices(AXES[name])), cell(AXES[name].meaning)) for name in OPTIONS]
    return table(("option", "choices, default first", "meaning"), rows)


# Between them these have every axis.
PLAIN = ("k2_as_loss", "k1_in_reward", "alpha_as_loss")


def _choices(axis: Axis) -> str:
    terms = [term for kl_type in PLAIN for term in klplug.parse(kl_type).terms]
    default = next(v for term in terms if (v := getattr(term, axis.name)) is not None)
    choices = [f"`{axis.shown(default)}`"]
    choices += ["a number"] * axis.number
    choices += [f"`{word}`" for word in axis.words if f"`{word}`" not in choices]
    return ", ".join(choices) + (f"; {axis.elsewhere}" if axis.elsewhere else "")


def refused(page: Path, words: list[str], old: str) -> str:
    """What ``klplug.parse`` answers to each kl_type of the table that stands there."""
    rows = []
    for kl_type in re.findall(r"^(?:\| |- )`([^`]+)`", old, re.MULTILINE):
        try:
            klplug.parse(kl_type)
        except ValueError as error:
            rows.append((f"`{kl_type}`", cell(str(error))))
        else:
            raise SystemExit(f"{page.name}: {kl_type} is listed as refused, and parse takes it")
    return table(("refused", "because"), rows)


def curves(page: Path, words: list[str], old: str) -> str:
    """c of several kl_types against the log-ratio, as a picture beside the pages."""
    name, *chosen = words
    explained = [explain(kl_type) for kl_type in chosen]

    def draw(axes: Any) -> None:
        axes.axhline(0, color="#808080", linewidth=0.8)
        axes.axvline(0, color="#808080", linewidth=0.8)
        for one, colour in zip(explained, COLOURS, strict=False):
            axes.plot(one.log_ratio, one.coefficient, color=colour, label=one.kl_type)
        axes.set(
            ylim=(-REACH, REACH),
            xlabel="x = log(pi/ref) of a token, nats",
            ylabel="c: what multiplies grad log pi",
        )
        axes.legend(frameon=False, labelcolor=INK)

    PICTURES[ROOT / "docs" / "img" / f"{name}.svg"] = standalone(svg(name, draw))
    to = os.path.relpath(ROOT / "docs" / "img", page.parent)
    return f"![c of {', '.join(chosen)}]({to}/{name}.svg)\n"


def picture(page: Path, words: list[str], old: str) -> str:
    """One of docs/pictures.py, its docstring for those who can't see it."""
    (name,) = words
    draw = pictures.PICTURES[name]
    PICTURES[ROOT / "docs" / "img" / f"{name}.svg"] = standalone(svg(name, draw))
    to = os.path.relpath(ROOT / "docs" / "img", page.parent)
    return f"![{' '.join((draw.__doc__ or '').split())}]({to}/{name}.svg)\n"


def output(page: Path, words: list[str], old: str) -> str:
    """What a command prints, up to a number of lines; a long one goes on in the next, indented."""
    count, *command = words
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": str(WIDTH), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    whole = {"break_long_words": False, "break_on_hyphens": False}
    wrap = TextWrapper(WIDTH, subsequent_indent="    ", **whole)
    lines = [
        part
        for line in printed[: int(count)]
        for part in (wrap.wrap(line) if len(line) > WIDTH else [line])
    ]
    lines += ["..."] * (len(printed) > int(count))
    return "\n".join(["```text", f"$ {' '.join(command)}", *lines, "```"]) + "\n"


def clone(page: Path, words: list[str], old: str) -> str:
    """A checkout, and what is run there."""
    (address,) = re.findall(r'^address = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    return f"```bash\ngit clone {address} && cd klplug\n{' '.join(words)}\n```\n"


def findings(page: Path, words: list[str], old: str) -> str:
    """Of mkdocs.yml: a page for each finding of the audit."""
    pages = sorted((ROOT / "docs" / "findings").glob("*.md"))
    return "".join(f"      - findings/{found.name}\n" for found in pages)


def papers(page: Path, words: list[str], old: str) -> str:
    """Papers, and the kl_type of each."""
    rows = [
        (
            f"[{paper.name}](https://arxiv.org/abs/{paper.arxiv})",
            f"`{paper.kl_type}`" if paper.kl_type else "none",
            cell(paper.about + (f" *Its own figures:* {paper.reports}" if paper.reports else "")),
            f"`{paper.key}`",
        )
        for paper in PAPERS.values()
    ]
    return table(("paper", "`kl_type`", "what it has", "`--paper`"), rows)


def quickstart(page: Path, words: list[str], old: str) -> str:
    """Runs of the quickstart, a line each, from the summaries that they left."""
    headings = (
        *("host", "`kl_type`, `kl_coef`", "greedy accuracy before", "after 30 steps"),
        *("KL to the reference, nats per answer", "seconds", "of these training"),
    )
    runs = map(json.loads, (ROOT / "benchmarks/results/quickstart.jsonl").read_text().splitlines())
    rows = [
        (
            f"{hosts()[run['host']].title} {run['host_version']}",
            f"`{run['kl_type']}`, {run['kl_coef']:g}",
            *(f"{run[accuracy]:.1%}" for accuracy in ("accuracy_before", "accuracy_after")),
            f"{run['kl_last']:.2f} ± {run['kl_last_standard_error']:.2f}",
            *(f"{run['seconds']:.0f}", f"{run['seconds_by_phase']['training']:.0f}"),
        )
        for run in runs
    ]
    return table(headings, rows)


def top_k(page: Path, words: list[str], old: str) -> str:
    """What the top K tokens hold of a KL, from benchmarks/results."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "exact-top-k.json").read_text())
    results = measured["results"]
    sizes = list(results[0]["ref_mass"])
    rows = []
    for found in results:
        named = (found["policy"], found["text"], f"{found['kl']:.2g}")
        for whose, top in found["top"].items():
            shares = (f"{top[k]['share']:.2f} ({top[k]['cosine']:.2f})" for k in sizes)
            rows.append((*named, f"share, top of {whose}", *shares))
        rows.append((*named, "mass of ref's", *(f"{x:.2f}" for x in found["ref_mass"].values())))
    return table(("fine-tuned", "answers to", "KL", "", *(f"K = {k}" for k in sizes)), rows)


def simulated(page: Path, words: list[str], old: str) -> str:
    """Every controller on every simulated run, and one of them drawn."""
    headings = (
        *("run", "controller", "settles after the start, steps", "does not"),
        *("after the jump", "does not", "highest KL over target"),
    )
    return picture(page, ["controllers"], old) + "\n" + table(headings, list(plant.rows()))


MAKERS: dict[str, Callable[[Path, list[str], str], str]] = {
    "kl_types": kl_types,
    "table": overview,
    "options": options,
    "refused": refused,
    "curves": curves,
    "picture": picture,
    "output": output,
    "clone": clone,
    "papers": papers,
    "plant": simulated,
    "top_k": top_k,
    "quickstart": quickstart,
    "findings": findings,
}
PICTURES: dict[Path, str] = {}


def made(page: Path) -> str:
    """A page with all that is made in it made anew."""

    def again(region: re.Match[str]) -> str:
        what, *words = region["what"].split()
        inside = MAKERS[what](page, words, region["old"])
        # Markdown wants a line between a comment and a table.
        space = "\n" if page.suffix == ".md" else ""
        return f"{region['open']}\n{space}{inside.rstrip()}\n{space}{region['close']}"

    return MADE.sub(again, page.read_text(encoding="utf-8"))


def stale(write: bool) -> list[Path]:
    """Files that differ from what the code says; brought up to date if ``write``."""
    pages = [ROOT / "README.md", ROOT / "mkdocs.yml", *sorted((ROOT / "docs").rglob("*.md"))]
    fresh = {page: made(page) for page in pages} | PICTURES
    differ = [
        path
        for path, text in fresh.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in differ if write else ():
        path.parent.mkdir(exist_ok=True)
        path.write_text(fresh[path], encoding="utf-8")
    return differ


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if stale")
    check = parser.parse_args().check
    differ = stale(write=not check)
    for path in differ:
        print(f"{'stale' if check else 'made'}: {path.relative_to(ROOT)}")
    raise SystemExit(1 if check and differ else 0)


if __name__ == "__main__":
    main()
