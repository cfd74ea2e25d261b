"""``klplug.source``: stored answers of the reference in OpenRLHF's real training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from klplug_openrlhf import launcher
from klplug_openrlhf.plan import Plan
from torch import Tensor

from klplug import stored_kl
from klplug.hosting.stored import Answer, Stored
from tests.openrlhf.command_line import change, settled
from tests.openrlhf.trainer import BATCH, VOCABULARY, Bench, tiny_model
from tests.ranks import on_two_ranks
from tests.references import POLICY
from tests.stored import policys_digest, rows, written

BETA = 10.0  # bfloat16's gradients: the KL's is not to be lost beside the policy loss's


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("source") / "own.jsonl", rows(vocabulary=VOCABULARY))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def bench(request: pytest.FixtureRequest, model: Path, ops: None) -> Bench:
    return Bench(model, zero_stage=request.param)


def drawn(source: Path, experience: Any) -> tuple[Stored, list[Answer]]:
    stored = Stored.read(str(source))
    return stored, stored.drawn(experience.sequences, BATCH)


def log_probs(bench: Bench, own: Answer) -> Tensor:
    """Of one stored answer, without padding, (1, T)."""
    ids = torch.tensor([[*own.prompt, *own.answer]])
    mask = torch.ones(1, len(own.answer), dtype=torch.long)
    found: Tensor = bench.actor(ids, mask, attention_mask=torch.ones_like(ids))
    return found


def alone(bench: Bench, own: Answer, kl_type: str) -> Tensor:
    """The KL of one stored answer, token by token."""
    found = log_probs(bench, own)
    return stored_kl(kl_type, found, torch.tensor([own.log_probs]), torch.ones_like(found)).loss[0]


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() < 0.02 * other.norm())


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("kl_type", ["forward_as_loss", "js_as_loss,horizon=answer"])
def test_the_kl_acts_on_the_stored_answers_and_on_nothing_else(
    bench: Bench, source: Path, kl_type: str
) -> None:
    experience = bench.experience()
    ours = bench.step(experience, kl_type, BETA, source)
    without = bench.step(experience, "none")
    assert torch.equal(ours.at_log_probs, without.at_log_probs)
    for name in ("policy_loss", "ppo_kl", "ppo_clip_ratio"):
        assert torch.equal(torch.as_tensor(ours.metrics[name]), without.metrics[name]), name

    stored, answers = drawn(source, experience)
    tokens = sum(len(own.answer) for own in stored.answers) / len(stored.answers)
    kl = torch.stack([alone(bench, own, kl_type).sum() for own in answers]).sum()
    expected = bench.gradient(BETA * kl / (BATCH * tokens))
    assert close(ours.of_parameters - without.of_parameters, expected)
    assert float(ours.metrics["kl"]) == pytest.approx(
        float(kl.detach() / (BATCH * tokens)), rel=1e-2
    )


@pytest.mark.usefixtures("patched")
def test_a_mean_over_answers_and_an_answer_without_tokens(bench: Bench, source: Path) -> None:
    experience = bench.experience()
    experience.action_mask[1] = 0
    change(bench.args, "actor.loss_agg_mode", "seq-mean-token-mean")
    try:
        ours, without = (
            bench.step(experience, kl, BETA, of)
            for kl, of in (("js_as_loss", source), ("none", None))
        )
    finally:
        change(bench.args, "actor.loss_agg_mode", "token-mean")
    _, answers = drawn(source, experience)
    kept = [own for i, own in enumerate(answers) if i != 1]
    kl = torch.stack([alone(bench, own, "js_as_loss").mean() for own in kept]).mean()
    expected = bench.gradient(BETA * kl)
    assert close(ours.of_parameters - without.of_parameters, expected)


@pytest.mark.usefixtures("patched")
def test_the_metrics_are_of_all_stored_answers_and_named_so(
    bench: Bench, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Answer] = []
    original = Stored.drawn

    def recorded(own: Stored, beside: Tensor, count: int) -> list[Answer]:
        seen.extend(answers := original(own, beside, count))
        return answers

    monkeypatch.setattr(Stored, "drawn", recorded)
    experiences = [bench.experience(seed=seed) for seed in (0, 1)]
    status = bench.epoch(experiences, "forward_as_loss", BETA, source)
    assert len(seen) == 2 * BATCH
    assert status["klplug/active"] == 1 and status["klplug/source/forward_kl"] > 0
    assert not {"klplug/kl", "klplug/k1", "klplug/k3", "klplug/ess"} & set(status)
    ratios = [log_probs(bench, own)[0].detach() - torch.tensor(own.log_probs) for own in seen]
    weights = torch.cat(ratios).exp().clamp(max=10)  # the default cap
    assert status["klplug/source/weight_mean"] == pytest.approx(float(weights.mean()), rel=1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("patched", "ops")
def test_a_ring_of_two_ranks_draws_alike_and_gives_the_gradient_of_one(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes: each rank has half of a packed row, and both have the same answers."""
    monkeypatch.setenv("KLPLUG_TEST_SOURCE", str(source))
    given, found = on_two_ranks("tests.openrlhf.rank", tmp_path, str(model), "js_as_loss")
    packed = Bench(model, zero_stage=2, packing=True)
    experience = packed.experience()
    for name, value in given.items():
        setattr(experience, name, value)
    one, without = (
        packed.step(experience, kl, source=of)
        for kl, of in (("js_as_loss", source), ("none", None))
    )
    assert (found["of_parameters"] - one.of_parameters).norm() < 0.05 * one.of_parameters.norm()
    assert not close(without.of_parameters, one.of_parameters)
    name = "klplug/source/forward_kl"
    assert float(found["metrics"][name]) == pytest.approx(float(one.metrics[name]), rel=0.05)


# ── Before the run ──────────────────────────────────────────────────────────────────────────────


def run(source: Path | str, kl_type: str = "js_as_loss", *words: str) -> Any:
    flags = [
        *("--actor.model_name_or_path", str(POLICY), "--data.prompt_dataset", "hub/data"),
        *("--reward.remote_url", "reward.py", "--vllm.num_engines", "1"),
        *("--klplug.kl_type", kl_type, "--klplug.kl_coef", "0.1"),
        *("--klplug.source", str(source), *words),
    ]
    return settled(launcher.main, flags)[0]


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(
        tmp_path_factory.mktemp("fitting") / "own.jsonl", rows(policys_digest(), count=128)
    )


def test_a_run_loads_no_reference_and_says_whose_answers(
    fitting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(fitting.parent)
    args = run(fitting.name)
    assert f"kl_coef=0.1 source={fitting.name}; sets" in capsys.readouterr().out
    assert args.algo.kl.init_coef == 0 and args.algo.kl.use_loss is True
    plan = Plan.of(args)
    assert plan is not None and plan.source == str(fitting)  # wherever an actor runs
    assert not plan.needs_reference and [*plan.models()] == ["source"]


@pytest.mark.parametrize(
    ("made", "words", "told"),
    [
        ({"digest": "other"}, (), ["the token ids of another tokenizer than the policy"]),
        ({}, ("--rollout.temperature", "0.7"), ["sampled at temperature 1", "samples at 0.7"]),
        ({"count": 3}, (), ["has 3 answers, and an update draws 128"]),
        ({"vocabulary": 10**6}, (), ["line 1: the policy", "its ids are below 465"]),
    ],
    ids=["tokenizer", "temperature", "too few", "token id"],
)
def test_what_the_policy_cannot_be_compared_with_is_refused_before_the_run(
    made: dict[str, Any],
    words: tuple[str, ...],
    told: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = written(
        tmp_path / "own.jsonl", rows(**{"digest": policys_digest(), "count": 128, **made})
    )
    with pytest.raises(SystemExit):
        run(path, "js_as_loss", *words)
    error = capsys.readouterr().err
    assert error.startswith(f"klplug: error: klplug.source {path}") and error.count("\n") == 1
    for word in told:
        assert word in error


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("nowhere.jsonl")
    assert "klplug.source nowhere.jsonl can't be read: No such file" in capsys.readouterr().err
