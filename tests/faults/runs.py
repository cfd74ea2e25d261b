"""A run of either host that saves each step, started as a user starts it, to be disturbed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from recipes import cpu_shim
from recipes.quickstart import openrlhf, run, verl
from recipes.quickstart.progress import Metrics
from recipes.quickstart.settings import HERE, settings
from recipes.shared.processes import HostProcesses

PATIENCE = 1800  # seconds: a busy machine takes several times as long as an idle one
HOST = {"openrlhf": openrlhf, "verl": verl}
ADAPTIVE = {
    "openrlhf": [
        *("--klplug.kl_ctrl", "adaptive", "--klplug.kl_target", "1e-5"),
        *("--klplug.kl_horizon", "1000", "--ckpt.save_steps", "1"),
    ],
    "verl": [
        *("+klplug.kl_ctrl=adaptive", "+klplug.kl_target=1e-5", "+klplug.kl_horizon=1000"),
        "trainer.save_freq=1",
        # What is not saved can't be resumed: the quickstart keeps the weights alone.
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra]",
    ],
}
RESUME = {"openrlhf": ["--ckpt.load_enable"], "verl": ["trainer.resume_mode=auto"]}
# What each host writes last, once a checkpoint is whole.
LATEST = {
    "openrlhf": Path("policy/checkpoints/_actor/latest"),
    "verl": Path("policy/latest_checkpointed_iteration.txt"),
}
# Where it keeps klplug's state of a step: OpenRLHF in DeepSpeed's file, beside the weights.
STATE = {
    "openrlhf": "policy/checkpoints/_actor/global_step{}/mp_rank_00_model_states.pt",
    "verl": "policy/global_step_{}/klplug.json",
}
FULL_DISK = r"""
folder=$1 latest=$2; shift 2
cp -a "$folder" "$folder.kept"
mount -t tmpfs -o size=64m none "$folder"
cp -a "$folder.kept/." "$folder"
(until [ -s "$latest" ]; do sleep 0.2; done; cat /dev/zero > "$folder/filler" 2> /dev/null) &
"$@"; code=$?
rm -f "$folder/filler"
cp -a "$folder/." "$folder.kept"
exit $code
"""
"""A command whose folder is a disk of its own, full from the first whole checkpoint on.

In a namespace, where anybody may mount one; what was on it is left beside the folder.
"""


@dataclass
class Disturbed:
    """A run that goes on, its processes and its log."""

    host: str
    process: subprocess.Popen[bytes]
    processes: HostProcesses
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def steps(self) -> list[Metrics]:
        found = (HOST[self.host].step_metrics(line) for line in self.text.splitlines())
        return [metrics for metrics in found if metrics is not None]

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def wait_for_step(self, step: int) -> None:
        self._wait_until(lambda: any(metrics["step"] >= step for metrics in self.steps))

    def wait_for_a_checkpoint(self) -> None:
        self._wait_until((self.log.parent / LATEST[self.host]).exists)

    def wait_for_words(self, pattern: str) -> None:
        self._wait_until(lambda: re.search(pattern, self.text) is not None)

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            has_ended = self.process.poll() is not None
            if reached():
                return
            assert not has_ended and time.monotonic() < end, run.last_lines(self.log)
            time.sleep(0.5)

    def named(self, title: str) -> psutil.Process:
        """The process of this run whose title has these words."""
        found = [p for p in self.processes.alive() if title in " ".join(p.cmdline())]
        assert found, [p.cmdline() for p in self.processes.alive()]
        return found[0]


@dataclass
class Checkpoint:
    """The newest whole one in the folder of a run.

    Attributes:
        step: after which it was saved.
        file: that has klplug's state.
        kept: that state.
    """

    step: int
    file: Path
    kept: dict[str, Any]

    @classmethod
    def newest(cls, host: str, folder: Path) -> Checkpoint:
        step = int((folder / LATEST[host]).read_text().removeprefix("global_step"))
        file = folder / STATE[host].format(step)
        if host == "verl":
            return cls(step, file, json.loads(file.read_text()))
        import torch

        return cls(step, file, torch.load(file, weights_only=False)["klplug"])


@contextmanager
def running(
    host: str,
    folder: Path,
    *words: str,
    kl_type: str = "k1_in_reward",
    steps: int = 3,
    log: str = "log.txt",
    before: Sequence[str] = (),
) -> Iterator[Disturbed]:
    """A run in ``folder``, whose checkpoints a later one there finds; ended with the block."""
    made = settings(host=host, kl_type=kl_type, steps=steps)
    prompts, output = folder / "prompts.jsonl", folder / log
    run.write_prompts(made, prompts)
    output.write_text("")
    command = HOST[host].command(made, made.recipe, HERE / "policy", prompts, folder / "policy")
    command = [*before, *command, *ADAPTIVE[host], *words]
    with HostProcesses() as processes:
        environment = processes.environment(cpu_shim.environment(host))
        process = processes.start(command, environment, folder, output)
        yield Disturbed(host, process, processes, output)


@contextmanager
def running_on_a_full_disk(host: str, folder: Path) -> Iterator[Disturbed]:
    """A run whose second checkpoint finds no room; the block's end leaves what the disk held."""
    policy, latest = folder / "policy", folder / LATEST[host]
    policy.mkdir()
    names = ["full-disk", str(policy), str(latest)]
    with running(host, folder, before=["unshare", "-Urm", "bash", "-c", FULL_DISK, *names]) as run:
        yield run
    shutil.rmtree(policy)
    policy.with_suffix(".kept").rename(policy)
