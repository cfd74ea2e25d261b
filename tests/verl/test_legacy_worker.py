"""verl 0.7's own FSDP worker: its ``DataParallelPPOActor.update_policy``, on the shared tensors.

Collected where the installed verl has it; ``test_releases.py`` runs it on such a release.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from klplug_verl.actor import MAXIMA, SUMS
from klplug_verl.keys import COEF_KEY
from klplug_verl.settings import derive
from torch import Tensor, nn

from klplug import Tally, kl_term, parse
from klplug.hosting.settings import SettingsError
from klplug.watch import Watch
from tests.one_meaning import (
    AS_LOSS,
    BETA,
    CLIP_RANGE,
    DIVERGENCES,
    HEADS,
    TOLERANCE,
    batch,
    loss_gradient,
)
from tests.one_meaning import SUMS as SUMS_OF_TERMS
from tests.verl.engine import free_port
from tests.verl.tensors import MERGED, PROMPT, actor_config, tokens


class Policy(nn.Module):
    """A language model of two words, by the log-prob of the first at each position."""

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = nn.Parameter(log_probs)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        own = self.log_probs[input_ids[:, 0]]  # the row number, see `step`
        words = torch.stack([own, torch.log1p(-own.exp())], dim=-1)
        before, after = PROMPT - 1, 1  # position t holds the logits of token t + 1
        return SimpleNamespace(logits=nn.functional.pad(words, (0, 0, before, after)))


class Bench:
    """The real actor over that policy; its optimiser never steps."""

    def __init__(self, kl_loss_type: str | None, **actor: Any) -> None:
        from verl.workers.actor.dp_actor import DataParallelPPOActor

        given = batch()
        # What is masked must be inert, but it must be a log-prob.
        self.policy = Policy(torch.where(given.response_mask > 0, given.log_probs, -1.0))
        config = actor_config(
            kl_loss_type,
            BETA,
            **{"ppo_mini_batch_size": 4, "use_torch_compile": False, **actor},
        )
        object.__setattr__(config.fsdp_config, "dtype", "float32")
        optimizer = torch.optim.SGD(self.policy.parameters(), lr=0.0)
        self.actor = DataParallelPPOActor(config, self.policy, optimizer)
        self.actor._optimizer_step = self._record
        self.gradients: list[Tensor] = []

    def _record(self) -> Tensor:
        assert self.policy.log_probs.grad is not None
        self.gradients.append(self.policy.log_probs.grad.clone())
        return self.gradients[-1].norm()

    def step(self, advantages: Tensor | None = None, **meta: Any) -> tuple[Tensor, dict[str, Any]]:
        from verl import DataProto
        from verl.trainer.ppo.ray_trainer import reduce_metrics

        given = batch()
        own = {
            **tokens(given),
            "response_mask": given.response_mask,
            "old_log_probs": given.old_log_probs,
            "ref_log_prob": given.ref_log_probs,
            "rollout_log_probs": given.rollout_log_probs,
            "advantages": given.response_mask * 0 if advantages is None else advantages,
        }
        own["input_ids"] = torch.arange(4)[:, None].expand_as(own["input_ids"]).contiguous()
        data = DataProto.from_dict(tensors=own)
        data.meta_info.update(temperature=1.0, **meta)
        self.gradients.clear()
        metrics = self.actor.update_policy(data=data)
        return torch.stack(self.gradients).sum(0), reduce_metrics(metrics)


@pytest.fixture(scope="module", autouse=True)
def group() -> Any:
    address = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


SERVED = [
    *AS_LOSS,
    *(k for k in SUMS_OF_TERMS if "teacher" not in k),
    *(k for k in DIVERGENCES if "as_loss" in k and "posterior" not in k),
    *(kl_type for kl_type in HEADS if "clipped" in kl_type),
]


@pytest.mark.parametrize("kl_type", SERVED)
def test_the_gradient_is_the_shared_one(kl_type: str) -> None:
    low, high = CLIP_RANGE
    bench = Bench(str(parse(kl_type).placed("as_loss")), clip_ratio_low=low, clip_ratio_high=high)
    found, _ = bench.step()
    torch.testing.assert_close(found, loss_gradient(kl_type), rtol=10 * TOLERANCE, atol=1e-7)


@pytest.mark.parametrize(
    "kl_type",
    [
        "k2_as_loss,head=combined",
        "k2_as_loss,horizon=sequence,baseline=group",
        "k2_as_loss,reference=rollout",
        "js_as_loss,reference=posterior",
    ],
)
def test_what_only_the_engine_serves_is_refused_by_name(kl_type: str) -> None:
    from tests.verl.trainer import config, quoted, written

    given = (f"+klplug.kl_type={quoted(kl_type)}", "+klplug.kl_coef=1")
    made = config("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2", *given)
    made.actor_rollout_ref.model.path = "hub/model"
    with pytest.raises(SettingsError, match="use_legacy_worker_impl=disable"):
        derive(made, written(given))


def test_it_adds_to_the_policy_losss_gradient() -> None:
    own = batch().advantages
    found = Bench("k2_as_loss").step(own)[0] - Bench(None).step(own)[0]
    torch.testing.assert_close(found, loss_gradient("k2_as_loss"), rtol=1e-5, atol=1e-7)


def test_the_metrics_are_those_of_all_micro_batches() -> None:
    given = batch()
    term = kl_term(
        "k2_as_loss",
        given.log_probs,
        given.ref_log_probs,
        given.response_mask,
        old_log_probs=given.old_log_probs,
    )
    for cut in ({}, {"ppo_micro_batch_size_per_gpu": 1}, {"ppo_mini_batch_size": 2}):
        bench = Bench("k2_as_loss", **({"ppo_micro_batch_size_per_gpu": 2} | cut))
        _, metrics = bench.step()
        for name in MERGED:
            value = float(term.metrics[name])
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), (cut, name)
        assert not any(SUMS in name or MAXIMA in name for name in metrics)


def test_ranks_are_joined_as_sums() -> None:
    """The trainer reduces a list of one number per rank."""
    from klplug_verl.actor import numbers
    from verl.trainer.ppo.ray_trainer import reduce_metrics

    given = batch()

    def tally(rows: slice) -> Tally:
        tensors = (given.log_probs, given.ref_log_probs, given.response_mask)
        own = [tensor[rows] for tensor in tensors]
        return kl_term("k2_as_loss", *own, old_log_probs=given.old_log_probs[rows]).tally

    ranks = [numbers(tally(rows)) for rows in (slice(0, 1), slice(1, 4))]
    found = reduce_metrics({name: [rank[name] for rank in ranks] for name in ranks[0]})
    for name, value in tally(slice(0, 4)).metrics().items():
        if name in MERGED:
            assert found[name] == pytest.approx(float(value), rel=1e-6), name


def test_the_trainers_coefficient_comes_with_the_batch() -> None:
    bench = Bench("k2_as_loss")
    found, metrics = bench.step(**{COEF_KEY: 2 * BETA})
    torch.testing.assert_close(found, 2 * loss_gradient("k2_as_loss"), rtol=1e-5, atol=1e-7)
    assert metrics["actor/kl_coef"] == 2 * BETA
    assert bench.actor.config.kl_loss_coef == BETA


@pytest.mark.parametrize("name", ["k1", "k2", "low_var_kl", None])
def test_stock_names_keep_their_meaning_bit_for_bit(name: str | None) -> None:
    import klplug_verl

    ours, metrics = Bench(name).step(batch().advantages)
    klplug_verl.restore()
    try:
        theirs, their_metrics = Bench(name).step(batch().advantages)
    finally:
        klplug_verl.apply()
    assert torch.equal(ours, theirs)
    assert metrics.keys() == their_metrics.keys()


def test_a_worker_that_klplug_did_not_reach_stops(unpatched: None) -> None:
    with pytest.raises(NotImplementedError):
        Bench("k2_as_loss").step()


def test_a_kl_type_outside_of_that_worker_is_an_error() -> None:
    from verl.trainer.ppo import core_algos

    one = torch.zeros(1, 1)
    with pytest.raises(NotImplementedError, match=r"k2_as_loss.*outside of the worker"):
        core_algos.kl_penalty(one, one, "k2_as_loss")


def test_a_gradient_that_stays_away_from_the_principled_one_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from klplug_verl import actor
    from verl.trainer.ppo.ray_trainer import reduce_metrics

    monkeypatch.setattr(actor, "_WATCH", Watch())
    given = batch()
    away = kl_term(
        "k1_as_loss,ratio=none", given.log_probs, given.ref_log_probs, given.response_mask
    )
    for _ in range(50):
        reduce_metrics({name: [value] for name, value in actor.numbers(away.tally).items()})
    said = capsys.readouterr().out
    assert said.count("klplug/gradient_cosine is") == 1 and "for 20 steps" in said
