"""README and the rest say what the code does."""

from __future__ import annotations

import inspect
import itertools
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import klplug
from klplug.catalogue import markdown_table
from klplug.spec import (
    BASELINES,
    HEADS,
    HORIZONS,
    LEVELS,
    MODES,
    OPTIONS,
    PLACEMENTS,
    RATIOS,
    REFERENCES,
    REWARD_NORMS,
)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_table_is_the_registrys() -> None:
    assert markdown_table() in README, "run: python -m klplug.catalogue, and paste it"


def test_the_readmes_training_loop_runs() -> None:
    (code,) = re.findall(
        r"```python\n# A training loop of your own.*?\n(.*?)```", README, re.DOTALL
    )
    assert len(code.strip().splitlines()) <= 15
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert namespace["distance"] < 0.05  # type: ignore[operator]


def test_every_kl_type_that_the_documents_name_parses() -> None:
    pattern = r"\b(?:k1|k2|k3|abs|low_var_kl|kl|mse)_(?:as_loss|in_reward)(?:,[a-z_]+=[\w.]+)*"
    refused = {"k1_in_reward,ratio=old"}
    for document in ROOT.glob("*.md"):
        for kl_type in set(re.findall(pattern, document.read_text(encoding="utf-8"))) - refused:
            klplug.parse(kl_type)


def kind(error: ValueError) -> str:
    """A refusal without the names and numbers of the one kl_type that met it."""
    text = re.sub(r"'[a-z0-9]+_(as_loss|in_reward)[^']*'", "...", str(error))
    text = re.sub(r"\b[a-z0-9]+_(as_loss|in_reward)\b", "...", text)
    text = re.sub(r"for (k1|k3|abs) the", "for ... the", text)
    text = re.sub(r"(level|cap|mode)=\S+ is refused", "... is refused", text)
    return re.sub(r"=[^\s,;:]*[^\s,;:.]", "=...", text)


def refusals(kl_types: Iterable[str]) -> dict[str, str]:
    """By its kind, a kl_type that is refused so."""
    met: dict[str, str] = {}
    for kl_type in kl_types:
        try:
            klplug.parse(kl_type)
        except ValueError as error:
            met.setdefault(kind(error), kl_type)
    return met


def test_the_documents_list_every_refusal_of_a_combination() -> None:
    values = {
        "alpha": ("0", "1", "2", "inf"),
        "ratio": RATIOS,
        "level": LEVELS,
        "cap": ("-1", "0.5", "5"),
        "mode": MODES,
        "head": HEADS,
        "horizon": HORIZONS,
        "baseline": BASELINES,
        "bound": ("0", "2"),
        "reference": REFERENCES,
        "reward_norm": REWARD_NORMS,
    }
    assert set(values) == set(OPTIONS)
    names = [f"{e}_{p}" for e in ("k1", "k3", "js", "alpha") for p in PLACEMENTS]
    grid = (
        ",".join([name, *(f"{o}={v}" for o, v in zip(options, chosen, strict=True))])
        for name in names
        for options in itertools.combinations(values, 3)
        for chosen in itertools.product(*(values[o] for o in options))
    )
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    examples = page.partition("<!-- refused -->")[2].partition("\n#")[0]
    listed = refusals(re.findall(r"^- `(.+)`$", examples, re.MULTILINE))
    missing = {k: kl_type for k, kl_type in refusals(grid).items() if k not in listed}
    assert not missing, f"not in docs/options.md: {missing}"


@pytest.mark.parametrize("name", [n for n in klplug.__all__ if n != "__version__"])
def test_every_public_name_has_a_docstring(name: str) -> None:
    documented = inspect.getdoc(getattr(klplug, name))
    assert documented and len(documented) > 40


def test_the_version_is_one() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{klplug.__version__}"' in pyproject
    assert f"## [{klplug.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_path_of_a_machine_and_no_registry_is_committed() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(
        r"(^|[^A-Za-z0-9._/-])/(work|root|home)/|pythonhosted|pypi\.org|registry\.npm"
    )
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path == Path(__file__) or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = pattern.search(text)
        assert not found, f"{name}: {found and found.group()}"


def test_the_core_loads_no_host() -> None:
    script = (
        "import sys, klplug; hosts = {'ray', 'transformers', 'verl', 'openrlhf', 'wrapt'}; "
        "assert not hosts & set(sys.modules), hosts & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
