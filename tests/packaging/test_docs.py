"""README and the rest say what the code does."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import klplug
from klplug.audit.tables import versions

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("name", [n for n in klplug.__all__ if n != "__version__"])
def test_every_public_name_has_a_docstring(name: str) -> None:
    documented = inspect.getdoc(getattr(klplug, name))
    assert documented and len(documented) > 40


def test_the_version_is_one() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{klplug.__version__}"' in pyproject
    assert f"## [{klplug.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_costs_that_the_faq_says_are_those_of_the_tables() -> None:
    measured: dict[tuple[str, bool, bool], list[float]] = {}
    for results in (ROOT / "benchmarks" / "results").glob("kl_term-*.md"):
        for name, ratio in re.findall(
            r"^\| (.+?) \| \d+ \| ([\d.]+) \(", results.read_text(encoding="utf-8"), re.MULTILINE
        ):
            _, kl_type, *metrics, shape, _ = name.split(", ")
            family = "reward" if kl_type.endswith("_in_reward") else "any"
            for of in (kl_type, family):
                measured.setdefault((of, bool(metrics), shape == "8x512"), []).append(float(ratio))
    faq = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")

    def span(of: str, metrics: bool = False) -> str:
        ratios = measured[of, metrics, False]
        return f"{min(ratios):.{1 if metrics else 2}f} to {max(ratios):.{1 if metrics else 2}f}"

    assert f"k3 as a loss: {span('k3_as_loss,ratio=none')};" in faq
    assert f"k2 as a loss: {span('k2_as_loss,ratio=none')};" in faq
    assert f"k2 with its ratio: {span('k2_as_loss')}, " in faq
    assert f"the ratio is up to {max(measured['any', False, True]):.2f}." in faq
    most = max(measured["any", True, True])
    assert f"is {span('any', metrics=True)} ({most:.1f} at 8×512)" in faq
    plain, with_metrics = (
        measured["reward", m, True] + measured["reward", m, False] for m in (False, True)
    )
    assert f"Its ratio is {min(plain):.2f} to {max(plain):.2f}, " in faq
    assert f"the metrics {min(with_metrics):.1f} to {max(with_metrics):.1f}:" in faq

    table = (ROOT / "benchmarks" / "results" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \S+ \| \d+ \| ([\d.]+) \| (\d+) \|", table, re.MULTILINE)
    ratios, operations = ([float(row[i]) for row in rows] for i in (0, 1))
    assert f"are {min(operations):.0f} to {max(operations):.0f} operations on the device" in faq
    assert f"take {min(ratios):.2f} to {max(ratios):.2f} of the time" in faq


@pytest.mark.parametrize("host", ["verl", "openrlhf"])
def test_the_audits_page_names_every_release_that_it_has_defaults_of(host: str) -> None:
    page = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"`--host-version` names another\.(.*?)\n\n", page, re.DOTALL)
    assert set(versions(host)) <= set(re.findall(r"\d[\w.]*\w", said))


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
