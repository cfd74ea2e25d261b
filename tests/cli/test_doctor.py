"""doctor where no host is, and what it says of variables and names; with a host: tests/<host>."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from klplug.cli import doctor as module
from klplug.cli.doctor import HostReport, Probe, doctor, shadowed_names, text
from klplug.hosting.host import hosts
from tests.cli.conftest import Klplug

NO_HOST = not any(importlib.util.find_spec(host) for host in hosts())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this checkout nor a developer's shell is what is looked at."""
    monkeypatch.chdir(tmp_path)
    for name in module.variables():
        if name != "PYTHONPATH":
            monkeypatch.delenv(name, raising=False)


def without_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_host", lambda *_: HostReport(None, "0.0", {}))


@pytest.mark.skipif(not NO_HOST, reason="a host is installed")
def test_without_a_host_it_says_so_and_is_clean(klplug_command: Klplug) -> None:
    done = klplug_command("doctor")
    assert done.status == 0
    assert set(hosts()) == {"openrlhf", "verl"}
    for host in hosts():
        patch = importlib.import_module(f"klplug_{host}.hooks").PATCH
        assert f"{host:<10} not installed (tested: {patch.tested})" in done.out
    assert "no host is installed" in done.out and "problems   none" in done.out


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("KLPLUG_DISABLE", "1", "keeps klplug out: unset it"),
        ("VERL_USE_EXTERNAL_PLUGINS", "none", "keeps klplug out of verl"),
        ("VERL_USE_EXTERNAL_PLUGINS", "other,more", "keeps klplug out of verl"),
        (
            "RAY_JOB_CONFIG_JSON_ENV_VAR",
            json.dumps({"runtime_env": {"worker_process_setup_hook": "mine.hook"}}),
            "worker_process_setup_hook='mine.hook'",
        ),
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", "{", "no JSON object"),
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", "[]", "no JSON object"),
    ],
)
def test_variables_that_keep_klplug_out(
    klplug_command: Klplug, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, named: str
) -> None:
    without_hosts(monkeypatch)
    monkeypatch.setenv(variable, value)
    done = klplug_command("doctor", "--json")
    assert done.status == 1
    document = json.loads(done.out)
    assert document["environment"][variable] == value
    (problem,) = document["problems"]
    assert named in problem


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KLPLUG_DISABLE", "0"),
        ("VERL_USE_EXTERNAL_PLUGINS", "klplug,klplug_guard"),
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": null}'),
    ],
)
def test_variables_that_do_no_harm(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    without_hosts(monkeypatch)
    monkeypatch.setenv(variable, value)
    assert doctor().problems == []


def test_a_shadowed_name(tmp_path: Path) -> None:
    installed, here = tmp_path / "site", tmp_path / "here"
    for folder in (installed, here):
        (folder / "verl").mkdir(parents=True)
        (folder / "verl" / "__init__.py").touch()
    (problem,) = shadowed_names(here, [str(here), str(installed)])
    assert "verl in the working directory hides" in problem and str(here) in problem
    # A folder without an __init__.py hides no package.
    (here / "verl" / "__init__.py").unlink()
    assert shadowed_names(here, [str(here), str(installed)]) == []
    assert shadowed_names(tmp_path, [str(installed)]) == []


def test_a_host_that_cannot_be_imported_is_a_problem() -> None:
    if not NO_HOST:
        pytest.skip("a host is installed")
    probes = module._probes("verl", ray=False, timeout=120)
    (error,) = [probe.error for probe in probes.values()]
    assert error is not None and "No module named 'verl'" in error
    assert any(
        "No module named 'verl'" in problem
        for problem in module._host_problems("verl", HostReport("0.9.1", "0.9.1", probes))
    )


def a_verl_that(folder: Path, imports: str) -> None:
    (folder / "verl").mkdir()
    (folder / "verl" / "__init__.py").write_text(f"import {imports}\n")


BROKEN = {
    "absent": None,
    "without its library": "raise ImportError('libcudart.so.12: not found', name='an_engine._C')",
}


@pytest.mark.skipif(not NO_HOST, reason="a host is installed")
@pytest.mark.parametrize("engine", BROKEN.values(), ids=BROKEN)
def test_what_the_host_itself_lacks_is_no_problem_of_klplugs(
    engine: str | None, klplug_command: Klplug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_verl_that(tmp_path, imports="an_engine")
    if engine is not None:
        (tmp_path / "an_engine.py").write_text(engine)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "_version", {"verl": "0.9.1"}.get)
    monkeypatch.chdir(tmp_path.parent)
    done = klplug_command("doctor", "--json")
    found = json.loads(done.out)
    assert {p["lacks"] for p in found["hosts"]["verl"]["probes"].values()} == {"an_engine"}
    assert (found["problems"], done.status) == ([], 0)
    (lacking,) = found["lacking"]
    assert "verl can't import an_engine here" in lacking
    assert ("libcudart.so.12" in lacking) == (engine is not None)


def test_a_bare_folder_hides_nothing(tmp_path: Path) -> None:
    """Caches of a package that is gone, in site-packages, beside a checkout's."""
    (tmp_path / "site-packages" / "verl" / "__pycache__").mkdir(parents=True)
    (tmp_path / "here" / "verl").mkdir(parents=True)
    (tmp_path / "here" / "verl" / "__init__.py").touch()
    path = [str(tmp_path / "here"), str(tmp_path / "site-packages")]
    assert shadowed_names(tmp_path / "here", path) == []


@pytest.mark.skipif(not NO_HOST, reason="a host is installed")
def test_what_klplug_lacks_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_verl_that(tmp_path, imports="wrapt.nowhere")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (probe,) = module._probes("verl", ray=False, timeout=120).values()
    assert probe.lacks is None and probe.error is not None and "wrapt.nowhere" in probe.error


@pytest.mark.skipif(not NO_HOST, reason="a host is installed")
def test_each_phase_is_said_as_it_begins_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_verl_that(tmp_path, imports="an_engine")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said: list[str] = []
    module._probes("verl", ray=True, timeout=120, say=said.append)
    begun, ended, *_ = said
    assert begun.endswith("...") and "can't import an_engine" in ended
    assert [line.endswith("...") for line in said] == [True, False, True, False]


def test_a_process_that_gives_no_answer() -> None:
    probes = module._probes("verl", ray=True, timeout=0.05)
    assert {p.error for p in probes.values()} == {"no answer in 0.05 s"}
    assert set(probes) == {"process", "ray_worker"}


def test_an_inactive_hook_and_an_unknown_version_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probes = {"process": Probe({"verl.a": True, "verl.b": False})}
    report = HostReport("0.7.0", "0.9.1", probes)
    monkeypatch.setattr(module, "_host", lambda *_: report)
    found = doctor()
    assert "verl 0.7.0 is not one that was tested (0.9.1)" in found.problems
    assert "verl, process: not active at verl.b" in found.problems
    assert "INACTIVE verl.b" in text(found) and "1 of 2 hooks active" in text(found)


def test_a_version_that_begins_as_a_tested_one_does_is_none_of_them() -> None:
    tested = hosts()["openrlhf"].tested_text
    assert "0.9.10" in tested
    (problem,) = module._host_problems("openrlhf", HostReport("0.9.1", tested, {}))
    assert problem == f"openrlhf 0.9.1 is not one that was tested ({tested})"


@pytest.mark.parametrize(("modules", "problems"), [("", 1), ("klplug_verl", 0)])
def test_a_verl_that_knows_no_plugins(
    monkeypatch: pytest.MonkeyPatch, modules: str, problems: int
) -> None:
    monkeypatch.setattr(module, "_host", lambda *_: HostReport("0.8.0", "0.9.1 and 0.8.0", {}))
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", modules)
    found = doctor().problems
    assert len(found) == problems
    assert all("set VERL_USE_EXTERNAL_MODULES=klplug_verl" in problem for problem in found)
