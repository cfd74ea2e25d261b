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

KEYS = {
    "ref_model": "k2_as_loss",
    "teacher": "k2_as_loss+k2_as_loss,reference=teacher",
}
"""What names a model, and a kl_type with a KL to it."""


def run(path: Path, kl_type: str = "k2_as_loss", key: str = "ref_model", *more: str) -> Any:
    flags = [
        *("--actor.model_name_or_path", str(POLICY), "--data.prompt_dataset", "hub/data"),
        *("--reward.remote_url", "reward.py", "--vllm.num_engines", "1"),
        *("--klplug.kl_type", kl_type, "--klplug.kl_coef", "0.1", "--data.apply_chat_template"),
        *(f"--klplug.{key}", str(path), *more),
    ]
    return settled(launcher.main, flags)[0]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("change", REFUSED)
def test_what_reads_other_tokens_is_refused_before_the_run(
    change: Callable[[Path], None], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = made(change, tmp_path)
    with pytest.raises(SystemExit):
        run(place, KEYS[key], key)
    error = capsys.readouterr().err
    assert error.startswith(f"klplug: error: klplug.{key} {place}") and error.count("\n") == 1
    for word in (str(place), *REFUSED[change]):
        assert word in error


@pytest.mark.parametrize("key", KEYS)
def test_a_path_that_is_not_there_is_named(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "nowhere", KEYS[key], key)
    said = f"klplug.{key} {tmp_path}/nowhere: there is no such folder"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("change", SERVED)
def test_what_reads_the_policys_tokens_is_served_and_said(
    change: Callable[[Path], None], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = made(change, tmp_path)
    args = run(place, KEYS[key], key)
    assert f"{key}={place}" in capsys.readouterr().out
    plan = Plan.of(args)
    assert plan is not None
    role = {"ref_model": "reference", "teacher": "teacher"}[key]
    assert plan.models()[role] == Reference.of(str(place))


@pytest.mark.parametrize("key", KEYS)
def test_beside_a_policy_with_an_adapter_it_is_a_whole_model(key: str, tmp_path: Path) -> None:
    """OpenRLHF's reference has no adapter, whichever model it is."""
    args = run(made(same, tmp_path), KEYS[key], key, "--ds.lora.rank", "8")
    assert args.ds.lora.rank == 8 and args.algo.kl.init_coef == 0.1


def test_whole_distributions_need_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(made(same, tmp_path), "exact_as_loss")
    padded = made(more_padding, tmp_path)
    with pytest.raises(SystemExit):
        run(padded, "exact_as_loss")
    assert "the same number are needed" in capsys.readouterr().err
    run(padded, "exact_as_loss+k2_as_loss,reference=teacher", "teacher")  # of tokens alone


def sent(actor_type: Any, args: Any) -> list[Any]:
    """What each actor of a group is told to load."""
    from openrlhf.trainer.ray.launcher import RayActorGroup

    group = object.__new__(RayActorGroup)
    group.ray_actor_type = actor_type
    call = SimpleNamespace(remote=lambda *given: given)
    handle = SimpleNamespace(init_model_from_pretrained=call, execute_batch=call)
    group._actor_handlers = [handle] * 2
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


def test_after_it_they_load_the_teacher(args: Any) -> None:
    from openrlhf.trainer.ray.launcher import ReferenceModelActor
    from openrlhf.trainer.ray.ppo_actor import PolicyModelActor

    args.klplug = SimpleNamespace(kl_type=KEYS["teacher"], kl_coef=0.1, teacher="teacher")
    teach = ("klplug_teach", {"path": "teacher"}, 0, 0)
    first, second, *others = sent(ReferenceModelActor, args)
    assert [first[1], second[1]] == ["policy", "policy"] and others == [teach, teach]
    assert [path for _, path in sent(PolicyModelActor, args)] == ["policy", "policy"]
