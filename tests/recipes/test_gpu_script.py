"""What benchmarks/gpu.sh runs, as far as a CPU can: a host's function out of its file, and GRPO."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import gpu_grpo
from benchmarks.host_functions import KL, kl_function
from recipes import cpu_shim
from recipes.reproduce import gradient_study
from recipes.reproduce.stock_kl import STOCK
from tests.conftest import NAMED

ROOT = Path(__file__).parents[2]
POLICY = ROOT / "recipes" / "quickstart" / "policy"


@pytest.mark.parametrize("host", NAMED)
def test_the_function_out_of_the_file_is_the_hosts(host: str, tmp_path: Path) -> None:
    cpu_shim.install(host)
    found = importlib.util.find_spec(host)
    assert found is not None and found.origin is not None
    file, _ = KL[host]
    installed = Path(found.origin).parents[1]
    wheel = tmp_path / f"{host}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(installed / file, f"{host}-1.0.data/purelib/{file}")
    word = "kl_penalty" if host == "verl" else "kl_estimator"
    log_probs = torch.linspace(-15, 15, 61) - 2
    ref = torch.full_like(log_probs, -2.0)
    for place in (installed, tmp_path):
        function = kl_function(place, host)
        for name in ("k1", "k2", "k3"):
            expected = STOCK[f"stock:{host}:{name}"](log_probs, ref)
            assert torch.equal(function(log_probs, ref, **{word: name}), expected)


def test_a_folder_without_the_host_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither verl/.*core_algos\.py nor a wheel verl-"):
        kl_function(tmp_path, "verl")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("1 + 2 = 3. #### 3<|im_end|>", True),
        ("#### 33", False),
        ("3", False),
        ("#### -3", False),
    ],
)
def test_reward(text: str, right: bool) -> None:
    assert gpu_grpo.is_right(text, "1 + 2 = 3. #### 3") == right


@pytest.mark.parametrize("kl_type", gpu_grpo.KL_TYPES)
def test_grpo_moves_the_policy_and_counts_its_kl(
    kl_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KL of the first rollout is that of the reference to itself, later ones are above it."""
    flips = iter([True, False] * 100)
    monkeypatch.setattr(gpu_grpo, "is_right", lambda text, answer: next(flips))
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    ref = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    ref.requires_grad_(False).eval()
    given = argparse.Namespace(
        rate=1e-3, device="cpu", seed=1, steps=3, prompts=2, group=4, every=1, beta=0.05
    )
    lines = list(gpu_grpo.grpo(ref, tokenizer, kl_type, given))
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["reward"] for line in lines] == [0.5] * 3
    assert lines[0]["kl_per_answer"] == pytest.approx(0, abs=1e-4)
    assert lines[2]["kl_per_answer"] > 1e-3
    assert all(line["gradient_norm"] > 0 for line in lines)


def test_supervised_steps_make_the_form_likelier() -> None:
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    prompts = torch.tensor([tokenizer(gpu_grpo.prompt("What is 17 + 25?")).input_ids])
    answers = torch.tensor([tokenizer("17 + 25 = 42. #### 42").input_ids])

    def log_prob() -> float:
        with torch.no_grad():
            log_probs = gpu_grpo.answer_log_probs(model, prompts, answers)
        return float(log_probs.gather(-1, answers[..., None]).sum())

    before = log_prob()
    gpu_grpo.supervised(model, tokenizer, steps=4, batch=4, rate=1e-3)
    assert log_prob() > before + 1


def test_the_figure_is_drawn_of_the_study_that_was_run(tmp_path: Path) -> None:
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    (code,) = re.findall(r'part figure .* -c "\n(.*?)\n" ', script, re.DOTALL)
    words = [str(gradient_study.RESULTS), str(tmp_path / "figure.svg")]
    subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=True)
    assert (tmp_path / "figure.svg").read_text().startswith("<svg")
