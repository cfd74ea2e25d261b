"""A rollout server for verl on a CPU: samples with transformers, says how likely each token was.

Real in what matters: requests come one by one and are answered in batches, the log-probs are the
sampler's own, and the trainer's weights arrive before every step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

GATHER = 0.05  # seconds to wait for a request's companions
LARGEST_BATCH = 128


def server_name(rank: int) -> str:
    return f"transformers_cpu_{rank}"


def eos_ids(model_path: str, configured: int | list[int] | None) -> set[int]:
    if (Path(model_path) / "generation_config.json").exists():
        configured = GenerationConfig.from_pretrained(model_path).eos_token_id or configured
    if configured is None:
        return set()
    return set(configured) if isinstance(configured, list) else {configured}


@ray.remote(num_cpus=0)
class Server:
    """Token ids in, token ids and their log-probs out."""

    def __init__(self, model_path: str, response_length: int, seed: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(model_path)
        # Empty until the trainer's weights arrive, before the first step.
        self.model = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.float32
        ).eval()
        self.eos = eos_ids(model_path, config.eos_token_id)
        self.response_length = response_length
        self.global_steps: int | None = None
        self.requests: asyncio.Queue[Any] = asyncio.Queue()
        self.loop: asyncio.Task[None] | None = None

    async def load_weights(self, weights: dict[str, Tensor], global_steps: int | None) -> None:
        own = self.model.state_dict()
        missing = own.keys() - weights.keys()
        if self.model.config.tie_word_embeddings:
            missing -= {"lm_head.weight"}
        if missing:
            raise RuntimeError(f"the trainer sent no {', '.join(sorted(missing))}")
        for name, value in weights.items():
            if name in own:
                own[name].copy_(value)
        self.global_steps = global_steps

    # verl's servers share the accelerator's memory with the trainer; this one has its own.
    async def wake_up(self, tags: Any = None) -> None: ...

    async def sleep(self) -> None: ...

    async def clear_kv_cache(self) -> None: ...

    async def release_kv_cache(self) -> None: ...

    async def resume_kv_cache(self) -> None: ...

    async def abort_all_requests(self, reject_request: bool = False) -> None: ...

    async def resume_generation(self) -> None: ...

    async def generate(
        self,
        prompt_ids: Iterable[int],
        sampling_params: dict[str, Any],
        request_id: str | None = None,
        **_: Any,
    ) -> TokenOutput:
        if sampling_params.get("top_p", 1.0) != 1.0 or sampling_params.get("top_k", -1) > 0:
            raise ValueError(f"this server samples the whole distribution, not {sampling_params}")
        if self.loop is None:
            self.loop = asyncio.create_task(self.serve())
        answer = asyncio.get_running_loop().create_future()
        await self.requests.put((list(prompt_ids), dict(sampling_params), answer))
        return await answer

    async def serve(self) -> None:
        while True:
            batch = [await self.requests.get()]
            while len(batch) < LARGEST_BATCH:
                try:
                    batch.append(await asyncio.wait_for(self.requests.get(), GATHER))
                except asyncio.TimeoutError:
                    break
            prompts, params, answers = zip(*batch, strict=True)
            try:
                outputs = self.sampled(list(prompts), list(params))
            except Exception as error:
                for answer in answers:
                    answer.set_exception(error)
                continue
            for answer, output in zip(answers, outputs, strict=True):
                answer.set_result(output)

    @torch.inference_mode()
    def sampled(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[TokenOutput]:
        """One answer to each prompt, from softmax(logits / temperature), greedy at 0."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        temperature = torch.tensor([float(p.get("temperature", 1.0)) for p in params])[:, None]
        limits = [
            int(p.get("max_tokens") or p.get("max_new_tokens") or self.response_length)
            for p in params
        ]
        tokens: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        alive = set(range(len(prompts)))
        cache = None
        while alive:
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            greedy = temperature == 0
            log_p = (logits / torch.where(greedy, 1.0, temperature)).log_softmax(-1)
            drawn = torch.where(
                greedy, logits.argmax(-1, keepdim=True), torch.multinomial(log_p.exp(), 1)
            )
            chosen = log_p.gather(-1, drawn)[:, 0].tolist()
            for row in list(alive):
                token = int(drawn[row])
                tokens[row].append(token)
                log_probs[row].append(chosen[row])
                if token in self.eos or len(tokens[row]) >= limits[row]:
                    alive.remove(row)
            ids, positions = drawn, positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        return [
            TokenOutput(
                token_ids=row,
                log_probs=scores,
                stop_reason="completed",
                extra_fields={"global_steps": self.global_steps},
            )
            for row, scores in zip(tokens, log_probs, strict=True)
        ]


class WeightSender(BaseRollout):
    """Lives in a trainer's worker; sends its weights to the server of the same rank."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, *_: Any, **__: Any):
        super().__init__(config, model_config, device_mesh)
        self.server: Any = None

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], global_steps: int | None = None, **_: Any
    ) -> None:
        named = {name: value.detach().to("cpu", torch.float32).clone() for name, value in weights}
        if self.server is None:
            self.server = ray.get_actor(server_name(torch.distributed.get_rank()))
        await self.server.load_weights.remote(named, global_steps)


class Replica(RolloutReplica):
    """Starts the server; verl knows it by its handle."""

    async def launch_servers(self) -> None:
        path = self.model_config.get("local_path", None) or self.model_config.path
        seed = getattr(self.config, "seed", 0) + self.replica_rank  # verl 0.8 has none
        server = Server.options(name=server_name(self.replica_rank), max_concurrency=1000).remote(
            path, self.config.response_length, seed
        )
        self.servers = [server]
        self._server_handle = server
        self._server_address = f"local:{self.replica_rank}"
