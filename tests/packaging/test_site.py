"""The documentation builds, strictly, and says what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import klplug
from docs.build import made, stale
from klplug.axes import OPTIONS
from klplug.estimators import ESTIMATORS
from klplug.refusals import MISSPELT, REFUSALS, Refused

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_every_registered_kl_type_has_a_section(site: Path) -> None:
    pages = "".join(p.read_text() for p in (site / "kl-types").rglob("index.html"))
    for name in klplug.kl_types():
        if name != "none":
            assert re.search(rf"<h3[^>]*><code>{re.escape(name)}</code>", pages), name


def test_what_is_made_is_fresh() -> None:
    """Tables, curves, refusals and output in README and docs are what the code says."""
    assert [str(path.relative_to(ROOT)) for path in stale(write=False)] == [], "run: make pages"


def test_a_stale_page_is_found(tmp_path: Path) -> None:
    page = DOCS / "kl-types" / "k1.md"
    old = tmp_path / "k1.md"
    text = page.read_text(encoding="utf-8")
    assert text.count("| estimate | x |") == 2
    old.write_text(text.replace("| estimate | x |", "| estimate | y |"), encoding="utf-8")
    assert made(old) != old.read_text(encoding="utf-8")
    assert made(page) == text


def test_every_curve_is_on_its_page(site: Path) -> None:
    for source in (DOCS / "kl-types").glob("[!i]*.md"):
        pictures = re.findall(r"\(\.\./img/(\S+)\.svg\)", source.read_text(encoding="utf-8"))
        assert any(picture.startswith("c-") for picture in pictures)
        page = (site / "kl-types" / source.stem / "index.html").read_text()
        for picture in pictures:
            assert (site / "img" / f"{picture}.svg").read_text().startswith("<svg")
            assert f'src="../../img/{picture}.svg"' in page


def test_no_picture_has_tex_left() -> None:
    """Pictures are drawn without TeX, so a tick that is written in it would stand as it is."""
    pictures = list((DOCS / "img").glob("*.svg"))
    assert pictures
    for picture in pictures:
        assert "$" not in picture.read_text(encoding="utf-8"), picture.name


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r"""<(?:script|img|iframe)[^>]*\bsrc="?https?:|<link rel="?stylesheet[^>]*https?:"""
    )
    for page in site.rglob("*.html"):
        found = loaded.search(page.read_text())
        assert found is None, f"{page.name}: {found and found.group()}"


def test_formulas_are_typeset(site: Path) -> None:
    """Of every formula that a source has, MathML; none is left as TeX."""
    for source in DOCS.glob("*.md"):
        text = source.read_text(encoding="utf-8")
        page = site / ("" if source.stem == "index" else source.stem) / "index.html"
        built = page.read_text()
        assert built.count("<math ") >= text.count("\n```math\n"), source.name
        assert ('display="block"' in built) is ("\n```math\n" in text), source.name
        assert "arithmatex" not in built, source.name
    derivations = (site / "derivations" / "index.html").read_text()
    assert "<mi>&#x1D53C;</mi>" in derivations or "𝔼" in derivations  # E, as an expectation's


def test_the_api_page_has_every_public_name(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    for name in klplug.__all__:
        if name != "__version__":
            assert f'id="klplug.{name}"' in page, name
    # A parameter's words come from its docstring.
    assert "log pi_theta of the sampled tokens" in page


def test_what_the_page_says_of_controllers_its_table_has() -> None:
    from docs.plant import rows

    found = {(run, name.strip("`")): cells for run, name, *cells in rows()}
    late = [run for run, _ in found if "delay" in run]
    for (run, name), (_, start, _, jump, _) in found.items():
        failures = [int(share.split()[0]) for share in (start, jump)]
        if name == "pid":
            assert failures == [0, 0]
        elif name == "adaptive":
            assert (sum(failures) > 0) is (run in late)
        elif "1024" in name and run in late:
            assert sum(failures) >= 20
        elif name == "fixed" or "half" in name:
            assert failures[1] == 20


def _refusal(kl_type: str) -> str | None:
    """The id of what refuses ``kl_type``."""
    try:
        klplug.parse(kl_type)
    except Refused as error:
        return error.refusal
    return None


def test_every_refusal_is_listed_and_nothing_else() -> None:
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    examples = page.partition("<!-- made: refused -->")[2].partition("<!-- /made -->")[0]
    listed = [
        _refusal(kl_type) for kl_type in re.findall(r"^\| `(.+?)` \|", examples, re.MULTILINE)
    ]
    ids = [*MISSPELT, *(refusal.id for refusal in REFUSALS)]
    assert set(listed) == set(ids)
    assert len(set(ids)) == len(ids)


def test_every_kl_type_that_the_pages_name_parses() -> None:
    name = rf"\b(?:{'|'.join(ESTIMATORS)})_(?:as_loss|in_reward)(?:,[a-z_]+=[\w.]*\w(?::\w+)?)*"
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        if page.stem == "options":
            text = re.sub(r"<!-- made: refused -->.*?<!-- /made -->", "", text, flags=re.DOTALL)
        for kl_type in set(re.findall(name, text)):
            klplug.parse(kl_type)


def test_every_option_is_in_the_glossary() -> None:
    words = re.findall(r"\*\*(.+?)\*\*", (DOCS / "glossary.md").read_text(encoding="utf-8"))
    assert set(OPTIONS) <= {word for some in words for word in some.split(", ")}


def test_every_metric_is_explained() -> None:
    log_probs = torch.zeros(1, 2)
    mask = torch.ones(1, 2)
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    for kl_type in (
        *("k2_as_loss", "k2_as_loss,bound=1,weight=positive", "k2_as_loss,head=combined"),
        *("exact_as_loss", "k2_as_loss,vocab=topk:1"),
    ):
        given = dict.fromkeys(klplug.parse(kl_type).requires, log_probs)
        given |= {"ref_log_probs": log_probs, "sample_weights": {"positive": mask}}
        given |= {"kl_coef": 1.0, "clip_range": 0.2}
        term = klplug.kl_term(kl_type, log_probs=log_probs, response_mask=mask, **given)
        for metric in term.metrics:
            assert f"`{metric}`" in page, f"{kl_type}: {metric}"
