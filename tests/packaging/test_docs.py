"""README and the rest say what the code does."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import klplug

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
