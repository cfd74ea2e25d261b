"""The mean of two models as transformers writes and reads them, in bfloat16 and in shards."""

from __future__ import annotations

from pathlib import Path

import torch

from klplug.cli.soup import soup


def test_transformers_reads_the_mean_of_two_sharded_models(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
        size = ("20KB", "1GB")[seed]
        model.save_pretrained(tmp_path / str(seed), max_shard_size=size)
        states.append({name: tensor.float() for name, tensor in model.state_dict().items()})
    soup([tmp_path / "0", tmp_path / "1"], [0.25, 0.75], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    made = Qwen2ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert made.keys() == states[0].keys()
    for name, tensor in made.items():
        expected = 0.25 * states[0][name] + 0.75 * states[1][name]
        # Rounded once, to bfloat16.
        torch.testing.assert_close(tensor.float(), expected, rtol=2**-8, atol=0)
        assert not torch.equal(tensor.float(), states[0][name]) or "norm" in name or "bias" in name
