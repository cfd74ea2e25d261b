"""From what a user wrote to what OpenRLHF must be told, or to one clear error."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import klplug
from klplug import KLSpec, parse
from klplug.hosting.settings import SettingsError, is_local
from klplug_openrlhf.keys import flag, read, spelled
from klplug_openrlhf.plan import (
    RECORDERS,
    STOCK_ESTIMATORS,
    Plan,
    Recorder,
    dividing_by_length,
)

GROUP_ESTIMATORS = ("group_norm", "dr_grpo", "rloo")
WHITENED_ESTIMATORS = ("gae", "reinforce", "reinforce_baseline")


def derive(args: Namespace, written: Namespace) -> str:
    """Set OpenRLHF's switches on ``args`` from klplug's keys; the line that says what was set.

    Args:
        args: the parsed command line, dotted names, defaults filled in; changed in place.
        written: the same, holding only what the user wrote.

    Raises:
        ValueError: names what is wrong, the value, and what is allowed.
    """
    spec, coef = _kl(args, written)
    plan = Plan(
        spec=spec,
        kl_coef=klplug.check_kl_coef(spec, coef),
        kl_ctrl=read(args, "klplug.kl_ctrl"),
        kl_target=read(args, "klplug.kl_target"),
        kl_horizon=read(args, "klplug.kl_horizon"),
    )
    plan.controller()
    for option, value, reason in _contradictions(spec, plan.kl_coef, written):
        written_as = f"{flag(args, option)} {value}".strip()
        raise SettingsError(f"{written_as} contradicts --klplug.kl_type {spec}: {reason}")
    for reason in _unserved(plan, args):
        raise SettingsError(f"kl_type {spec}{reason}")
    check_files(args)

    active = plan.is_active
    recorder = _recorder(args)
    records_for_kl = (
        "rollout_log_probs" in spec.requires
        and recorder is not None
        and read(args, recorder.option) == recorder.off
    )
    settings = {
        "algo.kl.use_loss": active,  # also keeps the reference's log-probs up to the update
        # Above 0 it loads a reference model.
        "algo.kl.init_coef": plan.kl_coef if plan.needs_reference else 0.0,
        "klplug.kl_type": str(spec),
        "klplug.kl_coef": plan.kl_coef if active else None,
        "klplug.records_for_kl": records_for_kl,
    }
    if active:
        # A process that klplug did not reach stops here: no stock estimator has such a name.
        settings["algo.kl.estimator"] = str(spec)
    if recorder is not None and records_for_kl:
        settings[recorder.option] = recorder.on
    settings = {spelled(args, name) or name: value for name, value in settings.items()}
    vars(args).update(settings)
    shown = {k: v for k, v in settings.items() if not k.startswith("klplug.")}
    text = ", ".join(f"--{k}={v}" for k, v in shown.items())
    coef_text = f" kl_coef={plan.kl_coef:g}" if active else ""
    line = f"klplug {klplug.__version__}: kl_type={spec}{coef_text}; sets {text}"
    return "\nklplug: note: ".join([line, *_notes(plan, args)])


def _recorder(args: Namespace) -> Recorder | None:
    return next((r for r in RECORDERS if spelled(args, r.option)), None)


def _notes(plan: Plan, args: Namespace) -> Iterator[str]:
    """What is served, and may not be what was expected."""
    estimator = read(args, "algo.advantage.estimator")
    if plan.in_reward.terms and estimator in WHITENED_ESTIMATORS:
        yield (
            f"{estimator} whitens advantages after the KL has joined them, so its "
            "strength is kl_coef over their standard deviation in each batch"
        )
    dividing = ", ".join(dividing_by_length(args))
    if dividing and any(term.horizon == "sequence" for term in plan.as_loss.terms):
        yield (
            f"{dividing} divides by the answer's length, and the gradient of whole answers is "
            "exact for sums over tokens only: it is tilted to long answers"
        )
    if plan.combined.terms and read(args, "actor.dual_clip") is not None:
        yield (
            f"{flag(args, 'actor.dual_clip')} {read(args, 'actor.dual_clip'):g} clips the KL "
            "with the advantages that it is in"
        )


def _kl(args: Namespace, written: Namespace) -> tuple[KLSpec, float | None]:
    kl_type = read(args, "klplug.kl_type")
    estimator = read(written, "algo.kl.estimator")
    if kl_type is None and estimator is not None and estimator not in STOCK_ESTIMATORS:
        kl_type = estimator
    if kl_type is None:
        raise SettingsError(
            "--klplug.kl_type is missing, as in --klplug.kl_type k2_as_loss --klplug.kl_coef 1e-3. "
            f"Known: {', '.join(klplug.kl_types())}. For OpenRLHF's own KL run "
            "python -m openrlhf.cli.train_ppo_ray"
        )
    coef = read(args, "klplug.kl_coef")
    if coef is None:
        coef = read(written, "algo.kl.init_coef")
    return parse(kl_type), coef


def _contradictions(
    spec: KLSpec, kl_coef: float, written: Namespace
) -> Iterator[tuple[str, str, str]]:
    """Options that the user wrote and ``kl_type`` decides; host defaults contradict nothing.

    Each as its name, its value (empty for a switch), and the reason.
    """
    if read(written, "algo.kl.use_loss") and not spec.placed("as_loss").terms:
        yield "algo.kl.use_loss", "", f"{spec} puts no KL in the loss. Leave the flag out"
    estimator = read(written, "algo.kl.estimator")
    if estimator is not None and not _agrees(estimator, spec):
        yield "algo.kl.estimator", estimator, "two formulations are named. Leave the flag out"
    if read(written, "algo.kl.unbiased_gradient") and spec != parse("k2_as_loss"):
        yield (
            "algo.kl.unbiased_gradient",
            "",
            "it has the gradient of kl_type k2_as_loss. Leave the flag out, or choose that",
        )
    coef = read(written, "algo.kl.init_coef")
    if coef is not None and coef != kl_coef:
        yield "algo.kl.init_coef", f"{coef:g}", f"--klplug.kl_coef is {kl_coef:g}. Leave one out"
    for option, ours in (
        ("algo.kl.target", "--klplug.kl_ctrl adaptive --klplug.kl_target"),
        ("algo.kl.horizon", "--klplug.kl_horizon"),
    ):
        value = read(written, option)
        if value is not None:
            yield option, str(value), f"klplug has its own controller: write {ours}"


def _agrees(estimator: str, spec: KLSpec) -> bool:
    if estimator in STOCK_ESTIMATORS:
        return {term.estimator for term in spec.terms} == {estimator}
    return parse(estimator) == spec


def _unserved(plan: Plan, args: Namespace) -> Iterator[str]:
    """What OpenRLHF can't do, as the rest of a sentence that begins with the kl_type."""
    if any(term.reward_norm == "group" for term in plan.spec.terms):
        yield (
            ": reward_norm=group is verl's own order, and OpenRLHF has none like it: its KL joins "
            "the advantages after group normalisation. Leave the option out"
        )
    if "rollout_log_probs" in plan.spec.requires:
        instead = "ratio=old" if plan.needs_reference else "reference=ref"
        if _recorder(args) is None:
            yield f" needs rollout log-probs, which this OpenRLHF does not record: use {instead}"
        if not read(args, "vllm.num_engines"):
            yield (
                " needs rollout log-probs, which OpenRLHF records with vLLM only: set "
                f"{flag(args, 'vllm.num_engines')}, or use {instead}"
            )
    if plan.is_active and not plan.needs_reference and plan.kl_ctrl != "fixed":
        yield (
            f" with --klplug.kl_ctrl {plan.kl_ctrl}: the controller holds a KL that is measured at "
            "the start of a step, where the policy is the sampler itself. Use fixed"
        )
    loss = read(args, "actor.policy_loss_type", "ppo")
    head = next((t.head for t in plan.as_loss.terms if t.head != "separate"), None)
    if head is not None and loss != "ppo":
        yield (
            f" with {flag(args, 'actor.policy_loss_type')} {loss}: head={head} has the ratio and "
            f"clip of PPO's policy loss, one per token, and {loss} has others. Use ppo, or "
            "head=separate"
        )
    yield from _unserved_in_reward(plan, args)
    yield from _unserved_baselines(plan, args)


def _unserved_in_reward(plan: Plan, args: Namespace) -> Iterator[str]:
    name, estimator = flag(args, "algo.advantage.estimator"), read(args, "algo.advantage.estimator")
    dividing = ", ".join(dividing_by_length(args))
    if not plan.in_reward.terms:
        return
    if dividing and estimator not in GROUP_ESTIMATORS:
        yield (
            f" with {name} {estimator} and a policy loss that divides by the answer's length "
            f"({dividing}) would tilt the optimum to long answers, and there is no group to take "
            f"a baseline from. Leave that out, or use one of {', '.join(GROUP_ESTIMATORS)}, or "
            "k2_as_loss"
        )
    baseline = next((t.baseline for t in plan.in_reward.terms if t.baseline != "none"), None)
    if baseline is None:
        return
    if dividing and baseline == "batch":
        yield (
            f" with {dividing}: baseline=batch is refused, as whole answers are compared with "
            "the others of their group there already. Leave it out"
        )
    gamma = read(args, "algo.advantage.gamma")
    if estimator == "gae" or (estimator == "reinforce" and gamma != 1):
        discount = (
            "" if estimator == "gae" else f" and {flag(args, 'algo.advantage.gamma')} {gamma:g}"
        )
        yield (
            f" with {name} {estimator}{discount}: baseline={baseline} is a baseline on "
            "undiscounted returns. Leave it out, or use another estimator"
        )


def _unserved_baselines(plan: Plan, args: Namespace) -> Iterator[str]:
    baselines = [term for term in plan.spec.terms if term.baseline != "none"]
    size = read(args, "rollout.n_samples_per_prompt")
    if any(term.baseline == "group" for term in baselines) and size < 2:
        yield (
            f" with {flag(args, 'rollout.n_samples_per_prompt')} {size}: baseline=group compares "
            "an answer with the others to its prompt. Sample at least 2, or use baseline=batch"
        )
    if sum(term.placement == "as_loss" for term in baselines) > 1:
        yield ": OpenRLHF's samples carry one baseline. Leave it out of all terms but one"
    if any(term.reference == "rollout" for term in baselines):
        yield (
            ": baseline with reference=rollout is refused: it is measured at the start of a step, "
            "where the policy is the sampler itself. Leave it out"
        )


def check_files(args: Namespace) -> None:
    """Local models and JSON-lines data that the command names must be there and have the keys."""
    for name in ("actor.model_name_or_path", "reward.model_name_or_path"):
        model = read(args, name)
        if model and is_local(model) and not Path(model).expanduser().exists():
            raise SettingsError(f"{flag(args, name)} {model}: there is no such path")
    columns = {flag(args, name): read(args, name) for name in ("data.input_key", "data.label_key")}
    for name in ("data.prompt_dataset", "eval.dataset"):
        for source in (read(args, name) or "").split(","):
            path = Path(source.strip().partition("@")[0]).expanduser()
            if not source or not (is_local(source) or path.suffix in (".json", ".jsonl")):
                continue
            if not path.exists():
                raise SettingsError(f"{flag(args, name)} {source}: there is no such path")
            if path.suffix == ".jsonl":
                _check_columns(f"{flag(args, name)} {path}", path, columns)


def _check_columns(where: str, path: Path, columns: dict[str, str | None]) -> None:
    with path.open(encoding="utf-8") as lines:
        line = lines.readline()
    if not line.strip():
        raise SettingsError(f"{where}: the file is empty")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{where}: line 1 is not JSON ({error})") from None
    for key in columns.values():
        if key and key not in row:
            raise SettingsError(
                f"{where}: no column {key!r}; the file has {', '.join(row)}. "
                f"Set {' and '.join(columns)}"
            )
