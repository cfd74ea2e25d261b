"""Is the answer right? The reward on both hosts, and the evaluation's.

OpenRLHF calls `reward_func` (`--reward.remote_url reward.py`), verl `compute_score`
(`reward.custom_reward_function.path`), and both judge by `is_correct`.

The last `#### N` of the response decides; without one, math-verify reads the response (a boxed
answer, else the last number). 1.0 for right, 0.0 for wrong. The hosts load this file by its path
into a Ray worker, so it imports nothing of this repository.
"""

import logging
import re
import unicodedata
from decimal import Decimal
from typing import Any

import torch
from math_verify import parse, verify

# It warns that its timeouts are off. They are: they need signals, and OpenRLHF calls the reward
# from a thread, where there are none. `_is_tame` keeps out what would need one.
logging.getLogger("math_verify").setLevel(logging.ERROR)

END_TOKENS = re.compile(r"<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|</s>|<eos>|<end_of_turn>")
OTHER_TOKENS = re.compile(r"<\|[^<>|]*\|>|<pad>|<s>|<bos>")
NUMBER = re.compile(
    r"""[\s*=:]*
        (?P<sign>-?)\s*[$€£]?\s*(?P<minus>-?)
        (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
        [%*]*[^\W\d_]*(?:\s+[^\W\d_]+)*[\s.*]*""",  # a unit may follow, in words
    re.VERBOSE,
)
NEGATIVE_SPACE = re.compile(r"\\!\s*")
FRACTION = re.compile(r"-?\d[\d,.]*(?:/\d+)?")

# What math-verify is shown without a time limit: some LaTeX, no factorial, small powers.
# `\boxed{9^{9^{9}}}`, six tokens of a policy gone astray, holds up its `verify` for ever.
TAME_LENGTH = 1000
TAME_BRACKETS = 40  # its LaTeX parser takes a minute over 800 of them
# fmt: off
TAME_COMMANDS = frozenset((
    "alpha", "approx", "arccos", "arcsin", "arctan", "begin", "beta", "bf", "boxed", "cap", "cdot",
    "circ", "cos", "cot", "csc", "cup", "delta", "dfrac", "displaystyle", "div", "dollar",
    "emptyset", "end", "epsilon", "fbox", "frac", "gamma", "ge", "geq", "gt", "in", "infty",
    "lambda", "le", "left", "leq", "ln", "log", "lt", "mathbb", "mathbf", "mathrm", "mbox", "mid",
    "mu", "ne", "neq", "notin", "omega", "overline", "phi", "pi", "pm", "quad", "qquad", "right",
    "sec", "setminus", "sigma", "sin", "sqrt", "tan", "text", "textbf", "tfrac", "theta", "times",
    "varnothing", "varphi",
))
# fmt: on
TAME_POWERS = 4
POWER = re.compile(r"\^|\*\*(?=\s*[\d({-])")
TAME_POWER = re.compile(r"(?:\^|\*\*)\s*(?:[\da-z]{1,2}|\{-?[\da-z]{1,2}\})(?!\s*(?:[\d^!.]|\*\*))")
# Sums to a power are multiplied out: nobody waits for `(a+b+c+d)^{99}`.
BRACKET_POWER = re.compile(r"[)\]}]\s*(?:\^|\*\*)\s*\{?(\d+)")
TAME_EXPANSION = 40  # exponents times signs
# Of these there may be any number: a letter's power, as in a polynomial, and degrees.
HARMLESS_POWER = re.compile(
    r"\\?[a-zA-Z]\s*\^\s*(?:\d|\{\d{1,2}\})(?!\s*(?:[\d^!.]|\*\*))"
    r"|\^\s*(?:\\circ|\{\s*\\circ\s*\})"
)


def _number(text: str) -> Decimal | None:
    """The number a text consists of, but for currency, unit and punctuation; else None."""
    if (match := NUMBER.fullmatch(text)) is None or (match["sign"] and match["minus"]):
        return None
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["sign"] or match["minus"] else value


def _is_tame(text: str) -> bool:
    """Whether math-verify surely reads the text in no time."""
    powers = HARMLESS_POWER.sub("", text)
    expansion = sum(map(int, BRACKET_POWER.findall(text))) * len(re.findall(r"[+-]", text))
    return (
        len(text) <= TAME_LENGTH
        and len(re.findall(r"[(\[{]", text)) <= TAME_BRACKETS
        and TAME_COMMANDS.issuperset(re.findall(r"\\([a-zA-Z]+)", text))
        and len(POWER.findall(powers)) <= TAME_POWERS
        and len(POWER.findall(powers)) == len(TAME_POWER.findall(powers))
        and expansion <= TAME_EXPANSION
    )


def last_boxed(text: str) -> str:
    r"""The last `\boxed{...}` with its braces balanced, or the empty string."""
    start = text.rfind(r"\boxed{")
    depth = 0
    for end in range(max(start, 0), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0 and text[end] == "}":
            return text[start : end + 1]
    return ""


def _is_equal(text: str, answer: str) -> bool:
    """Whether math-verify finds the answer in the text."""
    text = text.replace("!", ".")  # "It is 12!" is no factorial
    end = last_boxed(text) or (FRACTION.findall(text) or [""])[-1]
    shown = next((part for part in (text, end) if _is_tame(part)), None)
    if shown is None or not _is_tame(answer):
        return False
    # Bare LaTeX is LaTeX to math-verify only within $.
    gold = parse(f"${answer}$", parsing_timeout=None)
    return verify(gold, parse(shown, parsing_timeout=None), timeout_seconds=None)


def _plain(text: str) -> str:
    r"""The text with a plain minus, and `10,\!000` as 10,000."""
    return NEGATIVE_SPACE.sub("", text).replace("\N{MINUS SIGN}", "-")


def is_correct(response: str, answer: str) -> bool:
    """Whether a response reaches the answer: GSM8K's whole answer text, or what follows `####`."""
    response = END_TOKENS.split(response, maxsplit=1)[0]
    response = _plain(OTHER_TOKENS.sub(" ", response))
    answer = _plain(answer.rpartition("####")[2].strip())
    if "####" not in response:
        return _is_equal(response, answer)
    given = (response.rpartition("####")[2].strip().splitlines() or [""])[0]
    expected, number = _number(answer), _number(given)
    if expected is None or number is None:
        return bool(given) and _is_equal(f"${given}$" if "$" not in given else given, answer)
    return number == expected


def is_gradable(answer: str) -> bool:
    """Whether an answer is judged equal to itself: if not, no response can earn a reward."""
    return _number(answer) is not None or is_correct(rf"\boxed{{{answer}}}", answer)


def response_of(query: str, prompt: str) -> str:
    """The response in a query, which OpenRLHF makes of prompt and response, then decodes.

    A prompt that is too long loses its beginning there, so the query may begin within it, even
    within a character. Qwen's tokenizers compose characters (NFC).
    """
    query, prompt = (unicodedata.normalize("NFC", text) for text in (query, prompt))
    query = query.lstrip("\N{REPLACEMENT CHARACTER}")
    for start in range(len(prompt)):
        if query.startswith(prompt[start:]):
            return query[len(prompt) - start :]
    raise ValueError(f"query {query[:80]!r} does not begin with prompt {prompt[:80]!r}")


def reward_func(
    queries: list[str], prompts: list[str], labels: list[str]
) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
    """OpenRLHF's signature: one reward to each query, and the accuracy for the log."""
    rows = zip(queries, prompts, labels, strict=True)
    right = [is_correct(response_of(query, prompt), str(label)) for query, prompt, label in rows]
    rewards = torch.tensor(right, dtype=torch.float32)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"accuracy": rewards}}


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> float:
    """verl's signature: one response at a time."""
    return float(is_correct(solution_str, ground_truth))
