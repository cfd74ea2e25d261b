"""reference=teacher on the real thing: the reference's actor, maker, buffer and training step.

What must come out is computed by plain transformers models, and by hand.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from klplug_openrlhf import teacher
from klplug_openrlhf.samples import INFO
from torch import Tensor

from klplug.hosting.state import Reference
from tests.openrlhf import test_exact
from tests.openrlhf.command_line import change
from tests.openrlhf.test_exact import (  # noqa: F401
    COEF,
    apart,
    experience,
    lending,
    reference_actor,
    samples,
    shipped,
)
from tests.openrlhf.test_trainer import Group, trainer
from tests.openrlhf.trainer import Bench, configure, tiny_config
from tests.ranks import on_two_ranks

pytestmark = pytest.mark.usefixtures("patched", "lending")

KL_TYPE = "1.25*k2_as_loss,reference=teacher+-0.25*k2_as_loss"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Policy, reference and teacher, in bfloat16."""
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config(tied=False))
    model.get_output_embeddings().weight.data.mul_(15)
    folders = [tmp_path_factory.mktemp(name) for name in ("policy", "reference", "teacher")]
    for folder in folders:
        model.to(torch.bfloat16).save_pretrained(folder)
        for parameter in model.parameters():
            parameter.data += 0.5 * parameter.data.abs().mean() * torch.randn(parameter.shape)
    return folders


@pytest.fixture(params=[2, 3], ids=["zero2", "zero3"])
def bench(request: pytest.FixtureRequest, models: list[Path]) -> Bench:
    made = Bench(models[0], zero_stage=request.param)
    change(made.args, "ds.attn_implementation", "eager")
    return made


@pytest.fixture
def taught(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's actors of a run with a teacher, told to load it as the command tells them."""

    def made(bench: Bench, folder: Path) -> Any:
        actor = reference_actor(bench, folder)
        actor.execute_batch("klplug_teach", {"path": str(models[2])}, 0, 0)
        return actor

    monkeypatch.setattr(test_exact, "reference_actor", made)


def log_probs(folder: Path, given: Any) -> Tensor:
    """Of the answers' tokens, by whole logits, (B, A)."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    attention = given.attention_mask
    position = (attention.cumsum(-1) - 1).masked_fill(attention == 0, 1)
    with torch.no_grad():
        logits = model(given.sequences, attention_mask=attention, position_ids=position).logits
    of_all = logits[:, :-1].float().log_softmax(-1)
    found = of_all.gather(-1, given.sequences[:, 1:, None])[..., 0]
    return found[:, -given.action_mask.shape[1] :]


@pytest.mark.usefixtures("taught")
def test_the_engine_is_given_the_kl_to_both_models(bench: Bench, models: list[Path]) -> None:
    given = experience(bench, models[1], KL_TYPE)
    mask = given.action_mask.bool()
    reference, taught = (log_probs(folder, given) for folder in models[1:])
    assert apart(given.base_action_log_probs[mask], reference[mask]) < 0.02  # bfloat16
    carried = torch.cat([own.numbers[teacher.LOG_PROBS] for own in given.info[INFO]])
    assert apart(carried, taught[mask]) < 0.02 < apart(reference[mask], taught[mask])

    given.advantages = torch.zeros_like(given.advantages)
    step = bench.step(copy.deepcopy(given), KL_TYPE, COEF)
    ratio = ((step.log_probs - given.action_log_probs) * mask).exp()
    whole = torch.zeros_like(step.log_probs).masked_scatter(mask, carried.to(step.log_probs))
    both = 1.25 * (step.log_probs - whole) - 0.25 * (step.log_probs - given.base_action_log_probs)
    by_hand = COEF * ratio * both * mask / mask.sum()
    assert by_hand.abs().max() > 1e-3
    torch.testing.assert_close(step.at_log_probs.float(), by_hand.float(), rtol=1e-3, atol=1e-6)
    k1 = step.metrics["klplug/1.25xk2_as_loss.reference-teacher/k1"]
    assert float(k1) == pytest.approx(float((step.log_probs - whole)[mask].mean()), rel=1e-3)
    of_ref = (step.log_probs - given.base_action_log_probs)[mask].mean()
    assert float(step.metrics["klplug/k1"]) == pytest.approx(float(of_ref), rel=1e-3)
    assert not {INFO, teacher.INFO} & set(step.metrics)


@pytest.mark.usefixtures("taught")
def test_two_terms_to_one_teacher(bench: Bench, models: list[Path]) -> None:
    """It answers once, and each term has its own estimator."""
    k2, k3 = "k2_as_loss,ratio=none,reference=teacher", "k3_as_loss,ratio=none,reference=teacher"
    kl_type = f"0.5*{k2}+0.5*{k3}+k2_as_loss,ratio=none"
    given = experience(bench, models[1], kl_type)
    given.advantages = torch.zeros_like(given.advantages)
    step = bench.step(copy.deepcopy(given), kl_type, COEF)
    mask, taught = given.action_mask.bool(), log_probs(models[2], given)
    x = step.log_probs - taught
    c = 0.5 * x + 0.5 * (1 - (-x).exp()) + step.log_probs - given.base_action_log_probs
    expected = (COEF * c[mask] / mask.sum()).float()
    assert apart(step.at_log_probs[mask].float(), expected) < 0.05


@pytest.mark.usefixtures("taught")
def test_beside_a_kl_over_the_vocabulary(bench: Bench, models: list[Path]) -> None:
    """The reference sends its hidden states, and the teacher its log-probs."""
    kl_type = "exact_as_loss+0.5*k2_as_loss,ratio=none,reference=teacher"
    given = experience(bench, models[1], kl_type)
    given.advantages = torch.zeros_like(given.advantages)
    step = bench.step(copy.deepcopy(given), kl_type, COEF)
    mask, taught = given.action_mask.bool(), log_probs(models[2], given)
    c = 0.5 * (step.log_probs - taught)[mask]
    assert apart(step.at_log_probs[mask].float(), (COEF * c / mask.sum()).float()) < 0.05
    assert step.metrics["klplug/exact_kl"] > 0.01


def test_a_teacher_that_sent_nothing_stops_the_run(bench: Bench, models: list[Path]) -> None:
    with pytest.raises(RuntimeError, match="sent no log-probs of a teacher: is klplug active"):
        experience(bench, models[1], KL_TYPE)


@pytest.mark.usefixtures("taught")
def test_experience_of_another_process_stops(bench: Bench, models: list[Path]) -> None:
    given = experience(bench, models[1], KL_TYPE)
    del given.info[INFO]
    with pytest.raises(RuntimeError, match="this experience carries nothing of klplug's"):
        bench.step(given, KL_TYPE, COEF)


def test_loading_it_leaves_the_reference_and_its_connections(
    bench: Bench, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(bench.args, "k2_as_loss", COEF)
    actor = reference_actor(bench, models[1])
    model = actor.model
    monkeypatch.setattr(type(actor), "_setup_distributed", lambda *_: pytest.fail("set up twice"))
    actor.execute_batch("klplug_teach", {"path": str(models[2])}, 0, 0)
    assert actor.model is model and actor.klplug_teacher is not model
    assert not actor.klplug_teacher.model.module.training
    with pytest.raises((OSError, ValueError), match="nowhere"):
        actor.execute_batch("klplug_teach", {"path": "./nowhere"}, 0, 0)
    assert actor.model is model


def test_resuming_with_another_teacher_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = Group()
    first = trainer(monkeypatch, KL_TYPE, group, teacher="hub/teacher")
    assert first.klplug_models["teacher"] == Reference("hub/teacher", None)
    first.save_logs_and_checkpoints(3, {}, {"global_step": 3})
    assert group.saved["klplug"]["teacher"] == {"path": "hub/teacher", "weights": None}
    assert group.saved["klplug"]["reference"] == {"path": "hub/model", "weights": None}
    for path, said in (("hub/teacher", False), ("hub/other", True)):
        capsys.readouterr()
        trainer(monkeypatch, KL_TYPE, Group(group.saved), teacher=path).init_checkpoint_states()
        words = "with the teacher hub/other a run that was trained with hub/teacher."
        assert (words in capsys.readouterr().out) is said


@pytest.mark.slow  # two processes of DeepSpeed; forwards of ZeRO-3 wait for each other
@pytest.mark.usefixtures("ops")
def test_two_ranks_of_zero3_are_taught_each_its_own_answers(
    models: list[Path], tmp_path: Path
) -> None:
    ranks = on_two_ranks("tests.openrlhf.taught", tmp_path, *map(str, models))
    expected = []
    for given, _ in ranks:
        mask = given.action_mask.bool()
        reference, taught = (log_probs(folder, given) for folder in models[1:])
        assert apart(given.base_action_log_probs[mask], reference[mask]) < 0.02  # bfloat16
        carried = torch.cat([own.numbers[teacher.LOG_PROBS] for own in given.info[INFO]])
        assert apart(carried, taught[mask]) < 0.02 < apart(reference[mask], taught[mask])
        expected.append(plain_gradient(models[0], given, taught, reference))
    (one, first), (other, second) = ranks
    assert not torch.equal(one.sequences, other.sequences)
    assert torch.equal(first.of_parameters, second.of_parameters)
    assert apart(first.of_parameters, torch.stack(expected).mean(0)) < 0.05
    assert apart(expected[0], expected[1]) > 0.2  # so neither's alone


def plain_gradient(policy: Path, given: Any, taught: Tensor, reference: Tensor) -> Tensor:
    """Of all parameters, by autograd of plain transformers in float32: the token mean of the KL."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(policy, dtype=torch.float32)
    attention, mask = given.attention_mask, given.action_mask.bool()
    position = (attention.cumsum(-1) - 1).masked_fill(attention == 0, 1)
    logits = model(given.sequences, attention_mask=attention, position_ids=position).logits
    of_all = logits[:, :-1].log_softmax(-1)
    found = of_all.gather(-1, given.sequences[:, 1:, None])[:, -mask.shape[1] :, 0]
    squares = 1.25 * (found - taught).square() - 0.25 * (found - reference).square()
    (COEF * squares[mask].mean() / 2).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_samples_of_a_run_without_a_teacher_carry_none() -> None:
    plain = SimpleNamespace(info={})
    assert teacher.of(plain) is None
