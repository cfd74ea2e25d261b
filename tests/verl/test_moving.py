"""ref_update on verl's own worker: its FSDP engines of policy and reference, and its trainers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from klplug_verl.moving import STEP_KEY, parts

from benchmarks.measure import peak_bytes
from klplug.hosting.settings import SettingsError
from klplug.hosting.state import StateError, moved
from tests.ranks import on_two_ranks
from tests.references import POLICY
from tests.verl.exact import THROUGH, Run
from tests.verl.moving import log_probs, train, whole, words
from tests.verl.test_settings import own
from tests.verl.test_trainer import saving
from tests.verl.trainer import TRAINERS, derived
from tests.verl.trainer import trainer as made_trainer

pytestmark = pytest.mark.usefixtures("process")


@pytest.fixture(params=["fsdp", "fsdp2"])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_reference_becomes_the_policy(strategy: str, reference: Path) -> None:
    run = Run(*words("reset:2", reference, strategy=strategy))
    before = log_probs(run, "reference")  # a forward, which leaves the outermost layer whole
    assert (before - log_probs(run, "policy")).abs().mean() > 0.01
    train(run, 0.01, 1)
    assert torch.equal(log_probs(run, "reference"), before)
    run.worker.actor.klplug_moving.follow(2)
    after = log_probs(run, "reference")
    assert torch.equal(after, log_probs(run, "policy")) and not torch.equal(after, before)
    train(run, 0.01, 2)
    assert torch.equal(log_probs(run, "reference"), after)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_average_is_that_of_all_policies(
    strategy: str, dtype: str, reference: Path, tmp_path: Path
) -> None:
    """By hand in float64; where the reference is in bfloat16, rounded once."""
    narrow = f"actor_rollout_ref.ref.fsdp_config.model_dtype={dtype}"
    run = Run(*words("ema:0.9", reference, narrow, strategy=strategy))
    moving = run.worker.actor.klplug_moving
    expected = {name: p.double() for name, p in whole(run, "reference").items()}
    for number in range(1, 9):
        log_probs(run, "reference")
        train(run, 0.005, number)
        moving.follow(number)
        for name, policy in whole(run, "policy").items():
            expected[name] = 0.9 * expected[name] + 0.1 * policy.double()
        if number == 5:  # ended here, and gone on with
            moving.save(tmp_path)
            moving.follow(99)
            moving.follower.average.clear()
            moving.load(tmp_path)
            assert moving.step == 5
    for name, found in whole(run, "reference").items():
        near = 2**-8 if dtype == "bf16" else 1e-5
        torch.testing.assert_close(found.double(), expected[name], rtol=near, atol=1e-6)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_it_follows_after_the_updates_of_a_step_that_is_due(
    trainer: str, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through verl's own trainer and worker: reference, update, and then it moves."""
    run = Run(*words("ema:0.9,every=3", reference, trainer=trainer))
    moving, order = run.worker.actor.klplug_moving, list[str]()
    engine = run.worker.actor.engine
    record = engine.optimizer_step
    engine.optimizer_step = lambda: order.append("update") or record()
    infer = run.worker.ref.infer_batch
    run.worker.ref.infer_batch = lambda *a, **k: order.append("reference") or infer(*a, **k)
    monkeypatch.setattr(moving, "follow", lambda step: order.append(f"moves after {step}"))
    for run.step in range(1, 4):
        order.clear()
        THROUGH[trainer](run)
        moves = ["moves after 3"] if run.step == 3 else []
        assert order == ["reference", *["update"] * (len(order) - 1 - len(moves)), *moves]
        assert "update" in order


def test_a_step_of_several_updates_moves_it_once_at_its_end() -> None:
    if "v1" not in TRAINERS:
        pytest.skip("this verl has no v1 trainer")
    from klplug_verl.trainer import update_actor

    made = made_trainer(*own("k2_as_loss", "+klplug.ref_update=reset:1"))
    made.global_steps, made.parameter_sync_step, made.klplug.joined = 7, 3, True
    sent = []
    for made.local_trigger_step in range(3):
        batch = SimpleNamespace(extra_info={})
        metrics = {"klplug/active": 1.0}

        def original(batch: Any, metrics: Any) -> Any:
            return batch

        update_actor(original, made, (batch, metrics), {})
        sent.append(batch.extra_info.get(STEP_KEY))
    assert sent == [None, None, 7] and made.klplug.models["reference"].step == 7


def test_the_workers_checkpoint_has_it(reference: Path, tmp_path: Path) -> None:
    """Of FSDP 2: torch can't load a checkpoint of the other's on a CPU."""
    contents = [
        f"actor_rollout_ref.actor.checkpoint.{way}_contents=[model]" for way in ("save", "load")
    ]
    run = Run(*words("reset:2", reference, *contents))
    run.worker.save_checkpoint(str(tmp_path / "first"))
    assert not list((tmp_path / "first").glob("klplug_reference*"))  # as it was loaded
    train(run, 0.01, 1)
    run.worker.actor.klplug_moving.follow(2)
    train(run, 0.01, 2)
    run.worker.save_checkpoint(str(tmp_path / "second"))
    expected = whole(run, "reference")

    second = Run(*words("reset:2", reference, *contents))
    second.worker.load_checkpoint(str(tmp_path / "second"))
    assert second.worker.actor.klplug_moving.step == 2
    for name, found in whole(second, "reference").items():
        assert torch.equal(found, expected[name]), name
    assert torch.equal(log_probs(second, "reference"), log_probs(run, "reference"))
    assert not torch.equal(log_probs(second, "policy"), log_probs(second, "reference"))

    without = Run(*words(None, reference, *contents))
    without.worker.load_checkpoint(str(tmp_path / "second"))  # it stays where it was left
    assert all(torch.equal(p, expected[n]) for n, p in whole(without, "reference").items())

    own = [word for word in words(None, None, *contents) if "klplug" not in word]
    stock = Run(*own, "actor_rollout_ref.actor.use_kl_loss=True")
    before = whole(stock, "reference")
    stock.worker.load_checkpoint(str(tmp_path / "second"))  # as without klplug
    assert all(torch.equal(p, before[n]) for n, p in whole(stock, "reference").items())
    assert not all(torch.equal(p, expected[n]) for n, p in before.items())
    (file,) = (tmp_path / "second").glob("klplug_reference*")
    file.rename(file.with_name("klplug_reference_world_size_2_rank_0.pt"))
    with pytest.raises(StateError, match=r"_1_rank_0.pt is missing.*\(there: .*_size_2_rank_0"):
        second.worker.load_checkpoint(str(tmp_path / "second"))


def test_what_an_earlier_run_left_in_the_folder_goes_where_none_has_moved(
    reference: Path, tmp_path: Path
) -> None:
    """Another run of the same folder came to this step before, and its reference had moved."""
    run = Run(*words("reset:2", reference))
    moving, before = run.worker.actor.klplug_moving, whole(run, "reference")
    moving.follow(2)
    moving.save(tmp_path)
    second = Run(*words("reset:200", reference)).worker.actor.klplug_moving
    second.save(tmp_path)
    assert not list(tmp_path.iterdir())
    third = Run(*words("reset:200", reference))
    third.worker.actor.klplug_moving.load(tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in whole(third, "reference").items())


def test_a_teacher_beside_it_stays_where_it_is(reference: Path, tmp_path: Path) -> None:
    kl_type = "0.5*k2_as_loss+0.5*k2_as_loss,reference=teacher"
    run = Run(*words("reset:1", reference, f"+klplug.teacher={POLICY}", kl_type=kl_type))
    moving, second = run.worker.actor.klplug_moving, run.worker.ref.klplug_teacher
    before, taught = parts(run.worker.ref), parts(second)
    before, taught = ({n: p.clone() for n, p in own.items()} for own in (before, taught))
    train(run, 0.01, 1)
    moving.follow(1)
    moving.save(tmp_path)
    moving.load(tmp_path)
    assert all(torch.equal(p, taught[n]) for n, p in parts(second).items())
    assert not any(torch.equal(p, before[n]) for n, p in parts(run.worker.ref).items())


@pytest.mark.parametrize(
    ("ref_update", "dtype", "copies"), [("reset:1", "fp32", 0), ("ema:0.9", "bf16", 1)]
)
def test_a_move_holds_one_parameter_at_a_time(
    strategy: str, reference: Path, ref_update: str, dtype: str, copies: int
) -> None:
    """Nothing where numbers are only copied; for an average the policy's part in float32."""
    narrow = f"actor_rollout_ref.ref.fsdp_config.model_dtype={dtype}"
    run = Run(*words(ref_update, reference, narrow, strategy=strategy))
    moving = run.worker.actor.klplug_moving
    moving.follow(1)  # which makes the averages that stay
    sizes = [p.numel() for p in whole(run, "policy").values()]
    assert sum(sizes) > 8 * max(sizes)
    assert peak_bytes(lambda: moving.follow(2)) <= 4 * copies * max(sizes)


def test_the_hidden_states_meet_the_matrix_of_the_moved_reference(reference: Path) -> None:
    run = Run(*words("reset:1", reference, kl_type="exact_as_loss"))
    THROUGH[TRAINERS[0]](run)
    shared = run.worker.actor.engine.klplug_exact
    assert shared.matrix is None  # it moved after that step, and is taken anew
    train(run, 0.01, 1)
    log_probs(run, "reference")
    found = shared.matrix.weight.float()
    weights = whole(run, "reference")
    expected = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    assert torch.equal(found, expected.float())


def test_a_reference_cut_otherwise_is_refused_before_the_first_step(reference: Path) -> None:
    other = "actor_rollout_ref.ref.fsdp_config.use_orig_params=False"
    settings = words("reset:1", reference, other, strategy="fsdp")
    with pytest.raises(SettingsError, match="cut alike over processes"):
        Run(*settings)


@pytest.mark.parametrize(
    ("strategy", "ref_update"),
    [
        ("fsdp2", "ema:0.5"),
        pytest.param("fsdp", "reset:1", marks=pytest.mark.slow),
        pytest.param("fsdp2", "reset:1", marks=pytest.mark.slow),
        pytest.param("fsdp", "ema:0.5", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_hold_halves_and_send_nothing(
    strategy: str, reference: Path, ref_update: str, tmp_path: Path
) -> None:
    gpus = "trainer.n_gpus_per_node=2"
    settings = words(ref_update, reference, gpus, strategy=strategy, micro_batch=2)
    found = on_two_ranks("tests.verl.moving", tmp_path, *settings)
    half = 0.5 if ref_update == "ema:0.5" else 0.0
    for name, reference_now in found["reference"].items():
        start, policy = found["start"][name].double(), found["policy"][name].double()
        expected = half * start + (1 - half) * policy
        torch.testing.assert_close(reference_now.double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(found["restored"][name], reference_now)
    before, after = found["of"]
    assert (after - before).abs().mean() > 0.001
    kept = sorted(p.name for p in (tmp_path / "actor").glob("*.pt"))
    assert kept == [f"klplug_reference_world_size_2_rank_{rank}.pt" for rank in range(2)]


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_trainers_checkpoint_says_of_which_step_it_is(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = own("k2_as_loss", "+klplug.ref_update=reset:5")
    first = saving(kind, tmp_path, *settings)
    first.global_steps = 7
    first._save_checkpoint()
    state = tmp_path / "global_step_7" / "klplug.json"
    assert "step" not in json.loads(state.read_text())["reference"]
    moved(first.klplug.models, 5)
    first._save_checkpoint()
    assert json.loads(state.read_text())["reference"]["step"] == 5

    actor = tmp_path / "global_step_7" / "actor"
    actor.mkdir()
    with pytest.raises(StateError, match=r"actor has no klplug_reference_\*.pt.*after step 5"):
        saving(kind, tmp_path, *settings)._load_checkpoint()
    (actor / "klplug_reference_world_size_1_rank_0.pt").touch()
    capsys.readouterr()
    second = saving(kind, tmp_path, *settings)
    second._load_checkpoint()
    assert second.klplug.models["reference"].step == 5
    said = capsys.readouterr().out
    assert "as the checkpoint has it, last moved after step 5" in said and "WARNING" not in said


def test_the_launch_line_says_it_and_the_workers_are_told() -> None:
    config, line = derived(*own("k2_as_loss", "+klplug.ref_update='ema:0.99,every=10'"))
    assert line is not None and " ref_update=ema:0.99,every=10;" in line
    assert config.actor_rollout_ref.klplug_ref_update == "ema:0.99,every=10"
    assert config.klplug.ref_update == "ema:0.99,every=10"
    for kl_type, told in (("k2_as_loss", "none"), ("k2_as_loss,reference=old", None)):
        config, _ = derived(*own(kl_type))
        assert config.actor_rollout_ref.get("klplug_ref_update") == told
        assert "ref_update" not in config.klplug
