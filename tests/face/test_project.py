"""What a project needs so that others can join: metadata, workflows, forms, a citation."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import yaml

import klplug

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [p for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml"]

# Whoever publishes klplug replaces these two in pyproject.toml, and here.
ADDRESS = "https://github.com/OWNER/klplug"
EMAIL = "authors@klplug.example"


def tool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Message:
    out = tmp_path_factory.mktemp("dist")
    done = tool(sys.executable, "-m", "build", "-w", "--no-isolation", "--outdir", out, ROOT)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_the_address_stands_in_one_place() -> None:
    found = tool("git", "grep", "-n", "-F", "-e", ADDRESS, "-e", EMAIL)
    if found.returncode > 1:
        pytest.skip("not a git checkout")
    # In the pages it stands where a command prints it: `make pages` takes it from pyproject.toml.
    printed = ("Each finding has a page: ", ":git clone ")
    lines = [
        line
        for line in found.stdout.splitlines()
        if not line.startswith("tests/face/") and not any(words in line for words in printed)
    ]
    assert [line.partition(":")[0] for line in lines] == ["pyproject.toml"] * 2
    refused = (ROOT / ".github/workflows/release.yml").read_text()
    assert "github.com/OWNER/" in refused and "klplug.example" in refused


def test_the_package_says_where_it_lives(metadata: Message) -> None:
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Repository", "Documentation", "Issues", "Changelog"}
    assert all(url.startswith(ADDRESS) for url in urls.values())
    assert EMAIL in metadata["Author-email"]


def test_on_pypi_every_link_of_the_readme_is_whole(metadata: Message) -> None:
    readme = metadata.get_payload()
    assert isinstance(readme, str)
    links = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert len(links) > 10
    for link in links:
        assert re.match(r"https?://|#", link), link
    files = [re.split(r"/(?:blob|raw)/main/", link) for link in links if link.startswith(ADDRESS)]
    for path in (parts[1] for parts in files if len(parts) == 2):
        assert (ROOT / path.partition("#")[0]).exists(), path


def test_contributing_names_every_file_of_the_core() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = [p.name for p in (ROOT / "klplug").glob("*.py") if not p.name.startswith("__")]
    assert len(files) > 20
    assert not [name for name in files if f"`{name}`" not in text]


def test_the_classifiers_are_what_ci_runs() -> None:
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    runs = set(ci["jobs"]["core"]["strategy"]["matrix"]["python"])
    said = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert set(said) == runs


def test_make_targets_of_the_workflows_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for workflow in WORKFLOWS:
        for target in re.findall(r"run: make \"?([a-z-]+)", workflow.read_text()):
            assert re.search(rf"^{target}\b|^[\w -]*\b{target}[\w -]*:", makefile, re.MULTILINE)


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.github-issue-config", [ROOT / ".github/ISSUE_TEMPLATE/config.yml"]),
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_files_for_github_are_of_their_form(schema: str, files: list[Path]) -> None:
    assert files
    check = (sys.executable, "-m", "check_jsonschema", "--default-filetype", "yaml")
    done = tool(*check, "--builtin-schema", schema, *files)
    assert done.returncode == 0, done.stdout


def test_workflows_give_away_nothing() -> None:
    done = tool(Path(sys.executable).parent / "zizmor", "--offline", "--quiet", *WORKFLOWS)
    assert done.returncode == 0, done.stdout


def test_forms_ask_for_what_doctor_says() -> None:
    for name in ("bug", "gradient"):
        assert "klplug doctor" in (ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text()
    assert "klplug doctor" in (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text()


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == klplug.__version__
