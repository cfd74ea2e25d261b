"""vocab=exact on the real thing: the reference's actor, the maker, the policy's training step.

What must come out is computed by a plain transformers model, with whole matrices of logits.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from klplug_openrlhf import hidden
from klplug_openrlhf.hidden import foretell
from ray import cloudpickle
from torch import Tensor

from klplug import parse
from klplug.hosting import memory
from klplug.hosting.hidden import exact_term
from tests.openrlhf.command_line import change
from tests.openrlhf.trainer import (
    ANSWER,
    BATCH,
    LENGTH,
    PROMPT,
    VOCABULARY,
    Bench,
    arguments,
    configure,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("patched", "lending")

COEF = 0.1


@pytest.fixture(scope="module", params=["untied", "tied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Policy and reference: distributions far from flat, and from each other."""
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config(tied=request.param == "tied"))
    model.get_output_embeddings().weight.data.mul_(15)
    folders = [tmp_path_factory.mktemp(name) for name in ("policy", "reference")]
    for folder in folders:
        model.to(torch.bfloat16).save_pretrained(folder)
        for parameter in model.parameters():  # the next one is the reference
            parameter.data += 0.7 * parameter.data.abs().mean() * torch.randn(parameter.shape)
    return folders


@pytest.fixture(params=[2, 3], ids=["zero2", "zero3"])
def bench(request: pytest.FixtureRequest, models: list[Path]) -> Bench:
    return Bench(models[0], zero_stage=request.param)


@pytest.fixture
def lending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's object store of one process."""
    monkeypatch.setattr("ray.put", lambda x: x)
    monkeypatch.setattr("ray.get", lambda x: x)


def samples(seed: int = 0) -> list[Any]:
    """Two micro-batches of answers of uneven length, padded on the left and on the right."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    generator = torch.Generator().manual_seed(seed)
    made = []
    for half in range(2):
        sequences = torch.randint(3, VOCABULARY, (BATCH // 2, LENGTH), generator=generator)
        attention = torch.ones_like(sequences)
        mask = torch.zeros(BATCH // 2, LENGTH - 1, dtype=torch.long)
        for i in range(BATCH // 2):
            length = ANSWER - 3 * (2 * half + i) - 2
            mask[i, PROMPT : PROMPT + length] = 1
            attention[i, PROMPT + length + 1 :] = 0
            attention[i, : 2 * i] = 0
        mask[0, PROMPT + 1] = 0  # a tool's output inside an answer
        reward = torch.rand(BATCH // 2, generator=generator)
        made.append(
            Experience(
                sequences=sequences,
                attention_mask=attention,
                action_mask=mask,
                rewards=reward,
                scores=reward.clone(),
                total_length=attention.sum(-1).float(),
                response_length=mask.sum(-1).float(),
                index=[2 * half, 2 * half + 1],
                info={"reward": reward.clone()},
            )
        )
    return made


@pytest.fixture(scope="module", autouse=True)
def shipped() -> None:
    """OpenRLHF's remote classes as Ray sends them: from a process in which nothing is replaced."""
    from openrlhf.trainer.ray.launcher import ReferenceModelActor
    from openrlhf.trainer.ray.ppo_actor import PolicyModelActor

    for remote in (ReferenceModelActor, PolicyModelActor):
        cls = remote.__ray_metadata__.modified_class
        # Once: what arrives here is the very class that was sent, and its methods are replaced.
        if cls.__name__ not in SHIPPED:
            SHIPPED[cls.__name__] = cloudpickle.dumps(cls)


SHIPPED: dict[str, bytes] = {}


def arrived(name: str) -> Any:
    """An object of a remote class, in a process in which klplug is active."""
    return object.__new__(cloudpickle.loads(SHIPPED[name]))


def reference_actor(bench: Bench, folder: Path) -> Any:
    """OpenRLHF's own, without its Ray process."""
    from openrlhf.models import Actor

    made = arrived("ReferenceModelActor")
    made.strategy = bench.strategy
    model = Actor(
        str(folder),
        attn_implementation="eager",
        ds_config=bench.strategy.get_ds_eval_config(offload=False),
        packing_samples=False,
    )
    made.model = bench.strategy.prepare(model)
    made.model.eval()
    return made


def experience(bench: Bench, folder: Path, kl_type: str) -> Any:
    """One micro-batch to train on, by way of reference, maker and replay buffer."""
    from openrlhf.trainer.ppo_utils import experience_maker
    from openrlhf.trainer.ppo_utils.experience import make_experience_batch
    from openrlhf.trainer.ppo_utils.replay_buffer import NaiveReplayBuffer

    configure(bench.args, kl_type, COEF)
    change(bench.args, "rollout.n_samples_per_prompt", 2)
    change(bench.args, "actor.model_name_or_path", str(folder))
    answering = {"actor": policy_actor(bench), "reference": reference_actor(bench, folder)}
    maker = experience_maker.RemoteExperienceMaker(
        "actor", None, None, "reference", SimpleNamespace(value=COEF), bench.strategy, None
    )
    maker._dispatch_forward = lambda group, _, **given: [
        answering[group].execute_batch("forward", given, 0, 2)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            experience_maker, "ray", SimpleNamespace(put=lambda x: x, get=lambda refs: refs)
        )
        made = maker.compute_advantages_and_returns(maker.make_experience(samples()))
    buffer = NaiveReplayBuffer(BATCH, cpu_offload=True)
    for each in made:
        buffer.append(cloudpickle.loads(cloudpickle.dumps(each)))
    return make_experience_batch(buffer.items)


def policy_actor(bench: Bench) -> Any:
    made = arrived("PolicyModelActor")
    made.strategy, made.actor = bench.strategy, bench.actor
    return made


def kl_gradient(bench: Bench, given: Any, kl_type: str) -> Tensor:
    """The engine's own gradient of the KL: without advantages the policy loss has none."""
    given.advantages = torch.zeros_like(given.advantages)
    return bench.step(given, kl_type, COEF).of_parameters


def plain_gradient(
    models: list[Path], given: Any, divergence: str = "k2", top: int | None = None
) -> Tensor:
    """Of ``COEF`` times the token mean of the divergence, by whole logits.

    With ``top`` it is of categories, the reference's most likely tokens and one of all others.
    """
    from transformers import Qwen2ForCausalLM

    policy, reference = (Qwen2ForCausalLM.from_pretrained(m, dtype=torch.bfloat16) for m in models)
    attention = given.attention_mask
    position = (attention.cumsum(-1) - 1).masked_fill(attention == 0, 1)

    def log_probs(model: Any) -> Tensor:
        states = model.model(
            given.sequences, attention_mask=attention, position_ids=position
        ).last_hidden_state
        return (states[:, :-1].float() @ model.lm_head.weight.float().T).log_softmax(-1)

    log_p, log_q = log_probs(policy), log_probs(reference).detach()
    mask = given.action_mask.bool()
    if top is not None:
        index = log_q.topk(top).indices
        log_p, log_q = (
            torch.cat(
                [x.gather(-1, index), x.scatter(-1, index, -torch.inf).logsumexp(-1, True)], -1
            )
            for x in (log_p, log_q)
        )
    if divergence == "k2":
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:  # 2 JS, as the estimator of that name
        middle = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        each = (log_p.exp() * (log_p - middle) + log_q.exp() * (log_q - middle)).sum(-1)
    (COEF * each[mask].mean()).backward()
    return torch.cat([p.grad.flatten().float() for p in policy.parameters() if p.grad is not None])


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    ("kl_type", "divergence", "top"),
    [
        ("exact_as_loss", "k2", None),
        ("js_as_loss,vocab=exact", "js", None),
        ("k2_as_loss,vocab=topk:3", "k2", 3),
    ],
)
def test_the_engines_gradient_is_that_of_the_kl_over_the_vocabulary(
    bench: Bench, models: list[Path], kl_type: str, divergence: str, top: int | None
) -> None:
    given = experience(bench, models[1], kl_type)
    references = given.info[hidden.INFO]
    if top is not None:
        assert all(r.matrix is None and r.sent.shape[1] == 2 * top for r in references)
    found = kl_gradient(bench, given, kl_type)
    expected = plain_gradient(models, given, divergence, top)
    assert apart(found, expected) < 0.02  # bfloat16
    if top is not None:
        assert apart(expected, plain_gradient(models, given)) > 0.1


def test_whatever_else_the_step_logs_the_exact_kl_is_among_it(
    bench: Bench, models: list[Path]
) -> None:
    given = experience(bench, models[1], "exact_as_loss")
    metrics = bench.step(given, "exact_as_loss", COEF).metrics
    assert hidden.INFO not in metrics
    assert 0.01 < metrics["klplug/exact_kl"] < 5
    assert metrics["klplug/active"] == 1


def test_lora_has_the_same_kl_and_trains_by_it(bench: Bench, models: list[Path]) -> None:
    """Fresh adapters change nothing yet; the output matrix is frozen."""
    given = experience(bench, models[1], "exact_as_loss")
    info = given.info
    whole = bench.step(given, "exact_as_loss", COEF).metrics["klplug/exact_kl"]
    lora = Bench(models[0], zero_stage=2, lora_rank=4)
    given.info, given.advantages = info, torch.zeros_like(given.advantages)
    recorded = lora.step(given, "exact_as_loss", COEF)
    assert recorded.metrics["klplug/exact_kl"] == pytest.approx(float(whole), rel=1e-2)
    assert recorded.of_parameters.norm() > 0


def test_packed_samples_have_the_states_of_padded_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    given = samples()[0]
    mask, attention = given.action_mask, given.attention_mask
    states = torch.randn(*attention.shape, 5, generator=generator)
    padded = hidden.of_answers(states, mask, attention)
    packed = hidden.of_answers(states[attention.bool()][None], mask, attention)
    assert len(padded) == mask.sum()
    torch.testing.assert_close(packed, padded, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"shape \(1, 3, 5\)"):
        hidden.of_answers(states[:1, :3], mask, attention)


def test_another_matrix_than_the_engines_stops_the_run(bench: Bench, models: list[Path]) -> None:
    given = experience(bench, models[1], "exact_as_loss")
    first, *others = given.info[hidden.INFO]
    twice = hidden.Matrix(first.matrix.weight * 2, None, None)
    given.info[hidden.INFO] = [hidden.Reference(first.sent, twice), *others]
    with pytest.raises(RuntimeError, match=r"of the reference .* nats from the engine's own"):
        bench.step(given, "exact_as_loss", COEF)


def test_other_tokens_than_the_engines_stop_the_run(bench: Bench, models: list[Path]) -> None:
    kl_type = "k2_as_loss,vocab=topk:32"
    given = experience(bench, models[1], kl_type)
    below = torch.tensor([0.0] * 32 + [1.0] * 32)  # ids, and log-probs a nat too low
    sent = (own.sent - below for own in given.info[hidden.INFO])
    given.info[hidden.INFO] = [hidden.Reference(each, None) for each in sent]
    words = "^vocab=topk:32: the log-probs of the reference .* nats from the engine's own"
    with pytest.raises(RuntimeError, match=words):
        bench.step(given, kl_type, COEF)


@pytest.mark.parametrize("kl_type", ["exact_as_loss", "k2_as_loss,vocab=topk:3"])
def test_a_model_without_an_output_layer_is_named_before_training(
    bench: Bench, kl_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(bench.actor.model.module), "get_output_embeddings", lambda _: None)
    configure(bench.args, "k2_as_loss", COEF)
    bench.make()
    configure(bench.args, kl_type, COEF)
    with pytest.raises(RuntimeError, match=r"^Qwen2ForCausalLM shows no output layer"):
        bench.make()


def test_a_reference_without_an_output_layer_is_named(
    bench: Bench, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(bench.actor.model.module), "get_output_embeddings", lambda _: None)
    with pytest.raises(RuntimeError, match="Qwen2ForCausalLM shows no output layer"):
        experience(bench, models[1], "exact_as_loss")


def test_experience_without_hidden_states_stops(bench: Bench, models: list[Path]) -> None:
    given = experience(bench, models[1], "exact_as_loss")
    given.info.pop(hidden.INFO, None)
    with pytest.raises(RuntimeError, match="no hidden states of the reference"):
        bench.step(given, "exact_as_loss", COEF)


def test_what_hidden_states_take_is_said_before_they_are_made(
    models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(rollout__batch_size=8, rollout__max_new_tokens=1000)
    change(args, "rollout.n_samples_per_prompt", 4)
    change(args, "actor.model_name_or_path", str(models[0]))
    # 32 dimensions of two bytes, for 32 answers of 1000 tokens.
    exact, top = (exact_term(parse(f"k2_as_loss,vocab={v}")) for v in ("exact", "topk:3"))
    said = foretell(exact, args)
    assert "64 bytes a token. For 32 answers of at most 1000 tokens that is 0.00205 GB" in said
    said = foretell(top, args)  # a number and a log-prob of each
    assert "the reference's top 3 tokens of a step in memory, 24 bytes a token" in said
    hidden.check_memory(exact, samples(), args)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    tokens = sum(int(sample.action_mask.sum()) for sample in samples())
    with pytest.raises(MemoryError, match=rf"{tokens} tokens of 64 bytes.*1e-06 GB are left"):
        hidden.check_memory(exact, samples(), args)
