"""Memory, disk and time of a recipe before it has run: estimates, printed with their formulas.

Nothing here was measured. The constants below are what the formulas assume; a run's own log says
what holds. `python -m recipes.estimates` prints the table of the README.
"""

import math
from dataclasses import dataclass

from recipes.recipe import KEPT_CHECKPOINTS, Recipe, Shape, load, names

GIB = 2**30
# An H100's dense bf16 rate and memory bandwidth, by its data sheet, and the shares assumed of them.
PEAK_FLOPS = 989e12
BANDWIDTH = 3.35e12
TRAINING_UTILISATION = 0.25  # padding included
BANDWIDTH_UTILISATION = 0.4
AT_ONCE = 256  # answers that a vLLM engine decodes together
# Bytes of bf16 working memory of one decoder layer, per token and hidden unit.
LAYER_BYTES = 34
# bf16 logits, their fp32 log-probabilities, and the gradient of both.
LOGIT_BYTES = 2 + 4 + 4


@dataclass(frozen=True)
class Estimate:
    """A quantity, how it was come by, and what it amounts to."""

    name: str
    formula: str
    value: float
    unit: str

    def __str__(self) -> str:
        amount = f"{self.value:.1f}" if self.value < 100 else f"{self.value:.0f}"
        return f"{self.name:31} {amount:>6} {self.unit:3} = {self.formula}"


def parameters(shape: Shape) -> int:
    """As counted, else of Llama's form with Qwen2's biases, which are next to nothing."""
    if shape.parameters:
        return shape.parameters
    hidden = shape.hidden_size
    query = shape.head * shape.num_attention_heads
    key_value = shape.head * shape.num_key_value_heads
    attention = 2 * hidden * (query + key_value) + query + 2 * key_value
    feed_forward = 3 * hidden * shape.intermediate_size
    layer = attention + feed_forward + 2 * hidden
    embeddings = (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * hidden
    return shape.num_hidden_layers * layer + hidden + embeddings


def adapter(shape: Shape, rank: int) -> int:
    """Parameters of a LoRA adapter of every linear layer but the output's."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query = shape.head * shape.num_attention_heads
    key_value = shape.head * shape.num_key_value_heads
    ends = 2 * (hidden + query) + 2 * (hidden + key_value) + 3 * (hidden + inner)
    return shape.num_hidden_layers * rank * ends


@dataclass(frozen=True)
class Held:
    """Bytes per parameter that one GPU holds, and how that comes about."""

    training: float
    rollout: float
    """While vLLM generates: what the host leaves on the GPU."""
    reference: float
    training_formula: str
    rollout_formula: str
    reference_formula: str


def held(recipe: Recipe, host: str) -> Held:
    """By the engine: bf16 has 2 bytes, fp32 4; Adam's two moments are fp32."""
    n = recipe.gpus
    if host == "openrlhf":
        stage = recipe.openrlhf["ds.zero_stage"]
        weights, over = (2 / n, f"2 P / {n}") if stage == 3 else (2.0, "2 P")
        return Held(
            weights + 14 / n,
            weights,
            weights,
            f"{over} + 2 P / {n} + 12 P / {n} (ZeRO-{stage}: bf16 weights, bf16 gradients; fp32 "
            "weights and moments)",
            f"{over} (the rest is moved to the CPU)",
            f"{over} (bf16)",
        )
    if recipe.verl.get("model_engine") == "megatron":
        m = recipe.verl["actor_rollout_ref.actor.megatron.tensor_model_parallel_size"]
        return Held(
            6 / m + 12 / n,
            6 / m + 12 / n,
            2 / m,
            f"6 P / {m} + 12 P / {n} (Megatron: bf16 weights, fp32 gradients; fp32 weights and "
            "moments)",
            f"6 P / {m} + 12 P / {n}",
            f"2 P / {m} (bf16)",
        )
    if rank := recipe.verl.get("actor_rollout_ref.model.lora_rank", 0):
        size = adapter(recipe.shape, rank)
        share, count = size / parameters(recipe.shape), f"A = {size / 1e6:.0f}e6"
        return Held(
            (4 + 16 * share) / n,
            (4 + 12 * share) / n,
            0,
            f"4 P / {n} + 16 A / {n} (FSDP2: fp32 weights; an adapter's gradients and moments, "
            f"{count})",
            f"4 P / {n} + 12 A / {n} (without gradients)",
            "0 (the policy, its adapter switched off)",
        )
    return Held(
        16 / n,
        12 / n,
        4 / n,
        f"16 P / {n} (FSDP2: fp32 weights, gradients and moments)",
        f"12 P / {n} (without gradients)",
        f"4 P / {n} (fp32)",
    )


def has(recipe: Recipe, option: str) -> bool:
    """Whether a recipe sets an option of klplug."""
    return any(key.endswith(f"klplug.{option}") for key in (*recipe.openrlhf, *recipe.verl))


def references(recipe: Recipe) -> tuple[str, ...]:
    """The frozen models that the KL is to, each of the policy's size."""
    if has(recipe, "source"):
        return ()
    return ("reference", "teacher") if has(recipe, "teacher") else ("reference",)


def checkpoints(recipe: Recipe, host: str) -> Estimate:
    """On disk, those of all ranks and as many as are kept; without the final policy."""
    size = parameters(recipe.shape)
    moments = "12 P (fp32 weights and moments)"
    if host == "openrlhf":
        stage = recipe.openrlhf["ds.zero_stage"]
        each, formula = (12.0, moments) if stage == 3 else (14.0, f"2 P (bf16 weights) + {moments}")
    elif recipe.verl.get("model_engine") == "megatron":
        each, formula = 14.0, f"2 P (bf16 weights) + {moments}"
    elif rank := recipe.verl.get("actor_rollout_ref.model.lora_rank", 0):
        each = 4 + 12 * adapter(recipe.shape, rank) / size
        formula = "4 P (fp32 weights) + 12 A (an adapter's weights and moments)"
    else:
        each, formula = 16.0, f"{moments} + 4 P (fp32 weights again, for transformers)"
    kept = min(KEPT_CHECKPOINTS, math.ceil(recipe.steps / recipe.save_every))
    return Estimate("checkpoints", f"{kept} x ({formula})", kept * each * size / GIB, "GiB")


def memory(recipe: Recipe, host: str) -> list[Estimate]:
    """Of one GPU: the parts, then the peaks of its two phases."""
    shape, size = recipe.shape, parameters(recipe.shape)
    held_here = held(recipe, host)
    tokens = recipe.micro_batch * (recipe.max_prompt_tokens + recipe.max_new_tokens)
    beside = ""
    if has(recipe, "source") and host == "openrlhf":  # one backward for both; verl has two
        tokens, beside = 2 * tokens, " and as many stored ones"

    def gib(name: str, formula: str, amount: float) -> Estimate:
        return Estimate(name, formula, amount / GIB, "GiB")

    states = gib(
        "weights, gradients, Adam",
        f"{held_here.training_formula}, P = {size / 1e9:.2f}e9",
        held_here.training * size,
    )
    frozen = references(recipe)
    formulas = (
        "0 (its stored answers alone)",
        held_here.reference_formula,
        f"2 x ({held_here.reference_formula})",
    )
    reference = gib(
        " and ".join(frozen) or "reference",
        formulas[len(frozen)],
        len(frozen) * held_here.reference * size,
    )
    activations = gib(
        "activations, with checkpointing",
        f"T h (2 L + {LAYER_BYTES}), T = {recipe.micro_batch} answers of full length{beside} "
        f"= {tokens} tokens, h = {shape.hidden_size}, L = {shape.num_hidden_layers}",
        tokens * shape.hidden_size * (2 * shape.num_hidden_layers + LAYER_BYTES),
    )
    logits = gib(
        "logits",
        f"{LOGIT_BYTES} T V (bf16, fp32 log-probs, their gradient), V = {shape.vocab_size}",
        LOGIT_BYTES * tokens * shape.vocab_size,
    )
    engine = gib(
        "vLLM, weights and KV cache",
        f"{recipe.rollout_memory:g} of {recipe.gpu_gib} GiB",
        recipe.rollout_memory * recipe.gpu_gib * GIB,
    )
    training = gib(
        "peak while it trains",
        "weights, gradients, Adam + reference + activations + logits (vLLM sleeps)",
        sum(part.value for part in (states, reference, activations, logits)) * GIB,
    )
    rollout = gib(
        "peak while it generates",
        f"vLLM + reference + {held_here.rollout_formula}",
        (engine.value + reference.value) * GIB + held_here.rollout * size,
    )
    return [states, reference, activations, logits, engine, training, rollout]


def time(recipe: Recipe) -> list[Estimate]:
    """Of a rollout with its updates, and of the whole run."""
    shape, size = recipe.shape, parameters(recipe.shape)
    prompt = recipe.max_prompt_tokens // 4  # most are far shorter than they may be
    parts = recipe.rollout_tensor_parallel
    engines = recipe.gpus // parts
    waves = recipe.answers / engines / AT_ONCE
    steps = max(waves - 1, 0) * recipe.mean_new_tokens + recipe.max_new_tokens
    cache = 4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head
    held_tokens = min(waves, 1) * AT_ONCE * (prompt + recipe.mean_new_tokens // 2)
    generating = Estimate(
        "generation",
        f"{steps:.0f} decoding steps ({recipe.answers} answers, {engines} engines, {AT_ONCE} at "
        f"once, {recipe.mean_new_tokens} tokens each as a guess, one of full length) x (2 P + "
        f"{held_tokens:.0f} tokens x {cache} bytes of cache) / {parts} / "
        f"({BANDWIDTH_UTILISATION:g} of {BANDWIDTH / 1e12:g} TB/s)",
        steps * (2 * size + held_tokens * cache) / parts / (BANDWIDTH * BANDWIDTH_UTILISATION),
        "s",
    )
    tokens = recipe.answers * (prompt + recipe.mean_new_tokens)
    frozen = references(recipe)
    passes = {"update with recomputation": 8, "old policy": 2, **dict.fromkeys(frozen, 2)}
    if has(recipe, "source"):
        passes["as many stored answers"] = 8
    training = Estimate(
        "log-probs and updates",
        f"({' + '.join(map(str, passes.values()))}) P x {tokens} tokens ({', '.join(passes)}) / "
        f"({recipe.gpus} x {TRAINING_UTILISATION:g} of {PEAK_FLOPS / 1e12:g} TFLOP/s)",
        sum(passes.values()) * size * tokens / (recipe.gpus * PEAK_FLOPS * TRAINING_UTILISATION),
        "s",
    )
    step = generating.value + training.value
    whole = Estimate(
        "whole run",
        f"{recipe.steps} steps x {step:.0f} s, without start, weight transfer and checkpoints",
        recipe.steps * step / 3600,
        "h",
    )
    return [generating, training, whole]


def markdown_table() -> str:
    """Every recipe, a line for each of its hosts; the last column is for whoever has measured."""
    lines = [
        "| recipe | host | GPUs | KL | steps | GiB per GPU, estimated: training, generating "
        "| hours on H100s, estimated | measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in map(load, names()):
        for host in recipe.hosts:
            *_, training, rollout = memory(recipe, host)
            nodes = f"{recipe.nodes} x " if recipe.nodes > 1 else ""
            strength = "" if recipe.kl_coef is None else f", {recipe.kl_coef:g}"
            lines.append(
                f"| `{recipe.name}` | {host} | {nodes}{recipe.gpus_per_node} x {recipe.gpu_gib} GB "
                f"| {recipe.kl_type}{strength} | {recipe.steps} "
                f"| {training.value:.0f}, {rollout.value:.0f} | {time(recipe)[-1].value:.1f} | |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
