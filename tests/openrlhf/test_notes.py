"""What is said of a run that starts: the launch and the audit say it in the same words."""

from __future__ import annotations

import pytest
from klplug_openrlhf.notes import ROWS

from klplug.audit import audit
from klplug.hosting.host import hosts
from tests.openrlhf.test_refusals import DEFAULTS, MAIN, derived, settings

ADAPTIVE = ("--klplug.kl_ctrl", "adaptive", "--klplug.kl_target", "0.1")
ROLLOUT = ("--rollout.batch_size", "32", "--train.batch_size", "256")  # of 8 answers each
BY_THE_SAMPLER = "k2_as_loss,ratio=rollout"


def own(kl_type: str, *flags: str) -> list[str]:
    return [*DEFAULTS, *ROLLOUT, "--klplug.kl_type", kl_type, "--klplug.kl_coef", "0.1", *flags]


ASYNC = "--train.async_enable"
TWICE = ("--train.max_epochs", "2")
RESET = ("--klplug.ref_update", "reset:1")
CORRECTED = ("--algo.advantage.is_correction_level", "token")
# finding: what has it, with a word of it.
SAID = {
    "truncated-sampler": [
        (own(BY_THE_SAMPLER, "--rollout.top_p", "0.9"), "--rollout.top_p 0.9"),
        (own("k2_as_loss", "--rollout.top_p", "0.9", *ADAPTIVE), "kl_ctrl=adaptive with --rollout"),
    ],
    "stale-samples": [
        (own("k2_as_loss", ASYNC), "some updates old"),
        (own("k2_as_loss", ASYNC, *CORRECTED), "some updates old"),
        (own("k2_as_loss,head=combined", ASYNC), "some updates old"),
    ],
    "extrapolation": [
        (
            own("1.5*k2_as_loss+-0.5*k2_as_loss,reference=old", *TWICE),
            "the policy at the start of the step: extrapolation, for",
        ),
    ],
    "no-effect": [
        (own("k2_as_loss,reference=old"), "--train.batch_size 256 with 256 answers to a rollout"),
        (own("k2_as_loss,reference=old", "--rollout.batch_size", "8"), "with 64 answers"),
        (own("k2_as_loss+k2_as_loss,reference=old,head=combined"), "head=combined,reference=old: "),
        (own("k2_as_loss", *RESET), "starts from by klplug.ref_update=reset:1. So it is 0"),
    ],
    "short-horizon": [
        (own("k2_as_loss", *ADAPTIVE, "--klplug.kl_horizon", "128"), "factor of e^0.4"),
    ],
}
# Its own findings say these of stock runs too, and otherwise.
LAUNCH = {
    "whitened": own("k1_in_reward", "--algo.advantage.estimator", "reinforce"),
    "discounted": own(
        *("k1_in_reward", "--algo.advantage.estimator", "reinforce"),
        *("--algo.advantage.no_std_norm", "--algo.advantage.gamma", "0.9"),
    ),
    "divided_by_length": own(
        "k2_as_loss,horizon=sequence", "--actor.loss_agg_mode", "seq-mean-token-mean"
    ),
    "dual_clip": own("k2_as_loss,head=combined", "--actor.dual_clip", "3"),
    "unclipped_reward": own("k2_as_loss,reference=posterior", "--reward.clip_range", "0", "1"),
}
UNSAID = [
    own("k2_as_loss", "--rollout.top_p", "0.9"),
    own(BY_THE_SAMPLER, "--rollout.temperature", "0.7"),
    own(BY_THE_SAMPLER, ASYNC),
    own("k1_in_reward", ASYNC, *CORRECTED),
    own("k2_as_loss,head=combined", ASYNC, *CORRECTED),
    own("k2_as_loss", *ADAPTIVE, "--klplug.kl_horizon", "256"),
    [*LAUNCH["whitened"], "--algo.advantage.no_std_norm"],
    own("k2_as_loss,reference=old", *TWICE),
    own("k1_as_loss,reference=old"),  # noise, and not 0
    own("k2_as_loss,reference=old", "--train.batch_size", "128"),
    own("k2_as_loss", *RESET, *TWICE),
    own("k2_as_loss", "--klplug.ref_update", "reset:2"),
    own("k2_as_loss", "--klplug.ref_update", "ema:0.1"),
    own("k2_as_loss,reference=rollout"),
    own("k2_as_loss,reference=posterior"),
    own("k1_in_reward", "--reward.clip_range", "0", "1"),
    own("k1_in_reward", "--algo.advantage.gamma", "0.9"),  # which group_norm sets to 1
]


def notes(flags: list[str]) -> list[str]:
    """As the launcher says them."""
    _, line = derived(flags)
    return [said.removeprefix("klplug: note: ") for said in line.splitlines()[1:]]


@pytest.mark.parametrize(
    ("finding", "flags", "word"), [(f, *case) for f, cases in SAID.items() for case in cases]
)
def test_the_launch_and_the_audit_say_the_same(finding: str, flags: list[str], word: str) -> None:
    (said,) = notes(flags)
    assert word in said
    found = {f.id: f.message for f in audit([*MAIN, *flags]).findings}
    assert found[finding] == f"{said}."
    assert "klplug-refuses" not in found


def test_a_discount_of_a_kl_in_the_reward_is_said() -> None:
    (said,) = notes(LAUNCH["discounted"])
    assert said.startswith("--algo.advantage.gamma is 0.9: a token answers for the KL of later")


def test_a_reward_that_is_not_clipped_is_said() -> None:
    (said,) = notes(LAUNCH["unclipped_reward"])
    assert said.startswith("--reward.clip_range acts on the way to the advantages, which")


@pytest.mark.parametrize("flags", UNSAID)
def test_nothing_is_said_where_there_is_nothing_to_say(flags: list[str]) -> None:
    assert notes(flags) == []
    assert not {*SAID} & {f.id for f in audit([*MAIN, *flags]).findings}


def test_every_row_is_among_them() -> None:
    cases = [*(flags for cases in SAID.values() for flags, _ in cases), *LAUNCH.values()]
    host = hosts()["openrlhf"]
    said = {note.id for flags in cases for note in host.noted(settings(flags), True)}
    assert said == {row.__name__ for row in ROWS}


def test_stored_answers_are_no_rollouts() -> None:
    flags = own("js_as_loss", ASYNC, "--klplug.source", "own.jsonl")
    assert not list(hosts()["openrlhf"].noted(settings(flags), True))
    assert "stale-samples" not in {f.id for f in audit([*MAIN, *flags]).findings}


def test_what_is_in_the_policy_loss_has_its_correction() -> None:
    for head, corrected in (("combined", True), ("separate", False)):
        said = audit([*MAIN, *own(f"k2_as_loss,head={head}", *CORRECTED)])
        assert said.rollout_corrected is corrected
        assert ("rollout-mismatch" in {f.id for f in said.findings}) is not corrected


def test_the_audit_says_a_short_horizon_of_openrlhfs_own_controller() -> None:
    stock = ["python", "-m", "openrlhf.cli.train_ppo_ray", *DEFAULTS, *ROLLOUT]
    adaptive = ["--algo.kl.init_coef", "0.1", "--algo.kl.target", "0.1", "--algo.kl.horizon"]
    found = [{f.id for f in audit([*stock, *adaptive, n]).findings} for n in ("51", "52")]
    assert "short-horizon" in found[0] and "short-horizon" not in found[1]
