"""The documentation builds, strictly, and says what the code says."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import klplug
from klplug import spec
from klplug.estimators import ESTIMATORS

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
    pages = "".join(p.read_text() for p in (site / "kl-types").glob("*/index.html"))
    for name in klplug.kl_types():
        if name != "none":
            assert re.search(rf"<h3[^>]*><code>{re.escape(name)}</code>", pages), name


def test_every_curve_is_drawn(site: Path) -> None:
    for source in (DOCS / "kl-types").glob("[!i]*.md"):
        (picture,) = re.findall(r"<!-- curves: (\S+) ", source.read_text(encoding="utf-8"))
        assert (site / "img" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        page = (site / "kl-types" / source.stem / "index.html").read_text()
        assert f'src="../../img/{picture}.png"' in page


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r"""<(?:script|img|iframe)[^>]*\bsrc="?https?:|<link rel="?stylesheet[^>]*https?:"""
    )
    for page in site.rglob("*.html"):
        found = loaded.search(page.read_text())
        assert found is None, f"{page.name}: {found and found.group()}"


def _kind(error: ValueError) -> str:
    """A refusal without the names and numbers of the one kl_type that met it."""
    text = re.sub(r"'[a-z0-9]+_(as_loss|in_reward)[^']*'", "...", str(error))
    text = re.sub(r"\b[a-z0-9]+_(as_loss|in_reward)\b", "...", text)
    text = re.sub(r"for (k1|k3|abs) the", "for ... the", text)
    text = re.sub(r"takes no options, got .*", "takes no options, got ...", text)
    text = re.sub(r"(level|cap|mode)=\S+ is refused", "... is refused", text)
    return re.sub(r"=[^\s,;:]*[^\s,;:.]", "=...", text)


def _refusal(kl_type: str) -> tuple[int, str] | None:
    """The line in klplug that refuses ``kl_type``, and what kind of refusal it is."""
    try:
        klplug.parse(kl_type)
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        assert trace is not None
        return trace.tb_lineno, _kind(error)
    return None


def test_every_refusal_of_combined_options_is_listed() -> None:
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    examples = page.partition("<!-- refused -->")[2].partition("\n#")[0]
    listed = {_refusal(kl_type) for kl_type in re.findall(r"^- `(.+)`$", examples, re.MULTILINE)}
    assert None not in listed
    values = {
        "alpha": ("0.5", "0", "1", "2", "inf"),
        "cap": ("5", "0.5", "-1"),
        "bound": ("2", "0", "-1"),
        **{option: words for option, words in spec.CHOICES.items() if option != "placement"},
    }
    assert set(values) == set(spec.OPTIONS)
    names = [f"{e}_{p}" for e in ESTIMATORS for p in spec.PLACEMENTS] + ["none"]
    # Between them these have every axis, and every form that is exact on answers: of them, three
    # options at once.
    full = {f"{e}_{p}" for e in ("k1", "k2", "k3", "js", "alpha") for p in spec.PLACEMENTS}
    for name in names:
        for count in range(4 if name in full else 3):
            for keys in itertools.combinations(values, count):
                for chosen in itertools.product(*(values[key] for key in keys)):
                    options = (f"{k}={v}" for k, v in zip(keys, chosen, strict=True))
                    kl_type = ",".join([name, *options])
                    refusal = _refusal(kl_type)
                    assert refusal is None or refusal in listed, f"options.md lacks {kl_type}"


def test_every_kl_type_that_the_pages_name_parses() -> None:
    name = rf"\b(?:{'|'.join(ESTIMATORS)})_(?:as_loss|in_reward)(?:,[a-z_]+=[\w.]+)*"
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"^- `.+`$", "", text, flags=re.MULTILINE) if page.stem == "options" else text
        for kl_type in set(re.findall(name, text)):
            klplug.parse(kl_type)


def test_every_metric_is_explained() -> None:
    log_probs = torch.zeros(1, 2)
    mask = torch.ones(1, 2)
    term = klplug.kl_term("k2_as_loss,ratio=none", log_probs, log_probs, mask)
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    for metric in term.metrics:
        assert f"`{metric}`" in page, metric
