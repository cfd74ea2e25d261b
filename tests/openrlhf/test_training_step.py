"""The loss side on the real thing: ActorPPOTrainer.training_step on DeepSpeed, ZeRO-2 and -3."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from klplug import aggregate, kl_term, policy_loss
from tests.one_meaning import STEPS
from tests.openrlhf.command_line import change
from tests.openrlhf.trainer import BATCH, Bench, Recorded, carried, tiny_model
from tests.ranks import on_two_ranks

pytestmark = pytest.mark.usefixtures("ops", "patched")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def bench(request: pytest.FixtureRequest, model: Path) -> Bench:
    return Bench(model, zero_stage=request.param)


def assert_same(one: Recorded, other: Recorded) -> None:
    assert one.at_log_probs.abs().max() > 0
    torch.testing.assert_close(one.at_log_probs, other.at_log_probs, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(one.of_parameters, other.of_parameters, rtol=1e-2, atol=1e-6)


def kl_part(bench: Bench, experience: Any, kl: str) -> Tensor:
    """Gradient at the log-probs of the KL alone."""
    return bench.step(experience, kl).at_log_probs - bench.step(experience, "none").at_log_probs


def expected(experience: Any, log_probs: Tensor, kl: str, coef: float = 0.1) -> Tensor:
    """Token mean of the core's own force."""
    term = kl_term(
        kl,
        log_probs,
        experience.base_action_log_probs,
        experience.action_mask,
        old_log_probs=experience.action_log_probs,
        rollout_log_probs=experience.rollout_log_probs,
    )
    return coef * term.weight * term.coefficient / experience.action_mask.sum()


@pytest.mark.parametrize(
    ("kl_type", "stock"),
    [
        ("k1_as_loss,ratio=none", "stock:k1"),
        ("k2_as_loss,ratio=none", "stock:k2"),
        ("k3_as_loss,ratio=none", "stock:k3"),
        ("k2_as_loss", "stock:unbiased"),
    ],
)
def test_parity_with_stock_where_its_clamps_do_not_act(
    bench: Bench, kl_type: str, stock: str
) -> None:
    experience = bench.experience()
    ours, theirs = bench.step(experience, kl_type), bench.step(experience, stock)
    assert_same(ours, theirs)
    without = bench.step(experience, "none")
    assert (ours.at_log_probs - without.at_log_probs).norm() > 0.01 * without.at_log_probs.norm()


def test_monitor_measures_what_a_kl_would_and_moves_nothing(bench: Bench) -> None:
    experience = bench.experience()
    monitored, without = bench.step(experience, "monitor"), bench.step(experience, "none")
    assert torch.equal(monitored.at_log_probs, without.at_log_probs)
    assert torch.equal(monitored.of_parameters, without.of_parameters)
    acting = bench.step(experience, "k2_as_loss,ratio=none")
    for name in ("kl", "k1", "k2", "k3", "abs"):
        measured = monitored.metrics[f"klplug/{name}"]
        assert measured == acting.metrics[f"klplug/{name}"] != 0
        assert f"klplug/{name}" not in without.metrics


@pytest.mark.parametrize("other", [0.5, -0.75])
def test_terms_in_the_reward_that_differ_in_their_baseline_have_acted_already(
    bench: Bench, other: float
) -> None:
    experience = bench.experience()
    both = bench.step(experience, f"0.75*k1_in_reward+{other}*k1_in_reward,baseline=group")
    one, without = bench.step(experience, "k1_in_reward"), bench.step(experience, "none")
    assert torch.equal(both.at_log_probs, without.at_log_probs)
    assert both.metrics["klplug/k1"] == one.metrics["klplug/k1"] != 0


@pytest.mark.parametrize(
    ("kl_type", "stock", "log_ratio"),
    [
        ("k2_as_loss,ratio=none", "stock:k2", 4.6),
        ("k1_as_loss,ratio=none", "stock:k1", -10.5),
        ("k3_as_loss,ratio=none", "stock:k3", -2.7),
    ],
)
def test_where_a_stock_clamp_acts_the_token_that_drifted_has_no_stock_gradient(
    bench: Bench, kl_type: str, stock: str, log_ratio: float
) -> None:
    experience = bench.experience(off_policy=0.0)
    row, column = 0, int(experience.action_mask[0].nonzero()[0])
    current = bench.log_probs(experience.sequences, experience.action_mask)
    experience.base_action_log_probs[row, column] = current[row, column] - log_ratio
    ours, theirs = kl_part(bench, experience, kl_type), kl_part(bench, experience, stock)
    assert theirs[row, column].abs() < 1e-8
    tokens = experience.action_mask.sum()
    force = {"k1": 1.0, "k2": log_ratio, "k3": 1 - math.exp(-log_ratio)}[kl_type[:2]]
    assert ours[row, column].item() == pytest.approx(0.1 * force / tokens.item(), rel=1e-3)
    ours[row, column] = theirs[row, column] = 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "kl_type",
    [
        "k1_as_loss",
        "k2_as_loss",
        "k3_as_loss",
        "k2_as_loss,ratio=rollout",
        "k2_as_loss,cap=1.05",
        "k2_as_loss,level=sequence,cap=none",
        "k2_as_loss,horizon=sequence",
        "k2_as_loss,bound=0.1",
    ],
)
def test_the_hosts_gradient_is_the_cores(bench: Bench, kl_type: str) -> None:
    experience = bench.experience()
    ours = kl_part(bench, experience, kl_type)
    log_probs = bench.step(experience, kl_type).log_probs
    torch.testing.assert_close(ours, expected(experience, log_probs, kl_type), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "kl_type",
    [
        *STEPS,
        "k3_as_loss,head=combined+js_as_loss",
        "k2_as_loss,head=clipped,horizon=sequence",
    ],
)
def test_the_whole_step_is_the_cores_policy_loss(bench: Bench, kl_type: str) -> None:
    """Under PPO's own ratio and clip, which act here."""
    experience = bench.experience(off_policy=0.3)
    if "baseline" in kl_type:
        generator = torch.Generator().manual_seed(1)
        experience.kl = torch.randn(experience.action_mask.shape, generator=generator)
    posterior = experience.base_action_log_probs - 0.1 * experience.action_mask
    teacher = experience.base_action_log_probs + 0.2 * experience.action_mask
    if "posterior" in kl_type or "teacher" in kl_type:
        experience.info |= carried(posterior, teacher, experience.action_mask)
    recorded = bench.step(experience, kl_type)
    log_probs = recorded.log_probs.clone().requires_grad_()
    loss = policy_loss(
        kl_type,
        log_probs,
        experience.base_action_log_probs,
        experience.action_mask,
        old_log_probs=experience.action_log_probs,
        rollout_log_probs=experience.rollout_log_probs,
        posterior_log_probs=posterior,
        teacher_log_probs=teacher,
        advantages=experience.advantages,
        kl_coef=0.1,
        clip_range=(0.2, 0.2),
        return_baseline=experience.kl,
    )
    aggregate(loss, experience.action_mask).backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(recorded.at_log_probs, log_probs.grad, rtol=1e-4, atol=1e-8)
    if "head=" in kl_type:
        assert 0 < recorded.metrics["klplug/capped_share"] < 1


def test_the_three_heads_are_one_on_policy(bench: Bench) -> None:
    experience = bench.experience(off_policy=0.0)
    separate = bench.step(experience, "k2_as_loss")
    for head in ("combined", "clipped"):
        assert_same(separate, bench.step(experience, f"k2_as_loss,head={head}"))
    other = bench.experience(off_policy=0.3)
    steps = [
        bench.step(other, f"k2_as_loss,head={h}").at_log_probs for h in ("combined", "clipped")
    ]
    assert (steps[0] - steps[1]).norm() > 0.01 * steps[0].norm()


def test_a_head_is_logged_as_a_kl_and_leaves_the_policy_losss_own_metrics(bench: Bench) -> None:
    experience = bench.experience()
    combined = bench.step(experience, "k2_as_loss,head=combined").metrics
    separate = bench.step(experience, "k2_as_loss").metrics
    for name in ("kl", "logprobs_diff", "ppo_kl", "klplug/k1", "klplug/k3"):
        assert combined[name] == pytest.approx(float(separate[name]), rel=1e-5), name


@pytest.mark.parametrize("kl_type", ["k1_in_reward", "k3_in_reward"])
def test_a_kl_in_the_reward_leaves_the_loss_alone(bench: Bench, kl_type: str) -> None:
    experience = bench.experience()
    one, other = bench.step(experience, kl_type), bench.step(experience, "none")
    torch.testing.assert_close(one.at_log_probs, other.at_log_probs, rtol=0, atol=0)
    assert one.metrics["klplug/active"] == 1
    assert one.metrics["kl"] != 0


def test_of_a_sum_only_the_loss_is_in_the_loss(bench: Bench) -> None:
    experience = bench.experience()
    both = kl_part(bench, experience, "k3_in_reward+k3_as_loss")
    torch.testing.assert_close(both, kl_part(bench, experience, "k3_as_loss"), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("aggregation", ["loss_agg_mode", "policy_loss_type"])
def test_the_kl_is_aggregated_as_the_policy_loss_is(bench: Bench, aggregation: str) -> None:
    value = {"loss_agg_mode": "seq-mean-token-mean", "policy_loss_type": "gspo"}[aggregation]
    before = getattr(bench.args.actor, aggregation)
    change(bench.args, f"actor.{aggregation}", value)
    try:
        experience = bench.experience()
        ours = kl_part(bench, experience, "k2_as_loss,ratio=none")
        theirs = kl_part(bench, experience, "stock:k2")
        log_probs = bench.step(experience, "none").log_probs
    finally:
        change(bench.args, f"actor.{aggregation}", before)
    mask = experience.action_mask
    force = 0.1 * (log_probs - experience.base_action_log_probs) * mask
    torch.testing.assert_close(
        ours, force / mask.sum(-1, keepdim=True) / BATCH, rtol=1e-3, atol=1e-7
    )
    torch.testing.assert_close(theirs, force / mask.sum(), rtol=1e-3, atol=1e-7)


def test_entropy_keeps_the_hosts_own_aggregation(bench: Bench) -> None:
    change(bench.args, "actor.loss_agg_mode", "seq-mean-token-mean")
    change(bench.args, "actor.entropy_coef", 0.01)
    try:
        experience = bench.experience()
        stock = bench.step(experience, "stock:k2").metrics["entropy_loss"]
        ours = bench.step(experience, "k2_as_loss").metrics["entropy_loss"]
    finally:
        change(bench.args, "actor.loss_agg_mode", "token-mean")
        change(bench.args, "actor.entropy_coef", None)
    assert ours == stock


def test_an_emptied_micro_batch_trains_on_nothing(bench: Bench) -> None:
    experience = bench.experience()
    experience.action_mask = torch.zeros_like(experience.action_mask)
    from openrlhf.utils import loss_utils

    info = loss_utils.get_loss_batch_info(bench.strategy, torch.ones(2, 3))
    original = loss_utils.get_loss_batch_info
    assert info["batch_num_tokens"] == 6
    import openrlhf.trainer.ray.ppo_actor as ppo_actor

    ppo_actor.get_loss_batch_info = lambda *args, **kwargs: info
    try:
        recorded = bench.step(experience, "k2_as_loss")
    finally:
        ppo_actor.get_loss_batch_info = original
    assert (recorded.at_log_probs == 0).all()
    assert all(
        math.isfinite(recorded.metrics[k]) for k in recorded.metrics if k.startswith("klplug/")
    )


def test_recording_for_the_kl_does_not_correct_the_policy_loss(bench: Bench) -> None:
    experience = bench.experience()
    plain = bench.step(experience, "none")
    change(bench.args, "algo.advantage.is_correction_level", "token")
    try:
        corrected = bench.step(experience, "none")
        make = bench.make

        def recording() -> Any:
            bench.args.klplug.records_for_kl = True
            return make()

        bench.make = recording
        recorded = bench.step(experience, "k2_as_loss,ratio=rollout")
        bench.make = make
    finally:
        change(bench.args, "algo.advantage.is_correction_level", "off")
    assert (corrected.at_log_probs - plain.at_log_probs).norm() > 0
    kl = expected(experience, recorded.log_probs, "k2_as_loss,ratio=rollout")
    torch.testing.assert_close(recorded.at_log_probs - plain.at_log_probs, kl, rtol=1e-3, atol=1e-7)


def test_without_rollout_log_probs_ratio_rollout_stops(bench: Bench) -> None:
    experience = bench.experience()
    rollout = experience.rollout_log_probs
    for absent in (None, rollout[:, :-1]):  # or of another length
        experience.rollout_log_probs = absent
        with pytest.raises(ValueError, match="rollout_log_probs"):
            bench.step(experience, "k2_as_loss,ratio=rollout")


@pytest.mark.parametrize(
    "kl_type",
    [
        "k1_in_reward",
        "k2_as_loss,horizon=sequence,baseline=group",
        "k2_as_loss,reference=rollout",
    ],
)
def test_experience_that_klplug_did_not_make_stops_what_acts_on_it(
    bench: Bench, kl_type: str
) -> None:
    experience = bench.experience()
    experience.info = {}
    with pytest.raises(RuntimeError, match="not active in the process that made this one"):
        bench.step(experience, kl_type)


def test_a_policy_loss_from_elsewhere_stops_a_combined_head(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openrlhf.models.loss import PolicyLoss

    monkeypatch.setattr(PolicyLoss, "forward", PolicyLoss.forward.__wrapped__)
    with pytest.raises(RuntimeError, match="belongs inside the policy loss"):
        bench.step(bench.experience(), "k2_as_loss,head=combined")


def test_use_loss_switched_off_behind_klplugs_back_stops(bench: Bench) -> None:
    change(bench.args, "algo.kl.use_loss", False)
    try:
        with pytest.raises(RuntimeError, match="computed no KL"):
            bench.step(bench.experience(), "k2_as_loss")
    finally:
        change(bench.args, "algo.kl.use_loss", True)


def test_a_kl_type_as_the_hosts_estimator_is_enough(bench: Bench) -> None:
    from tests.openrlhf import trainer

    experience = bench.experience()
    with_key = bench.step(experience, "k3_as_loss")
    configure = trainer.configure

    def without_key(args: Any, kl: str, *others: Any) -> None:
        configure(args, kl, *others)
        del args.klplug

    trainer.configure = without_key
    try:
        without = bench.step(experience, "k3_as_loss")
    finally:
        trainer.configure = configure
    torch.testing.assert_close(with_key.at_log_probs, without.at_log_probs, rtol=0, atol=0)


def test_an_unpatched_process_stops_at_the_first_kl(bench: Bench) -> None:
    import klplug_openrlhf

    klplug_openrlhf.restore()
    try:
        with pytest.raises(ValueError, match="k2_as_loss"):
            bench.step(bench.experience(), "k2_as_loss")
    finally:
        klplug_openrlhf.apply()


def test_metrics_of_a_step_of_micro_batches_are_exact(bench: Bench) -> None:
    """Through the host's own loop: uneven micro-batches, reduced as sums and maxima."""
    experiences = [bench.experience(seed=seed) for seed in (1, 2, 3)]
    experiences[1].action_mask[1:] = 0
    status = bench.epoch(experiences, "k3_as_loss,cap=1.05")

    forces, ratios, weights = [], [], []
    for experience in experiences:
        mask = experience.action_mask.bool()
        log_probs = bench.log_probs(experience.sequences, experience.action_mask)
        lr = (log_probs - experience.base_action_log_probs)[mask].double()
        ratios.append(lr)
        forces.append((1 - torch.exp(-lr)).abs())
        weights.append((log_probs - experience.action_log_probs)[mask].double().exp())
    lr, force, weight = torch.cat(ratios), torch.cat(forces), torch.cat(weights)
    capped = weight.clamp(max=1.05)
    for name, value in {
        "klplug/active": 1.0,
        "klplug/k1": lr.mean(),
        "klplug/k2": (lr**2 / 2).mean(),
        "klplug/coef_max": force.max(),
        "klplug/ess": capped.sum() ** 2 / (len(capped) * (capped**2).sum()),
        "klplug/capped_share": (weight > 1.05).double().mean(),
    }.items():
        assert status[name] == pytest.approx(float(value), rel=2e-3), name


def test_lora_trains_against_the_same_reference(model: Path) -> None:
    bench = Bench(model, zero_stage=2, lora_rank=4)
    experience = bench.experience()
    assert_same(bench.step(experience, "k2_as_loss,ratio=none"), bench.step(experience, "stock:k2"))


@pytest.mark.parametrize("kl", ["k2_as_loss", "k2_as_loss,horizon=sequence", "k3_as_loss"])
def test_packed_samples_have_the_kl_of_padded_ones(packed: Bench, bench: Bench, kl: str) -> None:
    """OpenRLHF packs rows for its model alone: klplug sees (B, T), each answer in its row."""
    experience = packed.experience()
    ends = experience.action_mask.shape[1] - experience.action_mask.flip(1).argmax(1)
    lengths = (ends + 1)[:, None]  # of the token that the last one predicts too
    experience.attention_mask = (torch.arange(experience.sequences.shape[1]) < lengths).long()
    found, padded = packed.step(experience, kl), bench.step(experience, kl)
    mask = experience.action_mask.bool()
    assert found.log_probs[mask].std() > 0.05  # other tokens, other log-probs
    # bfloat16, by two ways of attention.
    torch.testing.assert_close(found.log_probs[mask], padded.log_probs[mask], rtol=0, atol=0.05)
    alone = found.at_log_probs - packed.step(experience, "none").at_log_probs
    force = expected(experience, found.log_probs, kl)
    torch.testing.assert_close(alone, force, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def packed(model: Path) -> Bench:
    return Bench(model, zero_stage=2, packing=True)


def test_a_ring_of_two_ranks_gives_the_gradient_of_one(
    packed: Bench, model: Path, tmp_path: Path
) -> None:
    """Ring attention: each rank has half of the packed row, and log-probs of the whole."""
    kl_types = ["none", "k2_as_loss,horizon=sequence", "k2_as_loss"]
    given, steps, status = on_two_ranks("tests.openrlhf.rank", tmp_path, str(model), *kl_types)
    experience = packed.experience()
    for name, value in given.items():
        setattr(experience, name, value)
    mask = experience.action_mask.bool()
    without = steps[0]["at_log_probs"]
    for kl, found in zip(kl_types, steps, strict=True):
        one = packed.step(experience, kl)
        torch.testing.assert_close(  # bfloat16
            found["log_probs"][mask], one.log_probs[mask], rtol=0, atol=0.05
        )
        distance = (found["of_parameters"] - one.of_parameters).norm()
        assert distance < 0.05 * one.of_parameters.norm()
        if kl != "none":
            force = expected(experience, found["log_probs"], kl)
            alone = found["at_log_probs"] - without
            torch.testing.assert_close(alone, force, rtol=1e-4, atol=1e-7)
            assert found["metrics"]["klplug/k1"] == pytest.approx(
                float(one.metrics["klplug/k1"]), abs=0.02
            )
    # The second rank's reference is half a nat lower: of k2, c is the log-ratio.
    first = (steps[-1]["log_probs"] - experience.base_action_log_probs)[mask]
    both = torch.cat([first, first + 0.5])
    assert status["klplug/coef_max"] == pytest.approx(both.abs().max().item(), rel=1e-3)
    assert status["klplug/coef_mean"] == pytest.approx(both.abs().mean().item(), rel=1e-3)
    assert status["klplug/k1"] == pytest.approx(both.mean().item(), abs=1e-3)
