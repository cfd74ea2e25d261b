"""verl with LoRA: no reference worker; the reference is the policy with its adapter switched off.

Beside verl's own engine, FSDP2 and klplug in it, stands plain transformers with peft and autograd.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.verl.engine import ANSWERS, POLICY, Bench, nested

RANK, ALPHA, COEF = 4, 16, 0.5


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench(lora_rank=RANK)
    yield made
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Any:
    """The same model, adapter and weights, in peft alone."""
    base = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear"
    )
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(3)
    theirs = dict(bench.worker.engine.module.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, p in theirs.items() if p.requires_grad}
    with torch.no_grad():
        for name, own in trained.items():  # B begins at zero: a policy that is its reference
            own.copy_(torch.randn(own.shape, generator=generator) * 0.2)
            theirs[name].to_local().copy_(own)
    return model


@pytest.fixture(scope="module")
def data(bench: Bench, plain: Any) -> Any:
    """A batch as verl's trainer makes it: the reference's log-probs by the policy's own worker."""
    given = bench.batch()
    given["ref_log_prob"] = nested(bench._log_probs(given, no_lora_adapter=True))
    return given


def log_probs(model: Any, data: Any) -> list[Tensor]:
    """Of the answers, one row at a time."""
    found = []
    for row, count in zip(data["input_ids"].unbind(), ANSWERS, strict=True):
        logits = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        found.append(logits.gather(-1, row[1:, None])[-count:, 0])
    return found


def test_the_reference_is_the_base_without_the_adapter(bench: Bench, plain: Any, data: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()
    with torch.no_grad():
        expected, policy = log_probs(base, data), log_probs(plain, data)
    found = data["ref_log_prob"].unbind()
    assert sum((a - b).abs().sum() for a, b in zip(expected, policy, strict=True)) > 1
    for mine, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(policy, bench._log_probs(data), strict=True):  # and on again
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)


FORCES = {
    "k2_as_loss,ratio=none": lambda policy, ref: 0.5 * (policy - ref) ** 2,
    "k3_as_loss,ratio=none": lambda policy, ref: (ref - policy).exp() - 1 - (ref - policy),
}


@pytest.mark.parametrize("kl_type", FORCES)
def test_the_adapter_has_the_gradient_of_the_kl_to_the_base(
    bench: Bench, plain: Any, data: Any, kl_type: str
) -> None:
    still = data.clone()
    still["advantages"] = nested([torch.zeros(n) for n in ANSWERS])
    found, metrics = bench.step(still, kl_type, COEF)
    current = log_probs(plain, data)
    refs = data["ref_log_prob"].unbind()
    losses = [FORCES[kl_type](p, r) for p, r in zip(current, refs, strict=True)]
    loss = COEF * torch.cat(losses).mean()
    trained = [p for p in plain.parameters() if p.requires_grad]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]).double()
    assert expected.norm() > 1e-3
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    own = torch.cat([(p - r).detach() for p, r in zip(current, refs, strict=True)])
    assert metrics["klplug/k1"] == pytest.approx(float(own.mean()), rel=1e-3)


def test_base_and_adapter_come_out_of_a_checkpoint(
    bench: Bench, plain: Any, data: Any, tmp_path: Path
) -> None:
    """As the page of the recipes has it: verl's merger, then peft."""
    from peft import PeftModel

    saved, merged = tmp_path / "actor", tmp_path / "merged"
    bench.worker.engine.save_checkpoint(str(saved), global_step=1)
    words = ["--backend", "fsdp", "--local_dir", str(saved), "--target_dir", str(merged)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "verl.model_merger", "merge", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, merged / "lora_adapter").merge_and_unload().eval()
    with torch.no_grad():
        found, expected = log_probs(model, data), log_probs(plain, data)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer("2 + 2").input_ids == AutoTokenizer.from_pretrained(POLICY)("2 + 2").input_ids
    of_the_base = zip(expected, data["ref_log_prob"].unbind(), strict=True)
    assert max((mine - ref).abs().max() for mine, ref in of_the_base) > 0.5
    for mine, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=0.1)  # written in bfloat16
