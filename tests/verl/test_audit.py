"""What ``klplug audit`` says of verl, beside what verl's own functions do."""

from __future__ import annotations

import ast
import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra._internal.utils import get_args_parser
from klplug_verl import command, reading, sources
from omegaconf import OmegaConf
from torch import Tensor

import klplug
from klplug.audit import audit
from klplug.audit.edits import edited
from klplug.audit.run import dead_zone
from klplug.audit.settings import Launch
from klplug.audit.shell import Script, Word
from klplug.audit.tables import installed, read, stored, versions
from tests.audit.verdicts import SCRIPTS
from tests.one_meaning import BETA, TOLERANCE, batch, loss_gradient
from tests.releases import release
from tests.verl.tensors import experience, loss
from tests.verl.trainer import config

NAMES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
GROUP = 8


def report(*settings: str) -> Any:
    estimator = "algorithm.adv_estimator=grpo"
    return audit(["python", "-m", "verl.trainer.main_ppo", estimator, *settings])


def as_loss(name: str, coef: float = BETA) -> Any:
    actor = "actor_rollout_ref.actor"
    return report(
        f"{actor}.use_kl_loss=True", f"{actor}.kl_loss_type={name}", f"{actor}.kl_loss_coef={coef}"
    )


def in_reward(name: str, *more: str) -> Any:
    return report("algorithm.use_kl_in_reward=True", f"algorithm.kl_penalty={name}", *more)


# The command line.


_RUN = "python -m verl.trainer.main_ppo"
_K3 = "actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_type=low_var_kl"
_NAMED = "--config-path=config --config-name ppo_trainer"


@pytest.mark.parametrize(
    "script",
    [
        f"{_RUN} {_NAMED} {_K3}",
        f"{_RUN} {_K3} {_NAMED}",
        f"{_RUN} -cn ppo_trainer \\\n    -m {_K3} trainer.nnodes=2",
        f"{_RUN} --config-n=ppo_trainer \\\n    ~trainer.v1 \\\n    {_K3}",
        f'{_RUN} \\\n    --config-name=ppo_trainer {_K3} "$@"',
        f'FLAGS="{_NAMED}"\n{_RUN} $FLAGS {_K3}',
        f'FLAGS=({_NAMED})\nKL=({_K3})\n{_RUN} "${{FLAGS[@]}}" "${{KL[@]}}"',
    ],
)
def test_hydra_parses_the_command_once_the_advice_is_taken(tmp_path: Path, script: str) -> None:
    path = tmp_path / "run.sh"
    path.write_text(script)
    found = audit(path)
    assert found.after is not None
    (edited_once,) = Script(edited(script, found.edits)).commands
    for words in (found.after, [word.text for word in edited_once.words]):
        parsed = get_args_parser().parse_args(words[3:])
        assert f"+klplug.kl_type={found.recommended}" in parsed.overrides
        assert parsed.config_name == "ppo_trainer"


@pytest.mark.parametrize("between", ["--multirun", "--config-name ppo_trainer", "-cn=ppo_trainer"])
def test_overrides_that_a_flag_parts_do_not_start(between: str) -> None:
    words = f"a=1 {between} {_K3}".split()
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(words)
    rejected = [f for f in report(*words).findings if f.id == "rejected-setting"]
    assert any("in one row" in finding.message for finding in rejected)


# Defaults and settings.


def test_the_installed_release_is_read_from_its_own_config() -> None:
    here = installed("verl")
    assert here is not None and here.installed
    import verl

    assert here.defaults == read("verl", Path(verl.__file__).parent)["defaults"]


@pytest.mark.parametrize("version", versions("verl"))
def test_every_table_is_what_its_release_says(version: str) -> None:
    content = read("verl", release("verl", version) / "verl")
    assert json.loads(json.dumps(content["defaults"])) == stored("verl", version).defaults


@pytest.mark.parametrize("version", versions("verl"))
def test_the_kl_of_every_release_is_known_by_its_code(version: str) -> None:
    package = release("verl", version) / "verl"
    found = sources.source(package)
    # One table is for the releases with this code of kl_penalty: 0.2 and 0.3; 0.4, 0.5; ...
    assert found.changed == () and found.like in versions("verl")
    switched = "use_kl_in_reward" in (package / "trainer/ppo/ray_trainer.py").read_text()
    where = sources.SWITCHED if switched else sources.UNLESS_LOSS
    assert set(found.facts) == {where, sources.ADDED}


# TinyZero's actor is 0.2's but for one sign.
@pytest.mark.parametrize(
    ("file", "old", "new", "fact", "changed"),
    [
        ("dp_actor", "policy_loss + kl_loss *", "policy_loss - kl_loss *", "SUBTRACTED", None),
        ("dp_actor", "kl_loss * self.config", "2 * kl_loss * self.config", None, "the KL loss"),
        ("dp_actor", "# compute kl loss", "# another comment", "ADDED", None),
        ("ray_trainer", "- beta * kld", "+ beta * kld", None, "apply_kl_penalty"),
        ("ray_trainer", "if not self.config.actor_rollout_ref.actor.get(", "if (", None, "fit"),
        ("core_algos", "0.5 * (logprob", "0.6 * (logprob", None, "kl_penalty"),
    ],
)
def test_a_copy_with_one_change(
    tmp_path: Path, file: str, old: str, new: str, fact: str | None, changed: str | None
) -> None:
    original = release("verl", "0.2.0.post2") / "verl"
    for name in ("workers/actor/dp_actor", "trainer/ppo/ray_trainer", "trainer/ppo/core_algos"):
        text = (original / f"{name}.py").read_text()
        if name.endswith(file):
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = sources.source(tmp_path)
    assert [name.rpartition(": ")[2] for name, _ in found.changed] == ([changed] if changed else [])
    assert fact is None or getattr(sources, fact) in found.facts


def test_the_installed_release_is_the_one_used() -> None:
    assert report().version_from == "installed"


def words(path: Path) -> list[Word]:
    found = [
        c.words for c in Script(path.read_text()).commands if "-m" in [w.text for w in c.words]
    ]
    return list(found[-1][[w.text for w in found[-1]].index("-m") + 1 :])


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("verl-*.sh")), ids=lambda path: path.stem)
def test_settings_are_those_of_hydra(path: Path) -> None:
    launched = command.parsed(Launch(tuple(words(path)), 0, path.parent))
    table = installed("verl")
    assert table is not None
    ours = reading.settings(table, launched, "installed")
    overrides = [w.text for w in words(path) if "=" in w.text and not w.text.startswith("--")]
    if "megatron" in path.stem:
        overrides.append("model_engine=megatron")
    theirs = config(*overrides)
    for key in reading.ASPECTS:
        assert ours[key].value == OmegaConf.select(theirs, key), key


@pytest.mark.parametrize(
    "override",
    [
        "data.train_batch=3",
        "algorithm.kl_ctrl.coef=1",
        "actor_rollout_ref.actor.kl_loss=True",
        "nonsense.key=1",
        "+algorithm.own=1",
        "++data.train_batch_size=2048",
        "trainer.total_epochs=3",
        "trainer.project_name=a,b",
        "+klplug.kl_type=k2_as_loss,ratio=none",
        "+klplug={kl_type: k2_as_loss, kl_coef: 1}",
        "+ray_kwargs.ray_init.num_gpus=1",
    ],
)
def test_what_hydra_refuses_is_rejected(override: str) -> None:
    from hydra.errors import HydraException

    try:
        config(override)
        accepted = True
    except HydraException:
        accepted = False
    assert ("rejected-setting" not in [f.id for f in report(override).findings]) == accepted


# The gradient.


def penalty(log_probs: Tensor, ref: Tensor, name: str) -> Tensor:
    from verl.trainer.ppo.core_algos import kl_penalty

    found: Tensor = kl_penalty(log_probs, ref, name)
    return found


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}+" for name in NAMES)])
def test_a_loss_has_the_gradient_of_the_kl_type_it_is_said_to_be(name: str) -> None:
    given = batch()
    log_probs = given.log_probs.clone().requires_grad_(True)
    loss(given, log_probs, name, BETA)[0].backward()
    said = as_loss(name)
    assert said.beta_absolute == BETA and not said.corrected
    torch.testing.assert_close(
        log_probs.grad, loss_gradient(said.kl_type), rtol=TOLERANCE, atol=1e-8
    )


def expected_gradients(name: str, placement: str) -> tuple[Tensor, Tensor, Tensor]:
    """(verl's term's, the reverse KL's, the forward KL's), exactly, over five answers."""
    logits = torch.tensor([0.3, -0.5, 0.9, 0.1, -1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64).log()
    log_probs = logits.log_softmax(-1)
    value = penalty(log_probs, ref, name)
    score = value if placement == "as_loss" else value.detach() * log_probs
    losses = (
        (log_probs.exp().detach() * score).sum(),
        (log_probs.exp() * (log_probs - ref)).sum(),
        (ref.exp() * (ref - log_probs)).sum(),
    )
    one, two, three = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in losses)
    return one, two, three


@pytest.mark.parametrize("placement", ["as_loss", "in_reward"])
@pytest.mark.parametrize("name", [*NAMES, "k1+", "k3+"])
def test_the_gradient_named_is_the_gradient_there_is(name: str, placement: str) -> None:
    found, reverse, forward = expected_gradients(name, placement)
    said = (as_loss if placement == "as_loss" else in_reward)(name).gradient
    named = {"reverse": reverse, "forward": forward, "zero": torch.zeros_like(found)}
    near = {key for key, value in named.items() if torch.allclose(found, value, atol=1e-9)}
    assert near == ({said} if said != "neither" else set())
    if placement == "in_reward" and said == "neither" and name.startswith(("k3", "low")):
        torch.testing.assert_close(found, reverse - forward)


@pytest.mark.parametrize("name", [*NAMES, "k3+"])
def test_a_reward_gets_the_coefficient_of_the_kl_type(name: str) -> None:
    from verl.trainer.ppo import core_algos, ray_trainer

    given, scores = batch(), torch.zeros(4)
    data, _ = ray_trainer.apply_kl_penalty(
        experience(given, scores), core_algos.FixedKLController(BETA), kl_penalty=name
    )
    spec = klplug.parse(in_reward(name).kl_type)
    term = klplug.kl_term(spec, given.old_log_probs, given.ref_log_probs, given.response_mask)
    torch.testing.assert_close(
        data.batch["token_level_rewards"], -BETA * term.coefficient, rtol=1e-5, atol=1e-7
    )


# Dead zones.


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}+" for name in NAMES)])
def test_the_dead_zone_is_where_the_gradient_is_zero(name: str) -> None:
    zone = as_loss(name).dead_zone
    # An even count leaves 0 out, where the derivative of abs is a matter of taste.
    log_ratio = torch.linspace(-19.9, 19.9, 20_000, dtype=torch.float64)
    log_probs = log_ratio.clone().requires_grad_(True)
    penalty(log_probs, torch.zeros_like(log_ratio), name).sum().backward()
    dead = torch.zeros_like(log_ratio, dtype=torch.bool)
    for low, high in zone:
        dead |= (log_ratio > low) & (log_ratio < high)
    assert log_probs.grad is not None
    assert torch.equal(log_probs.grad == 0, dead)
    assert bool(zone) == (name in ("k3", "low_var_kl"))


@pytest.mark.parametrize("version", versions("verl"))
def test_the_clamp_of_k3_is_that_of_every_release(version: str) -> None:
    # The functions alone: a whole older release would not import beside this one.
    folder = release("verl", version) / "verl" / "trainer" / "ppo"
    functions = [
        node
        for node in ast.parse((folder / "core_algos.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("kl_penalty")
    ]
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(functions, type_ignores=[]), version, "exec"), scope)
    log_probs = torch.linspace(-19.9, 19.9, 20_000).requires_grad_(True)
    zeros = torch.zeros(20_000)
    scope["kl_penalty"](log_probs, zeros, "low_var_kl").sum().backward()
    dead = sum((log_probs > low) & (log_probs < high) for low, high in dead_zone("k3"))
    assert torch.equal(log_probs.grad == 0, dead)
    # The straight-through names came with 0.8.0, whatever the documentation of 0.7 said.
    if _rejects_plus(version):
        with pytest.raises(NotImplementedError):
            scope["kl_penalty"](log_probs, zeros, "k3+")
    else:
        scope["kl_penalty"](log_probs, zeros, "k3+")


def _rejects_plus(version: str) -> bool:
    actor = "actor_rollout_ref.actor"
    words = [f"{actor}.use_kl_loss=True", f"{actor}.kl_loss_type=k3+"]
    said = audit(["python", "-m", "verl.trainer.main_ppo", *words], host_version=version)
    return any("NotImplementedError" in finding.message for finding in said.findings)


def test_the_edges_of_k3_are_roots() -> None:
    (_, low), (high, _) = dead_zone("k3")
    for edge in (low, high):
        assert math.exp(-edge) - 1 + edge == pytest.approx(10, abs=1e-12)


# Strength.


def advantages(estimator: str, rewards: Tensor, by_std: bool) -> Tensor:
    """verl's own, one token per answer: two groups of eight."""
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo import core_algos

    count = len(rewards)
    given = {
        "token_level_rewards": rewards[:, None].clone(),
        "response_mask": torch.ones(count, 1),
        "index": np.array([str(i // GROUP) for i in range(count)]),
        "config": AlgoConfig(adv_estimator=estimator, norm_adv_by_std_in_grpo=by_std),
        "norm_adv_by_std_in_grpo": by_std,
        "reward_baselines": torch.zeros(count),
        "values": torch.zeros(count, 1),
        "gamma": 1.0,
        "lam": 1.0,
    }
    function = core_algos.get_adv_estimator_fn(estimator)
    taken = inspect.signature(function).parameters
    made, _ = function(**{key: value for key, value in given.items() if key in taken})
    return made[:, 0]


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize(
    "estimator",
    [
        *("grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "remax", "gae", "gpg"),
        *("reinforce_plus_plus", "reinforce_plus_plus_baseline", "grpo_passk"),
    ],
)
def test_the_factor_on_rewards_is_the_one_in_the_formula(estimator: str, by_std: bool) -> None:
    said = in_reward(
        "k1",
        f"algorithm.adv_estimator={estimator}",
        f"algorithm.norm_adv_by_std_in_grpo={by_std}",
        "algorithm.kl_ctrl.kl_coef=1",
        f"actor_rollout_ref.rollout.n={GROUP}",
    )
    formula = str(said.beta_absolute)
    rewards = torch.randn(2 * GROUP, generator=torch.Generator().manual_seed(0)) + 3
    plain = advantages(estimator, rewards, by_std)
    # Divided by a standard deviation, whose ever: then a scale of the rewards drops out.
    scaled = advantages(estimator, 2 * rewards, by_std)
    divided = "sigma" in formula
    torch.testing.assert_close(scaled, plain if divided else 2 * plain, rtol=1e-4, atol=1e-4)
    assert said.beta_relative == 1.0
    if "/ sigma_batch" in formula or estimator == "grpo_passk":
        return
    # What a reward adds to its own advantage, sigma held: 1, or (N-1)/N with itself in the mean.
    moved = rewards.clone()
    moved[3] += 0.5
    sigma = [r[:GROUP].std() if divided else 1.0 for r in (rewards, moved)]
    own = (advantages(estimator, moved, by_std)[3] * sigma[1] - plain[3] * sigma[0]) / 0.5
    assert float(own) == pytest.approx(float(formula.split()[0]), rel=1e-4)
