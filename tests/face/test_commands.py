"""Every command that README and docs show: run, or held to what would run it.

A ``klplug`` command runs. What a host is started with is read by ``klplug audit``, which asks the
run's own refusals. Of ``make`` the targets are asked, of ``pip install`` the extras, of
``python -m`` the modules; the runs themselves are in ``make test-runs``.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import klplug
from tests.cli.conftest import Klplug, klplug_command
from tests.cli.test_report import quickstart, tensorboard
from tests.cli.test_soup import written

__all__ = ["klplug_command"]

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
VERL = ["python", "-m", "verl.trainer.main_ppo"]
OPENRLHF = ["python", "-m", "klplug_openrlhf"]
# Shown and not tried here: why.
ELSEWHERE = {
    "git clone": "the address is a placeholder, which tests/face/test_project.py holds",
    "klplug doctor": "takes minutes with a Ray; tests/cli/test_doctor.py",
    "export VERL_USE_EXTERNAL_MODULES=klplug_verl": "tests/verl/test_releases.py",
    ".venv/bin/pre-commit": "a tool's own",
}


def shown() -> list[str]:
    """Each command once, without its remark, its lines joined."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            # An array that a script fills and passes on is an example of the audit's tests.
            if "=(" in block:
                continue
            for line in block.replace("\\\n", " ").splitlines():
                if command := re.sub(r"(^| +)# .*", "", line).strip():
                    found.append(command)
    return list(dict.fromkeys(found))


def of(*starts: str) -> list[str]:
    kept = [c for c in shown() if c.startswith(starts)]
    assert kept, starts
    return [c for c in kept if not c.startswith(tuple(ELSEWHERE))]


def launch(command: str) -> list[str] | None:
    """A host's command line, of a whole one or of the words that a page adds to one."""
    words = [w for w in shlex.split(re.sub(r"<[^>]*>", "", command)) if w != "..."]
    if words[:3] in (VERL, OPENRLHF):
        return words
    if words[0].startswith("--klplug."):
        return [*OPENRLHF, *words]
    if words[0].startswith(("+klplug.", "actor_rollout_ref.", "+actor_rollout_ref.")):
        return [*VERL, *words]
    return None


def test_every_command_is_of_a_kind_that_is_tried() -> None:
    for command in shown():
        plain = command.removeprefix("KLPLUG_TEST_HOSTS= ")
        assert (
            plain.startswith(("klplug ", "make ", "pip install ", "python -m ", *ELSEWHERE))
            or launch(command) is not None
        ), command


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commands name."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "docs" / "examples" / "grpo.sh", "train.sh")
    for folder in ("scripts", "runs", "path/to"):
        Path(folder).mkdir(parents=True)
    shutil.copy("train.sh", "scripts/one.sh")
    shutil.copy("train.sh", "runs/one.sh")
    config = "algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {actor: {use_kl_loss: true}}\n"
    for config_file in ("config.yaml", "path/to/config.yaml"):
        Path(config_file).write_text(config)
    tensorboard(Path("runs/one"))
    quickstart(Path("runs/quickstart"))
    quickstart(Path("runs/quickstart-k3_as_loss"), kl_type="k3_as_loss")
    sampled = [{"prompt": "2 + 2?", "reward": r, "tokens": 12} for r in (0, 1)]
    Path("reference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sampled))
    for model in ("sft-1", "sft-2", "base", "sft"):
        written(Path(model), {"a.weight": [1, 2, 3, 4], "b.weight": [5, 6, 7], "empty": []})


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("command", of("klplug "))
def test_a_command_of_klplug_runs(klplug_command: Klplug, command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if word != "..."]
    done = klplug_command(*words)
    assert done.status in (0, 1) and done.out, done.err


@pytest.mark.parametrize("command", [c for c in shown() if launch(c)])
def test_what_a_page_writes_for_a_host_would_start(klplug_command: Klplug, command: str) -> None:
    words = launch(command)
    assert words is not None
    # What a reader's own command has: groups, or a sampler.
    more = ["algorithm.adv_estimator=grpo"] if words[:3] == VERL else ["--vllm.num_engines", "1"]
    option = "+klplug.{}={}" if words[:3] == VERL else "--klplug.{}={}"
    for key, value in (("kl_type", "k2_as_loss"), ("kl_coef", "1e-3")):
        if "klplug" in command and not any(f"klplug.{key}" in word for word in words):
            more.append(option.format(key, value))
    done = klplug_command("audit", "--json", "--", *words, *more)
    document = json.loads(done.out)
    refused = {"klplug-refuses", "klplug-not-loaded", "rejected-setting", "unknown-setting"}
    assert not refused & {finding["id"] for finding in document["findings"]}
    if asked := re.search(r"kl_type[ =]'?([^'\" ]+)", " ".join(words)):
        assert document["kl_type"] == str(klplug.parse(asked[1]))


@pytest.mark.parametrize("command", of("make ", "KLPLUG_TEST_HOSTS= make "))
def test_a_target_of_make_is_there(command: str) -> None:
    words = command.removeprefix("KLPLUG_TEST_HOSTS= ").split()
    done = subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", of("pip install "))
def test_what_pip_installs_has_that_extra(command: str) -> None:
    (wanted,) = shlex.split(command)[2:]
    name, _, extras = wanted.rstrip("]").partition("[")
    assert name == "klplug"
    assert {extras} <= {
        "",
        *(importlib.metadata.metadata("klplug").get_all("Provides-Extra") or ()),
    }


@pytest.mark.parametrize("command", of("python -m "))
def test_a_module_is_there(command: str) -> None:
    module = command.split()[2]
    if module.startswith("verl."):  # test_what_a_page_writes_for_a_host_would_start
        assert module == VERL[2]
        return
    path = ROOT / Path(*module.split("."))
    adapter = ROOT / "adapters" / module / "__main__.py"
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists() or adapter.exists()
