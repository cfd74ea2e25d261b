"""Whether a copy of OpenRLHF applies its KL as a release does, from its code as syntax trees.

The code of a release, and of a few copies that were read beside it, is known by its digest
(``klplug.audit.source``). Of other code nothing is said but that it is another.
"""

from __future__ import annotations

import ast
from pathlib import Path

from klplug.audit.source import calls, digest, function, tree
from klplug.audit.tables import Source

MODELS = "models/utils.py"
_ACTOR, _EXPERIENCE = "trainer/ray/ppo_actor.py", "trainer/ppo_utils/experience_maker.py"
_TRAINER = "trainer/ppo_trainer.py"

# compute_approx_kl: the newest release with this code.
_ESTIMATORS = {
    "de176c144fdf": "0.4.6",  # haozheji/OpenRLHF: that of 0.4.0, which has k1 alone
    "40c54a3b0ab8": "0.4.6",
    "aec528a0ac2d": "0.5.9.post1",
    "ddbd6bdf9bb3": "0.5.9.post1",  # R1-Searcher: over the tokens that the policy wrote
    "472df5352b33": "0.6.4",
    "2ef421b7c99c": "0.7.5",
    "49c85fc9e5ba": "0.8.11",
    "089226e4df93": "0.10.4",
    "63f8baa3bc8a": "0.11.1",
    "b4af1722aa4c": "0.11.2",
}
_REWARDS = (
    *("46f9c30aa613", "7ceddb610968"),  # up to 0.6; from 0.7 on
    "65a9276b74ba",  # R1-Searcher: 0.6's, which prints its coefficient
    "c6900a479e46",  # haozheji/OpenRLHF: that of 0.4.0
)
# What is made of it where it is called.
_CALLS = {
    _ACTOR: (
        *("6e98c9257e7c", "40ca5c812609", "7171fc23e6a1", "8709deb303c6", "edaf6d6d6859"),
        "92e8d20561b9",  # lmm-r1: 0.7's, which logs a number
    ),
    _TRAINER: (
        "6e98c9257e7c",  # OpenRLHF-M and MM-EUREKA, between 0.5 and 0.6: 0.6's
        "c0a781f61e9a",  # R1-Searcher: the same with its mask, and a gradient of packed samples
    ),
    _EXPERIENCE: (
        *("f6c00ea909cb", "1175b9513a16"),  # 0.4 and 0.5
        *("d06d2910c32f", "2f6d4ae7484c", "39136b7713d2", "bbb28802847f"),  # from 0.6 on
        *("c2aa154842a2", "e4ecd3953f19"),  # OpenRLHF-M, between 0.5 and 0.6
        *("b520a90da2eb", "0d48c611d4ab"),  # R1-Searcher: the same, with its mask
        "be5b10c6cf58",  # haozheji/OpenRLHF: a KL that is reported
    ),
}
ALWAYS, OF_REWARD = "always", "a KL in the reward"
NEVER = "never in the reward"
"""Its ``compute_reward`` takes a KL and does not read it."""
DETACHED = "a number of packed samples"
"""The KL loss of packed samples is a tensor made anew of numbers, and has no gradient."""
_DETACHED = ("6e98c9257e7c",)  # 0.6's


def source(package: Path) -> Source:
    """How a package applies its KL.

    Raises:
        SyntaxError: a file of it is no Python.
    """
    like, changed, facts = "", [], []
    models = tree(package / MODELS)
    if models is not None:
        estimator = function(models, "compute_approx_kl")
        like = "" if estimator is None else _ESTIMATORS.get(digest(estimator), "")
        if not like:
            changed.append((f"{MODELS}: compute_approx_kl", ALWAYS))
        reward = function(models, "compute_reward")
        if reward is not None and not _reads_a_kl(reward):
            facts.append(NEVER)
        elif reward is None or digest(reward) not in _REWARDS:
            changed.append((f"{MODELS}: compute_reward", OF_REWARD))
    for name, known in _CALLS.items():
        module = tree(package / name)
        places = [] if module is None else calls(module, "compute_approx_kl")
        found = [digest(place) for place in places]
        if any(place not in known for place in found):
            changed.append((f"{name}: the KL", ALWAYS))
        if any(place in _DETACHED for place in found):
            facts.append(DETACHED)
    return Source(package, like, tuple(changed), tuple(dict.fromkeys(facts)))


def _reads_a_kl(function: ast.AST) -> bool:
    """Whether a function reads a KL, or the log-probs of one, in what it is given."""
    names = (n for n in ast.walk(function) if isinstance(n, ast.Name))
    return any(n.id in ("kl", "log_probs") and isinstance(n.ctx, ast.Load) for n in names)
