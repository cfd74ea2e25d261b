"""ref_update on the real engines: DeepSpeed's policy and reference, OpenRLHF's trainer, no Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from klplug_openrlhf import moving
from klplug_openrlhf import trainer as of_trainer

from benchmarks.measure import peak_bytes
from klplug.hosting.moving import Follower
from klplug.hosting.settings import SettingsError
from klplug.hosting.state import StateError
from tests.openrlhf.command_line import change
from tests.openrlhf.moving import Pair
from tests.openrlhf.trainer import Bench, configure, tiny_model
from tests.ranks import on_two_ranks

pytestmark = pytest.mark.usefixtures("patched", "one_process")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Policy and reference, which differ in every weight."""
    from transformers import Qwen2ForCausalLM

    first = tiny_model(tmp_path_factory.mktemp("policy"))
    second = tmp_path_factory.mktemp("reference")
    model = Qwen2ForCausalLM.from_pretrained(first, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.to(torch.bfloat16).save_pretrained(second)
    return [first, second]


@pytest.fixture(params=[2, 3], ids=["zero2", "zero3"])
def bench(request: pytest.FixtureRequest, models: list[Path]) -> Bench:
    return Bench(models[0], zero_stage=request.param)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda x: x)


def pair(bench: Bench, models: list[Path]) -> Pair:
    return Pair(bench, models[1])


def trainer(
    pair: Pair,
    ref_update: str | None,
    folder: Path,
    kl_type: str = "k2_as_loss",
    model: str = "hub/model",
) -> Any:
    """OpenRLHF's trainer over the two actors, whose checkpoints lie in a folder."""
    from openrlhf.trainer.ppo_trainer import BasePPOTrainer

    args = pair.args
    configure(args, kl_type)
    args.klplug.ref_update = ref_update
    change(args, "actor.model_name_or_path", model)
    change(args, "ckpt.save_steps", 1)
    change(args, "ckpt.path", str(folder))
    change(args, "ckpt.load_enable", True)
    if pair.states is not None:
        (folder / "_actor").mkdir(exist_ok=True)  # where OpenRLHF looks for a checkpoint
    policy, reference = pair.groups()
    made = BasePPOTrainer(SimpleNamespace(args=args), policy, None, None, reference, None, None)
    made.init_checkpoint_states()
    return made


def step(trainer: Any, number: int) -> None:
    """The updates of one step, as OpenRLHF asks for them: it counts the steps before it."""
    of_trainer.ppo_train(lambda global_steps: {}, trainer, (number - 1,), {})


def saved(trainer: Any, number: int) -> dict[str, Any]:
    """What OpenRLHF's own code hands to the actors to save."""
    trainer.save_logs_and_checkpoints(number, {}, {"global_step": number})
    kept: dict[str, Any] = trainer.actor_model_group.saved
    return kept


def after_a_step(bench: Bench, models: list[Path], folder: Path) -> tuple[Pair, Any]:
    """A pair, and its trainer whose reference has followed once."""
    own = pair(bench, models)
    made = trainer(own, "reset:1", folder)
    step(made, 1)
    return own, made


def test_the_policy_becomes_the_reference_after_every_second_step(
    bench: Bench, models: list[Path], tmp_path: Path
) -> None:
    own = pair(bench, models)
    made = trainer(own, "reset:2", tmp_path)
    before = own.log_probs("reference")  # a forward, which leaves small parameters whole
    assert (before - own.log_probs("policy")).abs().mean() > 0.01
    step(made, 1)
    assert torch.equal(own.log_probs("reference"), before)
    step(made, 2)
    own.train(0.05)
    step(made, 3)
    after = own.log_probs("reference")
    assert not torch.equal(after, before) and not torch.equal(after, own.log_probs("policy"))
    step(made, 4)
    assert torch.equal(own.log_probs("reference"), own.log_probs("policy"))
    assert made.klplug_models["reference"].step == 4


def test_an_average_is_that_of_all_policies(
    bench: Bench, models: list[Path], tmp_path: Path
) -> None:
    """By hand in float64, and rounded to bfloat16 once."""
    own = pair(bench, models)
    made = trainer(own, "ema:0.9,every=2", tmp_path)
    expected = {name: p.double() for name, p in own.whole("reference").items()}
    own.log_probs("reference")
    for number in range(1, 13):
        own.train(0.02)
        step(made, number)
        if number % 2 == 0:
            for name, policy in own.whole("policy").items():
                expected[name] = 0.9 * expected[name] + 0.1 * policy.double()
    for name, found in own.whole("reference").items():
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected[name], rtol=2**-8, atol=1e-6)
        rounded = expected[name].to(torch.bfloat16)
        assert (found != rounded).float().mean() < 0.01  # float32 may fall on the other side
    # The engine's forward is of these very weights.
    plain = own.plain(own.whole("reference"))
    torch.testing.assert_close(own.log_probs("reference"), plain, rtol=0, atol=0.05)


@pytest.mark.parametrize("ref_update", ["reset:2", "ema:0.9,every=2"])
def test_a_run_that_was_killed_goes_on_from_the_reference_that_it_had(
    bench: Bench,
    models: list[Path],
    tmp_path: Path,
    ref_update: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole_run = pair(bench, models)
    made = trainer(whole_run, ref_update, tmp_path)
    policy = whole_run.whole("policy")
    for number in range(1, 4):
        whole_run.train(0.02)
        step(made, number)
    kept = saved(made, 3)
    assert kept["klplug"]["reference"] == {
        "path": "hub/model", "weights": None, "step": 2, "folder": "global_step3"
    }  # fmt: skip
    middle = whole_run.whole("policy")
    whole_run.train(0.02)
    step(made, 4)
    expected = whole_run.whole("reference")
    last = whole_run.whole("policy")

    whole_run.put(policy)
    second = pair(bench, models)  # its reference is as it was loaded
    assert any(not torch.equal(p, expected[n]) for n, p in second.whole("reference").items())
    capsys.readouterr()
    second.states = kept
    resumed = trainer(second, ref_update, tmp_path)
    said = capsys.readouterr().out
    assert "the reference goes on as the checkpoint has it, last moved after step 2" in said
    assert "WARNING" not in said and resumed.klplug_models["reference"].step == 2
    second.put(middle)
    second.put(last)
    step(resumed, 4)
    for name, found in second.whole("reference").items():
        assert torch.equal(found, expected[name]), name


def test_where_it_had_not_moved_nothing_is_kept(
    bench: Bench, models: list[Path], tmp_path: Path
) -> None:
    own = pair(bench, models)
    made = trainer(own, "reset:5", tmp_path)
    step(made, 1)
    assert saved(made, 1)["klplug"]["reference"] == {"path": "hub/model", "weights": None}
    assert not list(tmp_path.iterdir())


def test_a_resume_whose_reference_is_missing_stops_and_names_it(
    bench: Bench, models: list[Path], tmp_path: Path
) -> None:
    own, made = after_a_step(bench, models, tmp_path)
    own.states = saved(made, 1)
    (file,) = tmp_path.rglob("*.pt")
    file.unlink()
    with pytest.raises(StateError, match=r"_reference/global_step1/.*rank_0.pt is missing"):
        trainer(own, "reset:1", tmp_path)


def test_a_resume_to_another_architecture_names_the_file(
    bench: Bench, models: list[Path], tmp_path: Path
) -> None:
    """Without the key nobody compares policy and reference, which take what the file has."""
    own, made = after_a_step(bench, models, tmp_path)
    own.states = saved(made, 1)
    (file,) = tmp_path.rglob("*.pt")
    kept = torch.load(file)
    torch.save(kept | {"weights": {n: w[:1] for n, w in kept["weights"].items()}}, file)
    with pytest.raises(StateError, match=r"rank_0.pt is of another reference.* it has \[1"):
        trainer(own, None, tmp_path)


def test_a_run_that_is_killed_between_the_references_file_and_the_policys(
    bench: Bench, models: list[Path], tmp_path: Path
) -> None:
    """It goes on from the checkpoint before, whose reference is still there."""
    own, made = after_a_step(bench, models, tmp_path)
    before = saved(made, 1)
    (tmp_path / "_actor" / "global_step1").mkdir(parents=True)
    expected = own.whole("reference")
    own.train(0.05)
    step(made, 2)

    def killed(**_: Any) -> None:
        raise KeyboardInterrupt

    (handle,) = made.actor_model_group._actor_handlers
    handle._instead["save_checkpoint"] = killed
    with pytest.raises(KeyboardInterrupt):
        saved(made, 2)
    assert (tmp_path / "_reference" / "global_step2").is_dir()
    own.states = before
    trainer(own, "reset:1", tmp_path)
    assert all(torch.equal(p, expected[n]) for n, p in own.whole("reference").items())


def test_a_teacher_beside_it_stays_where_it_is(
    bench: Bench, models: list[Path], tmp_path: Path
) -> None:
    own, other = pair(bench, models), pair(bench, models)
    own.reference.klplug_teacher = other.models["reference"]
    made = trainer(own, "reset:1", tmp_path)
    before, taught = own.log_probs("reference"), other.log_probs("reference")
    step(made, 1)
    saved(made, 1)
    assert torch.equal(other.log_probs("reference"), taught)
    assert not torch.equal(own.log_probs("reference"), before)
    own.states = made.actor_model_group.saved
    trainer(own, "reset:1", tmp_path)
    assert torch.equal(other.log_probs("reference"), taught)


@pytest.mark.parametrize(("ref_update", "copies"), [("reset:1", 1), ("ema:0.9", 3)])
def test_a_move_holds_one_parameter_at_a_time(
    bench: Bench, models: list[Path], tmp_path: Path, ref_update: str, copies: int
) -> None:
    """Its copy in the object store, and for an average that in float32."""
    own = pair(bench, models)
    made = trainer(own, ref_update, tmp_path)
    step(made, 1)  # which makes the averages that stay
    sizes = [p.numel() for p in own.whole("policy").values()]
    assert sum(sizes) > 8 * max(sizes)
    assert peak_bytes(lambda: step(made, 2)) <= 2 * copies * max(sizes)


def test_old_ones_go_with_the_policys(bench: Bench, models: list[Path], tmp_path: Path) -> None:
    own = pair(bench, models)
    made = trainer(own, "reset:1", tmp_path)
    for number in range(1, 4):
        step(made, number)
        saved(made, number)
        (tmp_path / "_actor" / f"global_step{number}").mkdir(parents=True)
        for old in range(1, number):  # as OpenRLHF does it where it keeps one
            old_folder = tmp_path / "_actor" / f"global_step{old}"
            if old_folder.exists():
                old_folder.rmdir()
    kept = sorted(folder.name for folder in (tmp_path / "_reference").iterdir())
    assert kept == ["global_step2", "global_step3"]  # that of before, until the next is written


def test_all_stay_where_the_policys_lie_on_another_machine(
    bench: Bench, models: list[Path], tmp_path: Path
) -> None:
    own = pair(bench, models)
    made = trainer(own, "reset:1", tmp_path)
    for number in range(1, 4):
        step(made, number)
        saved(made, number)
    kept = sorted(folder.name for folder in (tmp_path / "_reference").iterdir())
    assert kept == ["global_step1", "global_step2", "global_step3"]


def test_the_matrix_that_was_lent_is_lent_again(
    bench: Bench, models: list[Path], tmp_path: Path
) -> None:
    own = pair(bench, models)
    made = trainer(own, "reset:1", tmp_path, "exact_as_loss", str(models[0]))
    own.actors["reference"].klplug_matrix = own.actors["policy"].trainer.klplug_matrix = "stale"
    step(made, 1)
    for actor in (own.actors["reference"], own.actors["policy"].trainer):
        assert not hasattr(actor, "klplug_matrix")


def test_another_architecture_is_refused_before_the_first_step(
    bench: Bench, models: list[Path], tmp_path: Path
) -> None:
    own = pair(bench, models)
    model = own.models["reference"].model.module
    with pytest.MonkeyPatch.context() as patch:
        named = [("embedding", torch.nn.Parameter(torch.zeros(3, 2)))]
        patch.setattr(model, "named_parameters", lambda: named)
        with pytest.raises(SettingsError, match=r"the reference nothing\. Both must be of one"):
            trainer(own, "reset:1", tmp_path)


def test_without_the_key_nothing_moves(bench: Bench, models: list[Path], tmp_path: Path) -> None:
    own = pair(bench, models)
    made = trainer(own, None, tmp_path)
    before = own.whole("reference")
    step(made, 1)
    assert all(torch.equal(p, before[n]) for n, p in own.whole("reference").items())


def test_samples_meet_the_reference_that_they_are_held_to(
    bench: Bench, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenRLHF's own step: the reference's log-probs, then all updates, and then it moves."""
    own = pair(bench, models)
    made = trainer(own, "reset:1", tmp_path, "k1_in_reward")
    order: list[str] = []
    made.tokenizer = SimpleNamespace(decode=lambda *_, **__: ["text"])
    reward = torch.ones(1)
    experience = SimpleNamespace(sequences=torch.ones(1, 3), info={"reward": reward})
    made.experience_maker = SimpleNamespace(
        make_experience_batch=lambda _: order.append("reference's log-probs") or [experience]
    )
    monkeypatch.setattr(made, "_compute_rollout_stats", lambda _: {}, raising=False)
    monkeypatch.setattr(moving, "follow", lambda *_: order.append("moves"))
    made.actor_model_group.async_run_method_batch = lambda **_: []
    made.actor_model_group.fits = lambda: order.append("updates") or {}
    made.train_step([], 0)
    assert order == ["reference's log-probs", "updates", "moves"]


@pytest.mark.parametrize("world", ["alike", pytest.param("other", marks=pytest.mark.slow)])
def test_two_ranks_of_zero3(models: list[Path], tmp_path: Path, world: str) -> None:
    """Each holds half of every parameter; ``other``: as from a policy cut over more ranks."""
    found = on_two_ranks("tests.openrlhf.moving", tmp_path, *map(str, models), world)
    for name, reference in found["reference"].items():
        expected = 0.5 * found["start"][name].double() + 0.5 * found["policy"][name].double()
        torch.testing.assert_close(reference.double(), expected, rtol=2**-8, atol=1e-6)
    apart = (found["log_probs"] - found["plain"]).abs().max()
    assert apart < 0.05 and (found["log_probs"] - found["before"]).abs().mean() > 0.01
    # A rank holds half of each, and what it was sent at once was no more than that.
    if world == "alike":
        assert all(sent == (size + 1) // 2 for sent, size in found["sent"])


def test_a_follower_is_of_the_runs_own_decay(
    bench: Bench, models: list[Path], tmp_path: Path
) -> None:
    own = pair(bench, models)
    trainer(own, "ema:0.75,every=3", tmp_path)
    made = moving.follower(own.actors["reference"])
    assert isinstance(made, Follower) and made.decay == 0.75
