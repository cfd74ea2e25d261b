"""What mkdocs asks of klplug while it builds: tables from the registry, curves from ``kl_term``.

A page says where, by a comment on a line of its own:

    <!-- kl_types: k1 -->       every registered kl_type of these estimators, each as a table
    <!-- kl_type table -->      all of them, one line each
    <!-- options -->            what each option means
    <!-- refused -->            of the list of kl_types that follows, each with parse's own answer
    <!-- curves: NAME kl_type kl_type ... -->    c against the log-ratio, as a picture
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import klplug
from klplug.axes import AXES, OPTIONS, Axis
from klplug.cli.explain import explain, picture
from klplug.hosting.host import hosts

CURVES = re.compile(r"^<!-- curves: (\S+) (.+) -->$", re.MULTILINE)
FAMILY = re.compile(r"^<!-- kl_types: (.+) -->$", re.MULTILINE)
REFUSED = re.compile(r"^<!-- refused -->\n+((?:- `.+`\n)+)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the audit's findings, a page each, in the navigation."""
    assert config.nav is not None
    pages = sorted(page.name for page in (Path(config.docs_dir) / "findings").glob("*.md"))
    config.nav.append({"Findings of the audit": [f"findings/{name}" for name in pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Draw the curves that pages ask for."""
    for page in list(files.documentation_pages()):
        for name, kl_types in CURVES.findall(page.content_string):
            drawn = _png(kl_types.split())
            files.append(File.generated(config, f"img/{name}.png", content=drawn))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in what comes from the registry."""
    up = "../" * page.file.src_uri.count("/")
    markdown = CURVES.sub(lambda m: f"![c of {m[2]}]({up}img/{m[1]}.png)", markdown)
    markdown = FAMILY.sub(lambda m: family(m[1].split()), markdown)
    markdown = REFUSED.sub(lambda m: refused(re.findall(r"`(.+)`", m[1])), markdown)
    markdown = markdown.replace("<!-- kl_type table -->", overview())
    return markdown.replace("<!-- options -->", options())


def _png(kl_types: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.png"
        picture([explain(kl_type) for kl_type in kl_types], path)
        return path.read_bytes()


def cell(text: str) -> str:
    """Text for a Markdown table: a bar would end the cell."""
    return text.replace("KL(pi||ref)", "KL(pi‖ref)").replace("||", "‖").replace("|", "\\|")


def family(estimators: list[str]) -> str:
    """Each registered kl_type of these estimators: a heading and a table."""
    rows = [
        row
        for row in klplug.kl_types().values()
        if {term.estimator for term in klplug.parse(row.name).terms} & set(estimators)
    ]
    if not rows:
        raise PluginError(f"no kl_type has an estimator among {estimators}")
    return "\n".join(map(_details, rows))


def _details(row: klplug.KLType) -> str:
    served = "; ".join(f"{hosts()[name].title}: {how}" for name, how in row.served.items())
    test = f"`{row.test}` in `tests/core/test_oracle.py`" if row.test else ""
    needs = ", ".join(f"`{name}`" for name in ("log_probs", *row.requires))
    lines = [f"### `{row.name}`", "", "| | |", "| --- | --- |"]
    for heading, text in (
        ("estimate", cell(row.formula)),
        ("coefficient c", cell(row.coefficient)),
        ("**whose gradient, on-policy**", cell(row.target)),
        ("bias of the estimate", cell(row.value_bias)),
        ("bias as a gradient of KL(pi‖ref)", cell(row.gradient_bias)),
        ("off-policy", cell(row.off_policy)),
        ("needs", needs),
        ("served by", served),
        ("held to it by", test),
        ("source", cell(row.source)),
    ):
        if text:
            lines.append(f"| {heading} | {text} |")
    return "\n".join([*lines, ""])


def overview() -> str:
    """Every registered kl_type, a line each."""
    lines = [
        "| `kl_type` | c | whose gradient | bias as one of KL(pi‖ref) |",
        "| --- | --- | --- | --- |",
    ]
    for row in klplug.kl_types().values():
        cells = map(cell, (row.coefficient, row.target, row.gradient_bias))
        lines.append(f"| `{row.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def options() -> str:
    """Every option: what it may be, and what it means."""
    lines = ["| option | choices, default first | meaning |", "| --- | --- | --- |"]
    for option in OPTIONS:
        axis = AXES[option]
        lines.append(f"| `{option}` | {cell(_choices(axis))} | {cell(axis.meaning)} |")
    return "\n".join(lines)


# Between them these have every axis.
PLAIN = ("k2_as_loss", "k1_in_reward", "alpha_as_loss")


def _choices(axis: Axis) -> str:
    terms = [term for kl_type in PLAIN for term in klplug.parse(kl_type).terms]
    default = next(v for term in terms if (v := getattr(term, axis.name)) is not None)
    choices = [f"`{axis.shown(default)}`"]
    choices += ["a number"] * axis.number
    choices += [f"`{word}`" for word in axis.choices if f"`{word}`" not in choices]
    return ", ".join(choices) + (f"; {axis.elsewhere}" if axis.elsewhere else "")


def refused(kl_types: list[str]) -> str:
    """What ``klplug.parse`` answers to each, which names the nearest valid form."""
    lines = ["| refused | because |", "| --- | --- |"]
    for kl_type in kl_types:
        try:
            klplug.parse(kl_type)
        except ValueError as error:
            lines.append(f"| `{kl_type}` | {cell(str(error))} |")
        else:
            raise PluginError(f"{kl_type} is listed as refused, and parse takes it")
    return "\n".join(lines) + "\n"
