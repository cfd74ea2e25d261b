"""What OpenRLHF makes of a recipe's data (the rest is in tests/recipes)."""

from __future__ import annotations

import asyncio
import functools
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("math_verify", reason="the recipes extra is not installed")

from recipes import launch
from recipes.openrlhf import host
from recipes.recipe import Recipe, load, with_kl
from recipes.shared import reward


def prompts_of(recipe: Recipe, folder: Path, **own: Any) -> tuple[Any, int, Namespace]:
    """OpenRLHF's own loader of a recipe's prompts, its count of updates, and its arguments."""
    from openrlhf.trainer import ppo_trainer
    from openrlhf.utils.deepspeed.deepspeed import DeepspeedStrategy

    # OpenRLHF's own KL: klplug's launcher patches argparse for good.
    recipe = with_kl(replace(recipe, **own), "stock:k2", None)
    args = host.compose(host.command(recipe, folder, folder / "run"))
    args.data.apply_chat_template = False  # there is no tokenizer here
    strategy = SimpleNamespace(args=args, print=print, is_rank_0=lambda: False)
    strategy.setup_dataloader = functools.partial(DeepspeedStrategy.setup_dataloader, strategy)
    loader, _, steps = ppo_trainer.prepare_datasets(strategy, tokenizer=None)
    return loader, steps, args


def written(folder: Path, rows: int) -> None:
    with (folder / "train.jsonl").open("w") as file:
        for i in range(rows):
            row = {"prompt": f"{i}+1?", "answer": str(i + 1), "datasource": "gsm8k"}
            file.write(json.dumps(row) + "\n")


@pytest.fixture(autouse=True)
def own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the trainer's own is: without a process group, which another test may have left here."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)


@pytest.mark.parametrize("name", ["qwen2.5-math-7b-gsm8k", "qwen2.5-math-1.5b-gsm8k"])
def test_every_rank_and_update_has_its_share(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own loader and its own splitting of a rollout's micro-batches between ranks."""
    from openrlhf.trainer.ppo_utils.samples_generator import _collect_prompt_batch
    from openrlhf.trainer.ray import launcher

    written(tmp_path, 2 * 128 + 49)  # GSM8K's rest
    recipe = launch.counted(host, load(name), tmp_path)
    loader, steps, args = prompts_of(recipe, tmp_path)

    batches, iterator, exhausted = [], iter(loader), False
    while not exhausted:
        prompts, *_, exhausted = _collect_prompt_batch(iterator, args.rollout.batch_size)
        batches += [len(prompts)] if prompts else []  # none: the trainer ends the episode

    monkeypatch.setattr(launcher, "ray", SimpleNamespace(put=lambda chunk: chunk))
    shares: list[int] = []
    remote = SimpleNamespace(remote=lambda method, chunk, start, end: shares.append(end - start))
    actors = [SimpleNamespace(execute_batch=remote)] * recipe.gpus
    group = SimpleNamespace(_actor_handlers=actors, duplicate_actors=1)
    for prompts in batches:
        answers = prompts * args.rollout.n_samples_per_prompt
        assert answers % args.train.batch_size == 0
        micro_batches = list(range(0, answers, args.rollout.micro_batch_size))
        launcher.RayActorGroup.async_run_method_batch(group, "append", experience=micro_batches)
    assert len(batches) == 2 and steps == recipe.steps == 3 * 2
    assert len(set(shares)) == 1 and len(shares) == 2 * recipe.gpus


def test_the_seed_does_not_order_the_prompts(tmp_path: Path) -> None:
    """As the README says: torch's own state does, which nothing sets in that process."""
    written(tmp_path, 128)
    recipe = launch.counted(host, load("qwen2.5-math-1.5b-gsm8k"), tmp_path)

    def order(state: int, seed: int) -> list[str]:
        torch.manual_seed(state)
        loader, *_ = prompts_of(recipe, tmp_path, seed=seed)
        return [prompt for _, (prompt,), *_ in loader]

    with torch.random.fork_rng():
        assert order(0, seed=1) == order(0, seed=2) != order(1, seed=1)


@pytest.mark.parametrize(
    ("question", "length"),
    [
        ("How many \N{OHM SIGN}, 1 e\N{COMBINING ACUTE ACCENT}tude?", 1000),  # not in NFC
        ("\N{EURO SIGN}" * 20 + "?", 50),  # three bytes each, and the cut is within one
    ],
)
def test_the_response_is_found_in_what_qwens_tokenizer_makes_of_a_prompt(
    question: str, length: int
) -> None:
    """By OpenRLHF's own executor, which goes on without a reward if there is an error."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocabulary, [])
    given = tokenizer("So \\boxed{4}.")["input_ids"]
    output = SimpleNamespace(token_ids=given, finish_reason="stop", logprobs=None)

    async def generate(tokens: list[int], *_: object, **__: object) -> SimpleNamespace:
        assert tokenizer.decode(tokens) != question
        return SimpleNamespace(outputs=[output])

    executor = SingleTurnAgentExecutor(reward.__file__)
    sampling = SimpleNamespace(max_tokens=30, logprobs=None)
    engine = SimpleNamespace(generate=generate)
    for label, right in (("4", 1.0), ("5", 0.0)):
        found = asyncio.run(executor.execute(question, label, sampling, length, tokenizer, engine))
        assert found["reward"] == right
