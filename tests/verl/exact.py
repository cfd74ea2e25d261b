"""verl's own worker of policy and reference in this process, and its trainers over it.

``python -m tests.verl.exact SETTING... OUT.pt`` is one rank of several, RANK in its environment.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.references import POLICY
from tests.verl.engine import ANSWERS, PACKED, PROMPTS, nested, own_process, packed_attention
from tests.verl.tensors import IS_LEGACY
from tests.verl.test_settings import own
from tests.verl.trainer import TRAINERS, derived

COEF = 0.01  # as test_settings.own has it
ROLLOUT = "actor_rollout_ref.rollout."
KEYS = [f"{i}_0_0" for i in range(len(ANSWERS))]


def overrides(
    kl_type: str,
    reference: Path | None,
    *more: str,
    trainer: str = TRAINERS[0],
    strategy: str = "fsdp2",
    packed: bool = False,
    dynamic: int | None = None,
    micro_batch: int = 8,
    dtype: str = "fp32",
    fused: bool = False,
) -> list[str]:
    """The settings of a run that this process can train."""
    sides = ("actor_rollout_ref.actor", "actor_rollout_ref.ref")
    infer = (f"{ROLLOUT}log_prob", f"{sides[1]}.log_prob")
    cut = [f"{sides[0]}.ppo_micro_batch_size_per_gpu={micro_batch}"]
    cut += [f"{side}_micro_batch_size_per_gpu={micro_batch}" for side in infer]
    if dynamic is not None:
        cut += [f"{sides[0]}.use_dynamic_bsz=True"]
        cut += [f"{sides[0]}.ppo_max_token_len_per_gpu={dynamic}"]
        cut += [f"{side}_max_token_len_per_gpu={dynamic}" for side in infer]
    return [
        *own(kl_type, *(() if reference is None else (f"+klplug.ref_model={reference}",))),
        *(f"{side}.strategy={strategy}" for side in sides),
        *(f"{side}.fsdp_config.strategy={strategy}" for side in sides if IS_LEGACY),
        *(f"{side}.use_torch_compile=False" for side in sides),
        *(f"{side}.fsdp_config.model_dtype={dtype}" for side in sides),
        *(f"+{side}.fsdp_config.mixed_precision.param_dtype={dtype}" for side in sides),
        "actor_rollout_ref.actor.fsdp_config.use_orig_params=True",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "data.train_batch_size=4",
        f"{ROLLOUT}name=hf",
        f"{ROLLOUT}temperature=0.8",
        f"actor_rollout_ref.model.use_remove_padding={packed}",
        f"actor_rollout_ref.model.use_fused_kernels={fused}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation="
        + (PACKED if packed else "sdpa"),
        *cut,
        *(["trainer.use_v1=False"] if trainer == "ray" and "v1" in TRAINERS else []),
        *more,
    ]


@functools.cache
def fsdp_on_cpu() -> None:
    """verl's engine of ``strategy=fsdp``, which it has for devices only, without what needs one."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp import transformer_impl

    class OnCPU(FullyShardedDataParallel):
        def __init__(self, *args: Any, **given: Any) -> None:
            own = {"sync_module_states": False, "cpu_offload": None}
            super().__init__(*args, **given | own)

    transformer_impl.FSDP = OnCPU
    transformer_impl.get_device_id = lambda: torch.device("cpu")
    register = EngineRegistry.register("language_model", backend=["fsdp"], device=["cpu"])
    register(type("CPUFSDPEngine", (transformer_impl.FSDPEngineWithLMHead,), {}))


class Run:
    """Policy and reference of a run, the policy's optimiser held still."""

    step = 1  # of the trainer

    def __init__(self, *words: str) -> None:
        from verl.workers.engine_workers import ActorRolloutRefWorker

        if any(PACKED in word for word in words):
            packed_attention()
        if any(word.endswith("strategy=fsdp") for word in words):
            fsdp_on_cpu()
        torch.set_num_threads(1)
        self.config, _ = derived(*words, model=str(POLICY))
        own = self.config.actor_rollout_ref
        self.worker = ActorRolloutRefWorker(own, role="actor_rollout_ref")
        # The sampler needs a GPU. With an adapter verl asks for no reference.
        self.worker.role = "actor" if own.model.lora_rank else "actor_ref"
        self.worker.init_model()
        self.gradients: list[Tensor] = []
        self.worker.actor.engine.optimizer_step = self._record

    def _record(self) -> float:
        named = self.worker.actor.engine.module.named_parameters()
        grads = [p.grad for _, p in named if p.grad is not None]
        whole = [getattr(grad, "full_tensor", lambda g=grad: g)() for grad in grads]
        self.gradients.append(torch.cat([g.flatten().double() for g in whole]))
        return float(self.gradients[-1].norm())

    def gradient(self) -> Tensor:
        found = torch.stack(self.gradients).sum(0)
        self.gradients.clear()
        return found


def rows() -> dict[str, list[Tensor]]:
    """Eight answers of one to seven tokens; of one a token in the middle does not count."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 280, (n,), generator=generator) for n in PROMPTS]
    answers = [torch.randint(5, 280, (n,), generator=generator) for n in ANSWERS]
    masks = [torch.ones(n) for n in ANSWERS]
    masks[1][2] = 0  # a tool's output
    return {"prompts": prompts, "responses": answers, "response_mask": masks}


class Queue:
    """In place of the v1 trainer's queue, and of its workers' bridge to it."""

    def __init__(self, fields: dict[str, Tensor], world: tuple[int, int] = (0, 1)) -> None:
        self.keys, self.partition_id, self.extra_info = KEYS, "train", dict[str, Any]()
        self.fields, self.world = fields, world

    def kv_batch_get(self, keys: Any, partition_id: str, select_fields: Any) -> Any:
        from verl.utils import tensordict_utils as tu

        return tu.get_tensordict({k: v for k, v in self.fields.items() if k in select_fields})

    def kv_batch_put(self, keys: Any, partition_id: str, fields: Any) -> Queue:
        self.fields |= dict(fields)
        return self

    def __len__(self) -> int:
        return len(self.keys)

    def bridged(self, call: Any) -> Any:
        """A worker's function as the trainer calls it: all fields in, all tensors out."""
        from verl.utils import tensordict_utils as tu

        def called(batch: Any) -> Any:
            rank, size = self.world
            given = tu.get_tensordict(dict(self.fields), dict(batch.extra_info))
            output = call(tu.chunk_tensordict(given, size)[rank])
            tensors = {k: v for k, v in output.items() if isinstance(v, Tensor)}
            if size > 1:
                parts: list[Any] = [None] * size
                torch.distributed.all_gather_object(
                    parts, {k: [row.clone() for row in v.unbind()] for k, v in tensors.items()}
                )
                tensors = {k: nested([row for part in parts for row in part[k]]) for k in tensors}
            self.fields |= tensors
            return output if not tensors else self

        return called


Between = Callable[[Any], None]
"""Changes the batch's tensors between reference and update."""


def through_v1(
    run: Run, world: tuple[int, int] = (0, 1), between: Between = lambda _: None
) -> tuple[Tensor, dict[str, Any]]:
    """Reference and update of the v1 trainer's step; gradient and metrics."""
    from verl.trainer.ppo.v1 import trainer_base

    from tests.verl.trainer import v1_trainer

    trainer = v1_trainer(run.config)
    trainer.global_steps = run.step
    made = rows()
    ids = [torch.cat(pair) for pair in zip(made["prompts"], made["responses"], strict=True)]
    fields = {name: nested(tensors) for name, tensors in made.items()} | {
        "input_ids": nested(ids),
        "position_ids": nested([torch.arange(len(row)) for row in ids]),
        "loss_mask": nested([mask.clone() for mask in made["response_mask"]]),
        "advantages": nested([torch.zeros(n) for n in ANSWERS]),
        "rollout_log_probs": nested([torch.zeros(n) for n in ANSWERS]),
    }
    queue = Queue(fields, world)
    queue.extra_info["temperature"] = run.config.actor_rollout_ref.rollout.temperature
    workers = mock.Mock()
    for name in ("compute_ref_log_prob", "compute_log_prob", "update_actor"):
        setattr(workers, name, queue.bridged(getattr(run.worker, name)))
    trainer.ref_in_actor = run.worker.ref is None
    trainer.ref_policy_wg = trainer.actor_rollout_wg = workers
    metrics: dict[str, Any] = {}
    with mock.patch.object(trainer_base, "tq", queue):
        trainer._compute_ref_log_prob(queue, metrics)
        queue.fields["old_log_probs"] = queue.fields["ref_log_prob"]
        between(queue.fields)
        trainer.klplug.joined = True  # the advantage stage is not what is tested
        metrics |= trainer.klplug.report()
        trainer._update_actor(queue, metrics)
    return run.gradient(), metrics


def through_fit(run: Run, between: Between = lambda _: None) -> tuple[Tensor, dict[str, Any]]:
    """The same of ``RayPPOTrainer``, whose rows are padded on both sides."""
    from verl import DataProto
    from verl.utils.metric import reduce_metrics

    from tests.verl.trainer import ray_trainer

    trainer = ray_trainer(run.config)
    trainer.global_steps = run.step
    made = rows()
    prompt, answer = max(PROMPTS) + 1, max(ANSWERS) + 2

    def left(row: Tensor) -> Tensor:
        return torch.nn.functional.pad(row, (prompt - len(row), 0))

    def right(row: Tensor) -> Tensor:
        return torch.nn.functional.pad(row, (0, answer - len(row)))

    prompts = torch.stack([left(row) for row in made["prompts"]])
    responses = torch.stack([right(row) for row in made["responses"]])
    attention = torch.cat([prompts, responses], 1).ne(0).long()
    data = DataProto.from_dict(
        tensors={
            "prompts": prompts,
            "responses": responses,
            "input_ids": torch.cat([prompts, responses], 1),
            "attention_mask": attention,
            "position_ids": (attention.cumsum(-1) - 1).clamp(min=0),
            "response_mask": torch.stack([right(row) for row in made["response_mask"]]),
            "advantages": torch.zeros(len(ANSWERS), answer),
        },
        meta_info={"temperature": run.config.actor_rollout_ref.rollout.temperature},
    )
    trainer.ref_in_actor = run.worker.ref is None
    trainer.ref_policy_wg = trainer.actor_rollout_wg = run.worker
    data = data.union(trainer._compute_ref_log_prob(data))
    data.batch["old_log_probs"] = data.batch["ref_log_prob"]
    between(data.batch)
    trainer.klplug.joined = True
    output = trainer._update_actor(data)
    return run.gradient(), reduce_metrics(output.meta_info["metrics"])


THROUGH: dict[str, Callable[..., tuple[Tensor, dict[str, Any]]]] = {
    "v1": through_v1,
    "ray": through_fit,
}


def as_rank() -> tuple[Run, tuple[int, int], Path]:
    """This process as one rank of several: its run, rank and world size, and where to save."""
    from recipes import cpu_shim

    cpu_shim.install("verl")
    *words, out = sys.argv[1:]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own_process(rank, size, int(os.environ["MASTER_PORT"]))
    return Run(*words), (rank, size), Path(out)


def main() -> None:
    run, (rank, size), out = as_rank()
    gradient, metrics = through_v1(run, (rank, size))
    gradients: list[Any] = [None] * size
    torch.distributed.all_gather_object(gradients, gradient)
    if rank == 0:
        torch.save((gradients, metrics), out)


if __name__ == "__main__":
    main()
