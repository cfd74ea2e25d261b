"""Which models the KL is to, where the user names them: they must read what the policy writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klplug.hosting.settings import SettingsError

SETTINGS = {
    "ref_model": "the model that the KL is to, a folder or a name on the hub (the policy's start)",
    "ref_update": "how it follows the policy: reset:N, or ema:DECAY,every=N (it stays as it is)",
    "teacher": "a second frozen model, of the terms with reference=teacher (none)",
}
"""What a run may be told of its references, in words, for command lines and documentation."""


@dataclass(frozen=True)
class Reader:
    """What decides how a model reads token ids.

    Attributes:
        size: its logits per token, rows of padding included.
        ids: of every token that its tokenizer has.
        template: its chat template; ``None`` where it has none.
    """

    size: int
    ids: dict[str, int]
    template: Any

    @classmethod
    def of(cls, what: str, path: str, tokens: str, trust_remote_code: bool) -> Reader:
        """From the configuration of a model and its tokenizer, which may lie elsewhere.

        Raises:
            SettingsError: they can't be read.
        """
        from transformers import AutoConfig, AutoTokenizer

        if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
            raise SettingsError(f"{what} {path}: there is no such folder")  # and no name on the hub
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(tokens, trust_remote_code=trust_remote_code)
        except Exception as error:  # of many kinds: of the hub, of JSON, of the model's own code
            why = str(error).strip().partition("\n")[0]
            raise SettingsError(
                f"{what} {path}: its configuration and tokenizer can't be read "
                f"({type(error).__name__}: {why})"
            ) from None
        size = int(config.get_text_config().vocab_size)
        return cls(size, tokenizer.get_vocab(), tokenizer.chat_template)


def check(
    policy: str,
    reference: str,
    key: str = "klplug.ref_model",
    *,
    in_chat: bool,
    tokenizer: str | None = None,
    over_vocabulary: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Stop unless every id that the policy can write means the same to the reference.

    Nothing more is needed for log-probs of the policy's answers: the reference never writes. It may
    have more tokens, or more rows of padding.

    Args:
        policy: its folder, or its name on the hub.
        reference: the same of the reference, or of the teacher.
        key: by which it was named.
        in_chat: whether prompts go through each model's own chat template.
        tokenizer: the policy's, where it is not in its folder.
        over_vocabulary: whether distributions are compared, and not tokens: row by row.

    Raises:
        SettingsError: names the reference, what differs, and what is allowed.
    """
    own = Reader.of("the policy", policy, tokenizer or policy, trust_remote_code)
    other = Reader.of(key, reference, reference, trust_remote_code)
    named = f"{key} {reference}"
    if other.size < own.size or (over_vocabulary and other.size != own.size):
        needed = "the same number" if over_vocabulary else "at least as many"
        raise SettingsError(
            f"{named} has {other.size} logits per token, and the policy {policy} has {own.size}: "
            f"{needed} are needed"
        )
    differ = [token for token, i in own.ids.items() if other.ids.get(token) != i]
    if differ:
        differing = min(differ, key=own.ids.__getitem__)
        there = other.ids.get(differing)
        raise SettingsError(
            f"{named} has another tokenizer than the policy {policy}: the token {differing!r} is "
            f"{own.ids[differing]} there and {'no token' if there is None else there} here. It "
            "must read the policy's own token ids"
        )
    templates = (own.template, other.template)
    if in_chat and None not in templates and own.template != other.template:
        raise SettingsError(
            f"{named} has another chat template than the policy {policy}, so the prompts are not "
            "what it was trained on. Save the policy's template with a copy of it, or the other "
            "way round"
        )
