"""Answers that the reference gave once: the file that holds them, and what each update takes of it.

The file has a JSON object a line, and each line stands alone, so a part of a file is one too:

    {"prompt": [token ids], "answer": [token ids], "log_probs": [nats, one per answer token],
     "temperature": 1.0, "tokenizer": digest}
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klplug.hosting.references import Reader
from klplug.hosting.settings import SettingsError
from klplug.numerics import number_of

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = {"source": "a file of the reference's own answers, on which the KL is taken (none)"}
"""What a run may be told of whose answers the KL is taken on, in words."""

TOOL = "python -m recipes.reference_answers"
KEYS = ("prompt", "answer", "log_probs", "temperature", "tokenizer")


@dataclass(frozen=True)
class Answer:
    """One answer: token ids of prompt and answer, and log ref of the answer's, nats."""

    prompt: Sequence[int]
    answer: Sequence[int]
    log_probs: Sequence[float]


@dataclass(frozen=True)
class Stored:
    """All answers of a file, which were sampled at one temperature by one tokenizer's ids."""

    answers: tuple[Answer, ...]
    temperature: float
    tokenizer: str

    @classmethod
    def read(cls, path: str) -> Stored:
        """The answers of a file.

        Raises:
            SettingsError: names the file, the line, what is wrong and what is allowed.
        """
        answers, temperatures, tokenizers = [], set(), set()
        try:
            with Path(path).open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    row = _row(line, f"klplug.source {path}, line {number}")
                    answers.append(Answer(row["prompt"], row["answer"], row["log_probs"]))
                    temperatures.add(float(row["temperature"]))
                    tokenizers.add(row["tokenizer"])
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no text in UTF-8"
            raise SettingsError(
                f"klplug.source {path} can't be read: {why}. {TOOL} writes such a file"
            ) from None
        if not answers:
            raise SettingsError(f"klplug.source {path} has no answers. {TOOL} writes such a file")
        for what, found in (("temperature", temperatures), ("tokenizer", tokenizers)):
            if len(found) > 1:
                raise SettingsError(
                    f"klplug.source {path} has answers of {len(found)} {what}s "
                    f"({', '.join(map(str, sorted(found)))}): one is needed"
                )
        return cls(tuple(answers), temperatures.pop(), tokenizers.pop())

    @functools.cached_property
    def mean_length(self) -> float:
        """Tokens per answer. A sum over tokens divided by it, and not by the length of what was
        drawn, is unbiased."""
        return sum(len(own.answer) for own in self.answers) / len(self.answers)

    def drawn(self, beside: Tensor, count: int) -> list[Answer]:
        """``count`` of the answers, each as likely as any other.

        Args:
            beside: token ids of the micro-batch that they stand beside. They decide the draw: ranks
                that share a micro-batch draw alike, and a run that resumes needs no state for it.
        """
        import torch

        seed = zlib.crc32(beside.cpu().contiguous().numpy().tobytes())
        places = torch.randint(
            len(self.answers), (count,), generator=torch.Generator().manual_seed(seed)
        )
        return [self.answers[i] for i in places.tolist()]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise SettingsError(f"{where} is no JSON object. {TOOL} writes such a file")
    missing = [key for key in KEYS if key not in row]
    if missing:
        raise SettingsError(
            f"{where} has no {missing[0]!r}. It needs {', '.join(KEYS)}: {TOOL} writes such a file"
        )
    for key in ("prompt", "answer"):
        ids = row[key]
        if not isinstance(ids, list) or not ids or any(type(i) is not int or i < 0 for i in ids):
            raise SettingsError(f"{where}: {key!r} must be a list of one token id or more")
    log_probs = row["log_probs"]
    if not isinstance(log_probs, list) or not all(map(_is_finite, log_probs)):
        raise SettingsError(f"{where}: 'log_probs' must be a list of finite numbers, in nats")
    if len(log_probs) != len(row["answer"]):
        raise SettingsError(
            f"{where} has {len(row['answer'])} tokens of an answer and {len(log_probs)} log_probs: "
            "one for each token is needed"
        )
    if any(x > 1e-3 for x in log_probs):
        raise SettingsError(f"{where}: a log-prob of {max(log_probs):g} is above 0: no probability")
    temperature = row["temperature"]
    if not _is_finite(temperature) or temperature <= 0:
        raise SettingsError(f"{where}: 'temperature' must be a number above 0, got {temperature!r}")
    if not isinstance(row["tokenizer"], str):
        raise SettingsError(f"{where}: 'tokenizer' must be a string, got {row['tokenizer']!r}")
    return row


def _is_finite(value: Any) -> bool:
    number = number_of(value)
    return number is not None and math.isfinite(number)


def tokenizer_digest(ids: Mapping[str, int]) -> str:
    """Of every token and its id: two tokenizers that agree on them write the same ids."""
    pairs = json.dumps(sorted(ids.items(), key=lambda pair: pair[1]))
    return hashlib.blake2b(pairs.encode(), digest_size=8).hexdigest()


def check(
    path: str,
    policy: str,
    *,
    temperature: float,
    answers: int,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Stop unless the policy of a run can be compared with the answers of a file.

    Args:
        path: the file.
        policy: its folder, or its name on the hub.
        temperature: of the run's rollouts, by which its log-probs are of softmax(logits / T).
        answers: that an update of the run trains on, and so draws of the file.
        tokenizer: the policy's, where it is not in its folder.

    Raises:
        SettingsError: names the file, what differs, and what is allowed.
    """
    stored = Stored.read(path)
    if stored.temperature != temperature:
        raise SettingsError(
            f"klplug.source {path} was sampled at temperature {stored.temperature:g}, and the run "
            f"samples at {temperature:g}: the two log-probs are of other distributions. Set the "
            "run's to the file's, or draw new answers"
        )
    if len(stored.answers) < answers:
        raise SettingsError(
            f"klplug.source {path} has {len(stored.answers)} answers, and an update draws "
            f"{answers}: at least as many are needed"
        )
    own = Reader.of("the policy", policy, tokenizer or policy, trust_remote_code)
    if tokenizer_digest(own.ids) != stored.tokenizer:
        raise SettingsError(
            f"klplug.source {path} has the token ids of another tokenizer than the policy "
            f"{policy}. Draw the answers with a model that has the policy's tokenizer"
        )
    for number, answer in enumerate(stored.answers, 1):
        if (largest := max(*answer.prompt, *answer.answer)) >= own.size:
            raise SettingsError(
                f"klplug.source {path}, line {number}: the policy {policy} has no token id "
                f"{largest}, its ids are below {own.size}: draw new answers"
            )
