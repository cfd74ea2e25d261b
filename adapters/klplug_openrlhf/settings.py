"""From what a user wrote to what OpenRLHF must be told, or to one clear error."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import klplug
from klplug import KLSpec, parse
from klplug.host import Settings, SettingsError, is_local

STOCK_ESTIMATORS = ("k1", "k2", "k3")
GROUP_ESTIMATORS = ("group_norm", "dr_grpo", "rloo")
WHITENED_ESTIMATORS = ("gae", "reinforce", "reinforce_baseline")


@dataclass(frozen=True)
class Plan(Settings):
    """What the hooks do in a run, read from OpenRLHF's own ``args``, which reach every process."""

    records_for_kl: bool = False

    @classmethod
    def of(cls, args: Any) -> Plan | None:
        """The plan of a run, or ``None`` where nobody asked for klplug.

        A full ``kl_type`` as OpenRLHF's own estimator asks for it too, for code that drives the
        trainers itself.
        """
        own = getattr(args, "klplug", None)
        kl_type = getattr(own, "kl_type", None)
        if kl_type is None:
            kl_type = args.algo.kl.estimator
            if kl_type in STOCK_ESTIMATORS:
                return None
        spec = parse(kl_type)
        coef = getattr(own, "kl_coef", None)
        if coef is None and spec.estimator != "none":
            coef = args.algo.kl.init_coef
        actor = getattr(args, "actor", None)
        return cls(
            spec=spec,
            kl_coef=klplug.check_kl_coef(spec, coef),
            kl_ctrl=getattr(own, "kl_ctrl", None) or "fixed",
            kl_target=getattr(own, "kl_target", None),
            kl_horizon=getattr(own, "kl_horizon", None),
            records_for_kl=bool(getattr(own, "records_for_kl", False)),
            divides_by_length=getattr(actor, "loss_agg_mode", "token-mean") != "token-mean"
            or getattr(actor, "policy_loss_type", "ppo") == "gspo",
        )


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
        kl_ctrl=_get(args, "klplug.kl_ctrl"),
        kl_target=_get(args, "klplug.kl_target"),
        kl_horizon=_get(args, "klplug.kl_horizon"),
    )
    plan.controller()
    for flag, reason in _contradictions(spec, plan.kl_coef, written):
        raise SettingsError(f"--{flag} contradicts --klplug.kl_type {spec}: {reason}")
    _refuse_unserved(spec, args)
    check_files(args)

    active = spec.estimator != "none"
    rollout = "rollout_log_probs" in spec.requires
    records_for_kl = rollout and _get(args, "algo.advantage.is_correction_level") == "off"
    settings = {
        "algo.kl.use_loss": active,  # also keeps the reference's log-probs up to the update
        "algo.kl.init_coef": plan.kl_coef,
        "klplug.kl_type": str(spec),
        "klplug.kl_coef": plan.kl_coef if active else None,
        "klplug.records_for_kl": records_for_kl,
    }
    if active:
        # A process that klplug did not reach stops here: no stock estimator has such a name.
        settings["algo.kl.estimator"] = str(spec)
    if records_for_kl:
        # The only switch that makes OpenRLHF record rollout log-probs. It also corrects the policy
        # loss, which klplug turns off again where that loss is built.
        settings["algo.advantage.is_correction_level"] = "token"
    vars(args).update(settings)
    shown = {k: v for k, v in settings.items() if not k.startswith("klplug.")}
    text = ", ".join(f"--{k}={v}" for k, v in shown.items())
    coef_text = f" kl_coef={plan.kl_coef:g}" if active else ""
    line = f"klplug {klplug.__version__}: kl_type={spec}{coef_text}; sets {text}"
    estimator = _get(args, "algo.advantage.estimator")
    if spec.placed("in_reward").estimator != "none" and estimator in WHITENED_ESTIMATORS:
        line += (
            f"\nklplug: note: {estimator} whitens advantages after the KL has joined them, so its "
            "strength is kl_coef over their standard deviation in each batch"
        )
    return line


def _get(args: Namespace, name: str) -> Any:
    return vars(args).get(name)


def _kl(args: Namespace, written: Namespace) -> tuple[KLSpec, float | None]:
    kl_type = _get(args, "klplug.kl_type")
    estimator = _get(written, "algo.kl.estimator")
    if kl_type is None and estimator is not None and estimator not in STOCK_ESTIMATORS:
        kl_type = estimator
    if kl_type is None:
        raise SettingsError(
            "--klplug.kl_type is missing, as in --klplug.kl_type k2_as_loss --klplug.kl_coef 1e-3. "
            f"Known: {', '.join(klplug.kl_types())}. For OpenRLHF's own KL run "
            "python -m openrlhf.cli.train_ppo_ray"
        )
    coef = _get(args, "klplug.kl_coef")
    if coef is None:
        coef = _get(written, "algo.kl.init_coef")
    return parse(kl_type), coef


def _contradictions(spec: KLSpec, kl_coef: float, written: Namespace) -> Iterator[tuple[str, str]]:
    """Flags that the user wrote and ``kl_type`` decides; host defaults contradict nothing."""
    own = vars(written)
    as_loss = spec.placed("as_loss").estimator != "none"
    if own.get("algo.kl.use_loss") and not as_loss:
        yield "algo.kl.use_loss", f"{spec} puts no KL in the loss. Leave the flag out"
    estimator = own.get("algo.kl.estimator")
    if estimator is not None and not _agrees(estimator, spec):
        yield (
            f"algo.kl.estimator {estimator}",
            "two formulations are named. Leave the flag out",
        )
    if own.get("algo.kl.unbiased_gradient") and spec != parse("k2_as_loss"):
        yield (
            "algo.kl.unbiased_gradient",
            "it has the gradient of kl_type k2_as_loss. Leave the flag out, or choose that",
        )
    coef = own.get("algo.kl.init_coef")
    if coef is not None and coef != kl_coef:
        yield f"algo.kl.init_coef {coef:g}", f"--klplug.kl_coef is {kl_coef:g}. Leave one out"
    for flag, ours in (
        ("algo.kl.target", "--klplug.kl_ctrl adaptive --klplug.kl_target"),
        ("algo.kl.horizon", "--klplug.kl_horizon"),
    ):
        if flag in own:
            yield f"{flag} {own[flag]}", f"klplug has its own controller: write {ours}"


def _agrees(estimator: str, spec: KLSpec) -> bool:
    if estimator in STOCK_ESTIMATORS:
        return {term.estimator for term in spec.terms} == {estimator}
    return parse(estimator) == spec


def _refuse_unserved(spec: KLSpec, args: Namespace) -> None:
    in_reward = spec.placed("in_reward").estimator != "none"
    if any(term.reward_norm == "group" for term in spec.terms):
        raise SettingsError(
            f"kl_type {spec}: reward_norm=group is verl's own order, and OpenRLHF has none like "
            "it: its KL joins the advantages after group normalisation. Leave the option out"
        )
    estimator = _get(args, "algo.advantage.estimator")
    aggregation = _get(args, "actor.loss_agg_mode")
    by_length = aggregation != "token-mean" or _get(args, "actor.policy_loss_type") == "gspo"
    if in_reward and by_length and estimator not in GROUP_ESTIMATORS:
        raise SettingsError(
            f"kl_type {spec} with --algo.advantage.estimator {estimator} and a policy loss that "
            f"divides by the answer's length (--actor.loss_agg_mode {aggregation}, "
            f"--actor.policy_loss_type {_get(args, 'actor.policy_loss_type')}) would tilt the "
            "optimum to long answers, and there is no group to take a baseline from. Use "
            f"--actor.loss_agg_mode token-mean, one of {', '.join(GROUP_ESTIMATORS)}, or k2_as_loss"
        )
    if "rollout_log_probs" in spec.requires and not _get(args, "vllm.num_engines"):
        raise SettingsError(
            f"kl_type {spec} needs rollout log-probs, which OpenRLHF records with vLLM only: set "
            "--vllm.num_engines, or use ratio=old"
        )


def check_files(args: Namespace) -> None:
    """Local models and JSON-lines data that the command names must be there and have the keys."""
    for name in ("actor.model_name_or_path", "reward.model_name_or_path"):
        model = _get(args, name)
        if model and is_local(model) and not Path(model).expanduser().exists():
            raise SettingsError(f"--{name} {model}: there is no such path")
    keys = [_get(args, "data.input_key"), _get(args, "data.label_key")]
    for name in ("data.prompt_dataset", "eval.dataset"):
        for source in (_get(args, name) or "").split(","):
            path = Path(source.strip().partition("@")[0]).expanduser()
            if not source or not (is_local(source) or path.suffix in (".json", ".jsonl")):
                continue
            if not path.exists():
                raise SettingsError(f"--{name} {source}: there is no such path")
            if path.suffix == ".jsonl":
                _check_columns(name, path, [key for key in keys if key])


def _check_columns(flag: str, path: Path, keys: list[str]) -> None:
    with path.open(encoding="utf-8") as lines:
        line = lines.readline()
    if not line.strip():
        raise SettingsError(f"--{flag} {path}: the file is empty")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SettingsError(f"--{flag} {path}: line 1 is not JSON ({error})") from None
    for key in keys:
        if key not in row:
            raise SettingsError(
                f"--{flag} {path}: no column {key!r}; the file has {', '.join(row)}. "
                "Set --data.input_key and --data.label_key"
            )
