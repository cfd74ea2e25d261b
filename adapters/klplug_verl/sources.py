"""What a copy of verl is: its release, its settings, and whether it applies its KL as a release.

The last is read from its code as syntax trees. The code of a release, and of a few copies that were
read beside it, is known by its digest (``klplug.audit.source``). Of other code nothing is said but
that it is another.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from klplug.audit.source import calls, digest, function, taken, tree
from klplug.audit.tables import Source, flattened, load_yaml
from klplug_verl import configs

UNLESS_LOSS = "in the reward unless use_kl_loss"
ALWAYS_REWARD = "in the reward always"
SWITCHED = "in the reward by use_kl_in_reward"
NEVER = "never in the reward"
ADDED = "as a loss"
SUBTRACTED = "as a loss, subtracted"
NO_LOSS = "never as a loss"

CORE, _TRAINER = "trainer/ppo/core_algos.py", "trainer/ppo/ray_trainer.py"
_LOSSES = ("workers/actor/dp_actor.py", "workers/utils/losses.py")

# kl_penalty, and kl_penalty_forward where there is one: the newest release with this code.
_ESTIMATORS = {
    "1d7fba058d6d": "0.3.0.post1",
    "12b2abd59272": "0.5.0",
    "0725bab0adad+141adb2530c7": "0.7.1",
    "b52309d756ad+141adb2530c7": "0.9.1",
}
# Its branch of one name, where the whole is another: the names that a release has it under.
_BRANCHES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("2c5656dd39c5", "e453915e70f6"), ("kl", "k1")),
    **dict.fromkeys(("598503199c7d", "db298964f745"), ("abs",)),
    **dict.fromkeys(("719197202f47", "aa268120d347"), ("mse", "k2")),
    # RPG's own.
    "7c3995da4e39": ("rpg_fkl",),
    "a5d52dd3647c": ("rpg_ufkl",),
    "01f491b463a6": ("rpg_urkl",),
    "2b5cbd1bbcf4": ("rpg_rkl",),
    # Up to 0.3; up to 0.5, whose exponent has a clamp; from 0.6 on.
    **dict.fromkeys(("e7b98565a9cd", "39beed61e1fe", "abdb0dfcdcb9"), ("low_var_kl", "k3")),
}
# From 0.6 on, kl_penalty itself: it calls that of the branches, and knows '+'.
_STRAIGHT = ("0725bab0adad", "b52309d756ad")
_APPLY = (
    *("d3227d86efe6", "1d741eac1360", "d2a30495abc9"),  # 0.2 and 0.3; 0.4; from 0.5 on
    "d1f11c85ea46",  # 0.3.1.dev: 0.3's, with a reference always
    "476986316036",  # DeepEyes: 0.3.1's, over the tokens that the policy wrote
    "9a6a7c4cf636",  # SimpleVLA-RL: 0.1's, over the actions that the policy took
    "f1933b046f27",  # SSRL: 0.4's, over the tokens that the policy wrote
    "5c4b08e09e8c",  # Search-R1: 0.3's, over the tokens that the policy wrote
)
# Where fit calls it.
_REWARD = {
    "81d66b6e1c91": UNLESS_LOSS,  # 0.2 and 0.3
    "ee3245d6dd9d": UNLESS_LOSS,  # 0.1: the same, without a default for the key
    "fafa02cb30fc": UNLESS_LOSS,  # QwenLong-L1: 0.3's, of each batch before it is filtered
    "66967df74c78": ALWAYS_REWARD,  # SimpleVLA-RL, whose actor knows no KL loss
    "5c16eb648fdf": SWITCHED,  # from 0.4 on
}
# The block of use_kl_loss, in update_policy and in ppo_loss.
_LOSS = {
    **dict.fromkeys(("636bf1fee116", "e359b1cd7b4d", "66b894f60a9e", "b3d00b9162f7"), ADDED),
    "af83fc9b3d50": ADDED,
    "8b2b04c0a750": ADDED,  # 0.3.1.dev: 0.4's, with the mode out of the config
    "a52feffc216d": ADDED,  # RPG: 0.4's, likewise
    "02e83c841da8": ADDED,  # Skywork-OR1: 0.3's, in two lines
    "4dd6719d117f": SUBTRACTED,  # 0.1
}

# Copies whose loss is a release's, unless these settings are changed: the calls of kl_penalty.
_LOSS_UNLESS = {
    # DPH-RL: a divergence to the answers of another model, where there are such answers.
    "037b9625557c+3bfa68d04d34+0ad8bddeb0c2": (
        ADDED,
        ("data.sft_files", "actor_rollout_ref.actor.sft_loss_mode"),
    ),
}

# What a changed function bears on.
ALWAYS, ANY_KL, OF_REWARD, OF_LOSS = "always", "any KL", "a KL in the reward", "a KL as a loss"

MARKS = ("trainer/config/ppo_trainer.yaml", CORE)
"""What a folder has that is verl's package, and what a copy of another name has too."""


def version(package: Path) -> str:
    """The release that a package says it is; empty where it does not."""
    path = package / "version" / "version"
    return path.read_text().strip() if path.is_file() else ""


def table(package: Path) -> dict[str, Any]:
    """What a release knows: verl's own configs, flat; other engines' only add names."""
    folder = package / "trainer" / "config"
    main = folder / "_generated_ppo_trainer.yaml"
    names = sorted(folder.glob("_generated_ppo_*_trainer.yaml"))
    others = [path for path in names if path != main and path.is_file()]
    if main.is_file():
        contents = [load_yaml(path.read_text()) for path in [main, *others]]
    else:  # before 0.5
        paths = (folder / "ppo_trainer.yaml", folder / "ppo_megatron_trainer.yaml")
        contents = [dict(configs.read(path, folder).settings) for path in paths if path.is_file()]
    defaults: dict[str, Any] = {}
    for content in contents:
        for key, value in flattened(content).items():
            defaults.setdefault(key, value)
    return {"defaults": defaults, "choices": {}, "switches": {}}


def source(package: Path) -> Source:
    """How a package applies its KL.

    Raises:
        SyntaxError: a file of it is no Python.
    """
    like, changed, facts = "", [], []
    kept: list[str] = []
    unless: list[tuple[str, str]] = []
    core, trainer = tree(package / CORE), tree(package / _TRAINER)
    if core is not None:
        found = [function(core, name) for name in ("kl_penalty", "kl_penalty_forward")]
        like = _ESTIMATORS.get(_of([node for node in found if node is not None]), "")
        if not like:
            changed.append((f"{CORE}: kl_penalty", ANY_KL))
            kept = _branches(found)
    if trainer is not None:
        applied = function(trainer, "apply_kl_penalty")
        places = calls(trainer, "apply_kl_penalty")
        if not places:
            facts.append(NEVER)
        elif applied is None or digest(applied) not in _APPLY:
            changed.append((f"{_TRAINER}: apply_kl_penalty", OF_REWARD))
        elif (fact := _REWARD.get(_of(places))) is None:
            changed.append((f"{_TRAINER}: fit", ALWAYS))
        else:
            facts.append(fact)
    modules = [(name, tree(package / name)) for name in _LOSSES]
    blocks = [(name, calls(module, "kl_penalty")) for name, module in modules if module is not None]
    for name, module in modules:
        # FlowRL: no KL loss, and an objective with the reference in it.
        if module is not None and not calls(module, "kl_penalty") and _reads_reference(module):
            changed.append((f"{name}: a loss of ref_log_prob", ALWAYS))
    if blocks and not any(places for _, places in blocks):
        facts.append(NO_LOSS)
    for name, places in blocks:
        if not places:
            continue
        if _of(places) in _LOSS_UNLESS:
            fact, keys = _LOSS_UNLESS[_of(places)]
            facts.append(fact)
            unless += [(key, f"{name}: the KL loss") for key in keys]
            continue
        fact = _LOSS.get(_of(places))
        if fact is not None:
            facts.append(fact)
        else:
            switched = all("use_kl_loss" in _head(place) for place in places)
            changed.append((f"{name}: the KL loss", OF_LOSS if switched else ALWAYS))
    return Source(
        package, like, tuple(changed), tuple(dict.fromkeys(facts)), tuple(kept), tuple(unless)
    )


def _reads_reference(module: ast.AST) -> bool:
    """Whether it takes the reference's log-probs from a batch."""
    return any(
        isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.slice, ast.Constant)
        and node.slice.value == "ref_log_prob"
        for node in ast.walk(module)
    )


def _branches(found: list[ast.AST | None]) -> list[str]:
    """The names for which the changed ``kl_penalty`` does as a release's."""
    last = next((node for node in reversed(found) if node is not None), None)
    outer, inner = found
    if last is None or (outer and inner and digest(outer) not in _STRAIGHT):
        return []
    names = dict.fromkeys(name for names in _BRANCHES.values() for name in names)
    return [n for n in names if n in _BRANCHES.get(digest(taken(last, "kl_penalty", n)), ())]


def _head(node: ast.AST) -> str:
    """The condition that a block stands under."""
    return ast.unparse(node.test) if isinstance(node, ast.If) else ""


def _of(nodes: list[ast.AST]) -> str:
    return "+".join(digest(node) for node in nodes)
