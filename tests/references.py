"""References that a policy can and can't be compared with: folders for the tests of hosts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

POLICY = Path(__file__).resolve().parents[1] / "recipes" / "quickstart" / "policy"


def _change(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def same(folder: Path) -> None:
    pass


def fewer_logits(folder: Path) -> None:
    _change(folder / "config.json", lambda config: config.update(vocab_size=400))


def more_padding(folder: Path) -> None:
    _change(folder / "config.json", lambda config: config.update(vocab_size=512))


def two_tokens_swapped(folder: Path) -> None:
    def swap(content: Any) -> None:
        ids = content["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]

    _change(folder / "tokenizer.json", swap)


def another_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def broken_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")


# What is said of each; a reference that differs in nothing that is read is served.
REFUSED: dict[Callable[[Path], None], list[str]] = {
    fewer_logits: ["has 400 logits per token", "has 465: at least as many are needed"],
    two_tokens_swapped: ["another tokenizer", "the token 'a' is"],
    another_template: ["another chat template"],
    no_tokenizer: ["another tokenizer", "no token here"],
    broken_configuration: ["its configuration and tokenizer can't be read"],
}
SERVED = (same, more_padding)


def made(change: Callable[[Path], None], folder: Path) -> Path:
    """A copy of the policy, changed."""
    place = folder / change.__name__
    shutil.copytree(POLICY, place)
    change(place)
    return place


def moved(folder: Path) -> Path:
    """The policy with other weights, so that its KL to the policy is not 0."""
    import torch
    from transformers import AutoModelForCausalLM

    place = made(same, folder)
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    model.save_pretrained(place)
    return place
