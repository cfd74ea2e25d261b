"""reference=teacher on the real thing: verl's worker of policy, reference and teacher, and its
trainers' steps.

What must come out is computed by plain transformers models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from klplug.hosting.state import Reference
from tests.ranks import on_two_ranks
from tests.references import POLICY, made, same
from tests.verl.exact import COEF, THROUGH, Run, overrides, rows
from tests.verl.test_exact import TEMPERATURE, apart, gradients, loaded
from tests.verl.test_settings import own
from tests.verl.test_trainer import saving
from tests.verl.trainer import TRAINERS

pytestmark = pytest.mark.usefixtures("process")

# On samples of another policy than that of the run, so without a ratio.
KL_TYPE = "1.25*k2_as_loss,ratio=none,reference=teacher+-0.25*k2_as_loss,ratio=none"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy with weights that are those of no other model here."""
    from transformers import AutoModelForCausalLM

    place = made(same, tmp_path_factory.mktemp("teacher"))
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.9)
    model.save_pretrained(place)
    return place


def settings(reference: Path, teacher: Path, *more: str, **how: Any) -> list[str]:
    kl_type = how.pop("kl_type", KL_TYPE)
    return overrides(kl_type, reference, f"+klplug.teacher={teacher}", *more, **how)


def log_probs(model: Any) -> Tensor:
    """Of the answers' tokens that count, (N,)."""
    given, parts = rows(), []
    for prompt, answer, mask in zip(
        given["prompts"], given["responses"], given["response_mask"], strict=True
    ):
        logits = model(torch.cat([prompt, answer])[None]).logits[0, -len(answer) - 1 : -1]
        of_all = (logits / TEMPERATURE).log_softmax(-1)
        parts.append(of_all.gather(-1, answer[:, None])[:, 0][mask.bool()])
    return torch.cat(parts)


@pytest.fixture(scope="module")
def expected(reference: Path, teacher: Path) -> tuple[Tensor, float, float]:
    """Gradient of the policy, and the mean log-ratios to reference and teacher."""
    policy = loaded(POLICY)
    own = log_probs(policy)
    with torch.no_grad():
        to_ref, to_teacher = (own - log_probs(loaded(path)) for path in (reference, teacher))
    c = 1.25 * to_teacher - 0.25 * to_ref
    (COEF * (c.detach() * own).mean()).backward()
    return gradients(policy), float(to_ref.mean()), float(to_teacher.mean())


CASES: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "fsdp": {"strategy": "fsdp"},
    "packed, cut in four": {"packed": True, "micro_batch": 2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_policy_is_trained_by_the_kl_to_both_models(
    reference: Path,
    teacher: Path,
    expected: tuple[Tensor, float, float],
    case: str,
    trainer: str,
) -> None:
    run = Run(*settings(reference, teacher, trainer=trainer, **CASES[case]))
    found, metrics = THROUGH[trainer](run)
    gradient, to_ref, to_teacher = expected
    assert apart(found, gradient) < 1e-4
    assert metrics["klplug/k1"] == pytest.approx(to_ref, rel=1e-3)
    name = "klplug/1.25xk2_as_loss.ratio-none.reference-teacher/k1"
    assert metrics[name] == pytest.approx(to_teacher, rel=1e-3)
    assert abs(to_teacher - to_ref) > 0.01 * abs(to_ref)


def test_beside_a_kl_over_the_vocabulary(reference: Path, teacher: Path) -> None:
    """The reference sends its hidden states, and the teacher its log-probs."""
    kl_type = "exact_as_loss+0.5*k2_as_loss,ratio=none,reference=teacher"
    for trainer in TRAINERS:
        run = Run(*settings(reference, teacher, kl_type=kl_type, trainer=trainer))
        _, metrics = THROUGH[trainer](run)
        assert metrics["klplug/exact_kl"] > 0.01
        assert metrics["klplug/0.5xk2_as_loss.ratio-none.reference-teacher/k3"] > 0.001


def test_two_terms_to_one_teacher(
    reference: Path, teacher: Path, expected: tuple[Tensor, float, float]
) -> None:
    """It answers once: two halves of k2 are one, to the last digits of a sum."""
    half = "0.625*k2_as_loss,{}reference=teacher"
    kl_type = f"{half.format('ratio=none,')}+{half.format('bound=99,ratio=none,')}"
    kl_type += "+-0.25*k2_as_loss,ratio=none"
    run = Run(*settings(reference, teacher, kl_type=kl_type))
    found, _ = THROUGH[TRAINERS[0]](run)
    assert apart(found, expected[0]) < 1e-4


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_teacher_that_sent_nothing_stops_the_run(
    trainer: str, reference: Path, teacher: Path
) -> None:
    run = Run(*settings(reference, teacher, trainer=trainer))
    del run.worker.ref.klplug_teacher
    with pytest.raises(RuntimeError, match="sent no log-probs of a teacher: is klplug active"):
        THROUGH[trainer](run)


@pytest.mark.slow  # two processes of verl, 20 seconds; what is sent is one field more of the batch
def test_two_ranks_give_the_gradient_of_one(
    reference: Path, teacher: Path, expected: tuple[Tensor, float, float], tmp_path: Path
) -> None:
    words = settings(reference, teacher, "trainer.n_gpus_per_node=2", micro_batch=2)
    (gradient, other), metrics = on_two_ranks("tests.verl.exact", tmp_path, *words)
    whole, to_ref, _ = expected
    assert metrics["klplug/k1"] == pytest.approx(to_ref, rel=1e-3)
    assert torch.equal(gradient, other) and apart(gradient, whole) < 1e-4


@pytest.mark.parametrize("kind", TRAINERS)
def test_resuming_with_another_teacher_warns(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = saving(kind, tmp_path, *own("k2_as_loss"))
    first.klplug.models["teacher"] = Reference("hub/teacher", None)
    first.global_steps = 3
    first._save_checkpoint()
    kept = json.loads((tmp_path / "global_step_3" / "klplug.json").read_text())
    assert kept["teacher"] == {"path": "hub/teacher", "weights": None}
    for path, warns in (("hub/teacher", False), ("hub/other", True)):
        resumed = saving(kind, tmp_path, *own("k2_as_loss"))
        resumed.klplug.models["teacher"] = Reference(path, None)
        capsys.readouterr()
        resumed._load_checkpoint()
        said = "with the teacher hub/other a run that was trained with hub/teacher."
        assert (said in capsys.readouterr().out) is warns
