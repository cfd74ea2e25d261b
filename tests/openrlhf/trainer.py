"""The real ActorPPOTrainer on a real DeepSpeed engine, without Ray: one micro-batch at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LENGTH, PROMPT, ANSWER, BATCH, VOCABULARY = 24, 8, 16, 4, 64


def namespace(values: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(
        **{k: namespace(v) if isinstance(v, dict) else v for k, v in values.items()}
    )


def arguments(zero_stage: int = 2, **changes: Any) -> SimpleNamespace:
    """OpenRLHF's nested ``args``, as its command line makes them; ``changes`` by dotted name."""
    args = namespace(
        {
            "local_rank": -1,
            "ds": {
                "param_dtype": "bf16",
                "zero_stage": zero_stage,
                "adam_offload": False,
                "zpg": 1,
                "use_universal_ckpt": False,
                "grad_accum_dtype": None,
                "overlap_comm": False,
                "deepcompile": False,
                "tensor_parallel_size": 1,
                "ring_attn_size": 1,
                "packing_samples": False,
                "enable_sleep": False,
            },
            "train": {
                "seed": 42,
                "full_determinism_enable": False,
                "micro_batch_size": BATCH,
                "batch_size": BATCH,
                "dynamic_batch_enable": False,
                "max_epochs": 1,
                "colocate_all": True,
                "colocate_actor_ref": False,
                "async_enable": False,
            },
            "actor": {
                "eps_clip_low_high": (0.2, 0.2),
                "dual_clip": None,
                "loss_agg_mode": "token-mean",
                "policy_loss_type": "ppo",
                "aux_loss_coef": 0,
                "entropy_coef": None,
            },
            "algo": {
                "kl": {
                    "use_loss": True,
                    "init_coef": 0.1,
                    "estimator": "k1",
                    "unbiased_gradient": False,
                    "target": None,
                    "horizon": 10000,
                },
                "advantage": {
                    "estimator": "group_norm",
                    "gamma": 1.0,
                    "lambd": 1.0,
                    "no_std_norm": False,
                    "is_correction_level": "off",
                    "is_correction_mode": "mask",
                    "is_correction_gating": "ratio",
                    "is_correction_threshold": [0.5, 5.0],
                },
            },
            "reward": {
                "clip_range": (-10, 10),
                "overlong_buffer_len": None,
                "stop_properly_penalty_coef": None,
            },
            "rollout": {"temperature": 1.0, "n_samples_per_prompt": 4, "micro_batch_size": 4},
            "vllm": {"sync_backend": "gloo"},
        }
    )
    for name, value in changes.items():
        change(args, name.replace("__", "."), value)
    return args


def change(args: SimpleNamespace, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        args = vars(args).setdefault(parent, SimpleNamespace())
    setattr(args, last, value)


def configure(args: SimpleNamespace, kl: str, coef: float = 0.1) -> None:
    """The KL of the next step: ``stock:k2``, ``stock:unbiased``, or a kl_type."""
    if kl.startswith("stock:"):
        name = kl.removeprefix("stock:")
        vars(args).pop("klplug", None)
        change(args, "algo.kl.estimator", "k2" if name == "unbiased" else name)
        change(args, "algo.kl.unbiased_gradient", name == "unbiased")
        change(args, "algo.kl.init_coef", coef)
        return
    none = kl == "none"
    args.klplug = SimpleNamespace(kl_type=kl, kl_coef=None if none else coef)
    change(args, "algo.kl.estimator", kl)
    change(args, "algo.kl.unbiased_gradient", False)
    change(args, "algo.kl.init_coef", 0.0 if none else coef)


def tiny_model(folder: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@dataclass
class Recorded:
    """What one micro-batch did: the loss's gradient at the log-probs, and the engine's gradient."""

    at_log_probs: Tensor
    of_parameters: Tensor
    metrics: dict[str, Any]
    log_probs: Tensor


class Bench:
    """An ActorPPOTrainer whose optimiser never steps, so that every call sees the same policy."""

    def __init__(self, model: Path, zero_stage: int, lora_rank: int = 0) -> None:
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29517",
        }.items():
            os.environ.setdefault(name, value)
        from openrlhf.models import Actor
        from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
        from openrlhf.utils import get_strategy

        self.args = arguments(zero_stage)
        self.strategy = get_strategy(self.args)
        self.strategy.setup_distributed()
        actor = Actor(
            str(model),
            attn_implementation="eager",
            param_dtype="bf16",
            ds_config=self.strategy.get_ds_train_config(),
            lora_rank=lora_rank,
            lora_alpha=16,
            target_modules="all-linear",
        )
        optimizer = {
            "optim": "adam",
            "adam": {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0},
            "muon": {},
            "lr_scheduler": "constant",
            "lr_warmup_ratio": 0.0,
            "min_lr_ratio": 0.1,
            "max_norm": 1.0,
            "scheduler_steps": 10,
        }
        self.actor, optim, scheduler = self.strategy.prepare((actor, optimizer))
        self.make = lambda: ActorPPOTrainer(
            self.strategy,
            self.actor,
            None,
            optim,
            scheduler,
            micro_train_batch_size=BATCH,
            vllm_engines=None,
        )

    def step(self, experience: Any, kl: str, coef: float = 0.1) -> Recorded:
        """One training step with this KL: its gradients recorded, its update left out."""
        from deepspeed.utils import safe_get_full_grad

        configure(self.args, kl, coef)
        trainer = self.make()
        seen: dict[str, Any] = {}
        loss_fn = trainer.actor_loss_fn.forward

        def forward(log_probs: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen["log_probs"] = log_probs
            return loss_fn(log_probs, *args, **kwargs)

        def backward(loss: Tensor, model: Any, *args: Any, **kwargs: Any) -> None:
            (seen["at"],) = torch.autograd.grad(loss, seen["log_probs"], retain_graph=True)
            type(self.strategy).backward(self.strategy, loss, model, *args, **kwargs)

        def optimizer_step(optim: Any, model: Any, *args: Any, **kwargs: Any) -> None:
            parameters = [p for p in model.model.parameters() if p.requires_grad]
            gradients = [safe_get_full_grad(p) for p in parameters]
            seen["of"] = torch.cat([g.flatten().float() for g in gradients if g is not None])
            model.model.zero_grad()
            model.model.optimizer.zero_grad()

        trainer.actor_loss_fn.forward = forward
        self.strategy.backward, self.strategy.optimizer_step = backward, optimizer_step
        try:
            status = trainer.training_step(experience, coef, 0)
        finally:
            del self.strategy.backward, self.strategy.optimizer_step
        return Recorded(
            at_log_probs=seen["at"],
            of_parameters=seen["of"],
            metrics=status["metrics"],
            log_probs=seen["log_probs"].detach(),
        )

    def log_probs(self, sequences: Tensor, mask: Tensor) -> Tensor:
        self.actor.train()
        with torch.no_grad():
            return self.actor(sequences, mask, torch.ones_like(sequences))

    def experience(self, spread: float = 0.3, off_policy: float = 0.1, seed: int = 0) -> Any:
        """Ragged answers, a reference ``spread`` nats away, an older policy ``off_policy`` away."""
        from openrlhf.trainer.ppo_utils.experience import Experience

        generator = torch.Generator().manual_seed(seed)
        sequences = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
        mask = torch.zeros(BATCH, LENGTH - 1, dtype=torch.long)
        for i in range(BATCH):
            mask[i, PROMPT : PROMPT + ANSWER - 4 * i - 2] = 1
        current = self.log_probs(sequences, mask)

        def moved(scale: float) -> Tensor:
            noise = torch.randn(current.shape, generator=generator)
            return (current + scale * noise) * mask

        return Experience(
            sequences=sequences,
            attention_mask=torch.ones_like(sequences),
            action_mask=mask,
            action_log_probs=moved(off_policy),
            base_action_log_probs=moved(spread),
            rollout_log_probs=moved(2 * off_policy),
            advantages=torch.randn(BATCH, 1, generator=generator) * mask,
            info={"klplug/active": torch.ones(BATCH)},
        )
