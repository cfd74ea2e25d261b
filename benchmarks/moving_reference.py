"""What ``ref_update`` costs where policy and reference are cut over two ranks: memory and time.

    .venv-openrlhf/bin/python -m benchmarks.moving_reference openrlhf [--out benchmarks/results]
    .venv-verl/bin/python -m benchmarks.moving_reference verl [--out benchmarks/results]

Two processes over gloo on a CPU, each host's own engines, and the adapter's own code of an update.
Of OpenRLHF's two groups of actors a rank has one of each in its process, and hands over by
reference what goes through Ray's object store.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import Storages
from klplug.hosting.moving import Follower
from recipes import cpu_shim
from tests.ranks import on_two_ranks

POLICY = Path(__file__).resolve().parents[1] / "recipes" / "quickstart" / "policy"
UPDATES = ("reset:1", "ema:0.99")
ANSWERS, LENGTH = 8, 128  # of the forward that an update is timed beside
ROUNDS = 9
TITLES = {"openrlhf": "OpenRLHF", "verl": "verl"}

HEADING = """# What a reference that moves costs: {title}

`python -m benchmarks.moving_reference {host}`, two ranks over gloo on a CPU, {title} {version}, the
quickstart's policy of {parameters:,} parameters as policy and reference. "Moving" is the most
memory that a rank takes beside what it held before, while one update runs; "kept" is the average
that stays beside the reference. Both are the larger of the two ranks', over the bytes of the
largest layer of the model, and of the whole model, in the reference's dtype. Times are a rank's own
on a CPU, which others on the machine don't change: of one update, and of that over one forward of
the reference on {answers} sequences of {length} tokens; medians of {rounds} rounds that took turns,
and quartiles.
"""


@dataclass(frozen=True)
class Case:
    """An update in an engine that runs.

    Attributes:
        name: the engine, the dtype of the reference, and how it is cut.
        update: one of the reference's, by the adapter's own code.
        forward: one of the reference's.
        follower: what it keeps.
        itemsize: bytes of one of the reference's weights.
    """

    name: str
    ref_update: str
    update: Callable[[], object]
    forward: Callable[[], object]
    follower: Follower
    itemsize: int


@dataclass(frozen=True)
class Row:
    """What was measured of a case; bytes are the larger of all ranks'."""

    name: str
    ref_update: str
    moving: int
    kept: int
    itemsize: int
    seconds: Sequence[float]
    forwards: Sequence[float]

    def cells(self, layer: int, model: int) -> list[str]:
        ratios = [own / other for own, other in zip(self.seconds, self.forwards, strict=True)]
        low, middle, high = statistics.quantiles(sorted(ratios), n=4)
        layer, model = layer * self.itemsize, model * self.itemsize
        return [
            *(self.name, f"`{self.ref_update}`"),
            *(f"{self.moving / layer:.2f}", f"{self.moving / model:.3f}"),
            *(f"{self.kept / layer:.2f}", f"{self.kept / model:.3f}"),
            f"{1e3 * statistics.median(self.seconds):.1f}",
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
        ]


def measured(case: Case) -> Row:
    """In each rank at once: the engines wait for each other."""
    case.forward()
    with Storages() as storages:
        case.update()  # what it replaces from now on was made while storages were counted
        storages.peak = before = storages.live
        case.update()
    kept = sum(average.nbytes for average in case.follower.average.values())
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, (storages.peak - before, kept))
    pairs = [(cpu_seconds(case.forward), cpu_seconds(case.update)) for _ in range(ROUNDS)]
    forwards, seconds = zip(*pairs, strict=True)
    return Row(
        case.name,
        case.ref_update,
        max(moving for moving, _ in every),
        max(kept for _, kept in every),
        case.itemsize,
        seconds,
        forwards,
    )


def cpu_seconds(function: Callable[[], object]) -> float:
    """Of this process, over all of its threads."""
    started = time.process_time()
    function()
    return time.process_time() - started


def sizes() -> tuple[int, int]:
    """Parameters of the largest layer, and of the whole model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(POLICY))
    layers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer = ".".join(name.split(".")[:3])  # model.layers.0, or model.embed_tokens.weight
        layers[layer] = layers.get(layer, 0) + parameter.numel()
    return max(layers.values()), sum(layers.values())


# ── OpenRLHF ────────────────────────────────────────────────────────────────────────────────────


def openrlhf() -> Iterator[Case]:
    import klplug_openrlhf
    import ray
    from klplug_openrlhf import moving
    from klplug_openrlhf.plan import Plan

    from klplug.hosting.state import Reference
    from tests.openrlhf.moving import Handle, Pair
    from tests.openrlhf.trainer import Bench, configure

    klplug_openrlhf.apply()
    ray.get = lambda found: found
    bench = Bench(POLICY, zero_stage=3, ranks=2)
    configure(bench.args, "k2_as_loss")
    sequences = torch.randint(5, 400, (ANSWERS, LENGTH))
    mask = torch.ones(ANSWERS, LENGTH - 1, dtype=torch.long)
    for ref_update in UPDATES:
        bench.args.klplug.ref_update = ref_update
        for name, whole in (("alike", False), ("otherwise", True)):
            pair = Pair(bench, POLICY)
            policy, reference = pair.groups()
            if whole:  # as many more takers make it one
                policy._actor_handlers = [Handle(pair.policy, execute_batch=of_rank_0(pair))]
                reference._actor_handlers.append(Handle(None, execute_batch=lambda *_: None))
            trainer = SimpleNamespace(
                actor_model_group=policy,
                reference_model_group=reference,
                klplug_names=list(pair.parameters("policy")),
                klplug_models={"reference": Reference(str(POLICY), None)},
            )
            plan = Plan.of(bench.args)
            assert plan is not None

            def update(trainer: Any = trainer, plan: Plan = plan) -> None:
                moving.follow(trainer, plan, 1)

            def forward(model: Any = pair.models["reference"]) -> None:
                with torch.no_grad():
                    model(sequences, mask, torch.ones_like(sequences))

            follower = moving.follower(pair.reference)
            yield Case(f"ZeRO-3, bfloat16, cut {name}", ref_update, update, forward, follower, 2)


def of_rank_0(pair: Any) -> Callable[..., Any]:
    """What rank 0 of the policy answers, in every rank, as Ray's object store has it."""

    def execute_batch(method: str, given: dict[str, Any], *rest: int) -> Any:
        found = pair.policy.execute_batch(method, given, *rest)
        name = given["name"]
        tensor = found.get("tensor")
        if tensor is None:
            parameter = pair.parameters("policy")[name]
            tensor = torch.empty(parameter.ds_shape, dtype=parameter.dtype)
        torch.distributed.broadcast(tensor, 0)
        return {"name": name, "tensor": tensor}

    return execute_batch


# ── verl ────────────────────────────────────────────────────────────────────────────────────────


def verl() -> Iterator[Case]:
    from tests.verl.engine import nested, own_process
    from tests.verl.exact import Run
    from tests.verl.moving import words

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own_process(rank, size, int(os.environ["MASTER_PORT"]))
    narrow = "actor_rollout_ref.ref.fsdp_config.model_dtype="
    engines = (("fsdp2", "fp32", 4), ("fsdp2", "bf16", 2), ("fsdp", "fp32", 4))
    for strategy, dtype, itemsize in engines:
        for ref_update in UPDATES:
            own = (f"{narrow}{dtype}", "trainer.n_gpus_per_node=2")
            run = Run(*words(ref_update, None, *own, strategy=strategy, micro_batch=ANSWERS))
            moving, data = run.worker.actor.klplug_moving, batch(nested)

            def update(moving: Any = moving) -> None:
                moving.follow(1)

            def forward(run: Any = run, data: Any = data) -> None:
                run.worker.compute_ref_log_prob(data.clone())

            name = f"{strategy}, {'float32' if itemsize == 4 else 'bfloat16'}"
            yield Case(name, ref_update, update, forward, moving.follower, itemsize)


def batch(nested: Callable[[list[Any]], Any]) -> Any:
    """Of one rank, to make log-probs of."""
    from verl.utils import tensordict_utils as tu

    prompt = LENGTH // 4
    ids = [torch.randint(5, 280, (LENGTH,)) for _ in range(ANSWERS)]
    tensors = {
        "prompts": nested([row[:prompt] for row in ids]),
        "responses": nested([row[prompt:] for row in ids]),
        "response_mask": nested([torch.ones(LENGTH - prompt) for _ in ids]),
        "loss_mask": nested([torch.ones(LENGTH - prompt) for _ in ids]),
        "input_ids": nested(ids),
        "position_ids": nested([torch.arange(LENGTH) for _ in ids]),
    }
    words = {"temperature": 1.0, "calculate_entropy": False, "compute_loss": False}
    return tu.get_tensordict(tensors, words | {"pad_mode": "no_padding"})


# ── Both ────────────────────────────────────────────────────────────────────────────────────────


def rank(host: str, out: Path) -> None:
    """One of two, RANK in its environment."""
    cpu_shim.install(host)
    torch.manual_seed(0)
    found = [measured(case) for case in {"openrlhf": openrlhf, "verl": verl}[host]()]
    if torch.distributed.get_rank() == 0:
        torch.save(found, out)
    torch.distributed.barrier()


def table(host: str, rows: Sequence[Row]) -> str:
    from importlib.metadata import version

    layer, model = sizes()
    columns = [
        *("engine, reference", "`ref_update`", "moving, layers", "moving, models"),
        *("kept, layers", "kept, models", "one update, ms of CPU", "over a forward"),
    ]
    heading = HEADING.format(
        title=TITLES[host], host=host, version=version(host), parameters=model,
        answers=ANSWERS, length=LENGTH, rounds=ROUNDS,
    )  # fmt: skip
    lines = [heading, "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row.cells(layer, model)) + " |" for row in rows]
    return "\n".join([*lines, ""])


def main() -> None:
    if "RANK" in os.environ:
        rank(sys.argv[1], Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("host", choices=[*TITLES])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    own = cpu_shim.environment(given.host)
    os.environ.update({name: value for name, value in own.items() if name != "PYTHONPATH"})
    with tempfile.TemporaryDirectory() as folder:
        rows = on_two_ranks("benchmarks.moving_reference", Path(folder), given.host)
    text = table(given.host, rows)
    if given.out is None:
        print(text)
    else:
        (given.out / f"moving-reference-{given.host}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
