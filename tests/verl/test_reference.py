"""The reference that a user names: which model verl's worker loads, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from klplug_verl.plan import Plan
from omegaconf import DictConfig

from klplug.hosting.settings import SettingsError
from klplug.hosting.state import Reference
from tests.references import POLICY, REFUSED, SERVED, made, moved
from tests.verl.engine import nested, own_process
from tests.verl.test_settings import own
from tests.verl.trainer import derived

REF = "actor_rollout_ref.ref"
IN_THIS_PROCESS = (
    f"{REF}.strategy=fsdp2",
    f"{REF}.use_torch_compile=False",
    f"{REF}.log_prob_micro_batch_size_per_gpu=2",
    f"{REF}.fsdp_config.model_dtype=fp32",
    f"+{REF}.fsdp_config.mixed_precision.param_dtype=fp32",
    "actor_rollout_ref.model.use_remove_padding=False",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
)


KEYS = {
    "ref_model": "k2_as_loss",
    "teacher": "k2_as_loss+k2_as_loss,reference=teacher",
}
"""What names a model, and a kl_type with a KL to it."""


def run(path: Path, *overrides: str, key: str = "ref_model") -> tuple[DictConfig, str | None]:
    return derived(*own(KEYS[key], f"+klplug.{key}={path}", *overrides), model=str(POLICY))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("change", REFUSED)
def test_what_reads_other_tokens_is_refused_before_the_run(
    change: Callable[[Path], None], key: str, tmp_path: Path
) -> None:
    place = made(change, tmp_path)
    with pytest.raises(SettingsError) as error:
        run(place, key=key)
    for word in (f"klplug.{key} {place}", *REFUSED[change]):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", KEYS)
def test_a_path_that_is_not_there_is_named(key: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"klplug.{key} .*nowhere: there is no such"):
        run(tmp_path / "nowhere", key=key)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("change", SERVED)
def test_what_reads_the_policys_tokens_is_served_and_said(
    change: Callable[[Path], None], key: str, tmp_path: Path
) -> None:
    place = made(change, tmp_path)
    config, line = run(place, key=key)
    assert line is not None and f"{key}={place}" in line
    assert config.actor_rollout_ref[f"klplug_{key}"] == str(place)  # all that a worker sees
    plan = Plan.of(config)
    assert plan is not None
    role = {"ref_model": "reference", "teacher": "teacher"}[key]
    assert plan.models()[role] == Reference.of(str(place))


def test_the_worker_loads_it_and_the_policy_stays(tmp_path: Path) -> None:
    """verl's own worker, of the role that is a reference alone, against transformers."""
    from transformers import AutoModelForCausalLM
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine_workers import ActorRolloutRefWorker
    from verl.workers.utils.padding import response_from_nested

    place = moved(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    made_config, _ = run(place, *IN_THIS_PROCESS)
    own_process()
    worker = ActorRolloutRefWorker(made_config.actor_rollout_ref, role="ref")
    worker.init_model()
    assert worker.config.model.path == str(POLICY)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 280, (n,), generator=generator) for n in (9, 6)]
    mask = nested([torch.ones(4), torch.ones(2)])
    data = tu.get_tensordict(
        {
            "input_ids": nested(ids),
            "position_ids": nested([torch.arange(len(row)) for row in ids]),
            "prompts": nested([ids[0][:5], ids[1][:4]]),
            "responses": nested([ids[0][5:], ids[1][4:]]),
            "loss_mask": mask,
            "response_mask": mask,
        },
        {
            "temperature": 1.0,
            "calculate_entropy": False,
            "compute_loss": False,
            "pad_mode": "no_padding",
        },
    )
    output = worker.compute_ref_log_prob(data)
    found = response_from_nested(output["log_probs"], mask).unbind()
    for row, answer, got in zip(ids, (4, 2), found, strict=True):
        with torch.no_grad():
            logits = other(row[None]).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(-1, row[1:, None])[-answer:, 0]
        torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-4)
    torch.distributed.destroy_process_group()
