"""One list of refusals: what a run is refused for, its audit says in the same words."""

from __future__ import annotations

from pathlib import Path

import pytest
from klplug_verl.refusals import ROWS
from omegaconf import OmegaConf

from klplug.audit import Report, audit
from klplug.audit.tables import installed
from klplug.hosting.host import hosts
from tests.audit.verdicts import SCRIPTS
from tests.verl.test_settings import BYPASS, DRAWN, MISTAKES, THROWN, TOP_P, own
from tests.verl.trainer import derived

MAIN = ["python", "-m", "verl.trainer.main_ppo", "algorithm.adv_estimator=grpo"]
GROUP = "actor_rollout_ref.rollout.n=2"  # as derived() has it
MOVES = ("+klplug.kl_ctrl=adaptive", "+klplug.kl_target=1")


def report(overrides: list[str]) -> Report:
    return audit([*MAIN, GROUP, *overrides])


def refusals(overrides: list[str]) -> list[str]:
    found = [f for f in report(overrides).findings if f.id == "klplug-refuses"]
    return [finding.message.removeprefix("klplug refuses to start: ") for finding in found]


@pytest.mark.parametrize("overrides", [overrides for overrides, _ in MISTAKES])
def test_the_audit_refuses_what_the_run_refuses_with_the_same_words(overrides: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        derived(*overrides)
    assert f"{str(error.value).rstrip('.')}." in refusals(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        own("k2_as_loss"),
        own("k1_in_reward,baseline=group"),
        own("k3_in_reward+k3_as_loss", "algorithm.adv_estimator=rloo"),
        own("none", "actor_rollout_ref.actor.use_kl_loss=True"),
        own("k2_as_loss,horizon=sequence", TOP_P),
        own("k2_as_loss,horizon=sequence", BYPASS),
        own("k2_as_loss,reference=old", BYPASS),
        own("k1_in_reward", "algorithm.use_pf_ppo=True"),
        own("k2_as_loss,horizon=sequence", *DRAWN, "++trainer.use_v1=False"),
        own("k1_in_reward", *DRAWN, "++trainer.use_v1=False"),
        ["+klplug.kl_type=none", *THROWN],
        own("k1_in_reward", "distillation.enabled=True"),
    ],
)
def test_the_audit_refuses_nothing_that_starts(overrides: list[str]) -> None:
    derived(*overrides)
    assert refusals(overrides) == []


def test_the_main_of_0_8_that_has_a_trainer_inside_is_refused() -> None:
    # tests/verl/test_releases.py starts it.
    found = audit(["python", "-m", "verl.trainer.main_ppo_sync", GROUP, *own("k2_as_loss")])
    (refused,) = (f.message for f in found.findings if f.id == "klplug-refuses")
    assert "does not reach the trainer inside of verl.trainer.main_ppo_sync" in refused
    assert found.after is None


@pytest.mark.parametrize(
    ("trainer", "overrides", "word"),
    [
        ("recipe.dapo.main_dapo", own("k1_in_reward"), "k1_in_reward is in the reward"),
        ("recipe.entropy.main_entropy", own("k2_as_loss", *MOVES), "kl_ctrl=adaptive"),
        ("recipe.sppo.main_sppo", own("k2_as_loss,weight=positive"), "weight=positive"),
        ("recipe.prime.main_prime", own("k3_in_reward+k2_as_loss"), "k3_in_reward is in"),
        ("verl.experimental.one_step_off_policy.main_ppo", own("k2_as_loss"), "one-step-off"),
    ],
)
def test_a_trainer_of_its_own_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, trainer: str, overrides: list[str], word: str
) -> None:
    monkeypatch.setattr("klplug_verl.keys.started", lambda: trainer)
    with pytest.raises(ValueError, match=word) as error:
        derived(*overrides)
    found = audit(["python", "-m", trainer, *MAIN[3:], GROUP, *overrides]).findings
    (refused,) = (f.message for f in found if f.id == "klplug-refuses")
    assert refused == f"klplug refuses to start: {error.value}."


def test_a_recipe_with_a_fit_of_its_own_has_a_kl_as_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = "recipe.dapo.main_dapo"
    monkeypatch.setattr("klplug_verl.keys.started", lambda: trainer)
    derived(*own("k2_as_loss"))
    report = audit(["python", "-m", trainer, *MAIN[3:], GROUP, *own("k2_as_loss")])
    assert not {"klplug-refuses", "another-trainer"} & {f.id for f in report.findings}


# main_ppo's config has all that the first looks for; the others have a test of their own above.
ELSEWHERE = {"another_main", "synchronous_trainer", "own_fit"}


def test_every_row_is_among_the_mistakes() -> None:
    reached = set()
    for overrides, _ in MISTAKES:
        reached |= {refusal.id for refusal in hosts()["verl"].refused(_settings(overrides))}
    assert reached - {"asked"} == {row.__name__ for row in ROWS} - ELSEWHERE


def _settings(overrides: list[str]):  # type: ignore[no-untyped-def]
    from klplug_verl import command, reading

    from klplug.audit.settings import Launch
    from klplug.audit.shell import Word

    words = tuple(Word(word) for word in [*MAIN, GROUP, *overrides])
    table = installed("verl")
    assert table is not None
    return reading.settings(table, command.parsed(Launch(words, 2, Path("."))), "installed")


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("verl-*.sh")), ids=lambda path: path.stem)
def test_advice_once_taken_is_accepted(path: Path) -> None:
    said = audit(path)
    if said.after is None:
        assert said.recommended == "none"
        return
    overrides = [word for word in said.after[3:] if not word.startswith("--")]
    if "megatron" in path.stem:
        overrides.append("model_engine=megatron")
    config, line = derived(*overrides)
    assert config.klplug.kl_type == said.recommended
    assert line is not None and "overrides" not in line  # all that is overridden was deleted
    again = audit(said.after)
    assert again.kl_type == said.recommended
    assert "klplug-refuses" not in [finding.id for finding in again.findings]
    assert OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss") is not None


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("verl-*.sh")), ids=lambda path: path.stem)
def test_the_two_words_of_the_advice_start_the_script_as_it_is(path: Path) -> None:
    """A person appends them, and deletes nothing."""
    said = audit(path)
    if said.after is None:
        return
    from tests.verl.test_audit import words

    added = [word for word in said.after if "klplug." in word]
    overrides = [w.text for w in words(path) if "=" in w.text and not w.text.startswith("--")]
    kept = [w for w in overrides if not w.lstrip("+").startswith("klplug.")]
    if "megatron" in path.stem:
        added.append("model_engine=megatron")
    if any(w == "algorithm.kl_ctrl.type=adaptive" for w in kept):
        with pytest.raises(ValueError, match=r"write \+klplug\.kl_ctrl=adaptive"):
            derived(*kept, *added)
        return
    config, _ = derived(*kept, *added)
    assert config.klplug.kl_type == said.recommended
