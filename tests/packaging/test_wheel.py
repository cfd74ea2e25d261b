"""The built wheel: what lands in site-packages, and what a fresh installation can do with it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.bare import bare, run, wheel

__all__ = ["bare", "wheel"]

ROOT = Path(__file__).parents[2]
PACKAGES = {path.name for path in (ROOT / "adapters").iterdir() if path.is_dir()} | {"klplug"}


def test_only_klplugs_packages_land_in_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
    for package in PACKAGES - {"hydra_plugins"}:  # a namespace that others share
        assert f"{package}/py.typed" in names
        assert f"{package}/__init__.py" in names
    assert [n for n in names if n.startswith("hydra_p")] == ["hydra_plugins/klplug_guard.py"]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_no_host_is_a_dependency(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    needed = [line for line in lines if line.startswith("Requires-Dist: ")]
    plain = {line.split()[1].split(">")[0] for line in needed if "extra ==" not in line}
    assert plain == {"wrapt"}
    assert not any(host in line for line in needed for host in ("verl", "openrlhf", "ray", "vllm"))
    assert "Requires-Python: >=3.10" in lines


def test_the_installed_wheel_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index",
         "--target", str(site), str(wheel)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import klplug\n"
        f"assert klplug.__file__.startswith({str(site)!r}), klplug.__file__\n"
        "hosts = {'ray', 'transformers', 'verl', 'openrlhf', 'wrapt'} & set(sys.modules)\n"
        "assert not hosts, hosts\n"
        "import klplug_openrlhf\n"
        "print(klplug.kl_types()['k2_as_loss'].target)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LOC")


def test_importing_an_adapter_is_cheap() -> None:
    """Ray's workers import it at start: neither torch nor a host may come with it."""
    for module in ("klplug_openrlhf", "klplug_openrlhf.install", "klplug_openrlhf.launcher"):
        script = (
            f"import sys, {module}\n"
            "heavy = {'torch', 'ray', 'openrlhf', 'vllm', 'transformers'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, f"{module}: {done.stderr}"


def test_the_command_line_is_small(bare: Path) -> None:
    (site,) = bare.glob("lib/python*/site-packages")
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 40e6


def test_the_command_line_needs_no_torch(bare: Path) -> None:
    script = ROOT / "tests" / "audit" / "scripts" / "verl-grpo.sh"
    assert run(bare, "-c", "import torch").returncode != 0
    for words in (["--version"], ["list"], ["list", "--json"], ["audit", str(script)]):
        done = run(bare, "-m", "klplug", *words)
        here = subprocess.run(
            [sys.executable, "-m", "klplug", *words], env={}, capture_output=True, text=True
        )
        assert (done.stdout, done.returncode) == (here.stdout, here.returncode), done.stderr


def test_without_torch_explain_has_its_words(bare: Path) -> None:
    done = run(bare, "-m", "klplug", "explain", "k3_as_loss", "k3_in_reward+k3_as_loss,cap=5")
    assert done.returncode == 0, done.stderr
    assert "LOC of the forward KL" in done.stdout and "bound of the ratio" in done.stdout
    assert done.stdout.endswith("The curve of c needs torch: pip install 'klplug[torch]'\n")
    done = run(bare, "-m", "klplug", "explain", "k2_as_loss", "--json")
    assert '"coefficient": null' in done.stdout


def test_a_finding_is_explained_without_a_network(bare: Path) -> None:
    done = run(bare, "-m", "klplug", "explain", "dead-zone")
    assert done.stdout.startswith((ROOT / "docs" / "findings" / "dead-zone.md").read_text())


def test_without_torch_the_core_says_what_is_missing(bare: Path) -> None:
    done = run(bare, "-c", "import klplug; print(klplug.parse('mse_as_loss')); klplug.kl_term")
    assert done.stdout == "k2_as_loss\n"
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'torch'"
