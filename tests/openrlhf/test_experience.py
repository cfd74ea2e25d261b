"""The reward side on the real thing: RemoteExperienceMaker, its models' answers given."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from klplug_openrlhf.keys import read
from klplug_openrlhf.teacher import Taught
from klplug_openrlhf.trainer import over_groups, over_rollout
from torch import Tensor

from klplug import AdaptiveKL, FixedKL, kl_return_baseline, kl_term, reward_to_go
from klplug.hosting.controller import MeasuredController
from tests.openrlhf.command_line import change
from tests.openrlhf.trainer import ANSWER, LENGTH, PROMPT, arguments, configure

pytestmark = pytest.mark.usefixtures("patched")

GROUPS, GROUP, BETA = 3, 4, 0.1


class Samples:
    """Two groups' worth of answers of uneven length, with the three policies' log-probs."""

    def __init__(self, seed: int = 0, spread: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = GROUPS * GROUP
        self.lengths = [int(n) for n in torch.randint(2, ANSWER, (count,), generator=generator)]
        self.policy = -2 * torch.rand(count, LENGTH - 1, generator=generator)
        noise = torch.randn(self.policy.shape, generator=generator)
        self.reference = self.policy + spread * noise
        self.rewards = torch.rand(count, generator=generator)

    def mask(self, i: int) -> Tensor:
        mask = torch.zeros(1, LENGTH - 1, dtype=torch.long)
        mask[0, PROMPT : PROMPT + self.lengths[i]] = 1
        return mask

    def experiences(self) -> list[Any]:
        from openrlhf.trainer.ppo_utils.experience import Experience

        return [
            Experience(
                sequences=torch.ones(1, LENGTH, dtype=torch.long),
                attention_mask=torch.ones(1, LENGTH, dtype=torch.long),
                action_mask=self.mask(i),
                rewards=self.rewards[i : i + 1].clone(),
                scores=self.rewards[i : i + 1].clone(),
                response_length=torch.tensor([self.lengths[i]]),
                truncated=torch.tensor([False]),
                total_length=torch.tensor([float(LENGTH)]),
                info={"reward": self.rewards[i : i + 1].clone()},
            )
            for i in range(len(self.lengths))
        ]


def maker(args: Any, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real maker; what its remote models would answer comes from ``samples``."""
    from openrlhf.trainer.ppo_utils import experience_maker

    kl_coef = read(args, "algo.kl.init_coef")
    made = experience_maker.RemoteExperienceMaker(
        actor_model_group="actor",
        critic_model_group=None,
        reward_model_group=None,
        initial_model_group="reference" if kl_coef > 0 else None,
        kl_controller=SimpleNamespace(value=kl_coef),
        strategy=SimpleNamespace(args=args),
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    monkeypatch.setattr(
        experience_maker,
        "ray",
        SimpleNamespace(put=lambda x: x, get=lambda refs: refs),
    )

    def cut(rows: Tensor, masks: list[Tensor]) -> list[Tensor]:
        parts = torch.split(rows, [len(mask) for mask in masks])
        return [part * mask for part, mask in zip(parts, masks, strict=True)]

    def forward(group: str, sync: bool, *, action_mask: list[Tensor], **_: Any) -> Any:
        out = cut(samples.policy if group == "actor" else samples.reference, action_mask)
        teacher = getattr(samples, "teacher", None)
        if group == "actor" or teacher is None:
            return [out]
        return [[Taught(*pair) for pair in zip(out, cut(teacher, action_mask), strict=True)]]

    monkeypatch.setattr(made, "_dispatch_forward", forward)
    return made


def advantages(
    kl: str, samples: Samples, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[Tensor, list[Any]]:
    """Per-token advantages of all answers, masked, and the experiences they are of."""
    args = arguments(**changes)
    configure(args, kl, BETA)
    if kl.startswith("stock:"):
        change(args, "algo.kl.use_loss", False)
    made = maker(args, samples, monkeypatch)
    experiences = made.make_experience_batch(samples.experiences())
    rows = [(e.advantages * e.action_mask).float() for e in experiences]
    return torch.cat(rows), experiences


@pytest.fixture(params=["group_norm", "dr_grpo", "rloo", "reinforce_baseline", "flash_reinforce"])
def estimator(request: pytest.FixtureRequest) -> str:
    return request.param


def test_k1_in_reward_equals_stock_k1(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"algo__advantage__estimator": estimator}
    samples = Samples()
    ours, _ = advantages("k1_in_reward", samples, monkeypatch, **changes)
    theirs, _ = advantages("stock:k1", samples, monkeypatch, **changes)
    without, _ = advantages("none", samples, monkeypatch, **changes)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert (ours - without).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_joined_after_normalisation_at_absolute_strength(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = Samples()
    ours, experiences = advantages(f"{name}_in_reward", samples, monkeypatch)
    without, _ = advantages("none", samples, monkeypatch)
    mask = torch.cat([e.action_mask for e in experiences])
    value = kl_term(f"{name}_in_reward", samples.policy, samples.reference, mask).coefficient
    torch.testing.assert_close(
        ours - without, -BETA * reward_to_go(value) * mask, rtol=1e-4, atol=1e-6
    )
    groups = samples.rewards.view(GROUPS, GROUP)
    assert (groups.std(-1) - 1).abs().min() > 0.1  # so that dividing by it would show


@pytest.mark.parametrize(("name", "log_ratio"), [("k1", 12.0), ("k2", 5.0), ("k3", -4.0)])
def test_where_a_stock_clamp_acts_the_reward_saturates(
    name: str, log_ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = Samples()
    samples.reference[0, PROMPT] = samples.policy[0, PROMPT] - log_ratio
    ours, _ = advantages(f"{name}_in_reward", samples, monkeypatch)
    theirs, _ = advantages(f"stock:{name}", samples, monkeypatch)
    value = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": math.exp(-log_ratio) - 1 + log_ratio}
    difference = (theirs - ours)[0, PROMPT].item()
    assert difference == pytest.approx(BETA * (value[name] - 10), rel=1e-4)
    ours[0, PROMPT] = theirs[0, PROMPT]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_of_a_sum_only_the_reward_is_in_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples()
    both, _ = advantages("k3_in_reward+k3_as_loss", samples, monkeypatch)
    one, _ = advantages("k3_in_reward", samples, monkeypatch)
    loss, experiences = advantages("k3_as_loss", samples, monkeypatch)
    without, _ = advantages("none", samples, monkeypatch)
    torch.testing.assert_close(both, one, rtol=0, atol=0)
    torch.testing.assert_close(loss, without, rtol=0, atol=0)
    assert all(e.base_action_log_probs is not None for e in experiences)
    assert all((e.info["klplug/active"] == 1).all() for e in experiences)


@pytest.mark.parametrize(
    "changes",
    [
        {"actor__loss_agg_mode": "seq-mean-token-mean"},
        {"actor__policy_loss_type": "gspo"},
    ],
    ids=["seq-mean", "gspo"],
)
def test_where_tokens_weigh_one_over_length_the_optimum_has_no_advantage(
    changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At pi* = ref exp(r/beta)/Z of every group, no answer may be pushed, long or short.

    A reward-to-go pushes there: that is the tilt to long answers.
    """
    samples = Samples(spread=0.2)
    for i, length in enumerate(samples.lengths):
        # log(pi/ref) of the whole answer = r/beta + a constant, spread unevenly over its tokens.
        span = slice(PROMPT, PROMPT + length)
        lr = samples.policy[i, span] - samples.reference[i, span]
        lr = lr + (samples.rewards[i] / BETA - 1.7 - lr.sum()) / length
        samples.reference[i, span] = samples.policy[i, span] - lr
    changes = {**changes, "algo__advantage__estimator": "rloo"}
    ours, experiences = advantages("k1_in_reward", samples, monkeypatch, **changes)
    assert ours.abs().max() < 1e-5
    theirs, _ = advantages("stock:k1", samples, monkeypatch, **changes)
    assert theirs.abs().max() > 0.1
    returns = torch.cat([e.returns * e.action_mask for e in experiences])
    assert returns.abs().max() < 1e-5
    _, without = advantages("none", samples, monkeypatch, **changes)
    logged, plain = (torch.cat([e.info["return"] for e in run]) for run in (experiences, without))
    mask = torch.cat([samples.mask(i) for i in range(GROUPS * GROUP)])
    kl = ((samples.policy - samples.reference) * mask).sum(-1)
    torch.testing.assert_close(logged, plain - BETA * kl)


def test_micro_batches_in_any_order_have_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic batching hands answers over in another order than they were sampled in."""
    kl = torch.tensor([1.0, 2.0, 3.0, 6.0, 0.0, 1.0, 2.0, 5.0])

    def micro(*index: int) -> SimpleNamespace:
        return SimpleNamespace(index=list(index), action_mask=torch.ones(len(index), 2).bool())

    plain = over_groups([kl[:4], kl[4:]], [micro(0, 1, 2, 3), micro(4, 5, 6, 7)], 4)
    order = [6, 0, 3, 5, 1, 7, 4, 2]
    mixed = over_groups([kl[order[:3]], kl[order[3:]]], [micro(*order[:3]), micro(*order[3:])], 4)
    assert torch.cat(plain)[0].item() == pytest.approx(1 - (2 + 3 + 6) / 3)
    torch.testing.assert_close(torch.cat(mixed), torch.cat(plain)[order])


def test_an_answer_without_tokens_is_nobodys_group(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([[True], [True], [False], [True]])
    rows = SimpleNamespace(index=[0, 1, 2, 3], action_mask=mask)
    (excess,) = over_groups([torch.tensor([1.0, 2.0, 0.0, 6.0])], [rows], 4)
    assert excess[0].item() == pytest.approx(1 - (2 + 6) / 2)


def test_micro_batches_of_other_widths_are_compared_place_by_place() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 4, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([[2], [3], [5], [4]])
    kl_type = "k2_as_loss,horizon=sequence,baseline=group"
    whole = kl_return_baseline(kl_type, policy * mask, reference * mask, mask, [0, 0, 0, 0])
    narrow, wide = (slice(0, 2), slice(0, 3)), (slice(2, 4), slice(0, 5))
    experiences = [
        SimpleNamespace(
            index=index,
            action_log_probs=(policy * mask)[place],
            base_action_log_probs=(reference * mask)[place],
            action_mask=mask[place],
        )
        for index, place in (([0, 1], narrow), ([2, 3], wide))
    ]
    args = arguments(rollout__n_samples_per_prompt=4)
    found = over_rollout(functools.partial(kl_return_baseline, kl_type), experiences, args)
    for part, place in zip(found, (narrow, wide), strict=True):
        torch.testing.assert_close(part, whole[place])


def test_the_controller_is_fed_an_unbiased_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples()
    args = arguments()
    configure(args, "k2_as_loss", BETA)
    made = maker(args, samples, monkeypatch)
    made.kl_ctl = MeasuredController(AdaptiveKL(BETA, target=0.1, horizon=100))
    experiences = made.make_experience_batch(samples.experiences())
    mask = torch.cat([e.action_mask for e in experiences]).bool()
    lr = (samples.policy - samples.reference)[mask].double()
    # k1 + b (w - 1), b fitted to the least variance where w is steady enough, else k1.
    w = torch.exp(-lr)
    steady = w.sum() ** 2 / (len(w) * (w**2).sum()) > 2 / 3 and w.mean() > 0.8
    b = -torch.cov(torch.stack([lr, w]))[0, 1] / w.var() if steady else 0.0
    k2, kl = (lr**2 / 2).mean().item(), (lr + b * (w - 1)).mean().item()
    assert made.kl_ctl.measured == pytest.approx(kl, rel=1e-4)
    assert abs(k2 - kl) > 1e-3
    # What OpenRLHF hands over, k2's value and a full batch's answers, is not what counts.
    made.kl_ctl.update(1e9, 10)
    error = min(max(kl / 0.1 - 1, -0.2), 0.2)
    assert made.kl_ctl.value == pytest.approx(BETA * math.exp(error * GROUPS * GROUP / 100))


@pytest.mark.parametrize(("spread", "said"), [(0.5, 1), (0.0, 0)])
def test_a_run_that_begins_away_from_its_reference_says_so(
    spread: float,
    said: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = Samples(spread=spread)
    args = arguments()
    configure(args, "k2_as_loss", BETA)
    made = maker(args, samples, monkeypatch)
    made.kl_ctl = MeasuredController(FixedKL(BETA))
    for _ in range(2):
        made.make_experience_batch(samples.experiences())
    assert (abs(made.kl_ctl.measured) > 0.02) is (said == 1)
    assert capsys.readouterr().out.count("before the first update the KL is") == said


def test_n_of_the_controller_counts_answers_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OpenRLHF hands over a full batch's, where a filter or the data's end left fewer."""
    samples = Samples()
    args = arguments()
    configure(args, "k2_as_loss", BETA)
    made = maker(args, samples, monkeypatch)
    made.kl_ctl = MeasuredController(AdaptiveKL(BETA, target=1e-6, horizon=100))
    rollouts = samples.experiences()
    rollouts[5].action_mask.zero_()
    made.make_experience_batch(rollouts)
    made.kl_ctl.update(0.0, 4096)
    assert made.kl_ctl.value == pytest.approx(BETA * math.exp(0.2 * (GROUPS * GROUP - 1) / 100))


@pytest.mark.parametrize("baseline", ["group", "batch"])
def test_a_baseline_travels_with_its_answers(
    baseline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the replay buffer, whose micro-batches cut groups and change the order."""
    from openrlhf.trainer.ppo_utils.replay_buffer import NaiveReplayBuffer

    kl_type = f"k2_as_loss,horizon=sequence,baseline={baseline}"
    samples = Samples()
    found, experiences = advantages(
        kl_type, samples, monkeypatch, rollout__micro_batch_size=GROUP - 1
    )
    without, _ = advantages("none", samples, monkeypatch)
    torch.testing.assert_close(found, without, rtol=0, atol=0)  # it is the loss that has it
    expected = kl_return_baseline(
        kl_type,
        samples.policy,
        samples.reference,
        torch.cat([samples.mask(i) for i in range(GROUPS * GROUP)]),
        [i // GROUP for i in range(GROUPS * GROUP)],
    )
    assert expected.abs().max() > 0.1
    buffer = NaiveReplayBuffer(sample_batch_size=5)
    for experience in experiences:
        buffer.append(experience)
    order = [7, 0, 10, 3, 4]
    batch = buffer.collate_fn([buffer[i] for i in order])
    torch.testing.assert_close(batch.kl, expected[order])


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_whole_answers_are_compared_with_their_group_once(
    aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the policy loss divides by length klplug does so anyway."""
    samples, changes = Samples(), {"actor__loss_agg_mode": aggregation}
    plain, _ = advantages("k1_in_reward", samples, monkeypatch, **changes)
    compared, _ = advantages("k1_in_reward,baseline=group", samples, monkeypatch, **changes)
    same = torch.allclose(plain, compared, rtol=1e-5, atol=1e-6)
    assert same == (aggregation == "seq-mean-token-mean")


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("other", [0.5, -0.25, -0.75])
def test_terms_that_differ_in_their_baseline_alone_add_up(
    other: float, aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, changes = Samples(), {"actor__loss_agg_mode": aggregation}
    baseline = "k1_in_reward,baseline=group"
    both = f"0.75*k1_in_reward+{other}*{baseline}"
    ours, plain, compared, without = (
        advantages(kl, samples, monkeypatch, **changes)[0]
        for kl in (both, "k1_in_reward", baseline, "none")
    )
    added_up = 0.75 * (plain - without) + other * (compared - without)
    torch.testing.assert_close(ours - without, added_up, rtol=1e-4, atol=1e-6)
    if aggregation == "token-mean":
        assert added_up.abs().max() > 1e-3


def test_the_sampler_as_reference_needs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples()
    args = arguments()
    configure(args, "k2_as_loss,reference=rollout", BETA)
    made = maker(args, samples, monkeypatch)
    assert made.initial_model_group is None
    made.kl_ctl = MeasuredController(FixedKL(BETA))
    rollouts = samples.experiences()
    for i, experience in enumerate(rollouts):
        experience.rollout_log_probs = samples.reference[i : i + 1] * experience.action_mask
    for experience in made.make_experience_batch(rollouts):
        torch.testing.assert_close(
            experience.base_action_log_probs, experience.rollout_log_probs, rtol=0, atol=0
        )
        assert (experience.info["klplug/active"] == 1).all()
    assert made.kl_ctl.measured is None and made.kl_ctl.value == BETA
