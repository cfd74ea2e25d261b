"""The right verdict on a command of verl or OpenRLHF, from its words as bash passes them.

Nothing of the audit is used: defaults are those in the checkout's own configuration, and what is
made of them was read in the hosts' sources. verl from 0.3.1 on has ``algorithm.use_kl_in_reward``
(``trainer/ppo/ray_trainer.py``, ``fit``; ``workers/utils/losses.py``, ``ppo_loss``); verl before it
puts its KL in the reward unless ``use_kl_loss`` is set (the same file, ``fit``). OpenRLHF puts it
in the reward unless ``use_kl_loss`` is set (``trainer/ppo_utils/experience_maker.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

# Whose gradient each estimator has: as a loss the token's own derivative, in the reward the value.
_AS_LOSS = {
    **{"kl": "zero", "k1": "zero", "abs": "neither", "mse": "reverse", "k2": "reverse"},
    **{"low_var_kl": "forward", "k3": "forward"},
}
_IN_REWARD = {
    **{"kl": "reverse", "k1": "reverse", "abs": "neither", "mse": "neither", "k2": "neither"},
    **{"low_var_kl": "neither", "k3": "neither"},
}
_ACTOR = "actor_rollout_ref.actor."

# Packages whose KL was compared with a release's: ``kl_penalty``, ``apply_kl_penalty``, and what
# ``update_policy`` does with ``kl_loss``. Of others nothing is said here.
READ = (
    *("verl-project/verl", "volcengine/verl", "TIGER-AI-Lab/verl-tool", "Jiayi-Pan/TinyZero"),
    *("PeterGriffinJin/Search-R1", "Unakar/Logic-RL", "agentica-project/rllm"),
    *("Qihoo360/Light-R1", "pat-jj/DeepRetrieval", "OpenRLHF/OpenRLHF", "OpenRLHF/OpenRLHF-M"),
    *("GAIR-NLP/ToRL", "hkust-nlp/simpleRL-reason", "SkyworkAI/Skywork-OR1", "Agent-RL/ReCall"),
    *("PRIME-RL/Entropy-Mechanism-of-RL", "ElliottYan/LUFFY", "RUCAIBox/R1-Searcher"),
    *("ModalMinds/MM-EUREKA", "TideDra/lmm-r1", "NovaSky-AI/SkyThought", "00ffcc/count-R1"),
    *("Alibaba-NLP/ZeroSearch", "AndreHe02/rewarding-unlikely-release", "THU-KEG/AdaptThink"),
    *("GAIR-NLP/DeepResearcher", "ypwang61/One-Shot-RLVR", "Tongyi-Zhiwen/QwenLong-L1"),
    *("Visual-Agent/DeepEyes", "RUC-NLPIR/ARPO", "Gen-Verse/ReasonFlux", "GAIR-NLP/LIMR"),
    *("OpenGVLab/ZeroGUI", "guanning03/efficient-reasoning", "satori-reasoning/Satori"),
    *("seamoke/DPH-RL", "complex-reasoning/RPG", "AnitaLeungxx/ReMix-Off-Policy-RFT"),
    *("AdaptVision/AdaptVision", "BaohaoLiao/SAGE", "RazvanDu/ConciseRL"),
    *("mickelliu/selfplay-redteaming", "PRIME-RL/TTRL", "RLHFlow/Minimal-RL"),
    *("haozheji/OpenRLHF", "TsinghuaC3I/MARTI", "sjelassi/ebft_openrlhf"),
    *("ChenxinAn-fdu/POLARIS", "PRIME-RL/SimpleVLA-RL", "RLHFlow/Reinforce-Ada"),
    *("LLM360/Reasoning360", "Simple-Efficient/RL-Factory", "TsinghuaC3I/SSRL", "lasgroup/SDPO"),
)
# Of these, commands that set one of these have a loss that was not read.
_OWN = {"seamoke/DPH-RL": r"data\.sft_files=|[\w.]*sft_loss_mode="}


def right(
    repository: str, checkout: Path, script: Path, words: Sequence[str]
) -> tuple[str | None, int | None]:
    """The gradient of a command and its updates per rollout; ``None`` where not said here.

    ``away`` is the gradient of a KL loss which is subtracted, as verl 0.1 has it.
    """
    if repository not in READ:
        return None, None
    if any(re.match(_OWN.get(repository, "$."), word) for word in words):
        return None, None
    if any(word in ("openrlhf.cli.train_ppo_ray", _ALONE, *_FORKS) for word in words):
        names = ("openrlhf", "marti")
        found = (f / name for f in script.parents for name in names if (f / name).is_dir())
        package = next(found, None)
        if package is None or (_ALONE in words and not (package / "cli/train_ppo.py").is_file()):
            return None, None
        return of_openrlhf(words, _detached(package), _rewards(package)), None
    entry = next((word for word in words if word in ("verl.trainer.main_ppo", *_OTHERS)), None)
    if entry is None:
        return None, None
    package = next(
        (
            place
            for folder in script.parents
            for place in (folder / "verl", folder / "verl" / "verl", folder / "src" / "verl")
            if (place / "trainer" / "config" / "ppo_trainer.yaml").is_file()
            and folder.is_relative_to(checkout)
        ),
        None,
    )
    if package is None:
        return None, None
    trainer = (package / "trainer" / "ppo" / "ray_trainer.py").read_text()
    actor = package / "workers" / "actor" / "dp_actor.py"
    subtracted = actor.is_file() and "policy_loss - kl_loss" in actor.read_text()
    given = defaults(package) if entry not in _OTHERS else _others_defaults(checkout, script, entry)
    if given is None:
        return None, None
    if entry == _RPG:  # its trainer gives kl_loss_type to apply_kl_penalty
        told = (*words, *(w.replace(_TYPE, "algorithm.kl_penalty=") for w in words if _TYPE in w))
        return of_verl(told, given, True), updates(words, given)
    switched = "use_kl_in_reward" in trainer
    # Some copies have the call in a comment.
    applied = re.search(r"^[^#\n]*= *apply_kl_penalty\(", trainer, re.MULTILINE) is not None
    return of_verl(words, given, switched, subtracted, applied), updates(words, given)


_ALONE = "openrlhf.cli.train_ppo"  # without Ray, up to 0.5
# Trainers of forks that were read: the KL is OpenRLHF's, in the reward or as a loss.
_FORKS = (
    *("marti.cli.multi_agent_train_ppo_ray", "marti.cli.train_ppo_ray"),
    *("openrlhf.cli.multi_agent_train_ppo_ray", "examples.mars2.multi_agent_train_ppo_ray"),
    *("openrlhf.cli.train_ebft_ray", "train_ppo_ray.py", "src/train_ppo.py"),
)


def _rewards(package: Path) -> bool:
    """Whether its rewards have a KL: sjelassi's compute_reward takes one and leaves it."""
    return "kl_coef * kl" in (package / "models" / "utils.py").read_text()


def _detached(package: Path) -> bool:
    """Whether the KL loss of packed samples is a tensor of numbers: OpenRLHF 0.6's."""
    files = (package / "trainer" / name for name in ("ppo_trainer.py", "ray/ppo_actor.py"))
    texts = [path.read_text() for path in files if path.is_file()]
    made = re.compile(r"^ *kl_mean = torch\.tensor\(\[each_kl\.mean\(\)", re.MULTILINE)
    return any(made.search(text) for text in texts)


_RPG = "recipe.rpg.src.main_rpg"
_SEQUENCE = "tests/e2e/arithmetic_sequence/rl/main_trainer.py"
_TYPE = f"{_ACTOR}kl_loss_type="
# Trainers with a config of their own, by what hydra.main says in their source.
_OTHERS = {
    _RPG: ("config_name='rpg_trainer'", "recipe/rpg/src/config/rpg_trainer.yaml"),
    _SEQUENCE: (
        "config_name='ray_trainer'",
        _SEQUENCE.replace("main_trainer.py", "config/ray_trainer.yaml"),
    ),
}


def _others_defaults(checkout: Path, script: Path, entry: str) -> dict[str, Any] | None:
    """The defaults of one of these, or of verl's own config where its source names that."""
    said, config = _OTHERS[entry]
    source = f"{entry.replace('.', '/')}.py" if not entry.endswith(".py") else entry
    for folder in script.parents:
        if folder.is_relative_to(checkout) and (folder / source).is_file():
            own = said in (folder / source).read_text()
            name = config if own else "verl/trainer/config/ppo_trainer.yaml"
            return _flat(folder / name) if (folder / name).is_file() else None
    return None


def written(words: Sequence[str], given: dict[str, Any]) -> dict[str, Any] | None:
    """Defaults with the command's overrides; ``None`` where a file that it names decides."""
    settings = dict(given)
    for word in words:
        if re.match(r"(--config|-c[pnd]\b)", word):
            return None
        match = re.match(r"\+{0,2}([\w.@/]+)=(.*)$", word, re.DOTALL)
        if match:
            try:
                settings[match[1]] = yaml.safe_load(match[2]) if match[2] else None
            except yaml.YAMLError:
                settings[match[1]] = match[2]
    return settings


def updates(words: Sequence[str], given: dict[str, Any]) -> int | None:
    """Optimizer steps on one rollout."""
    settings = written(words, given)
    if settings is None:
        return None
    batch = settings.get("data.train_batch_size")
    mini, epochs = (settings.get(_ACTOR + k) for k in ("ppo_mini_batch_size", "ppo_epochs"))
    if not all(isinstance(n, int) and n > 0 for n in (batch, mini, epochs)):
        return None
    return math.ceil(batch / mini) * epochs


def defaults(package: Path) -> dict[str, Any]:
    """A verl package's own defaults, flat."""
    folder = package / "trainer" / "config"
    generated = folder / "_generated_ppo_trainer.yaml"
    return _flat(generated if generated.is_file() else folder / "ppo_trainer.yaml")


def _flat(path: Path) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def flatten(node: Any, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                flatten(value, f"{name}.")
            else:
                flat[name] = value

    flatten(yaml.safe_load(path.read_text()), "")
    return flat


def of_verl(
    words: Sequence[str],
    given: dict[str, Any],
    switched: bool,
    subtracted: bool = False,
    applied: bool = True,
) -> str | None:
    """The gradient; ``None`` where it hangs on a file that the command names.

    Args:
        words: the command's.
        given: the defaults.
        switched: this verl has ``use_kl_in_reward``; else the KL is in the reward by default.
        subtracted: its policy loss has the KL loss with a minus.
        applied: its trainer calls ``apply_kl_penalty``.
    """
    settings = written(words, given)
    if settings is None:
        return None

    def on(key: str) -> bool:
        return str(settings.get(key)).lower() in ("true", "1")

    terms: list[str | None] = []
    if on("distillation.enabled"):
        terms.append(_distilled(settings, on(_DISTILS + "use_policy_gradient")))
        if not on(_DISTILS + "use_task_rewards"):
            return _together(terms)  # distillation_ppo_loss: policy_loss = 0.0
    loss = on(_ACTOR + "use_kl_loss")
    reward = on("algorithm.use_kl_in_reward") if switched else not loss
    if loss and float(settings[_ACTOR + "kl_loss_coef"]) != 0:
        kind = str(settings[_ACTOR + "kl_loss_type"])
        # k3+ and its kin: the value of one estimator, the gradient of k2.
        terms.append("reverse" if kind.endswith("+") else _AS_LOSS.get(kind))
        if kind.startswith("rpg_") and on(f"{_ACTOR}use_iterative_ref_model"):
            # A KL to the policy that made the samples, which is no reference.
            terms[-1] = "neither"
        if subtracted and terms[-1] not in ("zero", None):
            terms[-1] = "away"
    if reward and applied and float(settings["algorithm.kl_ctrl.kl_coef"]) != 0:
        terms.append(_IN_REWARD.get(str(settings["algorithm.kl_penalty"]).removesuffix("+")))
    return _together(terms)


_DISTILS = "distillation.distillation_loss."


def _distilled(settings: dict[str, Any], by_policy: bool) -> str | None:
    """The gradient of the KL to the teacher, by ``trainer/distillation/losses.py`` of verl 0.9.1.

    It is backpropagated, or each token's value, without its gradient, is minus the advantage: of
    k1 that is the derivative of k2.
    """
    kind = str(settings.get(_DISTILS + "loss_mode"))
    if kind == "forward_kl_topk":
        return None if by_policy else "forward"
    if not by_policy:
        return _AS_LOSS.get(kind)
    return "reverse" if kind in ("kl", "k1") else _IN_REWARD.get(kind)


def _together(terms: Sequence[str | None]) -> str | None:
    if None in terms:
        return None
    acting = {term for term in terms if term is not None and term != "zero"}
    if not terms:
        return "none"
    if not acting:
        return "zero"
    return acting.pop() if len(acting) == 1 else "neither"


def of_openrlhf(words: Sequence[str], detached: bool = False, rewards: bool = True) -> str:
    """OpenRLHF's flags, dotted and flat; its default is k1, in the reward, with 0.01.

    Args:
        words: the command's.
        detached: of packed samples its KL loss has no gradient.
        rewards: a KL in the reward is there.
    """
    flags: dict[str, str] = {}
    for at, word in enumerate(words):
        match = re.fullmatch(r"--([\w.]+)(?:=(.*))?", word, re.DOTALL)
        if match:
            after = words[at + 1] if at + 1 < len(words) else ""
            flags[match[1]] = match[2] or ("" if after.startswith("--") else after)

    def flag(*names: str) -> str | None:
        return next((flags[name] for name in names if name in flags), None)

    coef = float(flag("algo.kl.init_coef", "init_kl_coef") or 0.01)
    kind = flag("algo.kl.estimator", "kl_estimator") or "k1"
    if "use_kl_estimator_k3" in flags:
        kind = "k3"
    loss = flag("algo.kl.use_loss", "use_kl_loss") is not None
    if loss and "algo.kl.unbiased_gradient" in flags:
        kind = "k2"
    if coef == 0 or (loss and detached and "packing_samples" in flags) or not (loss or rewards):
        return "none"
    return (_AS_LOSS if loss else _IN_REWARD)[kind]
