"""``klplug.source``: stored answers of the reference through verl's real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from klplug_verl import stored as module
from klplug_verl.hooks import need_reference_policy
from klplug_verl.keys import WORKERS_SOURCE
from klplug_verl.plan import Plan
from klplug_verl.settings import derive
from torch import Tensor

from klplug import stored_kl
from klplug.hosting.settings import SettingsError
from klplug.hosting.stored import Answer, Stored
from tests.ranks import on_two_ranks
from tests.references import POLICY
from tests.stored import policys_digest, rows, written
from tests.verl.engine import ANSWERS, Bench, nested
from tests.verl.trainer import config

BETA = 0.5


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    path = written(tmp_path_factory.mktemp("source") / "own.jsonl", rows(vocabulary=280))
    return Stored.read(str(path))


@contextmanager
def beside(bench: Bench, stored: Stored) -> Iterator[None]:
    """As ``connect`` leaves the policy's engine."""
    bench.worker.engine.klplug_stored = stored
    try:
        yield
    finally:
        del bench.worker.engine.klplug_stored


def same(one: Tensor, other: Tensor, rtol: float = 1e-4) -> None:
    assert other.norm() > 0
    assert (one - other).norm() <= rtol * other.norm()


def alone(
    bench: Bench, answers: list[Answer], kl_type: str, by_answer: bool, scale: float
) -> Tensor:
    """Gradient of the core's KL of these answers, as a batch of their own through the engine."""
    from verl.utils import tensordict_utils as tu

    pairs = [(torch.tensor(own.prompt), torch.tensor(own.answer)) for own in answers]
    ids = [torch.cat(pair) for pair in pairs]
    ones = nested([torch.ones(len(answer)) for _, answer in pairs])
    tensors = {
        "input_ids": nested(ids),
        "position_ids": nested([torch.arange(len(row)) for row in ids]),
        "prompts": nested([prompt for prompt, _ in pairs]),
        "responses": nested([answer for _, answer in pairs]),
        "loss_mask": ones,
        "response_mask": ones,
    }
    meta = {"temperature": 1.0, "global_batch_size": len(answers), "mini_batch_size": len(answers)}
    meta |= {"epochs": 1, "seed": 0, "dataloader_kwargs": {"shuffle": False}}
    meta |= {"calculate_entropy": False, "compute_loss": True, "pad_mode": "no_padding"}

    def loss(model_output: dict[str, Tensor], data: Any, dp_group: Any = None) -> Any:
        total = torch.zeros(())
        for own, row in zip(answers, model_output["log_probs"].unbind(), strict=True):
            log_probs = row[len(own.prompt) - 1 : -1][None]
            ref = torch.tensor([own.log_probs])
            kl = stored_kl(kl_type, log_probs, ref, torch.ones_like(ref)).loss.sum()
            total = total + (kl / len(own.answer) if by_answer else kl)
        return scale * total, {}

    return bench.trained(loss, tu.get_tensordict(tensors, meta), len(answers))[0]


@pytest.mark.parametrize("micro_batch", [8, 4])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_the_kl_acts_on_the_stored_answers_and_on_nothing_else(
    bench: Bench, data: Any, stored: Stored, micro_batch: int, mode: str
) -> None:
    kl_type = "js_as_loss"
    with beside(bench, stored):
        ours, metrics = bench.step(data, kl_type, BETA, micro_batch, loss_agg_mode=mode)
    without, plain = bench.step(data, None, micro_batch=micro_batch, loss_agg_mode=mode)
    for name in ("actor/pg_loss", "actor/ppo_kl", "actor/pg_clipfrac"):
        assert metrics[name] == plain[name], name

    starts = range(0, len(ANSWERS), micro_batch)
    parts = [list(data["input_ids"].unbind())[i : i + micro_batch] for i in starts]
    answers = [own for part in parts for own in stored.drawn(torch.cat(part), micro_batch)]
    each = {"token-mean": stored.mean_length}.get(mode, 1.0)
    by_answer = mode == "seq-mean-token-mean"
    expected = alone(bench, answers, kl_type, by_answer, BETA / (len(ANSWERS) * each))
    same(ours - without, expected)


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_a_sum_over_the_width_of_a_mask_is_over_that_of_the_policys_own(
    bench: Bench, data: Any, stored: Stored, micro_batch: int
) -> None:
    """verl's ``agg_loss``: without a loss_scale_factor it divides by ``loss_mask.shape[-1]``."""
    short = Stored(tuple(a for a in stored.answers if len(a.answer) < 4), 1.0, stored.tokenizer)
    mode = "seq-mean-token-sum-norm"
    with beside(bench, short):
        ours, _ = bench.step(data, "js_as_loss", BETA, micro_batch, loss_agg_mode=mode)
        by_ten, _ = bench.step(
            data, "js_as_loss", BETA, micro_batch, loss_agg_mode=mode, loss_scale_factor=10
        )
    without, _ = bench.step(data, None, micro_batch=micro_batch, loss_agg_mode=mode)
    plain, _ = bench.step(
        data, None, micro_batch=micro_batch, loss_agg_mode=mode, loss_scale_factor=10
    )
    expected, tenth = torch.zeros_like(ours), torch.zeros_like(ours)
    for i in range(0, len(ANSWERS), micro_batch):
        beside_these = torch.cat(list(data["input_ids"].unbind())[i : i + micro_batch])
        answers = short.drawn(beside_these, micro_batch)
        each = alone(bench, answers, "js_as_loss", False, BETA / len(ANSWERS))
        expected += each / max(ANSWERS[i : i + micro_batch])
        tenth += each / 10
    same(ours - without, expected)
    same(by_ten - plain, tenth)


def test_micro_batches_of_unlike_size_as_at_the_end_of_an_epoch(
    bench: Bench, data: Any, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draws as many as it has itself, and each drawn answer counts alike."""
    drawn: list[list[Answer]] = []
    original = Stored.drawn

    def recorded(own: Stored, beside: Tensor, count: int) -> list[Answer]:
        drawn.append(original(own, beside, count))
        return drawn[-1]

    monkeypatch.setattr(Stored, "drawn", recorded)
    with beside(bench, stored):
        ours, _ = bench.step(data, "js_as_loss", BETA, dynamic=30)
    without, _ = bench.step(data, None, dynamic=30)
    answers = [own for part in drawn for own in part]
    assert len({len(part) for part in drawn}) > 1 and len(answers) == len(ANSWERS)
    scale = BETA / (len(ANSWERS) * stored.mean_length)
    same(ours - without, alone(bench, answers, "js_as_loss", False, scale))


def test_the_metrics_are_named_as_of_stored_answers(
    bench: Bench, data: Any, stored: Stored
) -> None:
    with beside(bench, stored):
        _, metrics = bench.step(data, "forward_as_loss", BETA, micro_batch=4)
        _, again = bench.step(data, "forward_as_loss", 2 * BETA, micro_batch=4)
    assert metrics["klplug/active"] == 1 and metrics["klplug/source/forward_kl"] > 0
    assert metrics["kl_loss"] == again["kl_loss"] > 0 and again["kl_coef"] == 2 * BETA
    assert not {"klplug/kl", "klplug/k1", "klplug/k3", "klplug/ess"} & set(metrics)
    assert not [name for name in metrics if "stored_sum" in name or "stored_max" in name]


def test_the_controllers_coefficient_reaches_it(bench: Bench, data: Any, stored: Stored) -> None:
    from klplug_verl.keys import COEF_KEY

    with beside(bench, stored):
        one, _ = bench.step(data, "js_as_loss", 2 * BETA)
        other, metrics = bench.step(data, "js_as_loss", BETA, meta={COEF_KEY: 2 * BETA})
    same(one, other, rtol=1e-6)
    assert metrics["kl_coef"] == 2 * BETA


def test_without_the_stored_answers_a_process_stops(bench: Bench, data: Any) -> None:
    """One in which the engine was not reached has no reference's log-probs either."""
    alone = data.clone()
    del alone["ref_log_prob"]
    with pytest.raises(ValueError, match="needs ref_log_probs, which is missing"):
        bench.step(alone, "js_as_loss", BETA)


@pytest.mark.slow
@pytest.mark.parametrize(("ulysses", "micro_batch"), [((), 4), (("2",), 8)], ids=["data", "packed"])
def test_two_ranks_give_the_gradient_of_one(
    bench: Bench,
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ulysses: tuple[str, ...],
    micro_batch: int,
) -> None:
    """Processes: each rank draws beside its own half, and those of one packed row draw alike."""
    path = written(tmp_path / "own.jsonl", rows(vocabulary=280))
    monkeypatch.setenv("KLPLUG_TEST_SOURCE", str(path))
    case = {"kl_loss_type": "js_as_loss", "coef": BETA}
    _, found = on_two_ranks("tests.verl.rank", tmp_path, json.dumps([case]), *ulysses)
    with beside(bench, Stored.read(str(path))):
        whole, metrics = bench.step(data, micro_batch=micro_batch, **case)
    same(found[0], whole)
    assert (whole - bench.step(data, None)[0]).norm() > 1e-3 * whole.norm()  # ten tolerances
    for name in ("klplug/source/forward_kl", "klplug/source/weight_mean", "kl_loss"):
        assert found[1][name] == pytest.approx(metrics[name], rel=1e-3), name


# ── Before the run ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("fitting") / "own.jsonl", rows(policys_digest()))


def asked(source: Path | str, *overrides: str) -> Any:
    made = config(
        *("+klplug.kl_type=js_as_loss", "+klplug.kl_coef=0.1", f"+klplug.source={source}"),
        *(
            f"actor_rollout_ref.model.path={POLICY}",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        ),
        *("actor_rollout_ref.rollout.n=2", *overrides),
    )
    return made, derive(made, {})


def test_a_run_loads_no_reference_and_says_whose_answers(
    fitting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fitting.parent)
    made, line = asked(fitting.name)
    assert line is not None and f"kl_coef=0.1 source={fitting}; sets" in line
    plan = Plan.of(made)
    assert plan is not None and plan.source == str(fitting) and not plan.needs_reference
    assert made.actor_rollout_ref.actor.use_kl_loss is True
    assert need_reference_policy(lambda config: True, None, (made,), {}) is False
    # What a worker sees is enough for it.
    node = WORKERS_SOURCE.partition(".")[2]
    engine = SimpleNamespace()
    worker = SimpleNamespace(
        config=made.actor_rollout_ref, role="actor_rollout", actor=SimpleNamespace(engine=engine)
    )
    assert made.actor_rollout_ref[node] == str(fitting)
    module.connect(worker)
    assert engine.klplug_stored == Stored.read(str(fitting))


@pytest.mark.parametrize(
    ("made", "overrides", "words"),
    [
        ({"digest": "other"}, (), "the token ids of another tokenizer"),
        ({}, ("actor_rollout_ref.rollout.temperature=0.7",), "samples at 0.7"),
        ({"count": 3}, (), "has 3 answers, and an update draws 4"),
        ({"vocabulary": 10**6}, (), r"line 1: the policy .* has no token id .* are below 465"),
    ],
    ids=["tokenizer", "temperature", "too few", "token id"],
)
def test_what_the_policy_cannot_be_compared_with_is_refused_before_the_run(
    made: dict[str, Any], overrides: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "own.jsonl", rows(**{"digest": policys_digest(), **made}))
    with pytest.raises(SettingsError, match=words):
        asked(path, *overrides)
