"""A node that leaves in the middle of a run over two."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired

import pytest

from recipes.quickstart import run
from recipes.quickstart.settings import HERE, settings
from recipes.shared.processes import HostProcesses
from tests.cluster.nodes import SECOND, WITH_KLPLUG, Cluster, on_cpu
from tests.cluster.test_two_nodes import ON_EACH, OVER_TWO
from tests.faults.runs import ADAPTIVE, RESUME, Checkpoint, Disturbed

# Ray's words, or those of the ranks' own connection, which may notice first.
GONE = r"died|marked dead|Raylet is terminated|closed by peer"


@pytest.mark.slow
@ON_EACH
def test_a_node_that_leaves_is_named_and_a_resume_goes_on(host: str, tmp_path: Path) -> None:
    """Its raylet is killed, as a machine that loses its power; then it joins again."""
    made = settings(host=host, steps=3, kl_type="k1_in_reward", ranks=2)
    prompts, variables = tmp_path / "prompts.jsonl", on_cpu(host, WITH_KLPLUG)
    run.write_prompts(made, prompts)
    side = run.host_side(made)
    words = side.command(made, made.recipe, HERE / "policy", prompts, tmp_path / "policy")
    # Ray takes no resources from who joins a cluster.
    words = [word for word in words if "ray_kwargs" not in word]
    with HostProcesses() as processes:
        cluster = Cluster(processes, variables, "--num-gpus=1")

        def started(*more: str) -> Disturbed:
            log = tmp_path / f"log-{len(more)}.txt"
            log.write_text("")
            command = [*words, *ADAPTIVE[host], *OVER_TWO[host], *more]
            process = processes.start(command, cluster.joined(variables), cluster.scratch, log)
            return Disturbed(host, process, processes, log)

        with cluster.node(sys.executable, variables, "--num-gpus=1"):
            first = started()
            first.wait_for_step(2)
            (raylet,) = [p for p in processes.alive() if is_raylet_of(SECOND, p.cmdline())]
            raylet.kill()
            first.wait_for_words(GONE)
            if host == "verl":  # it may wait for ever for answers that were being drawn there
                with suppress(TimeoutExpired):
                    first.process.wait(30)
                first.process.terminate()
            assert first.wait() != 0
        assert SECOND in first.text and first.steps[-1]["step"] < 3
        checkpoint = Checkpoint.newest(host, tmp_path)
        with cluster.node(sys.executable, variables, "--num-gpus=1"):
            second = started(*RESUME[host])
            assert second.wait() == 0, run.last_lines(second.log)
    # Once for each node whose Ray reads these logs.
    assert sorted({m["step"] for m in second.steps}) == list(range(checkpoint.step + 1, 4))
    assert second.steps[0]["klplug/kl_coef"] == checkpoint.kept["value"]
    assert "WARNING: resuming" not in second.text


def is_raylet_of(ip: str, words: list[str]) -> bool:
    return Path("".join(words[:1])).name == "raylet" and f"--node_ip_address={ip}" in words
