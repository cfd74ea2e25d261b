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


SAID = {
    "truncated-sampler": (own(BY_THE_SAMPLER, "--rollout.top_p", "0.9"), "--rollout.top_p 0.9"),
    "stale-samples": (own("k2_as_loss", "--train.async_enable"), "some updates old"),
    "extrapolation": (
        own("1.5*k2_as_loss+-0.5*k2_as_loss,reference=old"),
        "the policy at the start of the step: extrapolation, for",
    ),
    "short-horizon": (
        own("k2_as_loss", *ADAPTIVE, "--klplug.kl_horizon", "128"),
        "factor of e^0.4",
    ),
}
# Its own findings say these of stock runs too, and otherwise.
LAUNCH = {
    "whitened": own("k1_in_reward", "--algo.advantage.estimator", "reinforce"),
    "divided_by_length": own(
        "k2_as_loss,horizon=sequence", "--actor.loss_agg_mode", "seq-mean-token-mean"
    ),
    "dual_clip": own("k2_as_loss,head=combined", "--actor.dual_clip", "3"),
}
UNSAID = [
    own("k2_as_loss", "--rollout.top_p", "0.9"),
    own(BY_THE_SAMPLER, "--rollout.temperature", "0.7"),
    own(BY_THE_SAMPLER, "--train.async_enable"),
    own("k2_as_loss", *ADAPTIVE, "--klplug.kl_horizon", "256"),
    [*LAUNCH["whitened"], "--algo.advantage.no_std_norm"],
]


def notes(flags: list[str]) -> list[str]:
    """As the launcher says them."""
    _, line = derived(flags)
    return [said.removeprefix("klplug: note: ") for said in line.splitlines()[1:]]


@pytest.mark.parametrize("finding", SAID)
def test_the_launch_and_the_audit_say_the_same(finding: str) -> None:
    flags, word = SAID[finding]
    (said,) = notes(flags)
    assert word in said
    found = {f.id: f.message for f in audit([*MAIN, *flags]).findings}
    assert found[finding] == f"{said}."
    assert "klplug-refuses" not in found


@pytest.mark.parametrize("flags", UNSAID)
def test_nothing_is_said_where_there_is_nothing_to_say(flags: list[str]) -> None:
    assert notes(flags) == []
    assert not {*SAID} & {f.id for f in audit([*MAIN, *flags]).findings}


def test_every_row_is_among_them() -> None:
    cases = [*(flags for flags, _ in SAID.values()), *LAUNCH.values()]
    host = hosts()["openrlhf"]
    said = {note.id for flags in cases for note in host.noted(settings(flags), True)}
    assert said == {row.__name__ for row in ROWS}


def test_the_audit_says_a_short_horizon_of_openrlhfs_own_controller() -> None:
    stock = ["python", "-m", "openrlhf.cli.train_ppo_ray", *DEFAULTS, *ROLLOUT]
    adaptive = ["--algo.kl.init_coef", "0.1", "--algo.kl.target", "0.1", "--algo.kl.horizon"]
    found = [{f.id for f in audit([*stock, *adaptive, n]).findings} for n in ("51", "52")]
    assert "short-horizon" in found[0] and "short-horizon" not in found[1]
