"""The loss side on the real thing: verl's TrainingWorker, FSDP2 over gloo, `ppo_loss`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from klplug_verl.actor import BASELINE, POSTERIOR, numbers
from klplug_verl.teacher import LOG_PROBS
from torch import Tensor

from klplug import Tally, aggregate, kl_term, policy_loss
from tests.one_meaning import STEPS
from tests.ranks import on_two_ranks
from tests.verl.engine import ANSWERS, Bench, nested
from tests.verl.tensors import MERGED


def same(one: Tensor, other: Tensor, rtol: float = 1e-5) -> None:
    assert one.norm() > 0
    assert (one - other).norm() <= rtol * one.norm()


# Parity with verl's own kl_penalty.


@pytest.mark.parametrize(
    ("kl_type", "stock"),
    [
        ("k1_as_loss,ratio=none", "kl"),
        ("k2_as_loss,ratio=none", "k2"),
        ("k2_as_loss,ratio=none", "k3+"),
        ("k2_as_loss,ratio=none", "low_var_kl+"),
        ("k3_as_loss,ratio=none", "k3"),
        ("abs_as_loss,ratio=none", "abs"),
    ],
)
def test_the_gradient_is_stock_verls(bench: Bench, data: Any, kl_type: str, stock: str) -> None:
    ours, metrics = bench.step(data, kl_type)
    theirs, their_metrics = bench.step(data, stock)
    without, _ = bench.step(data, None)
    same(ours, theirs)
    assert (ours - without).norm() > 0.01 * without.norm()
    if not stock.endswith("+"):  # there the value is another estimator's
        assert metrics["kl_loss"] == pytest.approx(their_metrics["kl_loss"], rel=1e-5)
    assert metrics["kl_coef"] == their_metrics["kl_coef"]
    assert metrics["actor/pg_loss"] == their_metrics["actor/pg_loss"]


def test_monitor_measures_what_a_kl_would_and_moves_nothing(bench: Bench, data: Any) -> None:
    monitored, metrics = bench.step(data, "monitor", coef=0.0)
    without, _ = bench.step(data, None)
    _, acting = bench.step(data, "k2_as_loss,ratio=none")
    assert torch.equal(monitored, without) and without.norm() > 0
    for name in ("kl", "k1", "k2", "k3", "abs"):
        assert metrics[f"klplug/{name}"] == acting[f"klplug/{name}"] != 0


def with_ref(data: Any, token: int, log_ratio: float, bench: Bench) -> Any:
    """All tokens at the reference but one of the first answer, ``log_ratio`` away from it."""
    changed = data.clone()
    current = bench._log_probs(data)
    current[0][token] -= log_ratio
    changed["ref_log_prob"] = nested(current)
    return changed


@pytest.mark.parametrize(("log_ratio", "is_clamped"), [(-2.6, False), (-2.7, True), (11.1, True)])
def test_where_verls_clamp_acts_its_k3_has_no_gradient_and_ours_has(
    bench: Bench, data: Any, log_ratio: float, is_clamped: bool
) -> None:
    drifted = with_ref(data, 1, log_ratio, bench)
    without, _ = bench.step(drifted, None)
    stock = bench.step(drifted, "k3")[0] - without
    ours = bench.step(drifted, "k3_as_loss,ratio=none")[0] - without
    if is_clamped:
        assert stock.norm() < 1e-4 * ours.norm()
    else:
        same(ours, stock, rtol=1e-4)


def test_stock_names_keep_their_meaning_bit_for_bit(bench: Bench, data: Any) -> None:
    import klplug_verl

    names = ("k1", "k2", "low_var_kl", "k3+", None)
    patched = [bench.step(data, name) for name in names]
    klplug_verl.restore()
    try:
        stock = [bench.step(data, name) for name in names]
        with pytest.raises(NotImplementedError):  # the tripwire of a process without klplug
            bench.step(data, "k2_as_loss")
    finally:
        klplug_verl.apply()
    for (ours, metrics), (theirs, their_metrics) in zip(patched, stock, strict=True):
        assert torch.equal(ours, theirs)
        assert metrics.keys() == their_metrics.keys()
        assert not any("klplug" in key for key in metrics)


# One global batch, however it is cut.

FORMS = ("k2_as_loss", "k3_as_loss,ratio=rollout", "k2_as_loss,horizon=sequence,cap=1.2")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def approximately(metrics: dict[str, Any], others: dict[str, Any]) -> None:
    keys = [key for key in metrics if key in MERGED or key == "kl_loss"]
    # Without a reference model there is no KL to ref.
    absent = {f"klplug/{name}" for name in ("kl", "k1", "k2", "k3", "abs")} - set(metrics)
    assert len(keys) == 1 + len(set(MERGED) - absent)
    for key in keys:
        # Padding to another width moves the model's log-probs by float32's last digits.
        assert others[key] == pytest.approx(metrics[key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("kl_type", FORMS)
@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
def test_the_cut_into_micro_batches_changes_nothing(
    bench: Bench, data: Any, kl_type: str, loss_agg_mode: str
) -> None:
    whole, metrics = bench.step(data, kl_type, loss_agg_mode=loss_agg_mode)
    for cut in ({"micro_batch": 4}, {"micro_batch": 2}, {"micro_batch": 1}, {"dynamic": 32}):
        found, own = bench.step(data, kl_type, loss_agg_mode=loss_agg_mode, **cut)
        same(whole, found, rtol=1e-4)
        approximately(metrics, own)


def of_the_core(bench: Bench, data: Any, kl_type: str, coef: float = 0.5) -> Tensor:
    """Gradient of all parameters, through the same engine, of the core's own policy loss."""
    names = ("ref_log_prob", "old_log_probs", "rollout_log_probs", "advantages", "response_mask")
    names = (*names, POSTERIOR, LOG_PROBS)
    padded = {name: data[name].to_padded_tensor(0.0) for name in (*names, BASELINE) if name in data}

    def loss(model_output: dict[str, Tensor], data: Any, dp_group: Any = None) -> Any:
        from verl.workers.utils.padding import no_padding_2_padding

        token_loss = policy_loss(
            kl_type,
            no_padding_2_padding(model_output["log_probs"], data),
            padded["ref_log_prob"],
            padded["response_mask"],
            old_log_probs=padded["old_log_probs"],
            rollout_log_probs=padded["rollout_log_probs"],
            posterior_log_probs=padded[POSTERIOR],
            teacher_log_probs=padded[LOG_PROBS],
            advantages=padded["advantages"],
            kl_coef=coef,
            return_baseline=padded.get(BASELINE),
        )
        return aggregate(token_loss, padded["response_mask"]), {}

    return bench.trained(loss, data)[0]


@pytest.mark.parametrize("kl_type", STEPS)
def test_each_option_trains_by_the_cores_gradient_however_the_batch_is_cut(
    bench: Bench, data: Any, kl_type: str
) -> None:
    given = data.clone()
    if "baseline" in kl_type:
        generator = torch.Generator().manual_seed(1)
        given[BASELINE] = nested([torch.randn(n, generator=generator) for n in ANSWERS])
    whole, metrics = bench.step(given, kl_type)
    same(of_the_core(bench, given, kl_type), whole, rtol=1e-4)
    found, own = bench.step(given, kl_type, micro_batch=2)
    same(whole, found, rtol=1e-4)
    approximately(metrics, own)
    plain, _ = bench.step(given, "k2_as_loss")
    assert (whole - plain).norm() > 1e-3 * plain.norm()


def test_the_papers_two_names_are_one_program(bench: Bench, data: Any) -> None:
    one, metrics = bench.step(data, "k1_in_reward,head=combined")
    other, own = bench.step(data, "k2_as_loss,head=combined,horizon=sequence")
    assert torch.equal(one, other)
    assert all(own[name] == metrics[name] for name in metrics if "klplug" in name)


def test_a_baseline_that_did_not_come_is_an_error(bench: Bench, data: Any) -> None:
    with pytest.raises(RuntimeError, match=r"baseline=batch.*klplug_return_baseline"):
        bench.step(data, "k2_as_loss,horizon=sequence,baseline=batch")


def test_two_ranks_give_the_gradient_of_one(bench: Bench, data: Any, tmp_path: Path) -> None:
    cases = [
        {"kl_loss_type": form, "loss_agg_mode": mode} for form in FORMS for mode in AGGREGATIONS
    ]
    cases.append({"kl_loss_type": FORMS[0], "micro_batch": 2})
    results = on_two_ranks("tests.verl.rank", tmp_path, json.dumps(cases))
    for case, (gradient, metrics) in zip(cases, results, strict=True):
        whole, whole_metrics = bench.step(data, **case)
        same(whole, gradient, rtol=1e-4)
        approximately(whole_metrics, metrics)


def test_packed_rows_cut_between_two_ranks_give_the_gradient_of_padded_ones(
    bench: Bench, data: Any, tmp_path: Path
) -> None:
    """verl's sequence parallelism (Ulysses): each rank has half of every packed row."""
    cases = [{"kl_loss_type": form} for form in FORMS]
    cases.append({"kl_loss_type": FORMS[0], "micro_batch": 2})
    results = on_two_ranks("tests.verl.rank", tmp_path, json.dumps(cases), "2")
    for case, (gradient, metrics) in zip(cases, results, strict=True):
        whole, whole_metrics = bench.step(data, **case)
        same(whole, gradient, rtol=1e-4)
        approximately(whole_metrics, metrics)


# What reaches the worker.


def test_the_trainers_coefficient_comes_with_the_batch(bench: Bench, data: Any) -> None:
    config, metrics = bench.step(data, "k2_as_loss", coef=0.2)
    batch, own = bench.step(data, "k2_as_loss", coef=9.0, meta={"klplug_kl_coef": 0.2})
    assert torch.equal(config, batch)
    assert own["kl_coef"] == metrics["kl_coef"] == pytest.approx(0.2)


def test_metrics_are_those_of_all_tokens(bench: Bench, data: Any) -> None:
    _, metrics = bench.step(data, "k2_as_loss", micro_batch=2)
    padded = {
        name: data[name].to_padded_tensor(0.0)
        for name in ("ref_log_prob", "old_log_probs", "response_mask")
    }
    current = nested(bench._log_probs(data)).to_padded_tensor(0.0)
    term = kl_term(
        "k2_as_loss",
        current,
        padded["ref_log_prob"],
        padded["response_mask"],
        old_log_probs=padded["old_log_probs"],
    )
    assert int(padded["response_mask"].sum()) == sum(ANSWERS)
    for name in MERGED:
        value = float(term.metrics[name])
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    "cut",
    [{"micro_batch": 4}, {"micro_batch": 1}, {"dynamic": 24}],
    ids=["one micro-batch", "four", "dynamic"],
)
def test_metrics_merge_exactly_over_mini_batches_and_epochs(
    bench: Bench, data: Any, cut: dict[str, Any]
) -> None:
    """Two mini-batches of 18 and 19 tokens: a mean of their means would be another number."""
    from verl.utils import tensordict_utils as tu

    kl_type = "k2_as_loss,level=sequence,cap=3,bound=0.4"
    _, whole = bench.step(data, kl_type)
    half = {"mini_batch_size": 4}
    halves = [bench.step(d, kl_type, meta=half)[1] for d in tu.chunk_tensordict(data, 2)]
    mean = sum(own["klplug/ess"] for own in halves) / 2
    assert mean != pytest.approx(whole["klplug/ess"], rel=0.01)  # so it is no mean of shares
    for epochs in (1, 2):
        meta = {"mini_batch_size": 4, "epochs": epochs}
        _, metrics = bench.step(data, kl_type, meta=meta, **cut)
        assert len(bench.gradients) == 2 * epochs
        for name in MERGED:
            assert metrics[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), name


def test_no_sum_is_named_for_an_extremum() -> None:
    """verl takes the min or max over ranks of what has one of the words in its name."""
    from verl.utils.metric import reduce_metrics

    names = ("a-terminal/tokens", "max_mm_m/k1", "m", "_m_m__minmax")
    tally = Tally({n: torch.tensor(float(i)) for i, n in enumerate(names)}, {})
    sent = numbers(tally)
    assert not any(word in key for key in sent for word in ("min", "max"))
    assert len(sent) == len(names)
    given = torch.rand(2, 1, 5, generator=torch.Generator().manual_seed(0)).log()
    term = "k2_as_loss,weight=mask:terminal"
    ranks = []
    for share in given:
        weights = {"mask:terminal": torch.rand(1, 5)}
        ones = torch.ones(1, 5)
        own = kl_term(
            f"{term}+k3_as_loss",
            share,
            share - 0.3 * ones.cumsum(-1),
            ones,
            old_log_probs=share,
            sample_weights=weights,
        )
        ranks.append(own.tally)
    expected = Tally.merged(ranks).metrics()
    found = reduce_metrics(
        {f"actor/{key}": [numbers(own)[key] for own in ranks] for key in numbers(ranks[0])}
    )
    for name in ("kl", "coef_mean", "sample_weight_mean", "weight_mean"):
        key = f"klplug/k2_as_loss.weight-mask-terminal/{name}"
        assert found[key] == pytest.approx(float(expected[key]), rel=1e-5)


def test_a_missing_tensor_is_named(bench: Bench, data: Any) -> None:
    with pytest.raises(ValueError, match="rollout_log_probs"):
        bench.step(data.exclude("rollout_log_probs"), "k2_as_loss,ratio=rollout")


def test_a_kl_in_the_reward_is_refused_in_the_losss_key(bench: Bench, data: Any) -> None:
    with pytest.raises(ValueError, match="end in _as_loss"):
        bench.step(data, "k1_in_reward")


def test_rejected_tokens_reach_nothing(bench: Bench, data: Any) -> None:
    rejected = data.clone()
    masks = [torch.ones(n) for n in ANSWERS]
    masks[0][1:] = 0
    masks[3][:] = 0
    rejected["response_mask"] = nested(masks)
    poisoned = rejected.clone()
    refs = [row.clone() for row in data["ref_log_prob"].unbind()]
    refs[0][1:] = float("nan")
    refs[3][:] = float("inf")
    poisoned["ref_log_prob"] = nested(refs)
    clean, metrics = bench.step(rejected, "k2_as_loss,horizon=sequence")
    found, own = bench.step(poisoned, "k2_as_loss,horizon=sequence")
    assert torch.equal(clean, found)
    approximately(metrics, own)


def test_distillation_keeps_its_own_kl(bench: Bench) -> None:
    """verl's distillation losses share ``kl_penalty``, which klplug leaves as it is."""
    import klplug_verl
    from verl.trainer.distillation import losses as distillation
    from verl.trainer.ppo import core_algos

    assert distillation.kl_penalty is core_algos.kl_penalty
    assert not hasattr(core_algos.kl_penalty, "__klplug__")
    log_probs, teacher = torch.randn(2, 5), torch.randn(2, 5)
    patched = [distillation.kl_penalty(log_probs, teacher, k) for k in ("k1", "k2", "k3", "k3+")]
    klplug_verl.restore()
    try:
        stock = [distillation.kl_penalty(log_probs, teacher, k) for k in ("k1", "k2", "k3", "k3+")]
    finally:
        klplug_verl.apply()
    assert all(torch.equal(a, b) for a, b in zip(patched, stock, strict=True))
    assert hasattr(distillation.ppo_loss, "__klplug__")  # its task rewards' KL is klplug's
