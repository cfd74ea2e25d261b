"""The table of kl_types that README, documentation and command line read."""

from __future__ import annotations

from dataclasses import dataclass

from klplug.estimators import ESTIMATORS
from klplug.spec import PLACEMENTS, KLSpec, parse


@dataclass(frozen=True)
class KLType:
    """One row: what a ``kl_type`` computes and whose gradient that is.

    Attributes:
        name: canonical ``kl_type``, with its default options.
        formula: the estimate of KL(pi||ref), ``lr = log pi - log ref`` of a token, nats.
        coefficient: c, the number that multiplies ``grad log pi`` of the token.
        target: whose gradient the expectation is, on-policy, with tokens summed per answer.
        value_bias: bias of the estimate, under samples from pi.
        gradient_bias: bias of the gradient, as one of KL(pi||ref).
        off_policy: what becomes of the target on samples from an older policy.
        requires: tensors that ``kl_term`` needs.
        source: where it comes from.
    """

    name: str
    formula: str
    coefficient: str
    target: str
    value_bias: str
    gradient_bias: str
    off_policy: str
    requires: tuple[str, ...]
    source: str


def _row(spec: KLSpec) -> KLType:
    assert spec.estimator is not None and spec.placement is not None
    estimator = ESTIMATORS[spec.estimator]
    role = estimator.role(spec.placement)
    return KLType(
        name=str(spec),
        formula=estimator.formula,
        coefficient=role.formula,
        target=role.target,
        value_bias=estimator.value_bias,
        gradient_bias=role.gradient_bias,
        off_policy=role.off_policy,
        requires=spec.requires,
        source=estimator.source,
    )


_SEQUENCE = KLType(
    name="k2_as_loss,horizon=sequence",
    formula=ESTIMATORS["k2"].formula,
    coefficient="sum of later lr, weighted",
    target="FULL: grad KL(pi||ref) over whole answers",
    value_bias=ESTIMATORS["k2"].value_bias,
    gradient_bias="unbiased",
    off_policy="FULL too (per-decision prefix weights), exact below the cap",
    requires=parse("k2_as_loss,horizon=sequence").requires,
    source="klplug; per-decision weights: Precup et al. 2000",
)
_SUM = KLType(
    name="k3_in_reward+k3_as_loss",
    formula=f"2 ({ESTIMATORS['k3'].formula})",
    coefficient="lr (of one token)",
    target="FULL: grad KL(pi||ref) over whole answers",
    value_bias="twice KL(pi||ref): both terms count",
    gradient_bias="unbiased",
    off_policy="the parts' own",
    requires=parse("k3_in_reward+k3_as_loss").requires,
    source="klplug: the two biases cancel",
)
_NONE = KLType(
    name="none",
    formula="0",
    coefficient="0",
    target="zero: no KL, no reference model",
    value_bias="none",
    gradient_bias="none",
    off_policy="zero",
    requires=(),
    source="",
)


def kl_types() -> dict[str, KLType]:
    """Every registered ``kl_type`` by name, with formula, target gradient, bias and source.

    Options (``ratio``, ``level``, ``cap``, ``mode``, ``bound``) refine a row; the one that changes
    whose gradient it is, ``horizon=sequence``, and the one useful sum have rows of their own.
    """
    rows = [_row(KLSpec(e, p)) for e in ESTIMATORS for p in PLACEMENTS]
    rows += [_SEQUENCE, _SUM, _NONE]
    return {row.name: row for row in rows}


def markdown_table() -> str:
    """The table in README.md, as a test compares it."""
    lines = [
        "| `kl_type` | coefficient c | whose gradient, on-policy | bias as a gradient of "
        "KL(pi‖ref) | off-policy |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in kl_types().values():
        cells = (f"`{row.name}`", row.coefficient, row.target, row.gradient_bias, row.off_policy)
        lines.append(
            "| " + " | ".join(c.replace("||", "‖").replace("|lr|", "abs(lr)") for c in cells) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
