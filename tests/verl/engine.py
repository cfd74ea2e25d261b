"""verl's real training worker in this process: FSDP2 over gloo, `ppo_loss`, no Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.ranks import free_port

POLICY = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "policy"
PROMPTS, ANSWERS = (5, 7, 6, 4, 5, 3, 8, 4), (4, 6, 5, 3, 7, 1, 6, 5)


def own_process(rank: int = 0, world_size: int = 1, port: int | None = None) -> None:
    """What Ray would tell a worker of its place among the others."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port or free_port()),
    )


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


PACKED = "packed"


def packed_attention() -> None:
    """verl's own attention of packed rows, exchange between ranks included, without a GPU's kernel.

    In place of flash-attention, which alone needs one: attention of each answer to itself.
    """
    import torch.nn.functional as F
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from verl.models.transformers import monkey_patch

    def attention_of_each(
        query: Tensor, key: Tensor, value: Tensor, *_: Any, position_ids: Tensor, **__: Any
    ) -> Tensor:
        answer = (position_ids[0] == 0).cumsum(-1)
        allowed = (answer[:, None] == answer[None, :]).tril()
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        return found.transpose(1, 2)

    def packed(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any
    ) -> tuple[Tensor, None]:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        exchanged = monkey_patch._ulysses_flash_attention_forward
        return exchanged(q, k, v, None, q.size(1), position_ids=given["position_ids"]), None

    monkey_patch._flash_attention_forward = attention_of_each
    ALL_ATTENTION_FUNCTIONS.register(PACKED, packed)


class Bench:
    """A worker whose optimiser never steps: every case meets the same policy."""

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        port: int | None = None,
        packed: bool = False,
        ulysses: int = 1,
        lora_rank: int = 0,
    ) -> None:
        if packed:
            packed_attention()
        own_process(rank, world_size, port)
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import (
            FSDPEngineConfig,
            FSDPOptimizerConfig,
            HFModelConfig,
            TrainingWorkerConfig,
        )
        from verl.workers.engine_workers import TrainingWorker

        torch.set_num_threads(1)
        # Ranks of one sequence-parallel group have the same samples.
        self.rank, self.world_size = rank // ulysses, world_size // ulysses
        self.is_shared = ulysses > 1
        self.worker = TrainingWorker(
            TrainingWorkerConfig(
                model_type="language_model",
                model_config=HFModelConfig(
                    path=str(POLICY),
                    use_remove_padding=packed,
                    enable_gradient_checkpointing=False,
                    lora_rank=lora_rank,
                    override_config={"attn_implementation": PACKED if packed else "sdpa"},
                ),
                engine_config=FSDPEngineConfig(
                    strategy="fsdp2",
                    forward_only=False,
                    fsdp_size=-1,
                    ulysses_sequence_parallel_size=ulysses,
                    use_torch_compile=False,
                    dtype="float32",
                    mixed_precision={"param_dtype": "fp32"},
                    use_dynamic_bsz=False,
                    micro_batch_size_per_gpu=8,
                    infer_micro_batch_size_per_gpu=8,
                ),
                optimizer_config=FSDPOptimizerConfig(lr=0.0, total_training_steps=10),
                checkpoint_config=CheckpointConfig(),
            )
        )
        self.worker.reset()
        self.worker.engine.optimizer_step = self._record
        self.gradients: list[Tensor] = []

    def _record(self) -> float:
        named = self.worker.engine.module.named_parameters()
        grads = [p.grad for _, p in named if p.requires_grad]
        whole = [getattr(grad, "full_tensor", lambda g=grad: g)() for grad in grads]
        self.gradients.append(torch.cat([g.flatten().double() for g in whole]))
        return float(self.gradients[-1].norm())

    def batch(self, drift: float = 0.5, off_policy: float = 0.2) -> Any:
        """Eight answers of one to seven tokens, with all that verl's trainer would send."""
        from verl.utils import tensordict_utils as tu

        generator = torch.Generator().manual_seed(0)

        def noise(scale: float) -> list[Tensor]:
            return [scale * torch.randn(n, generator=generator) for n in ANSWERS]

        prompts = [torch.randint(5, 280, (n,), generator=generator) for n in PROMPTS]
        answers = [torch.randint(5, 280, (n,), generator=generator) for n in ANSWERS]
        ids = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
        advantages = [torch.full((n,), 0.3 * (-1) ** i) for i, n in enumerate(ANSWERS)]
        tensors = {
            "input_ids": nested(ids),
            "position_ids": nested([torch.arange(len(row)) for row in ids]),
            "prompts": nested(prompts),
            "responses": nested(answers),
            "loss_mask": nested([torch.ones(n) for n in ANSWERS]),
            "response_mask": nested([torch.ones(n) for n in ANSWERS]),
        }
        meta = {
            "temperature": 1.0,
            "global_batch_size": len(ANSWERS),
            "mini_batch_size": len(ANSWERS),
            "epochs": 1,
            "seed": 0,
            "dataloader_kwargs": {"shuffle": False},
            "calculate_entropy": False,
            "compute_loss": False,
            "pad_mode": "no_padding",
        }
        mine = tu.get_tensordict(tensors, meta)
        current = self._log_probs(mine)
        from klplug_verl.actor import POSTERIOR
        from klplug_verl.teacher import LOG_PROBS

        old = [c + e for c, e in zip(current, noise(off_policy), strict=True)]
        tensors |= {
            "old_log_probs": nested(old),
            "rollout_log_probs": nested([o + e for o, e in zip(old, noise(0.1), strict=True)]),
            "ref_log_prob": nested([c + e for c, e in zip(current, noise(drift), strict=True)]),
            "advantages": nested(advantages),
            POSTERIOR: nested([c + e for c, e in zip(current, noise(drift), strict=True)]),
            LOG_PROBS: nested([c + e for c, e in zip(current, noise(drift), strict=True)]),
        }
        return tu.get_tensordict(tensors, {**meta, "compute_loss": True})

    def _log_probs(self, data: Any, **meta: Any) -> list[Tensor]:
        from verl.utils import tensordict_utils as tu
        from verl.workers.utils.padding import response_from_nested

        given = data.clone()
        tu.assign_non_tensor(given, compute_loss=False, **meta)
        output = self.worker.infer_batch(given)
        rows: list[Any] = [None]
        if output is not None:  # of ranks that share their rows one has them
            found = response_from_nested(output["log_probs"], data["response_mask"])
            rows = [[row.clone() for row in found.unbind()]]
        if self.is_shared:
            torch.distributed.broadcast_object_list(rows)
        own: list[Tensor] = rows[0]
        return own

    def step(
        self,
        data: Any,
        kl_loss_type: str | None,
        coef: float = 0.5,
        micro_batch: int = 8,
        meta: dict[str, Any] | None = None,
        dynamic: int | None = None,
        **actor: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Gradient of all parameters, summed over mini-batches, and the reduced metrics."""
        from verl.workers.config import FSDPActorConfig
        from verl.workers.utils.losses import ppo_loss

        config = FSDPActorConfig(
            strategy="fsdp2",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=micro_batch,
            use_kl_loss=kl_loss_type is not None,
            kl_loss_coef=coef,
            kl_loss_type=kl_loss_type or "low_var_kl",
            entropy_coeff=0.0,
            **actor,
        )
        return self.trained(partial(ppo_loss, config=config), data, micro_batch, meta, dynamic)

    def trained(
        self,
        loss: Callable[..., Any],
        data: Any,
        micro_batch: int = 8,
        meta: dict[str, Any] | None = None,
        dynamic: int | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The same of any loss."""
        from verl.utils import tensordict_utils as tu
        from verl.utils.metric import reduce_metrics

        self.worker.set_loss_fn(loss)
        own = tu.chunk_tensordict(data, self.world_size)[self.rank]
        engine = self.worker.engine_config
        object.__setattr__(engine, "micro_batch_size_per_gpu", min(micro_batch, len(own)))
        object.__setattr__(engine, "use_dynamic_bsz", dynamic is not None)
        object.__setattr__(engine, "max_token_len_per_gpu", dynamic)
        tu.assign_non_tensor(own, **(meta or {}))
        self.gradients.clear()
        output = self.worker.train_mini_batch(own)
        metrics = {} if output is None else reduce_metrics(dict(tu.get(output, "metrics")))
        return torch.stack(self.gradients).sum(0), metrics
