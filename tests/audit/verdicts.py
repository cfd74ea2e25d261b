"""The verdict on each script in ``scripts``, worked out by hand from the host's source.

``python -m tests.audit.verdicts`` prints the table in ``docs/audit.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from klplug.audit import RULES

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Expected:
    gradient: str
    scope: str | None
    updates: float
    corrected: bool
    absolute: float | str | None
    relative: float | str | None
    kl_type: str
    findings: tuple[str, ...] = ()
    """Those of severity warning and error."""


_K3 = "k3_as_loss,ratio=none"
_K2 = "k2_as_loss,ratio=none"
_K1 = "k1_in_reward,reward_norm=group"

VERDICTS = {
    # verl: ppo_loss adds kl_loss_coef * agg_loss(kl_penalty(...)), with no ratio. Group std and the
    # mean with self (N = 5) are on the reward alone.
    "verl-grpo": Expected(
        "forward", "token", 4, False, 0.001, "0.00125 * sigma", _K3,
        ("forward-kl", "off-policy-uncorrected", "dead-zone"),
    ),
    # '+': value of k3, gradient of k2; 256/256 = one update, so no ratio is needed.
    "verl-grpo-straight-through": Expected(
        "reverse", "token", 1, False, 0.01, "0.0114286 * sigma", _K2
    ),
    # apply_kl_penalty comes before the group's mean and std, which act on both.
    "verl-grpo-reward": Expected(
        "reverse", "sequence", 2, True, "0.0046875 / sigma", 0.005, _K1, ("before-group-norm",)
    ),
    "verl-grpo-reward-k3": Expected(
        "neither", "sequence", 1, True, "0.000875 / sigma", 0.001,
        "k3_in_reward,reward_norm=group", ("k3-in-reward", "before-group-norm"),
    ),
    "verl-grpo-twice": Expected(
        "reverse", "sequence", 4, False, None, None, f"{_K1}+{_K2}",
        ("double-kl", "off-policy-uncorrected", "before-group-norm"),
    ),
    # The derivative of k1 is 1, whatever the reference; two epochs of 256/64.
    "verl-grpo-k1-loss": Expected(
        "zero", "token", 8, False, 0.001, "0.00133333 * sigma", "k1_as_loss,ratio=none",
        ("k1-as-loss", "length-bonus", "off-policy-uncorrected"),
    ),
    # No std, so against the raw reward only the mean with self is left: 0.01 * 8/7.
    "verl-dr-grpo": Expected(
        "reverse", "token", 4, False, 0.01, 0.01 * 8 / 7, _K2, ("off-policy-uncorrected",)
    ),
    # compute_gae_advantage_return whitens what the KL is part of.
    "verl-ppo": Expected("reverse", "sequence", 4, True, "0.001 / sigma_batch", 0.001, _K1),
    "verl-ppo-megatron": Expected(
        "reverse", "token", 4, False, 0.001, "0.001 * sigma_batch", _K2,
        ("off-policy-uncorrected",),
    ),
    # Leave-one-out of reward and KL together: unbiased for both.
    "verl-rloo": Expected("reverse", "sequence", 1, True, 0.001, 0.001, _K1),
    # k3 in the reward is reverse - forward, k3 as a loss is forward, and neither is rescaled.
    "verl-rloo-both-k3": Expected(
        "reverse", "sequence", 1, False, 0.01, 0.01, f"k3_in_reward,reward_norm=group+{_K3}",
        ("double-kl", "dead-zone"),
    ),
    "verl-reinforce-plus-plus": Expected(
        "reverse", "sequence", 1, True, "0.01 / sigma_batch", 0.01, _K1, ("discounted-kl",)
    ),
    "verl-reinforce-plus-plus-baseline": Expected(
        "reverse", "token", 1, False, 0.001, "0.00114286 * sigma_batch", _K2
    ),
    # Returns to go less the greedy answer's reward: no factor at all.
    "verl-remax": Expected("reverse", "sequence", 4, True, 0.001, 0.001, _K1),
    "verl-dapo": Expected("none", None, 16, False, 0.0, 0.0, "none"),
    # rollout_is_weights multiply pg_losses in the policy loss, and nothing in the KL loss.
    "verl-gspo": Expected(
        "forward", "token", 4, False, 0.001, "0.00114286 * sigma", _K3,
        ("forward-kl", "off-policy-uncorrected", "rollout-mismatch", "dead-zone"),
    ),
    "verl-gspo-reward": Expected(
        "reverse", "sequence", 4, False, "0.000875 / sigma", 0.001, _K1,
        ("gspo-ratio", "before-group-norm"),
    ),
    "verl-klplug": Expected(
        "reverse", "sequence", 4, True, 0.001, "0.00114286 * sigma", "k2_as_loss,horizon=sequence"
    ),
    # OpenRLHF: compute_approx_kl clamps at 10; 128 * 8 / 128 updates.
    "openrlhf-grpo-flat": Expected(
        "forward", "token", 8, False, 0.001, "0.00114286 * sigma", _K3,
        ("forward-kl", "off-policy-uncorrected", "dead-zone"),
    ),
    # unbiased_gradient: w * lr^2 / 2 behind, w = pi/old capped at 10, no clamp on it.
    "openrlhf-grpo": Expected(
        "reverse", "token", 4, True, 0.001, "0.00114286 * sigma", "k2_as_loss"
    ),
    "openrlhf-ppo": Expected(
        "reverse", "sequence", 8, True, "0.01 / sigma_batch", 0.01, "k1_in_reward"
    ),
    # compute_reward adds -beta * kl after the leave-one-out baseline.
    "openrlhf-rloo": Expected("reverse", "sequence", 1, True, 0.0001, 0.0001, "k1_in_reward"),
    "openrlhf-reinforce-baseline": Expected(
        "reverse", "token", 1, False, 1e-5, "1.14286e-05 * sigma_batch", _K2, ("dead-zone",)
    ),
    "openrlhf-reinforce": Expected(
        "reverse", "sequence", 2, True, "0.001 / sigma_batch", 0.001, "k1_in_reward",
        ("no-effect",),
    ),
    "openrlhf-dr-grpo-k2-reward": Expected(
        "neither", "sequence", 1, True, 0.01, 0.01 * 4 / 3, "k2_in_reward", ("k2-in-reward",)
    ),
    # PolicyLoss takes answers' means for gspo; aggregate_loss takes the token mean of the KL.
    "openrlhf-gspo": Expected(
        "forward", "token", 4, False, 0.001, "0.00114286 * sigma", _K3,
        ("forward-kl", "off-policy-uncorrected", "dead-zone", "normaliser-mismatch"),
    ),
    "openrlhf-dapo": Expected("none", None, 1, False, 0.0, 0.0, "none"),
    "openrlhf-klplug": Expected(
        "reverse", "sequence", 1, True, "0.001 / sigma_batch", 0.001, "k1_in_reward"
    ),
}  # fmt: skip


def markdown() -> str:
    """The table of verdicts, and that of findings."""
    lines = [
        "| script | gradient | scope | updates | corrected | beta in the update | beta against the "
        "raw reward | the same as a `kl_type` | findings |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, v in VERDICTS.items():
        found = ", ".join(f"[{f}](findings/{f}.md)" for f in v.findings)
        cells = (
            f"`{name}.sh`",
            v.gradient,
            v.scope or "",
            f"{v.updates:g}",
            "yes" if v.corrected else "no",
            _amount(v.absolute),
            _amount(v.relative),
            f"`{v.kl_type}`",
            found,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _amount(value: float | str | None) -> str:
    if value is None:
        return "one each"
    return f"{value:.4g}" if isinstance(value, float) else value


def findings_table() -> str:
    lines = ["| finding | severity | |", "| --- | --- | --- |"]
    for rule in sorted(
        RULES.values(), key=lambda r: ("error", "warning", "info").index(r.severity)
    ):
        lines.append(f"| [{rule.id}](findings/{rule.id}.md) | {rule.severity} | {rule.title} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), findings_table(), sep="\n\n")
