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
from klplug_openrlhf.options import flag, read, spelled

STOCK_ESTIMATORS = ("k1", "k2", "k3")
GROUP_ESTIMATORS = ("group_norm", "dr_grpo", "rloo")
WHITENED_ESTIMATORS = ("gae", "reinforce", "reinforce_baseline")


@dataclass(frozen=True)
class Recorder:
    """The only switch by which a release records the sampler's log-probs.

    It also corrects the policy loss by them, which ``attribute`` of ``PolicyLoss`` turns off again.
    """

    option: str
    on: str | bool
    off: str | bool
    attribute: str


RECORDERS = (
    Recorder("algo.advantage.is_correction_level", "token", "off", "is_correction_level"),
    Recorder("algo.advantage.is_correction_enable", True, False, "enable_vllm_is_correction"),
)


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
        kl_type = read(args, "klplug.kl_type")
        if kl_type is None:
            kl_type = read(args, "algo.kl.estimator")
            if kl_type in STOCK_ESTIMATORS:
                return None
        spec = parse(kl_type)
        coef = read(args, "klplug.kl_coef")
        if coef is None and spec.estimator != "none":
            coef = read(args, "algo.kl.init_coef")
        return cls(
            spec=spec,
            kl_coef=klplug.check_kl_coef(spec, coef),
            kl_ctrl=read(args, "klplug.kl_ctrl") or "fixed",
            kl_target=read(args, "klplug.kl_target"),
            kl_horizon=read(args, "klplug.kl_horizon"),
            records_for_kl=bool(read(args, "klplug.records_for_kl")),
            divides_by_length=bool(_dividing_by_length(args)),
        )


def _dividing_by_length(args: Any) -> list[str]:
    """The settings, as written, by which the policy loss divides by the answer's length."""
    aggregation = read(args, "actor.loss_agg_mode", "token-mean")
    loss = read(args, "actor.policy_loss_type", "ppo")
    return [
        f"{flag(args, name)} {value}"
        for name, value, divides in (
            ("actor.loss_agg_mode", aggregation, aggregation != "token-mean"),
            ("actor.policy_loss_type", loss, loss == "gspo"),
        )
        if divides
    ]


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
    _refuse_unserved(spec, args)
    check_files(args)

    active = spec.estimator != "none"
    recorder = next(r for r in RECORDERS if spelled(args, r.option))
    rollout = "rollout_log_probs" in spec.requires
    records_for_kl = rollout and read(args, recorder.option) == recorder.off
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
        settings[recorder.option] = recorder.on
    settings = {spelled(args, name) or name: value for name, value in settings.items()}
    vars(args).update(settings)
    shown = {k: v for k, v in settings.items() if not k.startswith("klplug.")}
    text = ", ".join(f"--{k}={v}" for k, v in shown.items())
    coef_text = f" kl_coef={plan.kl_coef:g}" if active else ""
    line = f"klplug {klplug.__version__}: kl_type={spec}{coef_text}; sets {text}"
    estimator = read(args, "algo.advantage.estimator")
    if spec.placed("in_reward").estimator != "none" and estimator in WHITENED_ESTIMATORS:
        line += (
            f"\nklplug: note: {estimator} whitens advantages after the KL has joined them, so its "
            "strength is kl_coef over their standard deviation in each batch"
        )
    return line


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
    as_loss = spec.placed("as_loss").estimator != "none"
    if read(written, "algo.kl.use_loss") and not as_loss:
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


def _refuse_unserved(spec: KLSpec, args: Namespace) -> None:
    in_reward = spec.placed("in_reward").estimator != "none"
    if any(term.reward_norm == "group" for term in spec.terms):
        raise SettingsError(
            f"kl_type {spec}: reward_norm=group is verl's own order, and OpenRLHF has none like "
            "it: its KL joins the advantages after group normalisation. Leave the option out"
        )
    estimator = read(args, "algo.advantage.estimator")
    dividing = _dividing_by_length(args)
    if in_reward and dividing and estimator not in GROUP_ESTIMATORS:
        raise SettingsError(
            f"kl_type {spec} with {flag(args, 'algo.advantage.estimator')} {estimator} and a "
            f"policy loss that divides by the answer's length ({', '.join(dividing)}) would tilt "
            "the optimum to long answers, and there is no group to take a baseline from. Leave "
            f"that out, or use one of {', '.join(GROUP_ESTIMATORS)}, or k2_as_loss"
        )
    if "rollout_log_probs" in spec.requires and not read(args, "vllm.num_engines"):
        raise SettingsError(
            f"kl_type {spec} needs rollout log-probs, which OpenRLHF records with vLLM only: set "
            f"{flag(args, 'vllm.num_engines')}, or use ratio=old"
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
