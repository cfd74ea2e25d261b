"""Recipes: what a file may say, what is refused before anything starts, and what OpenRLHF makes of
each (verl's half is tests/verl/test_recipes.py)."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

pytest.importorskip("math_verify", reason="the recipes extra is not installed")

from recipes import cpu_shim, launch
from recipes.estimates import (
    GIB,
    adapter,
    checkpoints,
    held,
    markdown_table,
    memory,
    parameters,
    time,
)
from recipes.openrlhf import host
from recipes.recipe import CONFIGS, load, names
from recipes.shared import reward
from recipes.shared.folder import FolderError
from recipes.shared.reward import compute_score, reward_func
from recipes.shared.settings import SettingsError
from recipes.verl import host as verl_host
from tests.locks import unmet

ROOT = Path(__file__).resolve().parents[2]
POLICY = ROOT / "recipes" / "quickstart" / "policy"
PAPER = "qwen2.5-math-1.5b-openr1-math"
SYSTEMS = {
    "difficulty": "k2_as_loss,weight=difficulty",
    "root-chi2": "chi2_as_loss,horizon=answer,weight=root",
    "posterior": "js_as_loss,reference=posterior",
    "dph-rl": "js_as_loss",
    "frpo": "k1_in_reward",
    "monitor": "monitor",
    "g-opd": "1.25*k2_as_loss,reference=teacher+-0.25*k2_as_loss",
    "two-references": "0.7*k2_as_loss+0.3*k2_as_loss,reference=old",
}
GSM8K = "qwen2.5-math-1.5b-gsm8k"


def written(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


def test_the_recipes_that_are_promised() -> None:
    for host_name in ("openrlhf", "verl"):
        have = {r.name for r in map(load, names()) if host_name in r.hosts}
        for model in ("qwen2.5-math-1.5b", "qwen2.5-math-7b"):
            assert {f"{model}-{data}" for data in ("gsm8k", "math", "openr1-math")} <= have
    megatron = [r for r in map(load, names()) if r.verl.get("model_engine") == "megatron"]
    assert [r.hosts for r in megatron] == [("verl",)]
    paper = load(PAPER)
    assert (paper.data, paper.kl_coef, paper.gpus) == ("openr1-math", 0.5, 1)
    for recipe in map(load, names()):
        assert recipe.kl_type == SYSTEMS.get(recipe.name, "k2_as_loss")
        for host_name in recipe.hosts:
            peaks = [e.value for e in memory(recipe, host_name) if e.name.startswith("peak")]
            assert len(peaks) == 2 and max(peaks) < 0.9 * recipe.gpu_gib, recipe.name


# As the models' cards have them.
@pytest.mark.parametrize(
    ("name", "parameters_of_card", "gib"),
    [
        ("smollm2-360m-gsm8k", 361_821_120, 24),
        ("qwen3-0.6b-gsm8k", 596_049_920, 24),
        ("qwen3-1.7b-gsm8k", 1_720_574_976, 48),
        ("qwen3-1.7b-gsm8k-lora", 1_720_574_976, 24),
        ("llama3.2-1b-gsm8k", 1_235_814_400, 48),
    ],
)
def test_small_models_on_one_small_gpu(name: str, parameters_of_card: int, gib: int) -> None:
    recipe = load(name)
    assert (recipe.gpus, recipe.gpu_gib) == (1, gib)
    assert parameters(recipe.shape) == pytest.approx(parameters_of_card, rel=1e-3)


def test_a_recipe_has_updates_off_policy_on_each_host() -> None:
    for host_name in ("openrlhf", "verl"):
        assert any(r.updates > 1 and host_name in r.hosts for r in map(load, names()))


def test_a_file_includes_others_and_its_own_keys_win(tmp_path) -> None:
    path = written(
        tmp_path / "mine.yaml",
        f"include: {GSM8K}\nnodes: 2\nprompts: 64\nopenrlhf: {{ds.adam_offload: true}}\n"
        "learning_rate: 2e-6\n",  # text to YAML, which wants 2.0e-6
    )
    assert load(path).learning_rate == 2e-6
    mine, base = load(path), load(GSM8K)
    assert (mine.name, mine.gpus, mine.prompts) == ("mine", 2, 64)
    assert mine.openrlhf == {**base.openrlhf, "ds.adam_offload": True}
    assert mine.shape == base.shape and mine.kl_coef == base.kl_coef


BAD_FILES = [
    ("promts: 64", r"mine\.yaml: unknown key promts\. Did you mean prompts\?"),
    ("prompts: many", "prompts='many' must be a whole number"),
    ("prompts: 1.5", "prompts=1.5 must be a whole number"),
    ("prompts: true", "prompts=True must be a whole number"),
    ("kl_coef: strong", "kl_coef='strong' must be a number"),
    ("openrlhf: zero", "openrlhf='zero' must be a mapping"),
    ("shape: {hidden: 5}", "unknown key shape.hidden"),
    ("samples: 1", "samples=1: a group needs at least 2"),
    ("updates: 3", "updates=3 does not divide prompts=128"),
    ("gpus_per_node: 3", "an update's 1024 answers do not go evenly to 3 GPUs"),
    ("rollout_tensor_parallel: 2", "rollout_tensor_parallel=2 does not divide 1 GPUs"),
    ("max_new_tokens: 4000", r"max_new_tokens = 4512, and Qwen/Qwen2\.5-Math-1\.5B reads 4096"),
    ("reward: none.py", r"reward=.*none\.py: no such file"),
    ("episodes: 0", "episodes=0 must be at least 1"),
    ("hosts: [nemo]", r"hosts=\['nemo'\]: there is openrlhf, verl"),
    ("kl_type: k9_as_loss", "KL_TYPE=k9_as_loss"),
    ("kl_coef: -1.0", "KL_COEF=-1: a finite number above 0"),
    ("include: [nothing]", "include 'nothing': there is no"),
    ("a: [", "not YAML"),
    ("seed: 1\nseed: 2", "the key seed is there twice"),
    ("seed: -1", "SEED=-1: a whole number from 0 to 2147483647"),
    ("data: 5", "data=5 must be text"),
    ("kl_coef: 1e-50", "KL_COEF=1e-50: a finite number above 0, in float32"),
    ("- a", "a mapping is needed, not list"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_file_that_cannot_be_is_refused(tmp_path, text: str, message: str) -> None:
    include = "" if "include" in text or text.startswith("-") else f"include: [{GSM8K}]\n"
    with pytest.raises(SettingsError, match=message):
        load(written(tmp_path / "mine.yaml", include + text))


def test_a_missing_key_and_a_missing_recipe_are_named(tmp_path) -> None:
    lacking = "\n".join(
        line
        for line in (CONFIGS / "data/gsm8k.yaml").read_text().splitlines()
        if "samples" not in line
    )
    path = written(tmp_path / "mine.yaml", f"include: [models/qwen2.5-math-1.5b]\n{lacking}\n")
    with pytest.raises(SettingsError, match="missing: samples"):
        load(path)
    with pytest.raises(SettingsError, match=f"Did you mean {GSM8K}"):
        load("qwen2.5-math-1.5b-gsm8")


# The launcher


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    row = json.dumps({"prompt": "1+1?", "answer": "2"}) + "\n"
    (folder / "train.jsonl").write_text(row * (128 + 2))
    return folder


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The commands that would have become this process, on a machine with eight GPUs."""
    commands: list[list[str]] = []
    monkeypatch.setattr(launch.os, "execv", lambda path, words: commands.append(words))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(launch, "check_installed", lambda host: None)
    return commands


def run(data: Path, out: Path, *words: str, name: str = GSM8K, on=host, **variables: str) -> None:
    launch.launch(on, name, list(words), {"DATA": str(data), "OUT": str(out), **variables})


def test_the_variables_reach_the_command(data, started, tmp_path) -> None:
    run(data, tmp_path / "a", "--actor.adam.lr", "2e-6", KL_TYPE="k1_in_reward", KL_COEF="0.05")
    run(data, tmp_path / "b", KL_TYPE="stock:k3", MODEL="owner/other")
    ours, stock = (command[2:] for command in started)
    assert ours[:5] == [
        "klplug_openrlhf", "--klplug.kl_type", "k1_in_reward", "--klplug.kl_coef", "0.05",
    ]  # fmt: skip
    assert ours[-2:] == ["--actor.adam.lr", "2e-6"]
    assert stock[0] == "openrlhf.cli.train_ppo_ray" and "--algo.kl.use_loss" in stock
    assert stock[stock.index("--actor.model_name_or_path") + 1] == "owner/other"
    record = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert record["recipe"]["kl_type"] == "k1_in_reward" and record["host"] == "openrlhf"


def test_the_same_run_goes_on_and_another_is_kept_out(data, started, tmp_path) -> None:
    out = tmp_path / "run"
    run(data, out)
    (out / "checkpoints").mkdir()
    run(data, out)
    assert len(started) == 2
    with pytest.raises(FolderError, match=r"kl_coef=0\.001 there, 0\.5 here\)\. Give another"):
        run(data, out, KL_COEF="0.5")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(FolderError, match="not empty, and no run of a recipe"):
        run(data, tmp_path / "other")
    assert len(started) == 2


REFUSED = [
    ({"KL_TYPE": "k9_as_loss"}, "KL_TYPE=k9_as_loss"),
    ({"KL_COEF": "strong"}, "KL_COEF=strong: must be a number"),
    ({"KL_COEF": "nan"}, "KL_COEF=nan: a finite number"),
    ({"KL_TYPE": "none", "KL_COEF": "1"}, "KL_TYPE=none takes no coefficient"),
    ({"MODEL": "./nowhere"}, r"MODEL=\./nowhere: no such folder"),
]


@pytest.mark.parametrize(("variables", "message"), REFUSED)
def test_a_variable_that_cannot_be_is_refused(data, started, tmp_path, variables, message) -> None:
    with pytest.raises(SettingsError, match=message):
        run(data, tmp_path / "run", **variables)
    assert not started and not (tmp_path / "run").exists()


def test_too_few_gpus_and_missing_data_are_said_first(data, started, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(SettingsError, match="needs 8 GPUs of 80 GB, and this machine has 4"):
        run(data, tmp_path / "run", name="qwen2.5-math-7b-gsm8k")
    with pytest.raises(SettingsError, match=r"python -m recipes\.data gsm8k --to openrlhf --out"):
        run(tmp_path / "nothing", tmp_path / "run")
    with pytest.raises(SettingsError, match="is for verl only"):
        run(data, tmp_path / "run", name="qwen2.5-math-7b-math-megatron")
    assert not started and not (tmp_path / "run").exists()


def test_too_few_questions_for_a_rollout_are_said_first(data, started, tmp_path) -> None:
    (data / "train.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n' * 127 + "\n")
    with pytest.raises(SettingsError, match=r"train\.jsonl has 127 questions, and a rollout of"):
        run(data, tmp_path / "run")
    assert not started and not (tmp_path / "run").exists()


def test_the_controllers_end_is_the_runs() -> None:
    cosine = load("cosine")
    ends = {cosine.openrlhf["klplug.kl_steps"], cosine.verl["+klplug.kl_steps"]}
    assert ends == {cosine.steps} == {3 * (7473 // 128)}


def test_a_host_that_is_not_installed_is_named() -> None:
    lacking = type("Host", (), {"NAME": "nemo", "PACKAGES": ("json", "nemo_of_nowhere")})
    with pytest.raises(SettingsError, match="has no nemo_of_nowhere: install nemo"):
        launch.check_installed(lacking)


def test_a_folder_that_is_no_model_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"no config\.json"):
        launch.with_model(load(GSM8K), str(CONFIGS))


def test_the_sizes_are_those_of_the_models_own_configuration() -> None:
    from safetensors import safe_open

    shape = launch.shape_of(str(POLICY))
    with safe_open(POLICY / "model.safetensors", "pt") as weights:
        sizes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    assert parameters(shape) == sum(math.prod(size) for size in sizes)
    config = json.loads((POLICY / "config.json").read_text())
    assert all(config[key] == getattr(shape, key) for key in ("hidden_size", "vocab_size"))


# Estimates


def test_parameters_are_those_of_the_model() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    for name, billions in ((GSM8K, 1.54), ("qwen2.5-math-7b-gsm8k", 7.62)):
        shape = load(name).shape
        ours = ("head_dim", "parameters")
        written = {key: value for key, value in asdict(shape).items() if key not in ours}
        with torch.device("meta"):
            model = Qwen2ForCausalLM(Qwen2Config(**written))
        assert parameters(shape) == sum(p.numel() for p in model.parameters())
        assert parameters(shape) == pytest.approx(billions * 1e9, rel=3e-3)


def test_the_parts_add_up_to_the_peaks() -> None:
    recipe = load("qwen2.5-math-7b-math")
    for host_name, per_parameter in (("openrlhf", 16 / 8), ("verl", 16 / 8)):
        *parts, engine, training, rollout = memory(recipe, host_name)
        assert parts[0].value * GIB == pytest.approx(per_parameter * parameters(recipe.shape))
        assert training.value == pytest.approx(sum(part.value for part in parts))
        assert rollout.value > engine.value == 0.5 * 80
    one = load("qwen2.5-math-1.5b-math")
    assert held(one, "openrlhf").training == held(one, "verl").training == 16
    megatron = held(load("qwen2.5-math-7b-math-megatron"), "verl")
    assert megatron.training == 6 / 2 + 12 / 8


def test_time_is_that_of_the_steps() -> None:
    recipe = load(GSM8K)
    generating, training, whole = time(recipe)
    step = generating.value + training.value
    assert whole.value == pytest.approx(3 * (7473 // 128) * step / 3600)
    # 1024 answers, one engine, 256 at once: four waves, the last as long as the longest answer;
    # 28 layers, 2 heads of 128 for keys and values, 2 bytes each.
    per_step = 2 * parameters(recipe.shape) + 256 * (512 // 4 + 150) * 2 * 2 * 28 * 2 * 128
    expected = (3 * 300 + 1024) * per_step / (0.4 * 3.35e12)
    assert generating.value == pytest.approx(expected)
    twice = time(replace(recipe, gpus_per_node=2))
    assert twice[1].value == pytest.approx(training.value / 2)


@pytest.mark.parametrize(
    ("name", "on", "kept", "bytes_per_parameter"),
    [
        (GSM8K, "openrlhf", 3, 2 + 4 + 8),  # ZeRO-2: the model's file, then each rank's fp32
        ("qwen2.5-math-7b-gsm8k", "openrlhf", 3, 4 + 8),  # ZeRO-3: the ranks' alone
        (GSM8K, "verl", 3, 4 + 8 + 4),  # save_contents: model, optimizer, hf_model
        ("qwen2.5-math-7b-math-megatron", "verl", 3, 2 + 4 + 8),
        ("qwen3-1.7b-math-thinking", "verl", 2, 4 + 8 + 4),  # after 50 rollouts, and the 58th
    ],
)
def test_checkpoints_are_those_that_are_kept(
    name: str, on: str, kept: int, bytes_per_parameter: int
) -> None:
    recipe = load(name)
    total = kept * bytes_per_parameter * parameters(recipe.shape)
    assert checkpoints(recipe, on).value == pytest.approx(total / GIB)


def test_stored_answers_cost_a_pass_and_no_reference() -> None:
    """docs/options.md: one more forward and backward, which OpenRLHF has in one with the first."""
    recipe, base = load("dph-rl"), load(GSM8K)
    for on, factor in (("openrlhf", 2), ("verl", 1)):
        ours, theirs = ({e.name: e.value for e in memory(r, on)} for r in (recipe, base))
        assert ours["reference"] == 0 < theirs["reference"]
        for part in ("logits", "activations, with checkpointing"):
            assert ours[part] == factor * theirs[part]
        generating = "peak while it generates"
        assert ours[generating] == pytest.approx(theirs[generating] - theirs["reference"])
    assert time(recipe)[1].value == pytest.approx((8 + 8 + 2) / (8 + 2 + 2) * time(base)[1].value)
    # The estimate is of stored answers that are no longer than the run's own.
    for page in (ROOT / "recipes" / "README.md", CONFIGS / "dph-rl.yaml"):
        assert f"--max-new-tokens {recipe.max_new_tokens} --out" in page.read_text("utf-8")


def test_the_readmes_table_is_the_recipes() -> None:
    readme = (ROOT / "recipes" / "README.md").read_text("utf-8")
    assert markdown_table() in readme, "run: python -m recipes.estimates, and paste it"


# Both hosts


def test_both_hosts_have_one_reward() -> None:
    """The same file, and the same verdict by either signature."""
    recipe, folder = load(GSM8K), Path("data")
    ours = host.command(recipe, folder, folder)
    theirs = verl_host.command(recipe, folder, folder)
    path = ours[ours.index("--reward.remote_url") + 1]
    assert f"reward.custom_reward_function.path={path}" in theirs
    for response, right in ((r"so \boxed{\frac{1}{2}}", 1.0), (r"so \boxed{2}", 0.0)):
        assert compute_score("math", response, "0.5") == right
        assert reward_func(["q" + response], ["q"], ["0.5"])["rewards"].tolist() == [right]


HUB = {
    "owner/long": {"max_position_embeddings": 8192},
    "owner/short": {"max_position_embeddings": 1024},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that has two configurations."""
    import transformers

    def from_pretrained(model: str) -> transformers.LlamaConfig:
        if model not in HUB:
            raise OSError(f"no route to {model}\nand more")
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        return transformers.LlamaConfig(
            **sizes, num_attention_heads=4, vocab_size=100, **HUB[model]
        )

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)


OF_ANOTHER = "the estimates are those of Qwen/Qwen2.5-Math-1.5B"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, "P = 1.54e9"),
        ("owner/long", "h = 64, L = 2"),
        ("owner/unknown", f"{OF_ANOTHER}. no route to owner/unknown\n"),
    ],
)
def test_estimates_are_of_the_hubs_model_or_say_whose(
    tmp_path: Path, hub: None, capsys: pytest.CaptureFixture[str], model: str | None, said: str
) -> None:
    variables = {"DRY_RUN": "1", "DATA": str(tmp_path)} | ({"MODEL": model} if model else {})
    with pytest.raises(SettingsError, match=r"train\.jsonl is not there"):
        launch.launch(host, GSM8K, [], variables)
    out = capsys.readouterr().out
    assert said in out and (OF_ANOTHER in out) is (model == "owner/unknown")


def test_a_model_that_reads_too_little_is_refused(tmp_path: Path, hub: None) -> None:
    variables = {"DRY_RUN": "1", "DATA": str(tmp_path), "MODEL": "owner/short"}
    with pytest.raises(SettingsError, match="= 1536, and owner/short reads 1024 tokens"):
        launch.launch(host, GSM8K, [], variables)


@pytest.mark.parametrize("on", [host, verl_host], ids=["openrlhf", "verl"])
def test_a_reward_of_ones_own_stands_beside_the_recipe(on, data, started, tmp_path) -> None:
    table = pyarrow.Table.from_pylist([{"prompt": "1+1?"}] * 128)
    pyarrow.parquet.write_table(table, data / "train.parquet")
    path = written(tmp_path / "mine.yaml", f"include: {GSM8K}\nreward: mine.py\n")
    (tmp_path / "mine.py").write_text(f"def {on.REWARD}(*given): return 1.0\n")
    run(data, tmp_path / "run", name=path, on=on)
    assert str(tmp_path / "mine.py") in " ".join(started[0])
    assert str(Path(reward.__file__).resolve()) not in " ".join(started[0])
    (tmp_path / "mine.py").write_text(f"def other(): return {on.REWARD}\n")
    with pytest.raises(SettingsError, match=f"mine.py has no function {on.REWARD}, which"):
        run(data, tmp_path / "other", name=path, on=on)


def test_qwen3_has_on_openrlhf_the_prompt_of_its_own_template(data) -> None:
    """By OpenRLHF's own preprocessing; the turns are those of Qwen3's chat_template."""
    from openrlhf.datasets.prompts_dataset import preprocess_data

    def prompt(name: str) -> str:
        words = host.command(load(name), data, data)
        assert ("--data.apply_chat_template" in words) is ("thinking" in name)
        if "thinking" in name:
            assert "--data.input_template" not in words
            return ""
        template = words[words.index("--data.input_template") + 1]
        return preprocess_data({"prompt": "1+{1}?"}, template, "prompt")[0]

    user, assistant = "<|im_start|>user\n1+{1}?<|im_end|>\n", "<|im_start|>assistant\n"
    expected = user + assistant + "<think>\n\n</think>\n\n"
    assert prompt("qwen3-0.6b-gsm8k") == prompt("qwen3-1.7b-gsm8k") == expected
    prompt("qwen3-1.7b-math-thinking")


def test_an_adapter_takes_what_peft_gives_it() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = load("llama3.2-1b-gsm8k").shape
    written = {key: value for key, value in asdict(shape).items() if key != "parameters"}
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**written))
        lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
        model = get_peft_model(base, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter(shape, 8) == trained
    recipe = load("qwen2.5-math-7b-gsm8k-lora")
    share = adapter(recipe.shape, 32) / parameters(recipe.shape)
    assert 0.1 < 16 * share < 1
    assert held(recipe, "verl").training == pytest.approx(4 + 16 * share)
    assert held(recipe, "verl").reference == 0


def test_a_dry_run_needs_neither_flash_attn_nor_a_gpu(data: Path) -> None:
    """As it is started, without the quickstart's stand-ins."""
    done = subprocess.run(
        [sys.executable, "-m", "recipes.openrlhf", "smollm2-360m-gsm8k"],
        cwd=ROOT,
        env=os.environ | {"DATA": str(data), "DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "answers_per_update   256" in done.stdout and "kl_coef              0.001" in done.stdout


DRY_RUNS = """
import contextlib, io, json, multiprocessing, os, sys
from recipes import launch
from recipes.openrlhf import host
import openrlhf.cli.train_ppo_ray, klplug_openrlhf
from klplug.hosting import references, stored

klplug_openrlhf.check()  # here, and its imports are not made again in each process
# A reference that a recipe names is on the hub, and the file of its answers is not drawn yet.
references.check = stored.check = lambda *_, **__: None

def dry_run(case):
    name, words, variables = case
    os.environ.update(variables, DRY_RUN="1")
    found, common = [], host.common
    host.common = lambda args: found.append(common(args)) or found[-1]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = launch.main(host, [name, *words])
    return status, said.getvalue(), found

# Each in a process of its own: klplug's launcher patches argparse for good.
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    results = pool.map(dry_run, json.loads(sys.argv[1]), chunksize=1)
print("\\n" + json.dumps(results))
"""


def test_openrlhf_reads_every_recipe_as_it_is_meant(data) -> None:
    """Dry runs: its own CLI, all its assertions, klplug's launcher, up to train(args)."""
    recipes = [recipe for recipe in map(load, names()) if "openrlhf" in recipe.hosts]
    cases = [(recipe.name, [], {}) for recipe in recipes]
    others = [{"KL_TYPE": "k1_in_reward", "KL_COEF": "0.05"}, {"KL_TYPE": "none"}]
    others += [{"KL_TYPE": "stock:k3"}]
    cases += [(GSM8K, [], variables) for variables in others]
    chosen = [launch.chosen(host, load(name), variables) for name, _, variables in cases]
    expected = [replace(recipe, training_rows=128 + 2).common() for recipe in chosen]
    cases += [(GSM8K, ["--ds.zero_stge", "3"], {})]
    cases += [(GSM8K, ["--rollout.n_samples_per_prompt", "1"], {})]
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUNS, json.dumps(cases)],
        cwd=ROOT,
        env={
            **os.environ,
            **cpu_shim.environment("openrlhf"),
            **{"DATA": str(data), "OUT": str(data / "run")},
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *good, unknown, assertion = json.loads(done.stdout.splitlines()[-1])
    assert [found for _, _, found in good] == json.loads(json.dumps([[e] for e in expected]))
    assert {status for status, _, _ in good} == {0}
    assert unknown[0] == assertion[0] == 2
    assert "unrecognized arguments: --ds.zero_stge 3. Did you mean --ds.zero_stage?" in unknown[1]
    assert "group_norm requires n_samples_per_prompt > 1" in assertion[1]
    assert not (data / "run").exists()

    said = next(
        said for (name, *_), (_, said, _) in zip(cases, good, strict=False) if name == PAPER
    )
    assert said.startswith("python -m klplug_openrlhf --klplug.kl_type k2_as_loss")
    assert "--klplug.kl_coef 0.5 " in said
    assert "memory, estimated, not measured" in said and "time, estimated" in said
    assert "disk, estimated, not measured:\n  checkpoints " in said
    assert "2 P + 2 P / 1 + 12 P / 1 (ZeRO-2" in said and "T = 2 answers" in said
    assert "kl_type              k2_as_loss" in said
    assert "\n130 questions: 1 rollouts of 128 an episode, 2 left out\n" in said


@pytest.mark.parametrize("name", ["openrlhf", "verl"])
def test_without_a_recipe_they_are_listed(name: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"recipes.{name}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"recipes.{name}", run_name="__main__")
    assert ended.value.code == 0
    listed = capsys.readouterr().out.split()
    assert (GSM8K in listed) and ("qwen2.5-math-7b-math-megatron" in listed) == (name == "verl")


def test_the_gpus_lock_has_what_openrlhfs_wheel_asks_for() -> None:
    assert unmet("openrlhf") == []
