"""What ``klplug audit`` says of OpenRLHF, beside what OpenRLHF's own functions do."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from klplug_openrlhf import command, reading, sources
from klplug_openrlhf.keys import FLAT
from klplug_openrlhf.sources import DETACHED
from torch import Tensor

import klplug
from klplug.audit import audit
from klplug.audit.shell import Script, Word
from klplug.audit.tables import installed, read, stored, versions
from tests.audit.verdicts import SCRIPTS
from tests.one_meaning import BETA, TOLERANCE, batch, loss_gradient
from tests.openrlhf.own_parser import defaults, parser
from tests.openrlhf.test_experience import Samples, advantages
from tests.releases import release

NAMES = ("k1", "k2", "k3")
UNBIASED = "--algo.kl.unbiased_gradient"


def package() -> Path:
    import openrlhf

    return Path(openrlhf.__file__).parent


def report(*flags: str, estimator: str = "group_norm", n: int = 4) -> Any:
    return audit(
        [
            *("python", "-m", "openrlhf.cli.train_ppo_ray", "--algo.kl.init_coef", str(BETA)),
            *("--algo.advantage.estimator", estimator, "--rollout.n_samples_per_prompt", str(n)),
            *flags,
        ]
    )


def as_loss(name: str, *more: str) -> Any:
    return report("--algo.kl.use_loss", "--algo.kl.estimator", name, *more)


# Defaults and flags.


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(read("openrlhf", folder)))
    return found


def test_the_installed_release_is_read_from_its_own_script() -> None:
    here = installed("openrlhf")
    assert here is not None and here.installed
    assert content(package())["defaults"] == stored("openrlhf", here.version).defaults


@pytest.mark.parametrize("version", versions("openrlhf"))
def test_every_table_is_what_its_release_says(version: str) -> None:
    table = stored("openrlhf", version)
    assert content(release("openrlhf", version) / "openrlhf") == {
        "defaults": table.defaults,
        "choices": table.choices,
        "switches": table.switches,
    }


@pytest.mark.parametrize("version", versions("openrlhf"))
def test_flags_are_read_as_argparse_has_them(version: str) -> None:
    theirs = json.loads(json.dumps(defaults(release("openrlhf", version) / "openrlhf")))
    ours = stored("openrlhf", version).defaults
    # What a loop makes of its own values is no written default.
    computed = {key for key in theirs if key.endswith(".adam.lr")}
    assert {k: v for k, v in ours.items() if k not in computed} == {
        k: v for k, v in theirs.items() if k not in computed
    }


@pytest.mark.parametrize("version", versions("openrlhf"))
def test_the_kl_of_every_release_is_known_by_its_code(version: str) -> None:
    found = sources.source(release("openrlhf", version) / "openrlhf")
    assert found.changed == ()
    # 0.9 has the code of 0.10.
    assert found.like in versions("openrlhf")
    clamps = "clamp(min=-10, max=10)" in (found.folder / "models" / "utils.py").read_text()
    assert clamps == (tuple(map(int, found.like.split(".")[:2])) >= (0, 8))
    actor = (found.folder / "trainer" / "ray" / "ppo_actor.py").read_text()
    detached = "torch.tensor([each_kl.mean() for each_kl in kl]" in actor
    assert found.facts == ((DETACHED,) if detached else ())
    assert detached == version.startswith("0.6.")


def words(path: Path) -> list[Word]:
    commands = [command.words for command in Script(path.read_text()).commands]
    found = next(c for c in commands if "openrlhf.cli.train_ppo_ray" in [w.text for w in c])
    return list(found[[w.text for w in found].index("openrlhf.cli.train_ppo_ray") + 1 :])


@pytest.mark.parametrize(
    "name",
    [
        *("openrlhf-grpo", "openrlhf-ppo", "openrlhf-rloo", "openrlhf-reinforce"),
        *("openrlhf-dr-grpo-k2-reward", "openrlhf-gspo", "openrlhf-dapo"),
    ],
)
def test_flags_are_those_of_argparse(name: str) -> None:
    given = words(SCRIPTS / f"{name}.sh")
    theirs = vars(parser(package()).parse_args([word.text for word in given]))
    table = installed("openrlhf")
    assert table is not None
    ours = reading.settings(table, command.arguments(given, through_klplug=False))
    assert not ours.rejected
    for key in FLAT:
        assert ours[key].value == theirs.get(key), key


@pytest.mark.parametrize(
    "flags",
    [
        ["--algo.kl.estimator", "k4"],
        ["--algo.kl.est", "k2"],
        ["--algo.kl", "k2"],
        ["--use_kl_loss"],
        ["--algo.kl.use_loss"],
        ["--algo.kl.target"],
        ["--algo.advantage.estimator", "grpo"],
    ],
)
def test_what_argparse_refuses_is_rejected(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    table = installed("openrlhf")
    assert table is not None
    rejected = reading.settings(
        table, command.arguments([Word(f) for f in flags], through_klplug=False)
    ).rejected
    try:
        parser(package()).parse_args(flags)
        accepted = True
    except SystemExit:
        accepted = False
    assert accepted == (not rejected)


# The gradient.


def value(log_probs: Tensor, ref: Tensor, name: str, **more: Any) -> Tensor:
    from openrlhf.models.utils import compute_approx_kl

    found: Tensor = compute_approx_kl(log_probs, ref, kl_estimator=name, **more)
    return found


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_has_the_gradient_of_the_kl_type_it_is_said_to_be(name: str, unbiased: bool) -> None:
    from openrlhf.models.loss import aggregate_loss

    given = batch()
    log_probs = given.log_probs.clone().requires_grad_(True)
    kl = value(
        log_probs,
        given.ref_log_probs,
        name,
        log_probs_old=given.old_log_probs,
        unbiased_gradient=unbiased,
    )
    (BETA * aggregate_loss(kl, given.response_mask)).backward()
    said = as_loss(name, *([UNBIASED] if unbiased else []))
    assert said.beta_absolute == BETA and said.corrected == unbiased
    torch.testing.assert_close(
        log_probs.grad, loss_gradient(said.kl_type), rtol=TOLERANCE, atol=1e-8
    )


@pytest.mark.parametrize("in_reward", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_named_is_the_gradient_there_is(name: str, in_reward: bool) -> None:
    logits = torch.tensor([0.3, -0.5, 0.9, 0.1, -1.0], requires_grad=True)
    ref = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15]).log()
    log_probs = logits.log_softmax(-1)
    kl = value(log_probs, ref, name)
    score = kl.detach() * log_probs if in_reward else kl

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(x, logits, retain_graph=True)[0]

    found = gradient((log_probs.exp().detach() * score).sum())
    named = {
        "reverse": gradient((log_probs.exp() * (log_probs - ref)).sum()),
        "forward": gradient((ref.exp() * (ref - log_probs)).sum()),
        "zero": torch.zeros(5),
    }
    said = report("--algo.kl.estimator", name).gradient if in_reward else as_loss(name).gradient
    near = {key for key, wanted in named.items() if torch.allclose(found, wanted, atol=1e-6)}
    assert near == ({said} if said != "neither" else set())


# Dead zones.


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_dead_zone_is_where_the_gradient_is_zero(name: str, unbiased: bool) -> None:
    zone = as_loss(name, *([UNBIASED] if unbiased else [])).dead_zone
    log_ratio = torch.linspace(-19.9, 19.9, 20_000)
    log_probs = log_ratio.clone().requires_grad_(True)
    value(log_probs, torch.zeros_like(log_ratio), name, unbiased_gradient=unbiased).sum().backward()
    dead = torch.zeros_like(log_ratio, dtype=torch.bool)
    for low, high in zone:
        dead |= (log_ratio > low) & (log_ratio < high)
    assert log_probs.grad is not None
    assert torch.equal(log_probs.grad == 0, dead)
    assert bool(zone) == (not unbiased)


# Before 0.6 no KL is a loss.
@pytest.mark.parametrize("version", [v for v in versions("openrlhf") if v[:3] not in "0.4 0.5"])
@pytest.mark.parametrize("name", NAMES)
def test_the_dead_zone_is_that_of_every_release(name: str, version: str) -> None:
    # The function alone: a whole older release would not import beside this one.
    source = (release("openrlhf", version) / "openrlhf" / "models" / "utils.py").read_text()
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "compute_approx_kl"
    )
    scope: dict[str, Any] = {"torch": torch, "Optional": Optional, "KL_IS_WEIGHT_CLIP": 10.0}
    exec(compile(ast.Module([function], type_ignores=[]), version, "exec"), scope)
    log_probs = torch.linspace(-19.9, 19.9, 20_000).requires_grad_(True)
    zeros = torch.zeros(20_000)
    scope["compute_approx_kl"](log_probs, zeros, kl_estimator=name).sum().backward()
    flags = f"--init_kl_coef 0.1 --use_kl_loss --kl_estimator {name}"
    if version.startswith(("0.10", "0.11")):
        flags = f"--algo.kl.init_coef 0.1 --algo.kl.use_loss --algo.kl.estimator {name}"
    command = ["python", "-m", "openrlhf.cli.train_ppo_ray", *flags.split()]
    said = audit(command, host_version=version).dead_zone
    # Next to 0 a gradient may round to none.
    dead = sum((log_probs > low) & (log_probs < high) for low, high in said)
    assert torch.equal(
        (log_probs.grad == 0) & (log_probs.abs() > 0.01), dead + torch.zeros(20_000) > 0
    )


# Strength, through OpenRLHF's own experience maker.


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize(
    "estimator",
    ["group_norm", "dr_grpo", "rloo", "reinforce", "reinforce_baseline", "flash_reinforce"],
)
def test_the_factors_are_those_in_the_formulas(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = report(estimator=estimator)
    samples = Samples()
    name = {"algo__advantage__estimator": estimator}

    def rewarded(scale: float, extra: float = 0.0, kl: str = "none") -> Tensor:
        changed = Samples()
        changed.rewards = changed.rewards * scale
        changed.rewards[5] += extra
        return advantages(kl, changed, monkeypatch, **name)[0]

    plain = rewarded(1)
    divided = "sigma" in str(said.beta_absolute) + str(said.beta_relative)
    torch.testing.assert_close(rewarded(2), plain if divided else 2 * plain, rtol=1e-4, atol=1e-5)
    whitened = "/ sigma_batch" in str(said.beta_absolute)
    if not whitened:
        # The KL joins as it is: beta in the update.
        mask = torch.cat([samples.mask(i) for i in range(len(samples.lengths))])
        term = klplug.kl_term("k1_in_reward", samples.policy, samples.reference, mask)
        joined = rewarded(1, kl="stock:k1") - plain
        # advantages() has a coefficient of its own.
        factor = 0.1 / BETA * float(said.beta_absolute)
        wanted = -factor * klplug.reward_to_go(term.coefficient) * mask
        torch.testing.assert_close(joined, wanted, rtol=1e-4, atol=1e-6)
        # What a reward adds to its own advantage, sigma held; its inverse is on beta.
        start = int(samples.mask(5).argmax())
        groups = Samples().rewards.view(3, 4)
        moved = groups.clone()
        moved[1, 1] += 0.3
        sigma = (groups[1].std(), moved[1].std()) if divided else (1.0, 1.0)
        own = (rewarded(1, 0.3)[5, start] * sigma[1] - plain[5, start] * sigma[0]) / 0.3
        relative = float(str(said.beta_relative).split()[0])
        # A mean of all answers has this one too: 12 here, and hundreds in a run.
        batch_mean = 11 / 12 if estimator == "flash_reinforce" else 1.0
        assert float(own) == pytest.approx(BETA / relative * batch_mean, rel=1e-4)
