"""A third host: a package and an entry point, and not a line changed in klplug."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from klplug.audit import Report, audit, tables
from klplug.cli.doctor import doctor, shadowed_names
from klplug.hosting.host import Host, hosts
from klplug.hosting.patching import HookError

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parent / "toy"
STOCK = ["python", "-m", "toyrl.train"]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """The toy trainer and klplug's adapter for it, installed: as pip would leave them."""
    for name, version, declared in (
        ("toyrl", "1.0", ""),
        ("klplug_toy", "0.1", "[klplug.hosts]\ntoyrl = klplug_toy.host:HOST\n"),
    ):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}")
        (folder / "entry_points.txt").write_text(declared)
    places = [str(tmp_path), str(TOY)]
    monkeypatch.setattr(sys, "path", [*places, *sys.path])
    others = [str(ROOT), str(ROOT / "adapters")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*places, *others]))
    _forget()
    yield hosts()["toyrl"]
    if "klplug_toy.hooks" in sys.modules:
        sys.modules["klplug_toy.hooks"].PATCH.restore()
    for name in [n for n in sys.modules if n.partition(".")[0] in ("toyrl", "klplug_toy")]:
        del sys.modules[name]
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    importlib.invalidate_caches()
    for cached in (hosts, tables.installed, tables.stored):
        cached.cache_clear()


def said(report: Report) -> list[str]:
    return [f.message for f in report.findings if f.id == "klplug-refuses"]


def test_it_is_found_beside_the_others_and_loads_nothing(toy: Host) -> None:
    assert set(hosts()) == {"openrlhf", "toyrl", "verl"}
    assert not {"toyrl", "klplug_toy.hooks", "klplug_toy.reading"} & set(sys.modules)


def test_its_hook_gives_the_gradient_asked_for(toy: Host) -> None:
    assert toy.hooks is not None
    toy.hooks.check(("ref_log_probs", "old_log_probs"))
    toy.hooks.apply()
    assert toy.hooks.status() == {"toyrl.train.kl_loss": True}
    train = importlib.import_module("toyrl.train")
    log_probs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    ref, mask = torch.tensor([[-1.5, -1.0], [-0.5, -9.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    for kind, wanted in (
        ("k2_as_loss", [[0.5, -1.0], [0.0, 0.0]]),  # log(pi/ref)
        ("k3", [[1 - 2.718281828**-0.5, 1 - 2.718281828], [0.0, 0.0]]),  # the trainer's own
    ):
        (found,) = torch.autograd.grad(train.kl_loss(log_probs, ref, mask, kind).sum(), log_probs)
        torch.testing.assert_close(found, torch.tensor(wanted))


def test_a_hook_that_moved_stops_it(toy: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    train = importlib.import_module("toyrl.train")
    monkeypatch.setattr(train, "kl_loss", lambda log_probs: log_probs)
    assert toy.hooks is not None
    with pytest.raises(HookError, match=r"toyrl 1\.0: at toyrl\.train\.kl_loss"):
        toy.hooks.check()


COMMANDS: list[tuple[list[str], str]] = [
    ([], "--klplug.kl_type is missing"),
    (["--klplug.kl_type", "k2_as_loss"], "needs a kl_coef"),
    (["--klplug.kl_type", "k1_in_reward", "--klplug.kl_coef", "0.5"], "in its loss only"),
    (
        ["--klplug.kl_type", "k2_as_loss,horizon=sequence,baseline=batch",
         "--klplug.kl_coef", "0.5", "--samples", "1"],
        "with --samples 1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), COMMANDS)
def test_the_run_and_the_audit_refuse_in_the_same_words(
    toy: Host, flags: list[str], words: str
) -> None:
    from klplug_toy.settings import derive  # type: ignore[import-not-found, unused-ignore]

    with pytest.raises(ValueError, match=words) as error:
        derive(_parsed(flags))
    assert said(audit(["python", "-m", "klplug_toy", *flags])) == [
        f"klplug refuses to start: {str(error.value).rstrip('.')}."
    ]


def _parsed(flags: list[str]) -> argparse.Namespace:
    parser: Any = importlib.import_module("toyrl.train").parser()
    parser.add_argument("--klplug.kl_type")
    parser.add_argument("--klplug.kl_coef", type=float)
    args: argparse.Namespace = parser.parse_args(flags)
    return args


def test_the_audit_reads_it_and_its_advice_starts(toy: Host) -> None:
    report = audit([*STOCK, "--kl-kind", "k3", "--kl-coef", "0.2", "--samples", "8"])
    assert (report.host, report.host_version, report.version_from) == ("toyrl", "1.0", "installed")
    assert (report.gradient, report.beta, report.recommended) == ("forward", 0.2, "k2_as_loss")
    assert report.after == (
        *("python", "-m", "klplug_toy", "--samples", "8"),
        *("--klplug.kl_type", "k2_as_loss", "--klplug.kl_coef", "0.2"),
    )
    assert audit(report.after).gradient == "reverse"
    done = subprocess.run(
        [sys.executable, *report.after[1:]], cwd=TOY, capture_output=True, text=True, check=True
    )
    stock = subprocess.run(
        [sys.executable, "-m", "toyrl.train", "--kl-coef", "0.2", "--samples", "8"],
        cwd=TOY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(done.stdout.split(",")) == 5 and done.stdout != stock.stdout
    assert audit([*STOCK, "--no-such", "1"]).findings[0].id == "rejected-setting"
    assert audit([*STOCK, "--kl-coef", "1"], host_version="0.9").version_from == "given"


def test_doctor_finds_its_hooks_and_what_stands_in_the_way(
    toy: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOY_OFF", "1")
    found = doctor(ray=False)
    report = found.hosts["toyrl"]
    assert (report.version, report.tested) == ("1.0", "1.0")
    assert report.probes["process"].error is None
    assert report.probes["process"].hooks == {"toyrl.train.kl_loss": True}
    about_it = [problem for problem in found.problems if "toy" in problem.lower()]
    assert about_it == ["TOY_OFF=1 keeps klplug out"]
    (tmp_path / "klplug_toy").mkdir()
    (tmp_path / "klplug_toy" / "__init__.py").touch()
    (hidden,) = shadowed_names(tmp_path, sys.path)
    assert "klplug_toy in the working directory hides" in hidden


def test_explain_says_what_serves_a_kl_type(toy: Host) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "klplug", "explain", "k2_as_loss", "k1_in_reward"],
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = (line for line in done.stdout.splitlines() if "served by Toy RL" in line)
    assert row.split()[-4:] == ["yes", "│", "no", "│"]


def test_a_report_knows_its_tags(toy: Host) -> None:
    from klplug.report.runs import METRICS

    assert "toy/score" in next(metric.tags for metric in METRICS if metric.name == "reward")
