"""From what a user wrote to what verl must be told, or to one clear error."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import klplug
from klplug import KLSpec, parse
from klplug.hosting.settings import SettingsError, is_local
from klplug_verl.keys import (
    CTRL_COEF,
    KEYS,
    LOSS_COEF,
    LOSS_TYPE,
    PENALTY,
    RECORDS,
    STOCK,
    USE_LOSS,
    USE_REWARD,
    is_stock,
    read,
)
from klplug_verl.plan import Plan, divides_by_length

REWARD_ESTIMATORS = (
    "grpo",
    "grpo_vectorized",
    "grpo_passk",
    "rloo",
    "rloo_vectorized",
    "opo",
    "remax",
    "gpg",
)
"""Advantage estimators whose result a KL can be joined to: one number per answer. The others whiten
over the batch, bootstrap, or weigh each token."""


def derive(config: Any, written: Mapping[str, Any]) -> str | None:
    """Set verl's switches in ``config`` from klplug's keys; the line that says what was set.

    Done twice on the way, with the same result: by the command's own process before anything is
    shipped, and by the trainer, which others may have started.

    Args:
        config: verl's config, defaults filled in; changed in place.
        written: dotted key to value, only what the user wrote on the command line.

    Returns:
        ``None`` where nothing asks for klplug; the config is then as it was.

    Raises:
        ValueError: names what is wrong, the value, and what is allowed.
    """
    asked = _asked(config, written)
    if asked is None:
        return None
    spec = parse(asked["kl_type"])
    plan = Plan(
        spec=spec,
        kl_coef=klplug.check_kl_coef(spec, asked.get("kl_coef")),
        kl_ctrl=asked.get("kl_ctrl") or "fixed",
        kl_target=asked.get("kl_target"),
        kl_horizon=asked.get("kl_horizon"),
        divides_by_length=divides_by_length(config),
    )
    plan.controller()
    for key, reason in _contradictions(plan, written if "klplug" in config else {}):
        raise SettingsError(f"{key} contradicts kl_type {spec}: {reason}")
    _refuse_unserved(plan, config, written)
    check_files(config)

    as_loss, in_reward = spec.placed("as_loss"), spec.placed("in_reward")
    settings: dict[str, Any] = {
        USE_LOSS: bool(as_loss.terms),
        USE_REWARD: bool(in_reward.terms),
    }
    # The strings that travel. A process that klplug did not reach stops at them: verl's own
    # kl_penalty knows no such name.
    if settings[USE_LOSS]:
        settings |= {LOSS_TYPE: str(as_loss), LOSS_COEF: plan.kl_coef}
    if settings[USE_REWARD]:
        settings |= {PENALTY: str(in_reward), CTRL_COEF: plan.kl_coef}
    if "rollout_log_probs" in spec.requires:
        settings[RECORDS] = True
    _update(config, settings)
    own = {
        "kl_type": str(spec),
        "kl_coef": plan.kl_coef if spec.terms else None,
        "kl_ctrl": plan.kl_ctrl,
        "kl_target": plan.kl_target,
        "kl_horizon": plan.kl_horizon,
    }
    _update(config, {"klplug": {key: value for key, value in own.items() if value is not None}})
    text = ", ".join(f"{key}={value}" for key, value in settings.items())
    coef = f" kl_coef={plan.kl_coef:g}" if spec.terms else ""
    return f"klplug {klplug.__version__}: kl_type={spec}{coef}; sets {text}"


def _update(config: Any, settings: Mapping[str, Any]) -> None:
    from omegaconf import OmegaConf

    for key, value in settings.items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)


def _asked(config: Any, written: Mapping[str, Any]) -> dict[str, Any] | None:
    """klplug's own keys, as written or as they follow from a kl_type in verl's; or ``None``."""
    own = config.get("klplug") if hasattr(config, "get") else None
    if own is not None:
        return _own_keys(own, written)
    if read(config, "actor_rollout_ref.actor") is None or read(config, "algorithm") is None:
        return None
    loss, penalty = str(read(config, LOSS_TYPE)), str(read(config, PENALTY))
    given = {
        key: (_named(key, name), placement)
        for key, name, placement in (
            (LOSS_TYPE, loss, "as_loss"),
            (PENALTY, penalty, "in_reward"),
        )
        if not is_stock(name)
    }
    for key, (spec, placement) in given.items():
        if spec.placed(placement) != spec or not spec.terms:
            raise SettingsError(
                f"{key}={spec}: this key takes kl_types that end in _{placement}. "
                f"Write +klplug.kl_type={_quoted(spec)}, which goes where it belongs"
            )
    for key, switch, name in ((LOSS_TYPE, USE_LOSS, loss), (PENALTY, USE_REWARD, penalty)):
        if key in given and written.get(switch) is False:
            raise SettingsError(f"{switch}=False contradicts {key}={name}: leave one of them out")
    if not given:
        return None
    other = {LOSS_TYPE: USE_REWARD, PENALTY: USE_LOSS}
    if len(given) == 2 or any(read(config, other[key]) for key in given):
        both = f"{loss if LOSS_TYPE in given else 'k2_as_loss'}"
        both = f"{penalty if PENALTY in given else 'k1_in_reward'}+{both}"
        raise SettingsError(
            f"{LOSS_TYPE}={loss} and {PENALTY}={penalty} with both placements on: two KL terms at "
            f"once are to be said in one place, as in +klplug.kl_type={_quoted(both)}. "
            "Else leave one out"
        )
    (key,) = given
    spec = given[key][0]
    if key == LOSS_TYPE:
        return {"kl_type": str(spec), "kl_coef": read(config, LOSS_COEF)}
    ctrl = read(config, "algorithm.kl_ctrl")
    adaptive = ctrl["type"] == "adaptive"
    return {
        "kl_type": str(spec),
        "kl_coef": ctrl["kl_coef"],
        "kl_ctrl": ctrl["type"],
        "kl_target": ctrl["target_kl"] if adaptive else None,
        "kl_horizon": ctrl["horizon"] if adaptive else None,
    }


def _named(key: str, name: str) -> KLSpec:
    try:
        return parse(name)
    except ValueError as error:
        raise SettingsError(f"{key}: {error} verl's own: {', '.join(STOCK)}") from None


def _own_keys(own: Any, written: Mapping[str, Any]) -> dict[str, Any]:
    if not hasattr(own, "keys"):
        raise SettingsError(
            f"klplug={own!r}: write its keys one by one, as in +klplug.kl_type=k2_as_loss"
        )
    for key in own:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingsError(
                f"klplug.{key} is unknown; known: {', '.join(f'klplug.{k}' for k in KEYS)}.{hint}"
            )
    kl_type = own.get("kl_type")
    if kl_type is None:
        raise SettingsError(
            "klplug.kl_type is missing, as in +klplug.kl_type=k2_as_loss +klplug.kl_coef=1e-3. "
            f"Known: {', '.join(klplug.kl_types())}"
        )
    if not isinstance(kl_type, str):
        raise SettingsError(f"klplug.kl_type={kl_type!r} is not a string")
    coef = own.get("kl_coef")
    for key in (LOSS_COEF, CTRL_COEF):
        coef = written.get(key) if coef is None else coef
    return {**{key: own.get(key) for key in KEYS}, "kl_coef": coef}


def _quoted(spec: KLSpec | str) -> str:
    text = str(spec)
    return f'"{text}"' if set(text) & set(",=") else text


def _contradictions(plan: Plan, written: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that the user wrote and ``kl_type`` decides; verl's defaults contradict nothing."""
    spec = plan.spec
    for placement, switch, key in (
        ("as_loss", USE_LOSS, LOSS_TYPE),
        ("in_reward", USE_REWARD, PENALTY),
    ):
        part = spec.placed(placement)
        present = bool(part.terms)
        where = "loss" if placement == "as_loss" else "reward"
        if switch in written and bool(written[switch]) != present:
            says = f"has a KL in the {where}" if present else f"puts no KL in the {where}"
            yield f"{switch}={written[switch]}", f"{spec} {says}. Leave the key out"
        if key in written and not _agrees(str(written[key]), part):
            yield f"{key}={written[key]}", "two formulations are named. Leave the key out"
    for key in (LOSS_COEF, CTRL_COEF):
        if key in written and written[key] != plan.kl_coef:
            yield (
                f"{key}={written[key]}",
                f"klplug.kl_coef is {plan.kl_coef:g}. Leave one out",
            )
    for key, ours in (
        ("algorithm.kl_ctrl.type", "+klplug.kl_ctrl"),
        ("algorithm.kl_ctrl.target_kl", "+klplug.kl_target"),
        ("algorithm.kl_ctrl.horizon", "+klplug.kl_horizon"),
    ):
        if key in written:
            yield f"{key}={written[key]}", f"klplug has its own controller: write {ours}"


def _agrees(name: str, part: KLSpec) -> bool:
    if is_stock(name):
        base = parse(f"{name.removesuffix('+')}_as_loss").estimator if name != "full" else name
        return {term.estimator for term in part.terms} == {base}
    return parse(name) == part


def _refuse_unserved(plan: Plan, config: Any, written: Mapping[str, Any]) -> None:
    spec = plan.spec
    if "trainer" not in config or "actor_rollout_ref" not in config:
        raise SettingsError(f"kl_type {spec}: klplug serves verl.trainer.main_ppo, not this one")
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if main is not None and main.name == "verl.trainer.main_ppo_sync":
        raise SettingsError(
            f"kl_type {spec}: klplug does not reach the trainer inside of {main.name}. Use "
            "verl.trainer.main_ppo"
        )
    if "async_training" in config or "rollout" in config:
        raise SettingsError(
            f"kl_type {spec}: verl's fully asynchronous and one-step-off recipes have trainers of "
            "their own, which klplug does not reach. Use verl.trainer.main_ppo, with "
            "trainer.v1.trainer_mode=separate_async if need be"
        )
    _refuse_in_reward(plan, config)
    _refuse_head(plan, config)
    _refuse_baseline(plan, config)
    _refuse_on_legacy_worker(plan, config)
    if plan.kl_ctrl != "fixed" and spec.terms and not plan.needs_reference:
        raise SettingsError(
            f"klplug.kl_ctrl={plan.kl_ctrl} with kl_type {spec}: it is fed the KL at the start of "
            "a step, where the policy is the sampler and their KL 0. Leave klplug.kl_ctrl out"
        )
    if (
        spec.placed("as_loss").terms
        and read(config, "distillation.enabled", False)
        and not read(config, "distillation.distillation_loss.use_task_rewards", False)
    ):
        raise SettingsError(
            f"kl_type {spec} with distillation.distillation_loss.use_task_rewards=False: verl "
            "throws the policy loss away there, and a KL in it too"
        )
    if "rollout_log_probs" in spec.requires and written.get(RECORDS) is False:
        raise SettingsError(f"kl_type {spec} needs rollout log-probs, and {RECORDS}=False")


def _is_legacy(config: Any) -> bool:
    """Whether verl 0.7 runs its own workers, and not the engine's."""
    return bool(read(config, "trainer.use_legacy_worker_impl", "disable") != "disable")


def _refuse_on_legacy_worker(plan: Plan, config: Any) -> None:
    as_loss = plan.spec.placed("as_loss")
    if not as_loss.terms or not _is_legacy(config):
        return
    strategy = str(read(config, "actor_rollout_ref.actor.strategy"))
    unserved = [
        *([f"strategy={strategy}"] if strategy not in ("fsdp", "fsdp2") else ()),
        *(["head=combined"] if any(t.head == "combined" for t in as_loss.terms) else ()),
        *([f"baseline={t.baseline}" for t in as_loss.terms if t.baseline != "none"]),
        *(["reference=rollout"] if not plan.needs_reference else ()),
    ]
    if unserved:
        raise SettingsError(
            f"kl_type {plan.spec} with {unserved[0]} is not served on verl 0.7's own workers. Set "
            "trainer.use_legacy_worker_impl=disable"
        )


def _refuse_head(plan: Plan, config: Any) -> None:
    heads = [term.head for term in plan.spec.terms if term.head in ("combined", "clipped")]
    mode = str(read(config, "actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla"))
    if heads and mode != "vanilla":
        raise SettingsError(
            f"kl_type {plan.spec} with actor_rollout_ref.actor.policy_loss.loss_mode={mode}: "
            f"head={heads[0]} has the token ratio and the clip of PPO's loss, and {mode} has "
            "others. Use loss_mode=vanilla, or head=separate"
        )


def _refuse_baseline(plan: Plan, config: Any) -> None:
    compared = [term for term in plan.spec.terms if term.baseline != "none"]
    if not compared:
        return
    as_loss = [term for term in compared if term.placement == "as_loss"]
    if len(as_loss) > 1:
        raise SettingsError(
            f"kl_type {plan.spec}: one term as loss may have a baseline on verl, not {len(as_loss)}"
        )
    if any(term.reference == "rollout" for term in as_loss):
        raise SettingsError(
            f"kl_type {plan.spec}: a baseline with reference=rollout does nothing: it is measured "
            "at the start of a step, where the KL to the sampler is 0. Leave baseline out"
        )
    n = int(read(config, "actor_rollout_ref.rollout.n", 1))
    answers = n if any(t.baseline == "group" for t in compared) else None
    if answers is None:
        answers = n * int(read(config, "data.train_batch_size", 2))
    if answers < 2:
        raise SettingsError(
            f"kl_type {plan.spec} with actor_rollout_ref.rollout.n={n}: there are no other answers "
            "to compare with. Use n > 1, or baseline=none"
        )


def _refuse_in_reward(plan: Plan, config: Any) -> None:
    estimator = str(read(config, "algorithm.adv_estimator"))
    in_reward = plan.spec.placed("in_reward")
    if estimator == "gdpo" and in_reward.terms:
        raise SettingsError(
            f"kl_type {plan.spec} with algorithm.adv_estimator=gdpo: it takes its rewards from "
            "algorithm.gdpo_reward_keys, past any KL in the tokens' rewards, and whitens them. Use "
            "k2_as_loss"
        )
    joined_after = [t for t in in_reward.terms if t.reward_norm == "none"]
    if not joined_after:
        return
    if estimator not in REWARD_ESTIMATORS:
        raise SettingsError(
            f"kl_type {plan.spec} with algorithm.adv_estimator={estimator}: it whitens, bootstraps "
            f"or weighs what it is given, so a KL has no definite strength there. Use one of "
            f"{', '.join(REWARD_ESTIMATORS)}, or k2_as_loss, or verl's own order: "
            f"{joined_after[0].estimator}_in_reward,reward_norm=group"
        )
    if plan.divides_by_length and int(read(config, "actor_rollout_ref.rollout.n", 1)) < 2:
        raise SettingsError(
            f"kl_type {plan.spec} with a policy loss that divides by the answer's length would "
            "tilt the optimum to long answers, and with actor_rollout_ref.rollout.n=1 there is no "
            "group to take a baseline from. Use actor_rollout_ref.actor.loss_agg_mode=token-mean, "
            "n > 1, or k2_as_loss"
        )


def check_files(config: Any) -> None:
    """Local models and data files that the config names must be there and have the prompt."""
    model = read(config, "actor_rollout_ref.model.path")
    if model and is_local(model) and not Path(model).expanduser().exists():
        raise SettingsError(f"actor_rollout_ref.model.path={model}: there is no such path")
    prompt_key = read(config, "data.prompt_key", "prompt")
    for key in ("data.train_files", "data.val_files"):
        files = read(config, key) or ()
        for name in [files] if isinstance(files, str) else files:
            path = Path(str(name)).expanduser()
            if not is_local(str(name)):
                continue
            if not path.exists():
                raise SettingsError(f"{key}={name}: there is no such path")
            if path.suffix == ".parquet":
                _check_column(key, path, prompt_key)


def _check_column(key: str, path: Path, column: str) -> None:
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except (OSError, ValueError) as error:
        raise SettingsError(f"{key}={path}: not a parquet file ({error})") from None
    if column not in names:
        raise SettingsError(
            f"{key}={path}: no column {column!r}; the file has {', '.join(names)}. "
            "Set data.prompt_key"
        )
