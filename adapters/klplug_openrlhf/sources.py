"""What a copy of OpenRLHF is: its release, its flags, and whether it applies its KL as a release.

All is read from its code as syntax trees. The code of a release, and of a few copies that were read
beside it, is known by its digest (``klplug.audit.source``). Of other code nothing is said but that
it is another.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


MARKS = ("cli/train_ppo_ray.py", MODELS)
"""What a folder has that is OpenRLHF's package, and what a copy of another name has too."""


def version(package: Path) -> str:
    """The release that a checkout says it is; empty where it does not."""
    path = package.parent / "version.txt"
    return path.read_text().strip() if path.is_file() else ""


def table(package: Path) -> dict[str, Any]:
    """What a release knows: the flags that its script adds to its parser. Nothing is run."""
    defaults: dict[str, Any] = {}
    choices: dict[str, list[Any]] = {}
    switches: dict[str, bool] = {}
    module = ast.parse((package / MARKS[0]).read_text())
    for call, names in _calls(module, {}):
        if not ast.unparse(call.func).endswith(".add_argument"):
            continue
        options = {word.arg: _literal(word.value, names) for word in call.keywords}
        action = options.get("action")
        for name in (_literal(argument, names) for argument in call.args):
            if not str(name).startswith("--"):
                continue
            flag = str(name)[2:]
            switch = action in ("store_true", "store_false")
            defaults[flag] = options.get("default", action == "store_false" if switch else None)
            if options.get("choices") is not None:
                choices[flag] = list(options["choices"])
            if switch:
                switches[flag] = action == "store_true"
    return {"defaults": defaults, "choices": choices, "switches": switches}


def _calls(node: ast.AST, names: dict[str, Any]) -> Iterator[tuple[ast.Call, dict[str, Any]]]:
    """Every call, and what the loops around it over written values give names to."""
    if isinstance(node, ast.For):
        for value in _literal(node.iter, names) or [None]:
            bound = {**names, **_bound(node.target, value)}
            for statement in node.body:
                yield from _calls(statement, bound)
        return
    if isinstance(node, ast.Call):
        yield node, names
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, names)


def _bound(target: ast.expr, value: Any) -> dict[str, Any]:
    """What a loop over written values gives names to."""
    if isinstance(target, ast.Name):
        return {target.id: value}
    bound: dict[str, Any] = {}
    if isinstance(target, ast.Tuple) and isinstance(value, (list, tuple)):
        for each, part in zip(target.elts, value, strict=False):
            bound |= _bound(each, part)
    return bound


def _literal(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """A value as written; ``None`` for what only a run makes, as the time."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.JoinedStr):
        parts = (
            part.value
            for part in node.values
            if isinstance(part, (ast.Constant, ast.FormattedValue))
        )
        return "".join(str(_literal(p, names) if isinstance(p, ast.expr) else p) for p in parts)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "int" and len(node.args) == 1:
        return int(_literal(node.args[0], names) or 0)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
