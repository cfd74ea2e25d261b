"""The reference that a user names: which model OpenRLHF's actors load, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from klplug_openrlhf import launcher
from klplug_openrlhf.hooks import COMMAND
from klplug_openrlhf.plan import Plan

from klplug.hosting.state import Reference
from tests.openrlhf.command_line import settled
from tests.openrlhf.trainer import arguments
from tests.references import POLICY, REFUSED, SERVED, made, more_padding, same


def run(reference: Path, kl_type: str = "k2_as_loss", *words: str) -> Any:
    flags = [
        *("--actor.model_name_or_path", str(POLICY), "--data.prompt_dataset", "hub/data"),
        *("--reward.remote_url", "reward.py", "--vllm.num_engines", "1"),
        *("--klplug.kl_type", kl_type, "--klplug.kl_coef", "0.1", "--data.apply_chat_template"),
        *("--klplug.ref_model", str(reference), *words),
    ]
    return settled(launcher.main, flags)[0]


@pytest.mark.parametrize("change", REFUSED)
def test_what_reads_other_tokens_is_refused_before_the_run(
    change: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = made(change, tmp_path)
    with pytest.raises(SystemExit):
        run(place)
    error = capsys.readouterr().err
    assert error.startswith("klplug: error: klplug.ref_model") and error.count("\n") == 1
    for word in (str(place), *REFUSED[change]):
        assert word in error


@pytest.mark.parametrize("change", SERVED)
def test_what_reads_the_policys_tokens_is_served_and_said(
    change: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = made(change, tmp_path)
    args = run(place)
    assert f"ref_model={place}" in capsys.readouterr().out
    plan = Plan.of(args)
    assert plan is not None and plan.reference() == Reference.of(str(place))


def test_whole_distributions_need_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(made(same, tmp_path), "exact_as_loss")
    with pytest.raises(SystemExit):
        run(made(more_padding, tmp_path), "exact_as_loss")
    assert "the same number are needed" in capsys.readouterr().err


def sent(actor_type: Any, args: Any) -> list[Any]:
    """What each actor of a group is told to load."""
    from openrlhf.trainer.ray.launcher import RayActorGroup

    group = object.__new__(RayActorGroup)
    group.ray_actor_type = actor_type
    call = SimpleNamespace(remote=lambda *given: given)
    group._actor_handlers = [SimpleNamespace(init_model_from_pretrained=call)] * 2
    return group.async_init_model_from_pretrained(SimpleNamespace(args=args), "policy")


@pytest.fixture
def args() -> Iterator[Any]:
    """OpenRLHF's, in a process to which the launcher did what it does to its own."""
    made = arguments()  # runs a command line, and ends as its process does
    COMMAND.apply()
    yield made
    COMMAND.restore()


def test_the_references_actors_load_it_and_no_others(args: Any) -> None:
    from openrlhf.trainer.ray.launcher import ReferenceModelActor, RewardModelActor
    from openrlhf.trainer.ray.ppo_actor import PolicyModelActor

    args.klplug = SimpleNamespace(kl_type="k2_as_loss", kl_coef=0.1, ref_model="teacher")
    assert [path for _, path in sent(ReferenceModelActor, args)] == ["teacher", "teacher"]
    for other in (RewardModelActor, PolicyModelActor):
        assert [path for _, path in sent(other, args)] == ["policy", "policy"]
    args.klplug.ref_model = None
    assert [path for _, path in sent(ReferenceModelActor, args)] == ["policy", "policy"]
