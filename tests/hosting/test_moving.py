"""A reference that follows the policy: its arithmetic on one rank, and what a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from klplug.hosting.moving import Follower, Place, check_alike
from klplug.hosting.ref_update import RefUpdate
from klplug.hosting.state import StateError


@pytest.mark.parametrize(
    ("written", "every", "decay"),
    [
        ("reset:200", 200, 0.0),
        ("reset:1", 1, 0.0),
        ("ema:0.99,every=10", 10, 0.99),
        ("ema:.5", 1, 0.5),
        ("ema:1e-3,every=7", 7, 0.001),
    ],
)
def test_what_is_written_is_read(written: str, every: int, decay: float) -> None:
    assert RefUpdate.parse(written) == RefUpdate(every, decay)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("", ["'' is unknown", "reset:200", "ema:0.99,every=10"]),
        ("mean:3", ["'mean' is unknown", "reset:N"]),
        ("200", ["'200' is unknown"]),
        ("reset", ["N is ''", "from 1 up"]),
        ("reset:0", ["N is '0'", "from 1 up"]),
        ("reset:-5", ["N is '-5'"]),
        ("reset:2.5", ["N is '2.5'"]),
        ("reset:200,every=3", ["'every=3' is too much"]),
        ("ema", ["the decay is ''", "above 0 and below 1"]),
        ("ema:0", ["the decay is '0'"]),
        ("ema:1", ["the decay is '1'"]),
        ("ema:1.5", ["the decay is '1.5'"]),
        ("ema:nan", ["the decay is 'nan'"]),
        ("ema:slow", ["the decay is 'slow'"]),
        ("ema:0.9,every=0", ["every is '0'"]),
        ("ema:0.9,10", ["the option '10' is unknown"]),
        ("ema:0.9,evry=10", ["the option 'evry' is unknown"]),
        ("ema:0.9,every=1,every=2", ["'every=1,every=2' is too much"]),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(written: str, told: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        RefUpdate.parse(written)
    for word in (f"klplug.ref_update={written}: ", *told):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_it_follows_after_whole_multiples_of_every() -> None:
    due = [step for step in range(1, 31) if RefUpdate(every=10).is_due(step)]
    assert due == [10, 20, 30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_reset_is_the_policy_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    reference = torch.zeros(7, 5, dtype=dtype)
    Follower(0.0).follow("w", reference, policy)
    assert torch.equal(reference, policy.to(dtype))


def test_an_average_is_that_of_the_formula() -> None:
    """ref_k = d^k ref_0 + (1 - d) sum_j d^(k-j) policy_j, by hand in float64."""
    generator = torch.Generator().manual_seed(0)
    start, *policies = torch.randn(6, 11, generator=generator, dtype=torch.float64)
    reference, follower = start.clone(), Follower(0.9)
    for policy in policies:
        follower.follow("w", reference, policy)
    k = len(policies)
    parts = [0.1 * 0.9 ** (k - j) * policy for j, policy in enumerate(policies, 1)]
    expected = 0.9**k * start + torch.stack(parts).sum(0)
    torch.testing.assert_close(reference, expected, rtol=1e-14, atol=1e-15)
    assert not follower.average  # it is wide enough itself


def test_in_16_bits_an_average_does_not_stand_still() -> None:
    """100 updates of 1 % to a policy 2 % away: 63 % of the way, and rounded only at its end."""
    start = torch.linspace(0.5, 2, 64).to(torch.bfloat16)
    policy = start.double() * 1.02
    reference, follower = start.clone(), Follower(0.99)
    naive = start.clone()
    for _ in range(100):
        follower.follow("w", reference, policy)
        naive.lerp_(policy.to(torch.bfloat16), 0.01)
    expected = policy + 0.99**100 * (start.double() - policy)
    # Half of the last of bfloat16's 8 bits, and what float32 adds up to.
    assert float((reference.double() / expected - 1).abs().max()) < 2**-8
    assert float((reference.double() / expected - 1).mean().abs()) < 5e-4
    assert torch.equal(naive, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_run_that_was_ended_goes_on_as_if_it_had_not(
    decay: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(1)
    start, *policies = torch.randn(7, 9, generator=generator).to(dtype)
    whole, first = start.clone(), start.clone()
    follower, before = Follower(decay), Follower(decay)
    for policy in policies:
        follower.follow("w", whole, policy)
    for policy in policies[:3]:
        before.follow("w", first, policy)
    Place(tmp_path, 1, 2).save(3, before.kept({"w": first}))

    second, after = start.clone(), Follower(decay)
    step, saved = Place(tmp_path, 1, 2).load({"w": second})
    after.restore("w", second, saved["w"])
    assert step == 3 and torch.equal(second, first)
    for policy in policies[3:]:
        after.follow("w", second, policy)
    assert torch.equal(second, whole)


def test_what_is_kept_of_a_view_is_its_own_numbers_alone(tmp_path: Path) -> None:
    """Engines keep all of a model in one buffer, which torch.save would write for each part."""
    buffer = torch.zeros(1 << 20)
    Place(tmp_path, 0, 1).save(1, Follower(0.0).kept({"w": buffer[:8], "v": buffer[8:16]}))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 1 << 16


def test_what_is_missing_or_cut_short_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"rank_0.pt is missing, and .* had moved\. Resume"):
        Place(tmp_path, 0, 2).load({})
    for rank in range(4):
        Place(tmp_path, rank, 4).save(3, {"w": torch.ones(99)})
    with pytest.raises(StateError, match=r"_2_rank_0.pt is missing.*world_size_4_rank_3"):
        Place(tmp_path, 0, 2).load({})
    path = Place(tmp_path, 0, 4).path
    for size in (0, 20, path.stat().st_size // 2):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(StateError, match=r"rank_0.pt can't be read .* Resume from another"):
            Place(tmp_path, 0, 4).load({})


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"a": (3, 2), "b": (5,)}, r"of b it has \[4\], and this process \[5\]"),
        ({"a": (6,), "b": (4,)}, r"of a it has \[3, 2\], and this process \[6\]"),
        ({"a": (3, 2)}, r"of b it has \[4\], and this process nothing"),
        ({"a": (3, 2), "b": (4,), "c": (1,)}, r"of c it has nothing, and this process \[1\]"),
    ],
)
def test_a_reference_of_another_architecture_or_cut_otherwise_is_named(
    held: dict[str, tuple[int, ...]], told: str, tmp_path: Path
) -> None:
    """A shape that spreads over another one would be taken without a word."""
    Place(tmp_path, 0, 1).save(3, {"a": torch.ones(3, 2), "b": torch.ones(4)})
    here = {name: torch.zeros(shape) for name, shape in held.items()}
    with pytest.raises(StateError, match=rf"_1_rank_0.pt is of another reference.*{told}\. Res"):
        Place(tmp_path, 0, 1).load(here)


def test_what_an_earlier_run_left_at_the_same_step_goes(tmp_path: Path) -> None:
    """It was of other ranks, or moved where this one has not: a resume would take it."""
    weights = {"w": torch.ones(2)}
    for rank in range(4):
        Place(tmp_path, rank, 4).save(3, weights)
    for rank in (1, 0):  # in any order
        Place(tmp_path, rank, 2).save(3, weights)
    kept = [f"klplug_reference_world_size_2_rank_{rank}.pt" for rank in range(2)]
    (tmp_path / "model_world_size_4_rank_0.pt").touch()
    assert sorted(p.name for p in tmp_path.glob(Place.PATTERN)) == kept
    Place(tmp_path, 1, 2).clear()
    Place(tmp_path, 0, 2).clear()
    assert [p.name for p in tmp_path.iterdir()] == ["model_world_size_4_rank_0.pt"]
    Place(tmp_path / "not there yet", 0, 2).clear()


def test_models_of_other_tensors_are_told_apart() -> None:
    policy: dict[str, tuple[int, ...]] = {"a": (3, 2), "b": (4,)}
    check_alike(policy, dict(policy))
    for reference, told in (
        ({"a": (3, 2), "b": (5,)}, r"of b the policy has \[4\] here and the reference \[5\]"),
        ({"a": (3, 2)}, r"of b the policy has \[4\] here and the reference nothing"),
        ({**policy, "c": (1,)}, r"of c the policy has nothing here and the reference \[1\]"),
    ):
        with pytest.raises(ValueError, match=told):
            check_alike(policy, reference)
