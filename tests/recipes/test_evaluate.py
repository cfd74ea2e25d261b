"""The evaluation against enumeration, and the committed policy against its model card."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="no transformers here: it comes with a host")
pytest.importorskip("math_verify", reason="the recipes extra is not installed")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.quickstart import evaluate as module
from recipes.quickstart.evaluate import (
    answers,
    chat_prompt,
    eos_ids,
    evaluate,
    exact_kl,
    load,
    main,
)
from recipes.quickstart.problems import problems

POLICY = Path(module.__file__).parent / "policy"
VOCABULARY = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "#": 4}
PAD, EOS = 0, 1
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} #{% endif %}"
)
NEW_TOKENS = 4


def random_folder(path: Path, seed: int) -> Path:
    """A random Llama over five tokens, far from uniform, and its tokenizer."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    # What a published folder may hold, and what must not reach the sampling.
    model.generation_config.update(do_sample=True, top_k=2, temperature=0.3)
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="#"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return random_folder(root / "policy", 0), random_folder(root / "reference", 1)


@torch.no_grad()
def next_log_probs(model, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log pi(. | ids) of one unpadded row."""
    logits = model(torch.tensor([ids])).logits[0, -1].double()
    return (logits / temperature).log_softmax(-1)


def enumerated_kl(
    policy, reference, ids: list[int], left: int, mass: float = 1.0, log_ratio: float = 0.0
) -> float:
    """sum_y pi(y) log pi(y)/ref(y) over every answer of at most `left` tokens."""
    if left == 0:
        return mass * log_ratio
    log_pi, log_ref = next_log_probs(policy, ids), next_log_probs(reference, ids)
    total = 0.0
    for token in VOCABULARY.values():
        here = mass * log_pi[token].exp().item()
        ratio = log_ratio + (log_pi[token] - log_ref[token]).item()
        over = left - 1 if token != EOS else 0
        total += enumerated_kl(policy, reference, [*ids, token], over, here, ratio)
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_exact_kl_of_each_answer_is_the_sum_over_its_prefixes(
    folders, temperature: float, monkeypatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 3 * NEW_TOKENS * len(VOCABULARY))  # three rows at a time
    (policy, tokenizer), (reference, _) = map(load, folders)
    questions = ["a", "a b", "b b a b a", "b"] * 2
    torch.manual_seed(3)
    batch = answers(
        policy,
        tokenizer,
        [chat_prompt(tokenizer, q) for q in questions],
        max_new_tokens=NEW_TOKENS,
        temperature=temperature,
    )
    assert len(set(batch.lengths.tolist())) > 1, "no answer ended early: the test shows nothing"
    found = exact_kl(policy, reference, batch, temperature=temperature)
    width = batch.sequences.shape[1] - batch.response_mask.shape[1]
    for row, question in enumerate(questions):
        ids = tokenizer(chat_prompt(tokenizer, question), add_special_tokens=False).input_ids
        expected = 0.0
        for token in batch.sequences[row, width : width + batch.lengths[row]].tolist():
            log_pi = next_log_probs(policy, ids, temperature)
            log_ref = next_log_probs(reference, ids, temperature)
            expected += (log_pi.exp() * (log_pi - log_ref)).sum().item()
            ids.append(token)
        assert found[row].item() == pytest.approx(expected, rel=1e-5)
        assert (ids[-1] == EOS) == bool(batch.ended[row])


def test_its_mean_is_the_kl_of_whole_answers(folders) -> None:
    (policy, tokenizer), (reference, _) = map(load, folders)
    prompt = chat_prompt(tokenizer, "a b")
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    torch.manual_seed(4)
    batch = answers(policy, tokenizer, [prompt] * 4000, max_new_tokens=NEW_TOKENS, temperature=1.0)
    kl = exact_kl(policy, reference, batch)
    expected = enumerated_kl(policy, reference, ids, NEW_TOKENS)
    assert expected > 0.1
    assert kl.mean().item() == pytest.approx(expected, abs=4 * kl.std().item() / 4000**0.5)


def test_a_folder_generation_config_does_not_reach_the_sampling(folders) -> None:
    policy, tokenizer = load(folders[0])
    prompt = chat_prompt(tokenizer, "a")
    torch.manual_seed(5)
    batch = answers(policy, tokenizer, [prompt] * 4000, max_new_tokens=1, temperature=1.0)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    shares = batch.sequences[:, -1].bincount(minlength=len(VOCABULARY)) / 4000
    assert torch.allclose(shares, next_log_probs(policy, ids).exp().float(), atol=0.035)
    assert policy.generation_config.top_k == 2


def test_every_configured_eos_ends_an_answer(folders) -> None:
    policy, tokenizer = load(folders[0])
    policy.generation_config.eos_token_id = [3, 4]
    assert eos_ids(policy, tokenizer) == [EOS, 3, 4]
    torch.manual_seed(6)
    batch = answers(policy, tokenizer, ["a"] * 64, max_new_tokens=8, temperature=1.0)
    for row, mask in zip(batch.sequences[:, 1:], batch.response_mask, strict=True):
        kept = row[mask.bool()].tolist()
        assert not {EOS, 3, 4} & set(kept[:-1])
        assert kept[-1] in (EOS, 3, 4) or len(kept) == 8


def test_evaluate_returns_it_all_and_the_same_for_the_same_seed(folders, tmp_path, capsys) -> None:
    rows = [{"question": q, "answer": "x\n#### 1"} for q in ("a", "b a b", "b")]
    settings = {"max_new_tokens": NEW_TOKENS, "batch_size": 4, "samples": 5}
    first = evaluate(*folders, rows, **settings)
    again = evaluate(*folders, rows, **settings)
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in again.items() if k != "seconds"
    }
    assert first["kl_nats_per_answer"] > 0 and first["kl_standard_error"] > 0
    assert first["kl_nats_per_answer"] == pytest.approx(
        first["kl_nats_per_token"] * first["response_tokens"]
    )
    other = evaluate(*folders, rows, **settings, seed=1)
    assert other["kl_nats_per_answer"] != first["kl_nats_per_answer"]
    assert evaluate(folders[0], None, rows, **settings)["kl_nats_per_answer"] is None

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [str(folders[0]), "--reference", str(folders[1]), "--data", str(data), "--json"]
    main([*argv, "--max-new-tokens", str(NEW_TOKENS), "--samples", "5", "--batch-size", "4"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["kl_nats_per_answer"] == first["kl_nats_per_answer"]


def test_kl_to_itself_is_exactly_zero(folders, tmp_path) -> None:
    rows = [{"question": "a b", "answer": "#### 1"}, {"question": "b", "answer": "#### 1"}]
    copy = random_folder(tmp_path / "copy", 0)  # the same weights in another folder
    for reference in (folders[0], copy):
        result = evaluate(folders[0], reference, rows, max_new_tokens=NEW_TOKENS, samples=8)
        assert result["kl_nats_per_answer"] == 0.0


def test_what_cannot_be_evaluated_is_refused(folders) -> None:
    row = {"question": "a", "answer": "#### 1"}
    with pytest.raises(ValueError, match="no problem"):
        evaluate(folders[0], None, [])
    with pytest.raises(ValueError, match="samples=0"):
        evaluate(folders[0], None, [row], samples=0)
    with pytest.raises(ValueError, match=r"temperature=0"):
        evaluate(folders[0], None, [row], temperature=0)
    with pytest.raises(ValueError, match="policy has 465 tokens, reference 5"):
        evaluate(POLICY, folders[0], [row], max_new_tokens=2)


def test_a_tokenizer_without_chat_template_is_refused(tmp_path) -> None:
    folder = random_folder(tmp_path / "plain", 0)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        evaluate(folder, None, [{"question": "a", "answer": "#### 1"}])


# The committed policy.


def test_policy_is_tiny_and_sound() -> None:
    model, tokenizer = load(POLICY)
    assert model.num_parameters() < 1_000_000
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.padding_side == "left"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token != tokenizer.eos_token
    assert eos_ids(model, tokenizer) == [tokenizer.eos_token_id]
    assert len(tokenizer("12345", add_special_tokens=False).input_ids) == 5
    for parameter in model.parameters():  # a host that loads in bfloat16 loses nothing
        assert torch.equal(parameter, parameter.bfloat16().float())
    row = problems("test", 1)[0]
    text = chat_prompt(tokenizer, row["question"]) + row["answer"] + tokenizer.eos_token
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_policy_solves_about_what_its_card_says() -> None:
    result = evaluate(POLICY, None, problems("test", 50), max_new_tokens=48, samples=8)
    assert 0.5 <= result["accuracy"] <= 0.75  # card: 0.638 of 500
    assert 0.4 <= result["sampled_accuracy"] <= 0.62  # card: 0.508 of 500 x 8
    assert result["mixed_share"] >= 0.6  # card: 0.782
    assert 15 <= result["response_tokens"] <= 26
    assert result["cut_share"] <= 0.02


def test_policy_has_no_kl_to_itself() -> None:
    assert evaluate(POLICY, POLICY, problems("test", 8))["kl_nats_per_answer"] == 0.0


def test_prompts_are_those_of_openrlhf() -> None:
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no OpenRLHF here")
    # Its package's __init__ would load half the host; this one file stands alone.
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "prompts_dataset.py"
    file_spec = importlib.util.spec_from_file_location("prompts_dataset", path)
    assert file_spec and file_spec.loader
    host = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(host)
    _, tokenizer = load(POLICY)
    for row in problems("test", 20):
        prompt, label = host.preprocess_data(
            row,
            input_key="question",
            label_key="answer",
            apply_chat_template=tokenizer.apply_chat_template,
        )
        assert prompt == chat_prompt(tokenizer, row["question"])
        assert label == row["answer"]
