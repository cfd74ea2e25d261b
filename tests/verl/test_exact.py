"""vocab=exact on the real thing: verl's worker of policy and reference, and its trainers' steps.

What must come out is computed by a plain transformers model, with whole matrices of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from klplug_verl import hidden
from torch import Tensor

from klplug.hosting import memory
from klplug.hosting.hidden import Matrix, output_layer
from tests.ranks import on_two_ranks
from tests.references import POLICY
from tests.verl.engine import ANSWERS, nested
from tests.verl.exact import COEF, THROUGH, Run, overrides, rows
from tests.verl.tensors import IS_LEGACY
from tests.verl.trainer import TRAINERS

TEMPERATURE = 0.8


pytestmark = pytest.mark.usefixtures("process")


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def log_softmax(model: Any) -> Tensor:
    """Of the answers' tokens that count, over the whole vocabulary, (N, V)."""
    made, parts = rows(), []
    for prompt, answer, mask in zip(
        made["prompts"], made["responses"], made["response_mask"], strict=True
    ):
        output = model(torch.cat([prompt, answer])[None], output_hidden_states=True)
        # In float32 from here, as klplug does it, whatever the model computes in.
        states = output.hidden_states[-1][0, -len(answer) - 1 : -1].float()
        logits = states @ model.get_output_embeddings().weight.float().T
        parts.append((logits / TEMPERATURE).log_softmax(-1)[mask.bool()])
    return torch.cat(parts)


TOP = 3  # of the divergence that is called by it


def mean_kl(log_p: Tensor, log_q: Tensor, divergence: str = "k2") -> Tensor:
    if divergence == "top":  # of the reference's most likely tokens and one category of all others
        index = log_q.topk(TOP).indices
        log_p, log_q = (
            torch.cat(
                [x.gather(-1, index), x.scatter(-1, index, -torch.inf).logsumexp(-1, True)], -1
            )
            for x in (log_p, log_q)
        )
    if divergence in ("k2", "top"):
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    middle = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))  # 2 JS, as js
    parts = log_p.exp() * (log_p - middle) + log_q.exp() * (log_q - middle)
    return parts.sum(-1).mean()


def gradients(model: Any) -> Tensor:
    trained = (p.grad for p in model.parameters() if p.grad is not None)
    return torch.cat([grad.flatten().double() for grad in trained])


def plain(
    reference: Path, divergence: str = "k2", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, float]:
    """Gradient of ``COEF`` times the token mean of the divergence, and that mean."""
    policy, other = loaded(POLICY, dtype), loaded(reference, dtype)
    mean = mean_kl(log_softmax(policy), log_softmax(other).detach(), divergence)
    (COEF * mean).backward()
    return gradients(policy), float(mean.detach())


@pytest.fixture(scope="module")
def expected(reference: Path) -> dict[str, tuple[Tensor, float]]:
    return {divergence: plain(reference, divergence) for divergence in ("k2", "js", "top")}


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Whose forward the model's class has: verl puts its fused kernels there."""
    from transformers import Qwen2ForCausalLM

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)
    return lambda: Qwen2ForCausalLM.forward.__module__


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


CASES: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "fsdp": {"strategy": "fsdp"},
    "packed": {"packed": True},
    "packed, cut in four": {"packed": True, "micro_batch": 2},
    "cut in four": {"micro_batch": 2},
    "cut by tokens": {"dynamic": 32},
    "fused": {"fused": True},
    "fused, fsdp": {"fused": True, "strategy": "fsdp"},
    "fused, packed, cut in four": {"fused": True, "packed": True, "micro_batch": 2},
    "packed, cut by tokens": {"packed": True, "dynamic": 32},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_gradient_is_that_of_the_kl_over_the_vocabulary(
    reference: Path,
    expected: dict[str, tuple[Tensor, float]],
    case: str,
    trainer: str,
    forward: Callable[[], str],
) -> None:
    found, metrics = THROUGH[trainer](
        Run(*overrides("exact_as_loss", reference, trainer=trainer, **CASES[case]))
    )
    assert forward().startswith("verl.") == ("fused" in case)
    gradient, mean = expected["k2"]
    assert mean > 0.05
    assert metrics["klplug/exact_kl"] == pytest.approx(mean, rel=1e-4)
    assert metrics["klplug/exact_bytes"] == sum(ANSWERS) * 128 * 4
    assert apart(found, gradient) < 1e-4


def test_another_divergence(reference: Path, expected: dict[str, tuple[Tensor, float]]) -> None:
    run = Run(*overrides("js_as_loss,vocab=exact", reference))
    found, metrics = THROUGH[TRAINERS[0]](run)
    gradient, mean = expected["js"]
    assert metrics["klplug/exact_kl"] == pytest.approx(mean, rel=1e-4)
    assert apart(found, gradient) < 1e-4
    assert apart(found, expected["k2"][0]) > 0.1


@pytest.mark.parametrize("case", ["fsdp2", "fsdp", "packed, cut in four"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_references_top_tokens_alone(
    reference: Path, expected: dict[str, tuple[Tensor, float]], case: str, trainer: str
) -> None:
    kl_type = f"k2_as_loss,vocab=topk:{TOP}"
    run = Run(*overrides(kl_type, reference, trainer=trainer, **CASES[case]))
    found, metrics = THROUGH[trainer](run)
    gradient, mean = expected["top"]
    assert metrics["klplug/topk_kl"] == pytest.approx(mean, rel=1e-4)
    assert mean < 0.99 * expected["k2"][1]
    assert metrics["klplug/exact_bytes"] == sum(ANSWERS) * TOP * 8
    assert run.worker.actor.engine.klplug_exact.matrix is None
    assert apart(found, gradient) < 1e-4 < 1e-2 < apart(gradient, expected["k2"][0])


def test_in_bfloat16_states_take_two_bytes_and_the_gradient_is_close(
    reference: Path,
) -> None:
    # verl 0.7's engine makes the mask of padded rows from loss_mask, which has the length of the
    # longest answer: no token sees more than that many first ones. Its packed rows have no mask.
    run = Run(*overrides("exact_as_loss", reference, dtype="bf16", packed=IS_LEGACY))
    found, metrics = THROUGH[TRAINERS[0]](run)
    gradient, mean = plain(reference, dtype=torch.bfloat16)
    assert metrics["klplug/exact_kl"] == pytest.approx(mean, rel=0.02)
    assert metrics["klplug/exact_bytes"] == sum(ANSWERS) * 128 * 2
    assert apart(found, gradient) < 0.05


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_with_lora_the_reference_is_the_policy_without_its_adapter(
    trainer: str, fused: bool, forward: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against peft's own model of the same adapter."""
    from peft import LoraConfig, get_peft_model

    run = Run(
        # verl 0.8's fused kernels take packed rows alone.
        *overrides("exact_as_loss", None, trainer=trainer, fused=fused, packed=fused),
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.lora_alpha=8",
        "actor_rollout_ref.model.target_modules=[q_proj,down_proj]",
    )
    own = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(loaded(POLICY), own)
    generator = torch.Generator().manual_seed(0)
    trained = dict(run.worker.actor.engine.module.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                continue
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            (found,) = (p for own, p in trained.items() if own.endswith(name.split("model.", 2)[2]))
            getattr(found, "_local_tensor", found).copy_(parameter)
    gradient, metrics = THROUGH[trainer](run)
    assert forward().startswith("verl.") == fused
    monkeypatch.undo()
    with model.disable_adapter():
        log_q = log_softmax(model).detach()
    mean = mean_kl(log_softmax(model), log_q)
    (COEF * mean).backward()
    assert float(mean.detach()) > 0.05
    assert metrics["klplug/exact_kl"] == pytest.approx(float(mean.detach()), rel=1e-4)
    assert apart(gradient, gradients(model)) < 1e-4
    assert metrics["klplug/exact_bytes"] == sum(ANSWERS) * 128 * 4


@pytest.mark.parametrize(
    "case",
    ["fsdp2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fsdp", "fused", "fused, fsdp"))],
)
def test_two_ranks_give_the_gradient_of_one(
    reference: Path, expected: dict[str, tuple[Tensor, float]], case: str, tmp_path: Path
) -> None:
    words = overrides("exact_as_loss", reference, micro_batch=2, **CASES[case])
    (gradient, other), metrics = on_two_ranks(
        "tests.verl.exact", tmp_path, *words, "trainer.n_gpus_per_node=2"
    )
    whole, mean = expected["k2"]
    assert metrics["klplug/exact_kl"] == pytest.approx(mean, rel=1e-4)
    if "strategy" not in CASES[case]:
        assert apart(gradient, whole) < 1e-4
    else:  # each has a part of it
        norm = (gradient.norm().square() + other.norm().square()).sqrt()
        assert float(norm) == pytest.approx(float(whole.norm()), rel=1e-4)


def test_the_states_pass_the_queue_as_they_are() -> None:
    """TransferQueue's own serialiser, between verl's processes."""
    serial = pytest.importorskip("transfer_queue.utils.serial_utils")
    states = torch.nested.as_nested_tensor(
        [torch.randn(n, 8, dtype=torch.bfloat16) for n in ANSWERS], layout=torch.jagged
    )
    sent = serial.MsgpackDecoder().decode(serial.MsgpackEncoder().encode(states))
    assert sent.layout == torch.jagged and len(sent) == len(ANSWERS)
    assert all(torch.equal(a, b) for a, b in zip(sent.unbind(), states.unbind(), strict=True))


# What stops a run.


@pytest.fixture(scope="module")
def run(reference: Path) -> Run:
    return Run(*overrides("exact_as_loss", reference))


def scaled(run: Run, fields: Any) -> None:
    rows = fields[hidden.STATES].unbind()
    fields[hidden.STATES] = torch.nested.as_nested_tensor(
        [2 * row for row in rows], layout=torch.jagged
    )


def another_matrix(run: Run, fields: Any) -> None:
    shared = run.worker.actor.engine.klplug_exact
    shared.matrix = Matrix(shared.matrix.weight * 2, None, None)


def no_states(run: Run, fields: Any) -> None:
    del fields[hidden.STATES]


def no_matrix(run: Run, fields: Any) -> None:
    run.worker.actor.engine.klplug_exact.matrix = None


def not_connected(run: Run, fields: Any) -> None:
    del run.worker.actor.engine.klplug_exact


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scaled, "of the reference from its hidden states .* nats from the engine's own"),
        (another_matrix, "of the reference from its hidden states .* nats from the engine's own"),
        (no_states, "has no hidden states of the reference"),
        (no_matrix, "the reference made no forward"),
        (not_connected, "klplug gets no hidden states from"),
    ],
)
def test_what_does_not_belong_together_stops_the_run(run: Run, change: Any, words: str) -> None:
    engine = run.worker.actor.engine
    shared = engine.klplug_exact
    shared.comparison.done.clear()
    with pytest.raises(RuntimeError, match=words):
        THROUGH[TRAINERS[0]](run, between=lambda fields: change(run, fields))
    engine.klplug_exact, shared.matrix = shared, None


def test_a_model_without_an_output_layer_is_named_before_training(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = type(loaded(POLICY))
    monkeypatch.setattr(made, "get_output_embeddings", lambda _: None)
    with pytest.raises(RuntimeError, match=rf"{made.__name__} shows no output layer"):
        Run(*overrides("exact_as_loss", reference))


def test_an_engine_that_does_not_call_its_output_layer_stops_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one with a fused loss, which makes log-probs of hidden states itself."""
    model = type(run.worker.ref.engine.module)
    layer = output_layer(run.worker.ref.engine.module)
    monkeypatch.setattr(model, "get_output_embeddings", lambda own: Idle(layer.weight))
    with pytest.raises(RuntimeError, match="called its output layer 0 times"):
        THROUGH[TRAINERS[0]](run)


class Idle(torch.nn.Module):
    """An output layer that nobody calls."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight


def test_an_output_layer_with_an_adapter_is_refused_by_name() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(loaded(POLICY), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with pytest.raises(RuntimeError, match=r"^the output layer .* has an adapter"):
        output_layer(model)


def test_hidden_states_of_another_shape_are_named() -> None:
    data = {
        "input_ids": nested([torch.ones(n) for n in (5, 3)]),
        "responses": nested([torch.ones(n) for n in (2, 1)]),
    }
    places = hidden.Places.of(data)
    assert places.packed.tolist() == [2, 3, 6] and places.padded.tolist() == [2, 3, 6]
    with pytest.raises(RuntimeError, match=r"shape \(1, 4, 6\) for sequences of \[5, 3\] tokens"):
        places.take(torch.zeros(1, 4, 6))  # one rank's half of them


def test_what_hidden_states_take_is_said_before_they_are_made(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    THROUGH[TRAINERS[0]](run)
    # 128 dimensions of four bytes; the configuration has 4 prompts, 2 answers to each.
    said = "512 bytes a token. For 8 answers of at most 512 tokens that is 0.0021 GB at most"
    assert said in capsys.readouterr().out
    monkeypatch.setattr(memory, "available", lambda: 1000)
    tokens = sum(ANSWERS)
    with pytest.raises(MemoryError, match=rf"{tokens} tokens of 512 bytes.*1e-06 GB are left"):
        THROUGH[TRAINERS[0]](run)
