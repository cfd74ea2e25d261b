"""The real ActorPPOTrainer on a real DeepSpeed engine, without Ray: one micro-batch at a time."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from klplug import parse
from tests import one_meaning
from tests.openrlhf import command_line
from tests.openrlhf.command_line import change

LENGTH, PROMPT, ANSWER, BATCH, VOCABULARY = 24, 8, 16, 4, 64


def arguments(zero_stage: int = 2, **changes: Any) -> Any:
    """OpenRLHF's own ``args`` for small steps; ``changes`` by name, dots as two underscores."""
    return command_line.arguments(
        {
            "ds.zero_stage": zero_stage,
            "train.micro_batch_size": BATCH,
            "train.batch_size": BATCH,
            "train.colocate_all": True,
            "rollout.micro_batch_size": BATCH,
            "vllm.sync_backend": "gloo",
            "algo.kl.use_loss": True,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
    )


def configure(args: Any, kl: str, coef: float = 0.1, source: Path | None = None) -> None:
    """The KL of the next step: ``stock:k2``, ``stock:unbiased``, or a kl_type."""
    if kl.startswith("stock:"):
        name = kl.removeprefix("stock:")
        vars(args).pop("klplug", None)
        change(args, "algo.kl.estimator", "k2" if name == "unbiased" else name)
        change(args, "algo.kl.unbiased_gradient", name == "unbiased")
        change(args, "algo.kl.init_coef", coef)
        return
    without = not parse(kl).terms
    args.klplug = SimpleNamespace(kl_type=kl, kl_coef=None if without else coef)
    if source is not None:
        args.klplug.source = str(source)
    change(args, "algo.kl.estimator", kl)
    change(args, "algo.kl.unbiased_gradient", False)
    reference = source is None and "ref_log_probs" in parse(kl).requires
    change(args, "algo.kl.init_coef", coef if reference else 0.0)


def tiny_config(*, tied: bool) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )


def tiny_model(folder: Path) -> Path:
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(tiny_config(tied=False)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@dataclass
class Recorded:
    """What one micro-batch did: the loss's gradient at the log-probs, and the engine's gradient."""

    at_log_probs: Tensor
    of_parameters: Tensor
    metrics: dict[str, Any]
    log_probs: Tensor


def strategy_of_one(args: Any) -> Any:
    """OpenRLHF's strategy in a process group of this process alone, unless it is given another."""
    if not torch.distributed.is_initialized() and os.environ.get("WORLD_SIZE", "1") == "1":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    from openrlhf.utils import get_strategy

    strategy = get_strategy(args)
    strategy.setup_distributed()
    return strategy


class Policy:
    """An actor whose log-probs of the answers are given."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs

    def train(self) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.log_probs, None


class Unigram:
    """An actor that draws each token from one distribution, whatever stands before it."""

    def __init__(self) -> None:
        self.logits = torch.linspace(-1, 1, VOCABULARY).requires_grad_()

    def train(self) -> None:
        pass

    def __call__(self, sequences: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, None]:
        log_probs = self.logits.log_softmax(-1)[sequences[:, 1:]]
        return log_probs[:, -mask.shape[1] :] * mask, None


class PolicyOfStates:
    """An actor whose hidden states are given, with an output layer that it calls."""

    temperature = one_meaning.TEMPERATURE

    def __init__(self, given: one_meaning.States) -> None:
        self.tokens, self.hidden = given.tokens, given.hidden.clone().requires_grad_()
        self.head = torch.nn.Linear(given.weight.shape[1], len(given.weight), bias=False)
        self.head.weight.data = given.weight.clone()
        text = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.model = SimpleNamespace(get_output_embeddings=lambda: self.head, config=text)

    def train(self) -> None:
        pass

    def __call__(self, sequences: Tensor, mask: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        last = torch.zeros_like(self.hidden[:, :1])  # predicts nothing that was sampled
        logits = self.head(torch.cat([self.hidden, last], 1)) / self.temperature
        log_probs = logits.log_softmax(-1)[:, :-1].gather(-1, self.tokens[..., None])[..., 0]
        return log_probs * mask, None


class Given:
    """An ActorPPOTrainer without a model: whole training steps at given log-probs.

    Nothing of DeepSpeed's engine is in it, whose arguments differ between releases.
    """

    def __init__(self) -> None:
        self.args = arguments(actor__eps_clip_low_high=one_meaning.CLIP_RANGE)
        self.strategy = strategy_of_one(self.args)
        self.strategy.backward = lambda loss, *_: loss.backward()
        self.strategy.optimizer_step = lambda *args, **kwargs: None
        self.strategy.get_grad_norm = lambda model: 0.0

    def trainer(self, actor: Any = None) -> Any:
        from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

        scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
        return ActorPPOTrainer(
            self.strategy,
            actor,
            None,
            None,
            scheduler,
            micro_train_batch_size=BATCH,
            vllm_engines=None,
        )

    def gradient(self, kl_type: str, given: one_meaning.Batch) -> Tensor:
        """Of the whole training step, policy loss included, at ``given.log_probs``."""
        log_probs = given.log_probs.clone().requires_grad_()
        self._step(kl_type, given, Policy(log_probs))
        assert log_probs.grad is not None
        return log_probs.grad

    def gradient_of_states(
        self, kl_type: str, states: one_meaning.States, given: one_meaning.Batch
    ) -> Tensor:
        """The same, at the policy's hidden states."""
        from klplug_openrlhf.hidden import INFO, Matrix, Reference

        policy = PolicyOfStates(states)
        lent = Matrix(states.ref_weight, None, None)
        rows = zip(states.ref_hidden, given.response_mask.bool(), strict=True)
        references = [Reference(hidden[mask], lent) for hidden, mask in rows]
        sequences = torch.cat([torch.zeros_like(states.tokens[:, :1]), states.tokens], 1)
        info = {INFO: references} if "exact" in kl_type else {}
        self._step(kl_type, given, policy, sequences, info)
        assert policy.hidden.grad is not None
        return policy.hidden.grad

    def gradient_of_unigram(
        self, kl_type: str, given: one_meaning.Batch, source: Path | None = None
    ) -> Tensor:
        """The same, towards the logits of a policy that draws each token alike."""
        policy = Unigram()
        self._step(kl_type, given, policy, source=source)
        assert policy.logits.grad is not None
        return policy.logits.grad

    def _step(
        self,
        kl_type: str,
        given: one_meaning.Batch,
        policy: Any,
        sequences: Tensor | None = None,
        info: dict[str, Any] | None = None,
        source: Path | None = None,
    ) -> None:
        from openrlhf.trainer.ppo_utils.experience import Experience

        configure(self.args, kl_type, one_meaning.BETA, source)
        if "posterior" in kl_type or "teacher" in kl_type:
            numbers = (given.posterior_log_probs, given.teacher_log_probs)
            info = carried(*numbers, given.response_mask)
        shape = (given.log_probs.shape[0], given.log_probs.shape[1] + 1)
        spec = None if kl_type.startswith("stock:") else parse(kl_type)
        reference = given.ref_log_probs
        if spec is not None and "ref_log_probs" not in spec.requires:
            # As the experience maker does it.
            sampler = "rollout_log_probs" in spec.requires
            reference = given.rollout_log_probs if sampler else given.old_log_probs
        experience = Experience(
            sequences=torch.ones(shape, dtype=torch.long) if sequences is None else sequences,
            attention_mask=torch.ones(shape, dtype=torch.long),
            action_mask=given.response_mask.long(),
            action_log_probs=given.old_log_probs,
            base_action_log_probs=reference,
            rollout_log_probs=given.rollout_log_probs,
            advantages=given.advantages,
            kl=None if spec is None else one_meaning.return_baseline(str(spec), given),
            info={"klplug/active": torch.ones(shape[0]), **(info or {})},
        )
        self.trainer(policy).training_step(experience, one_meaning.BETA, 0)


def carried(posterior: Tensor, teacher: Tensor, mask: Tensor) -> dict[str, Any]:
    """As the experience maker sends them."""
    from klplug_openrlhf.samples import INFO, POSTERIOR, Carried
    from klplug_openrlhf.teacher import LOG_PROBS

    rows = zip(posterior, teacher, mask.bool(), strict=True)
    return {INFO: [Carried({POSTERIOR: p[own], LOG_PROBS: t[own]}) for p, t, own in rows]}


PACKED = "packed"


def packed_attention() -> None:
    """What flash-attention does for packed rows, which alone needs a GPU: each answer to itself.

    Under ring attention a rank has a slice of the row; there the others' are fetched.
    """
    import torch.nn.functional as F
    from openrlhf.models import ring_attn_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def packed(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any
    ) -> tuple[Tensor, None]:
        group, positions = ring_attn_utils.get_ring_attn_group(), given["position_ids"]
        length = query.shape[2]
        start = 0 if group is None else length * torch.distributed.get_rank(group)
        key, value = (of_all_ranks(x, 2) for x in (key, value))
        answer = (of_all_ranks(positions, 1)[0] == 0).cumsum(-1)
        allowed = (answer[:, None] == answer[None, :]).tril()[start : start + length]
        found = F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, enable_gqa=True
        )
        return found.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register(PACKED, packed)


def of_all_ranks(x: Tensor, dim: int) -> Tensor:
    """The slices of every rank of the ring, one after the other; differentiable."""
    from openrlhf.models import ring_attn_utils

    group = ring_attn_utils.get_ring_attn_group()
    if group is None:
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous(), group=group), dim)


class Bench:
    """An ActorPPOTrainer whose optimiser never steps, so that every call sees the same policy."""

    def __init__(
        self,
        model: Path,
        zero_stage: int,
        lora_rank: int = 0,
        packing: bool = False,
        ring: int = 1,
        ranks: int = 1,
    ) -> None:
        from openrlhf.models import Actor
        from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

        self.args = arguments(zero_stage, ds__ring_attn_size=ring, train__batch_size=BATCH * ranks)
        self.strategy = strategy_of_one(self.args)
        if packing:
            packed_attention()
        actor = Actor(
            str(model),
            attn_implementation=PACKED if packing else "eager",
            packing_samples=packing,
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

    def step(
        self, experience: Any, kl: str, coef: float = 0.1, source: Path | None = None
    ) -> Recorded:
        """One training step with this KL: its gradients recorded, its update left out."""
        configure(self.args, kl, coef, source)
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
            seen["of"] = self._gradient()

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

    def gradient(self, loss: Tensor) -> Tensor:
        """Of all parameters, through the engine, of any loss."""
        self.strategy.backward(loss, self.actor, None)
        return self._gradient()

    def _gradient(self) -> Tensor:
        from deepspeed.utils import safe_get_full_grad

        model = self.actor.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = [safe_get_full_grad(p) for p in parameters]
        whole = torch.cat([g.flatten().float() for g in gradients if g is not None])
        model.zero_grad()
        model.optimizer.zero_grad()
        return whole

    def epoch(
        self, experiences: list[Any], kl: str, coef: float = 0.1, source: Path | None = None
    ) -> dict[str, Any]:
        """What ``ppo_train`` reports of these micro-batches."""
        configure(self.args, kl, coef, source)
        trainer = self.make()
        self.strategy.optimizer_step = lambda *args, **kwargs: None
        self.strategy.accumulated_gradient = 1
        trainer.replay_buffer.items = []
        for experience in experiences:
            trainer.replay_buffer.append(experience)
        try:
            return dict(trainer.ppo_train(coef))
        finally:
            del self.strategy.optimizer_step

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
