"""What verl's own configuration makes of each recipe (the rest is in tests/recipes)."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args

import pytest

from klplug.hosting import references, stored
from recipes import launch
from recipes.quickstart.settings import HERE
from recipes.recipe import Recipe, load, names
from recipes.shared.settings import SettingsError
from recipes.verl import host
from tests.locks import unmet

RECIPES = [recipe for recipe in map(load, names()) if "verl" in recipe.hosts]
GSM8K = "qwen2.5-math-1.5b-gsm8k"
POLICY = HERE / "policy"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("data")
    row = {"prompt": [{"role": "user", "content": "1+1?"}]}
    table = pyarrow.Table.from_pylist([row] * (128 + 2))
    for split in ("train", "test"):
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    return folder


@pytest.fixture
def rank_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own check of an adapter's rank, without the vLLM that its file imports."""
    name = "verl.workers.rollout.vllm_rollout"
    found = importlib.util.find_spec("verl.workers.rollout")
    assert found is not None and found.origin is not None
    tree = ast.parse((Path(found.origin).parent / "vllm_rollout" / "utils.py").read_text("utf-8"))
    tree.body = [n for n in tree.body if getattr(n, "name", "") == "get_vllm_max_lora_rank"]
    utils = ModuleType(f"{name}.utils")
    utils.__dict__.update(Literal=Literal, get_args=get_args)
    exec(compile(tree, "utils.py", "exec"), utils.__dict__)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, f"{name}.utils", utils)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_verl_reads_a_recipe_as_it_is_meant(
    recipe: Recipe,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    rank_check: None,
) -> None:
    """Dry runs: Hydra, klplug's plugin, validate_config; the same is asked of OpenRLHF."""
    # A reference that a recipe names is on the hub, and the file of its answers is not drawn yet.
    for room in (references, stored):
        monkeypatch.setattr(room, "check", lambda *_, **__: None)
    found, compose = [], host.compose
    monkeypatch.setattr(host, "compose", lambda words: found.append(compose(words)) or found[-1])
    out = data / "run"
    launch.launch(host, recipe.name, [], {"DRY_RUN": "1", "DATA": str(data), "OUT": str(out)})
    (config,) = found
    assert host.common(config) == replace(recipe, training_rows=128 + 2).common()
    engine = recipe.verl.get("model_engine", "dp")
    assert config.actor_rollout_ref.actor.strategy == {"dp": "fsdp2"}.get(engine, engine)
    assert config.actor_rollout_ref.ref.strategy == config.actor_rollout_ref.actor.strategy
    said = capfd.readouterr().out
    assert said.startswith("python -m verl.trainer.main_ppo ")
    assert "memory, estimated, not measured" in said
    assert {"dp": "(FSDP2:", "megatron": "(Megatron:"}[engine] in said
    assert f"kl_coef              {recipe.kl_coef}" in said
    assert (config.actor_rollout_ref.model.lora_rank == 32) is recipe.name.endswith("-lora")
    told = dict(config.data.apply_chat_template_kwargs)
    assert told == recipe.template
    thinks = told.get("enable_thinking")
    assert thinks == (recipe.name.endswith("-thinking") if "qwen3-" in recipe.name else None)
    assert not out.exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"KL_TYPE": "k2_as_loss,ratio=none", "KL_COEF": "0.05"},
        {"KL_TYPE": "none"},
        {"KL_TYPE": "stock:k1"},
        {"KL_TYPE": "stock:k3"},
    ],
    ids=lambda variables: variables["KL_TYPE"],
)
def test_another_kl(variables: dict[str, str], data: Path) -> None:
    recipe = launch.chosen(host, load(GSM8K), variables)
    found = host.common(host.compose(host.command(recipe, data, data / "run")))
    assert found == recipe.common()


def test_what_verl_does_not_know_is_refused(data: Path) -> None:
    command = host.command(load(GSM8K), data, data / "run")
    with pytest.raises(SettingsError, match="Key 'train_batch_sise' is not in struct"):
        host.compose([*command, "data.train_batch_sise=3"])
    said = r"^verl refuses: [A-Za-z]+: train_batch_size \(64\) must be >= actor.ppo_mini"
    with pytest.raises(SettingsError, match=said):
        host.compose([*command, "data.train_batch_size=64"])


def test_verl_trains_on_whole_rollouts_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own data set and loader: the questions are those that OpenRLHF takes."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import create_rl_sampler
    from verl.trainer.ppo.v1 import trainer_base
    from verl.utils.dataset import rl_dataset

    monkeypatch.setattr(rl_dataset.datasets.config, "HF_DATASETS_CACHE", data / "cache")
    recipe = launch.counted(host, load(GSM8K), data)
    config: Any = host.compose(host.command(recipe, data, data / "run"))
    trainer = SimpleNamespace(
        config=config, tokenizer=None, processor=None, trainer_mode="sync", parameter_sync_step=1
    )
    trainer_base.PPOTrainer._init_dataloader(trainer)
    assert len(trainer.train_dataset) == recipe.questions == 128
    assert trainer.total_training_steps == recipe.steps == 3
    # What the README says of orders: `seed` decides that of the questions, and an update's
    # answers are not shuffled.
    given = [OmegaConf.merge(config.data, {"seed": seed}) for seed in (1, 1, 2)]
    orders = [list(create_rl_sampler(data, range(9))) for data in given]
    assert orders[0] == orders[1] != orders[2] and config.data.seed == recipe.seed
    assert not config.actor_rollout_ref.actor.shuffle


def test_the_reward_is_found_by_verl(data: Path) -> None:
    """By its own loader, from the composed configuration."""
    from verl.trainer.ppo.reward import get_custom_reward_fn

    config = host.compose(host.command(load(GSM8K), data, data / "run"))
    score = get_custom_reward_fn(config)
    assert score is not None
    rows = json.loads('[["so \\\\boxed{4}", "4", 1.0], ["so \\\\boxed{5}", "4", 0.0]]')
    for response, answer, right in rows:
        assert score(data_source="gsm8k", solution_str=response, ground_truth=answer) == right


def test_the_reward_is_given_the_text_that_openrlhf_gives_it(data: Path) -> None:
    """An answer that went on after its end is judged up to it: by verl's own reward loop."""
    import numpy
    import torch
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    from recipes.shared.reward import reward_func

    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    text = "#### 18<|im_end|>\n<|im_start|>user\n#### 7<|im_end|>"
    ids = tokenizer(text, return_tensors="pt").input_ids
    (query,) = tokenizer.batch_decode(ids)  # as OpenRLHF decodes (openrlhf/utils/agent.py)
    assert query == text
    batch = DataProto.from_dict(
        tensors={"responses": ids, "attention_mask": torch.ones_like(ids)},
        non_tensors={
            "data_source": numpy.array(["gsm8k"], dtype=object),
            "reward_model": numpy.array([{"ground_truth": "18"}], dtype=object),
            "extra_info": numpy.array([{}], dtype=object),
        },
    )

    async def judged() -> float:
        config = host.compose(host.command(load(GSM8K), data, data / "run"))
        found = await load_reward_manager(config, tokenizer).run_single(batch)
        return found["reward_score"]

    assert asyncio.run(judged()) == 1.0
    assert reward_func(["q" + query], ["q"], ["18"])["rewards"].item() == 1.0


def test_a_reward_of_ones_own_has_verls_own_manager(data: Path) -> None:
    recipe = replace(load(GSM8K), reward="mine.py")
    config = host.compose(host.command(recipe, data, data / "run"))
    assert config.reward.reward_manager.source == "register"
    assert config.reward.reward_manager.name == "naive"


def test_the_gpus_lock_has_what_verls_wheel_asks_for() -> None:
    assert unmet("verl") == []
