"""``klplug doctor``: what is installed, what is hooked, and what stands in the way."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any

import typer

import klplug
from klplug.cli.output import AsJson, print_json
from klplug.cli.status import Status
from klplug.hosting.host import Host, hosts

PACKAGES = (
    "torch", "wrapt", "ray", "vllm", "deepspeed", "transformers", "flash-attn", "hydra-core",
)  # fmt: skip
VARIABLES = ("KLPLUG_DISABLE", "RAY_ADDRESS", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")
TIMEOUT = 300  # seconds; a host's first import on a cold disk is slow


@dataclass(frozen=True)
class Probe:
    """The hooks of one kind of process: by path whether active, and the error if there was one."""

    hooks: dict[str, bool] = field(default_factory=dict)
    error: str | None = None
    lacks: str | None = None
    """What the host imports and can't: ``error`` is the host's own then, and not klplug's."""

    @property
    def text(self) -> str:
        if self.lacks is not None:
            return f"not looked at: the host itself can't import {self.lacks}"
        if self.error is not None:
            return self.error
        return f"{sum(self.hooks.values())} of {len(self.hooks)} hooks active"


@dataclass(frozen=True)
class HostReport:
    """One host: its version here (``None``: not installed), those tested, and its hooks."""

    version: str | None
    tested: str
    probes: dict[str, Probe]


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` found; sentences, none where all is well.

    ``problems`` are in klplug's way; ``lacking`` is what a host needs for itself and has not.
    """

    klplug: str
    klplug_path: str
    python: str
    platform: str
    packages: dict[str, str | None]
    hosts: dict[str, HostReport]
    environment: dict[str, str]
    problems: list[str]
    lacking: list[str]


Say = Callable[[str], None]


def doctor(ray: bool = True, timeout: float = TIMEOUT, say: Say = lambda line: None) -> Diagnosis:
    """Look at this environment; starts a process per installed host, and in it a Ray.

    Args:
        ray: also ask a Ray worker.
        timeout: seconds for each host's process.
        say: is told each phase as it begins and ends: an import alone can take a minute.
    """
    found = {name: _host(host, ray, timeout, say) for name, host in hosts().items()}
    environment = {name: os.environ[name] for name in variables() if name in os.environ}
    problems = [
        *_environment_problems(environment, found),
        *shadowed_names(Path.cwd(), sys.path),
        *(problem for host, report in found.items() for problem in _host_problems(host, report)),
    ]
    return Diagnosis(
        klplug=klplug.__version__,
        klplug_path=str(Path(klplug.__file__).parent),
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        hosts=found,
        environment=environment,
        problems=problems,
        lacking=[line for host, report in found.items() for line in _lacking(host, report)],
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def variables() -> list[str]:
    """The variables of the environment that are looked at."""
    return [*VARIABLES, *(name for host in hosts().values() for name in host.variables)]


def _host(host: Host, ray: bool, timeout: float, say: Say) -> HostReport:
    version = _version(host.name)
    hooked = version is not None and host.patch is not None
    if hooked:
        say(f"{host.title} {version}")
    probes = _probes(host.name, ray, timeout, say) if hooked else {}
    return HostReport(version, host.tested_text, probes)


PHASES = {
    "process": "imports it in a fresh process, and looks at each hook",
    "ray_worker": "starts a Ray, and looks at each hook in a worker",
}


def _probes(host: str, ray: bool, timeout: float, say: Say = lambda line: None) -> dict[str, Probe]:
    kinds = ("process", "ray_worker") if ray else ("process",)
    with tempfile.TemporaryDirectory(prefix="klplug-doctor-") as folder:
        answer, said = Path(folder) / "answer.json", Path(folder) / "said.txt"
        # As hosts are started: python -m puts the working directory first on the path.
        command = [sys.executable, "-m", "klplug.cli.probe", host, str(answer)]
        with (
            said.open("w") as output,
            subprocess.Popen(
                [*command, *(["--ray"] if ray else [])],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            end = _waited(process, answer, kinds, timeout, say)
        answers = _answers(answer)
        last = said.read_text(errors="replace").strip().splitlines()[-1:]
    missing = Probe(error=": ".join([end, *last]))
    return {kind: Probe(**answers[kind]) if kind in answers else missing for kind in kinds}


def _answers(file: Path) -> dict[str, Any]:
    answers: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return answers


def _waited(
    process: subprocess.Popen[bytes], file: Path, kinds: Sequence[str], timeout: float, say: Say
) -> str:
    """How a probing process ended, each of its phases said as it begins and ends."""
    began = time.monotonic()
    told = 0
    say(f"  {PHASES[kinds[0]]} ...")
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(0.2, timeout))
        answers = _answers(file)
        while told < len(kinds) and kinds[told] in answers:
            say(f"    {Probe(**answers[kinds[told]]).text} ({time.monotonic() - began:.0f} s)")
            told += 1
            if told < len(kinds):
                say(f"  {PHASES[kinds[told]]} ...")
        if process.returncode is not None:
            return f"the process ended with status {process.returncode}"
        if time.monotonic() - began > timeout:
            process.kill()
            return f"no answer in {timeout:g} s"


def _host_problems(host: str, report: HostReport) -> list[str]:
    problems = []
    if report.version is not None and report.version not in report.tested.replace(",", " ").split():
        problems.append(f"{host} {report.version} is not one that was tested ({report.tested})")
    for kind, probe in report.probes.items():
        where = f"{host}, {kind.replace('_', ' ')}"
        inactive = [path for path, active in probe.hooks.items() if not active]
        if probe.lacks is not None:
            continue
        if probe.error is not None:
            problems.append(f"{where}: {probe.error}")
        elif inactive:
            problems.append(f"{where}: not active at {', '.join(inactive)}")
    return problems


def _lacking(host: str, report: HostReport) -> list[str]:
    """What a host needs for itself, and has not; each once."""
    missing = {probe.lacks: probe.error for probe in report.probes.values() if probe.lacks}
    title = hosts()[host].title
    return [
        f"{title} can't import {name} here ({error}): it does not start without. Where klplug "
        "joins it could not be looked at"
        for name, error in missing.items()
    ]


def _environment_problems(environment: dict[str, str], found: dict[str, HostReport]) -> list[str]:
    problems = []
    if environment.get("KLPLUG_DISABLE") == "1":
        problems.append("KLPLUG_DISABLE=1 keeps klplug out: unset it")
    for name, report in found.items():
        problems += hosts()[name].problems(environment, report.version)
    return problems


def names() -> list[str]:
    """The packages that a directory of their name would hide."""
    return ["klplug", *(n for host in hosts().values() for n in (*host.packages, host.name))]


def shadowed_names(folder: Path, path: Sequence[str]) -> list[str]:
    """What ``folder`` hides of klplug and its hosts from a ``python -m`` started in it."""
    here = str(folder)
    elsewhere = [place for place in path if place and os.path.abspath(place) != here]
    problems = []
    for name in names():
        installed = PathFinder.find_spec(name, elsewhere)
        found = PathFinder.find_spec(name, [here, *elsewhere])
        # Without an origin it is a bare folder, which is no package's.
        if installed is None or installed.origin is None or found is None:
            continue
        if found.origin == installed.origin:
            continue
        problems.append(
            f"{name} in the working directory hides the installed one from python -m: "
            f"{found.origin or name} is found, not {installed.origin}. Run from elsewhere"
        )
    return problems


def doctor_command(
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Also ask a Ray worker.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds for each host.")] = TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Say what is installed and hooked, here and in a Ray worker: paste it into an issue."""
    found = doctor(ray, timeout, say=lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        print_json(asdict(found))
    else:
        print(text(found))
    # A host that can't start trains with no other KL either: what it lacks is said, and no more.
    raise typer.Exit(Status.FINDINGS if found.problems else Status.CLEAN)


def text(found: Diagnosis) -> str:
    """A diagnosis as lines of plain text."""
    lines = [
        f"klplug     {found.klplug} ({found.klplug_path})",
        f"python     {found.python}, {found.platform}",
        "packages   " + ", ".join(f"{n} {v}" for n, v in found.packages.items() if v is not None),
    ]
    for host, report in found.hosts.items():
        version = report.version or "not installed"
        lines.append(f"{host:<10} {version} (tested: {report.tested})")
        for kind, probe in report.probes.items():
            lines.append(f"  {kind.replace('_', ' ')}: {probe.text}")
            if probe.error is not None or not all(probe.hooks.values()):
                lines += [
                    f"    {'active  ' if active else 'INACTIVE'} {path}"
                    for path, active in probe.hooks.items()
                ]
    if found.environment:
        lines.append("variables")
        lines += [f"  {name}={value}" for name, value in found.environment.items()]
    if not any(report.version for report in found.hosts.values()):
        lines.append("no host is installed in this environment: the core works alone")
    lines.append(f"problems   {len(found.problems) or 'none'}")
    lines += [f"  - {problem}" for problem in found.problems]
    if found.lacking:
        lines += ["not klplug's, but the host's own:", *(f"  - {line}" for line in found.lacking)]
    return "\n".join(lines)
